"""What the engine has to know about each family of denoisers: one row of data per class.

A denoiser without a row still composes; it has no feature cache, and its latents are taken for
maps (B, C, H, W).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from cmlora.errors import CmloraError

if TYPE_CHECKING:
    from torch import nn

ATTRIBUTES: tuple[str, ...] = ("unet", "transformer", "transformer_2")
"""Where pipelines keep the models that are called at a denoising step."""

TEXT_ENCODERS: tuple[str, ...] = ("text_encoder", "text_encoder_2", "text_encoder_3")
"""Where pipelines keep the models that read prompts."""

STEERING: tuple[str, ...] = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
    "block_controlnet_hidden_states",
    "controlnet_block_samples",
    "controlnet_single_block_samples",
    "control_hidden_states",
    "skip_layers",
    "kv_cache_mode",
)
"""Arguments that act between blocks, where a pass that reuses features would miss them."""


@dataclass(frozen=True)
class Stack:
    """A list of transformer blocks that run one after the other.

    Args:
        attribute: its name in the model.
        returns: the arguments of a block that come back changed, in the order of its output.
    """

    attribute: str
    returns: tuple[str, ...] = ("hidden_states",)


@dataclass(frozen=True)
class Kind:
    """A family of denoisers.

    Args:
        family: what people call it.
        latent: what goes in: ``maps`` (B, C, H, W); ``tokens`` (B, H/2 * W/2, 4 C), patches of
            two by two in rows; ``frames`` (B, C, F, H, W).
        guidance: the pipelines' argument for the strength of guidance.
        stacks: the transformer blocks, in the order they run; empty if none can be skipped.
        live: how many blocks stay live at the beginning and at the end when features are reused.
        first: which branch of guidance is the first half of a doubled batch; ``None`` if the
            family's pipelines call the denoiser once per branch, or have no guidance.
        beyond: whether guidance counts from the conditional branch, c + s (c - u), and ends early
            where the pipeline is told so.
        unbatched: arguments whose first dimension is not the batch.
        listed: arguments that are lists of one item per picture.
    """

    family: str
    latent: Literal["maps", "tokens", "frames"] = "maps"
    guidance: str = "guidance_scale"
    stacks: tuple[Stack, ...] = ()
    live: tuple[int, int] = (4, 4)
    first: Literal["uncond", "cond"] | None = None
    beyond: bool = False
    unbatched: tuple[str, ...] = ()
    listed: tuple[str, ...] = ()


_BOTH = ("encoder_hidden_states", "hidden_states")
_UNET = Kind("Stable Diffusion", first="uncond")

KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "UNet2DConditionModel": _UNET,
        "SD3Transformer2DModel": Kind(
            "Stable Diffusion 3",
            stacks=(Stack("transformer_blocks", _BOTH),),
            live=(3, 3),
            first="uncond",
        ),
        "FluxTransformer2DModel": Kind(
            "FLUX.1",
            latent="tokens",
            stacks=(Stack("transformer_blocks", _BOTH), Stack("single_transformer_blocks", _BOTH)),
            unbatched=("img_ids", "txt_ids"),
        ),
        "Flux2Transformer2DModel": Kind(
            "FLUX.2",
            latent="tokens",
            stacks=(Stack("transformer_blocks", _BOTH), Stack("single_transformer_blocks")),
        ),
        "QwenImageTransformer2DModel": Kind(
            "Qwen-Image",
            latent="tokens",
            guidance="true_cfg_scale",
            stacks=(Stack("transformer_blocks", _BOTH),),
            live=(6, 6),
            listed=("img_shapes",),
        ),
        "ZImageTransformer2DModel": Kind(
            "Z-Image",
            latent="frames",
            stacks=(Stack("layers", ("x",)),),
            first="cond",
            beyond=True,
            listed=("x", "cap_feats"),
        ),
        "PixArtTransformer2DModel": Kind(
            "PixArt",
            stacks=(Stack("transformer_blocks"),),
            first="uncond",
        ),
        "SanaTransformer2DModel": Kind(
            "Sana", stacks=(Stack("transformer_blocks"),), live=(2, 2), first="uncond"
        ),
        "WanTransformer3DModel": Kind("Wan", latent="frames", stacks=(Stack("blocks"),)),
    }
)
"""Rows by the name of a model's class; a class that derives from one of them has its row."""

