"""Matrices without their zeros: the same numbers, and the same merges in small blocks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cmlora.adapters.merging import kept
from cmlora.adapters.merging.agree import add, elect
from cmlora.adapters.merging.kept import Kept, blocks
from cmlora.adapters.merging.sparse import combine


def sparse(rows: int, columns: int, share: float, seed: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn((rows, columns), generator=generator, dtype=dtype)
    return values * (torch.rand((rows, columns), generator=generator) < share)


@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 40),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    data=st.data(),
)
def test_every_row_comes_back(
    rows: int, columns: int, share: float, dtype: torch.dtype, data: st.DataObject
) -> None:
    matrix = sparse(rows, columns, share, rows * columns, dtype)
    first = data.draw(st.integers(0, rows - 1))
    last = data.draw(st.integers(first + 1, rows))
    found = Kept.of(matrix).rows(first, last)
    assert found.dtype == dtype
    assert torch.equal(found, matrix[first:last])


def test_only_what_is_there_takes_memory() -> None:
    matrix = sparse(64, 1000, 0.25, 0, torch.float32)
    packed = Kept.of(matrix)
    assert len(packed.values) == int(matrix.count_nonzero())
    assert packed.bits.nbytes == matrix.numel() / 8


@pytest.mark.parametrize("block", [1, 100, 10**6])
@pytest.mark.parametrize("election", [None, ("total", False), ("frequency", True)])
def test_blocks_make_no_difference(
    block: int, election: tuple[str, bool] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "BLOCK", block)
    matrices = [sparse(9, 30, 0.6, seed, torch.float32) for seed in range(4)]
    weights = [0.5, -1.0, 2.0, 0.3]
    value, notes = combine(iter(matrices), weights, election)  # type: ignore[arg-type]
    if election is None:
        assert torch.equal(value, add(matrices, weights))
        return
    whole = elect(matrices, weights, *election)  # type: ignore[arg-type]
    assert torch.equal(value, whole.value)
    assert notes["kept"] == whole.agreed / whole.cast
    assert notes["contested"] == whole.contested / whole.places
    assert len(list(blocks([Kept.of(matrices[0])]))) == {1: 9, 100: 3, 10**6: 1}[block]
