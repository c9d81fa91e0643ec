"""LoRA files: every trainer's form gives the same LoRA and the same picture."""

import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cmlora import files
from cmlora.atomic import replacing
from cmlora.errors import CmloraError
from cmlora.lora import LoRA, Update
from tests import tiny, trainers

FORMATS: dict[str, Callable[[LoRA], dict[str, Tensor]]] = {
    "kohya": trainers.kohya,
    "peft": trainers.peft,
    "linear_layer": trainers.linear_layer,
    "processors": trainers.processors,
}


@pytest.fixture(scope="module")
def sample() -> LoRA:
    return trainers.lora(tiny.sd15(**tiny.WHOLE))


@pytest.fixture
def path(sample: LoRA, tmp_path: Path) -> Path:
    return trainers.save(trainers.kohya(sample), tmp_path / "sample.safetensors")


def same(one: LoRA, other: LoRA) -> bool:
    """Whether two LoRAs are equal bit for bit."""
    return (one.name, one.metadata, one.triggers) == (
        other.name,
        other.metadata,
        other.triggers,
    ) and same_updates(one, other)


def same_updates(one: LoRA, other: LoRA) -> bool:
    def bits(update: Update) -> tuple[object, ...]:
        down, up = update.folded().down, update.up
        return (down.dtype, down.shape, down.tolist(), up.dtype, up.tolist(), update.scale)

    return {m: bits(u) for m, u in one.updates.items()} == {
        m: bits(u) for m, u in other.updates.items()
    }


@pytest.mark.parametrize("form", FORMATS)
def test_every_form_gives_the_same_deltas(form: str, sample: LoRA, tmp_path: Path) -> None:
    wanted = {m: u for m, u in sample.updates.items() if trainers.attention(m)}
    part = LoRA("sample", wanted if form == "processors" else sample.updates)
    read = files.read(trainers.save(FORMATS[form](part), tmp_path / "sample.safetensors"))
    assert list(read.updates) == list(part.updates)
    assert read.name == "sample"
    for module, update in part.updates.items():
        assert torch.equal(read.updates[module].down, update.down)
        torch.testing.assert_close(read.updates[module].delta(), update.delta())


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_kohya_and_diffusers_files_are_one_lora(family: str, tmp_path: Path) -> None:
    pipe = getattr(tiny, family)(**tiny.WHOLE)
    lora = trainers.lora(pipe, name="k")
    rename = trainers.ldm_names(pipe.unet)
    ldm = files.read(trainers.save(trainers.kohya(lora, rename), tmp_path / "k.safetensors"))
    files.write(ldm, tmp_path / "d.safetensors")
    assert same(files.read(tmp_path / "d.safetensors"), lora)


def test_tucker_core_is_folded_when_written(tmp_path: Path) -> None:
    parts = {"mid": (2, 2, 3, 3), "down": (2, 8, 1, 1), "up": (8, 2, 1, 1)}
    stem = "lora_unet_mid_block_resnets_0_conv1"
    tensors = {f"{stem}.lora_{k}.weight": torch.randn(s) for k, s in parts.items()}
    tensors[f"{stem}.alpha"] = torch.tensor(1.0)
    read = files.read(trainers.save(tensors, tmp_path / "t.safetensors"))
    update = read.updates["unet.mid_block.resnets.0.conv1"]
    assert update.shape == (8, 8, 3, 3)
    assert update.scale == 0.5
    files.write(read, tmp_path / "w.safetensors")
    again = files.read(tmp_path / "w.safetensors").updates["unet.mid_block.resnets.0.conv1"]
    assert torch.equal(again.delta(), update.delta())


@pytest.mark.parametrize("stored", [0.0, None])
def test_no_alpha_means_the_rank(stored: float | None, tmp_path: Path) -> None:
    tensors = {f"unet.conv_in.lora_{s}.weight": torch.ones(2, 2) for s in ("down", "up")}
    if stored is not None:
        tensors["unet.conv_in.alpha"] = torch.tensor(stored)
    read = files.read(trainers.save(tensors, tmp_path / "a.safetensors"))
    assert read.updates["unet.conv_in"].scale == 1.0


