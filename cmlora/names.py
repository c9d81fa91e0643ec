"""From the name a trainer gives to a layer to the layer's place in diffusers' model.

Some trainers join the parts of a name by underscores, which also occur inside parts. They are told
apart by the model's own names where a model is at hand, otherwise by the words that such names are
made of, so that no model is needed to read a file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from cmlora.lora import DENOISERS, TEXT_ENCODERS
from cmlora.originals import Target, is_original, translate

_FLAT = {
    "lora_unet": "",
    "lora_transformer": "transformer",
    "lora_te": "text_encoder",
    "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2",
    "lora_te3": "text_encoder_3",
    "lycoris": "",
}

_DOTTED = {
    "model.diffusion_model.": "",
    "diffusion_model.": "",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
    "text_encoders.t5xxl.transformer.": "text_encoder_3",
    "clip_l.transformer.": "text_encoder",
    "clip_g.transformer.": "text_encoder_2",
    "t5xxl.transformer.": "text_encoder_3",
    "clip_l.": "text_encoder",
    "clip_g.": "text_encoder_2",
    "t5.": "text_encoder_3",
}
_OTHERS = ("text_encoders.", "llama.")
"""Text encoders of dotted names that are in no pipeline here."""

_UNET = re.compile(
    r"(down_blocks|mid_block|up_blocks|conv_in|conv_out|(time|add|class)_embedding)([._]|$)"
)
_LDM = re.compile(r"(input_blocks|middle_block|output_blocks|time_embed|label_emb|out)[._]\d")

_WORD = re.compile(
    r"(down|up)_blocks|mid_block|attentions|resnets|(down|up)samplers|transformer_blocks|attn[12]?"
    r"|to_(q|k|v|out)|ff|net|proj(_in|_out)?|norm[123]?|conv[12]?|conv_(in|out|shortcut|norm_out)"
    r"|time_emb_proj|(time|add|class|token|position)_embedding|linear_[12]|group_norm|text_model"
    r"|encoder|layers|self_attn|(q|k|v|out)_proj|mlp|fc[12]|text_projection|embeddings|[0-9]+"
    r"|single_transformer_blocks|add_[qkv]_proj|to_add_out|ff_context|proj_mlp|norm1_context"
    r"|norm2_context|norm_out|norm_(added_)?[qk]|linear|(x|context|t|cap|y)_embedder"
    r"|time_text_embed|(timestep|text|guidance|time|image)_embedder|condition_embedder|time_proj"
    r"|(img|txt)_(in|mod|mlp)|(noise|context)_refiner|attention|feed_forward|w[123]|blocks|ffn"
    r"|adaLN_modulation|adaln_single|emb|caption_projection|pos_embed|patch_embedding|block|layer"
    r"|SelfAttention|DenseReluDense|wi(_[01])?|wo|[qkvo]|final_layer_norm|layer_norm[12]?"
    r"|(double|single)_stream_blocks|to_(q|k|v|out)_t|ff_[it]|shared_experts|experts|gate"
    r"|[pt]_embedder|pooled_embedder|final_layer"
    r"|relative_attention_bias|shared|model|(up|gate|down)_proj|linear_(in|out)|to_qkv_mlp_proj"
)

_LDM_RESNET = {
    "in_layers_0": "norm1",
    "in_layers_2": "conv1",
    "out_layers_0": "norm2",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}

_LDM_TOP = {
    "input_blocks_0_0": "conv_in",
    "out_0": "conv_norm_out",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding.linear_1",
    "time_embed_2": "time_embedding.linear_2",
    "label_emb_0_0": "add_embedding.linear_1",
    "label_emb_0_2": "add_embedding.linear_2",
}

_OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


@dataclass(frozen=True)
class Context:
    """What the names of a whole file, and the model if there is one, say about each name.

    Args:
        layers_per_block: of the UNet, for LDM block numbers; 2 in all Stable Diffusion versions.
        table: whose original names they are, see `cmlora.originals.family`.
        t5: which component a T5 text encoder is.
        clip: which component the smaller CLIP text encoder is.
        modules: names of the denoiser's layers, by the same name with underscores for dots.
    """

    layers_per_block: int = 2
    table: str | None = None
    t5: str = "text_encoder_3"
    clip: str = "text_encoder"
    modules: Mapping[str, str] = field(default_factory=dict)


def target(stem: str, context: Context, *, old: bool = False) -> Target | None:
    """Where a layer is in diffusers' pipeline; ``None`` if the name is not understood.

    Args:
        stem: the name of the layer in the file.
        context: see `Context`.
        old: the file is of diffusers' first form, which named attention layers otherwise.
    """
    prefix, _, rest = stem.partition("_")
    if prefix == "lora":
        second, _, rest = rest.partition("_")
        prefix = f"lora_{second}"
    if prefix in _FLAT and "." not in stem:
        return _flat(_FLAT[prefix], rest, context)
    stem = stem.removeprefix("base_model.model.")
    head, _, tail = stem.partition(".")
    if head in _FLAT and tail:
        stem = tail if not _FLAT[head] else f"{_FLAT[head]}.{tail}"
    for start, component in _DOTTED.items():
        if stem.startswith(start):
            stem = stem.removeprefix(start)
            if component:
                return _text(context.clip if "clip_l" in start else component, stem, context)
            return _denoiser(stem, context, sure=True)
    if stem.startswith(_OTHERS):
        return None
    component, _, name = stem.partition(".")
    if component in TEXT_ENCODERS:
        return _text(component, _old(name, component) if old else name, context)
    if component in DENOISERS:
        if not name:
            return None
        name = _old(name, component) if old else name
        if component == "unet" and not _LDM.match(name):
            return Target((f"unet.{name.replace('.processor.', '.')}",))
        return _denoiser(name, context, component, sure=True)
    if stem.startswith("text_model."):
        return _text("text_encoder", _old(stem, "text_encoder") if old else stem, context)
    return _denoiser(_old(stem, "unet") if old and _UNET.match(stem) else stem, context)


def _denoiser(
    name: str, context: Context, component: str = "", *, sure: bool = False
) -> Target | None:
    """A dotted name within the denoiser; ``sure`` if nothing else can be meant."""
    if not name:
        return None
    if _LDM.match(name):
        expanded = _expand_ldm(name.replace(".", "_"), context.layers_per_block)
        return None if expanded is None else Target((f"unet.{expanded}",))
    if context.table is not None:
        found = translate(name, context.table)
        if found is not None:
            where = component or "transformer"
            return Target(tuple(f"{where}.{module}" for module in found[0]), found[1])
        if is_original(name, context.table) and name not in context.modules.values():
            return None
    name = name.replace(".processor.", ".")
    if _UNET.match(name):
        return Target((f"{component or 'unet'}.{name}",))
    known = name.split(".")[0].endswith("transformer_blocks") or context.table is not None
    if sure or known or name in context.modules.values():
        return Target((f"{component or 'transformer'}.{name}",))
    return None


def _text(component: str, name: str, context: Context) -> Target | None:
    """A dotted name within a text encoder."""
    if not name:
        return None
    if name.startswith(("encoder.block.", "shared", "encoder.embed_tokens", "decoder.")):
        if component == "text_encoder_3":
            component = context.t5
    elif name.startswith(("encoder.layers.", "embeddings.", "final_layer_norm")):
        name = f"text_model.{name}"
    return Target((f"{component}.{name}",))


def _flat(component: str, flat: str, context: Context) -> Target | None:
    """A name whose parts are joined by underscores."""
    if component in TEXT_ENCODERS:
        name = _split(flat)
        return None if name is None else _text(component, name, context)
    if context.table is not None:
        # Before the model's names: Wan's norm3 is norm2 there, and another layer is norm3.
        found = translate(flat, context.table)
        if found is not None:
            return Target(tuple(f"transformer.{module}" for module in found[0]), found[1])
    if flat in context.modules:
        name = context.modules[flat]
        return Target((f"{'unet' if _UNET.match(name) else 'transformer'}.{name}",))
    ldm = _expand_ldm(flat, context.layers_per_block)
    if ldm is not None:
        return Target((f"unet.{ldm}",))
    name = _split(flat)
    if name is None:
        return None
    if component == "" and name.startswith("text_model."):
        return Target((f"text_encoder.{name}",))
    if context.table is not None and is_original(name, context.table):
        return None
    return Target((f"{component or ('unet' if _UNET.match(name) else 'transformer')}.{name}",))


def _old(name: str, component: str) -> str:
    """The name of an attention layer in diffusers' first form."""
    head, _, last = name.removesuffix(".0").rpartition(".")
    if component in TEXT_ENCODERS:
        last = _OLD_TEXT.get(last, last)
    elif last == "to_out":
        last = "to_out.0"
    return f"{head}.{last}"


def _expand_ldm(flat: str, layers: int) -> str | None:
    """``middle_block_1_proj_in`` to ``mid_block.attentions.0.proj_in``."""
    ldm = _ldm(flat, layers)
    if ldm is None:
        return None
    block, rest = ldm
    if not rest:
        return block
    tail = _LDM_RESNET.get(rest) or _split(rest)
    return None if tail is None else f"{block}.{tail}"


def _split(flat: str) -> str | None:
    """``mid_block_attentions_0_proj_in`` to ``mid_block.attentions.0.proj_in``."""
    words = flat.split("_")
    parts: list[str] = []
    while words:
        for size in range(min(4, len(words)), 0, -1):
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
    match = re.fullmatch(r"(input_blocks|output_blocks)_(\d{1,4})_(\d)_(.+)", flat)
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
