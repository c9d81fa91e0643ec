"""A state of its own per LoRA for every other cache that hangs on a denoiser.

diffusers' caches keep what they remember under the name of the cache context. Pipelines name it
after the branch of guidance, if they name it at all, so that all LoRAs of a composition would share
one state, and every picture be made of another LoRA's features. Two of the caches (pyramid
attention broadcast, FasterCache) have one state whatever the context; theirs is exchanged.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from diffusers.hooks import ModelHook
from diffusers.hooks.hooks import CacheContext, StateManager

from cmlora import hooks
from cmlora.errors import CmloraError

if TYPE_CHECKING:
    from torch import nn


class Contexts:
    """The states of all stateful hooks in a model, one per slot.

    Args:
        module: the model.
        besides: the hook that asks.

    Raises:
        CmloraError: if a hook keeps a state that cannot be kept apart.
    """

    def __init__(self, module: nn.Module, *, besides: ModelHook) -> None:
        self._module = module
        self._hooks = hooks.stateful_hooks(module, besides=besides)
        self._managers = [manager for hook, _ in self._hooks for manager in _managers(hook)]
        self._bare: list[Any] = [hook for hook, _ in self._hooks if not _managers(hook)]
        for hook in self._bare:
            if not hasattr(getattr(hook, "state", None), "reset"):
                raise CmloraError(
                    f"{type(hook).__name__} on {type(module).__name__} keeps one state for all "
                    "LoRAs, which would mix them; remove that hook before composing"
                )
        self._states: dict[Hashable, list[Any]] = {}
        self._owners: dict[str, Hashable] = {}
        self._last: dict[str, int] = {}

    def __bool__(self) -> bool:
        return bool(self._hooks)

    def reset(self) -> None:
        """Forget all states: a new run begins."""
        for hook, owner in self._hooks:
            hook.reset_state(owner)
        self._states.clear()
        self._owners.clear()
        self._last.clear()

    @contextmanager
    def isolated(
        self, owner: Hashable, inner: CacheContext, outer: CacheContext | None
    ) -> Iterator[None]:
        """Give the hooks the states of one slot.

        A state that missed a step is dropped: what it has counted and extrapolated from does not
        hold any more.

        Args:
            owner: the LoRAs of the pass.
            inner: names the slot, and tells where the run is.
            outer: the pipeline's own context, which is there again afterwards.

        Raises:
            CmloraError: if the slot is another LoRA's.
        """
        name = inner.name
        if self._owners.setdefault(name, owner) != owner:
            raise CmloraError(
                f"cache context {name!r} belongs to {self._owners[name]}, not to {owner}: "
                "LoRAs cannot share a cache"
            )
        step = inner.step_index
        if step is not None:
            if step - self._last.get(name, step) > 1:
                self._drop(name)
            self._last[name] = step
        before = [hook.state for hook in self._bare]
        states = self._states.setdefault(name, [type(state)() for state in before])
        for hook, state in zip(self._bare, states, strict=True):
            hook.state = state
        try:
            with hooks.cache_context(self._module, inner, outer):
                self._count(step)
                yield
        finally:
            for hook, state in zip(self._bare, before, strict=True):
                hook.state = state

    def _drop(self, name: str) -> None:
        self._states.pop(name, None)
        for manager in self._managers:
            manager._state_cache.pop(name, None)

    def _count(self, step: int | None) -> None:
        """Tell a cache that counts its calls which step this is: its table is one of steps."""
        for manager in self._managers:
            if step is not None and manager._state_cls.__name__ == "MagCacheState":
                manager.get_state().step_index = step


def _managers(hook: ModelHook) -> list[StateManager]:
    return [value for value in vars(hook).values() if isinstance(value, StateManager)]
