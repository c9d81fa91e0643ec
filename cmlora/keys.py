"""The keys of a LoRA file, of any trainer, sorted into layers and roles.

| naming | example |
|---|---|
| diffusers | ``unet.mid_block.attentions.0.proj_in.lora_A.weight`` |
| old diffusers | ``unet.(…).attn1.processor.to_q_lora.down.weight`` |
| kohya | ``lora_unet_mid_block_attentions_0_proj_in.lora_down.weight``, ``.alpha`` |
| kohya, original names | ``lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight`` |
| OneTrainer's OMI | ``transformer.double_blocks.0.img_attn.qkv.0.lora_down.weight`` |
| LyCORIS | ``lycoris_transformer_blocks_0_attn_to_q.lokr_w1`` |
| XLabs | ``double_blocks.0.processor.qkv_lora1.down.weight`` |
| ComfyUI | ``diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight`` |
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from cmlora import forms
from cmlora.names import Context, target
from cmlora.originals import UNTRANSLATED, Target, family

_ANY = r"(\.[^.]+)?"  # the adapter's name, which PEFT leaves in some files

_ROLES: tuple[tuple[re.Pattern[str], str, str], ...] = tuple(
    (re.compile(pattern + "$"), role, naming)
    for pattern, role, naming in (
        (rf"\.lora_A{_ANY}\.weight", "down", "diffusers"),
        (rf"\.lora_B{_ANY}\.weight", "up", "diffusers"),
        (rf"\.lora_B{_ANY}\.bias", "up_bias", "diffusers"),
        (rf"\.lora_magnitude_vector{_ANY}", "magnitude", "diffusers"),
        (rf"\.lora_magnitude_vector{_ANY}\.weight", "magnitude", "diffusers"),
        (rf"\.lora_embedding_A{_ANY}", "embedding_A", "diffusers"),
        (rf"\.lora_embedding_B{_ANY}", "embedding_B", "diffusers"),
        (r"\.lora_down\.weight", "down", "kohya"),
        (r"\.lora_up\.weight", "up", "kohya"),
        (r"\.lora_up\.bias", "up_bias", "kohya"),
        (r"\.lora_mid\.weight", "mid", "kohya"),
        (r"(?P<keep>\.processor\.(qkv|proj)_lora[12]?)\.down\.weight", "down", "XLabs"),
        (r"(?P<keep>\.processor\.(qkv|proj)_lora[12]?)\.up\.weight", "up", "XLabs"),
        (r"(\.lora|_lora|\.lora_linear_layer)\.down\.weight", "down", "old diffusers"),
        (r"(\.lora|_lora|\.lora_linear_layer)\.up\.weight", "up", "old diffusers"),
        (r"(\.lora|_lora|\.lora_linear_layer)?\.alpha", "alpha", ""),
        (r"\.dora_scale", "dora_scale", ""),
        (rf"\.(?P<role>hada_(w[12]_[ab]|t[12])){_ANY}", "", "LyCORIS"),
        (rf"\.(?P<role>lokr_(w[12](_[ab])?|t2)){_ANY}", "", "LyCORIS"),
        (r"\.(?P<role>[ab][12]|bm)(\.weight)?", "", "LyCORIS"),
        (r"\.(?P<role>w_norm|b_norm|oft_blocks|rescale|on_input)", "", "LyCORIS"),
        (r"\.(?P<role>diff|diff_b)", "", ""),
        (rf"\.(?P<role>oft_R){_ANY}\.weight", "", "diffusers"),
        (rf"\.(?P<role>boft_[Rs]|miss_block|ia3_l){_ANY}", "", "diffusers"),
        (r"(?P<keep>[._](query|key)_norm)\.scale", "value", "BFL"),
        (r"(?P<keep>\.norm_(added_)?[qk])\.weight", "value", "diffusers"),
        (r"\.weight", "weight", ""),
    )
)

_FLUX = (
    ("linear1", 7, 9),
    (r"(img|txt)_mlp[._]0", 4, 6),
    ("linear2", 1 / 5, 1 / 4),
    (r"(img|txt)_mlp[._]2", 1 / 4, 1 / 3),
)
"""Layers with as many outputs for an input in FLUX.1, and in FLUX.2."""

_NUMBERED = re.compile(r"(qkv|kv_linear|linear1)\.\d\.")
"""The names of OneTrainer's OMI files."""

