"""Strengths learnt from a loss, beside least squares."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cmlora.adapters.merging.atlas import atlas
from cmlora.errors import CmloraError
from cmlora.files import read, write
from cmlora.lora import LoRA
from tests.merging.makers import SHAPES, distance, make, named, without


def distance_to(target: Mapping[str, Tensor]) -> Callable[[LoRA], Tensor]:
    """A quadratic loss over all modules."""

    def loss(lora: LoRA) -> Tensor:
        parts = [
            (lora.updates[module].delta() - delta).square().sum() / delta.square().sum()
            for module, delta in target.items()
        ]
        return torch.stack(parts).sum()

    return loss


def test_strengths_are_least_squares_per_module() -> None:
    loras = [make("a"), make("b", 2)]
    target = {m: u.delta() + 0.3 * torch.ones(u.shape) for m, u in make("c").updates.items()}
    found = atlas(loras, distance_to(target), steps=400, control=False)
    for module, delta in target.items():
        columns = np.stack([x.updates[module].delta().flatten().numpy() for x in loras], 1)
        best = np.linalg.lstsq(columns, delta.flatten().numpy(), rcond=None)[0]
        for lora, strength in zip(loras, best, strict=True):
            assert found.strengths[lora.name][module] == pytest.approx(strength, abs=1e-4)


def test_modules_may_have_different_strengths(tmp_path: Path) -> None:
    loras = [make("a"), without(make("b"), min(SHAPES))]
    wanted = {m: 0.1 * (i + 1) for i, m in enumerate(sorted(SHAPES))}
    target = {m: wanted[m] * u.delta() for m, u in make("a").updates.items()}
    found = atlas(loras, distance_to(target), steps=400)
    assert found.losses[0] == pytest.approx(len(SHAPES), rel=1e-5)  # nothing is changed at first
    assert min(found.losses) < 1e-6
    assert found.control is not None
    assert found.control > 0.5 * len(SHAPES)  # random directions are of no use here
    assert found.strengths["a"] == pytest.approx(wanted, abs=1e-3)
    write(found.lora, tmp_path / "x.safetensors")
    assert distance(read(tmp_path / "x.safetensors"), found.lora) == 0


def test_a_penalty_makes_strengths_smaller() -> None:
    loras = [make("a"), make("b")]
    loss = distance_to(make("a").deltas())
    sums = []
    for penalty in (0.0, 0.2, 1.0):
        strengths = atlas(loras, loss, steps=150, penalty=penalty, control=False).strengths
        sums.append(sum(abs(v) for row in strengths.values() for v in row.values()))
    assert sums == sorted(sums, reverse=True)


def test_mistakes() -> None:
    loss = distance_to(make("a").deltas())
    with pytest.raises(CmloraError, match="told apart by names"):
        atlas([make("a"), named(make("b"), "a")], loss)
    with pytest.raises(CmloraError, match="lower the rate"):
        atlas([make("a")], lambda lora: loss(lora) * torch.nan, steps=2, control=False)
