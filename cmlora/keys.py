"""The key names of every trainer, translated into one naming: component + diffusers module name.

| naming | example |
|---|---|
| diffusers | ``unet.mid_block.attentions.0.proj_in.lora_A.weight`` |
| old diffusers | ``unet.(…).attn1.processor.to_q_lora.down.weight`` |
| kohya | ``lora_unet_mid_block_attentions_0_proj_in.lora_down.weight``, ``.alpha`` |
| kohya, LDM blocks | ``lora_unet_middle_block_1_proj_in.lora_down.weight`` |

kohya joins the parts of a module's name by underscores, which also occur inside parts. They are
told apart by the vocabulary of Stable Diffusion's modules, so no model is needed to read a file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from cmlora.lora import DENOISERS, TEXT_ENCODERS

Role = Literal["down", "up", "mid", "alpha"]

_ROLES: tuple[tuple[re.Pattern[str], Role, str], ...] = (
    (re.compile(r"\.lora_A(\.[^.]+)?\.weight$"), "down", "diffusers"),
    (re.compile(r"\.lora_B(\.[^.]+)?\.weight$"), "up", "diffusers"),
    (re.compile(r"\.lora_down\.weight$"), "down", "kohya"),
    (re.compile(r"\.lora_up\.weight$"), "up", "kohya"),
    (re.compile(r"\.lora_mid\.weight$"), "mid", "kohya"),
    (re.compile(r"(\.lora|_lora|\.lora_linear_layer)\.down\.weight$"), "down", "old diffusers"),
    (re.compile(r"(\.lora|_lora|\.lora_linear_layer)\.up\.weight$"), "up", "old diffusers"),
    (re.compile(r"(\.lora|_lora|\.lora_linear_layer)?\.alpha$"), "alpha", ""),
)

_FORMS = (
    (r"\.hada_", "LoHa"),
    (r"\.lokr_", "LoKr"),
    (r"\.dora_scale|\.lora_magnitude_vector", "DoRA"),
    (r"\.diff(_b)?$", "full-rank difference"),
    (r"\.on_input$", "(IA)^3"),
    (r"\.[ab][12](\.weight)?$", "GLoRA"),
    (r"\.[wb]_norm$", "norm difference"),
    (r"\.(oft|boft)_", "OFT"),
    (r"\.lora_(B|up)(\.[^.]+)?\.bias$", "LoRA with bias"),
    (r"\.lora_embedding_[AB]", "LoRA of an embedding"),
    (r"\.vera_lambda_", "VeRA"),
    (r"emb_params|^bundle_emb", "textual inversion"),
    (r"^(model\.diffusion_model|cond_stage_model|first_stage_model|conditioner)\.", "checkpoint"),
)

_KOHYA = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}

_WORD = re.compile(
    r"(down|up)_blocks|mid_block|attentions|resnets|(down|up)samplers|transformer_blocks|attn[12]"
    r"|to_(q|k|v|out)|ff|net|proj(_in|_out)?|norm[123]?|conv[12]?|conv_(in|out|shortcut|norm_out)"
    r"|time_emb_proj|(time|add|class|token|position)_embedding|linear_[12]|group_norm|text_model"
    r"|encoder|layers|self_attn|(q|k|v|out)_proj|mlp|fc[12]|text_projection|embeddings|[0-9]+"
)

_LDM_RESNET = {
    "in_layers_2": "conv1",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}

_LDM_TOP = {
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding.linear_1",
    "time_embed_2": "time_embedding.linear_2",
    "label_emb_0_0": "add_embedding.linear_1",
    "label_emb_0_2": "add_embedding.linear_2",
}

_OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


@dataclass(frozen=True)
class Part:
    """What one key of a file is.

    Args:
        module: component and diffusers module name.
        role: which tensor of the module's update.
        naming: whose key it is; empty where namings agree.
    """

    module: str
    role: Role
    naming: str


@dataclass(frozen=True)
class Layout:
    """All keys of a file, sorted by what they are.

    Args:
        modules: for every complete module, the keys of its tensors by role.
        leftover: every other key, with the reason.
        naming: whose keys they are ("diffusers", "old diffusers", "kohya" or a mixture).
        forms: the unsupported parametrisations that were met.
    """

    modules: Mapping[str, Mapping[Role, str]]
    leftover: Mapping[str, str]
    naming: str
    forms: tuple[str, ...] = field(default=())


def layout(keys: Iterable[str], layers_per_block: int = 2) -> Layout:
    """Sorts the keys of a file.

    A module with a missing factor or with anything of an unsupported form is left over as a whole.

    Args:
        keys: the names of the file's tensors.
        layers_per_block: of the UNet, for LDM block numbers; 2 in all Stable Diffusion versions.
    """
    modules: dict[str, dict[Role, str]] = {}
    leftover: dict[str, str] = {}
    namings: set[str] = set()
    spoiled: dict[str, str] = {}
    for key in sorted(keys):
        if name := form(key):
            leftover[key] = name
            pattern = next(pattern for pattern, known in _FORMS if known == name)
            if stem := _module(re.split(pattern, key)[0], layers_per_block):
                spoiled[stem] = name
            continue
        found = part(key, layers_per_block)
        if found is None:
            leftover[key] = "unknown name"
        elif found.role in modules.setdefault(found.module, {}):
            leftover[key] = f"second {found.role} of {found.module}"
        else:
            modules[found.module][found.role] = key
            namings |= {found.naming} - {""}
    for module in list(modules):
        reason = spoiled.get(module) or _incomplete(modules[module])
        if reason:
            leftover.update(dict.fromkeys(modules.pop(module).values(), reason))
    forms = dict.fromkeys(r for _, r in sorted(leftover.items()) if any(r == f for _, f in _FORMS))
    return Layout(modules, leftover, " and ".join(sorted(namings)), tuple(forms))


def form(key: str) -> str | None:
    """The parametrisation a key belongs to, if it is one that cannot be read as a LoRA.

    >>> form("lora_unet_conv_in.hada_w1_a")
    'LoHa'
    """
    return next((name for pattern, name in _FORMS if re.search(pattern, key)), None)


def part(key: str, layers_per_block: int = 2) -> Part | None:
    """Translates one key; ``None`` if it is not understood.

    >>> part("lora_te_text_model_encoder_layers_0_mlp_fc1.alpha").module
    'text_encoder.text_model.encoder.layers.0.mlp.fc1'
    >>> part("lora_unet_output_blocks_5_2_conv.lora_up.weight").module
    'unet.up_blocks.1.upsamplers.0.conv'
    """
    for pattern, role, naming in _ROLES:
        if match := pattern.search(key):
            old = match.group(0).startswith("_lora")
            module = _module(key[: match.start()], layers_per_block, old)
            return Part(module, role, naming) if module else None
    return None


def _incomplete(found: Mapping[Role, str]) -> str:
    missing = [role for role in ("down", "up") if role not in found]
    return f"its module has no {' and no '.join(missing)}" if missing else ""


def _module(stem: str, layers: int, old: bool = False) -> str | None:
    for prefix, component in _KOHYA.items():
        if stem.startswith(prefix) and "." not in stem:
            return _join(component, _expand(stem.removeprefix(prefix), component, layers))
    stem = stem.removeprefix("base_model.model.")
    if stem.startswith("diffusion_model."):
        flat = stem.removeprefix("diffusion_model.").replace(".", "_")
        return _join("unet", _expand(flat, "unet", layers))
    component, _, name = stem.partition(".")
    if component not in DENOISERS + TEXT_ENCODERS:
        component, name = _guess(stem), stem
    if not component or not name:
        return None
    if old:
        head, _, last = name.removesuffix(".0").rpartition(".")
        if component in TEXT_ENCODERS:
            last = _OLD_TEXT.get(last, last)
        elif last == "to_out":
            last = "to_out.0"
        name = f"{head}.{last}"
    name = name.replace(".processor.", ".")
    if component in TEXT_ENCODERS and name.startswith(("encoder.layers.", "embeddings.")):
        name = f"text_model.{name}"
    return f"{component}.{name}"


def _join(component: str, name: str | None) -> str | None:
    return None if name is None else f"{component}.{name}"


def _guess(stem: str) -> str:
    """The component of a name that does not say: files written from a single model."""
    first = stem.split(".")[0]
    if first in ("down_blocks", "mid_block", "up_blocks", "conv_in", "conv_out", "add_embedding"):
        return "unet"
    if first == "text_model":
        return "text_encoder"
    return "transformer" if first.endswith("transformer_blocks") else ""


def _expand(flat: str, component: str, layers: int) -> str | None:
    """``mid_block_attentions_0_proj_in`` to ``mid_block.attentions.0.proj_in``."""
    if component == "unet":
        ldm = _ldm(flat, layers)
        if ldm is not None:
            block, rest = ldm
            if not rest:
                return block
            tail = _LDM_RESNET.get(rest) or _split(rest)
            return None if tail is None else f"{block}.{tail}"
    return _split(flat)


def _split(flat: str) -> str | None:
    words = flat.split("_")
    parts: list[str] = []
    while words:
        for size in range(min(3, len(words)), 0, -1):
            word = "_".join(words[:size])
            if _WORD.fullmatch(word):
                parts.append(word)
                del words[:size]
                break
        else:
            return None
    return ".".join(parts)


def _ldm(flat: str, layers: int) -> tuple[str, str] | None:
    """The diffusers block of a name in the original LDM numbering, and what is left of the name."""
    if flat in _LDM_TOP:
        return _LDM_TOP[flat], ""
    match = re.fullmatch(r"(input_blocks|output_blocks)_(\d+)_(\d)_(.+)", flat)
    if match is None:
        match = re.fullmatch(r"middle_block_([012])_(.+)", flat)
        if match is None:
            return None
        block = ("resnets.0", "attentions.0", "resnets.1")[int(match[1])]
        return f"mid_block.{block}", match[2]
    side, rest = match[1], match[4]
    # Every level has `layers` blocks and, on the way down, one more for the downsampler; the
    # way up has `layers + 1` blocks per level with the upsampler inside the last one.
    number = int(match[2]) - (side == "input_blocks")
    level, layer = divmod(number, layers + 1)
    if side == "input_blocks" and rest == "op":
        return f"down_blocks.{level}.downsamplers.0.conv", ""
    if side == "output_blocks" and rest == "conv":
        return f"up_blocks.{level}.upsamplers.0.conv", ""
    way = "down_blocks" if side == "input_blocks" else "up_blocks"
    kind = "resnets" if match[3] == "0" else "attentions"
    return f"{way}.{level}.{kind}.{layer}", rest
