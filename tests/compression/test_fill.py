"""Updates of which only a part is known, and the registries."""

from pathlib import Path

import pytest
import torch

import cmlora.adapters.compression as zoo
from cmlora.adapters.compression import COMPRESSIONS, RULES
from cmlora.adapters.compression.fill import fill
from cmlora.lora import Update
from tests.synthetic import lora


@pytest.mark.parametrize("shape", [(40, 50), (30, 6, 3, 3)])
def test_dropped_entries_are_found_again(shape: tuple[int, ...]) -> None:
    truth = lora("any", 3, ("unet.conv_in",), shape, rank=3).updates["unet.conv_in"].delta()
    known = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5
    masked = torch.where(known, truth, 0.0)
    found = fill(masked, known, 3, sweeps=40)
    assert found.shape == shape
    assert found.rank == 3
    error = float((found.delta() - truth).norm() / truth.norm())
    assert error < 1e-4
    zeros = Update(masked, torch.eye(shape[0]))
    truncated = zeros.truncate(3).delta()
    assert float((truncated - truth).norm() / truth.norm()) > 100 * error


def test_every_row_has_a_file_of_its_name() -> None:
    folder = Path(str(zoo.__file__)).parent
    for name in (*RULES, *COMPRESSIONS):
        assert (folder / f"{name}.py").is_file()
    for registry in (RULES, COMPRESSIONS):
        for name, entry in registry.items():
            assert entry.object.__name__ == name
            assert entry.sentence
