"""The UNet feature cache on the real module trees."""

from collections import Counter
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cmlora.caching.store import Store
from cmlora.caching.unet import Cut, UNetCache, cuts, default_cut
from cmlora.errors import CmloraError
from tests import tiny


def unets() -> dict[str, Any]:
    return {
        "sd15": tiny.unet_sd15(),
        "one layer per block": tiny.unet_sd15(layers_per_block=1),
        "three levels": tiny.unet_sd15(channels=(8, 16, 16), latent_channels=8),
        "no attention outside": tiny.unet_sd15(attention_first=False),
        "sdxl": tiny.unet_sdxl(),
    }


UNETS = unets()
CASES = [(name, cut) for name, unet in UNETS.items() for cut in cuts(unet)]
SOME = [  # of every UNet, of every depth, of every place within a block
    case if number % 5 < 2 else pytest.param(*case, marks=pytest.mark.slow)
    for number, case in enumerate(CASES)
]


def inputs(unet: Any, *, seed: int = 0, batch: int = 2, size: int = 16) -> dict[str, Any]:
    """Arguments of a call."""
    generator = torch.Generator().manual_seed(seed)
    channels, width = unet.config.in_channels, unet.config.cross_attention_dim
    arguments: dict[str, Any] = {
        "sample": torch.randn((batch, channels, size, size), generator=generator),
        "timestep": 10 + seed,
        "encoder_hidden_states": torch.randn((batch, 5, width), generator=generator),
    }
    if unet.config.addition_embed_type == "text_time":
        arguments["added_cond_kwargs"] = {
            "text_embeds": torch.randn((batch, 16), generator=generator),
            "time_ids": torch.ones((batch, 6)),
        }
    return arguments


def leaves(unet: nn.Module, arguments: dict[str, Any]) -> list[str]:
    """The names of the modules without children that a call runs, in order."""
    ran: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, module in unet.named_modules()
        if not list(module.children())
    ]
    with torch.no_grad():
        unet(**arguments)
    for handle in handles:
        handle.remove()
    return ran


def live(unet: Any, cut: Cut) -> list[str]:
    """The parts a light pass runs, written out from the definition of a cut."""
    depth = len(unet.down_blocks[cut.layer].resnets)
    up = len(unet.up_blocks) - 1 - cut.layer
    parts = ["time_", "add_", "conv_"]
    parts += [f"down_blocks.{i}." for i in range(cut.layer)]
    for kind in ("resnets", "attentions"):
        parts += [f"down_blocks.{cut.layer}.{kind}.{i}." for i in range(cut.block + 1)]
        parts += [f"up_blocks.{up}.{kind}.{depth - i}." for i in range(cut.block + 2)]
    parts += [f"up_blocks.{up}.upsamplers."]
    return parts + [f"up_blocks.{i}." for i in range(up + 1, len(unet.up_blocks))]


@pytest.mark.parametrize(("name", "cut"), SOME)
def test_a_light_pass_runs_the_shallow_branch_alone(name: str, cut: Cut) -> None:
    unet = UNETS[name]
    everything = leaves(unet, inputs(unet))
    cache = UNetCache(unet, cut)
    cache.attach()
    try:
        with cache.run("slot", reuse=True) as light:
            assert not light
            assert leaves(unet, inputs(unet)) == everything
        with cache.run("slot", reuse=True) as light:
            assert light
            ran = leaves(unet, inputs(unet, seed=1))
    finally:
        cache.detach()
    expected = [leaf for leaf in everything if leaf.startswith(tuple(live(unet, cut)))]
    assert ran == expected
    assert len(ran) < len(everything)
    assert leaves(unet, inputs(unet)) == everything


@torch.no_grad()
@pytest.mark.parametrize(("name", "cut"), SOME)
def test_the_same_input_gives_the_same_bits(name: str, cut: Cut) -> None:
    unet = UNETS[name]
    arguments = inputs(unet)
    expected = unet(**arguments).sample
    cache = UNetCache(unet, cut)
    cache.attach()
    try:
        with cache.run("slot", reuse=False):
            assert torch.equal(unet(**arguments).sample, expected)
        with cache.run("slot", reuse=True):
            assert torch.equal(unet(**arguments, return_dict=False)[0], expected)
        other = inputs(unet, seed=3)
        with cache.run("slot", reuse=True):
            approximate = unet(**other).sample
    finally:
        cache.detach()
    exact = unet(**other).sample
    assert not torch.equal(approximate, exact)
    assert not torch.equal(approximate, expected)
    assert torch.equal(unet(**arguments).sample, expected)


