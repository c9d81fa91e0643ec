"""Which family of base models a LoRA or a pipeline belongs to, in words a person recognises."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from cmlora import denoisers
from cmlora.lora import LoRA
from cmlora.originals import UNTRANSLATED

_WIDTHS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}

UNKNOWN = "an unknown family"
"""Of a file that says nothing of its model."""
TRANSFORMER = "a diffusion transformer"
"""Any of several."""
UNETS = tuple(_WIDTHS.values())
"""Families whose denoiser is a UNet."""

_STATED = ("modelspec.architecture", "ss_base_model_version")
"""Where headers name the architecture; other entries hold names of files and folders."""

# What trainers write there: kohya, musubi, ai-toolkit, OneTrainer, and classes of diffusers.
_WORDS = (
    (r"sdxl|(stable[-_ ]?diffusion|sd)[-_ ]xl|conditionmodel-2048", "Stable Diffusion XL"),
    (r"(stable[-_ ]diffusion[-_ ]|(?<![a-z])sd[-_ ]?)v?1|conditionmodel-768", UNETS[0]),
    (r"(stable[-_ ]diffusion[-_ ]|(?<![a-z])sd[-_ ]?)v?2|conditionmodel-1024", UNETS[1]),
    (r"(stable[-_ ]diffusion[-_ ]|(?<![a-z])sd[-_ ]?)v?3", "Stable Diffusion 3"),
    (r"chroma", "Chroma"),
    (r"flux(?![-_. ]?[23](?!\d)|.*(klein|chroma))|(?<![a-z])flex[-_. ]?[12]", "FLUX.1"),
    (r"flux[-_. ]?2(?!\d)|klein", "FLUX.2"),
    (r"flux[-_. ]?3(?!\d)", "FLUX.3"),
    (r"qwen(?![-_ ]?image[-_ ]?2[-_. ]?1(?!\d))", "Qwen-Image"),
    (r"qwen[-_ ]?image[-_ ]?2[-_. ]?1(?!\d)", "Qwen-Image 2.1"),
    (r"(?<![a-z])z[-_ ]?image", "Z-Image"),
    (r"(?<![a-z])sana(?=transformer|$|[^a-z])(?![-_ ]?(video|wm))", "Sana"),
    (r"pixart", "PixArt"),
    (r"(?<![a-z])wan(?=transformer|$|[^a-z])", "Wan"),
    (r"lumina(?![-_ ]?next)", "Lumina 2"),
    (r"hidream(?![-_ ]?o1)", "HiDream"),
    (r"hidream[-_ ]?o1", "HiDream-O1"),
    (r"(?<![a-z])anima(?![a-z])", "Anima"),
    (r"ideogram[-_ ]?4", "Ideogram 4"),
    (r"krea[-_ ]?2", "Krea 2"),
    (r"hunyuan[-_ ]?video(?![-_ ]?1[-_. ]?5)|framepack", "HunyuanVideo"),
    (r"hunyuan[-_ ]?video[-_ ]?1[-_. ]?5", "HunyuanVideo 1.5"),
    (r"hunyuan[-_ ]?image", "HunyuanImage"),
    (r"(?<![a-z])ltx(?![-_ ]?2(?![-_. ]?\d*b))", "LTX-Video"),
    (r"(?<![a-z])ltx[-_ ]?2(?![-_. ]?\d*b)", "LTX-2"),
    (r"aura[-_ ]?flow", "AuraFlow"),
    (r"cogvideo[-_ ]?x", "CogVideoX"),
    (r"(?<![a-z])mochi", "Mochi"),
    (r"kandinsky[-_ ]?5", "Kandinsky 5"),
)

_CLASSES = {
    "AuraFlowTransformer2DModel": "AuraFlow",
    "ChromaTransformer2DModel": "Chroma",
    "CogVideoXTransformer3DModel": "CogVideoX",
    "Flux3Transformer2DModel": "FLUX.3",
    "HiDreamImageTransformer2DModel": "HiDream",
    "HunyuanImageTransformer2DModel": "HunyuanImage",
    "HunyuanVideo15Transformer3DModel": "HunyuanVideo 1.5",
    "HunyuanVideoFramepackTransformer3DModel": "HunyuanVideo",
    "HunyuanVideoTransformer3DModel": "HunyuanVideo",
    "Kandinsky5Transformer3DModel": "Kandinsky 5",
    "LTX2VideoTransformer3DModel": "LTX-2",
    "LTXVideoTransformer3DModel": "LTX-Video",
    "Lumina2Transformer2DModel": "Lumina 2",
    "MochiTransformer3DModel": "Mochi",
    "QwenImage21Transformer2DModel": "Qwen-Image 2.1",
    "WanVACETransformer3DModel": "Wan",
}
"""Families of diffusers' classes that `cmlora.denoisers` has no row for."""

