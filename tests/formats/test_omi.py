"""OneTrainer's OMI files: the names of the original code, with fused layers apart.

OneTrainer wrote them until July 2026, always for its backups. The lists are its own, with the names
of diffusers on the right; ``~`` marks where it swaps the halves of outputs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cmlora import files, keys
from cmlora.errors import CmloraError
from tests import families, tiny, trainers
from tests.formats.cases import loha, noise

FLUX = """
double_blocks.#.img_attn.qkv.0 = transformer_blocks.#.attn.to_q
double_blocks.#.img_attn.qkv.1 = transformer_blocks.#.attn.to_k
double_blocks.#.img_attn.qkv.2 = transformer_blocks.#.attn.to_v
double_blocks.#.txt_attn.qkv.0 = transformer_blocks.#.attn.add_q_proj
double_blocks.#.txt_attn.qkv.1 = transformer_blocks.#.attn.add_k_proj
double_blocks.#.txt_attn.qkv.2 = transformer_blocks.#.attn.add_v_proj
double_blocks.#.img_attn.proj = transformer_blocks.#.attn.to_out.0
double_blocks.#.img_mlp.0 = transformer_blocks.#.ff.net.0.proj
double_blocks.#.img_mlp.2 = transformer_blocks.#.ff.net.2
double_blocks.#.txt_attn.proj = transformer_blocks.#.attn.to_add_out
double_blocks.#.txt_mlp.0 = transformer_blocks.#.ff_context.net.0.proj
double_blocks.#.txt_mlp.2 = transformer_blocks.#.ff_context.net.2
single_blocks.#.linear1.0 = single_transformer_blocks.#.attn.to_q
single_blocks.#.linear1.1 = single_transformer_blocks.#.attn.to_k
single_blocks.#.linear1.2 = single_transformer_blocks.#.attn.to_v
single_blocks.#.linear1.3 = single_transformer_blocks.#.proj_mlp
single_blocks.#.linear2 = single_transformer_blocks.#.proj_out
txt_in = context_embedder
img_in.proj = x_embedder
final_layer.linear = proj_out
"""

FLUX1 = (
    FLUX
    + """
double_blocks.#.img_mod.lin = transformer_blocks.#.norm1.linear
double_blocks.#.txt_mod.lin = transformer_blocks.#.norm1_context.linear
single_blocks.#.modulation.lin = single_transformer_blocks.#.norm.linear
final_layer.adaLN_modulation.1 = ~norm_out.linear
guidance_in.in_layer = time_text_embed.guidance_embedder.linear_1
guidance_in.out_layer = time_text_embed.guidance_embedder.linear_2
vector_in.in_layer = time_text_embed.text_embedder.linear_1
vector_in.out_layer = time_text_embed.text_embedder.linear_2
time_in.in_layer = time_text_embed.timestep_embedder.linear_1
time_in.out_layer = time_text_embed.timestep_embedder.linear_2
"""
)

CHROMA = (
    FLUX
    + """
