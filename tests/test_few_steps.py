"""Which pipelines are known to need few steps, and why."""

from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch

from cmlora.compose import compose
from cmlora.denoisers import few_steps
from cmlora.errors import CmloraError
from cmlora.pipelines.ensemble import default_cache
from tests import tiny


def pipe(scheduler: str = "DDIMScheduler", **config: Any) -> Any:
    """What is looked at of a pipeline."""
    return SimpleNamespace(scheduler=getattr(diffusers, scheduler)(), config=config)


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (pipe("LCMScheduler"), "it samples with LCMScheduler"),
        (pipe("TCDScheduler"), "it samples with TCDScheduler"),
        (pipe("SCMScheduler"), "it samples with SCMScheduler"),
        (pipe("FlowMatchLCMScheduler"), "it samples with FlowMatchLCMScheduler"),
        (pipe(is_distilled=True), "its configuration says is_distilled"),
        (pipe(_name_or_path="bfl/FLUX.2-klein-4B"), "it is bfl/FLUX.2-klein-4B"),
        (pipe(_name_or_path="models/SDXL-Lightning"), "it is models/SDXL-Lightning"),
        (pipe(_name_or_path="x/Sana_Sprint_1.6B"), "it is x/Sana_Sprint_1.6B"),
        (pipe(_name_or_path="ByteDance/Hyper-SD"), "it is ByteDance/Hyper-SD"),
        (pipe(_name_or_path="stabilityai/sdxl-turbo"), "it is stabilityai/sdxl-turbo"),
        (pipe(_name_or_path="SimianLuo/lcm-dreamshaper"), "it is SimianLuo/lcm-dreamshaper"),
    ],
)
def test_models_for_few_steps(made: Any, reason: str) -> None:
    assert few_steps(made) == reason


@pytest.mark.parametrize(
    "made",
    [
        pipe(),
        pipe("EulerDiscreteScheduler"),
        pipe(is_distilled=False),
        pipe(_name_or_path="bfl/FLUX.2-klein-base-4B"),
        pipe(_name_or_path="turbo/stable-diffusion-v1-5"),
        pipe(_name_or_path="models/calcium"),
    ],
)
def test_other_models(made: Any) -> None:
    assert few_steps(made) is None


def test_a_scheduler_for_few_steps_refuses_every_cache() -> None:
    made = tiny.sd15()
    tiny.add_loras(made, ["a", "b"])
    made.scheduler = diffusers.LCMScheduler.from_config(made.scheduler.config)
    for cache in ("uniform:2", "nonuniform", "first_block:0.1"):
        with pytest.raises(CmloraError, match=r"few steps \(it samples with LCMScheduler\)"):
            compose(made, ["a", "b"], cache=cache)
    with compose(made, ["a", "b"], method="auto", plain=False, budget=1.5) as active:
        assert "uniform" not in active.reason


@pytest.mark.parametrize(
    "lora",
    [
        "sdxl_lightning_4step_lora",
        "Qwen-Image-Lightning-8steps-V1.0",
        "Hyper-SDXL-8steps-lora",
        "lcm-lora-sdxl",
        "Wan21_lightx2v_rank32",
        "dmd2_sdxl",
    ],
)
def test_loras_for_few_steps_say_so(lora: str) -> None:
    assert few_steps(pipe(), ["cat", lora]) == f"the LoRA {lora} is, as its name says"


@pytest.mark.parametrize("lora", ["turbo", "lightning", "911", "30steps", "two_step"])
def test_names_of_other_loras(lora: str) -> None:
    assert few_steps(pipe(), [lora]) is None


def test_a_lora_for_few_steps_refuses_every_cache() -> None:
    made = tiny.sd15()
    tiny.add_loras(made, ["cat", "lcm"])
    with pytest.raises(CmloraError, match=r"the LoRA lcm is, as its name says\).* another name"):
        compose(made, ["cat", "lcm"], cache="uniform:2")
    compose(made, ["cat"], cache="uniform:2").remove()
    assert default_cache("cmlora", made, ["cat", "lcm"]) == "none"
    assert default_cache("cmlora", made, ["cat"]) == "nonuniform"


@pytest.mark.parametrize("execution", ["sequential", "fused"])
def test_a_fused_lora_is_in_every_pass(execution: Any) -> None:
    made, beside = tiny.sd15(), tiny.sd15()
    tiny.add_loras(made, ["lcm"])
    made.fuse_lora(adapter_names=["lcm"])
    made.unload_lora_weights()
    tiny.add_loras(made, ["a", "b"])
    tiny.add_loras(beside, ["lcm", "a", "b"])
    with compose(made, ["a", "b"], method="merge", execution=execution):
        ours = tiny.run(made, steps=2)
    with compose(beside, ["lcm", "a", "b"], method="merge"):
        theirs = tiny.run(beside, steps=2)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    with compose(made, ["a", "b"], method="composite", execution=execution):
        assert tiny.run(made, steps=2).isfinite().all()
