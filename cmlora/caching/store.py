"""Cached features: one tensor per slot."""

from __future__ import annotations

from collections.abc import Hashable

import torch


class Store:
    """Tensors by slot. A slot belongs to one pass and one guidance branch and is never shared."""

    def __init__(self) -> None:
        self._slots: dict[Hashable, torch.Tensor] = {}

    def __contains__(self, key: Hashable) -> bool:
        return key in self._slots

    def __len__(self) -> int:
        return len(self._slots)

    def __getitem__(self, key: Hashable) -> torch.Tensor:
        return self._slots[key]

    def __setitem__(self, key: Hashable, feature: torch.Tensor) -> None:
        self._slots[key] = feature.detach()

    @property
    def bytes(self) -> int:
        """Memory all slots hold."""
        return sum(feature.numel() * feature.element_size() for feature in self._slots.values())

    def discard(self, key: Hashable) -> None:
        """Free one slot, if it is taken."""
        self._slots.pop(key, None)

    def clear(self) -> None:
        """Free all slots."""
        self._slots.clear()
