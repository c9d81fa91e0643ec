"""Cached features: the last few tensors per slot."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch


class FeatureCache(Protocol):
    """What a hook needs of a cache: one slot of features per key."""

    def holds(self, key: Any) -> bool:
        """Whether the slot is taken."""

    def run(self, *keys: Any, reuse: bool, record: bool, at: int) -> AbstractContextManager[bool]:
        """A context for passes that run as one batch; gives whether they are light."""

    def discard(self, key: Any) -> None:
        """Free a slot."""

    def clear(self) -> None:
        """Free all slots."""


class Store:
    """Tensors by slot. A slot belongs to one pass and one guidance branch and is never shared.

    Args:
        order: how many features before the last one a slot keeps, to extrapolate from: 0 hands out
            the last one as it is, 1 extrapolates along a line, 2 along a parabola.
    """

    def __init__(self, order: int = 0) -> None:
        self.order = order
        self._slots: dict[Hashable, list[tuple[int, torch.Tensor]]] = {}

    def __contains__(self, key: Hashable) -> bool:
        return key in self._slots

    def __len__(self) -> int:
        return len(self._slots)

    def __getitem__(self, key: Hashable) -> torch.Tensor:
        return self._slots[key][-1][1]

    def __setitem__(self, key: Hashable, feature: torch.Tensor) -> None:
        self.record([key], feature)

    @property
    def bytes(self) -> int:
        """Memory all slots hold."""
        held = (feature for slot in self._slots.values() for _, feature in slot)
        return sum(feature.numel() * feature.element_size() for feature in held)

    def record(self, keys: Sequence[Hashable], feature: torch.Tensor, at: int = 0) -> None:
        """Keep a feature.

        Args:
            keys: the slots whose passes ran as one batch, in its order; each gets its part.
            feature: (len(keys) * B, ...).
            at: the step.
        """
        for key, part in zip(keys, feature.detach().chunk(len(keys)), strict=True):
            slot = self._slots.setdefault(key, [])
            if slot and (slot[-1][0] >= at or slot[-1][1].shape != part.shape):
                slot.clear()  # the same step again, or other tokens: nothing to extrapolate from
            slot.append((at, part.clone()))
            del slot[: -1 - self.order]

    def recall(self, keys: Sequence[Hashable], at: int = 0) -> torch.Tensor:
        """The features of some slots as one batch, a tensor that may be written to.

        Args:
            keys: see `record`.
            at: the step they are for, if they are to be extrapolated.
        """
        parts = [self._recall(self._slots[key], at) for key in keys]
        return parts[0].clone() if len(parts) == 1 else torch.cat(parts)

    def discard(self, key: Hashable) -> None:
        """Free one slot, if it is taken."""
        self._slots.pop(key, None)

    def clear(self) -> None:
        """Free all slots."""
        self._slots.clear()

    def _recall(self, slot: list[tuple[int, torch.Tensor]], at: int) -> torch.Tensor:
        if not self.order or len(slot) == 1:
            return slot[-1][1]
        from cmlora.caching.forecast import forecast

        return forecast(slot, at, self.order)