_TABLES = {
    "aura_flow": "AuraFlow",
    "chroma": "Chroma",
    "flux": "FLUX.1",
    "flux2": "FLUX.2",
    "hunyuan": "HunyuanVideo",
    "ltx": "LTX-Video",
    "lumina2": "Lumina 2",
    "pixart": "PixArt",
    "sd3": "Stable Diffusion 3",
    "wan": "Wan",
    "z_image": "Z-Image",
    **UNTRANSLATED,
}

_OWN = (
    (r"^single_transformer_blocks\.\d+\.attn\.to_qkv_mlp_proj", "FLUX.2"),
    (r"^joint_transformer_blocks\.", "AuraFlow"),
    (r"^context_embedder\.token_refiner\.", "HunyuanVideo"),
    (r"^blocks\.\d+\.ffn\.", "Wan"),
    (r"^(layers|noise_refiner|context_refiner)\.\d+\.attention\.to_", "Z-Image"),
    (r"^(layers|noise_refiner|context_refiner)\.\d+\.attn\.to_", "Lumina 2"),
    (r"^transformer_blocks\.\d+\.(img|txt)_(mlp|mod)\.", "Qwen-Image"),
    (r"^(double|single)_stream_blocks\.\d+\.block\.", "HiDream"),
    (r"^transformer_blocks\.\d+\.ff\.conv_", "Sana"),
)
"""Layers that one family alone has."""

_SHARED = (
    (r"^single_transformer_blocks\.", "FLUX.1"),
    (r"^blocks\.\d+\.attn[12]\.", "Wan"),
)
"""Layers of several families, with the one that most files are for."""

_NAMESAKES = (
    {"FLUX.1", "Chroma"},
    {"HunyuanVideo", "HunyuanVideo 1.5", "HunyuanImage"},
    {UNTRANSLATED["hunyuan_split"], "HunyuanVideo 1.5", "HunyuanImage"},
    {UNTRANSLATED["cosmos"], "Anima"},
    {"LTX-Video", "LTX-2"},
    {"Lumina 2", "Z-Image"},
)
"""Families whose layers' original names can be the same, so that a header knows better."""

_RELATED = ({"FLUX.1", "Chroma"},)
"""Families that use each other's LoRAs: Chroma was made from FLUX.1."""

_ATTENTION = re.compile(
    r"transformer_blocks\.(\d+)\.(attn1?)\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
)


def of_lora(lora: LoRA, table: str | None = None, widths: Mapping[str, int] | None = None) -> str:
    """The family a LoRA was trained for: by its shapes, otherwise by its names and metadata.

    Args:
        lora: its updates.
        table: whose original names its file has, see `cmlora.originals.family`.
        widths: inputs of further layers that the file changes, by module.
    """
    known = {module: update.shape[1] for module, update in lora.updates.items()}
    known = {**(widths or {}), **known}
    for module, width in known.items():
        if module.startswith("unet.") and module.endswith(("attn2.to_k", "attn2.to_v")) and width:
            return _by_width(width)
    parts = {module.partition(".")[0] for module in known}
    layers = {m.partition(".")[2]: w for m, w in known.items() if m.startswith("transformer")}
    said = _said(lora.metadata)
    if ("unet" in parts and said not in UNETS) or (layers and said in UNETS):
        said = None  # a slip, the layers are another kind of model's
    own = _TABLES[table] if table is not None else _first(_OWN, layers)
    if own is not None:
        return said if said and any({own, said} <= each for each in _NAMESAKES) else own
    found = said or _first(_SHARED, layers) or _by_size(layers)
    if found is not None:
        return found
    if "unet" in parts and "text_encoder_2" in parts:
        return _WIDTHS[2048]
    return TRANSFORMER if layers else UNKNOWN


