"""Whatever a LoRA file holds, reading it gives a LoRA or one line for the user."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cmlora import files, keys
from cmlora.errors import CmloraError
from tests import trainers
from tests.formats.cases import CASES

ENDS = [
    *sorted({end for case in CASES.values() for end in case.make((4, 4))}),
    "lora_A.weight",
    "lora_B.weight",
    "lora_magnitude_vector.weight",
    "oft_R.weight",
    "boft_R",
    "boft_s",
    "miss_block",
    "ia3_l",
    "w_norm",
    "b_norm",
    "bm.weight",
    "lokr_t2",
    "hada_t1",
    "lora_mid.weight",
    "weight",
    "scale",
]
STEMS = [
    "lora_unet_mid_block_attentions_0_proj_in",
    "unet.mid_block.resnets.0.conv1",
    "lora_unet_double_blocks_0_img_attn_qkv",
    "diffusion_model.single_blocks.0.linear1",
    "diffusion_model.final_layer.adaLN_modulation.1",
    "lora_te_text_model_encoder_layers_0_mlp_fc1",
    "double_blocks.0.img_attn.norm.query_norm",
    "joint_blocks.0.x_block.attn.qkv",
]
shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
tensors = st.dictionaries(
    st.tuples(st.sampled_from(STEMS), st.sampled_from(ENDS)), shapes, min_size=1, max_size=8
)
patient = settings(deadline=None, max_examples=150)


class Config(dict[str, int]):
    """Settings that are read as attributes and as a table, as diffusers has them."""

    def __getattr__(self, name: str) -> int:
        if name not in self:
            raise AttributeError(name)
        return self[name]


class Model(nn.Module):
    """Layers with the names of some of the stems."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        proj, norm = nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4)
        self.mid_block = nn.Module()
        self.mid_block.attentions = nn.ModuleList([nn.ModuleDict({"proj_in": proj, "norm": norm})])
        self.mid_block.resnets = nn.ModuleList([nn.ModuleDict({"conv1": nn.Conv2d(4, 4, 3)})])
        self.config = Config(cross_attention_dim=768, layers_per_block=2)


def pipe() -> Any:
    return SimpleNamespace(unet=Model(), text_encoder=None)


def one_line(error: CmloraError) -> None:
    assert "\n" not in str(error)
    assert str(error)


def try_all(path: Path) -> None:
    """Everything that opens a file, with nothing but errors for the user allowed."""
    for act in (
        lambda: files.read(path),
        lambda: files.describe(path),
        lambda: files.load(pipe(), path, "x"),
        lambda: files.convert(path, pipe(), rank=1),
    ):
        try:
            act()
        except CmloraError as error:
            one_line(error)


@patient
@given(tensors, st.floats(-2, 2), st.sampled_from([torch.float32, torch.float16, torch.int8]))
def test_any_tensors_under_known_names(
    tmp_path_factory: pytest.TempPathFactory,
    found: dict[tuple[str, str], tuple[int, ...]],
    value: float,
    dtype: torch.dtype,
) -> None:
    stored = {
        f"{stem}.{end}": torch.full(shape, value).to(dtype) for (stem, end), shape in found.items()
    }
    try_all(trainers.save(stored, tmp_path_factory.mktemp("any") / "x.safetensors"))


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(sorted(CASES)), st.data())
def test_a_form_with_something_wrong(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    torch.manual_seed(0)
    stored = CASES[name].make((4, 4, 1, 1))
    key = data.draw(st.sampled_from(sorted(stored)))
    kind = data.draw(st.sampled_from(["gone", "shape", "nan", "zero", "huge"]))
    if kind == "gone":
        del stored[key]
    elif kind == "shape":
        stored[key] = torch.ones(data.draw(shapes))
    else:
        filler = {"nan": torch.nan, "zero": 0.0, "huge": 1e38}[kind]
        if stored[key].is_floating_point():
            stored[key] = torch.full_like(stored[key], filler)
    stem = "lora_unet_mid_block_attentions_0_proj_in"
    full = {f"{stem}.{end}": tensor for end, tensor in stored.items()}
    try_all(trainers.save(full, tmp_path_factory.mktemp("form") / "x.safetensors"))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=5,
)
OPTIONS = (
    "peft_type",
    "r",
    "alpha",
    "lora_alpha",
    "alpha_pattern",
    "use_rslora",
    "coft",
    "eps",
    "use_cayley_neumann",
    "num_cayley_neumann_terms",
    "feedforward_modules",
)


