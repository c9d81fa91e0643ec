"""Original module names, against diffusers' converters of whole checkpoints.

Those converters know where every row of every original matrix goes. A LoRA's up factors are put
through them as if they were the matrices; reading the LoRA must give the same rows.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_utils as upstream
from torch import Tensor

from cmlora import files, keys
from cmlora.errors import CmloraError
from tests import trainers

Shapes = dict[str, tuple[int, int]]


def flux(h: int = 3072) -> tuple[Shapes, dict[str, Tensor]]:
    found = {
        "img_in": (h, 64),
        "txt_in": (h, 96),
        "final_layer.linear": (64, h),
        "final_layer.adaLN_modulation.1": (2 * h, h),
    }
    for name in ("time_in", "vector_in", "guidance_in"):
        found |= {f"{name}.in_layer": (h, 32), f"{name}.out_layer": (h, h)}
    others = {}
    for block in range(2):
        for side in ("img", "txt"):
            stem = f"double_blocks.{block}.{side}"
            found |= {
                f"{stem}_mod.lin": (6 * h, h),
                f"{stem}_attn.qkv": (3 * h, h),
                f"{stem}_attn.proj": (h, h),
                f"{stem}_mlp.0": (4 * h, h),
                f"{stem}_mlp.2": (h, 4 * h),
            }
            for norm in ("query", "key"):
                others[f"{stem}_attn.norm.{norm}_norm.scale"] = torch.ones(8)
        stem = f"single_blocks.{block}"
        found |= {
            f"{stem}.linear1": (7 * h, h),
            f"{stem}.linear2": (h, 5 * h),
            f"{stem}.modulation.lin": (3 * h, h),
        }
        for norm in ("query", "key"):
            others[f"{stem}.norm.{norm}_norm.scale"] = torch.ones(8)
    return found, others


def flux2(h: int = 16) -> tuple[Shapes, dict[str, Tensor]]:
    found = {"img_in": (h, 64), "txt_in": (h, 96), "final_layer.linear": (64, h)}
    found["final_layer.adaLN_modulation.1"] = (2 * h, h)
    for name in ("time_in", "guidance_in"):
        found |= {f"{name}.in_layer": (h, 32), f"{name}.out_layer": (h, h)}
    for side in ("img", "txt"):
        found[f"double_stream_modulation_{side}.lin"] = (6 * h, h)
        stem = f"double_blocks.0.{side}"
        found |= {
            f"{stem}_attn.qkv": (3 * h, h),
            f"{stem}_attn.proj": (h, h),
            f"{stem}_mlp.0": (6 * h, h),
            f"{stem}_mlp.2": (h, 3 * h),
        }
    found["single_stream_modulation.lin"] = (3 * h, h)
    found |= {"single_blocks.0.linear1": (9 * h, h), "single_blocks.0.linear2": (h, 4 * h)}
    return found, {}


def sd3(h: int = 16) -> tuple[Shapes, dict[str, Tensor]]:
    found = {
        "context_embedder": (h, 24),
        "final_layer.linear": (12, h),
        "final_layer.adaLN_modulation.1": (2 * h, h),
    }
    for name in ("t_embedder", "y_embedder"):
        found |= {f"{name}.mlp.0": (h, 20), f"{name}.mlp.2": (h, h)}
    for block in range(2):
        for side in ("x_block", "context_block"):
            stem, last = f"joint_blocks.{block}.{side}", block == 1 and side == "context_block"
            found[f"{stem}.attn.qkv"] = (3 * h, h)
            found[f"{stem}.adaLN_modulation.1"] = (2 * h if last else 6 * h, h)
            if not last:
                found |= {
                    f"{stem}.attn.proj": (h, h),
                    f"{stem}.mlp.fc1": (4 * h, h),
                    f"{stem}.mlp.fc2": (h, 4 * h),
                }
    found |= {"joint_blocks.0.x_block.attn2.qkv": (3 * h, h)}
    found |= {"joint_blocks.0.x_block.attn2.proj": (h, h)}
    others = {
        "pos_embed": torch.ones(1, 4, h),
        "x_embedder.proj.weight": torch.ones(h, 4, 2, 2),
        "x_embedder.proj.bias": torch.ones(h),
    }
    return found, others


def wan(h: int = 16) -> tuple[Shapes, dict[str, Tensor]]:
    found = {
        "text_embedding.0": (h, 24),
        "text_embedding.2": (h, h),
        "time_embedding.0": (h, 8),
        "time_embedding.2": (h, h),
        "time_projection.1": (6 * h, h),
        "img_emb.proj.1": (h, h),
        "img_emb.proj.3": (h, h),
        "head.head": (64, h),
        "blocks.0.ffn.0": (4 * h, h),
        "blocks.0.ffn.2": (h, 4 * h),
    }
    for attention in ("self_attn", "cross_attn"):
        found |= {f"blocks.0.{attention}.{name}": (h, h) for name in "qkvo"}
    found |= {f"blocks.0.cross_attn.{name}_img": (h, h) for name in "kv"}
    return found, {}


def z_image(h: int = 16) -> tuple[Shapes, dict[str, Tensor]]:
    found = {"x_embedder": (h, 64), "final_layer.linear": (64, h)}
    for stack in ("layers", "noise_refiner", "context_refiner"):
        found |= {
            f"{stack}.0.attention.qkv": (3 * h, h),
            f"{stack}.0.attention.out": (h, h),
            f"{stack}.0.feed_forward.w1": (3 * h, h),
        }
    return found, {}


def hunyuan(h: int = 3072) -> tuple[Shapes, dict[str, Tensor]]:
    found = {"final_layer.linear": (64, h), "final_layer.adaLN_modulation.1": (2 * h, h)}
    for side in ("img", "txt"):
        stem = f"double_blocks.0.{side}"
        found |= {
            f"{stem}_mod.linear": (6 * h, h),
            f"{stem}_attn_qkv": (3 * h, h),
            f"{stem}_attn_proj": (h, h),
            f"{stem}_mlp.fc1": (4 * h, h),
            f"{stem}_mlp.fc2": (h, 4 * h),
        }
    found |= {
        "single_blocks.0.linear1": (7 * h, h),
        "single_blocks.0.linear2": (h, 5 * h),
        "single_blocks.0.modulation.linear": (3 * h, h),
    }
    stem = "txt_in.individual_token_refiner.blocks.1"
    found |= {
        f"{stem}.self_attn_qkv": (3 * h, h),
        f"{stem}.self_attn_proj": (h, h),
        f"{stem}.mlp.fc1": (4 * h, h),
        f"{stem}.mlp.fc2": (h, 4 * h),
        f"{stem}.adaLN_modulation.1": (2 * h, h),
        "txt_in.input_embedder": (h, 64),
        "txt_in.t_embedder.mlp.0": (h, 64),
        "txt_in.c_embedder.linear_2": (h, h),
    }
    return found, {}


def chroma(h: int = 3072) -> tuple[Shapes, dict[str, Tensor]]:
    found, others = flux(h)
    left_out = ("_mod.lin", "modulation", "time_in", "vector_in", "guidance_in")
    found = {name: shape for name, shape in found.items() if not any(m in name for m in left_out)}
    guide = "distilled_guidance_layer"
    found |= {f"{guide}.in_proj": (32, 8), f"{guide}.out_proj": (h, 32)}
    for layer in range(2):
        found |= {
            f"{guide}.layers.{layer}.in_layer": (32, 32),
            f"{guide}.layers.{layer}.out_layer": (32, 32),
        }
        others[f"{guide}.norms.{layer}.scale"] = torch.ones(8)
    return found, others


def lumina2(h: int = 2304, kv: int = 768) -> tuple[Shapes, dict[str, Tensor]]:
    found = {
        "x_embedder": (h, 64),
        "cap_embedder.1": (h, 32),
        "t_embedder.mlp.0": (32, 16),
        "t_embedder.mlp.2": (32, 32),
        "final_layer.linear": (64, h),
        "final_layer.adaLN_modulation.1": (h, 32),
    }
    for stack in ("layers", "noise_refiner", "context_refiner"):
        found |= {
            f"{stack}.1.attention.qkv": (h + 2 * kv, h),
            f"{stack}.1.attention.out": (h, h),
            f"{stack}.1.feed_forward.w1": (4 * h, h),
            f"{stack}.1.feed_forward.w2": (h, 4 * h),
            f"{stack}.1.feed_forward.w3": (4 * h, h),
        }
        if stack != "context_refiner":
            found[f"{stack}.1.adaLN_modulation.1"] = (4 * h, 32)
    return found, {}


def ltx(h: int = 16) -> tuple[Shapes, dict[str, Tensor]]:
    found = {
        "patchify_proj": (h, 8),
        "adaln_single.emb.timestep_embedder.linear_1": (h, 8),
        "adaln_single.emb.timestep_embedder.linear_2": (h, h),
        "adaln_single.linear": (6 * h, h),
        "caption_projection.linear_1": (h, 24),
        "proj_out": (8, h),
        "transformer_blocks.0.ff.net.0.proj": (4 * h, h),
    }
    for number in (1, 2):
        stem = f"transformer_blocks.0.attn{number}"
        found |= {f"{stem}.to_q": (h, h), f"{stem}.to_out.0": (h, h)}
    return found, {}


def aura_flow(h: int = 16) -> tuple[Shapes, dict[str, Tensor]]:
    found = {
        "init_x_linear": (h, 8),
        "cond_seq_linear": (h, 24),
        "t_embedder.mlp.0": (h, 8),
        "t_embedder.mlp.2": (h, h),
        "final_linear": (8, h),
        "modF.1": (2 * h, h),
        "single_layers.0.modCX.1": (6 * h, h),
    }
    for stem in ("double_layers.0.mlpX", "double_layers.0.mlpC", "single_layers.0.mlp"):
        found |= {
            f"{stem}.c_fc1": (2 * h, h),
            f"{stem}.c_fc2": (2 * h, h),
            f"{stem}.c_proj": (h, 2 * h),
        }
    for side in "XC":
        found[f"double_layers.0.mod{side}.1"] = (6 * h, h)
    for letter in "qkvo":
        found |= {f"double_layers.0.attn.w{side}{letter}": (h, h) for side in (1, 2)}
        found[f"single_layers.0.attn.w1{letter}"] = (h, h)
    return found, {"positional_encoding": torch.ones(1, 4, h), "register_tokens": torch.ones(1, h)}


def hidream(h: int = 16) -> tuple[Shapes, dict[str, Tensor]]:
    found = {"x_embedder.proj": (h, 8), "final_layer.adaLN_modulation.1": (2 * h, h)}
    found |= {"p_embedder.pooled_embedder.linear_1": (h, 8), "caption_projection.3.linear": (h, 8)}
    found["t_embedder.timestep_embedder.linear_2"] = (h, h)
    for stem in ("double_stream_blocks.0.block", "single_stream_blocks.1.block"):
        found |= {f"{stem}.attn1.to_{each}": (h, h) for each in ("q", "k", "v", "out")}
        found |= {
            f"{stem}.adaLN_modulation.1": (12 * h, h),
            f"{stem}.ff_i.shared_experts.w1": (2 * h, h),
            f"{stem}.ff_i.experts.2.w3": (2 * h, h),
        }
    stem = "double_stream_blocks.0.block"
    found |= {f"{stem}.attn1.to_{each}_t": (h, h) for each in ("q", "k", "v", "out")}
    return found | {f"{stem}.ff_t.w2": (h, 2 * h)}, {}


FAMILIES: dict[str, tuple[Callable[[], Any], Callable[..., Any], str]] = {
    "flux": (flux, upstream.convert_flux_transformer_checkpoint_to_diffusers, "FLUX.1"),
    "flux2": (flux2, upstream.convert_flux2_transformer_checkpoint_to_diffusers, "FLUX.2"),
    "sd3": (sd3, upstream.convert_sd3_transformer_checkpoint_to_diffusers, "Stable Diffusion 3"),
    "wan": (wan, upstream.convert_wan_transformer_to_diffusers, "Wan"),
    "z_image": (z_image, upstream.convert_z_image_transformer_checkpoint_to_diffusers, "Z-Image"),
    "hunyuan": (hunyuan, upstream.convert_hunyuan_video_transformer_to_diffusers, "HunyuanVideo"),
    "chroma": (chroma, upstream.convert_chroma_transformer_checkpoint_to_diffusers, "Chroma"),
    "lumina2": (lumina2, upstream.convert_lumina2_to_diffusers, "Lumina 2"),
    "ltx": (ltx, upstream.convert_ltx_transformer_checkpoint_to_diffusers, "LTX-Video"),
    "aura_flow": (
        aura_flow,
        upstream.convert_auraflow_transformer_checkpoint_to_diffusers,
        "AuraFlow",
    ),
    "hidream": (hidream, upstream.convert_hidream_transformer_to_diffusers, "HiDream"),
}

STYLES: dict[str, tuple[Callable[[str], str], str, str]] = {
    "kohya": (lambda n: f"lora_unet_{n.replace('.', '_')}", "lora_down.weight", "lora_up.weight"),
    "comfy": (lambda n: f"diffusion_model.{n}", "lora_A.weight", "lora_B.weight"),
    "transformer": (lambda n: f"transformer.{n}", "lora_A.weight", "lora_B.weight"),
    "lycoris": (lambda n: f"lycoris_{n.replace('.', '_')}", "lora_down.weight", "lora_up.weight"),
}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_goes_where_diffusers_puts_it(family: str, style: str, tmp_path: Path) -> None:
    build, convert, title = FAMILIES[family]
    shapes, others = build()
    name_of, down, up = STYLES[style]
    torch.manual_seed(0)
    ups = {name: torch.randn(rows, 1) for name, (rows, _) in shapes.items()}
    stored: dict[str, Tensor] = {}
    for name, (_, columns) in shapes.items():
        stored[f"{name_of(name)}.{down}"] = torch.randn(1, columns)
        stored[f"{name_of(name)}.{up}"] = ups[name]
    path = trainers.save(stored, tmp_path / "x.safetensors")
    read = files.read(path)
    checkpoint = {f"{name}.weight": tensor.clone() for name, tensor in ups.items()}
    checkpoint |= {f"{name}.bias": tensor[:, 0].clone() for name, tensor in ups.items()} | others
    expected = {
        f"transformer.{key.removesuffix('.weight')}": tensor
        for key, tensor in convert(checkpoint).items()
        if key.endswith(".weight") and tensor.shape[1:] == (1,)
    }
    assert set(read.updates) == set(expected)
    for module, tensor in expected.items():
        assert torch.equal(read.updates[module].up, tensor), module
    found = files.describe(path)
    assert found["family"] == title
    assert sum(found["modules"].values()) == len(expected)


@pytest.mark.parametrize(("wide", "title"), [(4 * 96, "Lumina 2"), (8 * 32, "Z-Image")])
def test_feed_forward_layers_tell_lumina_from_z_image(
    wide: int, title: str, tmp_path: Path
) -> None:
    """Where the attention's fused layer, whose outputs differ, is not in the file."""
    stored = {}
    for name, (rows, columns) in {
        "layers.1.attention.out": (96, 96),
        "layers.1.feed_forward.w1": (wide, 96),
        "layers.1.feed_forward.w2": (96, wide),
    }.items():
        stored[f"diffusion_model.{name}.lora_A.weight"] = torch.ones(1, columns)
        stored[f"diffusion_model.{name}.lora_B.weight"] = torch.ones(rows, 1)
    assert files.describe(trainers.save(stored, tmp_path / "x.safetensors"))["family"] == title