def of_pipe(pipe: Any) -> str:
    """The family of a pipeline: by the width of text its UNet takes, or its transformer's class.

    A class that is not known is said by its name.
    """
    models = ((name, getattr(pipe, name, None)) for name in denoisers.ATTRIBUTES)
    place, model = next((pair for pair in models if pair[1] is not None), ("", None))
    if model is None:
        return UNKNOWN
    model = getattr(model, "_orig_mod", model)
    title = type(model).__name__
    if place == "unet":
        width = getattr(getattr(model, "config", None), "cross_attention_dim", None)
        width = next(iter(width), None) if isinstance(width, (list, tuple)) else width
        return _by_width(width) if isinstance(width, int) else title
    row = denoisers.kind(model)
    return row.family if row.family != UNKNOWN else _CLASSES.get(title, title)


def contradiction(lora: LoRA, made_for: str, theirs: str) -> str | None:
    """What a LoRA's header says if by that it is not for a pipeline; ``None`` if it may be.

    Only what is certain counts: a header that names one known family, and a pipeline of another
    one. Shapes are no matter here; where they tell the families apart, they do not fit.

    Args:
        lora: with the metadata of its file.
        made_for: its family, see `of_lora`.
        theirs: the pipeline's family, see `of_pipe`.
    """
    rows = {row.family for row in denoisers.KINDS.values()}
    said = stated(lora.metadata)
    if said is None or theirs not in {*UNETS, *rows, *_CLASSES.values()}:
        return None
    if len(distinct((said, theirs))) < 2 or len(distinct((made_for, theirs))) < 2:
        return None
    heads = [(key, lora.metadata.get(key, "")) for key in _STATED]
    return next(f"{key} is {text[:60]!r}" for key, text in heads if _named(text))


def stated(metadata: Mapping[str, str]) -> str | None:
    """The one family that a header names by its architecture, if it names one.

    >>> stated({"modelspec.architecture": "Flux.2-klein-4b/lora", "ss_base_model_version": "x"})
    'FLUX.2'
    """
    found = {family for key in _STATED for family in _named(metadata.get(key, ""))}
    return found.pop() if len(found) == 1 else None


def distinct(families: Iterable[str]) -> list[str]:
    """Families that cannot be one and the same, without those that are not known.

    >>> distinct(["FLUX.1", "a diffusion transformer", "Chroma", "an unknown family"])
    ['FLUX.1']
    """
    found = list(dict.fromkeys(each for each in families if each != UNKNOWN))
    if any(each != TRANSFORMER and not is_unet(each) for each in found):
        found = [each for each in found if each != TRANSFORMER]  # it may be the other
    return [
        each
        for place, each in enumerate(found)
        if not any({each, one} <= group for one in found[:place] for group in _RELATED)
    ]


def is_unet(family: str) -> bool:
    """Whether a family's denoiser is a UNet."""
    return family.startswith(("a UNet", *UNETS))


def _said(metadata: Mapping[str, str]) -> str | None:
    """The family that a header names, if only by the name of the base model."""
    base = re.split(r"[/\\]", metadata.get("cmlora.base", ""))[-1]
    found = _named(base)
    return stated(metadata) or (found.pop() if len(found) == 1 else None)


def _named(text: str) -> set[str]:
    return {family for pattern, family in _WORDS if re.search(pattern, text[:200].lower())}


def _first(rows: Iterable[tuple[str, str]], names: Iterable[str]) -> str | None:
    names = list(names)
    return next((f for pattern, f in rows if any(re.search(pattern, n) for n in names)), None)


def _by_size(layers: Mapping[str, int]) -> str | None:
    """The family of attention layers whose names are common, where widths and depths tell it."""
    found = [(_ATTENTION.fullmatch(name), width) for name, width in layers.items()]
    rows = [(int(m[1]), m[2], m[3], width) for m, width in found if m is not None]
    widths = {width for *_, width in rows}
    if len(widths) != 1 or len({attention for _, attention, *_ in rows}) != 1:
        return None
    width, blocks = widths.pop(), {block for block, *_ in rows}
    if rows[0][1] == "attn1":  # attention to the text is beside it
        if width == 1152 and any(".ff.net." in name for name in layers):
            return "PixArt"
        return {2240: "Sana", 2048: "LTX-Video"}.get(width)
    if width in (1536, 2432):
        return "Stable Diffusion 3"
    if width in (4096, 6144) and any(layer.startswith("add_") for _, _, layer, _ in rows):
        return "FLUX.2"
    if width == 3072 and max(blocks) >= 20:
        return "Qwen-Image"  # of 60 blocks; FLUX.1 has 19 and HunyuanVideo 20
    return "FLUX.1" if width == 3072 and blocks == set(range(19)) else None


def _by_width(width: int) -> str:
    return _WIDTHS.get(width, f"a UNet for text of width {width}")
