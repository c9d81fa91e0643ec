"""Multiply-accumulates of a run, counted while it runs, for any denoiser."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Floating-point operations of attention, from the shapes of what goes in."""
    count: int = sdpa_flop_count(query, key, value)  # type: ignore[no-untyped-call]
    return count


# torch counts fused attention of accelerators; which kernel a CPU takes depends on the processor
_ON_CPUS = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}


class MacCounter:
    """Counts every kind of pass the first time it runs, attention and the LoRAs' own products too.

    Counting slows that one pass down; the same kind of pass costs the same ever after.
    """

    def __init__(self) -> None:
        self.total = 0
        self._known: dict[Hashable, int] = {}

    def begin(self) -> None:
        """A new run."""
        self.total = 0

    @contextmanager
    def around(self, kind: Hashable) -> Iterator[None]:
        """A context for one pass.

        Args:
            kind: passes of the same kind do the same work.
        """
        if kind not in self._known:
            with FlopCounterMode(display=False, custom_mapping=_ON_CPUS) as counter:
                yield
            self._known[kind] = counter.get_total_flops() // 2
        else:
            yield
        self.total += self._known[kind]
