"""The hook on bare denoisers: what it calls, with what, and what it hands back."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from diffusers import (
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
)
from peft import LoraConfig

from cmlora.caching.policy import none, uniform
from cmlora.compose import compose
from cmlora.plan import Member, Pass, Plan, Policy, Step
from tests import tiny

NAMES = ("ink", "alice")


def each(step: Step, members: Sequence[Member], policy: Policy) -> Plan:
    """The mean of one pass per LoRA."""
    reuse = policy.reuse and step.index not in policy.refreshes(step.count)
    passes = tuple(Pass({m.name: m.weight}, may_reuse=reuse) for m in members)
    return Plan(passes, tuple(1 / len(passes) for _ in passes))


class Loop:
    """A denoiser with a scheduler: all of a pipeline that a composition needs."""

    def __init__(self, unet: Any) -> None:
        self.unet = unet
        self.scheduler = tiny.scheduler()
        self.scheduler.set_timesteps(4)


@pytest.fixture
def loop() -> Loop:
    loop = Loop(tiny.unet_sd15())
    tiny.add_loras(loop, NAMES)
    return loop


def inputs(seed: int = 0) -> dict[str, Any]:
    return {
        "sample": tiny.latents(2, seed=seed),
        "encoder_hidden_states": tiny.latents(2, channels=5, seed=9)[..., 0, :],
    }


def residuals() -> dict[str, Any]:
    """What a ControlNet adds to `tiny.unet_sd15`, for 16x16 latents."""
    shapes = [(8, 16)] * 3 + [(8, 8)] + [(16, 8)] * 2 + [(16, 4)] * 3 + [(16, 2)] * 3
    return {
        "down_block_additional_residuals": [torch.ones(2, c, s, s) for c, s in shapes],
        "mid_block_additional_residual": torch.ones(2, 16, 2, 2),
    }


def adapter_features() -> dict[str, Any]:
    """What a T2I-Adapter adds."""
    shapes = [(8, 16), (16, 8), (16, 4), (16, 2)]
    return {"down_intrablock_additional_residuals": [torch.ones(2, c, s, s) for c, s in shapes]}


@torch.no_grad()
def single(loop: Loop, name: str, timestep: Any, **arguments: Any) -> torch.Tensor:
    """One LoRA without any hook."""
    loop.unet.set_adapters([name])
    loop.unet.requires_grad_(False)
    result: torch.Tensor = loop.unet(timestep=timestep, **arguments).sample
    return result


@torch.no_grad()
@pytest.mark.parametrize("steer", [residuals, adapter_features])
def test_every_pass_gets_the_residuals_and_runs_in_full(loop: Loop, steer: Any) -> None:
    timesteps = loop.scheduler.timesteps
    expected = sum(single(loop, name, timesteps[1], **inputs(), **steer()) for name in NAMES) / 2
    given = steer()
    with compose(loop, NAMES, method=each, cache=uniform(4)) as composition:
        loop.unet(timestep=timesteps[0], **inputs())
        composed = loop.unet(timestep=timesteps[1], **inputs(), **given).sample
        assert not composition.report.light
        loop.unet(timestep=timesteps[2], **inputs())  # records again: the slot was freed
        loop.unet(timestep=timesteps[3], **inputs())
        assert composition.report.light == dict.fromkeys(NAMES, 1)
    torch.testing.assert_close(composed, expected)
    assert {k: len(v) for k, v in given.items()} == {k: len(v) for k, v in steer().items()}


@torch.no_grad()
def test_separate_guidance_calls_share_a_plan_and_no_feature(loop: Loop) -> None:
    seen: list[Step] = []

    def noted(step: Step, members: Sequence[Member], policy: Policy) -> Plan:
        seen.append(step)
        return each(step, members, policy)

    def run(separately: bool) -> list[torch.Tensor]:
        results = []
        loop.scheduler.set_timesteps(4)
        for index, timestep in enumerate(loop.scheduler.timesteps):
            both = inputs(seed=index)
            if separately:
                halves = [{k: v[i : i + 1] for k, v in both.items()} for i in range(2)]
                outputs = [loop.unet(timestep=timestep, **half).sample for half in halves]
                results.append(torch.cat(outputs))
            else:
                results.append(loop.unet(timestep=timestep, **both).sample)
        return results

    with compose(loop, NAMES, method=noted, cache=uniform(2)) as composition:
        together = run(False)
        apart = run(True)
        report = composition.report
    assert [step.index for step in seen] == [0, 1, 2, 3] * 2
    assert (report.steps, report.calls) == (4, 16)
    assert report.light == dict.fromkeys(NAMES, 4)
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_what_a_plan_observes_reaches_later_steps(loop: Loop) -> None:
    seen: list[Step] = []

    def strategy(step: Step, members: Sequence[Member], policy: Policy) -> Plan:
        def observe(sample: torch.Tensor, outputs: torch.Tensor) -> dict[str, float]:
            assert outputs.shape == (3, *sample.shape)
            return {"index": step.index, "mean": float(sample.mean())}

        seen.append(step)
        passes = (Pass({}), *(Pass({m.name: 1.0}) for m in members))
        return Plan(passes, lambda stacked: stacked[1:].amax(0), observe=observe)

    timesteps = loop.scheduler.timesteps
    expected = torch.stack([single(loop, name, timesteps[0], **inputs()) for name in NAMES])
    with compose(loop, NAMES, method=strategy) as composition:
        for run in range(2):
            for index, timestep in enumerate(timesteps):
                result = loop.unet(timestep=timestep, **inputs()).sample
                if index == 0:
                    assert torch.equal(result, expected.amax(0))
            assert [step.index for step in seen] == [0, 1, 2, 3] * (run + 1)
    mean = float(inputs()["sample"].mean())
    assert seen[0].observed == seen[4].observed == ()
    assert seen[3].observed == tuple({"index": i, "mean": mean} for i in range(3))
    assert composition.report.full == {"base": 4, "ink": 4, "alice": 4}


@torch.no_grad()
def test_the_same_lora_at_two_strengths_has_two_slots(loop: Loop) -> None:
    def strategy(step: Step, members: Sequence[Member], policy: Policy) -> Plan:
        passes = tuple(Pass({"ink": w}, may_reuse=step.index > 0) for w in (1.0, 0.2))
        return Plan(passes, (0.5, 0.5))

    arguments = inputs()
    with compose(loop, ["ink"], method=strategy, cache=uniform(2)) as composition:
        first, second = (
            loop.unet(timestep=timestep, **arguments).sample
            for timestep in [loop.scheduler.timesteps[0]] * 2
        )
        assert torch.equal(first, second)
        # position 1 with the timestep of position 0 would be light; same input, same bits
        loop.unet(timestep=loop.scheduler.timesteps[1], **arguments)
    assert composition.report.light == {"ink": 2}


@torch.no_grad()
def test_features_are_freed_with_the_last_step(loop: Loop) -> None:
    from cmlora.engine import HOOK

    with compose(loop, NAMES, method=each, cache=uniform(2)):
        cache = loop.unet._diffusers_hook.get_hook(HOOK)._cache
        sizes = []
        for timestep in loop.scheduler.timesteps:
            loop.unet(timestep=timestep, **inputs())
            sizes.append(len(cache.store))
    assert sizes == [2, 2, 2, 0]


@torch.no_grad()
def test_positional_arguments_and_plain_timesteps(loop: Loop) -> None:
    arguments = list(inputs().values())
    timesteps = [int(t) for t in loop.scheduler.timesteps]
    with compose(loop, NAMES, method=each, cache=uniform(2)) as composition:
        for timestep in timesteps:
            output = loop.unet(arguments[0], timestep, arguments[1], return_dict=False)
            assert isinstance(output, tuple)
        assert composition.report.light == dict.fromkeys(NAMES, 2)
    assert composition.report.steps == 4


class Dit:
    """A transformer with the little that a composition needs of its pipeline."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=3,
            num_single_layers=3,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=8,
            pooled_projection_dim=8,
            axes_dims_rope=(2, 2, 4),
        ).eval()
        self.scheduler = FlowMatchEulerDiscreteScheduler()
        for name in NAMES:
            config = LoraConfig(r=2, target_modules=["to_q", "to_v", "proj_out"])
            self.transformer.add_adapter(config, adapter_name=name)
        for key, parameter in self.transformer.named_parameters():
            if "lora_" in key:
                parameter.data.normal_(std=0.3)

    def run(self, context: str | None) -> list[torch.Tensor]:
        """Four steps on nearly the same input, so that a feature cache does reuse something."""
        results = []
        self.scheduler.set_timesteps(4)
        self.scheduler.set_begin_index(0)
        for index, timestep in enumerate(self.scheduler.timesteps):
            generator = torch.Generator().manual_seed(0)
            named = nullcontext() if context is None else self.transformer.cache_context(context)
            with named:
                noise = torch.randn((1, 9, 4), generator=generator)
                output = self.transformer(
                    hidden_states=noise + 0.01 * index,
                    timestep=timestep.expand(1) / 1000,
                    encoder_hidden_states=torch.randn((1, 5, 8), generator=generator),
                    pooled_projections=torch.randn((1, 8), generator=generator),
                    txt_ids=torch.zeros(5, 3),
                    img_ids=torch.zeros(9, 3),
                ).sample
            results.append(output)
            self.scheduler.step(output, timestep, noise)
        return results

    def mean(self, *, cached: bool) -> list[torch.Tensor]:
        """The mean of plain runs with one LoRA each, step by step."""
        runs = []
        for name in NAMES:
            self.transformer.set_adapters([name])
            self.transformer.requires_grad_(False)
            if cached:
                self.transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
            runs.append(self.run("cond"))
            if cached:
                self.transformer.disable_cache()
        return [torch.stack(step).mean(0) for step in zip(*runs, strict=True)]


@torch.no_grad()
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("context", ["cond", None])
def test_a_cache_of_diffusers_keeps_one_state_per_lora(cached: bool, context: str | None) -> None:
    dit = Dit()
    expected = dit.mean(cached=cached)
    if cached:
        assert not torch.equal(expected[2], dit.mean(cached=False)[2])
        dit.transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
    with compose(dit, NAMES, method=each) as composition:
        for _ in range(2):
            torch.testing.assert_close(dit.run(context), expected)
    assert composition.report.steps == 4


def test_reports_start_empty(loop: Loop) -> None:
    with compose(loop, NAMES, method=each, cache=none()) as composition:
        report = composition.report
    assert (report.steps, report.calls, report.seconds, report.macs) == (0, 0, 0.0, None)