@torch.no_grad()
def test_the_released_cut_caches_what_enters_the_last_up_block() -> None:
    unet = UNETS["sd15"]
    entered: list[torch.Tensor] = []
    handle = unet.up_blocks[-1].register_forward_pre_hook(
        lambda _, __, kwargs: entered.append(kwargs["hidden_states"]), with_kwargs=True
    )
    store = Store()
    cache = UNetCache(unet, Cut(0, 1), store)
    cache.attach()
    with cache.run("slot", reuse=False):
        unet(**inputs(unet))
    handle.remove()
    assert torch.equal(store["slot"], entered[0])
    assert store.bytes == entered[0].numel() * 4
    cache.detach()
    assert len(store) == 0


@torch.no_grad()
def test_slots_do_not_mix() -> None:
    unet = UNETS["sd15"]
    first, second = inputs(unet), inputs(unet, seed=1)
    cache = UNetCache(unet)
    cache.attach()
    with cache.run("first", reuse=True):
        expected = unet(**first).sample
    with cache.run("second", reuse=True) as light:
        assert not light
        unet(**second)
    with cache.run("first", reuse=True) as light:
        assert light
        assert torch.equal(unet(**first).sample, expected)
    cache.discard("first")
    with cache.run("first", reuse=True, record=False) as light:
        assert not light
        unet(**first)
    assert "first" not in cache.store
    assert "second" in cache.store
    cache.detach()


@torch.no_grad()
@pytest.mark.parametrize("cut", cuts(UNETS["sd15"]))
def test_sizes_that_do_not_halve_and_freeu(cut: Cut) -> None:
    unet = tiny.unet_sd15()
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    arguments = inputs(unet, size=18)
    expected = unet(**arguments).sample
    cache = UNetCache(unet, cut)
    cache.attach()
    with cache.run("slot", reuse=True):
        unet(**arguments)
    for _ in range(2):
        with cache.run("slot", reuse=True) as light:
            assert light
            assert torch.equal(unet(**arguments).sample, expected)


@torch.no_grad()
def test_an_error_ends_the_pass() -> None:
    unet = UNETS["sd15"]
    expected = unet(**inputs(unet)).sample
    cache = UNetCache(unet)
    cache.attach()
    with cache.run("slot", reuse=True):
        unet(**inputs(unet, seed=1))
    with pytest.raises(RuntimeError), cache.run("slot", reuse=True):
        unet(**inputs(unet) | {"sample": torch.zeros(2, 9, 16, 16)})
    assert torch.equal(unet(**inputs(unet)).sample, expected)
    cache.detach()


@settings(max_examples=15, deadline=None)
@given(attached=st.lists(st.sampled_from(range(len(CASES))), max_size=4))
def test_attaching_and_detaching_leaves_nothing(attached: list[int]) -> None:
    def attributes() -> Counter[tuple[str, str]]:
        return Counter((name, key) for name, m in UNETS["sdxl"].named_modules() for key in vars(m))

    before = attributes()
    unet = UNETS["sdxl"]
    possible = cuts(unet)
    for index in attached:
        cache = UNetCache(unet, possible[index % len(possible)])
        cache.attach()
        assert attributes() != before
        cache.detach()
        cache.detach()
    assert attributes() == before


def test_default_cuts() -> None:
    found = {name: default_cut(unet) for name, unet in UNETS.items()}
    assert found == {
        "sd15": Cut(0, 1),
        "one layer per block": Cut(0, 0),
        "three levels": Cut(0, 1),
        "no attention outside": Cut(1, 1),
        "sdxl": Cut(1, 1),
    }


def test_impossible_cuts_name_the_possible_ones() -> None:
    with pytest.raises(CmloraError, match=r"layer 0, block 2; possible .*\(0, -1\), \(0, 0\)"):
        UNetCache(UNETS["sd15"], Cut(0, 2))
    with pytest.raises(CmloraError, match=r"layer 4, block 0"):
        UNetCache(UNETS["sd15"], Cut(4, 0))
    attention = UNet2DModel(
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
    )
    with pytest.raises(CmloraError, match="it has AttnDownBlock2D, AttnUpBlock2D"):
        cuts(attention)
    with pytest.raises(CmloraError, match="it has no such blocks"):
        cuts(nn.Linear(1, 1))
