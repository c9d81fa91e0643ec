"""Methods on singular vectors: cuts, clamps, shared bases, equal strengths, orthogonal vectors."""

import math
import zlib

import numpy as np
import pytest
import torch

from cmlora.adapters.merging import merge
from cmlora.adapters.merging.factors import Pair
from cmlora.adapters.merging.iso import iso_c, iso_cts, split
from cmlora.adapters.merging.knots import aligned, knots_ties, thresholds
from cmlora.adapters.merging.svd import quantile
from cmlora.adapters.merging.tsv import tsv_m
from cmlora.errors import CmloraError
from tests.merging import references
from tests.merging.makers import SHAPES, a_pair, distance, make, product, without


def test_truncation_loses_what_eckart_and_young_say() -> None:
    loras = [make("a"), make("b")]
    exact = merge(loras, [0.8, 0.6], "cat").lora
    merged = merge(loras, [0.8, 0.6], "svd", rank=2)
    lost = total = 0.0
    for update in exact.updates.values():
        values = torch.linalg.svdvals(update.delta().double().flatten(1)).square()
        lost, total = lost + float(values[2:].sum()), total + float(values.sum())
    assert merged.report.error == pytest.approx(math.sqrt(lost / total), abs=1e-6)


@pytest.mark.parametrize("method", ["ties", "magnitude", "dare_linear", "della", "breadcrumbs"])
@pytest.mark.parametrize("rank", [None, 2])
def test_what_a_cut_loses_is_said(method: str, rank: int | None) -> None:
    """Entrywise methods leave matrices of full rank, and a LoRA has less."""
    loras = [make("a"), make("b")]
    report = merge(loras, [0.8, 0.6], method, rank=rank, seed=3).report
    lost = total = 0.0
    reference = references.EXACT.get(method)
    for module in SHAPES:
        deltas = [lora.updates[module].delta().flatten(1).numpy() for lora in loras]
        if reference is None:
            g = torch.Generator().manual_seed(zlib.crc32(f"3/{module}".encode()))
            whole = references.RANDOM[method](deltas, [0.8, 0.6], g)
        else:
            whole = reference(deltas, [0.8, 0.6])
        values = np.linalg.svd(whole)[1] ** 2
        lost, total = lost + values[rank or 6 :].sum(), total + values.sum()
    assert report.notes["lost_to_rank"] == pytest.approx(math.sqrt(lost / total), abs=1e-5)
    assert report.remarks["lost to rank"].endswith("% of the norm")
    assert report.notes["lost_to_rank"] > 0.1


def test_nothing_is_said_where_nothing_is_cut() -> None:
    loras = [make("a"), make("b")]
    for method in ("cat", "linear", "knots_ties"):
        assert "lost_to_rank" not in merge(loras, [1.0, 1.0], method).report.notes
    # The sum of two LoRAs is a matrix of their rank even when it is written out.
    whole = merge(loras, [1.0, 1.0], "magnitude", density=1.0).report.notes
    assert whole["lost_to_rank"] < 1e-6
    cut = merge(loras, [1.0, 1.0], "cat", rank=2).report
    assert cut.notes["lost_to_rank"] == pytest.approx(cut.error, rel=1e-6)


def test_clamping_clips_singular_vectors() -> None:
    lora = make("a")
    plain, clamped = (merge([lora], [1.0], "svd", clamp=q).lora for q in (1.0, 0.9))
    assert distance(plain, lora) < 1e-5
    assert distance(clamped, lora) > 0.01
    module = min(SHAPES)
    assert clamped.updates[module].up.abs().max() < plain.updates[module].up.abs().max()


def test_knots_without_pruning_is_the_sum_and_never_larger() -> None:
    pairs = [a_pair(0, rank=3), a_pair(1, rank=2)]
    basis, tasks = aligned(pairs)
    assert torch.allclose(basis.T @ basis, torch.eye(basis.shape[1], dtype=torch.double), atol=1e-9)
    total = basis @ (0.8 * tasks[0] + 0.6 * tasks[1])
    assert torch.allclose(total, 0.8 * product(pairs[0]) + 0.6 * product(pairs[1]), atol=1e-9)
    found = knots_ties(pairs, [1.0, 1.0]).value
    assert isinstance(found, Pair)
    assert found.rank <= 5