@settings(deadline=None, max_examples=40)
@given(
    st.dictionaries(
        st.sampled_from(["unet.a.b", "unet.b", "unet.c.b", "text_encoder.text_model.x"]),
        st.tuples(
            st.integers(1, 5),
            st.floats(-1e3, 1e3, allow_subnormal=False),
            st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
            st.booleans(),
        ),
        min_size=1,
    ),
    st.lists(st.text(max_size=5), max_size=3),
    st.dictionaries(st.sampled_from(["cmlora.category", "note"]), st.text(max_size=9)),
)
def test_writing_and_reading_changes_no_bit(
    tmp_path_factory: pytest.TempPathFactory,
    modules: dict[str, tuple[int, float, torch.dtype, bool]],
    triggers: list[str],
    metadata: dict[str, str],
) -> None:
    updates = {
        name: Update(
            torch.randn(rank, 3, *([3, 3] if kernel else [])).to(dtype),
            torch.randn(4, rank).to(dtype),
            scale,
        )
        for name, (rank, scale, dtype, kernel) in modules.items()
    }
    lora = LoRA("any name", updates, metadata, tuple(triggers))
    path = tmp_path_factory.mktemp("trip") / "x.safetensors"
    files.write(lora, path)
    assert same(files.read(path), lora)
    assert files.triggers(path) == tuple(triggers)


def test_equal_loras_give_equal_files(tmp_path: Path, sample: LoRA) -> None:
    names = [f"key {i}" for i in range(20)]
    for attempt, order in enumerate((names, names[::-1])):
        lora = LoRA("x", dict(sample.updates), {name: "v" for name in order})
        files.write(lora, tmp_path / f"{attempt}.safetensors")
    assert files.sha256(tmp_path / "0.safetensors") == files.sha256(tmp_path / "1.safetensors")


def test_rank_stabilised_scale_of_a_diffusers_header(tmp_path: Path) -> None:
    tensors = {"unet.x.lora_A.weight": torch.ones(4, 3), "unet.x.lora_B.weight": torch.ones(3, 4)}
    header = {"unet.r": 4, "unet.lora_alpha": 6, "unet.use_rslora": True}
    path = trainers.save(
        tensors, tmp_path / "x.safetensors", lora_adapter_metadata=json.dumps(header)
    )
    assert files.read(path).updates["unet.x"].scale == 3.0


def test_a_stale_hash_is_not_copied(tmp_path: Path) -> None:
    updates = {"unet.x": Update(torch.ones(1, 2), torch.ones(2, 1))}
    lora = LoRA("x", updates, {"sshs_model_hash": "1", "ss_network_dim": "1"})
    files.write(lora, tmp_path / "x.safetensors")
    assert dict(files.read(tmp_path / "x.safetensors").metadata) == {"ss_network_dim": "1"}


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")

    def fail() -> None:
        with replacing(path) as file:
            file.write(b"new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    lora = LoRA("x", {"unet.x": Update(torch.ones(1, 2), torch.ones(2, 1))})
    with pytest.raises(CmloraError, match="cannot write"):
        files.write(lora, tmp_path / "nowhere" / "x.safetensors")
    with pytest.raises(CmloraError, match=r"should end in \.safetensors"):
        files.write(lora, tmp_path / "x.ckpt")
    with pytest.raises(CmloraError, match="no updates"):
        files.write(LoRA("x", {}), tmp_path / "x.safetensors")


# ------------------------------------------------------------------ files that are refused


def refused(path: Path, *words: str, strict: bool = True) -> None:
    """Reading fails with one line that names the file and contains the words."""
    with pytest.raises(CmloraError) as caught:
        files.read(path, strict=strict)
    message = str(caught.value)
    assert "\n" not in message
    for word in (path.name, *words):
        assert word in message


@pytest.mark.parametrize("name", ["x.ckpt", "x.pt", "x.PTH", "x.bin", "x.pkl"])
def test_a_pickle_is_refused_by_its_name(name: str, tmp_path: Path, path: Path) -> None:
    target = tmp_path / name
    target.write_bytes(path.read_bytes())
    refused(target, "is a pickle")


@pytest.mark.parametrize("legacy", [True, False])
def test_a_pickle_is_refused_by_its_content(legacy: bool, tmp_path: Path) -> None:
    target = tmp_path / "renamed.safetensors"
    torch.save({"a": torch.ones(2)}, target, _use_new_zipfile_serialization=not legacy)
    assert zipfile.is_zipfile(target) != legacy
    refused(target, "is a pickle")


def test_a_header_length_that_looks_like_a_pickle_is_none(tmp_path: Path) -> None:
    tensors = {"unet.x.lora_A.weight": torch.ones(1, 2), "unet.x.lora_B.weight": torch.ones(2, 1)}
    for padding in range(0, 800, 4):
        path = trainers.save(tensors, tmp_path / "x.safetensors", note="n" * padding)
        if path.read_bytes()[:2] == b"\x80\x02":
            break
    else:
        pytest.fail("no header of 640 bytes came about")
    assert list(files.read(path).updates) == ["unet.x"]


def test_missing_empty_and_folder(tmp_path: Path, path: Path) -> None:
    refused(tmp_path / "samples.safetensors", "no file", "did you mean sample.safetensors")
    (tmp_path / "empty.safetensors").touch()
    refused(tmp_path / "empty.safetensors", "is empty")
    refused(tmp_path, "is a folder", "sample.safetensors")


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_truncation_is_an_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    tensors = {"unet.x.lora_A.weight": torch.ones(1, 2), "unet.x.lora_B.weight": torch.ones(2, 1)}
    whole = trainers.save(tensors, folder / "whole.safetensors").read_bytes()
    cut = folder / "cut.safetensors"
    cut.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    refused(cut)


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=64), st.booleans())
def test_noise_is_an_error_of_the_user(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes, framed: bool
) -> None:
    path = tmp_path_factory.mktemp("noise") / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(noise)) + noise if framed else noise)
    refused(path)