distilled_guidance_layer.layers.#.in_layer = distilled_guidance_layer.layers.#.linear_1
distilled_guidance_layer.layers.#.out_layer = distilled_guidance_layer.layers.#.linear_2
"""
)

SD3 = """
joint_blocks.#.x_block.attn.qkv.0 = transformer_blocks.#.attn.to_q
joint_blocks.#.x_block.attn.qkv.1 = transformer_blocks.#.attn.to_k
joint_blocks.#.x_block.attn.qkv.2 = transformer_blocks.#.attn.to_v
joint_blocks.#.context_block.attn.qkv.0 = transformer_blocks.#.attn.add_q_proj
joint_blocks.#.context_block.attn.qkv.1 = transformer_blocks.#.attn.add_k_proj
joint_blocks.#.context_block.attn.qkv.2 = transformer_blocks.#.attn.add_v_proj
joint_blocks.#.x_block.attn.proj = transformer_blocks.#.attn.to_out.0
joint_blocks.#.context_block.attn.proj = transformer_blocks.#.attn.to_add_out
joint_blocks.#.x_block.adaLN_modulation.1 = transformer_blocks.#.norm1.linear
joint_blocks.#.context_block.adaLN_modulation.1 = ~transformer_blocks.#.norm1_context.linear
joint_blocks.#.x_block.mlp.fc1 = transformer_blocks.#.ff.net.0.proj
joint_blocks.#.x_block.mlp.fc2 = transformer_blocks.#.ff.net.2
joint_blocks.#.context_block.mlp.fc1 = transformer_blocks.#.ff_context.net.0.proj
joint_blocks.#.context_block.mlp.fc2 = transformer_blocks.#.ff_context.net.2
joint_blocks.#.x_block.attn2.qkv.0 = transformer_blocks.#.attn2.to_q
joint_blocks.#.x_block.attn2.qkv.1 = transformer_blocks.#.attn2.to_k
joint_blocks.#.x_block.attn2.qkv.2 = transformer_blocks.#.attn2.to_v
joint_blocks.#.x_block.attn2.proj = transformer_blocks.#.attn2.to_out.0
x_embedder.proj = pos_embed.proj
context_embedder = context_embedder
final_layer.adaLN_modulation.1 = ~norm_out.linear
final_layer.linear = proj_out
t_embedder.mlp.0 = time_text_embed.timestep_embedder.linear_1
t_embedder.mlp.2 = time_text_embed.timestep_embedder.linear_2
y_embedder.mlp.0 = time_text_embed.text_embedder.linear_1
y_embedder.mlp.2 = time_text_embed.text_embedder.linear_2
"""

PIXART = """
ar_embedder.mlp.0 = adaln_single.emb.aspect_ratio_embedder.linear_1
ar_embedder.mlp.2 = adaln_single.emb.aspect_ratio_embedder.linear_2
csize_embedder.mlp.0 = adaln_single.emb.resolution_embedder.linear_1
csize_embedder.mlp.2 = adaln_single.emb.resolution_embedder.linear_2
y_embedder.y_proj.fc1 = caption_projection.linear_1
y_embedder.y_proj.fc2 = caption_projection.linear_2
x_embedder.proj = pos_embed.proj
t_embedder.mlp.0 = adaln_single.emb.timestep_embedder.linear_1
t_embedder.mlp.2 = adaln_single.emb.timestep_embedder.linear_2
t_block.1 = adaln_single.linear
final_layer.linear = proj_out
blocks.#.attn.qkv.0 = transformer_blocks.#.attn1.to_q
blocks.#.attn.qkv.1 = transformer_blocks.#.attn1.to_k
blocks.#.attn.qkv.2 = transformer_blocks.#.attn1.to_v
blocks.#.attn.proj = transformer_blocks.#.attn1.to_out.0
blocks.#.cross_attn.q_linear = transformer_blocks.#.attn2.to_q
blocks.#.cross_attn.kv_linear.0 = transformer_blocks.#.attn2.to_k
blocks.#.cross_attn.kv_linear.1 = transformer_blocks.#.attn2.to_v
blocks.#.cross_attn.proj = transformer_blocks.#.attn2.to_out.0
blocks.#.mlp.fc1 = transformer_blocks.#.ff.net.0.proj
blocks.#.mlp.fc2 = transformer_blocks.#.ff.net.2
"""

_REFINER = "txt_in.individual_token_refiner.blocks.#"
_REFINED = "context_embedder.token_refiner.refiner_blocks.#"
HUNYUAN = f"""
{_REFINER}.self_attn_qkv.0 = {_REFINED}.attn.to_q
{_REFINER}.self_attn_qkv.1 = {_REFINED}.attn.to_k
{_REFINER}.self_attn_qkv.2 = {_REFINED}.attn.to_v
{_REFINER}.self_attn_proj = {_REFINED}.attn.to_out.0
{_REFINER}.mlp.fc0 = {_REFINED}.ff.net.0.proj
{_REFINER}.mlp.fc2 = {_REFINED}.ff.net.2
{_REFINER}.adaLN_modulation.1 = {_REFINED}.norm_out.linear
double_blocks.#.img_attn_qkv.0 = transformer_blocks.#.attn.to_q
double_blocks.#.img_attn_qkv.1 = transformer_blocks.#.attn.to_k
double_blocks.#.img_attn_qkv.2 = transformer_blocks.#.attn.to_v
double_blocks.#.txt_attn_qkv.0 = transformer_blocks.#.attn.add_q_proj
double_blocks.#.txt_attn_qkv.1 = transformer_blocks.#.attn.add_k_proj
double_blocks.#.txt_attn_qkv.2 = transformer_blocks.#.attn.add_v_proj
double_blocks.#.img_attn_proj = transformer_blocks.#.attn.to_out.0
double_blocks.#.img_mlp.fc0 = transformer_blocks.#.ff.net.0.proj
double_blocks.#.img_mlp.fc2 = transformer_blocks.#.ff.net.2
double_blocks.#.img_mod.linear = transformer_blocks.#.norm1.linear
double_blocks.#.txt_attn_proj = transformer_blocks.#.attn.to_add_out
double_blocks.#.txt_mlp.fc0 = transformer_blocks.#.ff_context.net.0.proj
double_blocks.#.txt_mlp.fc2 = transformer_blocks.#.ff_context.net.2
double_blocks.#.txt_mod.linear = transformer_blocks.#.norm1_context.linear
single_blocks.#.linear1.0 = single_transformer_blocks.#.attn.to_q
single_blocks.#.linear1.1 = single_transformer_blocks.#.attn.to_k
single_blocks.#.linear1.2 = single_transformer_blocks.#.attn.to_v
single_blocks.#.linear1.3 = single_transformer_blocks.#.proj_mlp
single_blocks.#.linear2 = single_transformer_blocks.#.proj_out
single_blocks.#.modulation.linear = single_transformer_blocks.#.norm.linear
txt_in.c_embedder.linear_1 = context_embedder.time_text_embed.text_embedder.linear_1
txt_in.c_embedder.linear_2 = context_embedder.time_text_embed.text_embedder.linear_2
txt_in.t_embedder.linear_1 = context_embedder.time_text_embed.timestep_embedder.linear_1
txt_in.t_embedder.linear_2 = context_embedder.time_text_embed.timestep_embedder.linear_2
txt_in.input_embedder = context_embedder.proj_in
final_layer.adaLN_modulation.1 = ~norm_out.linear
final_layer.linear = proj_out
guidance_in.mlp.0 = time_text_embed.guidance_embedder.linear_1
guidance_in.mlp.2 = time_text_embed.guidance_embedder.linear_2
vector_in.in_layer = time_text_embed.text_embedder.linear_1
vector_in.out_layer = time_text_embed.text_embedder.linear_2
time_in.mlp.0 = time_text_embed.timestep_embedder.linear_1
time_in.mlp.2 = time_text_embed.timestep_embedder.linear_2
img_in.proj = x_embedder.proj
"""

FAMILIES = {
    "FLUX.1": FLUX1,
    "Chroma": CHROMA,
    "Stable Diffusion 3": SD3,
    "PixArt": PIXART,
    "HunyuanVideo": HUNYUAN,
}

Pairs = dict[str, tuple[str, bool]]


def pairs(text: str, blocks: int = 1) -> Pairs:
    """OMI names of all blocks: diffusers' name, and whether halves are swapped."""
    found: Pairs = {}
    for line in filter(None, text.splitlines()):
        name, _, ours = line.partition(" = ")
        for number in range(blocks if "#" in name else 1):
            each = ours.removeprefix("~").replace("#", str(number))
            found[name.replace("#", str(number))] = each, ours.startswith("~")
    return found


