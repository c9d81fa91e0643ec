"""Samplers of Stable Diffusion web UIs as diffusers' schedulers."""

import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from cmlora.recipe import SAMPLERS

_MULTISTEP = "DPMSolverMultistepScheduler"
_KINDS: Mapping[str, tuple[str, Mapping[str, Any]]] = MappingProxyType(
    {
        **{said: (name, {}) for name, said in SAMPLERS.items()},
        "DPM++ 2M": (_MULTISTEP, {"algorithm_type": "dpmsolver++", "solver_order": 2}),
        "DPM++ 2M SDE": (_MULTISTEP, {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
    }
)
_TYPES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "Uniform": {},
        "Karras": {"use_karras_sigmas": True},
        "Exponential": {"use_exponential_sigmas": True},
        "Beta": {"use_beta_sigmas": True},
        "SGM Uniform": {"timestep_spacing": "trailing"},
    }
)
_AUTOMATIC = {
    "DPM++ 2M": "Karras",
    "DPM++ SDE": "Karras",
    "DPM2": "Karras",
    "DPM2 a": "Karras",
    "DPM++ 2M SDE": "Exponential",
}
"""What the schedule type Automatic is to a sampler, where it is not Uniform."""


def use_sampler(pipe: Any, sampler: str, schedule_type: str) -> list[str]:
    """Sets the scheduler that a web UI's sampler is, if there is one.

    Args:
        pipe: gets the scheduler.
        sampler: as it is called there, with the schedule type at its end in older pictures.
        schedule_type: as it is called there; empty if it is not stated.

    Returns:
        What of them is not carried out, a line for each.
    """
    import diffusers

    own = type(pipe.scheduler).__name__
    kept = f"the model's own {own} is used"
    if not sampler:
        return [f"Sampler not stated: {kept}"]
    name, kind = _taken_apart(sampler, schedule_type)
    if _flows(pipe.scheduler):
        if SAMPLERS.get(own.removeprefix("FlowMatch")) != name:
            return [f"Sampler {sampler} is left out: {kept}, for the model predicts velocities"]
        return [] if kind == "Uniform" else [f"Schedule type {kind} is left out: {kept}"]
    if name not in _KINDS:
        return [f"Sampler {sampler} is left out, there is none of that name here: {kept}"]
    left = [] if kind in _TYPES else [f"Schedule type {kind} is left out: it is not known here"]
    title, options = _KINDS[name]
    scheduler: Any = getattr(diffusers, title)
    try:
        taken = inspect.signature(scheduler.__init__).parameters
        # of the three kinds of noise levels a scheduler takes one, and the model's may be another
        levels = {key: False for row in _TYPES.values() for key in row if row[key] is True}
        asked = {**levels, **_TYPES.get(kind, {})}
        for key, value in asked.items():
            if value and key not in taken:
                left.append(f"Schedule type {kind} is left out: {title} has none")
        settings = {key: value for key, value in asked.items() if key in taken}
        made = scheduler.from_config(pipe.scheduler.config, **options, **settings)
    except ImportError as missing:
        why = " ".join(str(missing).split())
        return [f"Sampler {sampler} is left out, it needs another library ({why}): {kept}"]
    pipe.scheduler = made
    return left


def _taken_apart(sampler: str, schedule_type: str) -> tuple[str, str]:
    """A sampler and its schedule type.

    >>> _taken_apart("DPM++ 2M SDE Karras", ""), _taken_apart("DPM++ 2M", "Automatic")
    (('DPM++ 2M SDE', 'Karras'), ('DPM++ 2M', 'Karras'))
    """
    for kind in ("Karras", "Exponential"):
        if sampler.endswith(f" {kind}"):
            return sampler.removesuffix(f" {kind}"), kind
    if schedule_type == "Automatic":
        return sampler, _AUTOMATIC.get(sampler, "Uniform")
    return sampler, schedule_type or "Uniform"


def _flows(scheduler: Any) -> bool:
    """Whether it is for a model that predicts velocities, which most samplers are not made for."""
    config = scheduler.config
    return (
        type(scheduler).__name__.startswith("FlowMatch")
        or config.get("prediction_type") == "flow_prediction"
        or bool(config.get("use_flow_sigmas"))
    )
