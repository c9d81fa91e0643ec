"""Bounds of a layer's outputs, against running the layer."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmlora.adapters.analysis.strength import ROOM, attention_rank, bound
from cmlora.errors import CmloraError
from cmlora.lora import Update
from tests.synthetic import MODULES, lora, scaled

UPDATE = lora("any", 1).updates[MODULES[0]]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


@settings(max_examples=30)
@given(st.integers(0, 2**31), st.floats(0, 1))
def test_the_safest_strength_is_the_last_safe_one(seed: int, part: float) -> None:
    x, w = random(20, 10, seed=seed), random(12, 10, seed=seed + 1)
    found = bound(x, w, UPDATE)

    def largest(strength: float) -> float:
        return float((x @ (w + strength * UPDATE.delta().double()).T).abs().max())

    assert found.base == pytest.approx(largest(0))
    assert found.ratio == pytest.approx(found.base / math.sqrt(math.log(20)))
    assert largest(part * found.safest) <= ROOM * found.base * (1 + 1e-6)
    assert largest(found.safest * 1.001) > ROOM * found.base
    assert largest(3 * part) <= found.base + 3 * part * found.added * (1 + 1e-6)


def test_an_update_that_does_nothing_is_safe_at_any_strength() -> None:
    silent = scaled(lora("any", 1), "silent", 0).updates[MODULES[0]]
    assert bound(random(5, 10), random(12, 10), silent).safest == math.inf


def test_stronger_logits_need_more_rank() -> None:
    q, k = random(64, 4), random(64, 4, seed=1)
    ranks = [attention_rank(a * q, k) for a in (0, 0.25, 0.5, 1, 2)]
    assert ranks[0] == 1
    assert ranks == sorted(ranks)


def test_what_does_not_fit() -> None:
    with pytest.raises(CmloraError, match="does not fit"):
        bound(random(5, 9), random(12, 9), UPDATE)
    with pytest.raises(CmloraError, match="two tokens"):
        bound(random(1, 10), random(12, 10), UPDATE)
    wide = Update(torch.zeros(1, 10), torch.zeros(5, 1))
    with pytest.raises(CmloraError, match="does not fit"):
        bound(random(5, 10), random(12, 10), wide)
