"""What of another program's text becomes a recipe, and what is said to be left out."""

from pathlib import Path
from typing import Any

import diffusers
import pytest

from cmlora.infotext import parse
from cmlora.pipelines.retell import retell
from cmlora.pipelines.samplers import use_sampler
from tests import tiny

LINE = "Steps: 2, Sampler: DDIM, CFG scale: 3, Seed: 9, Size: 32x32"


def left(model: Path, text: str) -> list[str]:
    return retell(parse(text), model)[2]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"a cat\n{LINE}", []),
        (f"a cat\n{LINE}, Clip skip: 1, Model: x, Model hash: abc, Version: v1", []),
        (f"a cat\n{LINE}, Clip skip: 2", ["Clip skip 2 is left out"]),
        (
            f"a cat\n{LINE}, Denoising strength: 0.5, Hires upscale: 2",
            ["Denoising strength 0.5 is left out", "Hires upscale 2 is left out"],
        ),
        (f"a cat\n{LINE.replace('9', '-1')}", ["Seed -1: 0 is used"]),
        ("a cat\nSteps: 2, Sampler: DDIM, Size: 32x32", ["Seed not stated: 0 is used"]),
        ("a cat\nSteps: 0, Sampler: DDIM, Seed: 1", ["Steps 0: 20 are used"]),
        (f"a (cat:1.2)\n{LINE}", ["'(cat:1.2)' in the prompt is read as plain words"]),
        (
            f"a (cat:1.2) AND [dog] AND (a) (b) (c) (d)\n{LINE}",
            [
                f"{mark!r} in the prompt is read as plain words"
                for mark in ("(cat:1.2)", "AND", "[dog]", "(a)", "(b)")
            ]
            + ["so are 2 more in the prompt"],
        ),
        (f"a cat \\(cute\\)\n{LINE}", []),
        (
            f"a cat\nNegative prompt: [dog]\n{LINE}",
            ["'[dog]' in the negative prompt is read as plain words"],
        ),
        (
            f"a cat\n{LINE.replace('DDIM', 'Foo')}",
            ["Sampler Foo is left out, there is none of that name here: the model's own"],
        ),
    ],
)
def test_what_is_not_carried_out_is_said(model_folder: Path, text: str, said: list[str]) -> None:
    found = left(model_folder, text)
    assert [note[: len(words)] for note, words in zip(found, said, strict=True)] == said


@pytest.mark.parametrize(
    ("sampler", "kind", "config"),
    [
        ("DPM++ 2M", "", {"algorithm_type": "dpmsolver++", "use_karras_sigmas": False}),
        ("DPM++ 2M Karras", "", {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True}),
        ("DPM++ 2M", "Automatic", {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True}),
        (
            "DPM++ 2M SDE",
            "Karras",
            {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
        ),
        (
            "DPM++ 2M SDE",
            "Automatic",
            {"algorithm_type": "sde-dpmsolver++", "use_exponential_sigmas": True},
        ),
        ("DPM++ 2M", "SGM Uniform", {"timestep_spacing": "trailing"}),
    ],
)
def test_multistep_samplers(sampler: str, kind: str, config: dict[str, Any]) -> None:
    pipe = tiny.sd15()
    other = {
        "use_beta_sigmas": False,
        "use_exponential_sigmas": True,
        "algorithm_type": "sde-dpmsolver++",
    }
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler(**other)
    assert use_sampler(pipe, sampler, kind) == []
    assert isinstance(pipe.scheduler, diffusers.DPMSolverMultistepScheduler)
    assert {key: pipe.scheduler.config[key] for key in config} == config


def test_a_schedule_type_that_a_scheduler_has_not() -> None:
    pipe = tiny.sd15()
    said = "Schedule type Karras is left out: EulerAncestralDiscreteScheduler has none"
    assert use_sampler(pipe, "Euler a", "Karras") == [said]
    assert use_sampler(pipe, "Euler", "Funny") == [
        "Schedule type Funny is left out: it is not known here"
    ]
    assert isinstance(pipe.scheduler, diffusers.EulerDiscreteScheduler)


def test_models_of_velocities_keep_their_scheduler() -> None:
    pipe = tiny.sd15()
    pipe.scheduler = own = diffusers.FlowMatchEulerDiscreteScheduler()
    assert use_sampler(pipe, "Euler", "") == []
    assert use_sampler(pipe, "Euler", "Simple")[0].startswith("Schedule type Simple is left out")
    assert "predicts velocities" in use_sampler(pipe, "DPM++ 2M", "")[0]
    assert pipe.scheduler is own
