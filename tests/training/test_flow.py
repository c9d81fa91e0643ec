"""Flow models with packed, normalised or doubled parts: what is learnt is what pipelines use."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Pipeline
from PIL import Image
from torch import Tensor, nn

import cmlora
from cmlora import files
from cmlora.adapters.training import Example, Trainer
from cmlora.adapters.training.autoencoder import encoded, factor
from cmlora.adapters.training.conditioning import Conditioning
from cmlora.adapters.training.objective import Flow, Question
from cmlora.adapters.training.result import second_of
from tests import tiny
from tests.training import bench
from tests.training.pipelines import MAKERS
from tests.training.test_families import run

NEW = ("flux2", "qwen", "zimage", "wan")


def made(family: str) -> Any:
    """A pipeline whose scheduler takes noise levels as they are given."""
    pipe = MAKERS[family]()
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    return pipe


def trainer(pipe: Any, folder: Path, **options: Any) -> Trainer:
    """A training of three captions."""
    examples = [
        Example(one, f"a cat {number}") for number, one in enumerate(tiny.latents(3, size=8))
    ]
    plain: dict[str, Any] = {"targets": ("to_q", "to_v", "to_out.0"), "batch": 3, "steps": 30}
    return Trainer(pipe, bench.settings(folder, **plain | options), examples)


def weights(pipe: Any, part: str) -> dict[str, Tensor]:
    """A copy of a model's weights."""
    return {key: value.clone() for key, value in getattr(pipe, part).state_dict().items()}