def lora(stem: str, outputs: int, inputs: int) -> dict[str, Tensor]:
    return {
        f"{stem}.lora_down.weight": noise(2, inputs),
        f"{stem}.lora_up.weight": noise(outputs, 2),
        f"{stem}.alpha": torch.tensor(1.0),
    }


def swap(tensor: Tensor) -> Tensor:
    first, second = tensor.chunk(2)
    return torch.cat([second, first])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_name_of_onetrainer_is_understood(family: str, tmp_path: Path) -> None:
    names = pairs(FAMILIES[family], blocks=2)
    torch.manual_seed(0)
    stored: dict[str, Tensor] = {}
    for name, (_, swapped) in names.items():
        stored |= lora(f"transformer.{name}", 16 if swapped else 8, 8)
    path = trainers.save(stored, tmp_path / "x.safetensors", ot_branch="master")
    read = files.read(path)
    assert set(read.updates) == {f"transformer.{ours}" for ours, _ in names.values()}
    for name, (ours, swapped) in names.items():
        up, down = (stored[f"transformer.{name}.lora_{side}.weight"] for side in ("up", "down"))
        delta = 0.5 * up @ down
        found = read.updates[f"transformer.{ours}"].delta()
        torch.testing.assert_close(found, swap(delta) if swapped else delta)
    told = files.describe(path)
    assert (told["family"], told["trainer"], told["leftover"]) == (family, "OneTrainer", {})


