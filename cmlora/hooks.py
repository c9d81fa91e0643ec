"""Hooks on modules that leave nothing behind when they are taken off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import CacheContext, _set_cache_context

if TYPE_CHECKING:
    from torch import nn


class Attachment:
    """A `ModelHook` on a module, from construction until `remove`.

    diffusers' own ``remove_hook`` leaves an empty registry and an instance attribute
    ``forward`` behind; this puts the module's ``__dict__`` back to what it was.

    accelerate's offloading replaces ``forward`` around every run. The hook goes beneath it: it
    survives that, and a model is moved to its device once for all passes of a step.

    Args:
        module: where the hook goes; hooks that are there already stay inside it.
        hook: the hook.
        name: its name in the module's registry.
    """

    def __init__(self, module: nn.Module, hook: ModelHook, name: str) -> None:
        self.module = module
        self.name = name
        self._had_registry = "_diffusers_hook" in vars(module)
        self._had_forward = "forward" in vars(module)
        with _beneath_offloading(module):
            registry(module).register_hook(hook, name)

    def remove(self) -> None:
        """Take the hook off; later hooks on the same module stay."""
        hooks = registry(self.module)
        unlink(self.module, self.name)
        if not (self._had_registry or hooks.hooks):
            del self.module._diffusers_hook
        own = type(self.module).forward.__get__(self.module)
        if not self._had_forward and vars(self.module).get("forward") == own:
            del self.module.forward


def unlink(module: nn.Module, name: str) -> None:
    """Take one hook off a module; the hooks above and beneath it stay."""
    with _beneath_offloading(module):
        _unlink(registry(module), name)


def registry(module: nn.Module) -> Any:
    """The module's `HookRegistry`, made if there is none."""
    return HookRegistry.check_if_exists_or_initialize(module)


def hook_of(module: nn.Module, name: str) -> ModelHook | None:
    """The hook of that name on the module itself, if any; makes no registry."""
    hooks = getattr(module, "_diffusers_hook", None)
    return None if hooks is None else hooks.get_hook(name)


def forget_children(module: nn.Module) -> None:
    """Tell the registries of a tree that hooks were put on or taken off inside of it."""
    if hasattr(module, "_diffusers_hook"):
        registry(module).invalidate_child_registries_cache()


def stateful_hooks(module: nn.Module, *, besides: ModelHook) -> list[tuple[ModelHook, nn.Module]]:
    """Every hook in the tree that keeps a state per cache context, with its module."""
    return [
        (hook, child)
        for child in module.modules()
        for hook in getattr(vars(child).get("_diffusers_hook"), "hooks", {}).values()
        if hook._is_stateful and hook is not besides
    ]


@contextmanager
def cache_context(
    module: nn.Module, inner: CacheContext, outer: CacheContext | None
) -> Iterator[None]:
    """Give the stateful hooks of a tree one context, and afterwards the outer one again.

    Unlike diffusers' ``cache_context``, which leaves no context behind.
    """
    _set_cache_context(module, inner)
    try:
        yield
    finally:
        _set_cache_context(module, outer)


@contextmanager
def _beneath_offloading(module: Any) -> Iterator[None]:
    """Within the context ``module.forward`` is what accelerate's wrapper calls, if it has one."""
    attributes = vars(module)
    if not ("_hf_hook" in attributes and "_old_forward" in attributes):
        yield
        return
    outer = module.forward
    module.forward = module._old_forward
    try:
        yield
    finally:
        module._old_forward = module.forward
        module.forward = outer


def _unlink(hooks: Any, name: str) -> None:
    """Remove one hook from a registry, keeping the forward functions of the hook above it."""
    index = hooks._hook_order.index(name)
    above = hooks._fn_refs[index + 1] if index + 1 < len(hooks._fn_refs) else None
    kept = None if above is None else above.forward
    hooks.remove_hook(name, recurse=False)
    # remove_hook writes the inner function over the one that a hook with its own forward runs
    if above is not None and above.original_forward is not None:
        above.original_forward = above.forward
        above.forward = kept
