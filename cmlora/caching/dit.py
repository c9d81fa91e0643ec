"""Feature cache for transformers: the first and last blocks run live, the middle is reused.

Transformers of this kind have no skip connections, so what is kept is the residual of the middle,
x_out - x_in over its blocks. A light pass adds it to what the live blocks at the beginning make of
the present input, and the live blocks at the end see the sum.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffusers.hooks import ModelHook

from cmlora.caching.store import Store
from cmlora.denoisers import KINDS, kind
from cmlora.errors import CmloraError
from cmlora.hooks import Attachment, forget_children

if TYPE_CHECKING:
    import torch
    from torch import nn

HOOK = "cmlora_cache"
"""Name of the hooks in the blocks' registries."""


@dataclass(frozen=True, order=True)
class Live:
    """Which blocks of a transformer a light pass runs.

    Args:
        first: how many at the beginning; they are what sees the present latent.
        last: how many at the end, over all stacks of blocks.
    """

    first: int = 1
    last: int = 1


@dataclass(frozen=True)
class _Range:
    """A part of the middle: blocks of one stack that are skipped together."""

    blocks: tuple[nn.Module, ...]
    returns: tuple[str, ...]


class DiTCache:
    """Records the residual of the middle blocks in full passes and adds it in light ones.

    Args:
        model: a diffusion transformer whose class, or base class, is in `cmlora.denoisers.KINDS`.
        live: which blocks always run; ``None`` is the family's default, scaled down for a model
            with few blocks.
        store: where residuals are kept.

    Raises:
        CmloraError: if the model's blocks are not known, or the middle would be empty.
    """

    def __init__(
        self, model: nn.Module, live: Live | None = None, store: Store | None = None
    ) -> None:
        self._ranges = _middle(model, live)
        self.store = Store() if store is None else store
        self._model = model
        self._attached = ExitStack()
        self._pass: _Pass | None = None

    def attach(self) -> None:
        """Put the hooks on the blocks. Nothing changes outside of `run`."""
        with ExitStack() as stack:
            stack.callback(forget_children, self._model)
            for number, part in enumerate(self._ranges):
                for block in part.blocks:
                    ends = block is part.blocks[0], block is part.blocks[-1]
                    hook = _Middle(self, number, part.returns, *ends)
                    stack.callback(Attachment(block, hook, HOOK).remove)
            forget_children(self._model)
            self._attached = stack.pop_all()

    def detach(self) -> None:
        """Take the hooks off and free all slots; the model is as before `attach`."""
        self._attached.close()
        self.store.clear()

    def holds(self, key: Hashable) -> bool:
        """Whether a pass with this slot can be light."""
        return all(
            (key, number, name) in self.store
            for number, part in enumerate(self._ranges)
            for name in part.returns
        )

    @contextmanager
    def run(self, *keys: Hashable, reuse: bool, record: bool = True, at: int = 0) -> Iterator[bool]:
        """A context for one forward of the model; see `cmlora.caching.unet.UNetCache.run`."""
        light = reuse and all(self.holds(key) for key in keys)
        self._pass = _Pass(keys, light, record, at) if light or record else None
        try:
            yield light
        finally:
            self._pass = None

    def discard(self, key: Hashable) -> None:
        """Free a slot."""
        for number, part in enumerate(self._ranges):
            for name in part.returns:
                self.store.discard((key, number, name))

    def clear(self) -> None:
        """Free all slots."""
        self.store.clear()

    @property
    def current(self) -> _Pass | None:
        """The pass under way, if the hooks have anything to do in it."""
        return self._pass


class _Pass:
    """The pass under way."""

    def __init__(self, keys: tuple[Hashable, ...], light: bool, record: bool, at: int) -> None:
        self.keys, self.light, self.record, self.at = keys, light, record, at
        self.entered: dict[int, Mapping[str, torch.Tensor]] = {}

    def slots(self, number: int, name: str) -> list[Hashable]:
        """Names in the store for one stream of one range."""
        return [(key, number, name) for key in self.keys]


class _Middle(ModelHook):  # type: ignore[misc]
    """On every block of a range."""

    def __init__(
        self, cache: DiTCache, number: int, returns: tuple[str, ...], first: bool, last: bool
    ) -> None:
        super().__init__()
        self._cache = cache
        self._number = number
        self._returns = returns
        self._first = first
        self._last = last
        self._positions: dict[str, int] = {}

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        """Called by diffusers when the hook goes on: learns the block's signature."""
        self._positions = {n: i for i, n in enumerate(inspect.signature(module.forward).parameters)}
        return module

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Compute the block, or pass its input on; the first of a range adds the residuals."""
        current = self._cache.current
        if current is None:
            return self.fn_ref.original_forward(*args, **kwargs)
        streams = {
            name: kwargs[name] if name in kwargs else args[self._positions[name]]
            for name in self._returns
        }
        store = self._cache.store
        if current.light:
            if self._first:
                for name, value in streams.items():
                    kept = store.recall(current.slots(self._number, name), current.at)
                    streams[name] = value + kept
            values = tuple(streams.values())
            return values if len(values) > 1 else values[0]
        if self._first:
            current.entered[self._number] = streams
        output = self.fn_ref.original_forward(*args, **kwargs)
        if self._last:
            results = output if isinstance(output, tuple) else (output,)
            entered = current.entered.pop(self._number)
            for name, result in zip(self._returns, results, strict=True):
                slots = current.slots(self._number, name)
                store.record(slots, result - entered[name], current.at)
        return output


def _middle(model: Any, live: Live | None) -> list[_Range]:
    """The ranges a light pass leaves out."""
    row = kind(model)
    blocks = [(block, stack) for stack in row.stacks for block in getattr(model, stack.attribute)]
    if not blocks:
        known = ", ".join(sorted(name for name, each in KINDS.items() if each.stacks))
        raise CmloraError(
            f"{type(model).__name__} cannot be cached: its blocks are not known (known: {known}); "
            "use cache='none'"
        )
    count = len(blocks)
    if live is None:
        most = (count - 1) // 2
        live = Live(*(min(number, most) for number in row.live))
    first, last = live.first, live.last
    if min(first, last) < 0 or first + last == 0 or first + last >= count:
        raise CmloraError(
            f"cut ({first}, {last}): {type(model).__name__} has {count} blocks; give how many stay "
            f"live at the beginning and at the end, together 1 to {count - 1}"
        )
    skipped = blocks[first : count - last]
    parts = []
    for stack in row.stacks:
        own = tuple(block for block, home in skipped if home is stack)
        if own:
            parts.append(_Range(own, stack.returns))
    return parts
