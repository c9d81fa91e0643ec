"""Profiles measured in real runs of tiny pipelines."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler

from cmlora.compose import compose
from cmlora.errors import CmloraError
from cmlora.frequency.profile import Profile, base_id, measure
from cmlora.frequency.spectrum import energy_ratio
from tests import tiny


@pytest.fixture
def pipe() -> Any:
    pipe = tiny.sd15()
    tiny.add_loras(pipe, ["a", "b"], text=True)
    return pipe


def size(**call: Any) -> dict[str, Any]:
    return {"height": 32, "width": 32, **call}


def state(pipe: Any) -> list[tuple[str, Any]]:
    """Everything a measurement could leave behind."""
    rows: list[tuple[str, Any]] = []
    for model in (pipe.unet, pipe.text_encoder):
        for key, module in model.named_modules():
            found = vars(module)
            rows.append((key, sorted(found)))
            rows += [(key, str(found[n])) for n in ("_active_adapter", "scaling") if n in found]
        rows += [(key, p.requires_grad) for key, p in model.named_parameters()]
    return rows


def test_a_measurement_leaves_the_pipeline_as_it_was(pipe: Any) -> None:
    before, picture = state(pipe), tiny.run(pipe)
    measure(pipe, "a", ["a cat"], steps=2, **size())
    assert state(pipe) == before
    assert torch.equal(tiny.run(pipe), picture)


def test_a_failed_measurement_does_so_too(pipe: Any) -> None:
    before = state(pipe)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(pipe, "a", ["a cat"], steps=3, **size(callback_on_step_end=stop))
    assert state(pipe) == before


def contributions(pipe: Any, name: str, steps: int, seed: int) -> list[tuple[float, float]]:
    """The profile's rows by hand: the loop of a DDIM run without guidance."""
    scheduler, unet = pipe.scheduler, pipe.unet
    scheduler.set_timesteps(steps)
    pipe.text_encoder.set_adapter(name)
    text, _ = pipe.encode_prompt("a cat", "cpu", 1, False)
    latents = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(seed))
    rows = []
    with torch.no_grad():
        for t in scheduler.timesteps:
            unet.disable_adapters()
            base = unet(latents, t, text).sample
            unet.enable_adapters()
            unet.set_adapter(name)
            ours = unet(latents, t, text).sample
            stepped = scheduler.step(ours, t, latents)
            x0 = stepped.pred_original_sample
            x0_base = scheduler.step(base, t, latents).pred_original_sample
            delta = x0 - x0_base
            rows.append((float(energy_ratio(delta)), float(delta.norm() / x0_base.norm())))
            latents = stepped.prev_sample
    return rows


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_it_measures_what_the_lora_adds_to_the_predicted_picture(pipe: Any, kind: str) -> None:
    pipe.scheduler.register_to_config(prediction_type=kind)
    found = measure(pipe, "a", ["a cat"], steps=3, seeds=[5], guidance_scale=1.0, **size())
    expected = contributions(pipe, "a", 3, seed=5)
    assert found.fractions == pytest.approx((0, 1 / 3, 2 / 3))
    assert found.ratio == pytest.approx([ratio for ratio, _ in expected], rel=1e-3)
    assert found.norm == pytest.approx([norm for _, norm in expected], rel=1e-3)
    assert found.base == base_id(pipe)


def test_prompts_and_seeds_are_averaged(pipe: Any) -> None:
    def one(prompt: str, seed: int) -> Profile:
        return measure(pipe, "a", [prompt], steps=2, seeds=[seed], **size())

    both = measure(pipe, "a", ["a cat", "a hat"], steps=2, seeds=(0, 1), **size())
    single = [one(prompt, seed) for prompt in ("a cat", "a hat") for seed in (0, 1)]
    for step in range(2):
        mean = sum(p.ratio[step] for p in single) / 4
        assert both.ratio[step] == pytest.approx(mean, rel=1e-6)
    assert len({p.ratio for p in single}) == 4


def test_other_loras_and_their_order_make_no_difference(pipe: Any) -> None:
    alone = tiny.sd15()
    tiny.add_loras(alone, ["a"], text=True)
    assert measure(pipe, "a", ["a cat"], steps=2, **size()) == measure(
        alone, "a", ["a cat"], steps=2, **size()
    )
    assert measure(pipe, "a", ["a"], steps=2, **size()) != measure(
        pipe, "b", ["a"], steps=2, **size()
    )


def test_schedulers_that_scale_the_input_can_be_measured(pipe: Any) -> None:
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    found = measure(pipe, "a", ["a cat"], steps=4, **size())
    assert len(found.ratio) == 4
    assert all(0 <= ratio <= 1 for ratio in found.ratio)
    assert all(0 < norm < math.inf for norm in found.norm)


def test_a_lora_that_does_nothing_has_no_frequency(pipe: Any) -> None:
    for key, parameter in pipe.unet.named_parameters():
        if "lora_B.a." in key:
            parameter.data.zero_()
    found = measure(pipe, "a", ["a cat"], steps=2, **size())
    assert found.norm == (0.0, 0.0)
    assert math.isnan(found.frequency)


def test_a_profile_describes_a_member_to_compose(pipe: Any) -> None:
    profiles = {name: measure(pipe, name, ["a"], steps=2, **size()) for name in "ab"}
    with compose(pipe, ["a", "b"], profiles=profiles) as composition:
        tiny.run(pipe)
    assert composition.report.steps == 4


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda pipe: measure(pipe, "c", ["a"]), "no LoRA 'c' in the pipeline; loaded: a, b"),
        (lambda pipe: measure(pipe, "a", []), "needs a list of prompts"),
        (lambda pipe: measure(pipe, "a", "a cat"), "needs a list of prompts"),
        (lambda pipe: measure(pipe, "a", ["a"], seeds=[]), "seeds"),
        (lambda pipe: measure(pipe, "a", ["a"], steps=0), "1 step or more"),
    ],
)
def test_what_cannot_be_measured_is_an_error(
    pipe: Any, break_it: Callable[[Any], Any], message: str
) -> None:
    with pytest.raises(CmloraError) as caught:
        break_it(pipe)
    assert message in str(caught.value)


def test_a_composed_pipeline_is_not_measured(pipe: Any) -> None:
    with compose(pipe, ["a"]), pytest.raises(CmloraError, match="leave the composition"):
        measure(pipe, "a", ["a"])


def test_the_base_id_is_of_the_base(pipe: Any) -> None:
    assert base_id(pipe) == base_id(tiny.sd15())
    assert base_id(pipe) != base_id(tiny.sd15(channels=(8, 16, 16, 24)))
    trained = tiny.sd15()
    trained.unet.conv_out.bias.data += 1e-4
    assert base_id(trained) != base_id(pipe)
