"""Whole trainings of a tiny Stable Diffusion: what they learn, write, and survive."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import cmlora
from cmlora import files
from cmlora.adapters.compression.layers import CompactLinear
from cmlora.adapters.training import Example, Trainer, read_folder, train
from cmlora.adapters.training.settings import FREE
from cmlora.adapters.tuners import TUNERS, store
from cmlora.adapters.tuners.dylora import DyloraLayer
from cmlora.adapters.tuners.lora_sb import LoraSbLayer
from cmlora.adapters.tuners.snella import SnellaLayer
from cmlora.emoji import schedule
from tests import tiny
from tests.training import bench


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    bench.pictures(tmp_path / "data")
    return tmp_path


def header(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        found: dict[str, str] = file.metadata()
    return found


def test_a_lora_learns_and_every_program_reads_it(folder: Path) -> None:
    pipe = bench.pipeline()
    trainer = bench.trainer(
        folder,
        pipe,
        steps=40,
        rate=2e-2,
        min_snr=5.0,
        category="character",
        dtype="float16",
        header={"cmlora.series": "first", "cmlora.name": "an ink"},
    )
    before = sum(float(trainer.loss(1000 + n, 0).detach()) for n in range(20))
    outcome = trainer.run()
    after = sum(float(trainer.loss(1000 + n, 0).detach()) for n in range(20))
    assert after < 0.9 * before
    assert len(outcome.losses) == 40
    assert outcome.path == folder / "out" / "ink.safetensors"
    assert not trainer.checkpoint.exists()
    assert (folder / "out" / "loss.svg").is_file()

    facts = files.describe(outcome.path)
    assert facts["triggers"] == ["zorbo"]
    assert facts["category"] == "character"
    assert facts["dtypes"] == ["float16"]
    assert facts["rank"] == [2, 2]
    assert facts["tags"] == {"zorbo": 5} | {f"a cat {n}": 1 for n in range(5)}
    assert facts["name"] == "an ink"
    said = header(outcome.path)
    assert said["cmlora.series"] == "first"
    assert said["ss_steps"] == "40"
    assert said["modelspec.trigger_phrase"] == "zorbo"
    assert said["modelspec.prediction_type"] == "epsilon"
    asked = trainer.settings.to_dict()
    assert json.loads(said["cmlora.training"]) == {k: v for k, v in asked.items() if k not in FREE}
    assert str(folder) not in " ".join(said.values()), "a file that is shared names no folder"
    with cmlora.compose(pipe, ["ink"], method="merge"):
        expected = tiny.run(pipe, steps=2)
    assert not torch.allclose(expected, tiny.run(bench.pipeline(), steps=2), atol=1e-3)
    theirs = bench.pipeline()
    theirs.load_lora_weights(folder / "out", weight_name="ink.safetensors", adapter_name="a")
    ours = bench.pipeline()
    files.load(ours, outcome.path, "a")
    other = bench.pipeline()
    store.load(other, outcome.path, "a")
    for each in (theirs, ours, other):
        with cmlora.compose(each, ["a"], method="merge"):
            assert torch.allclose(tiny.run(each, steps=2), expected, atol=2e-2)


WAYS: dict[str, dict[str, Any]] = {
    "plain": {"save_every": 1},
    "everything": {
        "save_every": 2,
        "ema": 0.9,
        "accumulate": 2,
        "schedule": "cosine",
        "warmup": 2,
        "flip": True,
        "caption_dropout": 0.3,
        "noise_offset": 0.1,
        "order": "random",
        "text_targets": ("q_proj",),
        "text_rate": 1e-3,
        "options": {"lora_dropout": 0.3},
        "checkpointing": True,
        "cache": "disk",
    },
    "dylora": {"save_every": 1, "tuner": "dylora"},
    "maestro": {"save_every": 1, "tuner": "maestro"},
    "snella": {"save_every": 1, "tuner": "snella", "options": {"sparsity": 0.2}},
    "lora_sb": {"save_every": 1, "tuner": "lora_sb", "hook_options": {"samples": 3}},
    "lora_pro": {"save_every": 1, "optim": "lora_pro"},
    "full": {"save_every": 1, "full": True, "optim": "galore", "optim_options": {"gap": 2}},
    "trp": {"save_every": 1, "full": True, "trp": True, "trp_every": 2, "optim": "frugal"},
    "quartet": {"save_every": 1, "full": True, "base_format": "quartet"},
    "nola": {"save_every": 1, "tuner": "nola", "precision": "bf16", "base_format": "mxfp4"},
}


def content(path: Path) -> dict[str, bytes]:
    inner = [path] if path.is_file() else sorted(path.iterdir())
    return {one.name: one.read_bytes() for one in inner}


RARE = ("plain", "dylora", "maestro", "lora_sb", "trp", "quartet", "snella", "nola")


@pytest.mark.parametrize(
    "way", [pytest.param(w, marks=pytest.mark.slow) if w in RARE else w for w in WAYS]
)
def test_an_interrupted_training_ends_with_the_same_bits(way: str, folder: Path) -> None:
    options = WAYS[way] | {"steps": 5, "validate_every": 2, "validation_prompts": ("a cat",)}
    options["validation_steps"] = 1
    straight = bench.trainer(folder, **options).run()
    expected = content(straight.path)
    pictures = content(folder / "out" / "samples")
    shutil.move(folder / "out", folder / "first")
    for step in (1, 3):  # with save_every 2 a step is lost each time
        with pytest.raises(ConnectionError):
            bench.trainer(folder, **options).run(bench.stop_at(step))
    resumed = bench.trainer(folder, **options)
    resumed.resume()
    assert resumed.step == (2 if options["save_every"] == 2 else 3)
    outcome = resumed.run()
    assert outcome.losses == straight.losses
    found = content(outcome.path)
    assert found.keys() == expected.keys()
    for name, data in expected.items():
        assert found[name] == data, name
    assert content(folder / "out" / "samples") == pictures


def test_ctrl_c_ends_the_step_and_keeps_it(folder: Path) -> None:
    def press(done: int, loss: float) -> None:
        if done == 2:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    trainer = bench.trainer(folder, steps=6, save_every=100)
    with pytest.raises(KeyboardInterrupt):
        trainer.run(press)
    again = bench.trainer(folder, steps=6, save_every=100)
    again.resume()
    assert again.step == trainer.step == 2
    assert signal.getsignal(signal.SIGINT) is before


def test_nothing_global_is_left_changed(folder: Path) -> None:
    pipe = bench.pipeline()
    scheduler, random = pipe.scheduler, torch.get_rng_state()
    bars = dict(getattr(pipe, "_progress_bar_config", {}))
    train(pipe, bench.settings(folder / "out", steps=1), read_folder(folder / "data"))
    assert torch.equal(torch.get_rng_state(), random)
    assert pipe.scheduler.config == scheduler.config
    assert pipe._progress_bar_config == bars
    assert not pipe.unet.training
    assert not pipe.unet._forward_pre_hooks


COMMON = ("nola", "lora_sb", "hydra", "snell", "dylora", "oft", "dora", "lokr")


@pytest.mark.parametrize(
    "name", [n if n in COMMON else pytest.param(n, marks=pytest.mark.slow) for n in TUNERS]
)
def test_every_tuner_trains_and_its_file_gives_the_same_picture(name: str, folder: Path) -> None:
    options: dict[str, Any] = {
        "orthogonal": {"slot": 1},
        "sltrain": {"density": 0.1},
        "lost": {"columns": 0.3},
    }
    pipe = bench.pipeline()
    trainer = bench.trainer(
        folder, pipe, tuner=name, steps=2, targets=("to_q",), rate=5e-2,
        options=options.get(name, {}),
        hook_options={"samples": 3} if name == "lora_sb" else {}, rank=4 if name == "oft" else 2,
    )  # fmt: skip
    start = {key: p.detach().clone() for key, p in trainer.trained.items()}
    frozen = {k: p.detach().clone() for k, p in pipe.unet.named_parameters() if not p.requires_grad}
    path = trainer.run().path
    moved = [key for key, p in trainer.trained.items() if not torch.equal(p, start[key])]
    if name not in ("dylora", "maestro"):  # they may leave ranks or layers out of two steps
        assert moved == list(start), name
    assert moved
    now = dict(pipe.unet.named_parameters())
    assert all(torch.equal(now[key], value) for key, value in frozen.items())
    fresh = bench.pipeline()
    store.load(fresh, path, "ink")
    assert torch.equal(tiny.run(fresh, steps=1), tiny.run(pipe, steps=1))


def test_the_embedded_world_can_be_trained_this_way(folder: Path) -> None:
    """Latents and captions from memory, v-prediction, min-SNR, a falling rate."""
    pipe = tiny.sd15(channels=(8, 16), layers_per_block=1, latent_channels=12)
    pipe.scheduler = schedule.scheduler()
    pipe.vae = None

    def caption(rng: Any) -> str:
        return f"a cat {rng.integers(9)}"

    random = torch.Generator().manual_seed(0)
    examples = [Example(torch.randn(12, 16, 16, generator=random), caption) for _ in range(5)]
    settings = bench.settings(
        folder / "out",
        steps=3,
        batch=4,
        min_snr=5.0,
        caption_dropout=0.1,
        order="random",
        schedule="linear",
        warmup=2,
        optim_options={"betas": [0.9, 0.99], "weight_decay": 0.01},
    )
    trainer = Trainer(pipe, settings, examples)
    clean = examples[0].picture
    assert isinstance(clean, torch.Tensor)
    question = trainer.objective.ask(clean[None], torch.Generator().manual_seed(3))
    noise_random = torch.Generator().manual_seed(3)
    noise = torch.randn(1, 12, 16, 16, generator=noise_random)
    steps = torch.randint(1000, (1,), generator=noise_random)
    alphas = schedule.scheduler().alphas_cumprod[steps]
    assert torch.equal(question.timesteps, steps)
    torch.testing.assert_close(question.noisy, schedule.noised(clean[None], noise, alphas))
    torch.testing.assert_close(question.target, schedule.v_target(clean[None], noise, alphas))
    snr = alphas / (1 - alphas)
    torch.testing.assert_close(question.weight, snr.clamp(max=5) / (snr + 1))
    tokens = pipe.tokenizer(["a cat 1"], padding="max_length", truncation=True, return_tensors="pt")
    hidden = pipe.text_encoder(tokens.input_ids)[0]
    size = trainer.latents.sizes[0]
    given = trainer.texts.get(["a cat 1"], size)["encoder_hidden_states"]
    assert torch.equal(given, hidden)
    outcome = trainer.run()
    rates = [row.split(",")[3] for row in (folder / "out" / "log.csv").read_text().split()[1:]]
    assert [float(r) for r in rates] == pytest.approx([5e-3, 1e-2 * 2 / 3, 1e-2 / 3], rel=1e-5)
    assert files.read(outcome.path).updates


def test_text_encoders_are_trained_with_it(folder: Path) -> None:
    pipe = bench.pipeline()
    trainer = bench.trainer(folder, pipe, text_targets=("q_proj", "fc1"), steps=2, text_rate=5e-2)
    assert [g["lr"] for g in trainer.optimizer.param_groups] == [1e-2, 5e-2]
    names = [key for key in trainer.trained if key.startswith("text_encoder.")]
    assert names
    path = trainer.run().path
    ups = [p for k, p in trainer.trained.items() if k in names and "lora_B" in k]
    assert all(bool(p.any()) for p in ups)
    fresh = bench.pipeline()
    applied = files.load(fresh, path, "ink")
    assert applied.text_modules == 4
    assert torch.allclose(tiny.run(fresh, steps=1), tiny.run(pipe, steps=1), atol=1e-5)


def test_pictures_of_the_class_keep_their_loss(folder: Path) -> None:
    bench.pictures(folder / "prior", 3)
    prior = read_folder(folder / "prior")
    both = Trainer(
        bench.pipeline(),
        bench.settings(folder / "out", prior_data="x", prior_prompt="a cat", prior_weight=0.5),
        read_folder(folder / "data", "zorbo"),
        prior,
    )
    alone = bench.trainer(folder)
    with torch.no_grad():
        plain = both._loss(both.latents, both.order, both.examples, 3, 0)
        assert both.prior is not None
        extra = both._loss(*both.prior, both.prior_examples, 3, 1)
        assert float(alone.loss(3, 0)) == float(plain)
        assert float(both.loss(3, 0)) == pytest.approx(float(plain + 0.5 * extra))


def test_the_average_is_what_is_written(folder: Path) -> None:
    trainer = bench.trainer(folder, ema=0.999, steps=3, keep_checkpoint=True)
    path = trainer.run().path
    key = next(iter(trainer.trained))
    average, last = trainer.average.values[key], trainer.trained[key]
    assert not torch.equal(average, last)
    written = store.read(path)[1]["unet"]
    name = key.removeprefix("unet.").replace(".ink", "")
    assert torch.equal(written[name], average)
    assert trainer.checkpoint.is_file()


def test_a_base_in_four_bits(folder: Path) -> None:
    pipe = bench.pipeline()
    pipe.unet = tiny.unet_sd15(channels=(32, 32), layers_per_block=1)
    trainer = bench.trainer(folder, pipe, base_format="mxfp4", targets=("to_q", "ff.net.2"))
    packed = [m for m in pipe.unet.modules() if isinstance(m, CompactLinear)]
    assert packed
    for layer in packed:
        held = sum(p.numel() * p.element_size() for n, p in layer.named_buffers())
        assert held <= 17 * layer.out_features * -(-layer.in_features // 32) + 8
    path = trainer.run().path
    fresh = bench.pipeline()
    fresh.unet = tiny.unet_sd15(channels=(32, 32), layers_per_block=1)
    assert files.load(fresh, path, "ink").modules == len(trainer.parts.layers["unet"])


def test_a_start_from_the_first_full_step(folder: Path) -> None:
    pipe = bench.pipeline()
    trainer = bench.trainer(
        folder, pipe, tuner="lora_sb", targets=("to_q",), rate=1e-3, hook_options={"samples": 9}
    )
    plain = bench.pipeline()
    other = bench.trainer(folder, plain, targets=("to_q",), rate=1e-3)
    layers = other.parts.layers["unet"]
    weights = [plain.unet.get_submodule(name).base_layer.weight for name in layers]
    for weight in weights:
        weight.requires_grad_(True)
    for number in range(9):
        torch.autograd.backward(other.loss(number, 0) / 9)
    tuned = dict(trainer.parts.tuners(LoraSbLayer))
    for name, weight in zip(layers, weights, strict=True):
        assert weight.grad is not None
        step = -1e-3 * weight.grad.double().sign()
        u, s, vh = torch.linalg.svd(step, full_matrices=False)
        expected = (u[:, :2] * s[:2]) @ vh[:2]
        found = tuned[f"unet.{name}"].get_delta_weight("ink").double()
        assert torch.allclose(found, expected, atol=1e-6)
    assert all(p.grad is None for p in pipe.unet.parameters())


def test_ranks_that_are_left_out_do_not_move(folder: Path) -> None:
    trainer = bench.trainer(folder, tuner="dylora", rank=4, steps=6, batch=1, rate=1e-1)
    layers = [layer for _, layer in trainer.parts.tuners(DyloraLayer)]
    ranks = []
    while trainer.step < 6:
        before = [layer.held("ink", "up").detach().clone() for layer in layers]
        trainer._one()
        rank = layers[0].state["ink"]
        ranks.append(rank)
        assert all(layer.state["ink"] == rank for layer in layers)
        for layer, old in zip(layers, before, strict=True):
            now = layer.held("ink", "up").detach()
            assert torch.equal(now[:, rank:], old[:, rank:])
            assert not torch.equal(now[:, :rank], old[:, :rank])
    assert len(set(ranks)) > 1


def test_the_allocator_thins_out(folder: Path) -> None:
    trainer = bench.trainer(
        folder, tuner="snella", steps=12, batch=5, options={"sparsity": 0.1}, targets=("to_q",)
    )
    trainer.run()
    shares = [layer.sparsity("ink") for _, layer in trainer.parts.tuners(SnellaLayer)]
    assert sum(shares) / len(shares) > 0.4
    assert len(set(shares)) > 1


def test_pruning_while_training_leaves_less_rank(folder: Path) -> None:
    shares = []
    for trp in (False, True):
        options: dict[str, Any] = {"full": True, "steps": 4, "batch": 1, "rate": 1e-4}
        pipe = bench.pipeline()
        trainer = bench.trainer(
            folder,
            pipe,
            trp=trp,
            trp_every=2,
            trp_energy=0.9,
            output=str(folder / str(trp)),
            **options,
        )
        trainer.run()
        weight = pipe.unet.mid_block.resnets[0].conv1.weight.detach().flatten(1)
        values = torch.linalg.svdvals(weight.double()).square()
        shares.append(float(values[: len(values) * 3 // 4].sum() / values.sum()))
    assert shares[1] > shares[0] + 0.02


def test_training_the_denoiser_itself(folder: Path) -> None:
    trainer = bench.trainer(
        folder, full=True, optim="galore", optim_options={"rank": 4}, steps=3, rate=1e-2
    )
    assert len(trainer.trained) == len(list(trainer.parts.denoiser.parameters()))
    path = trainer.run().path
    assert path.is_dir()
    again = type(trainer.parts.denoiser).from_pretrained(path)  # type: ignore[attr-defined]
    for one, two in zip(again.parameters(), trainer.parts.denoiser.parameters(), strict=True):
        assert torch.equal(one, two)
