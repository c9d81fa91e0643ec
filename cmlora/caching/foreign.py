"""diffusers' own caches on a denoiser, put on and taken off without a trace.

Of their own accord they go on many models in which they then fail, or do nothing. Which of them
work in which family is `FITTING`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import diffusers.hooks

from cmlora.caching import mag, sea
from cmlora.caching.mag import Mag
from cmlora.caching.policy import parse
from cmlora.denoisers import kind
from cmlora.errors import CmloraError
from cmlora.hooks import forget_children, unlink

if TYPE_CHECKING:
    from torch import nn

_APPLY = {
    "FirstBlockCacheConfig": "apply_first_block_cache",
    "TaylorSeerCacheConfig": "apply_taylorseer_cache",
    "MagCacheConfig": "apply_mag_cache",
    "SeaCacheConfig": "apply_sea_cache",
    "TextKVCacheConfig": "apply_text_kv_cache",
    "PyramidAttentionBroadcastConfig": "apply_pyramid_attention_broadcast",
    "FasterCacheConfig": "apply_faster_cache",
}
_STARTED_BY = "current_timestep_callback"
_NAMED = {
    "first_block": ("FirstBlockCacheConfig", "threshold", float),
    "taylorseer": ("TaylorSeerCacheConfig", "cache_interval", int),
    "sea": ("SeaCacheConfig", "threshold", float),
    "broadcast": ("PyramidAttentionBroadcastConfig", "spatial_attention_block_skip_range", int),
    "faster": ("FasterCacheConfig", "spatial_attention_block_skip_range", int),
    "text_kv": ("TextKVCacheConfig", "", None),
}
_FASTER = {"is_guidance_distilled": True}

NAMES: tuple[str, ...] = (*_NAMED, "mag")
"""diffusers' caches that can be asked for by text, which are all."""

FITTING: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "Stable Diffusion": ("broadcast",),
        "Stable Diffusion 3": ("taylorseer", "broadcast", "faster", "mag"),
        "FLUX.1": ("first_block", "taylorseer", "sea", "broadcast", "faster", "mag"),
        "FLUX.2": ("taylorseer", "broadcast", "faster", "mag"),
        "Qwen-Image": ("first_block", "taylorseer", "sea", "broadcast", "faster", "mag"),
        "Z-Image": ("broadcast",),
        "PixArt": ("first_block", "broadcast", "faster", "mag"),
        "Sana": ("broadcast", "faster"),
        "Wan": ("first_block", "sea", "broadcast", "faster", "mag"),
    }
)
"""By family, the caches that run in it and save something; the others are refused."""

_GUESSED = ("PixArt", "Sana")
"""Families whose unconditional half FasterCache can guess from the conditional one."""


def named(text: Any) -> Any:
    """The configuration a text stands for, or ``None`` if it names none of diffusers' caches.

    Args:
        text: ``first_block``, ``first_block:0.1``, ``taylorseer:4``, ``sea:0.25``, ``broadcast:2``
            or ``faster:2``, where without a number diffusers' own default holds; ``text_kv``; or
            ``mag:0.06``, see `cmlora.caching.mag.parse`. Of FasterCache that is the part that skips
            attention: every branch of guidance is computed.

    Raises:
        CmloraError: if what follows the name is no such number.

    >>> named("first_block:0.1").threshold, named("uniform:3")
    (0.1, None)
    """
    if not isinstance(text, str):
        return None
    name, colon, value = text.strip().partition(":")
    if name == "mag":
        return mag.parse(text)
    if name not in _NAMED:
        return None
    config_name, parameter, number = _NAMED[name]
    config = getattr(diffusers.hooks, config_name)
    fixed = _FASTER if name == "faster" else {}
    if number is None:
        if colon:
            raise CmloraError(f"cache {text!r}: {name} takes no number")
        return config()
    try:
        return config(**{**fixed, parameter: number(value)}) if colon else config(**fixed)
    except ValueError:
        example = "0.1" if number is float else "3"
        raise CmloraError(f"cache {text!r}: write {name} or {name}:{example}") from None


def canonical(text: str) -> str:
    """How a recipe writes a cache, one of ours or of diffusers'.

    Raises:
        CmloraError: for a text that stands for neither.

    >>> canonical(" uniform:3"), canonical("first_block:0.1 ")
    ('uniform:3', 'first_block:0.1')
    """
    found = named(text)
    if isinstance(found, Mag):
        return found.text
    return text.strip() if found is not None else parse(text).name


def is_config(value: Any) -> bool:
    """Whether a value is the configuration of one of diffusers' caches."""
    return isinstance(value, Mag) or (is_dataclass(value) and type(value).__name__ in _APPLY)


