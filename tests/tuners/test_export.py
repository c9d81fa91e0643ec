"""Adapters as ordinary LoRAs: exact where the rank allows, and honest about the error elsewhere."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from cmlora import files
from cmlora.adapters.tuners import TUNERS, store
from cmlora.adapters.tuners.export import layer_to_lora, to_lora
from cmlora.cli.app import app
from cmlora.errors import CmloraError
from tests import disk, tiny
from tests.tuners import bench

UNET = ["to_q", "conv1", "proj_in"]
TEXT = ["q_proj"]

HOME = [name for name in TUNERS if name in bench.OPTIONS]


@pytest.mark.parametrize("name", HOME)
@pytest.mark.parametrize("kind", ["bare", "conv3", "strided"])
def test_a_layer_is_exact_or_the_best_of_its_rank(name: str, kind: str) -> None:
    model = bench.adapt(name, kind)
    bench.shake(model)
    layer: Any = bench.layers(model)[0]
    layer.set_scale("a", 0.7)
    if layer.bias_update("a") is not None:
        with pytest.raises(CmloraError, match=r"changes the bias of unet\.layer"):
            to_lora(model, "a")
        layer.base_layer.bias = None
    lora, error = to_lora(model, "a")
    delta = layer.get_delta_weight("a").detach()
    assert error < 1e-5
    assert torch.allclose(lora.updates["unet.layer"].delta(), delta, rtol=1e-4, atol=1e-5)
    update, lost, norm = layer_to_lora(layer, "a", 1)
    values = torch.linalg.svdvals(delta.flatten(1).double())
    assert update.rank == 1
    assert lost == pytest.approx(float(values[1:].norm()), rel=1e-3, abs=1e-5)
    assert norm == pytest.approx(float(values.norm()), rel=1e-4)


def test_pissa_is_a_lora_of_twice_its_rank() -> None:
    model = bench.adapt("pissa", "conv3")
    bench.shake(model)
    assert to_lora(model, "a")[0].updates["unet.layer"].rank == 6


@pytest.mark.parametrize("name", ["loha", "lokr"])
def test_adapters_that_peft_makes(name: str) -> None:
    model = bench.Holder(bench.base("bare"))
    bench.inject(model, TUNERS[name].object.settings(r=2, target_modules=["layer"]), "a")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    layer: Any = model.layer
    lora, error = to_lora(model, "a")
    assert error < 1e-5
    expected = layer.get_delta_weight("a").detach()
    torch.testing.assert_close(lora.updates["unet.layer"].delta(), expected, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_exported() -> None:
    grouped = bench.adapt("nola", "grouped")
    with pytest.raises(CmloraError, match="groups"):
        to_lora(grouped, "a")
    with pytest.raises(CmloraError, match="no adapter 'b'"):
        to_lora(grouped, "b")
    with pytest.raises(CmloraError, match="rank is 0"):
        to_lora(grouped, "a", 0)
    with pytest.raises(CmloraError, match="no update"):
        to_lora(bench.adapt("lost", "linear", nonlinear=True), "a")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, torch.Tensor]:
    """A model's folder, an SVFit adapter of its UNet and text encoder, and a run with it."""
    folder = tmp_path_factory.mktemp("convert")
    model = disk.save_model(folder / "model")
    pipe = tiny.sd15()
    for part, targets in ((pipe.unet, UNET), (pipe.text_encoder, TEXT)):
        bench.inject(part, bench.settings("svfit", targets), "a")
        bench.shake(part, size=0.2)
    store.save(pipe, "a", folder / "ink.safetensors")
    return model, folder / "ink.safetensors", tiny.run(pipe, steps=2)


def convert(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["convert", *map(str, arguments)], env={"COLUMNS": "200"})


def test_the_command_writes_a_lora_that_does_the_same(
    adapter: tuple[Path, Path, torch.Tensor], tmp_path: Path
) -> None:
    model, file, expected = adapter
    out = tmp_path / "lora.safetensors"
    result = convert(file, "--model", model, "--to", "lora", "-o", out, "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["relative_error"] < 1e-5
    assert facts["rank"] == [4, 4]
    pipe = tiny.sd15()
    pipe.load_lora_weights(str(out), adapter_name="a")
    assert torch.allclose(tiny.run(pipe, steps=2), expected, rtol=1e-3, atol=1e-3)
    assert files.read(out).name == "ink"
    said = convert(file, "--model", model, "--rank", 1, "-o", out)
    assert said.exit_code == 0, said.output
    assert "rank 1 to 1" in said.stdout
    assert {update.rank for update in files.read(out).updates.values()} == {1}


def test_the_command_truncates_an_ordinary_lora(lora_folder: Path, tmp_path: Path) -> None:
    source, out = lora_folder / "cat.safetensors", tmp_path / "small.safetensors"
    result = convert(source, "--rank", 1, "-o", out, "--json")
    assert result.exit_code == 0, result.output
    error = json.loads(result.stdout)["relative_error"]
    whole, small = files.read(source), files.read(out)
    assert 0.01 < error < 1
    assert small.norm() ** 2 == pytest.approx(whole.norm() ** 2 * (1 - error**2), rel=1e-3)


def test_the_command_answers_mistakes_in_one_line(
    adapter: tuple[Path, Path, torch.Tensor], lora_folder: Path, tmp_path: Path
) -> None:
    model, file, _ = adapter
    out = tmp_path / "never.safetensors"
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(file.read_bytes()[:500])
    bare = tmp_path / "bare.safetensors"
    from safetensors.torch import save_file

    save_file({"unet.layer.something": torch.ones(2)}, bare)
    for arguments, message in (
        ([tmp_path / "none.safetensors"], "no file"),
        ([damaged], "cut short"),
        ([bare], "holds no LoRA"),
        ([file, "--to", "kohya"], "not one of lora"),
    ):
        result = convert(*arguments, "--model", model, "-o", out)
        assert result.exit_code == 2, result.output
        assert message in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
        assert not out.exists()
