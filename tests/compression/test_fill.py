"""Updates of which only a part is known, and the registries."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import cmlora.adapters.compression as zoo
from cmlora.adapters.compression import COMPRESSIONS, RULES
from cmlora.adapters.compression.completion import complete
from cmlora.adapters.compression.fill import fill, fill_all
from cmlora.errors import CmloraError
from cmlora.lora import LoRA, Update, dense
from tests.synthetic import MODULES, lora


@pytest.mark.parametrize("seed", range(6))
def test_forty_percent_of_the_entries_are_enough(seed: int) -> None:
    """Rank 3 of 60 x 50 in 20 sweeps, where truncating the zero-filled matrix is useless."""
    g = torch.Generator().manual_seed(seed)
    truth = torch.randn(60, 3, generator=g).double() @ torch.randn(3, 50, generator=g).double()
    known = torch.rand(60, 50, generator=g) < 0.4
    u, v = complete(truth, known, 3, sweeps=20)
    assert float((u @ v.T - truth).norm() / truth.norm()) <= 1e-6
    left, values, right = torch.linalg.svd(torch.where(known, truth, 0.0))
    zero_filled = (left[:, :3] * values[:3]) @ right[:3]
    assert float((zero_filled - truth).norm() / truth.norm()) > 0.5


def test_a_matrix_of_more_rank_is_met_as_well_as_can_be() -> None:
    """With noise on top the known entries are met no worse than by many plain sweeps."""
    g = torch.Generator().manual_seed(0)
    truth = torch.randn(60, 3, generator=g).double() @ torch.randn(3, 50, generator=g).double()
    noisy = truth + 0.1 * torch.randn(60, 50, generator=g)
    known = torch.rand(60, 50, generator=g) < 0.4
    lost = []
    for sweeps in (20, 200):
        u, v = complete(noisy, known, 3, sweeps)
        lost.append(float(((u @ v.T - noisy) * known).norm()))
    assert lost[0] == pytest.approx(lost[1], rel=1e-6)
    u = torch.linalg.svd(torch.where(known, noisy, 0.0))[0][:, :3]
    for _ in range(200):
        v = torch.stack(
            [
                torch.linalg.lstsq(u[k], y[k][:, None]).solution[:, 0]
                for k, y in zip(known.T, noisy.T, strict=True)
            ]
        )
        u = torch.stack(
            [
                torch.linalg.lstsq(v[k], y[k][:, None]).solution[:, 0]
                for k, y in zip(known, noisy, strict=True)
            ]
        )
    assert lost[0] <= float(((u @ v.T - noisy) * known).norm()) * (1 + 1e-6)


@pytest.mark.parametrize("shape", [(40, 50), (30, 6, 3, 3)])
def test_dropped_entries_are_found_again(shape: tuple[int, ...]) -> None:
    truth = lora("any", 3, ("unet.conv_in",), shape, rank=3).updates["unet.conv_in"].delta()
    known = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.4
    masked = torch.where(known, truth, 0.0)
    found = fill(masked, known, 3)
    assert found.shape == shape
    assert found.rank == 3
    error = float((found.delta() - truth).norm() / truth.norm())
    assert error < 1e-6
    zeros = Update(masked, torch.eye(shape[0]))
    truncated = zeros.truncate(3).delta()
    assert float((truncated - truth).norm() / truth.norm()) > 0.5


def masked(rank: int, share: float, noise: float = 0.0) -> tuple[LoRA, dict[str, Tensor]]:
    """Whole updates with zeros, and what they were; one has none, one has nothing else."""
    truth = {
        m: u.delta() for m, u in lora("any", 3, MODULES[:4], (40, 50), rank=rank).updates.items()
    }
    g = torch.Generator().manual_seed(5)
    whole, empty, *holed = truth
    truth = {m: d + noise * d.std() * torch.randn(d.shape, generator=g) for m, d in truth.items()}
    given = {
        m: torch.where(torch.rand(d.shape, generator=g) < share, d, 0.0) for m, d in truth.items()
    }
    given |= {whole: truth[whole], empty: torch.zeros_like(truth[empty])}
    return LoRA("masked", {m: dense(d) for m, d in given.items()}), {m: truth[m] for m in holed}


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_the_rank_is_found_by_what_is_hidden(noise: float) -> None:
    source, truth = masked(4, 0.6, noise)
    found = fill_all(source)
    assert found.changes.keys() == truth.keys()
    for module, change in found.changes.items():
        assert change.after == 4
        update = found.lora.updates[module]
        assert float((update.delta() - truth[module]).norm()) < 3 * (noise + 1e-6) * float(
            truth[module].norm()
        )
    assert found.error <= noise + 1e-6
    assert found.after < found.before
    untouched = source.updates.keys() - truth.keys()
    assert all(found.lora.updates[m] is source.updates[m] for m in untouched)


def test_what_cannot_be_filled() -> None:
    source, _ = masked(4, 0.6)
    with pytest.raises(CmloraError, match="rank 60 is not possible; the known entries allow 1 to"):
        fill_all(source, 60)
    with pytest.raises(CmloraError, match="no updates with entries of zero"):
        fill_all(lora("any", 3))
    assert {c.after for c in fill_all(source, 3).changes.values()} == {3}


def test_every_row_has_a_file_of_its_name() -> None:
    folder = Path(str(zoo.__file__)).parent
    for name in (*RULES, *COMPRESSIONS):
        assert (folder / f"{name}.py").is_file()
    for registry in (RULES, COMPRESSIONS):
        for name, entry in registry.items():
            assert entry.object.__name__ == name
            assert entry.sentence