_FORMS = (
    (r"\.vera_lambda_", "VeRA, which needs numbers that are not in the file"),
    (r"emb_params|^bundle_emb", "textual inversion"),
    (r"^(cond_stage_model|first_stage_model|conditioner)\.", "checkpoint"),
    (r"^model\.diffusion_model\.(?!.*\.(lora|hada|lokr|diff|alpha))", "checkpoint"),
)


@dataclass(frozen=True)
class Part:
    """What one key of a file is.

    Args:
        target: where its layer is in diffusers' pipeline.
        role: which tensor of the layer's change; ``down``, ``hada_w1_a``, ...
        naming: whose key it is; empty where namings agree.
    """

    target: Target
    role: str
    naming: str

    @property
    def module(self) -> str:
        """Component and diffusers module name; several joined by ``+`` for a fused layer."""
        return self.target.name


@dataclass(frozen=True)
class Layout:
    """All keys of a file, sorted by what they are.

    Args:
        modules: for every complete layer, the keys of its tensors by role.
        targets: where the layers are.
        leftover: every other key, with the reason.
        naming: whose keys they are ("diffusers", "old diffusers", "kohya" or a mixture).
        forms: titles of the forms that were met, see `cmlora.forms`.
        table: whose original names the file has, if any.
    """

    modules: Mapping[str, Mapping[str, str]]
    targets: Mapping[str, Target]
    leftover: Mapping[str, str]
    naming: str
    forms: tuple[str, ...] = field(default=())
    table: str | None = None


def layout(
    keys: Iterable[str],
    layers_per_block: int = 2,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    modules: Iterable[str] = (),
) -> Layout:
    """Sorts the keys of a file.

    A layer of which a tensor is missing is left over as a whole.

    Args:
        keys: the names of the file's tensors.
        layers_per_block: of the UNet, for LDM block numbers; 2 in all Stable Diffusion versions.
        shapes: of the tensors, which tell apart FLUX.1 and FLUX.2.
        modules: names of the denoiser's layers, if there is a model.
    """
    keys = sorted(keys)
    context = _context(keys, layers_per_block, shapes or {}, modules)
    found: dict[str, dict[str, str]] = {}
    targets: dict[str, Target] = {}
    leftover: dict[str, str] = {}
    namings: set[str] = set()
    for key in keys:
        reason = unsupported(key)
        each = None if reason else part(key, context)
        if each is None:
            leftover[key] = reason or "unknown name"
        elif each.role in found.setdefault(each.module, {}):
            leftover[key] = f"second {each.role} of {each.module}"
        else:
            found[each.module][each.role] = key
            targets[each.module] = each.target
            namings |= {each.naming} - {""}
    if context.table in UNTRANSLATED:
        title = UNTRANSLATED[context.table]
        text = f"layers of {title} by original names; only their names in diffusers are read"
        leftover.update({key: text for key, why in leftover.items() if why == "unknown name"})
    numbered = any(_NUMBERED.search(key) for key in keys)
    titles: dict[str, None] = {}
    for module in list(found):
        roles = found[module]
        titles.update(dict.fromkeys(forms.titles(roles)))
        absent = forms.missing(roles)
        if absent:
            plain = set(roles) <= {"weight"}
            text = f"its module has no {' and no '.join(absent)}"
            leftover.update(dict.fromkeys(roles.values(), "unknown name" if plain else text))
            del found[module], targets[module]
        elif numbered and "up" not in roles:
            # OneTrainer puts halves in the original order in LoRAs only, whatever the form.
            targets[module] = replace(targets[module], swapped=False)
    known = {title for roles in found.values() for title in forms.titles(roles)}
    ordered = tuple(title for title in titles if title in known or not found)
    return Layout(found, targets, leftover, " and ".join(sorted(namings)), ordered, context.table)


def unsupported(key: str) -> str | None:
    """Why a key cannot be part of a LoRA, if it is of a kind that is known.

    >>> unsupported("x.vera_lambda_b")
    'VeRA, which needs numbers that are not in the file'
    """
    return next((name for pattern, name in _FORMS if re.search(pattern, key)), None)


def part(key: str, context: Context | None = None) -> Part | None:
    """Translates one key; ``None`` if it is not understood.

    >>> part("lora_te_text_model_encoder_layers_0_mlp_fc1.alpha").module
    'text_encoder.text_model.encoder.layers.0.mlp.fc1'
    >>> part("lora_unet_output_blocks_5_2_conv.lora_up.weight").module
    'unet.up_blocks.1.upsamplers.0.conv'
    """
    end = _ending(key)
    if end is None:
        return None
    found = target(end.stem, context or _context([key], 2, {}, ()), old=end.old)
    return Part(found, end.role, end.naming) if found else None