def test_t5_is_the_encoder_its_family_has() -> None:
    name = "lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight"
    flux_key = "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"
    sd3_key = "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight"

    def modules(*stored: str) -> str:
        both = [key.replace("down", side) for key in stored for side in ("down", "up")]
        found = [m for m in keys.layout(both).modules if m.startswith("text")]
        return found[0]

    ending = ".encoder.block.0.layer.0.SelfAttention.q"
    assert modules(name, flux_key) == "text_encoder_2" + ending
    assert modules(name, sd3_key) == "text_encoder_3" + ending


def test_stacked_factors_of_fused_layers_come_apart(tmp_path: Path) -> None:
    # Trainers that train q, k and v apart store them as one layer with three times the rank.
    h, ups = 8, [torch.randn(8, 2) for _ in range(3)]
    down = torch.randn(6, h)
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    stored = {
        f"{stem}.lora_down.weight": down,
        f"{stem}.lora_up.weight": torch.block_diag(*ups),  # type: ignore[no-untyped-call]
        f"{stem}.alpha": torch.tensor(3.0),
    }
    read = files.read(trainers.save(stored, tmp_path / "x.safetensors"))
    for number, name in enumerate(("to_q", "to_k", "to_v")):
        update = read.updates[f"transformer.transformer_blocks.0.attn.{name}"]
        assert update.rank == 2
        expected = 0.5 * ups[number] @ down[2 * number : 2 * number + 2]
        torch.testing.assert_close(update.delta(), expected)


def test_two_changes_of_one_layer_are_refused(tmp_path: Path) -> None:
    stored = {}
    for stem, rows in (("double_blocks.0.img_attn.qkv", 24), ("transformer_blocks.0.attn.to_q", 8)):
        stored[f"diffusion_model.{stem}.lora_A.weight"] = torch.ones(1, 8)
        stored[f"diffusion_model.{stem}.lora_B.weight"] = torch.ones(rows, 1)
    path = trainers.save(stored, tmp_path / "x.safetensors")
    with pytest.raises(CmloraError, match=r"a second change of .*to_q"):
        files.read(path)
