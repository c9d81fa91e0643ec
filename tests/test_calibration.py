"""Calibration data: measured with and without LoRAs, kept in a file, read by everybody."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cmlora import container
from cmlora.adapters import calibration
from cmlora.adapters.applied import applied
from cmlora.adapters.calibration import BASE, Calibration, Seen, base_layers, grams, load, watching
from cmlora.adapters.merging import merge
from cmlora.adapters.merging.moments import diagonal, seen, unseen
from cmlora.errors import CmloraError
from cmlora.files import read
from cmlora.lora import LoRA, Update
from cmlora.pipelines.calibrate import calibrate
from cmlora.pipelines.render import assemble
from tests import tiny


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_moments_are_those_of_the_inputs() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 4))
    x = random(3, 7, 5)
    with watching(model, sampled=["2"], at=2) as watch:
        model(x[:1])
        model(x[1:])
    found = watch.seen()
    rows = x.reshape(-1, 5).double()
    assert torch.allclose(found["0"].gram, rows.T @ rows / 21)
    assert torch.allclose(found["0"].mean, rows.mean(0))
    assert found["0"].inputs is None
    assert found["2"].inputs is not None
    assert torch.allclose(found["2"].inputs, model[:2](x[2:])[0])
    assert found["2"].outputs is not None
    assert torch.allclose(found["2"].outputs, model(x[2:])[0])
    assert not any(layer._forward_hooks for layer in model)


def test_convolutions_count_every_place_and_wide_ones_every_channel() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Conv2d(4, 300, 1))
    model.append(nn.Conv2d(300, 2, 3))
    x = random(2, 3, 8, 8)
    found = grams(model, lambda: model(x))
    patches = nn.functional.unfold(x, 3, stride=2, padding=1).transpose(1, 2).flatten(0, 1).double()
    assert torch.allclose(found["0"], patches.T @ patches / len(patches), atol=1e-6)
    assert found["1"].shape == (4, 4)
    assert found["2"].shape == (300, 9, 9)


def diagonal_of(blocks: Tensor) -> Tensor:
    whole: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return whole


def test_block_moments_are_block_diagonal_matrices() -> None:
    parts = random(5, 20, 3).double()
    blocks = parts.transpose(1, 2) @ parts
    whole = diagonal_of(blocks)
    rows = random(4, 15, seed=1).double()
    assert torch.allclose(seen(rows, blocks), seen(rows, whole))
    assert torch.allclose(unseen(rows, blocks, 1e-3), unseen(rows, whole, 1e-3))
    assert torch.equal(diagonal(blocks), diagonal(whole))


def test_wide_convolutions_are_merged_by_blocks() -> None:
    update = Update(random(2, 5, 3, 3), random(6, 2, seed=1))
    other = Update(random(2, 5, 3, 3, seed=2), random(6, 2, seed=3))
    module = "unet.down_blocks.0.resnets.0.conv1"
    loras = [LoRA("a", {module: update}), LoRA("b", {module: other})]
    tables = {}
    for index, lora in enumerate(loras):
        parts = random(5, 20, 9, seed=7 + index).double()
        tables[lora.name] = parts.transpose(1, 2) @ parts
    for method in ("pleas", "ziplora"):
        blocks = {name: {module: table} for name, table in tables.items()}
        whole = {name: {module: diagonal_of(table)} for name, table in tables.items()}
        one, same = (merge(loras, [1.0, 0.7], method, grams=g).lora for g in (blocks, whole))
        gap = one.updates[module].delta() - same.updates[module].delta()
        assert float(gap.norm()) < 1e-4 * float(one.updates[module].delta().norm())


def test_updates_are_applied_as_peft_applies_them(lora_folder: Path) -> None:
    path = lora_folder / "cat.safetensors"
    pipe, plain = tiny.sd15(), tiny.sd15()
    pipe.load_lora_weights(str(path))
    updates = {
        module.removeprefix("unet."): replace(update, scale=update.scale)
        for module, update in read(path).updates.items()
    }
    x, text = tiny.latents(), random(1, 16, 16)
    with torch.no_grad():
        wanted = pipe.unet(x, 10, text).sample
        before = plain.unet(x, 10, text).sample
        with applied(plain.unet, updates):
            found = plain.unet(x, 10, text).sample
        assert torch.equal(plain.unet(x, 10, text).sample, before)
    assert torch.allclose(found, wanted, atol=1e-5)
    assert not torch.allclose(found, before, atol=1e-2)
    with (
        pytest.raises(CmloraError, match="no linear layer"),
        applied(plain.unet, {"x": update_of()}),
    ):
        pass
    name = next(iter(updates))
    with pytest.raises(CmloraError, match="in the model"), applied(plain.unet, {name: update_of()}):
        pass


def update_of() -> Update:
    return Update(random(2, 3), random(4, 2))


def test_loras_are_looked_through() -> None:
    pipe = tiny.sd15()
    before = [name for name, _ in base_layers(pipe.unet)]
    tiny.add_loras(pipe, ["a"])
    assert [name for name, _ in base_layers(pipe.unet)] == before


@pytest.fixture(scope="module")
def measured(model_folder: Path, lora_folder: Path) -> Calibration:
    files = [(lora_folder / f"{name}.safetensors", 1.0) for name in ("cat", "hat")]
    pipe = assemble(model_folder, files)
    return calibrate(pipe, steps=2, seeds=(0, 1), guidance_scale=4.0, width=32, height=32)


def test_every_lora_is_watched_at_work(measured: Calibration, lora_folder: Path) -> None:
    assert list(measured.seen) == [BASE, "cat", "hat"]
    modules = set(read(lora_folder / "cat.safetensors").updates)
    assert all(set(table) == modules for table in measured.seen.values())
    first = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q"
    base, cat, hat = (measured.seen[name][first].gram for name in ("", "cat", "hat"))
    assert not torch.allclose(base, cat, rtol=1e-3)
    assert not torch.allclose(cat, hat, rtol=1e-3)
    assert measured.about["prompts"] == {
        "": ["the cat", "the hat"],
        "cat": ["the cat"],
        "hat": ["the hat"],
    }
    assert measured.about["heads"][first.removesuffix(".to_q")] == 2
    sampled = measured.seen["cat"][first]
    assert sampled.inputs is not None
    assert sampled.outputs is not None
    assert len(sampled.inputs) == 256
    weight = tiny.sd15().unet.get_submodule(first.removeprefix("unet.")).weight
    assert torch.allclose(sampled.inputs @ weight.T, sampled.outputs, atol=1e-4)


def test_the_file_holds_what_was_measured(measured: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "calib.safetensors"
    calibration.save(measured, path)
    again = load(path)
    assert (again.hashes, again.about) == (measured.hashes, measured.about)
    for name, table in measured.seen.items():
        assert again.seen[name].keys() == table.keys()
        for module, own in table.items():
            for one, other in zip(own, again.seen[name][module], strict=True):
                assert (one is None) == (other is None)
                if one is not None and other is not None:
                    assert torch.equal(one.float(), other)
    keys = container.header(path).shapes
    # Queries, keys and values of self-attention see the same: two thirds are not stored.
    assert len(keys) < sum(
        sum(tensor is not None for tensor in own)
        for t in measured.seen.values()
        for own in t.values()
    )
    assert again.name_of("elsewhere", measured.hashes["hat"]) == "hat"
    with pytest.raises(CmloraError, match="not about dog; it knows cat, hat"):
        again.name_of("dog", "00")
    with pytest.raises(CmloraError, match="is no calibration data"):
        load(_other(tmp_path))


def _other(folder: Path) -> Path:
    container.save(folder / "x.safetensors", {"a": torch.ones(1)}, {})
    return folder / "x.safetensors"


@pytest.mark.parametrize("method", ["pleas", "ziplora"])
def test_merging_with_it_beats_the_mean(
    measured: Calibration, lora_folder: Path, method: str
) -> None:
    loras = [read(lora_folder / f"{name}.safetensors") for name in ("cat", "hat")]
    tables = {name: measured.grams(name) for name in ("cat", "hat")}
    found = merge(loras, [1.0, 1.0], method, grams=tables).lora

    def missed(weight: float | None) -> float:
        total = 0.0
        for lora in loras:
            for module, update in lora.updates.items():
                whole = sum(o.updates[module].delta().double() for o in loras)
                delta = found.updates[module].delta().double() if weight is None else weight * whole
                gap = delta - update.delta().double()
                total += float(((gap @ tables[lora.name][module]) * gap).sum())
        return total

    assert missed(None) <= min(missed(1.0), missed(0.5))


def test_damaged_data_is_refused(measured: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "calib.safetensors"
    table = {"unet.x": Seen(torch.eye(2), torch.ones(2))}
    calibration.save(Calibration({"": table}), path)
    tensors, _ = container.content(path)
    metadata = dict(container.header(path).metadata)
    container.save(path, {"7/unet.x/gram": tensors["0/unet.x/gram"]}, metadata)
    with pytest.raises(CmloraError, match="damaged"):
        load(path)


def test_nothing_to_draw(model_folder: Path) -> None:
    pipe = assemble(model_folder, [])
    with pytest.raises(CmloraError, match="say what to draw"):
        calibrate(pipe)
    with pytest.raises(CmloraError, match="1 step or more"):
        calibrate(pipe, ["a"], steps=0)