@pytest.mark.parametrize(
    "header",
    [
        "{}",
        "[]",
        "{" * 2000,
        '{"a": 1}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, "x"]}}',
        '{"unet.x.lora_A.weight": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 0]}}',
        '{"__metadata__": 3}',
    ],
)
def test_damaged_headers(header: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode())
    refused(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_named(value: float, tmp_path: Path, sample: LoRA) -> None:
    tensors = trainers.kohya(sample)
    tensors["lora_unet_conv_in.lora_up.weight"][0, 0] = value
    path = trainers.save(tensors, tmp_path / "bad.safetensors")
    refused(path, "NaN or infinity", "lora_unet_conv_in.lora_up.weight")


@pytest.mark.parametrize(
    ("down", "up", "alpha"),
    [
        ((2, 3), (3, 4), ()),
        ((2, 3), (3, 2, 3, 3), ()),
        ((0, 3), (3, 0), ()),
        ((2, 3), (3, 2), (2,)),
    ],
)
def test_impossible_shapes_are_named(
    down: tuple[int, ...], up: tuple[int, ...], alpha: tuple[int, ...], tmp_path: Path
) -> None:
    tensors = {
        "unet.conv_in.lora_down.weight": torch.ones(down),
        "unet.conv_in.lora_up.weight": torch.ones(up),
        "unet.conv_in.alpha": torch.ones(alpha),
    }
    refused(trainers.save(tensors, tmp_path / "x.safetensors"), "unet.conv_in.lora_down.weight")


def test_integers_are_refused(tmp_path: Path) -> None:
    tensors = {f"unet.x.lora_{s}.weight": torch.ones(2, 2, dtype=torch.int8) for s in "AB"}
    refused(trainers.save(tensors, tmp_path / "x.safetensors"), "int8", "unet.x.lora_A.weight")


def test_leftover_keys_are_counted_and_named(tmp_path: Path, sample: LoRA) -> None:
    tensors = trainers.kohya(sample)
    extra = {f"lora_unet_strange_{i}.lora_up.weight": torch.ones(1) for i in range(5)}
    path = trainers.save(tensors | extra, tmp_path / "x.safetensors")
    total = len(tensors) + 5
    refused(path, f"5 of {total} keys", ", ".join(sorted(extra)) + " (unknown name)")
    with pytest.warns(UserWarning, match=f"5 of {total} keys"):
        assert same_updates(files.read(path, strict=False), sample)


def test_forms_that_need_the_model_are_named(tmp_path: Path) -> None:
    stem = "lora_unet_conv_in"
    tensors = {f"{stem}.hada_w{i}_{s}": torch.ones(2, 2) for i in (1, 2) for s in "ab"}
    path = trainers.save(tensors, tmp_path / "loha.safetensors")
    torch.testing.assert_close(files.read(path).deltas()["unet.conv_in"], torch.full((2, 2), 4.0))
    assert files.describe(path)["forms"] == ["LoHa"]
    path = trainers.save({**tensors, f"{stem}.dora_scale": torch.ones(2, 1)}, path)
    refused(path, "LoHa and DoRA: it depends on the model", f"{stem}.hada_w1_a")
    refused(path, "DoRA", strict=False)


def test_a_file_without_any_lora_says_what_it_holds(tmp_path: Path) -> None:
    path = trainers.save({"some.weight": torch.ones(1)}, tmp_path / "x.safetensors")
    refused(path, "holds no LoRA", "some.weight")
    with pytest.raises(CmloraError, match="holds no LoRA"):
        files.describe(path)
    checkpoint = {"model.diffusion_model.out.2.weight": torch.ones(1)}
    refused(trainers.save(checkpoint, tmp_path / "c.safetensors"), "checkpoint")


@pytest.mark.parametrize(
    "text", ["[", "[]", '{"unet.lora_alpha": "x"}', '{"unet.alpha_pattern": 1}']
)
def test_a_damaged_configuration_is_said(text: str, tmp_path: Path) -> None:
    tensors = {f"unet.x.lora_{s}.weight": torch.ones(2, 2) for s in "AB"}
    path = trainers.save(tensors, tmp_path / "x.safetensors", lora_adapter_metadata=text)
    refused(path, "lora_adapter_metadata")


def test_a_pattern_that_would_run_for_hours_is_refused(tmp_path: Path) -> None:
    tensors = {f"unet.{'a' * 60}.lora_{s}.weight": torch.ones(2, 2) for s in "AB"}
    text = json.dumps({"unet.r": 2, "unet.lora_alpha": 1, "unet.alpha_pattern": {"(a+)+b": 2}})
    refused(trainers.save(tensors, tmp_path / "x.safetensors", lora_adapter_metadata=text))


# ------------------------------------------------------------------ what a file says of itself


def test_description(tmp_path: Path, sample: LoRA) -> None:
    tags = {"10_cat": {"cat": 10, "sofa": 4}, "5_dog": {"cat": 1}}
    path = trainers.save(
        trainers.kohya(sample),
        tmp_path / "sample.safetensors",
        ss_network_module="networks.lora",
        ss_tag_frequency=json.dumps(tags),
        **{"modelspec.trigger_phrase": "sks cat, ohwx", "cmlora.category": "character"},
    )
    found = files.describe(path)
    assert json.loads(json.dumps(found)) == found
    assert found["trainer"] == "kohya (networks.lora)"
    assert found["triggers"] == ["sks cat", "ohwx"] == list(files.triggers(path))
    assert found["category"] == "character"
    assert found["tags"] == {"cat": 11, "sofa": 4}
    assert found["rank"] == [min(trainers.RANKS), max(trainers.RANKS)]
    assert found["alpha"] == [min(trainers.ALPHAS), max(trainers.ALPHAS)]
    assert found["text_encoder"]
    assert sum(found["modules"].values()) == len(sample.updates)
    assert found["leftover"] == {}
    assert found["sha256"] == files.sha256(path)
    assert found["sha256"].startswith(found["autov2"])


def test_autov3_ignores_the_header(tmp_path: Path, sample: LoRA) -> None:
    one = trainers.save(trainers.kohya(sample), tmp_path / "a.safetensors")
    other = trainers.save(trainers.kohya(sample), tmp_path / "b.safetensors", note="n")
    first, second = files.describe(one), files.describe(other)
    assert first["autov3"] == second["autov3"]
    assert first["autov2"] != second["autov2"]


@pytest.mark.parametrize(("width", "family"), [(768, "1.x"), (1024, "2.x"), (2048, "XL")])
def test_family_by_the_width_of_text(width: int, family: str, tmp_path: Path) -> None:
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    lora = LoRA("x", {name: Update(torch.ones(1, width), torch.ones(8, 1))})
    files.write(lora, tmp_path / "x.safetensors")
    assert files.describe(tmp_path / "x.safetensors")["family"] == f"Stable Diffusion {family}"


def test_trigger_metadata_of_a_wrong_type_is_said(tmp_path: Path) -> None:
    tensors: dict[str, Any] = {f"unet.x.lora_{s}.weight": torch.ones(2, 2) for s in "AB"}
    path = trainers.save(tensors, tmp_path / "x.safetensors", **{"cmlora.triggers": "{}"})
    refused(path, "cmlora.triggers")
