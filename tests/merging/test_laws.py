"""What every merging method promises, over the whole registry."""

import json
import math
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmlora.adapters.merging import MERGES, merge
from cmlora.adapters.merging.method import LAWS
from cmlora.errors import CmloraError
from cmlora.files import read, write
from cmlora.lora import LoRA
from tests.merging import references
from tests.merging.makers import (
    SHAPES,
    distance,
    do,
    make,
    named,
    permuted,
    regauged,
)
from tests.test_lora import shapes, updates

METHODS = list(MERGES)
FOLDER = Path(__file__).parents[2] / "adapters" / "merging"
SHARED = {
    "__init__",
    "account",
    "factors",
    "method",
    "run",
    "result",
    "check",
    "align",
    "agree",
    "kept",
    "sparsify",
    "rmm",
    "atlas",
    "concrete",
    "ziplora_trained",
    "learn",
    "moments",
    "units",
    "widths",
    "rebasin",
    "tally",
    "written",
    "models",
}


def promising(word: str) -> list[str]:
    return [name for name in METHODS if word in MERGES[name].object.promises]


def obeying(law: str) -> list[str]:
    return [name for name in METHODS if law in MERGES[name].object.laws]


def test_every_method_declares_known_laws() -> None:
    for name, entry in MERGES.items():
        assert entry.object.laws <= LAWS.keys(), name
        assert not {"L2a", "L2b"} <= entry.object.laws
        assert entry.object.needs == ("calib" if name in ("pleas", "ziplora") else "none")
    assert set(METHODS) - set(obeying("L1")) == {"iso_c", "iso_cts"}
    neither = {"factor_linear", "iso_c", "iso_cts", "tsv_m"}
    assert set(METHODS) - set(obeying("L2a")) - set(obeying("L2b")) == neither
    assert set(METHODS) - set(obeying("L4")) == {"factor_linear"}
    assert set(METHODS) - set(obeying("L7")) == {"factor_linear"}
    for law in ("L5", "L6", "L8", "L9", "L10", "L11"):
        assert obeying(law) == METHODS


def pair(method: str) -> list[LoRA]:
    """Two LoRAs it can merge, of different ranks if it promises to."""
    return [make("a", 3), make("b", 2 if method in promising("ranks") else 3)]


def test_every_file_is_a_method_or_shared() -> None:
    functions = {entry.object.function.__module__.rpartition(".")[2] for entry in MERGES.values()}
    assert {path.stem for path in FOLDER.glob("*.py")} == functions | SHARED


@pytest.mark.parametrize("method", METHODS)
def test_a_row_is_its_function(method: str) -> None:
    entry = MERGES[method]
    assert entry.object.function.__doc__
    assert not entry.sentence.endswith(".")
    assert set(entry.object.lossless) <= set(entry.object.options())


@pytest.mark.parametrize("method", obeying("L1"))
def test_one_lora_is_itself(method: str) -> None:
    alone = make("a")
    merged = do(method, [alone], **MERGES[method].object.lossless)
    assert distance(merged.lora, alone) < 1e-5
    assert merged.report.error < 1e-5
    assert all(update.scale == 1 for update in merged.lora.updates.values())


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("method", obeying("L2a") + obeying("L2b"))
def test_copies(method: str, count: int) -> None:
    rules = MERGES[method].object
    if count > 2 and "many" not in rules.promises:
        pytest.skip("merges two LoRAs")
    original = make("x")
    copies = [named(original, f"x{i}") for i in range(count)]
    weight = 1 / count if rules.kind == "sum" else 1.0
    merged = do(method, copies, [weight] * count, **rules.lossless)
    assert distance(merged.lora, original) < 1e-5


@pytest.mark.parametrize("method", obeying("L3"))
def test_order_of_rank_units(method: str) -> None:
    loras = pair(method)
    plain = do(method, loras, [0.8, 0.6])
    assert distance(plain.lora, do(method, [permuted(loras[0]), loras[1]], [0.8, 0.6]).lora) < 1e-5


@pytest.mark.parametrize("method", obeying("L4"))
def test_other_factors_of_the_same_delta(method: str) -> None:
    loras = pair(method)
    plain = do(method, loras, [0.8, 0.6])
    changed = do(method, [loras[0], regauged(loras[1])], [0.8, 0.6])
    assert distance(plain.lora, changed.lora) < 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_order_of_loras(method: str) -> None:
    loras = pair(method)
    one = do(method, loras, [0.8, 0.6])
    again = do(method, loras[::-1], [0.6, 0.8])
    assert one.lora.updates.keys() == again.lora.updates.keys()
    for module, update in one.lora.updates.items():
        assert torch.equal(update.up, again.lora.updates[module].up)
        assert torch.equal(update.down, again.lora.updates[module].down)


@pytest.mark.parametrize("method", METHODS)
def test_weight_zero_is_absence(method: str) -> None:
    loras = pair(method)
    assert distance(do(method, loras, [0.7, 0.0]).lora, do(method, loras[:1], [0.7]).lora) == 0


@pytest.mark.parametrize("method", METHODS)
def test_mixed_ranks(method: str) -> None:
    loras = [make("a", 4), make("b", 2)]
    if method in promising("ranks"):
        assert set(do(method, loras).lora.updates) == set(SHAPES)
    else:
        with pytest.raises(CmloraError, match="rank"):
            do(method, loras)


