"""`cmlora analyze align` and `strength`, `doctor --calib`, and models that are merged."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cmlora import CMLoRAPipeline
from cmlora.adapters.merging.units import reorder, shuffled, units_of
from cmlora.errors import CmloraError
from cmlora.files import read, write
from cmlora.pipelines.models import open_pipeline
from cmlora.pipelines.whole import merge_pipelines
from tests import tiny
from tests.calling import complaint, run, run_json
from tests.merging.makers import permuted


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with the units of its UNet and text encoder in another order."""
    pipe, generator = tiny.sd15(), torch.Generator().manual_seed(1)
    for model in (pipe.unet, pipe.text_encoder):
        state = dict(model.state_dict())
        for units in units_of(model):
            state = reorder(state, units, shuffled(units, generator))
        model.load_state_dict(state)
    folder = tmp_path_factory.mktemp("models") / "other"
    pipe.save_pretrained(folder)
    return folder


def test_two_loras(model_folder: Path, lora_folder: Path, tmp_path: Path) -> None:
    cat, plot = lora_folder / "cat.safetensors", tmp_path / "a.svg"
    twin = tmp_path / "twin.safetensors"
    write(permuted(read(cat)), twin)
    same = run_json("analyze", "align", cat, twin, "--plot", plot)
    assert (same["cosine"], same["score"]) == pytest.approx((1, 1))
    assert same["factors"]["none"] > 0.1 > 1e-6 > same["factors"]["permute"]
    assert "score R" in plot.read_text()
    arguments: list[str | Path] = ["analyze", "align", cat, lora_folder / "hat.safetensors"]
    assert "loss on the way" not in plot.read_text()
    drawn: list[str | Path] = ["--plot", plot, "--force"]
    apart = run_json(*arguments, "--model", model_folder, "--points", "3", *drawn)
    texts = plot.read_text()
    assert "score R" in texts
    assert "loss on the way" in texts
    assert abs(apart["cosine"]) < 0.2
    losses = apart["barrier"]["losses"]
    # At either end one of both is itself, and the other one is missing.
    assert len(losses) == 3
    assert losses[0] > 0
    assert apart["barrier"]["height"] >= 0
    assert "rank units rotated" in run(*arguments)


def test_two_models(model_folder: Path, other_model: Path, tmp_path: Path) -> None:
    plot = tmp_path / "way.png"
    arguments: list[str | Path] = ["analyze", "align", model_folder, other_model]
    arguments += ["--prompt", "a cat", "--points", "3", "--plot", plot]
    found = run_json(*arguments)
    assert found["before"]["distance"] > 0.3
    assert found["after"]["distance"] < 1e-6
    assert found["after"]["score"] == pytest.approx(1, abs=1e-3)
    assert found["after"]["barrier"]["height"] < 1e-6
    assert found["before"]["barrier"]["height"] > 1e-5
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "give a prompt" in complaint(["analyze", "align", model_folder, other_model])


@pytest.mark.parametrize("method", [pytest.param("mean", marks=pytest.mark.slow), "pleas"])
def test_models_are_merged_into_a_folder(
    method: str, model_folder: Path, other_model: Path, tmp_path: Path
) -> None:
    from diffusers import StableDiffusionPipeline

    out = tmp_path / "both"
    arguments: list[str | Path] = ["merge", model_folder, other_model, "--method", method]
    arguments += ["-o", out, *(["--prompt", "a cat"] if method == "pleas" else [])]
    said = run_json(*arguments)
    assert said["parts"].keys() == {"unet", "text_encoder"}
    assert said["parts"]["unet"]["matched"] == pytest.approx(1, abs=1e-6)
    again = StableDiffusionPipeline.from_pretrained(out)
    again.set_progress_bar_config(disable=True)
    # A model and its own reordered copy are one model.
    assert torch.allclose(tiny.run(again, steps=1), tiny.run(tiny.sd15(), steps=1), atol=1e-3)
    assert [path.name for path in tmp_path.iterdir()] == ["both"]
    assert "--force replaces it" in complaint(arguments)


