"""Files of eight-bit floating point numbers, for which PyTorch has no arithmetic."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cmlora import files
from cmlora.adapters.merging import merge
from cmlora.adapters.merging.learn import signed
from cmlora.adapters.tuners.tensors import full
from cmlora.lora import LoRA, Update, at_least_single
from tests import families, trainers
from tests.calling import run, run_json
from tests.formats.cases import CASES

EIGHT = (torch.float8_e4m3fn, torch.float8_e5m2)
PROJ = "mid_block.attentions.0.proj_in"
FORMS = sorted(name for name, case in CASES.items() if not case.base and case.bias is None)


def eight(form: str, dtype: torch.dtype, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """The tensors of a form, as a file of eight bits has them."""
    torch.manual_seed(1)
    return {end: tensor.to(dtype) for end, tensor in CASES[form].make(shape).items()}


def save(folder: Path, name: str, dtype: torch.dtype, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for place, core in ((PROJ, False), ("mid_block.resnets.0.conv1", True)):
        stem = f"lora_unet_{place.replace('.', '_')}"
        ones = (1, 1) if core else ()
        tensors[f"{stem}.lora_down.weight"] = torch.randn(2, 8, *ones)
        tensors[f"{stem}.lora_up.weight"] = torch.randn(8, 2, *ones)
        if core:
            tensors[f"{stem}.lora_mid.weight"] = torch.randn(2, 2, 3, 3)
        tensors[f"{stem}.alpha"] = torch.tensor(2.0)
    stored = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    return trainers.save(stored, folder / f"{name}.safetensors")


def wide(lora: LoRA) -> LoRA:
    """The same numbers in single precision."""

    def of(update: Update) -> Update:
        mid = None if update.mid is None else update.mid.float()
        return replace(update, down=update.down.float(), up=update.up.float(), mid=mid)

    return replace(lora, updates={module: of(each) for module, each in lora.updates.items()})


@pytest.mark.parametrize("dtype", EIGHT)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_what_its_numbers_say(form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    shape = (8, 8, 3, 3) if form == "tucker" or "core" in form else (8, 8)
    place = "mid_block.resnets.0.conv1" if len(shape) > 2 else PROJ
    tensors = eight(form, dtype, shape)
    stem = f"lora_unet_{place.replace('.', '_')}"
    path = tmp_path / "x.safetensors"
    trainers.save({f"{stem}.{end}": tensor for end, tensor in tensors.items()}, path)
    found = files.read(path).updates[f"unet.{place}"].delta()
    same = {end: tensor.float() for end, tensor in tensors.items()}
    expected = CASES[form].delta(same, torch.zeros(shape))
    torch.testing.assert_close(found, expected.reshape(found.shape), rtol=1e-4, atol=1e-5)
    cut, error = files.convert(path, rank=1)
    assert cut.updates[f"unet.{place}"].rank == 1
    assert 0 < error < 1


@pytest.mark.parametrize("dtype", EIGHT)
def test_they_are_loaded_and_converted_as_in_single_precision(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    lora = files.read(save(tmp_path, "a", dtype))
    for update, other in zip(lora.updates.values(), wide(lora).updates.values(), strict=True):
        assert torch.equal(update.delta(), other.delta())
        assert torch.equal(update.folded().delta(), other.delta())
        assert torch.equal(update.truncate(1).delta(), other.truncate(1).delta())
        assert update.truncate(1).up.dtype == torch.float32
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    stored = {f"{stem}.{end}": t for end, t in eight("lokr_whole", dtype, (48, 16)).items()}
    pipe = families.flux().pipe
    files.load(pipe, trainers.save(stored, tmp_path / "x.safetensors"), "x")


@pytest.mark.parametrize("dtype", EIGHT)
def test_the_commands_take_them(dtype: torch.dtype, tmp_path: Path) -> None:
    one, other = save(tmp_path, "a", dtype), save(tmp_path, "b", dtype, seed=1)
    out = tmp_path / "out.safetensors"
    assert 0 < run_json("convert", one, "--rank", "1", "-o", out)["relative_error"] < 1
    assert {update.rank for update in files.read(out).updates.values()} == {1}
    run("merge", one, other, "-o", out, "--force")
    run("merge", one, other, "-o", out, "--force", "--method", "cat")
    merged = files.read(out)
    exact = {m: u.delta() + files.read(other).updates[m].delta() for m, u in read(one).items()}
    for module, expected in exact.items():
        # Written in half precision: what is computed does not fit into eight bits.
        found = merged.updates[module].delta()
        assert float((found - expected).norm()) < 2e-3 * float(expected.norm())


def read(path: Path) -> dict[str, Update]:
    return dict(files.read(path).updates)


@pytest.mark.parametrize("method", ["linear", "cat", "ties", "knots_ties", "karcher", "iso_c"])
def test_merges_are_those_of_the_same_numbers(method: str, tmp_path: Path) -> None:
    paths = [save(tmp_path, name, EIGHT[0], seed) for seed, name in enumerate("ab")]
    loras = [files.read(path) for path in paths]
    found = merge(loras, [1.0, 0.5], method).lora
    expected = merge([wide(lora) for lora in loras], [1.0, 0.5], method).lora
    for module, update in expected.updates.items():
        delta = found.updates[module].delta()
        assert float((delta - update.delta()).norm()) < 5e-3 * update.norm()
    learnt = signed(loras[0], "lorahub", loras)
    assert {u.up.dtype for u in learnt.updates.values()} == {torch.float32}


def test_precisions() -> None:
    for dtype in (*EIGHT, torch.float16, torch.bfloat16, torch.float32, torch.int8):
        assert at_least_single(dtype) == torch.float32
    assert at_least_single(torch.float64) == torch.float64
    assert full(torch.ones(2).to(EIGHT[0])).dtype == torch.float32
