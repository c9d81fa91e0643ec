"""A state of its own per LoRA for every other cache that hangs on a denoiser.

diffusers' caches keep what they remember under the name of the cache context. Pipelines name it
after the branch of guidance, if they name it at all, so that all LoRAs of a composition would share
one state, and every picture be made of another LoRA's features. Two of the caches (pyramid
attention broadcast, FasterCache) have one state whatever the context; theirs is exchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from traceback import walk_tb
from typing import TYPE_CHECKING, Any

from diffusers.hooks import ModelHook
from diffusers.hooks.hooks import CacheContext, StateManager

from cmlora import hooks
from cmlora.errors import CmloraError, is_memory
from cmlora.plan import Strength, alike

if TYPE_CHECKING:
    from torch import nn

_THEIRS = "diffusers.hooks."
_PLUMBING = ("hooks", "_helpers", "_common")


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
        self._states: dict[str, list[Any]] = {}
        self._weights: dict[str, Mapping[str, Strength]] = {}
        self._last: dict[str, int] = {}

    def __bool__(self) -> bool:
        return bool(self._hooks)

    def reset(self) -> None:
        """Forget all states: a new run begins."""
        for hook, owner in self._hooks:
            hook.reset_state(owner)
        self._states.clear()
        self._weights.clear()
        self._last.clear()

    @contextmanager
    def isolated(
        self,
        weights: Mapping[str, Strength],
        inner: CacheContext,
        outer: CacheContext | None,
    ) -> Iterator[None]:
        """Give the hooks the states of one slot.

        A state that missed a step, or that began with other strengths, is dropped: what it has kept
        and extrapolates from does not hold any more.

        Args:
            weights: strengths of the pass's LoRAs.
            inner: names the slot, and tells where the run is.
            outer: the pipeline's own context, which is there again afterwards.

        Raises:
            CmloraError: if the slot is another LoRA's, or a cache fails in this model.
        """
        name, step = inner.name, inner.step_index
        began = self._weights.setdefault(name, weights)
        if began.keys() != weights.keys():
            raise CmloraError(
                f"cache context {name!r} belongs to {sorted(began)}, not to {sorted(weights)}: "
                "LoRAs cannot share a cache"
            )
        missed = step is not None and step - self._last.get(name, step) > 1
        if missed or not alike(weights, began):
            self._drop(name)
            self._weights[name] = weights
        if step is not None:
            self._last[name] = step
        before = [hook.state for hook in self._bare]
        states = self._states.setdefault(name, [_empty(hook) for hook in self._bare])
        for hook, state in zip(self._bare, states, strict=True):
            hook.state = state
        try:
            with hooks.cache_context(self._module, inner, outer):
                self._count(step)
                yield
        except CmloraError:
            raise
        except Exception as failure:
            cache = None if is_memory(failure) else _failed(failure)
            if cache is None:
                raise
            raise CmloraError(
                f"diffusers' {cache} fails in this {type(self._module).__name__} "
                f"({type(failure).__name__}: {failure}); use another cache, such as uniform:3"
            ) from failure
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


def _empty(hook: Any) -> Any:
    """A state that has seen nothing."""
    state = type(hook.state)()
    if type(hook).__name__ == "FasterCacheBlockHook":
        # at iteration 0 it would take a value that it does not have where a run, or this pass,
        # begins at a timestep in its range; from here on it counts the same
        state.iteration = hook.block_skip_range
    return state


def _failed(failure: BaseException) -> str | None:
    """The cache whose own code an error came from; ``None`` if it came from elsewhere."""
    modules = [frame.f_globals.get("__name__", "") for frame, _ in walk_tb(failure.__traceback__)]
    while modules and modules[-1].partition(".")[0] == "torch":
        modules.pop()
    if not modules or not modules[-1].startswith(_THEIRS):
        return None
    names = [name.removeprefix(_THEIRS) for name in modules if name.startswith(_THEIRS)]
    return next((name for name in reversed(names) if name not in _PLUMBING), None)


def _managers(hook: ModelHook) -> list[StateManager]:
    return [value for value in vars(hook).values() if isinstance(value, StateManager)]