@pytest.mark.parametrize(
    ("make", "text"), [(families.flux, FLUX1), (families.sd3, SD3), (families.pixart, PIXART)]
)
def test_they_are_the_layers_of_the_legacy_names(make: Any, text: str, tmp_path: Path) -> None:
    pipe = make().pipe
    names = {ours: (name, swapped) for name, (ours, swapped) in pairs(text, blocks=4).items()}
    omi: dict[str, Tensor] = {}
    legacy: dict[str, Tensor] = {}
    layers = [n for n, m in pipe.transformer.named_modules() if isinstance(m, nn.Linear)]
    torch.manual_seed(0)
    for module in layers:
        name, swapped = names[module]
        rows, columns = pipe.transformer.get_submodule(module).weight.shape
        made = lora("", rows, columns)
        flat = f"lora_transformer_{module.replace('.', '_')}"
        legacy |= {f"{flat}{end}": tensor for end, tensor in made.items()}
        if swapped and rows == 2 * columns:  # not where there are gates, before the last block
            made[".lora_up.weight"] = swap(made[".lora_up.weight"])
        omi |= {f"transformer.{name}{end}": tensor for end, tensor in made.items()}
    path = trainers.save(omi, tmp_path / "omi.safetensors")
    ours = files.read(path).updates
    theirs = files.read(trainers.save(legacy, tmp_path / "legacy.safetensors")).updates
    assert list(ours) == list(theirs)
    assert len(ours) == len(layers)
    for module, update in ours.items():
        assert torch.equal(update.delta(), theirs[module].delta()), module
    assert files.load(pipe, path, "x").modules == len(layers)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_unets_have_their_first_names(name: str) -> None:
    pipe = getattr(tiny, name)(**tiny.WHOLE)
    rename = trainers.ldm_names(pipe.unet)
    wanted = trainers.lora(pipe).updates
    encoders = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
    stored = []
    for full in wanted:
        component, _, module = full.partition(".")
        stem = (
            f"unet.{rename[module]}" if component == "unet" else f"{encoders[component]}.{module}"
        )
        stored += [f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"]
    found = keys.layout(stored)
    assert not found.leftover
    assert set(found.modules) == set(wanted)


CLIP, T5 = "text_model.encoder.layers.0.mlp.fc1", "encoder.block.0.layer.0.SelfAttention.q"


@pytest.mark.parametrize(
    ("layer", "encoder", "module"),
    [
        ("double_blocks.0.img_attn.qkv.0", f"clip_l.{CLIP}", f"text_encoder.{CLIP}"),
        ("double_blocks.0.img_attn.qkv.0", f"t5.{T5}", f"text_encoder_2.{T5}"),
        ("joint_blocks.0.x_block.mlp.fc1", f"clip_l.{CLIP}", f"text_encoder.{CLIP}"),
        ("joint_blocks.0.x_block.mlp.fc1", f"clip_g.{CLIP}", f"text_encoder_2.{CLIP}"),
        ("joint_blocks.0.x_block.mlp.fc1", f"t5.{T5}", f"text_encoder_3.{T5}"),
        ("double_stream_blocks.0.block.attn1.to_q", f"t5.{T5}", f"text_encoder_3.{T5}"),
        ("distilled_guidance_layer.layers.0.in_layer", f"t5.{T5}", f"text_encoder.{T5}"),
        ("blocks.0.attn.qkv.0", f"t5.{T5}", f"text_encoder.{T5}"),
        ("double_blocks.0.img_attn_qkv.0", f"clip_l.{CLIP}", f"text_encoder_2.{CLIP}"),
        ("double_blocks.0.img_attn_qkv.0", f"llama.{CLIP}", None),
        ("double_stream_blocks.0.block.attn1.to_q", f"llama.{CLIP}", None),
    ],
)
def test_text_encoders_have_the_place_of_their_family(
    layer: str, encoder: str, module: str | None
) -> None:
    stems = (f"transformer.{layer}", encoder)
    found = keys.layout(f"{stem}.lora_{side}.weight" for stem in stems for side in ("down", "up"))
    assert len(found.modules) == (2 if module else 1)
    assert module is None or module in found.modules
    assert module is not None or all(key.startswith("llama.") for key in found.leftover)


def test_halves_are_swapped_in_loras_only(tmp_path: Path) -> None:
    torch.manual_seed(0)
    stored = {
        f"transformer.final_layer.adaLN_modulation.1.{k}": t for k, t in loha((16, 8)).items()
    }
    key = "transformer.norm_out.linear"
    plain = files.read(trainers.save(stored, tmp_path / "x.safetensors")).updates
    assert list(plain) == ["transformer.final_layer.adaLN_modulation.1"]  # of no family yet
    marked = stored | {
        f"transformer.double_blocks.0.img_attn.qkv.0.{k}": t for k, t in loha((8, 8)).items()
    }
    omi = files.read(trainers.save(marked, tmp_path / "y.safetensors")).updates
    torch.testing.assert_close(omi[key].delta(), next(iter(plain.values())).delta())
    original = stored | {
        f"transformer.double_blocks.0.img_attn.qkv.{k}": t for k, t in loha((24, 8)).items()
    }
    other = files.read(trainers.save(original, tmp_path / "z.safetensors")).updates
    torch.testing.assert_close(other[key].delta(), swap(omi[key].delta()))


@pytest.mark.parametrize(
    ("known", "unknown"),
    [
        ("double_blocks.0.img_attn.qkv", "double_blocks.0.img_attn.qkv.7"),
        ("double_blocks.0.img_attn.qkv", "single_blocks.0.linear3"),
        ("double_blocks.0.img_attn.qkv", "final_layer.surprise"),
        ("joint_blocks.0.x_block.attn.proj", "joint_blocks.0.x_block.attn.surprise"),
        ("double_layers.0.attn.w1q", "double_layers.0.surprise"),
        ("blocks.0.self_attn.q", "blocks.0.self_attn.surprise"),
    ],
)
@pytest.mark.parametrize("prefix", ["transformer.", "diffusion_model.", "base_model.model.", ""])
def test_original_names_without_translation_are_left_over(
    prefix: str, known: str, unknown: str, tmp_path: Path
) -> None:
    stored = lora(f"{prefix}{known}", 24, 8) | lora(f"{prefix}{unknown}", 8, 8)
    path = trainers.save(stored, tmp_path / "x.safetensors")
    told = files.describe(path)
    assert set(told["leftover"]) == {key for key in stored if key.startswith(f"{prefix}{unknown}.")}
    assert told["use"]["refused"] == 3
    with pytest.raises(CmloraError, match=r"3 of 6 keys left over: .*lora_down"):
        files.read(path)