def velocity(pipe: Any, noisy: Tensor, prompt: str, level: float) -> Any:
    """What the stock pipeline moves latents (1, C, H, W) by, per unit of noise."""
    if type(pipe).__name__ == "WanPipeline":  # its call takes no levels
        text, _ = pipe.encode_prompt(
            [prompt], do_classifier_free_guidance=False, max_sequence_length=512
        )
        model = pipe.transformer if level >= 0.5 else pipe.transformer_2
        with torch.no_grad():
            found: Tensor = model(noisy[:, :, None], torch.tensor([1000 * level]), text).sample
        return found[:, :, 0]
    after = run(pipe, noisy, prompt=[prompt], sigmas=[level], num_inference_steps=1)
    if type(pipe).__name__ == "Flux2Pipeline":
        height, width = (side // 2 for side in noisy.shape[2:])
        patches = after.transpose(1, 2).unflatten(2, (height, width))
        after = Flux2Pipeline._unpatchify_latents(patches)
    elif type(pipe).__name__ == "QwenImagePipeline":
        pixels = [side * factor(pipe) for side in noisy.shape[2:]]
        after = pipe._unpack_latents(after, *pixels, pipe.vae_scale_factor)[:, :, 0]
    return (noisy - after) / level


@pytest.mark.parametrize("family", NEW)
def test_the_loss_is_how_far_the_pipeline_steps_from_the_straight_line(
    family: str, tmp_path: Path
) -> None:
    pipe = made(family)
    learning = trainer(pipe, tmp_path, guidance=3.5)
    assert isinstance(learning.objective, Flow)
    asked: list[tuple[Tensor, Question]] = []

    class Heard(Flow):
        def ask(self, clean: Tensor, random: torch.Generator) -> Question:
            asked.append((clean, super().ask(clean, random)))
            return asked[-1][1]

    learning.objective = Heard(**vars(learning.objective))
    with torch.no_grad():
        found = float(learning.loss(7, 0))
    ((clean, question),) = asked
    prompts = [f"a cat {row}" for row in learning.order.at(7)[1]]
    total = 0.0
    for index, prompt in enumerate(prompts):
        level = float(question.timesteps[index]) / 1000
        noisy, picture = question.noisy[index : index + 1], clean[index : index + 1]
        noise = (noisy - (1 - level) * picture) / level
        wrong = velocity(pipe, noisy, prompt, level) - (noise - picture)
        total += float(wrong.square().mean()) / len(prompts)
    assert found == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("family", NEW)
def test_latents_are_those_that_the_pipeline_decodes(family: str) -> None:
    """With a denoiser that says nothing a pipeline decodes what it is given."""
    pipe = made(family)
    pixels = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
    latents = encoded(pipe.vae, tensor)
    assert latents.shape == (1, 4, 64 // factor(pipe), 64 // factor(pipe))
    video = "temperal_downsample" in pipe.vae.config
    with torch.no_grad():
        plain = pipe.vae.encode(tensor[:, :, None] if video else tensor).latent_dist.mode()
        expected = pipe.vae.decode(plain).sample
    expected = ((expected[:, :, 0] if video else expected) / 2 + 0.5).clamp(0, 1)

    def silent(_: Any, __: Any, output: Any) -> Any:
        still = [torch.zeros_like(one) for one in output[0]]
        return (still if isinstance(output[0], list) else torch.stack(still),)

    for model in Conditioning(pipe).denoisers.values():
        model.register_forward_hook(silent)
    found = run(pipe, latents, num_inference_steps=2, output_type="pt")
    assert torch.allclose(found.flatten(0, -4), expected, atol=1e-4)


@pytest.mark.parametrize("family", NEW)
def test_a_lora_is_learnt_and_stock_pipelines_and_compositions_draw_it(
    family: str, tmp_path: Path
) -> None:
    pipe = MAKERS[family]()
    pipe.set_progress_bar_config(disable=True)
    learning = trainer(pipe, tmp_path, rate=3e-2)
    before = measured(learning)
    path = learning.run().path
    after = measured(learning)
    assert after < 0.98 * before
    latents = tiny.latents(size=8, seed=5)
    plain = run(bare(family), latents, num_inference_steps=2)
    stock = bare(family)
    stock.load_lora_weights(str(path), adapter_name="ink")
    if family == "wan":
        stock.load_lora_weights(
            str(second_of(path)), adapter_name="ink", load_into_transformer_2=True
        )
    expected = run(stock, latents, num_inference_steps=2)
    assert not torch.allclose(expected, plain, atol=1e-2)
    composed = bare(family)
    files.load(composed, path, "ink")
    if family == "wan":
        files.load(composed, second_of(path), "ink", into="transformer_2")
    with cmlora.compose(composed, ["ink"], method="merge"):
        found = run(composed, latents, num_inference_steps=2)
    assert torch.allclose(found, expected, atol=1e-5)
    trained = run(pipe, latents, num_inference_steps=2)
    assert torch.allclose(found, trained, atol=1e-5)


def measured(learning: Trainer) -> float:
    """The loss of batches that are not trained on."""
    with torch.no_grad():
        return sum(float(learning.loss(1000 + number, 0)) for number in range(10))


def bare(family: str) -> Any:
    """The pipeline of a family as it is before anything is trained in it."""
    pipe = MAKERS[family]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_each_denoiser_of_wan_learns_from_its_noise_levels(tmp_path: Path) -> None:
    pipe = bare("wan")
    learning = trainer(pipe, tmp_path, steps=1)
    assert set(learning.parts.models) == {"transformer", "transformer_2"}
    conditioning = learning.conditioning
    assert conditioning.boundary == 500
    heard: list[tuple[str, list[float]]] = []

    def listen(name: str) -> Any:
        def hook(_: nn.Module, __: Any, named: dict[str, Any]) -> None:
            heard.append((name, named["timestep"].tolist()))

        return hook

    for name, model in learning.parts.denoisers.items():
        model.register_forward_pre_hook(listen(name), with_kwargs=True)
    size = learning.latents.sizes[0]
    arguments = learning.texts.get(["a cat 0", "a cat 1", "a cat 2"], size)
    latents, times = tiny.latents(3, size=8), torch.tensor([100.0, 500.0, 300.0])
    both = conditioning.predict(latents, times, arguments)
    assert heard == [("transformer", [500.0]), ("transformer_2", [100.0, 300.0])]
    rows = conditioning.cut(arguments, size)
    for index, row in enumerate(rows):
        at = slice(index, index + 1)
        alone = conditioning.predict(latents[at], times[at], row)
        torch.testing.assert_close(both[at], alone, rtol=1e-4, atol=1e-5)
    torch.autograd.backward(both.square().sum())
    # Factors "up" start at zero, so those are what the first gradient reaches.
    reached = {k.partition(".")[0] for k, p in learning.trained.items() if p.grad is not None}
    assert reached == {"transformer", "transformer_2"}


@pytest.mark.parametrize(
    "options", [{"optim": "galore"}, {"trp": True, "trp_every": 2}, {"base_format": "quartet"}]
)
def test_both_denoisers_of_wan_are_trained_themselves(
    options: dict[str, Any], tmp_path: Path
) -> None:
    full = {"full": True, "targets": (), "steps": 4, "save_every": 1, **options}
    pipe = bare("wan")
    before = {part: weights(pipe, part) for part in ("transformer", "transformer_2")}
    path = trainer(pipe, tmp_path / "straight", **full).run().path
    for part, place in (("transformer", path), ("transformer_2", second_of(path))):
        found = type(getattr(pipe, part)).from_pretrained(place).state_dict()
        changed = [key for key, value in found.items() if not torch.equal(value, before[part][key])]
        assert len(changed) > len(found) // 2, part

    with pytest.raises(ConnectionError):
        trainer(bare("wan"), tmp_path / "halted", **full).run(bench.stop_at(2))
    again = trainer(bare("wan"), tmp_path / "halted", **full).run().path
    for one, other in ((path, again), (second_of(path), second_of(again))):
        name = "diffusion_pytorch_model.safetensors"
        assert (one / name).read_bytes() == (other / name).read_bytes()


@pytest.mark.parametrize("family", ["flux", "flux2", "qwen", "zimage", "wan"])
def test_shifted_levels_are_those_of_the_pipeline(family: str) -> None:
    """Levels at equal distances, shifted by what was asked, are those that the pipeline visits."""
    pipe = bare(family)
    if family == "wan":
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    conditioning = Conditioning(pipe)
    latents, steps = tiny.latents(size=8), 50
    factors = conditioning.shift((8 * factor(pipe), 8 * factor(pipe)))
    original = conditioning.denoiser.forward

    class Enough(Exception):
        pass

    def stop(*_: Any, **__: Any) -> None:
        raise Enough

    conditioning.denoiser.forward = stop
    with pytest.raises(Enough):
        run(pipe, latents, num_inference_steps=steps)
    conditioning.denoiser.forward = original
    visited = pipe.scheduler.sigmas[:-1]
    even = torch.linspace(1, 1 / steps, steps)
    if family == "wan":  # its pipeline leaves the levels to the scheduler
        even = torch.linspace(1, visited[-1] / (factors - (factors - 1) * visited[-1]), steps)
    torch.testing.assert_close(
        visited, factors * even / (1 + (factors - 1) * even), atol=2e-4, rtol=0
    )


def test_shifted_training_draws_such_levels(tmp_path: Path) -> None:
    learning = trainer(bare("qwen"), tmp_path, timesteps="shifted", steps=1)
    size = learning.latents.sizes[0]
    learning.conditioning._shifts[size] = 9.0
    seen: list[Tensor] = []
    original = learning.conditioning.predict

    def listen(noisy: Tensor, timesteps: Tensor, arguments: Any) -> Tensor:
        seen.append(timesteps / 1000)
        return original(noisy, timesteps, arguments)

    learning.conditioning.predict = listen  # type: ignore[method-assign]
    with torch.no_grad():
        for number in range(60):
            learning.loss(number, 0)
    levels = torch.cat(seen)
    back = levels / (9 - 8 * levels)  # the inverse of the shift: uniform
    counts = torch.histc(back, 4, 0, 1)
    assert float(levels.mean()) > 0.7
    assert float((counts - len(back) / 4).abs().max()) < 22  # nearly four standard deviations


def test_samples_of_video_models_are_pictures(tmp_path: Path) -> None:
    pipe = bare("wan")
    trainer(
        pipe, tmp_path, steps=1, resolution=64, validate_every=1,
        validation_prompts=("a cat",), validation_steps=1,
    ).run()  # fmt: skip
    with Image.open(tmp_path / "samples" / "step-000001-0.png") as picture:
        assert picture.size == (64, 64)