def test_iso_has_one_singular_value_and_the_nuclear_norm() -> None:
    pairs = [a_pair(0), a_pair(1)]
    before = torch.linalg.svdvals(product(pairs[0]) + product(pairs[1]))
    after = torch.linalg.svdvals(product(iso_c(pairs, [1.0, 1.0])))
    assert float(after.sum()) == pytest.approx(float(before.sum()), rel=1e-9)
    assert float(after[:6].std()) < 1e-9
    three = torch.linalg.svdvals(product(iso_c(pairs, [1.0, 1.0], rank=3)))
    assert float(three.sum()) == pytest.approx(float(before[:3].sum()), rel=1e-9)
    assert iso_cts(pairs, [1.0, 1.0], rank=3).rank <= 3
    shared = torch.linalg.svdvals(product(iso_cts(pairs, [1.0, 1.0], common=0.6)))
    assert float(shared[:6].std()) < 1e-9


def test_tsv_of_orthogonal_loras_is_their_sum() -> None:
    left, right = (torch.linalg.qr(a_pair(s, 12, 12, 12).up).Q for s in (0, 1))
    pairs = [Pair(left[:, 3 * i : 3 * i + 3], right[3 * i : 3 * i + 3]) for i in range(3)]
    found = product(tsv_m(pairs, [1.0, 0.5, -2.0]))
    weights = (1.0, 0.5, -2.0)
    expected = torch.stack([w * product(p) for w, p in zip(weights, pairs, strict=True)]).sum(0)
    assert torch.allclose(found, expected, atol=1e-9)


