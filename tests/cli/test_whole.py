"""`cmlora merge` with two models: what may be replaced, what is refused, what is written down."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cmlora import __version__
from cmlora.cli import whole
from cmlora.errors import CmloraError
from cmlora.pipelines.models import fingerprint
from tests.calling import complaint, run, run_json

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def broken(model_folder: Path, tmp_path: Path) -> Path:
    """The tiny model with one weight of its UNet that is no number."""
    folder = tmp_path / "broken"
    shutil.copytree(model_folder, folder)
    file = folder / "unet" / WEIGHTS
    tensors = load_file(file)
    tensors["conv_in.weight"][0, 0] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    return folder


def mean(one: Path, other: Path, out: Path, *more: str) -> list[str | Path]:
    return ["merge", one, other, "--method", "mean", "--no-match", "-o", out, *more]


def test_a_folder_may_have_a_dot_in_its_name(model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "both-v1.5"
    said = run_json(*mean(model_folder, model_folder, out))
    assert (out / "model_index.json").is_file()
    assert said["folder"] == str(out)
    for suffix in (".safetensors", ".ckpt", ".BIN"):
        said_no = complaint(mean(model_folder, model_folder, tmp_path / f"both{suffix}"))
        assert "become a folder" in said_no


def test_only_a_model_is_replaced(model_folder: Path, tmp_path: Path) -> None:
    pictures, file = tmp_path / "pictures", tmp_path / "notes"
    pictures.mkdir()
    (pictures / "cat.png").write_bytes(b"mine")
    file.write_text("mine")
    for place in (pictures, file):
        said = complaint(mean(model_folder, model_folder, place, "--force"))
        assert "no model's folder" in said
    assert (pictures / "cat.png").read_bytes() == file.read_text().encode() == b"mine"
    out = tmp_path / "both"
    run(*mean(model_folder, model_folder, out))
    (out / "note.txt").write_text("of the old one")
    assert "--force replaces it" in complaint(mean(model_folder, model_folder, out))
    run(*mean(model_folder, model_folder, out, "--force"))
    assert not (out / "note.txt").exists()
    assert "a model to merge is in it" in complaint(mean(model_folder, out, out, "--force"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["both", "notes", "pictures"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interruption_leaves_the_old_model(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new, old = tmp_path / "new", tmp_path / "model"
    for folder in (new, old):
        folder.mkdir()
        (folder / "what").write_text(folder.name)
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if self == new:
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(CmloraError if error is OSError else error):
        whole._put(new, old)
    assert (old / "what").read_text() == "model"
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "new"]
    link = tmp_path / "link"
    link.symlink_to(old)
    whole._put(new, link)
    assert (link / "what").read_text() == (old / "what").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "model"]


def test_the_folder_says_what_it_was_made_of(model_folder: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    out, again = tmp_path / "both", tmp_path / "again"
    recipe = run_json(*mean(model_folder, model_folder, out, "--seed", "3"))["recipe"]
    assert recipe["models"] == [model_folder.name] * 2
    assert recipe["sha256"] == [fingerprint(model_folder)] * 2
    assert recipe["weights"] == [0.5, 0.5]
    assert (recipe["method"], recipe["match"], recipe["seed"]) == ("mean", False, 3)
    assert recipe["cmlora"] == __version__
    (shown,) = run_json("inspect", out)
    assert shown["merge"] == recipe
    assert shown["pipeline"] == "StableDiffusionPipeline"
    assert shown["parts"]["unet"] == "UNet2DConditionModel"
    assert shown["sha256"] == fingerprint(out)
    assert fingerprint(model_folder)[:6] in run("inspect", out)
    # It is still there when diffusers has read and written the model.
    StableDiffusionPipeline.from_pretrained(out).save_pretrained(again)
    assert run_json("inspect", again)[0]["merge"] == recipe
    assert run_json("inspect", model_folder)[0]["merge"] is None


def test_weights_that_are_no_numbers(model_folder: Path, broken: Path, tmp_path: Path) -> None:
    where = f"{broken}/unet: conv_in.weight holds NaN"
    for pair in ((model_folder, broken), (broken, model_folder)):
        assert where in complaint(mean(*pair, tmp_path / "both"))
    assert where in complaint(["analyze", "align", model_folder, broken, "--prompt", "a cat"])
    smaller: list[str | Path] = ["compress", broken, "--out", tmp_path / "small.safetensors"]
    assert where in complaint(smaller)
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]
