"""Libraries whose structure is known, and tables whose missing scores are."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cmlora.adapters.analysis.coding_rate import gain, rate, sinkhorn, spectral, split_rate
from cmlora.adapters.analysis.library import survey
from cmlora.adapters.analysis.pairs import predict
from cmlora.adapters.compression.completion import complete
from cmlora.errors import CmloraError
from cmlora.lora import LoRA, stack
from tests.synthetic import lora, scaled


def planes(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Forty unit vectors in two planes of R^8, and which plane each is in."""
    g = torch.Generator().manual_seed(seed)
    bases = torch.linalg.qr(torch.randn((8, 4), generator=g).double())[0].split(2, 1)
    points = [basis @ torch.randn((2, 20), generator=g).double() for basis in bases]
    z = torch.cat(points, 1)
    return z / z.norm(dim=0), torch.arange(40) // 20


def library() -> list[LoRA]:
    """Variations of three unrelated LoRAs, and a louder copy of one of them."""
    loras = []
    for kind in range(3):
        for i in range(3):
            own = lora("own", 100 + 10 * kind + i)
            near = stack([(lora("kind", kind), 1.0), (own, 0.3)], f"kind{kind}_{i}")
            loras.append(near)
    return [*loras, scaled(loras[0], "louder", 2)]


def test_coding_rates_are_the_formulas() -> None:
    z, labels = planes()
    eye, n, d, eps = torch.eye(8).double(), 40, 8, 0.5
    expected = float(torch.logdet(eye + d / (n * eps**2) * z @ z.T))
    assert rate(z) == pytest.approx(expected)
    assert rate(z[:, :3]) == pytest.approx(
        float(torch.logdet(eye + d / (3 * eps**2) * z[:, :3] @ z[:, :3].T))
    )
    uniform = torch.full((2, n), 0.5).double()
    assert split_rate(z, uniform) == pytest.approx(expected)
    shuffled = labels[torch.randperm(n, generator=torch.Generator().manual_seed(1))]
    assert gain(z, labels) > gain(z, shuffled) + 2
    assert gain(z, torch.zeros(n, dtype=torch.long)) == pytest.approx(0)


def test_two_planes_are_told_apart() -> None:
    z, labels = planes()
    affinity = sinkhorn((z.T @ z).abs())
    assert torch.allclose(affinity.sum(0), torch.ones(40).double(), atol=1e-5)
    assert torch.allclose(affinity.sum(1), torch.ones(40).double(), atol=1e-5)
    found = spectral(affinity, 2)
    assert bool((found == labels).all()) or bool((found == 1 - labels).all())


@settings(max_examples=25)
@given(st.integers(1, 12), st.integers(0, 2**31), st.floats(0.1, 1))
def test_sinkhorn_is_doubly_stochastic(n: int, seed: int, eta: float) -> None:
    square = torch.rand((n, n), generator=torch.Generator().manual_seed(seed)).double()
    found = sinkhorn((square + square.T) / 2, eta)
    assert torch.allclose(found.sum(0), torch.ones(n).double(), atol=1e-5)
    assert torch.equal(found > 0, found.T > 0)


def test_a_library_of_three_kinds() -> None:
    found = survey(library())
    assert found.duplicates == (("kind0_0", "louder"),)
    assert {
        frozenset(name[:5] for name in group if name != "louder") for group in found.clusters
    } == {frozenset({f"kind{kind}"}) for kind in range(3)}
    assert found.neighbours(1)["louder"][0][0] == "kind0_0"
    assert found.gain > 0
    assert found.json()["clusters"][0] == ["kind0_0", "kind0_1", "kind0_2", "louder"]


def test_unrelated_loras_form_no_clusters() -> None:
    found = survey([lora(str(i), 50 + i) for i in range(5)])
    assert found.duplicates == ()
    assert found.clusters == tuple((str(i),) for i in range(5))
    with pytest.raises(CmloraError, match="two LoRAs"):
        survey(library()[:1])


@pytest.mark.parametrize("seen", [0.3, 0.4])
def test_completion_recovers_a_low_rank_matrix(seen: float) -> None:
    g = torch.Generator().manual_seed(3)
    truth = torch.randn((60, 3), generator=g).double() @ torch.randn((3, 50), generator=g).double()
    known = torch.rand((60, 50), generator=g) < seen
    u, v = complete(truth, known, 3, sweeps=20 if seen == 0.4 else 60)
    error = float((u @ v.T - truth).norm() / truth.norm())
    assert error < 1e-5
    filled = torch.linalg.svd(torch.where(known, truth, 0.0), full_matrices=False)
    zeros = (filled[0][:, :3] * filled[1][:3]) @ filled[2][:3]
    assert float((zeros - truth).norm() / truth.norm()) > 0.5


def test_what_cannot_be_completed() -> None:
    with pytest.raises(CmloraError, match="no entry"):
        complete(torch.zeros(3, 3), torch.zeros(3, 3, dtype=torch.bool), 1)
    with pytest.raises(CmloraError, match="between 1 and 3"):
        complete(torch.zeros(3, 3), torch.ones(3, 3, dtype=torch.bool), 4)


def test_pairs_are_guessed_better_than_by_the_mean() -> None:
    g = torch.Generator().manual_seed(5)
    taste = torch.randn((16, 1), generator=g).double()
    truth = taste @ taste.T
    names = [f"l{i}" for i in range(16)]
    scores: dict[tuple[str, str], float] = {}
    hidden: dict[tuple[str, str], float] = {}
    for i in range(16):
        for j in range(i + 1, 16):
            where = scores if float(torch.rand((), generator=g)) < 0.5 else hidden
            where[names[i], names[j]] = float(truth[i, j])
    found = predict(names, scores)
    assert {(p.one, p.other) for p in found.pairs} == set(hidden)
    assert found.error is not None
    assert found.plain is not None
    assert found.error < found.plain
    missed = math.fsum((p.score - hidden[p.one, p.other]) ** 2 for p in found.pairs)
    mean = sum(scores.values()) / len(scores)
    assert missed < 0.3 * math.fsum((mean - value) ** 2 for value in hidden.values())
    assert [p.score for p in found.pairs] == sorted((p.score for p in found.pairs), reverse=True)


def test_too_few_scores_give_the_mean_and_wrong_ones_are_refused() -> None:
    found = predict(["a", "b", "c"], {("a", "b"): 2.0})
    assert found.rank == 0
    assert found.error is None
    assert {guess.score for guess in found.pairs} == {2.0}
    for scores, message in (
        ({}, "no pair"),
        ({("a", "x"): 1.0}, "not in the library"),
        ({("a", "a"): 1.0}, "itself"),
        ({("a", "b"): 1.0, ("b", "a"): 2.0}, "two scores"),
    ):
        with pytest.raises(CmloraError, match=message):
            predict(["a", "b", "c"], scores)
