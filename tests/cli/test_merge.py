"""`cmlora merge`, `pack` and `unpack` on files: what is written, and one line for every mistake."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cmlora.adapters.merging import MERGES, rmm
from cmlora.files import read, sha256, write
from cmlora.lora import LoRA, Update, stack
from tests import disk, tiny
from tests.calling import complaint, run, run_json
from tests.merging.makers import distance, make


def test_a_merged_file_is_the_sum(lora_folder: Path, tmp_path: Path) -> None:
    files = [lora_folder / "cat.safetensors", lora_folder / "hat.safetensors"]
    out = tmp_path / "both.safetensors"
    plot = tmp_path / "both.png"
    both = [f"{files[0]}:0.8", f"{files[1]}:0.6"]
    said = run_json("merge", *both, "--method", "cat", "-o", out, "--plot", plot)
    assert plot.read_bytes().startswith(b"\x89PNG")
    merged = read(out)
    exact = stack([(read(files[0]), 0.8), (read(files[1]), 0.6)], "both")
    assert distance(merged, exact) < 1e-6
    assert merged.name == "both"
    assert merged.triggers == ("the cat", "the hat")
    recipe = json.loads(merged.metadata["cmlora.merge"])
    assert recipe["sha256"] == [sha256(path) for path in files]
    assert recipe["weights"] == [0.8, 0.6]
    assert merged.metadata["modelspec.merged_from"] == "cat,hat"
    assert said["sha256"] == sha256(out)
    assert said["rank"] == 4
    assert said["error"] < 1e-6
    assert {path.name for path in tmp_path.iterdir()} == {"both.safetensors", "both.png"}


def test_weights_apart_and_options(lora_folder: Path, tmp_path: Path) -> None:
    one, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    common: list[str | Path] = [
        "merge",
        "--method",
        "ties",
        "--rank",
        "3",
        "--lora-dir",
        lora_folder,
    ]
    run(*common, "cat:0.8", "hat", "--density", "0.4", "--name", "x", "-o", one)
    names = ["cat", "hat", "--weights", "0.8,1", "--option", "density=0.4", "--name", "x"]
    said = run(*common, *names, "-o", other)
    assert sha256(one) == sha256(other)
    assert "contested" in said
    assert "lost to rank" in said
    assert "rank 3" in said


def test_a_pipeline_draws_with_the_merged_file(lora_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "both.safetensors"
    run("merge", "cat:0.8", "hat:0.6", "--lora-dir", lora_folder, "--method", "linear", "-o", out)
    merged, apart = tiny.sd15(), tiny.sd15()
    merged.load_lora_weights(str(out))
    for name in ("cat", "hat"):
        apart.load_lora_weights(str(lora_folder / f"{name}.safetensors"), adapter_name=name)
    apart.set_adapters(["cat", "hat"], [0.8, 0.6])
    assert torch.allclose(tiny.run(merged, steps=2), tiny.run(apart, steps=2), atol=1e-4)
    assert not torch.allclose(tiny.run(merged, steps=2), tiny.run(tiny.sd15(), steps=2), atol=1e-2)


@pytest.mark.parametrize("method", [m for m in MERGES if not MERGES[m].object.needs_grams])
def test_every_method(method: str, lora_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    said = run_json("merge", "cat", "hat", "--lora-dir", lora_folder, "--method", method, "-o", out)
    assert said["method"] == method
    assert len(read(out).updates) == len(read(lora_folder / "cat.safetensors").updates)


def test_scales_of_a_rank_stabilised_file_are_baked_in(tmp_path: Path) -> None:
    lora = make("a", 4)
    tensors = {}
    for module, update in lora.updates.items():
        ones = [1] * (update.down.ndim - 2)
        tensors[f"{module}.lora_A.weight"] = update.down
        tensors[f"{module}.lora_B.weight"] = update.up.reshape(*update.up.shape, *ones)
    settings = {
        f"{part}.{key}": value
        for part in lora.parts
        for key, value in {"r": 4, "lora_alpha": 6, "use_rslora": True}.items()
    }
    path, out = tmp_path / "rs.safetensors", tmp_path / "out.safetensors"
    save_file(tensors, path, {"format": "pt", "lora_adapter_metadata": json.dumps(settings)})
    run("merge", path, "--method", "svd", "-o", out)
    merged = read(out)
    for module, update in lora.updates.items():
        delta = update.up @ update.down.flatten(1) * 3  # 6 / sqrt(4)
        found = merged.updates[module].delta().flatten(1)
        assert torch.allclose(found, delta, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "tise"], "did you mean ties"),
        (["--method", "slerp", "--density", "0.4"], "no option 'density'"),
        (["--method", "ties", "--density", "1.4"], "density is 1.4"),
        (["--rank", "9"], "rank 9 is not possible; these LoRAs allow 1 to 4"),
        (["--weights", "1,2,3"], "3 weights for 2 LoRAs"),
        (["--weights", "1,x"], "expected numbers"),
        (["--weights", "0,0"], "nothing to merge"),
        (["--out", "there.txt"], "should end in .safetensors"),
        (["--out", "nowhere/there.safetensors"], "the folder nowhere does not exist"),
        (["nan"], "holds NaN"),
        (["inf"], "holds NaN or infinity"),
        (["empty"], "is empty"),
        (["flux"], "FLUX"),
        (["wide"], "different models"),
        (["missing"], "not found"),
        (["cut"], "cut short"),
        (["cat:much"], "as weight"),
    ],
)
def test_mistakes(lora_folder: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    for name in ("cat", "hat"):
        data = (lora_folder / f"{name}.safetensors").read_bytes()
        (tmp_path / f"{name}.safetensors").write_bytes(data)
    (tmp_path / "cut.safetensors").write_bytes(data[:400])
    tensors = load_file(tmp_path / "cat.safetensors")
    tensors[min(tensors)].fill_(torch.nan)
    save_file(tensors, tmp_path / "nan.safetensors")
    tensors = load_file(tmp_path / "cat.safetensors")
    tensors[max(tensors)].view(-1)[3] = -torch.inf
    save_file(tensors, tmp_path / "inf.safetensors")
    (tmp_path / "empty.safetensors").touch()
    layer = "transformer.single_transformer_blocks.0.attn.to_q"
    factors = {"lora_A": torch.ones(2, 3072), "lora_B": torch.ones(3072, 2)}
    flux = {f"{layer}.{name}.weight": factor for name, factor in factors.items()}
    save_file(flux, tmp_path / "flux.safetensors")
    disk.save_lora(tmp_path, "wide", wide=2)
    before = sorted(path.name for path in tmp_path.iterdir())
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "never.safetensors")]
    said = complaint(["merge", "cat", "hat", "--lora-dir", tmp_path, *out, *arguments])
    assert message in said
    if arguments in (["nan"], ["inf"]):
        edge = min if arguments == ["nan"] else max
        assert edge(tensors).partition(".lora_")[0] in said
        assert arguments[0] in said
    if arguments == ["flux"]:
        assert "a UNet for text of width" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_nothing_is_replaced_unasked(lora_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    arguments: list[str | Path] = ["merge", "cat", "hat", "--lora-dir", lora_folder, "-o", out]
    out.write_bytes(b"precious")
    assert "--force replaces it" in complaint(arguments)
    assert out.read_bytes() == b"precious"
    run(*arguments, "--force")
    assert read(out).updates
    again: list[str | Path] = [lora_folder / "hat.safetensors", out, "-o", out, "--force"]
    assert "is one of the files to merge" in complaint(["merge", *again])


def test_an_interruption_leaves_no_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        updates: dict[str, Update] = {}
        for index in range(60):
            small = make(f"{name}{index}", 4).updates.values()
            updates |= {f"unet.down_blocks.{index}.m{i}": u for i, u in enumerate(small)}
        write(LoRA(name, updates), tmp_path / f"{name}.safetensors")
    out = tmp_path / "out.safetensors"
    code = (
        "import sys, time, cmlora.adapters.merging, cmlora.cli.app as a\n"
        "r = sys.modules['cmlora.adapters.merging.tally']  # slowed down, so that there is time\n"
        "old = r.block\n"
        "def block(m):\n    print('started', flush=True); time.sleep(0.2); return old(m)\n"
        "r.block = block\na.main()\n"
    )
    command = [sys.executable, "-c", code, "merge", tmp_path / "a.safetensors"]
    process = subprocess.Popen(
        [*map(str, command), str(tmp_path / "b.safetensors"), "-o", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # a shell that starts the tests in the background makes them ignore the signal
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"started\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_pack_and_unpack(tmp_path: Path) -> None:
    base = make("base", 8)
    files = []
    for index in range(5):
        lora = stack([(base, 1 + 0.1 * index)], f"l{index}")
        files.append(tmp_path / f"l{index}.safetensors")
        write(lora, files[-1])
    out, folder = tmp_path / "all.safetensors", tmp_path / "again" / "deeper"
    said = run_json("pack", *files, "-p", "1", "-o", out)
    assert said["bytes"] < said["before"]
    assert max(said["errors"].values()) < 1e-5
    run("unpack", out, "--name", "l3", "-o", folder)
    assert [path.name for path in folder.iterdir()] == ["l3.safetensors"]
    assert distance(read(folder / "l3.safetensors"), read(files[3])) < 1e-5
    assert "--force" in complaint(["unpack", out, "-o", folder])
    assert len(run_json("unpack", out, "-o", folder, "--force")) == 5
    assert "saves nothing" in complaint(["pack", *files, "-p", "4", "-o", folder / "x.safetensors"])
    assert "is no pack" in complaint(["unpack", files[0], "-o", folder])
    assert "no LoRA 'l9'" in complaint(["unpack", out, "--name", "l9", "-o", folder])
    assert "cannot make the folder" in complaint(["unpack", out, "-o", files[0] / "inside"])


def test_a_pack_cannot_write_outside_its_folder(tmp_path: Path) -> None:
    loras = [make(name, 4) for name in ("../../a", "b", "c")]
    rmm.save(rmm.pack(loras, 0), tmp_path / "evil.safetensors")
    said = complaint(["unpack", tmp_path / "evil.safetensors", "-o", tmp_path])
    assert "damaged" in said
