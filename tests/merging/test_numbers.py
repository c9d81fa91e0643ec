"""Cases worked out by hand and identities that must hold to many digits."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cmlora.adapters.merging import factors, merge
from cmlora.adapters.merging.agree import elect
from cmlora.adapters.merging.align import align_pair
from cmlora.adapters.merging.factors import Pair, canonical, inner, nearest, svd
from cmlora.adapters.merging.lego import lego
from cmlora.adapters.merging.sparse import ties
from cmlora.adapters.merging.sparsify import by_rank, largest, middle, random
from cmlora.errors import CmloraError
from cmlora.lora import LoRA
from tests.merging import references
from tests.merging.makers import a_pair, distance, generator, make, named, permuted, product


def row(*values: float) -> Pair:
    """A matrix with one row."""
    return Pair(torch.ones(1, 1, dtype=torch.double), torch.tensor([values], dtype=torch.double))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 9), st.integers(1, 5))
def test_factors_against_dense_matrices(seed: int, rows: int, columns: int, rank: int) -> None:
    one, other = a_pair(seed, rows, columns, rank), a_pair(seed + 1, rows, columns, rank)
    u, s, vh = svd(one)
    assert torch.allclose(u @ s.diag() @ vh, product(one))
    assert math.isclose(
        inner(one, other), float((product(one) * product(other)).sum()), abs_tol=1e-9
    )
    assert math.isclose(one.norm(), float(product(one).norm()), rel_tol=1e-9)
    for keep in range(1, min(rows, columns) + 1):
        expected = references.cut(product(one).numpy(), keep)
        found = product(nearest(product(one), keep)).numpy()
        assert np.linalg.norm(found - expected) < 1e-5 * (1 + np.linalg.norm(expected))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6))
def test_canonical_factors_are_the_same_for_every_gauge(seed: int) -> None:
    pair = a_pair(seed)
    turn = torch.linalg.qr(torch.randn((3, 3), generator=generator(seed), dtype=torch.double)).Q
    mix = turn * torch.tensor([0.3, -1.0, 2.0], dtype=torch.double)
    other = canonical(Pair(pair.up @ mix, torch.linalg.inv(mix) @ pair.down))
    assert torch.allclose(other.up, canonical(pair).up, atol=1e-6)
    assert torch.allclose(product(other), product(pair), atol=1e-9)


@pytest.mark.parametrize("how", ["permute", "procrustes"])
def test_alignment_finds_a_changed_copy(how: str) -> None:
    pytest.importorskip("scipy")
    pair = a_pair(0, rank=4)
    order = torch.tensor([2, 0, 3, 1])
    turn = torch.linalg.qr(torch.randn((4, 4), generator=generator(), dtype=torch.double)).Q
    copy = Pair(pair.up[:, order], pair.down[order])
    if how == "procrustes":
        copy = Pair(pair.up @ turn, turn.T @ pair.down)
    found = align_pair(copy, pair, how)  # type: ignore[arg-type]
    assert torch.allclose(found.up, pair.up, atol=1e-9)
    assert torch.allclose(found.down, pair.down, atol=1e-9)


def test_ties_by_hand() -> None:
    pairs = [row(3, -1, 0.5, 2), row(1, 2, -4, 0.1)]
    found = ties(pairs, [1.0, 1.0], density=0.75)
    assert found.value.tolist() == [[2.0, 2.0, -4.0, 2.0]]  # type: ignore[union-attr]
    # Six of eight entries are left and -1 and 0.5 lose, but 0.5 was trimmed: two places disagree.
    assert found.notes["contested"] == pytest.approx(1 / 4)
    assert found.notes["kept"] == pytest.approx(5 / 6)


def test_trimmed_entries_can_be_filled_in() -> None:
    pair = a_pair(0, 30, 28, 2)
    zero = ties([pair], [1.0], density=0.6).value
    assert isinstance(zero, Tensor)
    cut = product(nearest(zero, 2))
    found = ties([pair], [1.0], density=0.6, fill=True)
    assert isinstance(found.value, Pair)
    assert found.value.rank == 2
    assert found.notes["known"] == pytest.approx(0.6, abs=0.01)
    errors = [
        float((d - product(pair)).norm() / product(pair).norm())
        for d in (cut, product(found.value))
    ]
    assert errors[1] < 0.5 * errors[0]
    with pytest.raises(CmloraError, match="space=delta"):
        ties([pair], [1.0], fill=True, space="factor")


def test_a_negative_weight_can_vote_negatively() -> None:
    matrices = [torch.tensor([[3.0]]), torch.tensor([[2.0]])]
    assert elect(matrices, [1.0, -2.0]).value.tolist() == [[-0.5]]
    assert elect(matrices, [1.0, -2.0], signed_vote=True).value.tolist() == [[-4.0]]
    assert elect([*matrices, torch.tensor([[-9.0]])], [1, 1, 1]).value.tolist() == [[-9.0]]
    found = elect([*matrices, torch.tensor([[-9.0]])], [1, 1, 1], "frequency")
    assert found.value.tolist() == [[2.5]]


def test_a_tie_and_zeros_are_positive() -> None:
    matrices = [torch.tensor([[2.0, 0.0]]), torch.tensor([[-2.0, 0.0]])]
    assert elect(matrices, [1.0, 1.0]).value.tolist() == [[2.0, 0.0]]


def test_middle_by_hand() -> None:
    found = middle(torch.tensor([[5.0, -4.0], [3.0, 1.0]]), 0.5, 0.25)
    assert found.tolist() == [[0.0, -4.0], [3.0, 0.0]]
    assert int(largest(torch.randn(7, 9, generator=generator()), 0.3).count_nonzero()) == 18


@pytest.mark.parametrize("chance", ["random", "by_rank"])
def test_random_entries_have_the_matrix_as_their_mean(chance: str) -> None:
    matrix = torch.randn((8, 9), generator=generator())
    draws, density, g = 3000, 0.3, generator(1)
    total = torch.zeros_like(matrix)
    for _ in range(draws):
        total += (
            random(matrix, density, g) if chance == "random" else by_rank(matrix, density, 0.2, g)
        )
    error = float((total / draws - matrix).norm() / matrix.norm())
    assert error <= 1.15 * math.sqrt((1 - density) / (density * draws))


def test_larger_entries_are_kept_more_often() -> None:
    matrix = torch.arange(1.0, 11.0)[None]
    g = generator()
    kept = sum((by_rank(matrix, 0.5, 0.8, g) != 0).double() for _ in range(2000)) / 2000
    assert not isinstance(kept, float)
    expected = torch.linspace(0.1, 0.9, 10, dtype=torch.double)
    assert torch.allclose(kept[0], expected, atol=0.05)


def test_means_on_the_sphere_have_the_length_between() -> None:
    one, other = make("a"), make("b")
    for method in ("slerp", "karcher"):
        mean = merge([one, other], [1.0, 3.0], method).lora
        for module, update in mean.updates.items():
            sizes = one.updates[module].norm(), other.updates[module].norm()
            assert update.norm() == pytest.approx(0.25 * sizes[0] + 0.75 * sizes[1], rel=1e-5)
    opposite = replace(
        one, name="c", updates={m: replace(u, scale=-u.scale) for m, u in one.updates.items()}
    )
    for method in ("slerp", "karcher"):
        with pytest.raises(CmloraError, match="opposite"):
            merge([one, opposite], [1.0, 1.0], method)


def test_lego_makes_copies_one() -> None:
    original = make("a", 4)
    copies = [original, named(permuted(original), "b")]
    assert distance(merge(copies, [1.0, 1.0], "lego").lora, original) < 1e-6
    assert distance(merge(copies, [1.0, 1.0], "lego", gauge="raw").lora, original) < 1e-6
    assert distance(merge(copies, [1.0, 1.0], "lego", cluster="mcr2").lora, original) < 1e-6
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0])
    flipped = {
        m: replace(u, up=u.up * signs, down=u.down * signs.reshape(-1, *[1] * (u.down.ndim - 1)))
        for m, u in original.updates.items()
    }
    copies[1] = LoRA("b", flipped)
    assert distance(merge(copies, [1.0, 1.0], "lego").lora, original) < 1e-6
    assert distance(merge(copies, [1.0, 1.0], "lego", gauge="raw").lora, original) > 0.1


def test_lego_with_every_unit_its_own_cluster_is_the_sum() -> None:
    loras = [make("a", 3), make("b", 2)]
    found = merge(loras, [0.8, -0.6], "lego", rank=5, reweight=False)
    assert found.report.error < 1e-6
    directions = merge(loras, [0.8, -0.6], "lego", rank=5, reweight=False, cluster="mcr2")
    assert directions.report.error < 1e-6
    stronger = merge(loras, [0.8, -0.6], "lego", rank=2)
    assert stronger.report.rank == 2


def test_lego_finds_the_best_clusters_of_a_few_units() -> None:
    pairs = [a_pair(seed, 3, 4, 2) for seed in range(3)]
    pool = torch.cat([torch.cat([p.up.T, p.down], 1) for p in pairs])
    found = lego(pairs, [1.0] * 3, generator=generator(), rank=3, gauge="raw", reweight=False)
    centres = torch.cat([found.up.T, found.down], 1)
    # Centres are lengthened, which does not change who is nearest in direction: recover the groups.
    lengths = pool.norm(dim=1)
    groups: dict[int, list[int]] = {}
    for unit in range(6):
        best = int((pool[unit] @ centres.T / centres.norm(dim=1)).argmax())
        groups.setdefault(best, []).append(unit)
    spread = sum(float(((pool[g] - pool[g].mean(0)) ** 2).sum()) for g in groups.values())
    assert spread == pytest.approx(references.clusters(pool.numpy(), 3), rel=1e-9)
    for label, group in groups.items():
        assert float(centres[label].norm()) == pytest.approx(float(lengths[group].mean()), rel=1e-6)


@pytest.mark.parametrize("shape", [(23, 9), (9, 23), (8, 8)])
def test_the_nearest_matrix_is_found_in_parts(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(factors, "_ROWS", 5)
    matrix = torch.randn(shape, generator=generator())
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    expected = u[:, :3] * s[:3] @ vh[:3]
    assert torch.allclose(product(nearest(matrix, 3)), expected, atol=1e-9)
    assert factors.dense_norm(matrix) == pytest.approx(float(s.square().sum().sqrt()), rel=1e-12)
