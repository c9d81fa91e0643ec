"""`cmlora train` and `cmlora extract`."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from cmlora import files
from cmlora.adapters.training.extract import best, extract
from cmlora.cli.app import app
from cmlora.errors import CmloraError
from tests import families, tiny
from tests.training import bench


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return bench.pictures(tmp_path / "data", 3)


SMALL = ("--resolution", 32, "--steps", 2, "--rank", 2, "--rate", 0.01, "--set", "save_every=1")


def test_a_lora_from_a_folder(data: Path, model_folder: Path, tmp_path: Path) -> None:
    config = tmp_path / "ink.toml"
    config.write_text('name = "ink"\ntrigger = "zorbo"\nsteps = 9\n[optim_options]\neps = 1e-7\n')
    done = run(
        "train", config, "--data", data, "--model", model_folder, "--out", tmp_path / "out",
        *SMALL, "--set", "options.lora_dropout=0.1", "--targets", "to_q,to_v", "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert facts["steps"] == 2
    assert facts["file"] == str(tmp_path / "out" / "ink.safetensors")
    said = files.describe(facts["file"])
    assert said["triggers"] == ["zorbo"]
    settings = json.loads(files.read(facts["file"]).metadata["cmlora.training"])
    assert settings["optim_options"] == {"eps": 1e-7}
    assert settings["options"] == {"lora_dropout": 0.1}


def test_a_denoiser_and_what_was_learnt_as_a_lora(
    data: Path, model_folder: Path, tmp_path: Path
) -> None:
    done = run(
        "train", "--data", data, "--trigger", "zorbo", "--model", model_folder, "--full",
        "--out", tmp_path / "out", "--optim", "galore", "--set", "optim_options.rank=4", *SMALL,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    folder = tmp_path / "out" / "denoiser"
    output = tmp_path / "extracted.safetensors"
    done = run("extract", folder, "--model", model_folder, "--rank", 64, "-o", output, "--json")
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert facts["relative_error"] < 1e-5
    assert facts["left"]  # norms and biases
    tuned = tiny.sd15().unet.from_pretrained(folder)
    base = dict(tiny.sd15().unet.named_parameters())
    after = dict(tuned.named_parameters())
    for name, update in files.read(output).updates.items():
        key = f"{name.removeprefix('unet.')}.weight"
        torch.testing.assert_close(update.delta(), after[key] - base[key], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("how", [(), ("--tuner", "nola"), ("--full", "--optim", "galore")])
def test_the_default_model_can_be_trained(how: tuple[str, ...], data: Path, tmp_path: Path) -> None:
    small = ("--resolution", 32, "--steps", 2, "--trigger", "zorbo")
    done = run("train", "--data", data, "--out", tmp_path / "out", *small, *how, "--json")
    assert done.exit_code == 0, done.output
    assert Path(json.loads(done.stdout)["file"]).exists()


def test_every_part_of_a_model_in_half_precision_is_trained(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "half"
    tiny.sd15().to(torch.float16).save_pretrained(folder)
    common = ("--data", data, "--model", folder, "--out", tmp_path / "out", *SMALL)
    done = run("train", *common, "--trigger", "zorbo", "--set", "text_targets=q_proj")
    assert done.exit_code == 0, done.output


def test_pictures_of_the_class_are_drawn_first(
    data: Path, model_folder: Path, tmp_path: Path
) -> None:
    prior = tmp_path / "prior"
    done = run(
        "train", "--data", data, "--trigger", "zorbo", "--model", model_folder, *SMALL,
        "--out", tmp_path / "out", "--set", f"prior_data={prior}", "--set", "prior_prompt=a cat",
        "--set", "prior_count=2", "--set", "validation_steps=1",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert sorted(p.name for p in prior.iterdir()) == ["prior-00000.png", "prior-00001.png"]


def test_all_settings_are_explained() -> None:
    rows = json.loads(run("train", "--explain", "--json").stdout)
    assert rows["rate"] == {"default": 1e-4, "what": "learning rate"}
    assert "learning rate" in run("train", "--explain").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "data is missing"),
        (("--data", "nowhere"), "there is no folder nowhere"),
        (("--data", "DATA", "--tuner", "loro"), "did you mean lora"),
        (("--data", "DATA", "--optim", "galor"), "did you mean galore"),
        (("--data", "DATA", "--set", "stepz=3"), "did you mean steps"),
        (("--data", "DATA", "--targets", "to_z"), "no layer of the unet is called 'to_z'"),
        (("--data", "DATA", "--rank", "99"), "allows"),
        (("--data", "DATA", "--trp"), "needs full"),
        (("nowhere.toml",), "cannot read nowhere.toml"),
    ],
)
def test_mistakes_are_one_line(
    arguments: tuple[str, ...], message: str, data: Path, model_folder: Path, tmp_path: Path
) -> None:
    given = [str(data) if a == "DATA" else a for a in arguments]
    done = run("train", *given, "--model", model_folder, "--out", tmp_path / "out")
    assert done.exit_code == 2
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1
    assert message in lines[0]
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_extracting_needs_two_models_of_one_kind(model_folder: Path, tmp_path: Path) -> None:
    done = run("extract", tmp_path, "--model", model_folder, "-o", tmp_path / "a.safetensors")
    assert done.exit_code == 2
    assert "no config.json" in done.stderr
    done = run("extract", tmp_path, "--model", model_folder, "-o", tmp_path / "a.pt")
    assert "should end in .safetensors" in done.stderr
    small, large = tiny.unet_sd15(channels=(8, 16)), tiny.unet_sd15(channels=(16, 16))
    with pytest.raises(CmloraError, match="not of one kind"):
        extract(small, large, 2)
    with pytest.raises(CmloraError, match="the same linear layers"):
        extract(small, small, 2)
    with pytest.raises(CmloraError, match="rank is 0"):
        extract(small, small, 0)


def test_the_extracted_lora_is_the_best_of_its_rank() -> None:
    base, tuned = (tiny.unet_sd15(channels=(8, 16), seed=s) for s in (0, 1))
    lost = total = 0.0
    found = extract(base, tuned, 2)
    pairs = dict(base.named_parameters()), dict(tuned.named_parameters())
    for name, update in found.lora.updates.items():
        key = f"{name.removeprefix('unet.')}.weight"
        delta = (pairs[1][key] - pairs[0][key]).double().detach()
        values = torch.linalg.svdvals(delta.flatten(1))
        assert update.rank == min(2, len(values))
        missing = float((delta - update.delta().double()).norm())
        assert missing == pytest.approx(float(values[2:].norm()), rel=1e-3, abs=1e-5)
        lost, total = lost + missing**2, total + float(delta.norm()) ** 2
    assert found.error == pytest.approx((lost / total) ** 0.5, rel=1e-3)
    assert 0 < found.share < 1
    update, missing = best(torch.zeros(4, 3, dtype=torch.double), 2)
    assert update.rank == 1
    assert missing == 0


def test_extracting_from_the_second_denoiser(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = families.wan().pipe
    monkeypatch.setattr("cmlora.pipelines.models.open_pipeline", lambda *_, **__: pipe)
    tuned, rng = deepcopy(pipe.transformer_2), torch.Generator().manual_seed(0)
    key = "blocks.0.attn1.to_q"
    weight = tuned.get_submodule(key).weight
    up, down = (torch.randn(s, generator=rng) for s in ((len(weight), 1), (1, weight.shape[1])))
    weight.data += up @ down
    tuned.save_pretrained(tmp_path / "denoiser-2")
    output = tmp_path / "second.safetensors"
    given = ("extract", tmp_path / "denoiser-2", "--model", "wan", "-o", output, "--part")
    done = run(*given, "transformer_2", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["relative_error"] < 1e-5
    updates = files.read(output).updates
    assert list(updates) == [f"transformer.{key}"]
    torch.testing.assert_close(
        updates[f"transformer.{key}"].delta(), up @ down, atol=1e-4, rtol=1e-3
    )
    wrong = run(*given, "unet")
    assert wrong.exit_code == 2
    assert "wan has transformer, transformer_2" in " ".join(wrong.output.split())
