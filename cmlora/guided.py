"""Which branches of classifier-free guidance a call of the denoiser holds, and their scale."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from cmlora.denoisers import Kind

Side = Literal["both", "cond", "uncond"]

_SWITCHES = ("do_classifier_free_guidance", "do_true_cfg")
_SCALES = ("current_guidance_scale", "true_cfg_scale", "guidance_scale")
_THIRD = ("do_perturbed_attention_guidance", "image_guidance_scale")


@dataclass(frozen=True)
class Guidance:
    """What is known of a call.

    Args:
        side: ``both`` branches as the halves of a batch, the one there is, or ``None`` where
            nothing tells.
        scale: s of u + s (c - u); 1 without guidance, ``None`` if it is not known.
        paired: whether the other branch, if there is one, is the step's other call; the
            conditional one comes first.
        doubt: why nothing tells, or why the other call does not belong to this one.
    """

    side: Side | None = None
    scale: float | None = None
    paired: bool = False
    doubt: str = ""

    @property
    def apart(self) -> bool:
        """Whether the branches come in two calls, as far as anybody knows."""
        return self.side != "both" and self != OFF


OFF = Guidance("cond", 1.0)
"""No guidance: what there is is the conditional branch."""


def guidance(
    pipe: Any,
    denoiser: Any,
    kind: Kind,
    branch: str,
    sample: torch.Tensor | None,
    *,
    named: bool,
    whole: bool,
) -> Guidance:
    """What a call of the denoiser is to guidance.

    Modular pipelines ask a guider; other pipelines name their calls ``cond`` and ``uncond``, or
    double the batch. Where they do neither the conditional call comes first.

    Args:
        pipe: the pipeline whose call is under way.
        denoiser: the one that is called.
        kind: its row.
        branch: of the call, see `cmlora.tracker.Tick`.
        sample: what goes in, (B, ...), if it is one tensor.
        named: whether the pipeline gives its calls names.
        whole: whether this is a call on all layers, and no further one that skips some.
    """
    second = denoiser is not None and getattr(pipe, "transformer_2", None) is denoiser
    guider = getattr(pipe, "guider_2" if second else "guider", None)
    conditions = getattr(guider, "num_conditions", None)
    if isinstance(conditions, int):
        return _by_guider(guider, conditions, branch)
    name = branch.removeprefix("pred_")
    on = _told(pipe, _SWITCHES)
    if on is False:
        return OFF
    scale = _scale(kind, pipe) if on else None
    if named and not name.startswith("cond_uncond"):
        if not name.startswith(("cond", "uncond")):
            return Guidance(doubt=f"calls named {name!r} are of no known branch")
        side: Side = "uncond" if name.startswith("uncond") else "cond"
        return Guidance(side, scale, paired=name == side)
    if kind.first is not None:
        return _by_halves(kind, pipe, sample, on, scale) if whole else OFF
    if kind.stacks and not named:
        return Guidance("uncond" if branch == "#1" else "cond", scale, branch in ("", "#1"))
    return Guidance(doubt=f"nobody knows how {type(pipe).__name__} guides") if on else OFF


def _by_guider(guider: Any, conditions: int, branch: str) -> Guidance:
    """In a Modular pipeline, at a call its guider has prepared."""
    if conditions < 2:
        return OFF
    name = branch.removeprefix("pred_")
    conditional = getattr(guider, "is_conditional", None)  # one guider of diffusers fails here
    if name.startswith(("cond", "uncond")):
        conditional = not name.startswith("uncond")
    if not isinstance(conditional, bool):
        return Guidance(doubt=f"{type(guider).__name__} does not tell its calls apart")
    side: Side = "cond" if conditional else "uncond"
    scale = getattr(guider, "guidance_scale", None)
    if isinstance(scale, int | float):
        scale = scale + bool(getattr(guider, "use_original_formulation", False))
    if hasattr(guider, "auto_guidance_config"):
        return Guidance(side, scale, doubt="its unconditional branch is that of another model")
    return Guidance(side, scale, paired=name in (side, "", "#1"))


def _by_halves(
    kind: Kind, pipe: Any, sample: torch.Tensor | None, on: Any, scale: float | None
) -> Guidance:
    """Where pipelines double the batch."""
    if on is None:
        return Guidance(doubt=f"{type(pipe).__name__} does not say whether its batch is doubled")
    if any(getattr(pipe, name, False) for name in _THIRD):
        return Guidance(doubt="its batch has a third part beside the two branches")
    if sample is None:
        return Guidance(doubt="its pictures have different sizes")
    size = len(sample)
    # a pipeline that ends guidance early goes on with single batches
    if kind.beyond and (size % 2 or not torch.equal(sample[: size // 2], sample[size // 2 :])):
        return OFF
    if size % 2:
        return Guidance(doubt=f"its batch of {size} has no halves")
    if scale is None:
        return Guidance(doubt=f"{type(pipe).__name__} does not tell its scale")
    return Guidance("both", scale)


def _scale(kind: Kind, pipe: Any) -> float | None:
    """s of u + s (c - u)."""
    scale = _told(pipe, _SCALES)
    return float(scale) + kind.beyond if isinstance(scale, int | float) else None


def _told(pipe: Any, names: tuple[str, ...]) -> Any:
    """The first of these that a pipeline has, as an attribute or in the call that is under way."""
    known: Mapping[str, Any] | None = None
    for name in names:
        value = getattr(pipe, name, None)
        if value is None:
            known = _variables(pipe) if known is None else known
            value = known.get(name)
        if value is not None:
            return value
    return None


def _variables(pipe: Any) -> Mapping[str, Any]:
    """The local variables of the pipeline's call: some keep here what others do outside."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "__call__" and frame.f_locals.get("self") is pipe:
            return frame.f_locals
        frame = frame.f_back
    return {}