@patient
@given(
    st.dictionaries(st.sampled_from([*OPTIONS, *(f"unet.{o}" for o in OPTIONS)]), json_values),
    st.sampled_from(["lora", "loha", "lokr", "oft_R.weight", "ia3_l"]),
    json_values,
)
def test_any_settings_in_the_header(
    tmp_path_factory: pytest.TempPathFactory, settings_: dict[str, Any], form: str, scale: Any
) -> None:
    stem = "unet.mid_block.attentions.0.proj_in"
    torch.manual_seed(0)
    held = {"oft_R.weight": torch.ones(1, 6), "ia3_l": torch.ones(1, 4, 1, 1)}
    made: dict[str, Tensor] = {form: held[form]} if form in held else CASES[form].make((4, 4, 1, 1))
    made.pop("alpha", None)
    path = tmp_path_factory.mktemp("header") / "x.safetensors"
    trainers.save(
        {f"{stem}.{end}": tensor for end, tensor in made.items()},
        path,
        lora_adapter_metadata=json.dumps(settings_),
        ss_tag_frequency=json.dumps(scale),
        **{"cmlora.scales": json.dumps({stem: scale}), "cmlora.triggers": json.dumps(scale)},
    )
    try_all(path)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.text(st.characters(codec="ascii"), max_size=40), max_size=4))
def test_any_names_are_sorted(names: list[str]) -> None:
    glued = [f"{stem}{name}.{end}" for name in names for stem in STEMS[:3] for end in ENDS[:4]]
    found = keys.layout([*names, *glued])
    held = {key for roles in found.modules.values() for key in roles.values()}
    assert held | set(found.leftover) == {*names, *glued}
    assert not held & set(found.leftover)


def write_header(path: Path, table: Any, data: bytes) -> Path:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def places(table: Any) -> list[tuple[Any, Any]]:
    """Every table or list of a JSON value, with each key that it has."""
    found: list[tuple[Any, Any]] = []
    items = table.items() if isinstance(table, dict) else enumerate(table)
    for key, value in items:
        found.append((table, key))
        if isinstance(value, dict | list):
            found += places(value)
    return found


LAYER = "unet.mid_block.attentions.0.proj_in"
ALPHA = '{"unet.r": 1, "unet.lora_alpha": %s}'


def a_file(folder: Path, kind: str = "F32", **metadata: str) -> tuple[dict[str, Any], Path]:
    """The header of a small LoRA, and where its file is."""
    table: dict[str, Any] = {
        f"{LAYER}.lora_A.weight": {"dtype": kind, "shape": [1, 4], "data_offsets": [0, 16]},
        f"{LAYER}.lora_B.weight": {"dtype": kind, "shape": [4, 1], "data_offsets": [16, 32]},
    }
    if metadata:
        table["__metadata__"] = metadata
    return table, write_header(folder / "x.safetensors", table, struct.pack("<8f", *range(8)))


def said(path: Path) -> str:
    """The one line in which reading and describing a file say what is wrong."""
    found = []
    for act in (files.read, files.describe):
        with pytest.raises(CmloraError) as caught:
            act(path)
        one_line(caught.value)
        found.append(str(caught.value))
    assert found[0] == found[1]
    return found[0]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ('{"dtype":"F32","shape":[Infinity],"data_offsets":[0,0]}', "shape of 'a' in the header"),
        ('{"dtype":"F32","shape":[1.5],"data_offsets":[0,0]}', "is [1.5], not whole numbers"),
        ('{"dtype":"F32","shape":[1],"data_offsets":[0,1e999]}', "is [0, inf], not two whole num"),
        (
            '{"dtype":"F32","shape":[1],"data_offsets":[]}',
            "data_offsets of 'a' in the header is []",
        ),
        ('{"dtype":"F32","shape":[1]}', "data_offsets of 'a' in the header is None"),
        ("3", "shape of 'a' in the header is None"),
    ],
)
def test_an_impossible_entry_of_the_header_is_named(entry: str, words: str, tmp_path: Path) -> None:
    path = write_header(tmp_path / "x.safetensors", b'{"a":' + entry.encode() + b"}", b"1234")
    message = said(path)
    assert message.startswith(f"{path}: ")
    assert words in message
    assert message.endswith("; copy or download it again")