class _Ending(NamedTuple):
    """A key without its ending, and what the ending says."""

    stem: str
    role: str
    naming: str
    old: bool


def _ending(key: str) -> _Ending | None:
    for pattern, role, naming in _ROLES:
        match = pattern.search(key)
        if match is not None:
            groups = match.groupdict()
            end = match.end("keep") if "keep" in groups else match.start()
            old = match.group(0).startswith("_lora")
            return _Ending(key[:end], groups.get("role") or role, naming, old)
    return None


def _context(
    keys: list[str],
    layers_per_block: int,
    shapes: Mapping[str, tuple[int, ...]],
    modules: Iterable[str],
) -> Context:
    table = family(keys)
    modules = list(modules)
    if table == "flux" and _is_flux2(shapes, modules):
        table = "flux2"
    if table == "z_image" and _is_lumina2(shapes, modules):
        table = "lumina2"
    text = "\n".join(keys)
    # FLUX has one CLIP and T5, Stable Diffusion 3 two and T5.
    flux = table == "flux" or "single_transformer_blocks" in text
    t5 = "text_encoder_2" if flux else "text_encoder_3"
    if table in ("chroma", "pixart"):  # which have no CLIP
        t5 = "text_encoder"
    clip = "text_encoder_2" if table == "hunyuan" else "text_encoder"  # beside a Llama
    flat = {name.replace(".", "_"): name for name in modules}
    return Context(layers_per_block, table, t5, clip, flat)


def _is_flux2(shapes: Mapping[str, tuple[int, ...]], modules: Iterable[str]) -> bool:
    """By the file's shapes, otherwise by the model's names.

    The feed-forward of FLUX.2 is gated and three times as wide as its inputs, so that its first
    layers are half as wide again as those of FLUX.1, where it is four times as wide.
    """
    first = False
    for layer, one, two in _FLUX:
        ratios = _ratios(shapes, layer)
        if two in ratios:
            return True
        first = first or one in ratios
    if any(inputs in (4096, 6144) for _, inputs in _sizes(shapes, r"attn[._](qkv|proj)")):
        return True
    return not first and any(re.search(r"to_qkv_mlp_proj|ff\.linear_in", n) for n in modules)


def _is_lumina2(shapes: Mapping[str, tuple[int, ...]], modules: Iterable[str]) -> bool:
    """Z-Image, whose names are the same, has as many keys and values as queries.

    Its feed-forward layers are 8/3 as wide as what they read, those of Lumina 2 four times.
    """
    if any(re.match(r"layers\.\d+\.attn\.", name) for name in modules):
        return True
    if any(ratio < 3 for ratio in _ratios(shapes, r"attention[._]qkv")):
        return True
    return any(ratio > 3 for ratio in _ratios(shapes, r"feed_forward[._]w[13]"))


def _ratios(shapes: Mapping[str, tuple[int, ...]], layer: str) -> list[float]:
    """Outputs to inputs of the layers whose names end like that."""
    return [outputs / inputs for outputs, inputs in _sizes(shapes, layer)]


def _sizes(shapes: Mapping[str, tuple[int, ...]], layer: str) -> list[tuple[int, int]]:
    """Outputs and inputs of the layers whose names end like that, in any form that tells both."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, shape in shapes.items():
        end = _ending(key) if re.search(layer, key) else None
        if end is not None and re.search(f"({layer})$", end.stem):
            found.setdefault(end.stem, {})[end.role] = shape
    both = ((_outputs(roles), forms.inputs(roles)) for roles in found.values())
    return [(outputs, inputs) for outputs, inputs in both if outputs and inputs]


def _outputs(roles: Mapping[str, tuple[int, ...]]) -> int | None:
    """How many outputs a layer has, by the shapes of its roles, if they tell."""
    if "hada_t1" in roles or "lokr_t2" in roles:
        return None
    for role in ("up", "hada_w1_a", "diff", "b1"):
        if len(roles.get(role, ())) > 1:
            return roles[role][0]
    small = roles.get("lokr_w1", roles.get("lokr_w1_a", ()))
    large = roles.get("lokr_w2", roles.get("lokr_w2_a", ()))
    return small[0] * large[0] if small and large else None
