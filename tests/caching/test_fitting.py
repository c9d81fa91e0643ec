"""Which of diffusers' caches work in which family, and what the others are told."""

from typing import Any

import pytest
import torch
from diffusers.hooks import FasterCacheConfig

from cmlora.caching.foreign import FITTING
from cmlora.caching.foreign import NAMES as NAMES_OF_CACHES
from cmlora.compose import compose
from cmlora.denoisers import kind
from cmlora.errors import CmloraError
from tests import families
from tests.composing import state
from tests.families import NAMES, Family

TEXTS = {
    "first_block": "first_block:10",
    "taylorseer": "taylorseer:3",
    "sea": "sea:100",
    "broadcast": "broadcast:2",
    "faster": "faster:2",
    "mag": "mag:10:1,1,1,1,1,1,1,1",
    "text_kv": "text_kv",
}


def attention_runs(family: Family, **options: Any) -> tuple[list[int], torch.Tensor]:
    """Rows of every call of a self-attention's query in a run, and the picture."""
    rows: list[int] = []
    layers = [
        layer
        for model in family.models()
        for name, layer in model.named_modules()
        if name.endswith(("attn.to_q", "attn1.to_q", "attention.to_q", "to_qkv_mlp_proj"))
    ]
    handles = [
        layer.register_forward_hook(lambda _, args, out: rows.append(len(args[0])))
        for layer in layers
    ]
    try:
        with compose(family.pipe, **options):
            return rows, family.run(steps=8)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", sorted(families.FAMILIES))
def test_caches_fit_where_the_table_says_so(name: str) -> None:
    found = families.family(name)
    options = {"loras": ["ink"], "method": "merge"}
    whole, plain = attention_runs(found, **options)
    family = kind(found.models()[0]).family
    before = state(found.pipe)
    for cache in NAMES_OF_CACHES:
        text = TEXTS[cache]
        if cache in FITTING[family]:
            rows, cached = attention_runs(found, **options, cache=text)
            assert len(rows) < len(whole), cache
            assert cached.isfinite().all(), cache
            assert not torch.equal(cached, plain), cache
            if cache == "faster":
                torch.testing.assert_close(cached, plain, rtol=0, atol=0.1)
        else:
            with pytest.raises(CmloraError) as refused:
                compose(found.pipe, ["ink"], method="merge", cache=text)
            for word in (cache, family, *FITTING[family], "uniform:3"):
                assert word in str(refused.value)
    assert state(found.pipe) == before


def test_half_of_faster_cache_is_for_few_families() -> None:
    halving = FasterCacheConfig(tensor_format="BCHW")
    for name in ("flux", "sd3", "wan"):
        with pytest.raises(CmloraError, match=r"unconditional half.*is_guidance_distilled=True"):
            compose(families.family(name).pipe, NAMES, cache=halving)
    pixart = families.family("pixart")
    with compose(pixart.pipe, NAMES, method="composite", cache=halving):
        assert pixart.run(steps=8).isfinite().all()
    with pytest.raises(CmloraError, match="fails with uncond='shared'"):
        compose(pixart.pipe, NAMES, cache=halving, uncond="shared")


def test_a_cache_that_fails_in_a_run_is_named() -> None:
    pixart = families.family("pixart")
    before = state(pixart.pipe)
    with (
        pytest.raises(CmloraError, match=r"diffusers' faster_cache fails in this PixArt.*permute"),
        compose(pixart.pipe, NAMES, method="composite", cache=FasterCacheConfig()),
    ):
        pixart.run()
    assert state(pixart.pipe) == before
    wide = torch.zeros(1, families.TOKENS, families.WIDTH + 1)
    with (
        pytest.raises(RuntimeError) as other,
        compose(pixart.pipe, NAMES, method="composite", cache="broadcast"),
    ):
        pixart.run(prompt_embeds=wide, negative_prompt_embeds=wide)
    assert not isinstance(other.value, CmloraError)  # that was not the cache's fault


def test_too_little_memory_is_no_fault_of_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("diffusers.hooks.taylorseer_cache.TaylorSeerState.update", full)
    sd3 = families.family("sd3")
    with (
        pytest.raises(RuntimeError, match="can't allocate") as failure,
        compose(sd3.pipe, NAMES, method="composite", cache="taylorseer:3"),
    ):
        sd3.run()
    assert not isinstance(failure.value, CmloraError)


@pytest.mark.parametrize(
    ("name", "cache", "least"),
    [
        ("pixart", "first_block:10", 3 + 3),  # its three blocks once, and three times the first
        ("sd3", "taylorseer:3", 3 * 4),  # its four blocks three times before they are forecast
    ],
)
def test_half_a_batch_does_not_serve_a_whole_one(name: str, cache: str, least: int) -> None:
    """A LoRA that is left alone is run on both branches, and what it has kept is of one."""
    rows, _ = attention_runs(
        families.family(name),
        loras=NAMES,
        method="composite",
        uncond="shared",
        schedule="[<lora:ink:1>::0.5]",
        cache=cache,
    )
    first = rows.index(2)
    assert set(rows[first:]) == {2}
    assert len(rows[first:]) >= least
    assert set(rows[:first]) == {1}
