"""diffusers' own caches on a denoiser, put on and taken off without a trace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

import diffusers.hooks

from cmlora.caching import mag
from cmlora.caching.mag import Mag
from cmlora.caching.policy import parse
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

NAMES: tuple[str, ...] = (*_NAMED, "mag")
"""diffusers' caches that can be asked for by text, which are all."""


def named(text: Any) -> Any:
    """The configuration a text stands for, or ``None`` if it names none of diffusers' caches.

    Args:
        text: ``first_block``, ``first_block:0.1``, ``taylorseer:4``, ``sea:0.25``, ``broadcast:2``
            or ``faster:2``, where without a number diffusers' own default holds; ``text_kv``; or
            ``mag:0.06``, see `cmlora.caching.mag.parse`.

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
    kind, parameter, number = _NAMED[name]
    config = getattr(diffusers.hooks, kind)
    if number is None:
        if colon:
            raise CmloraError(f"cache {text!r}: {name} takes no number")
        return config()
    try:
        return config(**{parameter: number(value)}) if colon else config()
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
    (Stable Diffusion 3, Z-Image).

    Args:
        model: the denoiser.
        config: the cache's configuration, which is not changed; or what a text says of one.
        timestep: tells the present timestep to caches that ask for it.

    Raises:
        CmloraError: if the model has a cache already, or the cache does not know its blocks.
    """

    def __init__(self, model: Any, config: Any, timestep: Callable[[], float]) -> None:
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
        alone = name == "TextKVCacheConfig" and len(self._added) == 1
        if alone or not self._added:
            self.remove()
            raise CmloraError(f"{name} finds nothing to cache in {type(model).__name__}")

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


def _state(module: nn.Module) -> tuple[tuple[str, ...] | None, bool]:
    """Names of the hooks on a module, and whether its forward is an attribute of its own."""
    registry = vars(module).get("_diffusers_hook")
    names = None if registry is None else tuple(registry._hook_order)
    return names, "forward" in vars(module)
