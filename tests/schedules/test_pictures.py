"""Schedules carried out on a tiny real pipeline, beside what diffusers itself makes of them."""

from typing import Any

import pytest
import torch

from cmlora.compose import compose
from cmlora.errors import CmloraError
from cmlora.schedules.curve import window
from cmlora.schedules.export import diffusers
from cmlora.schedules.noise import sigma_at
from cmlora.schedules.parse import parse_schedule
from cmlora.schedules.schedule import Schedule, Track
from tests import tiny

WEIGHTS = {"a": 0.9, "b": 0.6}
STEPS = 5


@pytest.fixture(scope="module")
def pipe() -> Any:
    made = tiny.sd15()
    tiny.add_loras(made, WEIGHTS, text=True)
    return made


def picture(pipe: Any, schedule: Any, method: str = "merge", **options: Any) -> torch.Tensor:
    with compose(pipe, WEIGHTS, method=method, schedule=schedule, **options):
        return tiny.run(pipe, steps=STEPS)


@pytest.mark.parametrize("spoken", [False, True])
@pytest.mark.parametrize(
    "text",
    [
        "<lora:a:te=1:unet=0@0,1@0.5><lora:b:te=1:unet=1@0,0.2@0.8:ease=smooth>",
        "<lora:a:te=0.2:unet=1@0,0@0.4:ease=hold><lora:b:te=2:unet=0@2,1@3:ease=hold>",
    ],
)
def test_a_merge_is_what_diffusers_makes_of_the_exported_script(
    pipe: Any, text: str, spoken: bool
) -> None:
    """The very script, on a pipeline of its own: no step too early, none too late."""
    schedule = parse_schedule(text)
    ours = picture(pipe, schedule, text_encoder="all" if spoken else "none")
    plain = tiny.sd15()
    tiny.add_loras(plain, WEIGHTS, text=spoken)
    code = diffusers(schedule, WEIGHTS, STEPS)
    head, tail, _ = code.partition("image = pipe(\n")
    assert tail
    names: dict[str, Any] = {"pipe": plain}
    exec(compile(head, "script", "exec"), names)
    theirs = tiny.run(plain, steps=STEPS, callback_on_step_end=names["set_strengths"])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    plain_run = picture(pipe, "", text_encoder="all" if spoken else "none")
    assert not torch.allclose(ours, plain_run, atol=1e-3)


def test_equal_strengths_everywhere_need_no_parts() -> None:
    code = diffusers(parse_schedule("<lora:a:0.5>"), WEIGHTS, 2)
    assert "spoken" not in code
    assert "pipe.set_adapters(names, strengths[0])" in code


def test_a_curve_of_ones_changes_no_bit(pipe: Any) -> None:
    for method in ("merge", "composite", "select", "cmlora", "switch"):
        one = "<lora:a:te=1:unet=1@0,1@1>"
        assert torch.equal(picture(pipe, one, method), picture(pipe, "", method))


def test_a_window_leaves_the_other_lora_alone(pipe: Any) -> None:
    """Composite with a LoRA that never acts is the other LoRA alone."""
    never = "<lora:a:te=0:unet=0><lora:b:te=1:unet=1>"
    ours = picture(pipe, never, "composite", text_encoder="none")
    with compose(pipe, {"b": WEIGHTS["b"]}, method="merge", text_encoder="none"):
        assert torch.equal(ours, tiny.run(pipe, steps=STEPS))


def test_text_encoders_have_a_strength_of_their_own(pipe: Any) -> None:
    silent = picture(pipe, "<lora:a:0:1><lora:b:0:1>")
    assert torch.equal(silent, picture(pipe, "", text_encoder="none"))
    assert not torch.equal(silent, picture(pipe, ""))


def test_blocks_are_scaled_by_name(pipe: Any) -> None:
    """What is scaled to nothing in all blocks is the base; in some it is neither."""
    everywhere = r"<lora:a:0:blocks=blocks|attn|conv|.><lora:b:0>"
    base = picture(pipe, everywhere, text_encoder="none")
    with compose(pipe, [], method="naive"):
        assert torch.equal(base, tiny.run(pipe, steps=STEPS))
    down = picture(pipe, "<lora:a:0:blocks=^down_blocks>", text_encoder="none")
    assert not torch.equal(down, picture(pipe, "", text_encoder="none"))
    with pytest.raises(CmloraError, match=r"no layer matches 'attn7'; it acts in .*down_blocks.0"):
        picture(pipe, "<lora:a:0:blocks=attn7>")


def test_noise_levels_are_those_of_the_scheduler(pipe: Any) -> None:
    """A window over sigma is the window over the steps with those sigmas."""
    pipe.scheduler.set_timesteps(STEPS)
    levels = [sigma_at(pipe.scheduler, float(t)) for t in pipe.scheduler.timesteps]
    assert all(level is not None for level in levels)
    sigmas = [level for level in levels if level is not None]
    assert sigmas == sorted(sigmas, reverse=True)
    inside = [i for i, sigma in enumerate(sigmas) if 0.5 <= sigma < 5]
    assert 0 < len(inside) < STEPS
    by_sigma = Schedule((Track("a", window(0.5, 5, over="sigma")),))
    by_step = Schedule((Track("a", window(inside[0], inside[-1] + 1, over="step")),))
    assert torch.equal(picture(pipe, by_sigma), picture(pipe, by_step))


def test_a_schedule_for_a_lora_that_is_not_there_is_refused(pipe: Any) -> None:
    with pytest.raises(CmloraError, match="no LoRA 'dog' is composed; composed: a, b"):
        picture(pipe, "<lora:dog:1>")
    with pytest.raises(CmloraError, match="character 9: 'x' is not a number"):
        picture(pipe, "<lora:a:x>")
    with pytest.raises(CmloraError, match="uncond='none'"):
        picture(pipe, "", uncond="none")


def test_a_curve_for_blocks_and_a_method_by_layers() -> None:
    """K-LoRA gives every layer to one LoRA; what is scheduled in a layer it has not is nothing."""
    pipe = tiny.sd15()
    tiny.add_loras(pipe, WEIGHTS)
    for name, parameter in pipe.unet.named_parameters():
        if "lora_" in name:
            mine = "a" if name.startswith("mid_block") else "b"
            parameter.data *= 50.0 if f".{mine}." in name else 1.0
    plain = picture(pipe, "", "klora")
    one = picture(pipe, "<lora:a:1:blocks=^down_blocks>", "klora")
    torch.testing.assert_close(one, plain)
    half = picture(pipe, "<lora:b:0.5:blocks=^down_blocks>", "klora")
    assert not torch.allclose(half, plain, atol=1e-3)


def test_an_expression_is_looked_for_before_anything_runs(pipe: Any) -> None:
    with pytest.raises(CmloraError, match=r"no layer matches 'attn7'; it acts in .*down_blocks.0"):
        compose(pipe, WEIGHTS, method="klora", schedule="<lora:a:0:blocks=attn7>")
    assert torch.equal(picture(pipe, ""), picture(pipe, ""))


def test_never_on_is_off_in_the_text_encoder_too(pipe: Any) -> None:
    never = picture(pipe, "[<lora:a:1>::0]", text_encoder="all")
    assert torch.equal(never, picture(pipe, "<lora:a:0>", text_encoder="all"))
    with compose(pipe, {"b": WEIGHTS["b"]}, method="merge", text_encoder="all"):
        torch.testing.assert_close(never, tiny.run(pipe, steps=STEPS), rtol=1e-4, atol=1e-5)