def test_units_that_two_models_keep_make_wider_layers(
    model_folder: Path, lora_folder: Path, tmp_path: Path
) -> None:
    stranger = tiny.sd15()
    generator = torch.Generator().manual_seed(5)
    for model in (stranger.unet, stranger.text_encoder):
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += 0.5 * parameter.data.std(correction=0) * noise
    other, out = tmp_path / "other", tmp_path / "both"
    stranger.save_pretrained(other)
    arguments: list[str | Path] = ["merge", model_folder, other, "--method", "pleas", "-o", out]
    said = run_json(*arguments, "--prompt", "a cat", "--separate", "0.5")
    assert 1 < said["parts"]["unet"]["size"] < 1.5
    live = [open_pipeline(folder, dtype=torch.float32) for folder in (model_folder, other)]
    for pipe in live:
        pipe.set_progress_bar_config(disable=True)
    merge_pipelines(*live, prompts=["a cat"], separate=0.5)
    again = open_pipeline(out, dtype=torch.float32)
    again.set_progress_bar_config(disable=True)
    name = next(n for n, _ in again.unet.named_modules() if n.endswith("ff.net.2"))
    usual = tiny.sd15().unet.get_submodule(name).in_features
    assert again.unet.get_submodule(name).in_features == usual * 3 // 2
    assert torch.equal(tiny.run(again, steps=1), tiny.run(live[0], steps=1))
    assert open_pipeline(out, dtype=torch.float16).unet.dtype == torch.float16
    # Once read it can be written again, and LoRAs go into it as into any model.
    again.save_pretrained(tmp_path / "copy")
    copy = CMLoRAPipeline.from_pretrained(tmp_path / "copy")
    copy.load_lora_weights(lora_folder / "cat.safetensors", adapter_name="cat")
    assert len(copy("a cat", num_inference_steps=1, method="merge").images) == 1
    config = out / "unet" / "config.json"
    good = json.loads(config.read_text())
    wrong: list[Any] = [3, [], {"nowhere": [1, 1]}, {name: [1]}]
    wrong += [{name: [-4, 2]}, {"conv_in": [4, 4]}]
    for widths in wrong:
        config.write_text(json.dumps({**good, "cmlora_widths": widths}))
        with pytest.raises(CmloraError, match="does not hold the layers it names"):
            open_pipeline(out)
    config.write_text(json.dumps({**good, "_class_name": "HTTPServer"}))
    with pytest.raises(CmloraError, match="diffusers has no model"):
        open_pipeline(out)
    config.write_text("{")
    with pytest.raises(CmloraError, match="cannot be read"):
        open_pipeline(out)


def test_what_cannot_be_compared_or_merged(
    model_folder: Path, lora_folder: Path, tmp_path: Path
) -> None:
    cat = lora_folder / "cat.safetensors"
    assert "not 1" in complaint(["analyze", "align", cat])
    assert "compared with a LoRA" in complaint(["analyze", "align", cat, model_folder])
    assert "--follow is for two models" in complaint(
        ["analyze", "align", cat, cat, "--follow", "2"]
    )
    merging: list[str | Path] = ["merge", model_folder, model_folder, "-o", tmp_path / "x"]
    assert "mean or pleas" in complaint(merging)
    assert "give a --prompt" in complaint([*merging, "--method", "pleas"])
    assert "not with LoRAs" in complaint(["merge", cat, model_folder, "-o", tmp_path / "x"])
    named: list[str | Path] = ["merge", model_folder, model_folder, "--method", "mean"]
    assert "become a folder" in complaint([*named, "-o", tmp_path / "x.safetensors"])
    assert "from 0 to 1" in complaint([*named, "-o", tmp_path / "x", "--separate", "2"])
    loras: list[str | Path] = ["merge", cat, cat, "-o", tmp_path / "x.safetensors"]
    assert "is for two models" in complaint([*loras, "--separate", "0.5"])
    assert "is for two models" in complaint([*loras, "--budget", "1.5"])
    assert "1 or more" in complaint([*named, "-o", tmp_path / "x", "--budget", "0.5"])
    both = ["--budget", "1.5", "--separate", "0.5"]
    assert "give one" in complaint([*named, "-o", tmp_path / "x", *both])
    assert list(tmp_path.iterdir()) == []


def test_safe_strengths(model_folder: Path, lora_folder: Path, tmp_path: Path) -> None:
    calib, plot = tmp_path / "calib.safetensors", tmp_path / "s.png"
    here: list[str | Path] = ["--lora-dir", lora_folder]
    run("calib", "cat", "hat", "--model", model_folder, *here, "--steps", "1", "-o", calib)
    asked: list[str | Path] = ["analyze", "strength", "cat", "hat:0.5", *here]
    found = run_json(*asked, "--calib", calib, "--plot", plot)
    assert [row["name"] for row in found] == ["cat", "hat", "all together"]
    cat = found[0]
    assert cat["safest"] == min(row["safest"] for row in cat["layers"].values())
    assert cat["ranks"].keys() == found[1]["ranks"].keys()
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "safe strength" in run(*asked, "--calib", calib)
    assert "--calib FILE" in complaint(asked)
    advice = run_json("doctor", "cat", "hat", *here, "--calib", calib)
    assert [row["name"] for row in advice["strength"]] == ["cat", "hat", "all together"]
