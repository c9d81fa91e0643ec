"""Half precision and its scaler, what is logged, and the pictures that show how far it is."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cmlora.adapters.tuners import store
from tests.training import bench

GPU = torch.cuda.is_available()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    bench.pictures(tmp_path / "data")
    return tmp_path


def gradient(path: Path) -> list[float]:
    with path.open() as file:
        return [float(row["gradient"]) for row in csv.DictReader(file)]


def test_gradients_of_half_precision_are_scaled_back(folder: Path) -> None:
    """Norms of gradients are those of full precision, although the loss was multiplied by 65536."""
    trainers = {}
    for precision in ("no", "fp16", "bf16"):
        trainers[precision] = bench.trainer(
            folder, output=str(folder / precision), precision=precision, steps=2, clip=0.0
        )
        trainers[precision].run()
    assert trainers["fp16"].scaled._scaler.get_scale() == 2.0**16
    assert not trainers["bf16"].scaled._scaler.is_enabled()
    exact = gradient(folder / "no" / "log.csv")
    for precision in ("fp16", "bf16"):
        found = gradient(folder / precision / "log.csv")
        assert found == pytest.approx(exact, rel=0.1)
        assert found != exact
        for parameter in trainers[precision].trained.values():
            assert parameter.dtype == torch.float32


def test_a_step_that_overflowed_is_left_out_and_the_scale_halved(folder: Path) -> None:
    trainer = bench.trainer(folder, precision="fp16", steps=3, clip=0.0)
    original = trainer.scaled.unscale

    def spoilt(optimizer: torch.optim.Optimizer) -> None:
        if trainer.step == 1:
            next(iter(trainer.trained.values())).grad.fill_(float("inf"))  # type: ignore[union-attr]
        original(optimizer)

    trainer.scaled.unscale = spoilt  # type: ignore[method-assign]
    seen = []

    def watch(done: int, loss: float) -> None:
        values = {key: p.detach().clone() for key, p in trainer.trained.items()}
        seen.append((values, trainer.scaled._scaler.get_scale()))

    trainer.run(watch)
    (one, first), (two, second), (three, third) = seen
    assert (first, second, third) == (2.0**16, 2.0**15, 2.0**15)
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not all(torch.equal(two[key], three[key]) for key in two)


def test_the_scale_is_resumed(folder: Path) -> None:
    options: dict[str, Any] = {"precision": "fp16", "steps": 4, "save_every": 1}
    straight = bench.trainer(folder, output=str(folder / "straight"), **options)
    straight.scaled._scaler._init_scale = 1024.0
    expected = straight.run().path.read_bytes()
    first = bench.trainer(folder, **options)
    first.scaled._scaler._init_scale = 1024.0
    with pytest.raises(ConnectionError):
        first.run(bench.stop_at(2))
    again = bench.trainer(folder, **options)
    again.resume()
    assert again.scaled._scaler.get_scale() == 1024.0
    assert again.run().path.read_bytes() == expected


def test_samples_are_what_the_stock_pipeline_draws_with_the_file(folder: Path) -> None:
    trainer = bench.trainer(
        folder, steps=2, validate_every=2, validation_prompts=("a cat", "a dog"),
        validation_steps=2, seed=5, rate=5e-2,
    )  # fmt: skip
    path = trainer.run().path
    names = ["step-000002-0.png", "step-000002-1.png"]
    assert sorted(p.name for p in (folder / "out" / "samples").iterdir()) == names
    stock = bench.pipeline()
    plain = stock("a cat", num_inference_steps=2, generator=noise(5), height=32, width=32).images[0]
    stock.load_lora_weights(path.parent, weight_name=path.name)
    for number, prompt in enumerate(("a cat", "a dog")):
        image = stock(
            prompt, num_inference_steps=2, generator=noise(5 + number), height=32, width=32
        ).images[0]
        with Image.open(folder / "out" / "samples" / names[number]) as sample:
            found = np.asarray(sample).astype(int)
        assert np.abs(found - np.asarray(image).astype(int)).max() <= 1
        if number == 0:
            assert np.abs(found - np.asarray(plain).astype(int)).max() > 1


def noise(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_tensorboard_holds_what_the_csv_holds(folder: Path) -> None:
    name = "tensorboard.backend.event_processing.event_accumulator"
    reader: Any = pytest.importorskip(name, reason="needs tensorboard")
    options: dict[str, Any] = {"steps": 4, "save_every": 1, "tensorboard": True}
    with pytest.raises(ConnectionError):
        bench.trainer(folder, **options).run(bench.stop_at(2))
    outcome = bench.trainer(folder, **options).run()
    events = reader.EventAccumulator(str(folder / "out" / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["gradient", "loss", "rate"]
    found = {event.step: event.value for event in events.Scalars("loss")}
    assert found == pytest.approx(dict(enumerate(outcome.losses, 1)), rel=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs an accelerator")
@pytest.mark.parametrize("precision", ["no", "fp16", "bf16"])
def test_training_on_an_accelerator(precision: str, folder: Path) -> None:
    pipe = bench.pipeline().to("cuda")
    trainer = bench.trainer(folder, pipe, precision=precision, steps=20, rate=2e-2)
    assert trainer.device.type == "cuda"
    outcome = trainer.run()
    assert sum(outcome.losses[-5:]) < sum(outcome.losses[:5])
    fresh = bench.pipeline().to("cuda")
    store.load(fresh, outcome.path, "ink")
    for key, parameter in fresh.unet.named_parameters():
        if ".ink" in key:
            other = dict(pipe.unet.named_parameters())[key]
            assert torch.equal(parameter.to(other), other)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs an accelerator")
def test_a_model_in_half_precision_on_an_accelerator(folder: Path) -> None:
    pipe = bench.pipeline().to("cuda", torch.float16)
    trainer = bench.trainer(folder, pipe, precision="fp16", steps=5)
    assert {p.dtype for p in trainer.trained.values()} == {torch.float32}
    assert {p.dtype for p in pipe.unet.parameters() if not p.requires_grad} == {torch.float16}
    outcome = trainer.run()
    assert all(np.isfinite(outcome.losses))
    assert store.load(bench.pipeline(), outcome.path, "ink") == ("unet",)
