"""The same LoRA as every trainer writes it; the names are built from the models' own structure."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from cmlora.lora import LoRA, Update

RANKS = (1, 2, 3, 4)
ALPHAS = (1.0, 2.0, 0.5, 3.0)


def lora(
    pipe: Any,
    *,
    name: str = "sample",
    wanted: Callable[[str], bool] = lambda _: True,
    seed: int = 0,
) -> LoRA:
    """A LoRA on every linear and convolution layer of a pipeline, ranks and alphas alternating.

    Args:
        pipe: its models give names and shapes.
        name: of the LoRA.
        wanted: which modules, by full name.
        seed: of the weights.
    """
    generator = torch.Generator().manual_seed(seed)
    updates: dict[str, Update] = {}
    for component in ("unet", "text_encoder", "text_encoder_2"):
        model = getattr(pipe, component, None)
        for module, layer in model.named_modules() if model is not None else ():
            if not isinstance(layer, (nn.Linear, nn.Conv2d)):
                continue
            if component != "unet" and not module.startswith(("text_model.", "text_projection")):
                module = f"text_model.{module}"
            full = f"{component}.{module}"
            if not wanted(full):
                continue
            rank, alpha = RANKS[len(updates) % 4], ALPHAS[(len(updates) // 2) % 4]
            shape = tuple(layer.weight.shape)
            down = torch.randn(rank, *shape[1:], generator=generator) / shape[1] ** 0.5
            up = torch.randn(shape[0], rank, generator=generator) * 0.3
            updates[full] = Update(down, up, alpha / rank)
    return LoRA(name, updates)


def _tensors(
    lora: LoRA, stem: Callable[[str], str], down: str, up: str, alpha: str | None
) -> dict[str, Tensor]:
    """Factors under their names; without an alpha key the scale goes into ``up``."""
    found: dict[str, Tensor] = {}
    for module, update in lora.updates.items():
        ones = [1] * (update.down.ndim - 2)
        factor = 1.0 if alpha else update.scale
        found[stem(module) + down] = update.down.clone()
        found[stem(module) + up] = (update.up * factor).reshape(*update.up.shape, *ones)
        if alpha:
            found[stem(module) + alpha] = torch.tensor(update.scale * update.rank)
    return found


def kohya(lora: LoRA, rename: Mapping[str, str] | None = None) -> dict[str, Tensor]:
    """sd-scripts, or LyCORIS without Tucker; ``rename`` gives LDM names for UNet modules."""
    two = any(module.startswith("text_encoder_2.") for module in lora.updates)
    prefixes = {
        "unet": "lora_unet",
        "text_encoder": "lora_te1" if two else "lora_te",
        "text_encoder_2": "lora_te2",
    }

    def stem(module: str) -> str:
        component, _, name = module.partition(".")
        name = (rename or {}).get(name, name) if component == "unet" else name
        return f"{prefixes[component]}_{name.replace('.', '_')}"

    return _tensors(lora, stem, ".lora_down.weight", ".lora_up.weight", ".alpha")


def peft(lora: LoRA) -> dict[str, Tensor]:
    """Current diffusers without a header; every scale is 1."""
    return _tensors(lora, str, ".lora_A.weight", ".lora_B.weight", None)


def linear_layer(lora: LoRA) -> dict[str, Tensor]:
    """diffusers of 2023, text encoders; its UNets have ``.lora`` in the same place."""

    def stem(module: str) -> str:
        return module + (".lora" if module.startswith("unet.") else ".lora_linear_layer")

    return _tensors(lora, stem, ".down.weight", ".up.weight", None)


def processors(lora: LoRA) -> dict[str, Tensor]:
    """The first form diffusers had: attention layers only, stored in attention processors."""

    def stem(module: str) -> str:
        head, _, last = module.removesuffix(".0").rpartition(".")
        text = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
        if module.startswith("unet."):
            return f"{head}.processor.{last}_lora"
        return f"{head}.{text[last]}_lora"

    return _tensors(lora, stem, ".down.weight", ".up.weight", None)


def attention(module: str) -> bool:
    """Whether a module is a projection of an attention layer."""
    last = module.removesuffix(".0").rpartition(".")[2]
    return last in ("to_q", "to_k", "to_v", "to_out", "q_proj", "k_proj", "v_proj", "out_proj")


def ldm_names(unet: Any) -> dict[str, str]:
    """diffusers module name to LDM module name, by building the blocks in LDM's order."""
    names = dict(_ldm_top())
    inputs, outputs = 1, 0
    for level, block in enumerate(unet.down_blocks):
        for layer in range(len(block.resnets)):
            names |= _pair(unet, f"down_blocks.{level}", layer, f"input_blocks.{inputs}")
            inputs += 1
        if block.downsamplers:
            names[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{inputs}.0.op"
            inputs += 1
    for level, block in enumerate(unet.up_blocks):
        for layer in range(len(block.resnets)):
            names |= _pair(unet, f"up_blocks.{level}", layer, f"output_blocks.{outputs}")
            outputs += 1
        if block.upsamplers:
            index = 2 if hasattr(block, "attentions") else 1
            own = f"output_blocks.{outputs - 1}.{index}.conv"
            names[f"up_blocks.{level}.upsamplers.0.conv"] = own
    for ours, theirs in (("resnets.0", 0), ("attentions.0", 1), ("resnets.1", 2)):
        names |= _inside(unet, f"mid_block.{ours}", f"middle_block.{theirs}")
    return names


def _ldm_top() -> Iterator[tuple[str, str]]:
    yield "conv_in", "input_blocks.0.0"
    yield "conv_out", "out.2"
    yield "time_embedding.linear_1", "time_embed.0"
    yield "time_embedding.linear_2", "time_embed.2"
    yield "add_embedding.linear_1", "label_emb.0.0"
    yield "add_embedding.linear_2", "label_emb.0.2"


def _pair(unet: Any, block: str, layer: int, ldm: str) -> dict[str, str]:
    found = _inside(unet, f"{block}.resnets.{layer}", f"{ldm}.0")
    if hasattr(unet.get_submodule(block), "attentions"):
        found |= _inside(unet, f"{block}.attentions.{layer}", f"{ldm}.1")
    return found


def _inside(unet: Any, ours: str, theirs: str) -> dict[str, str]:
    resnet = {
        "conv1": "in_layers.2",
        "conv2": "out_layers.3",
        "time_emb_proj": "emb_layers.1",
        "conv_shortcut": "skip_connection",
    }
    return {
        f"{ours}.{name}": f"{theirs}.{resnet.get(name, name)}"
        for name, layer in unet.get_submodule(ours).named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d))
    }


def save(tensors: Mapping[str, Tensor], path: Path, **metadata: str) -> Path:
    """Writes tensors with the reference library."""
    plain = {key: tensor.contiguous() for key, tensor in tensors.items()}
    safetensors.torch.save_file(plain, path, metadata or None)
    return path