class ForeignCache:
    """One of diffusers' caches on a model, from construction until `remove`.

    Unlike ``enable_cache`` it also goes on models that do not derive from diffusers' ``CacheMixin``
    (Stable Diffusion 3, Z-Image), and tells SeaCache where the picture is.

    Args:
        model: the denoiser.
        config: the cache's configuration, which is not changed; or what a text says of one.
        timestep: tells the present timestep to caches that ask for it.
        halved: whether passes may run on one branch of guidance alone.

    Raises:
        CmloraError: if the model has a cache already, or the cache fails in it or finds nothing to
            do; says which caches fit.
    """

    def __init__(
        self, model: Any, config: Any, timestep: Callable[[], float], *, halved: bool = False
    ) -> None:
        _check_fit(model, config, halved)
        self._mag = config if isinstance(config, Mag) else None
        config = self._config = config.config(model, 1) if isinstance(config, Mag) else config
        name = type(config).__name__
        if getattr(model, "is_cache_enabled", False):
            raise CmloraError(
                f"{type(model).__name__} has a cache already; call disable_cache() on it or leave "
                f"out cache={name}"
            )
        names = {field.name for field in fields(config)}
        if _STARTED_BY in names and getattr(config, _STARTED_BY) is None:
            config = replace(config, **{_STARTED_BY: timestep})
        if name == "SeaCacheConfig" and config.raw_vision_callback is None and kind(model).stacks:
            config = replace(config, raw_vision_callback=sea.picture)
        self._model = model
        self._before = {module: _state(module) for module in model.modules()}
        self._added: list[tuple[nn.Module, str]] = []
        try:
            getattr(diffusers.hooks, _APPLY[name])(model, config)
            self._note()
        except Exception as failure:  # each cache has its own ways
            self._note()
            self.remove()
            raise CmloraError(
                f"{name} does not go on {type(model).__name__} ({failure}); use another cache"
            ) from failure
        forget_children(model)
        idle = name == "TextKVCacheConfig" or getattr(config, "is_guidance_distilled", False)
        if len(self._added) <= (1 if idle else 0):  # one of theirs is on the model itself
            self.remove()
            raise CmloraError(
                f"{name} finds nothing to cache in {type(model).__name__}; use another cache"
            )

    def begin(self, steps: int) -> None:
        """A run begins: a table by text is stretched to its steps."""
        if self._mag is not None:
            vars(self._config).update(vars(self._mag.config(self._model, steps)))

    def remove(self) -> None:
        """Take the cache's hooks off; others stay."""
        for module, name in self._added:
            unlink(module, name)
        for module, (names, had_forward) in self._before.items():
            registry = vars(module).get("_diffusers_hook")
            if registry is None or registry.hooks:
                continue
            if names is None:
                del module._diffusers_hook
            own: Any = type(module).forward.__get__(module)
            if not had_forward and vars(module).get("forward") == own:
                del module.forward
        self._added.clear()
        forget_children(self._model)

    def _note(self) -> None:
        """Remember which hooks were not there before."""
        for module, (names, _) in self._before.items():
            now = _state(module)[0] or ()
            self._added += [(module, name) for name in now if name not in (names or ())]


def _check_fit(model: Any, config: Any, halved: bool) -> None:
    """See that a cache works in a family that is known."""
    family, config_name = kind(model).family, type(config).__name__
    names = {row[0]: name for name, row in _NAMED.items()}
    name = names.get(config_name, "mag")
    fitting = FITTING.get(family)
    if fitting is None:
        return
    if name not in fitting and not _placed(config):
        raise CmloraError(
            f"cache {name} does not fit {family} ({type(model).__name__}): it fails there or saves "
            f"nothing; of diffusers' caches {_listed(fitting)}, and cmlora's own fit too, such as "
            "uniform:3"
        )
    guessing = name == "faster" and not config.is_guidance_distilled
    if guessing and (halved or family not in _GUESSED):
        where = "with uncond='shared'" if halved else f"in {family}"
        raise CmloraError(
            f"{config_name} guesses the unconditional half of a batch from the other half, which "
            f"fails {where}; set is_guidance_distilled=True, which leaves that out, or write "
            "cache='faster'"
        )


def _placed(config: Any) -> bool:
    """Whether a configuration says itself where in a model its cache goes."""
    if not is_dataclass(config):
        return False
    places = [f for f in fields(config) if f.name.endswith(("_identifiers", "_lite_mode"))]
    return any(getattr(config, field.name) != field.default for field in places)


def _listed(names: tuple[str, ...]) -> str:
    """In a sentence."""
    return f"{', '.join(names[:-1])} and {names[-1]} do" if names[1:] else f"{names[0]} does"


def _state(module: nn.Module) -> tuple[tuple[str, ...] | None, bool]:
    """Names of the hooks on a module, and whether its forward is an attribute of its own."""
    registry = vars(module).get("_diffusers_hook")
    names = None if registry is None else tuple(registry._hook_order)
    return names, "forward" in vars(module)
