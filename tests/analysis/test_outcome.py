"""Pictures of what merges and compressions did, against dense matrices."""

import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from cmlora.adapters.analysis.outcome import of_compression, of_merge
from cmlora.adapters.merging import merge
from cmlora.lora import LoRA, Update


def lora(name: str, seed: int, modules: tuple[str, ...]) -> LoRA:
    g = torch.Generator().manual_seed(seed)
    updates = {
        m: Update(torch.randn((2, 6), generator=g), torch.randn((5, 2), generator=g))
        for m in modules
    }
    return LoRA(name, updates)


def test_a_merge_by_block(tmp_path: Path) -> None:
    first = ("unet.down_blocks.0.a", "unet.down_blocks.0.b", "unet.up_blocks.1.a")
    own = [lora("one", 1, first), lora("two", 2, first[:2])]
    done = merge(own, [1.0, 0.5], "svd", rank=2)
    found = of_merge("t", done.lora, own, done.report.errors)
    assert found.rows == ("unet.down_blocks.0", "unet.up_blocks.1")
    assert found.columns == ("distance", "one", "two")
    flat = [
        torch.cat([x.updates[m].delta().flatten() for m in first[:2]]) for x in (done.lora, *own)
    ]
    expected = [float(torch.cosine_similarity(flat[0], other, 0)) for other in flat[1:]]
    distance, *cosines = found.values[0]
    assert cosines == pytest.approx(expected, abs=1e-6)
    exact = flat[1] + 0.5 * flat[2]
    assert distance == pytest.approx(float((flat[0] - exact).norm() / exact.norm()), abs=1e-6)
    # The second LoRA has nothing in the last block, where the merge is the first alone.
    assert found.values[1] == pytest.approx((0, 1, 0), abs=1e-6)
    found.save(tmp_path / "merge.png")
    assert Image.open(tmp_path / "merge.png").size[0] > 200


def test_a_compression_by_block(tmp_path: Path) -> None:
    rows = {"a.0.x": (8, 2, 0.3), "a.0.y": (8, 6, 0.4), "a.1.x": (4, 4, 0.0)}
    found = of_compression("t", rows, "rank")
    assert found.columns == ("rank kept", "error")
    assert found.values[0] == pytest.approx((0.5, math.sqrt((0.09 + 0.16) / 2)))
    assert found.values[1] == (1.0, 0.0)
    found.save(tmp_path / "compress.svg")
    assert "+0.50" in (tmp_path / "compress.svg").read_text()
