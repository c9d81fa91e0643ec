"""Costs of Stable Diffusion 1.5 and of schedules, against closed forms and known figures."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from cmlora.branches import share_uncond
from cmlora.caching.unet import Cut
from cmlora.cost import KNOWN, PassCost, pass_macs, plan_cost, shapes
from cmlora.errors import CmloraError
from cmlora.plan import Member, Pass, Plan
from cmlora.strategies import schedule

GIGA = 1e9


@cache
def sd15(height: int = 512, width: int = 512, block: int = 1, attention: bool = True) -> PassCost:
    config = KNOWN["sd15"]
    return pass_macs(
        config, *shapes(config, height, width), cut=Cut(layer=0, block=block), attention=attention
    )


@pytest.mark.parametrize(
    ("height", "width", "attention", "full", "light"),
    [
        (512, 512, True, 803, 305),
        (512, 512, False, 677, 196),
        (1024, 768, True, 3139, 1560),
        (1024, 768, False, 2026, 587),
    ],
)
def test_stable_diffusion_figures(
    height: int, width: int, attention: bool, full: float, light: float
) -> None:
    cost = sd15(height, width, attention=attention)
    assert cost.full / GIGA == pytest.approx(full, abs=0.6)
    assert cost.light / GIGA == pytest.approx(light, abs=0.6)


def test_shallowest_branch() -> None:
    assert sd15(block=-1).light / GIGA == pytest.approx(63, abs=0.6)


def test_fused_attention_is_counted() -> None:
    config = KNOWN["sd15"]
    sample, encoder = shapes(config, 128, 128)
    with torch.device("meta"):
        plain = UNet2DConditionModel.from_config(dict(config))
    plain.set_attn_processor(AttnProcessor())  # products written out instead of one fused kernel
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        plain(
            torch.empty(*sample, device="meta"),
            torch.empty((), device="meta"),
            torch.empty(*encoder, device="meta"),
        )
    assert pass_macs(config, sample, encoder).full == counter.get_total_flops() // 2


def test_sdxl_takes_its_extra_conditions() -> None:
    config = KNOWN["sdxl"]
    cost = pass_macs(config, *shapes(config, 1024, 1024))
    assert cost.full / 1e12 == pytest.approx(6.76, abs=0.01)
    assert 0 < cost.light < cost.full


def test_a_module_costs_what_its_configuration_costs() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(dict(KNOWN["sd15"]))
    sample, encoder = shapes(unet.config, 64, 64)
    before = list(unet.state_dict())
    assert pass_macs(unet, sample, encoder, cut=Cut()) == pass_macs(
        KNOWN["sd15"], sample, encoder, cut=Cut()
    )
    assert list(unet.state_dict()) == before


def test_another_denoiser_is_refused() -> None:
    with pytest.raises(CmloraError, match="FluxTransformer2DModel"):
        pass_macs({"_class_name": "FluxTransformer2DModel"}, (1, 4, 8, 8), (1, 4, 8))


@pytest.mark.parametrize("size", [(0, 64), (60, 64), (64, -64)])
def test_sizes_must_fit_the_latent(size: tuple[int, int]) -> None:
    with pytest.raises(CmloraError, match="multiples of 8"):
        shapes(KNOWN["sd15"], *size)


Rows = Callable[[int], list[Pass]]


def plans(steps: int, rows: Rows) -> list[Plan]:
    made = []
    for index in range(steps):
        passes = tuple(rows(index))
        made.append(Plan(passes, (1 / len(passes),) * len(passes)))
    return made


@given(
    members=st.integers(1, 6),
    steps=st.integers(1, 60),
    refreshed=st.sets(st.integers(1, 59)),
    full=st.integers(2, 1000),
    light=st.integers(1, 999),
)
def test_dominant_refresh_has_the_closed_form(
    members: int, steps: int, refreshed: set[int], full: int, light: int
) -> None:
    """Step 0 fills N slots; every later refresh step runs one LoRA in full, all else is light."""
    refreshes = sorted({0, *(i for i in refreshed if i < steps)})

    def rows(index: int) -> list[Pass]:
        dominant = refreshes.index(index) % members if index in refreshes else None
        return [Pass({f"lora{j}": 1.0}, may_reuse=j != dominant) for j in range(members)]

    cost = plan_cost(plans(steps, rows), full, light)
    n, t, f = members, steps, len(refreshes)
    assert cost.macs == (n + f - 1) * full + (n * t - n - f + 1) * light
    assert sum(cost.full.values()) == n + f - 1
    assert sum(cost.full.values()) + sum(cost.light.values()) == n * t


@given(members=st.integers(1, 6), steps=st.integers(1, 40), full=st.integers(1, 1000))
def test_without_a_cache_every_call_is_full(members: int, steps: int, full: int) -> None:
    run = plans(steps, lambda _: [Pass({f"lora{j}": 1.0}, may_reuse=True) for j in range(members)])
    cost = plan_cost(run, full, None)
    assert cost.macs == members * steps * full
    assert cost.light == {}


def test_slots_are_not_shared_between_loras() -> None:
    """A LoRA finds its own feature of the step before, and after a turn of another one none."""
    order = ["a", "b", "b", "a", "a", "a"]
    cost = plan_cost(plans(6, lambda i: [Pass({order[i]: 1.0}, may_reuse=True)]), 10, 1)
    assert cost.full == {"a": 2, "b": 1}
    assert cost.light == {"a": 2, "b": 1}
    assert cost.macs == 33


def test_a_shared_unconditional_branch_saves_nearly_half() -> None:
    members = [Member(f"lora{i}") for i in range(5)]
    plans = schedule("composite", members, 50)
    alone = plan_cost(plans, 100, None)
    shared = plan_cost([share_uncond(plan) for plan in plans], 100, None)
    assert alone.per_step == 500
    assert shared.per_step == 300  # six halves
    kept = plan_cost(schedule("delta", members, 50, every=1), 100, None)
    assert kept.per_step == (49 * 2 + 7) * 100 / 50
