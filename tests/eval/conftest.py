"""A tiny testbed and a finished study of it, made once."""

from pathlib import Path

import pytest

from tests.eval import beds


@pytest.fixture(scope="session")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny testbed; read only."""
    return beds.save_bed(tmp_path_factory.mktemp("beds") / "tiny")


@pytest.fixture(scope="session")
def whole(bed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that nothing interrupted; read only."""
    out = tmp_path_factory.mktemp("studies") / "whole"
    outcome = beds.work(bed, out)
    assert (outcome.made, outcome.kept, outcome.failed) == (16, 0, {})
    return out
