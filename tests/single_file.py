"""A pipeline as one checkpoint file with the original Stable Diffusion names."""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET = {
    "conv_in.": "input_blocks.0.0.",
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
    "mid_block.resnets.0.": "middle_block.0.",
    "mid_block.attentions.0.": "middle_block.1.",
    "mid_block.resnets.1.": "middle_block.2.",
}
_VAE = {
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
}


def save_single_file(pipe: Any, path: Path) -> Path:
    """Write a Stable Diffusion 1.5 pipeline."""
    parts = {
        "model.diffusion_model.": {_unet(k, pipe.unet): v for k, v in _state(pipe.unet)},
        "first_stage_model.": {_vae(k, pipe.vae): v for k, v in _state(pipe.vae)},
        "cond_stage_model.transformer.": {_text(k): v for k, v in _state(pipe.text_encoder)},
    }
    tensors = {prefix + key: value for prefix, part in parts.items() for key, value in part.items()}
    save_file(tensors, path)
    return path


def _state(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(key, value.contiguous()) for key, value in model.state_dict().items()]


def _unet(key: str, unet: Any) -> str:
    for new, old in _UNET.items():
        if key.startswith(new):
            key = old + key.removeprefix(new)
    block = re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(conv\.)?", key)
    if block:
        level, index, rest = int(block[2]), int(block[4]), key[block.end() :]
        many = unet.config.layers_per_block + 1
        if block[3] in ("resnets", "attentions"):
            place, first = ("input", 1) if block[1] == "down" else ("output", 0)
            part = 0 if block[3] == "resnets" else 1
            key = f"{place}_blocks.{first + many * level + index}.{part}.{block[5] or ''}{rest}"
        elif block[3] == "downsamplers":
            key = f"input_blocks.{many * (level + 1)}.0.op.{rest}"
        else:
            attends = hasattr(unet.up_blocks[level], "attentions")
            key = f"output_blocks.{many * (level + 1) - 1}.{2 if attends else 1}.conv.{rest}"
    names = "|".join(_RESNET)
    place = r"((?:input_blocks|output_blocks)\.\d+\.0\.|middle_block\.[02]\.)"
    return re.sub(rf"^{place}({names})\.", lambda m: f"{m[1]}{_RESNET[m[2]]}.", key)


def _vae(key: str, vae: Any) -> str:
    top = len(vae.config.up_block_types) - 1
    key = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", key)
    key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{top - int(m[1])}.block", key)
    key = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{top - int(m[1])}.upsample", key)
    for new, old in _VAE.items():
        key = re.sub(rf"(?<![a-z_]){re.escape(new)}(?![a-z_])", old, key)
    return key


def _text(key: str) -> str:
    return key if key.startswith("text_model.") else f"text_model.{key}"
