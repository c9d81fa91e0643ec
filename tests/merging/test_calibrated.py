"""Merges that look at the inputs of the layers, beside least squares on the inputs themselves."""

import numpy as np
import pytest
import torch
from torch import Tensor

from cmlora.adapters.merging import merge
from cmlora.adapters.merging.factors import Pair
from cmlora.adapters.merging.pleas import pleas
from cmlora.adapters.merging.ziplora import ziplora
from cmlora.errors import CmloraError
from tests.merging.makers import make


@pytest.fixture
def toy() -> tuple[list[Pair], list[Tensor]]:
    """Two updates (10, 12) of rank 4 and 3, and the inputs (12, samples) each was made for."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.double)

    stretch = torch.logspace(-1, 1, 12, dtype=torch.double)
    inputs = [normal(12, 40) * stretch[:, None], normal(12, 30) * stretch.flip(0)[:, None]]
    return [Pair(normal(10, 4), normal(4, 12)), Pair(normal(10, 3), normal(3, 12))], inputs


def objective(delta: Tensor, pairs: list[Pair], inputs: list[Tensor]) -> float:
    lost = [(delta - p.up @ p.down) @ x for p, x in zip(pairs, inputs, strict=True)]
    return sum(float(part.square().sum()) for part in lost)


def test_pleas_is_least_squares_and_low_rank(toy: tuple[list[Pair], list[Tensor]]) -> None:
    pairs, inputs = toy
    found = pleas(pairs, [1.0, 1.0], grams=[x @ x.T for x in inputs], ridge=0.0)
    everything = torch.cat(inputs, 1).numpy()
    wanted = torch.cat([p.up @ p.down @ x for p, x in zip(pairs, inputs, strict=True)], 1).numpy()
    expected = np.linalg.lstsq(everything.T, wanted.T, rcond=None)[0].T
    assert found.rank == 7
    assert np.allclose((found.up @ found.down).numpy(), expected, atol=1e-8)
    mean = sum((0.5 * p.up @ p.down for p in pairs), torch.zeros(10, 12).double())
    assert objective(found.up @ found.down, pairs, inputs) <= objective(mean, pairs, inputs) / 3


def test_ziplora_is_the_best_choice_of_columns(toy: tuple[list[Pair], list[Tensor]]) -> None:
    pairs, inputs = toy
    found = ziplora(pairs, [1.0, 1.0], grams=[x @ x.T for x in inputs])
    # The same problem with one unknown per LoRA and column, written out.
    unknowns = []
    for pair in pairs:
        for column in range(12):
            single = torch.zeros(10, 12, dtype=torch.double)
            single[:, column] = (pair.up @ pair.down)[:, column]
            unknowns.append(torch.cat([(single @ x).flatten() for x in inputs]))
    targets = torch.cat([(p.up @ p.down @ x).flatten() for p, x in zip(pairs, inputs, strict=True)])
    best = np.linalg.lstsq(torch.stack(unknowns, 1).numpy(), targets.numpy(), rcond=None)[0]
    columns = torch.from_numpy(best).reshape(2, 12)
    expected = sum(
        (p.up @ p.down * m for p, m in zip(pairs, columns, strict=True)),
        torch.zeros(10, 12).double(),
    )
    delta = found.up @ found.down
    assert torch.allclose(delta, expected, atol=1e-6)
    for share in (1.0, 0.5):
        plain = sum((share * p.up @ p.down for p in pairs), torch.zeros(10, 12).double())
        assert objective(delta, pairs, inputs) <= objective(plain, pairs, inputs)
    early = ziplora(pairs, [1.0, 1.0], grams=[x @ x.T for x in inputs], steps=2)
    total = sum((p.up @ p.down for p in pairs), torch.zeros(10, 12).double())
    lost = objective(early.up @ early.down, pairs, inputs)
    assert lost <= objective(total, pairs, inputs)


def test_calibration_data_is_asked_for_and_checked() -> None:
    loras = [make("a"), make("b")]
    with pytest.raises(CmloraError, match="needs calibration data, and there is none of a for"):
        merge(loras, [1.0, 1.0], "pleas")
    narrow = {name: dict.fromkeys(make("a").updates, torch.eye(3)) for name in "ab"}
    with pytest.raises(CmloraError, match=r"shape \(3, 3\) does not fit"):
        merge(loras, [1.0, 1.0], "ziplora", grams=narrow)
