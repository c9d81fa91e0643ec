"""Every resizing rule: error falls as more is kept, bytes are the file's, nothing grows."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from cmlora.adapters.compression import RULES
from cmlora.adapters.compression.resize import Resized, resize
from cmlora.adapters.compression.rule import Cost
from cmlora.errors import CmloraError
from cmlora.files import write
from cmlora.lora import LoRA, Update
from tests.compression import references
from tests.synthetic import MODULES, lora, scaled

VALUES = {
    "fixed": (1, 2, 4, 6),
    "energy": (0.3, 0.6, 0.9, 1),
    "budget": (0.3, 0.5, 0.8, 1),
    "welore": (0.3, 0.5, 0.8, 1),
    "clip": (0.1, 0.5, 0.9, 1e6),
}


def mixed(seed: int = 0) -> LoRA:
    """Modules of all kinds: wide, tall, 3x3, 1x1, Tucker, of different strength and rank."""
    linear = lora("mixed", seed, MODULES[:2], (16, 20), rank=6)
    tall = scaled(lora("mixed", seed + 1, MODULES[2:3], (24, 6), rank=5), "mixed", 7)
    conv = lora("mixed", seed + 2, MODULES[3:4], (8, 6, 3, 3), rank=4)
    one = lora("mixed", seed + 3, MODULES[4:], (8, 6, 1, 1), rank=4)
    g = torch.Generator().manual_seed(seed)
    tucker = Update(
        torch.randn((3, 6, 1, 1), generator=g),
        torch.randn((8, 4), generator=g),
        mid=torch.randn((4, 3, 3, 3), generator=g),
    )
    updates = {**linear.updates, **tall.updates, **conv.updates, **one.updates}
    return replace(linear, updates={**updates, "unet.conv_out": tucker}, triggers=("mix",))


def run(name: str, value: float, source: LoRA | None = None) -> Resized:
    return resize(source or mixed(), RULES[name].object, value)


@pytest.mark.parametrize("name", list(RULES))
def test_error_falls_as_more_is_kept(name: str) -> None:
    runs = [run(name, value) for value in VALUES[name]]
    errors = [one.error for one in runs]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.1
    assert runs[-1].error < 1e-6
    sizes = [one.after for one in runs]
    assert sizes == sorted(sizes)
    assert sizes[-1] <= runs[-1].before


@pytest.mark.parametrize("name", list(RULES))
def test_the_error_is_the_dense_one(name: str) -> None:
    source, found = mixed(), run(name, VALUES[name][1])
    lost = whole = 0.0
    for module, update in source.updates.items():
        difference = (update.delta() - found.lora.updates[module].delta()).double()
        lost += float(difference.square().sum())
        whole += float(update.delta().double().square().sum())
        share = float(difference.norm() / update.delta().double().norm())
        assert found.changes[module].error == pytest.approx(share, abs=1e-5)
        assert found.changes[module].after <= update.rank
    assert found.error == pytest.approx(math.sqrt(lost / whole), abs=1e-5)


@pytest.mark.parametrize("name", list(RULES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bytes_are_those_of_the_file(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    found = resize(mixed(), RULES[name].object, VALUES[name][1], dtype)
    write(found.lora, tmp_path / "small.safetensors")
    tensors = load_file(tmp_path / "small.safetensors")
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == found.after
    assert {t.dtype for t in tensors.values()} == {dtype}
    assert all(bool(t.isfinite().all()) for t in tensors.values())
    assert found.lora.triggers == ("mix",)


@pytest.mark.parametrize("name", list(RULES))
def test_silence_stays_silent(name: str) -> None:
    silent = scaled(mixed(), "silent", 0)
    found = run(name, VALUES[name][1], silent)
    assert found.error == 0
    assert all(float(u.delta().abs().max()) == 0 for u in found.lora.updates.values())


def test_truncation_is_the_best_there_is() -> None:
    source = mixed()
    found = run("fixed", 2, source)
    for module, update in source.updates.items():
        dense = update.delta().flatten(1).double().numpy()
        best = references.truncated(dense, 2)
        assert np.allclose(found.lora.updates[module].delta().flatten(1), best, atol=1e-4)


def test_rank_that_is_not_there_is_dropped_without_loss() -> None:
    one = lora("one", 1)
    doubled = {
        m: Update(torch.cat([u.down, u.down]), torch.cat([u.up, u.up], 1), u.scale)
        for m, u in one.updates.items()
    }
    found = run("energy", 1 - 1e-9, replace(one, updates=doubled))
    assert {change.after for change in found.changes.values()} == {3}
    assert found.error < 1e-5
    assert 2 * found.after == found.before


spectra = st.lists(
    st.lists(st.floats(0.1, 10), min_size=4, max_size=4).map(lambda row: sorted(row, reverse=True)),
    min_size=2,
    max_size=3,
)


@settings(max_examples=40)
@given(spectra, st.floats(0.05, 1))
def test_energy_is_the_least_rank(rows: list[list[float]], share: float) -> None:
    found = RULES["energy"].object(_tensors(rows), {}, share)
    ranks = [len(values) for values in found.values()]
    for row, rank in zip(rows, ranks, strict=True):
        assert abs(rank - references.least_rank(row, share)) <= 1  # a tie may round either way
        assert sum(v * v for v in row[:rank]) >= share * sum(v * v for v in row) * (1 - 1e-9)


@settings(max_examples=40)
@given(spectra, st.floats(0.3, 1))
def test_budget_is_optimal_when_all_cost_the_same(rows: list[list[float]], share: float) -> None:
    most = share * 4 * 10 * len(rows)
    costs = {str(i): Cost(10, 40) for i in range(len(rows))}
    found = RULES["budget"].object(_tensors(rows), costs, share)
    lost = sum(
        sum(v * v for v in row[len(kept) :]) for row, kept in zip(rows, found.values(), strict=True)
    )
    assert lost == pytest.approx(references.best_ranks(rows, 10, int(most + 1e-9)), rel=1e-9)


@settings(max_examples=40)
@given(spectra, st.floats(0.3, 1))
def test_welore_is_the_lowest_threshold(rows: list[list[float]], share: float) -> None:
    costs = {str(i): Cost(10, 40) for i in range(len(rows))}
    found = RULES["welore"].object(_tensors(rows), costs, share)
    expected = references.threshold_ranks(rows, 10, share * 40 * len(rows) + 1e-9)
    assert [len(values) for values in found.values()] == expected


def test_steep_spectra_give_up_more_than_flat_ones() -> None:
    steep, flat = torch.logspace(0, -6, 12).double(), torch.linspace(1, 0.8, 12).double()
    both, costs = {"flat": flat, "steep": steep}, {"flat": Cost(10, 120), "steep": Cost(10, 120)}
    uniform = float(flat[6:].square().sum() + steep[6:].square().sum())
    for name in ("welore", "budget"):
        kept = RULES[name].object(both, costs, 0.5)
        lost = sum(float(both[m][len(kept[m]) :].square().sum()) for m in both)
        assert lost <= uniform + 1e-12
        assert sum(map(len, kept.values())) in (11, 12)


def test_no_form_is_paid_for_twice() -> None:
    """Where factors are no smaller than what is there, the rest of the rank is free."""
    values, costs = {"m": torch.linspace(4, 1, 8).double()}, {"m": Cost(10, 40)}
    assert len(RULES["budget"].object(values, costs, 1.0)["m"]) == 8
    assert len(RULES["welore"].object(values, costs, 1.0)["m"]) == 8


def test_a_clipped_spike_is_no_spike() -> None:
    source = mixed()
    loud = {MODULES[0]: replace(source.updates[MODULES[0]], scale=90.0)}
    found = run("clip", 3, replace(source, updates={**source.updates, **loud}))
    firsts = sorted(float(u.singular_values()[0]) for u in found.lora.updates.values())
    assert firsts[-1] < 3.1 * firsts[len(firsts) // 2]
    quiet = MODULES[1]
    assert found.lora.updates[quiet] is source.updates[quiet]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fixed", 0),
        ("fixed", 1.5),
        ("fixed", math.inf),
        ("fixed", 7),
        ("energy", 0),
        ("energy", 1.1),
        ("budget", -1),
        ("welore", 2),
        ("clip", 0),
        ("clip", math.nan),
    ],
)
def test_impossible_values_are_refused(name: str, value: float) -> None:
    with pytest.raises(CmloraError):
        run(name, value)


def test_without_a_rank_fixed_keeps_what_there_is() -> None:
    found = resize(mixed(), RULES["fixed"].object)
    assert {change.after for change in found.changes.values()} == {4, 5, 6}
    with pytest.raises(CmloraError, match="rank 7 is not possible; this LoRA allows 1 to 6"):
        run("fixed", 7)


def test_nothing_to_resize() -> None:
    with pytest.raises(CmloraError, match="no updates"):
        run("fixed", 1, LoRA("bare", {}))


def _tensors(rows: list[list[float]]) -> dict[str, torch.Tensor]:
    return {str(i): torch.tensor(row, dtype=torch.double) for i, row in enumerate(rows)}