_PLAIN = Kind("an unknown family")
_FEW_STEPS = ("LCMScheduler", "FlowMatchLCMScheduler", "TCDScheduler", "SCMScheduler")
_DISTILLED = re.compile(r"schnell|turbo|lightning|hyper-?sd|\blcm\b|sprint|klein(?!-base)", re.I)
_DISTILLING = re.compile(r"\b[1-8] ?steps?\b|\blcm\b|\bhyper ?sd|\blightx2v\b|\bdmd2?\b", re.I)


def kind(model: Any) -> Kind:
    """The row of a denoiser."""
    model = getattr(model, "_orig_mod", model)
    names = (each.__name__ for each in type(model).__mro__)
    return next((KINDS[name] for name in names if name in KINDS), _PLAIN)


def find(pipe: Any) -> dict[str, nn.Module]:
    """The denoisers of a pipeline by the name they have there; most pipelines have one.

    Raises:
        CmloraError: if there is none.
    """
    from torch import nn

    models = {name: getattr(pipe, name, None) for name in ATTRIBUTES}
    found = {name: model for name, model in models.items() if isinstance(model, nn.Module)}
    if not found:
        raise CmloraError(
            f"{type(pipe).__name__} has no {' or '.join(ATTRIBUTES[:2])}; "
            "expected a diffusers pipeline"
        )
    return found


def chosen(into: str | Sequence[str] | None) -> tuple[str, ...]:
    """Names of denoisers in the order pipelines have them.

    Args:
        into: one name or several; ``None`` or nothing leaves it to the file.

    Raises:
        CmloraError: for a name that no pipeline has.

    >>> chosen(["transformer_2", "transformer"]), chosen(None)
    (('transformer', 'transformer_2'), ())
    """
    names = (into,) if isinstance(into, str) else tuple(into or ())
    for name in names:
        if name not in ATTRIBUTES:
            known = f"{', '.join(ATTRIBUTES[:-1])} or {ATTRIBUTES[-1]}"
            raise CmloraError(f"into={name!r}: expected {known}")
    return tuple(name for name in ATTRIBUTES if name in names)


def few_steps(pipe: Any, loras: Iterable[str] = ()) -> str | None:
    """Why a pipeline is one of the models that need four to eight steps; ``None`` if it is not.

    From one step to the next of such a run nearly everything changes, so that nothing is left to
    be reused.

    Args:
        pipe: the pipeline.
        loras: names of the LoRAs that take part; one made for few steps mostly says so, as in
            ``sdxl_lightning_4step_lora``.
    """
    scheduler = type(getattr(pipe, "scheduler", None)).__name__
    if scheduler in _FEW_STEPS:
        return f"it samples with {scheduler}"
    config: Mapping[str, Any] = getattr(pipe, "config", None) or {}
    if config.get("is_distilled"):
        return "its configuration says is_distilled"
    models = [getattr(pipe, name, None) for name in ATTRIBUTES]
    configs = [config, *(getattr(model, "config", None) or {} for model in models)]
    for each in configs:
        name = str(each.get("_name_or_path") or "")
        if _DISTILLED.search(name.rpartition("/")[2]):
            return f"it is {name}"
    model: Any = getattr(pipe, "transformer", None)
    if type(model).__name__ == "FluxTransformer2DModel" and hasattr(pipe, "config"):
        shifting = getattr(pipe.scheduler, "config", {}).get("use_dynamic_shifting", True)
        if not (model.config.guidance_embeds or shifting):
            return "it is FLUX.1 schnell, which has no guidance input and a fixed schedule"
    for lora in loras:
        if _DISTILLING.search(re.sub(r"[-_.]", " ", lora)):
            return f"the LoRA {lora} is, as its name says"
    return None