@pytest.mark.parametrize("method", METHODS)
def test_shapes_rank_and_inputs_left_alone(method: str) -> None:
    loras = pair(method)
    before = [lora.deltas() for lora in loras]
    merged = do(method, loras, [0.8, 0.6], rank=2)
    assert {m: u.shape for m, u in merged.lora.updates.items()} == dict(SHAPES)
    assert max(update.rank for update in merged.lora.updates.values()) <= 2
    assert merged.report.rank <= 2
    size = sum(u.up.nbytes + u.down.nbytes for u in merged.lora.updates.values())
    assert merged.report.bytes == size
    for lora, deltas in zip(loras, before, strict=True):
        assert all(torch.equal(delta, lora.deltas()[m]) for m, delta in deltas.items())


@pytest.mark.parametrize("method", METHODS)
def test_scales_are_baked_in(method: str) -> None:
    loras = pair(method)
    halves = [
        replace(
            lora,
            updates={
                m: replace(u, up=u.up / 4, scale=u.scale * 4) for m, u in lora.updates.items()
            },
        )
        for lora in loras
    ]
    assert distance(do(method, loras).lora, do(method, halves).lora) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision(method: str, dtype: torch.dtype) -> None:
    loras = [make("a", 3, dtype=dtype), make("b", 3, dtype=dtype)]
    merged = do(method, loras, [0.8, 0.6])
    for update in merged.lora.updates.values():
        assert update.up.dtype == update.down.dtype == dtype
        assert update.up.isfinite().all()
        assert update.down.isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_files(method: str, tmp_path: Path) -> None:
    merged = do(method, pair(method), [0.8, 0.6])
    path = tmp_path / "merged.safetensors"
    write(merged.lora, path)
    again = read(path)
    assert distance(again, merged.lora) == 0
    assert again.metadata["modelspec.merged_from"] == "a,b"
    recipe = json.loads(again.metadata["cmlora.merge"])
    assert (recipe["method"], recipe["weights"]) == (method, [0.8, 0.6])
    assert again.triggers == ("a", "b")


@pytest.mark.parametrize("method", METHODS)
def test_same_input_same_output(method: str) -> None:
    first, again = (do(method, pair(method), seed=3).lora for _ in range(2))
    assert all(torch.equal(u.up, again.updates[m].up) for m, u in first.updates.items())


@pytest.mark.parametrize("method", METHODS)
def test_the_reported_error_is_the_distance_from_the_sum(method: str) -> None:
    loras = pair(method)
    merged = do(method, loras, [0.8, 0.6])
    deltas = [lora.deltas() for lora in loras]
    lost = total = 0.0
    for module in SHAPES:
        exact = 0.8 * deltas[0][module].double() + 0.6 * deltas[1][module].double()
        lost += float((merged.lora.updates[module].delta().double() - exact).square().sum())
        total += float(exact.square().sum())
    assert merged.report.error == pytest.approx((lost / total) ** 0.5, abs=1e-6)
    assert set(merged.report.errors) == {
        "text_encoder.text_model.encoder.layers.0",
        "unet.down_blocks.0",
        "unet.mid_block.attentions.0",
        "transformer.transformer_blocks.0",
    }


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("method", list(references.EXACT))
def test_references(method: str, rank: int | None) -> None:
    if rank and method.startswith("iso"):
        pytest.skip("all singular values are equal: what to cut is decided before")
    loras = pair(method)
    merged = do(method, loras, [0.8, 0.6], rank=rank)
    for module in SHAPES:
        dense = [lora.updates[module].delta().double().flatten(1).numpy() for lora in loras]
        expected = references.EXACT[method](dense, [0.8, 0.6])
        expected = references.cut(expected, rank or 5)
        found = merged.lora.updates[module].delta().double().flatten(1)
        gap = float((found - torch.from_numpy(expected)).norm())
        assert gap < 2e-5 * float(found.norm()), module


@pytest.mark.parametrize("method", list(references.RANDOM))
def test_random_references(method: str) -> None:
    """The same draws, and the formula in loops."""
    loras = pair(method)
    merged = do(method, loras, [0.8, 0.6], seed=5)
    for module in SHAPES:
        generator = torch.Generator().manual_seed(zlib.crc32(f"5/{module}".encode()))
        dense = [lora.updates[module].delta().flatten(1).numpy() for lora in loras]
        expected = references.RANDOM[method](dense, [0.8, 0.6], generator)
        expected = references.cut(expected.astype(np.float64), 5)
        found = merged.lora.updates[module].delta().double().flatten(1)
        gap = float((found - torch.from_numpy(expected)).norm())
        assert gap < 2e-5 * float(found.norm()), module


@pytest.mark.parametrize("method", METHODS)
@settings(deadline=None, max_examples=15)
@given(st.data(), shapes())
def test_any_shapes_and_ranks(method: str, data: st.DataObject, shape: tuple[int, ...]) -> None:
    module = "unet.mid_block.resnets.0.conv1"
    one, other = data.draw(updates(shape)), data.draw(updates(shape))
    if "ranks" not in MERGES[method].object.promises:
        other = one
    width = math.prod(shape[1:])
    given_grams = {name: {module: torch.eye(width) * 2} for name in "ab"}
    loras = [LoRA("a", {module: one}), LoRA("b", {module: other})]
    try:
        merged = merge(loras, [0.5, 0.7], method, grams=given_grams)
    except CmloraError:
        assert method in ("slerp", "karcher")  # two numbers may well be opposite
        return
    for update in merged.lora.updates.values():
        assert update.scale == 1
        assert update.rank >= 1
        assert update.delta().isfinite().all()
        assert update.delta().flatten(1).shape == (shape[0], width)
    assert math.isfinite(merged.report.error)
    json.dumps(dict(merged.report.errors), allow_nan=False)