@pytest.mark.parametrize(
    ("rows", "columns", "ranks"),
    [(12, 14, (4, 3)), (12, 14, (4, 4, 4)), (6, 7, (4, 4)), (9, 8, (5, 5, 5)), (6, 7, (4,) * 8)],
)
def test_tsv_has_orthonormal_vectors(rows: int, columns: int, ranks: tuple[int, ...]) -> None:
    """Whether all directions fit or every LoRA only gives its leading ones."""
    pairs = [a_pair(seed, rows, columns, rank) for seed, rank in enumerate(ranks)]
    found = tsv_m(pairs, [1.0 - 0.1 * index for index in range(len(pairs))])
    room = min(rows, columns)
    each = max(1, room // len(ranks))
    given = sum(ranks) if sum(ranks) <= room else sum(min(rank, each) for rank in ranks)
    assert found.rank == min(given, room)
    left, right = found.up / found.up.norm(dim=0), found.down / found.down.norm(dim=1)[:, None]
    eye = torch.eye(found.rank, dtype=torch.double)
    assert float((left.T @ left - eye).abs().max()) < 1e-6
    assert float((right @ right.T - eye).abs().max()) < 1e-6
    # The values are those of the LoRAs, the strongest of them where there is no room for all.
    values = sorted((float(n) for n in found.up.norm(dim=0) * found.down.norm(dim=1)), reverse=True)
    own = [
        (1.0 - 0.1 * index) * float(value)
        for index, pair in enumerate(pairs)
        for value in torch.linalg.svdvals(product(pair))[: min(each, pair.rank)]
    ]
    if given < sum(ranks):
        assert values == pytest.approx(sorted(own, reverse=True)[: found.rank], rel=1e-6)


def test_directions_are_all_given_away() -> None:
    for count in (2, 3, 5, 8):
        for directions in range(1, 70):
            for common in (0.3, 0.5, 0.8, 0.95):
                keep, each = split(directions, count, common)
                assert keep + count * each == directions
                assert keep >= 0 <= each
                if directions > count:
                    assert each >= 1
                # The authors' own rounding, where it leaves anything.
                own = round((directions - int(directions * common)) / count) * count
                assert count * each == own or each == 1 or own > directions
    assert split(20, 4, 1.0) == (20, 0)


@pytest.mark.parametrize("count", [3, 5])
def test_every_lora_has_directions_of_its_own(count: int) -> None:
    pairs = [a_pair(seed, 26, 24, 3) for seed in range(count)]
    weights = [1.0, 0.7, 1.2, 0.5, 0.9][:count]
    found = iso_cts(pairs, weights)
    expected = references.iso_cts([product(pair).numpy() for pair in pairs], weights)
    gap = float((product(found) - torch.from_numpy(expected)).norm())
    assert gap < 1e-6 * float(np.linalg.norm(expected))
    assert found.rank == 3 * count
    values = torch.linalg.svdvals(product(found))[: 3 * count]
    assert float(values.std()) < 1e-9 * float(values.mean())
    # No LoRA is left out: without its own directions the result is another one.
    assert distance_of(found, iso_c(pairs, weights)) > 0.01


def distance_of(one: Pair, other: Pair) -> float:
    return float((product(one) - product(other)).norm() / product(other).norm())


@pytest.mark.parametrize("density", [0.05, 0.2, 0.6, 1.0])
def test_knots_can_trim_all_modules_together(density: float) -> None:
    """Beside coordinates from a singular value decomposition, sorted as a whole."""
    louder = min(SHAPES)
    loras = [make("a", 3), without(make("b", 2), "unet.down_blocks.0.resnets.0.conv1")]
    loras[0].updates[louder].up.mul_(3)
    found = merge(loras, [0.6, 0.6], "knots_ties", scope="all", density=density).lora
    bases, tasks, sizes = {}, {}, [np.zeros(0), np.zeros(0)]
    for module, shape in SHAPES.items():
        dense = [
            x.updates[module].delta().double().flatten(1).numpy()
            if module in x.updates
            else np.zeros((shape[0], math.prod(shape[1:])))
            for x in loras
        ]
        u, s, vh = np.linalg.svd(np.concatenate(dense, 1), full_matrices=False)
        keep = int((s > 1e-6 * s[0]).sum())
        right = (s[:keep, None] * vh[:keep]).reshape(keep, 2, -1)
        bases[module], tasks[module] = u[:, :keep], [right[:, 0], right[:, 1]]
        sizes = [np.append(sizes[j], np.abs(right[:, j])) for j in range(2)]
    limits = [np.sort(size)[len(size) - int(density * len(size))] for size in sizes]
    for module, both in tasks.items():
        kept = [np.where(np.abs(t) >= x, t, 0) for t, x in zip(both, limits, strict=True)]
        expected = bases[module] @ references.elected(kept, [0.6, 0.6])
        delta = found.updates[module].delta().double().flatten(1).numpy()
        assert np.linalg.norm(delta - expected) <= 2e-5 * np.linalg.norm(expected)
    apart = merge(loras, [0.6, 0.6], "knots_ties", density=density).lora
    assert (distance(found, apart) > 0.05) == (density < 1)


def test_the_limit_is_that_of_sorting_everything() -> None:
    modules = [
        dict(enumerate([a_pair(7 * s, 9, 11, 3), a_pair(7 * s + 1, 9, 11, 2)])) for s in range(4)
    ]
    del modules[2][1]
    for density in (1e-4, 0.01, 0.2, 0.5, 0.9, 1.0):
        found = thresholds(lambda: iter(modules), 2, density)
        entries = [[], []]  # type: list[list[torch.Tensor]]
        for pairs in modules:
            coordinates = aligned(list(pairs.values()))[1]
            for index in range(2):
                there = index in pairs
                task = coordinates[index] if there else torch.zeros_like(coordinates[0])
                entries[index].append(task.abs().float().flatten())
        for limit, rows in zip(found, entries, strict=True):
            everything = torch.cat(rows)
            keep = int(density * len(everything))
            expected = everything.sort(descending=True).values[keep - 1] if keep else torch.nan
            assert limit == pytest.approx(float(expected), rel=0, abs=0, nan_ok=True)


def test_what_a_clamp_may_be() -> None:
    values = torch.randn(1001, generator=torch.Generator().manual_seed(0)).double()
    for share in (0.0, 0.3, 0.77, 1.0):
        assert quantile(values, share) == pytest.approx(float(torch.quantile(values, share)))
    for clamp in (0.5, 1.2, -1.0):
        with pytest.raises(CmloraError, match=r"expected more than 0\.5 to 1"):
            merge([make("a")], [1.0], "svd", clamp=clamp)
