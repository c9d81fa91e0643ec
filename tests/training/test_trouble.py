"""Disks that are full, checkpoints of something else, and settings that fit nothing."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from cmlora.adapters.training import Trainer, read_folder, train
from cmlora.errors import CmloraError
from cmlora.pipelines.cmlora_pipeline import CMLoRAPipeline
from tests.training import bench


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    bench.pictures(tmp_path / "data")
    return tmp_path


@contextmanager
def room(size: int) -> Iterator[None]:
    """No file may grow beyond a size, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_leaves_the_last_checkpoint(folder: Path) -> None:
    with pytest.raises(ConnectionError):
        bench.trainer(folder, steps=6, save_every=1).run(bench.stop_at(2))
    trainer = bench.trainer(folder, steps=6, save_every=1)
    size = trainer.checkpoint.stat().st_size
    with room(size // 2), pytest.raises(CmloraError, match="cannot write"):
        trainer.run()
    kept = bench.trainer(folder, steps=6, save_every=1)
    kept.resume()
    assert kept.step == 2
    assert not [p for p in (folder / "out").iterdir() if p.name.startswith(".")]
    assert kept.run().losses


def test_the_output_may_be_no_folder(folder: Path) -> None:
    (folder / "out").write_text("a file")
    with pytest.raises(CmloraError, match="cannot write to"):
        bench.trainer(folder).run()


def test_a_checkpoint_of_something_else(folder: Path) -> None:
    with pytest.raises(ConnectionError):
        bench.trainer(folder, steps=6, save_every=1).run(bench.stop_at(1))
    for options, message in (
        ({"rate": 0.5}, r"rate was 0\.01 and is 0\.5 now; resume with the same settings"),
        ({"steps": 7}, "steps was 6 and is 7 now"),
        ({"tuner": "dylora"}, "tuner was 'lora' and is 'dylora' now"),
    ):
        with pytest.raises(CmloraError, match=message):
            bench.trainer(folder, **{"steps": 6, "save_every": 1} | options).run()
    other = bench.trainer(folder, steps=6, save_every=2, validation_steps=9)
    other.resume()
    assert other.step == 1
    (folder / "data" / "0.txt").write_text("a dog")
    with pytest.raises(CmloraError, match="other pictures or captions"):
        bench.trainer(folder, steps=6, save_every=1).run()
    path = folder / "out" / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CmloraError, match="cut short"):
        bench.trainer(folder, steps=6, save_every=1).run()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ("to_qq",)}, "no layer of the unet is called 'to_qq'; near names: .*to_q"),
        ({"text_targets": ("q_prj",)}, "text_encoder is called 'q_prj'; near names: .*q_proj"),
        ({"rank": 9}, r"rank is 9, and unet\..* of 8x8 allows 8 at most"),
        ({"tuner": "loro"}, "unknown tuner 'loro'; did you mean lora"),
        ({"optim": "adam"}, "unknown optimizer 'adam'; did you mean adamw"),
        ({"options": {"slot": 1}}, "lora has no option 'slot'"),
        ({"hook_options": {"samples": 1}}, "lora takes no hook_options"),
        ({"tuner": "snella", "hook_options": {"samples": 1}}, "hook_options do not fit: .*samples"),
        ({"tuner": "s2ft", "options": {"side": "top"}}, "side='top'"),
        ({"tuner": "nola", "optim": "lora_pro"}, "has no pair of factors"),
        ({"objective": "flow"}, "is not the scheduler of a flow"),
    ],
)
def test_settings_that_do_not_fit(options: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(CmloraError, match=message):
        bench.trainer(folder, **options).run()


def test_a_loss_that_is_no_number_stops_the_training(folder: Path) -> None:
    trainer = bench.trainer(folder, save_every=1)
    with pytest.raises(ConnectionError):
        trainer.run(bench.stop_at(1))
    with torch.no_grad():
        next(iter(trainer.trained.values())).fill_(float("nan"))
    trainer.resume = lambda: None  # type: ignore[method-assign]
    with pytest.raises(CmloraError, match="the loss is nan at step 2; lower the rate"):
        trainer.run()
    again = bench.trainer(folder, save_every=1)
    again.resume()
    assert again.step == 1


def test_there_must_be_pictures_and_a_denoiser(folder: Path) -> None:
    with pytest.raises(CmloraError, match="no pictures"):
        Trainer(bench.pipeline(), bench.settings(folder / "out"), [])
    pipe = bench.pipeline()
    pipe.unet = None
    with pytest.raises(CmloraError, match="no unet and no transformer"):
        Trainer(pipe, bench.settings(folder / "out"), read_folder(folder / "data"))
    changed = replace(bench.settings(folder / "out"), name="ink")
    trainer = Trainer(bench.pipeline(), changed, read_folder(folder / "data"))
    with pytest.raises(CmloraError, match="an adapter 'ink' already"):
        Trainer(trainer.pipe, changed, read_folder(folder / "data"))


def adapters(pipe: Any) -> list[str]:
    """Layers of adapters in a pipeline's denoiser, and what it says about them."""
    layers = [n for n, m in pipe.unet.named_modules() if isinstance(m, BaseTunerLayer)]
    return [*layers, *getattr(pipe.unet, "peft_config", {})]


def test_a_wrapper_is_trained_and_loads_what_came_of_it(folder: Path) -> None:
    pipe = CMLoRAPipeline(bench.pipeline())
    before = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    outcome = train(pipe, bench.settings(folder / "out"), read_folder(folder / "data"))
    assert outcome.losses
    assert not adapters(pipe)
    assert all(torch.equal(before[key], value) for key, value in pipe.unet.state_dict().items())
    pipe.load_lora_weights(outcome.path)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a cat", composition="merge", num_inference_steps=1, seed=1).images


def test_a_training_that_fails_leaves_no_adapter(folder: Path) -> None:
    pipe, examples = bench.pipeline(), read_folder(folder / "data")
    asked = bench.settings(folder / "out")
    with pytest.raises(CmloraError, match="beta"):
        train(pipe, replace(asked, optim_options={"beta": 3}), examples)
    assert not adapters(pipe)
    with pytest.raises(ConnectionError):
        train(pipe, replace(asked, save_every=1), examples, progress=bench.stop_at(1))
    assert not adapters(pipe)
    assert len(train(pipe, replace(asked, save_every=1), examples).losses) == asked.steps
    assert asked.name in adapters(pipe)
