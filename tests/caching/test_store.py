"""Slots of features: apart, together in batches, and extrapolated."""

import pytest
import torch

from cmlora.caching.store import Store


def feature(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None]


def test_a_batch_is_kept_apart() -> None:
    store = Store()
    store.record(["ink", "alice"], feature(1, 2, 3, 4))
    assert store["ink"].tolist() == [[1], [2]]
    assert store.recall(["alice", "ink"]).tolist() == [[3], [4], [1], [2]]
    assert store.bytes == 16
    store.discard("ink")
    assert "ink" not in store
    assert len(store) == 1


def test_what_is_recalled_may_be_written_to() -> None:
    store = Store()
    source = feature(1, 2)
    store["ink"] = source
    source += 1
    taken = store.recall(["ink"])
    taken += 10
    assert store["ink"].tolist() == [[1], [2]]


@pytest.mark.parametrize("order", [0, 1, 2])
def test_slots_extrapolate_polynomials_of_their_order(order: int) -> None:
    store = Store(order)
    for step in (0, 2, 3):
        store.record(["ink"], feature(step**order), at=step)
    expected = 7**order if order else 1
    assert store.recall(["ink"], at=7).tolist() == [[expected]]
    assert store.bytes == 4 * (order + 1)


def test_another_run_or_other_tokens_begin_anew() -> None:
    store = Store(1)
    store.record(["ink"], feature(1), at=3)
    store.record(["ink"], feature(5), at=0)
    assert store.recall(["ink"], at=2).tolist() == [[5]]
    store.record(["ink"], feature(1, 2), at=1)
    assert store.recall(["ink"], at=2).tolist() == [[1], [2]]