@pytest.mark.parametrize("kind", ["F4", "F6_E2M3", "F8_E8M0"])
def test_a_type_that_is_not_read_is_named(kind: str, tmp_path: Path) -> None:
    table, path = a_file(tmp_path, kind)
    size = {"F4": 2, "F6_E2M3": 3, "F8_E8M0": 4}[kind]
    for number, entry in enumerate(table.values()):
        entry["data_offsets"] = [number * size, (number + 1) * size]
    write_header(path, table, bytes(2 * size))
    message = said(path)
    assert f"{LAYER}.lora_A.weight holds numbers of type {kind}" in message
    assert "BF16" in message


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"lora_adapter_metadata": ALPHA % f"1{'0' * 400}"}, "unet.lora_alpha is 1000"),
        ({"lora_adapter_metadata": ALPHA % f"1{'0' * 5000}"}, "no table in JSON"),
        ({"lora_adapter_metadata": ALPHA % "null"}, "unet.lora_alpha is None, not a number"),
        ({"cmlora.scales": json.dumps({LAYER: 10**400})}, "cmlora.scales in the header says 1000"),
        ({"cmlora.scales": json.dumps({LAYER: [1]})}, "cmlora.scales in the header says [1]"),
    ],
)
def test_an_impossible_strength_is_named(
    metadata: dict[str, str], words: str, tmp_path: Path
) -> None:
    message = said(a_file(tmp_path, **metadata)[1])
    assert words in message
    assert "download" in message


def test_a_name_with_line_breaks_is_one_line(tmp_path: Path) -> None:
    table, path = a_file(tmp_path)
    table["a\nb.lora_A.weight"] = table.pop(f"{LAYER}.lora_A.weight")
    assert "'a\\nb.lora_A.weight'" in said(write_header(path, table, bytes(32)))


@pytest.mark.parametrize("name", ["a\0b.safetensors", "a\ud800b.safetensors"])
def test_a_path_that_cannot_be_is_named(name: str, tmp_path: Path) -> None:
    message = said(tmp_path / name)
    assert repr(name).strip("'") in message
    with pytest.raises(CmloraError, match="cannot be the name of a file"):
        files.triggers(tmp_path / name)
    with pytest.raises(CmloraError, match="cannot be the name of a file"):
        files.sha256(tmp_path / name)


@settings(deadline=None, max_examples=200)
@given(
    st.data(),
    json_values | st.sampled_from([10**400, 1e308 * 10, "F4", "F8_E8M0", "\ud800", "[" * 5000]),
)
def test_any_value_anywhere_in_the_header(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, value: Any
) -> None:
    metadata = {"lora_adapter_metadata": ALPHA % 2, "cmlora.scales": f'{{"{LAYER}": 2.0}}'}
    table, path = a_file(tmp_path_factory.mktemp("mutated"), **metadata)
    parent, key = data.draw(st.sampled_from(places(table)))
    parent[key] = value
    try_all(write_header(path, table, struct.pack("<8f", *range(8))))


@pytest.mark.filterwarnings("ignore:.*strength is not known")
@settings(deadline=None, max_examples=150)
@given(st.data(), json_values | st.sampled_from([10**400, 1e308 * 10, "(a+)+b"]))
def test_any_value_beside_a_file_of_pefts(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, value: Any
) -> None:
    folder = tmp_path_factory.mktemp("beside")
    stem = "base_model.model.mid_block.attentions.0.proj_in"
    stored = {f"{stem}.lora_{side}.weight": torch.ones(4, 4) for side in "AB"}
    table: dict[str, Any] = {
        **{"r": 4, "lora_alpha": 2, "use_rslora": False, "peft_type": "LORA", "eps": 1e-5},
        **{"alpha_pattern": {"proj_in": 3}, "rank_pattern": {"proj_out": 8}},
    }
    parent, key = data.draw(st.sampled_from(places(table)))
    parent[key] = value
    (folder / "adapter_config.json").write_text(json.dumps(table))
    try_all(trainers.save(stored, folder / "adapter_model.safetensors"))


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_a_flipped_byte(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    torch.manual_seed(0)
    stem = "unet.mid_block.attentions.0.proj_in"
    stored = {f"{stem}.{end}": t for end, t in CASES["dora_loha"].make((4, 4, 1, 1)).items()}
    path = tmp_path_factory.mktemp("flip") / "x.safetensors"
    whole = bytearray(trainers.save(stored, path).read_bytes())
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    place = data.draw(st.integers(0, header - 1) | st.integers(0, len(whole) - 1))
    whole[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(whole)
    try_all(path)
