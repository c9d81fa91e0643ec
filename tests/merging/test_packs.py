"""Libraries as a mean, a basis and coefficients: what is lost, and what is stored."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cmlora.adapters.merging.rmm import components, load, pack, rebuild, save
from cmlora.errors import CmloraError
from cmlora.lora import LoRA, Update
from tests.merging.makers import SHAPES, distance, generator, make, regauged, without


def library(count: int = 6, rank: int = 4) -> list[LoRA]:
    """LoRAs that are all near one, so that few basis vectors describe them well."""
    base = make("base", rank)
    return [
        LoRA(
            f"l{index}",
            {m: Update(u.down, u.up * (1 + 0.1 * index), u.scale) for m, u in base.updates.items()},
            triggers=(f"word {index}",),
        )
        for index in range(count)
    ]


def test_components_lose_the_tail() -> None:
    vectors = torch.randn((5, 4, 6), generator=generator(), dtype=torch.double)
    mean, basis, coefficients = components(vectors, 2)
    lost = float((mean[..., None] + basis @ coefficients - vectors).square().sum())
    tail = 0.0
    for place in vectors.numpy():
        values = np.linalg.svd(place - place.mean(1, keepdims=True))[1]
        tail += float((values[2:] ** 2).sum())
    assert lost == pytest.approx(tail, rel=1e-9)


@pytest.mark.parametrize(("granularity", "size"), [("position", 1), ("module", 1)])
def test_a_pack_gives_every_lora_back(tmp_path: Path, granularity: str, size: int) -> None:
    loras = library(rank=8)
    packed = pack(loras, size, granularity=granularity)  # type: ignore[arg-type]
    path = str(tmp_path / "pack.safetensors")
    save(packed, path)
    again = load(path)
    assert again.errors == packed.errors
    original = sum(u.up.numel() + u.down.numel() for x in loras for u in x.updates.values())
    assert packed.numbers < original
    for lora in loras:
        found = rebuild(again, lora.name)
        assert found.triggers == lora.triggers
        assert distance(found, lora) < 1e-5
        assert packed.errors[lora.name] < 1e-5


def of_dtype(lora: LoRA, dtype: torch.dtype) -> LoRA:
    updates = {
        m: replace(u, down=u.down.to(dtype), up=u.up.to(dtype)) for m, u in lora.updates.items()
    }
    return replace(lora, updates=updates)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_file_has_the_bytes_of_the_formula(tmp_path: Path, dtype: torch.dtype) -> None:
    """Numbers of the mean, the basis and the coefficients, summed over the modules."""
    size, count, rank = 2, 6, 8
    loras = [of_dtype(lora, dtype) for lora in library(count, rank)]
    path = tmp_path / "pack.safetensors"
    positions = {m: shape[0] + int(np.prod(shape[1:])) for m, shape in SHAPES.items()}
    by_position = sum(p * (size * (rank + count) + rank) for p in positions.values())
    by_module = sum(p * rank * (size + 1) + size * count for p in positions.values())
    for granularity, numbers in (("position", by_position), ("module", by_module)):
        packed = pack(loras, size, granularity=granularity, force=True)  # type: ignore[arg-type]
        save(packed, path)
        stored = load_file(path)
        assert sum(t.nbytes for t in stored.values()) == packed.bytes == numbers * dtype.itemsize
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        assert path.stat().st_size == 8 + header + packed.bytes


def test_the_widest_precision_is_kept() -> None:
    exact = library(4, 8)
    mixed = [of_dtype(exact[0], torch.float16), *exact[1:]]
    for loras in (mixed, mixed[::-1]):
        packed = pack(loras, 1)
        assert {tensor.dtype for tensor in packed.tensors.values()} == {torch.float32}
        assert distance(rebuild(packed, "l3"), exact[3]) < 1e-3
    halves = [of_dtype(lora, torch.float16) for lora in exact]
    assert {tensor.dtype for tensor in pack(halves, 1).tensors.values()} == {torch.float16}
    brain = [of_dtype(exact[0], torch.bfloat16), *halves[1:]]
    assert {tensor.dtype for tensor in pack(brain, 1, force=True).tensors.values()} == {
        torch.float32
    }


def test_bytes_decide_whether_anything_is_saved() -> None:
    """Fewer numbers may be more bytes: one file in single precision makes all of them so."""
    loras = [of_dtype(lora, torch.float16) for lora in library(4, 8)]
    loras[0] = of_dtype(loras[0], torch.float32)
    original = sum(u.up.nbytes + u.down.nbytes for x in loras for u in x.updates.values())
    numbers = sum(u.up.numel() + u.down.numel() for x in loras for u in x.updates.values())
    packed = pack(loras, 2, force=True)
    assert packed.numbers < numbers
    assert packed.bytes >= original
    with pytest.raises(CmloraError, match=f"{packed.bytes} bytes instead of {original}"):
        pack(loras, 2)


def test_a_full_basis_is_exact_for_different_loras() -> None:
    loras = [make("a", 4), make("b", 2), without(make("c", 3), min(SHAPES))]
    packed = pack(loras, 2, force=True)
    for lora in loras:
        assert distance(rebuild(packed, lora.name), lora) < 1e-5
    assert max(pack(loras, 1, force=True).errors.values()) > 0.1
    gauge = pack([loras[0], regauged(loras[1]), loras[2]], 1, force=True)
    assert gauge.errors == pytest.approx(pack(loras, 1, force=True).errors, abs=1e-4)


@pytest.mark.parametrize(
    ("count", "size", "message"),
    [(1, 0, "two or more"), (3, 3, "0 to 2"), (3, 2, "saves nothing")],
)
def test_packs_that_make_no_sense(count: int, size: int, message: str) -> None:
    with pytest.raises(CmloraError, match=message):
        pack(library(count), size)


def test_what_is_no_pack(tmp_path: Path, lora_folder: Path) -> None:
    with pytest.raises(CmloraError, match="is no pack"):
        load(str(lora_folder / "cat.safetensors"))
    with pytest.raises(CmloraError, match="it holds l0, l1"):
        rebuild(pack(library(2), 0), "l7")
