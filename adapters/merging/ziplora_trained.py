"""One strength per LoRA and input column, learnt from a loss with a penalty on overlap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from cmlora.adapters.merging.learn import Fitted, Loss, descend, prepared, random_like, signed
from cmlora.lora import LoRA, Update, stack


def ziplora_trained(
    loras: Sequence[LoRA],
    loss: Loss,
    *,
    steps: int = 100,
    rate: float = 0.01,
    overlap: float = 0.01,
    control: bool = True,
    seed: int = 0,
    name: str | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> Fitted:
    """sum_j D_j diag(m_j) with m_j from 1 on, as ZipLoRA trains it (arXiv:2311.13600).

    The loss with ``overlap * sum_layers mean |m_a * m_b|`` is followed, over all pairs of LoRAs.
    `cmlora.adapters.merging.ziplora` finds the optimum without that penalty, layer by layer and
    without training. The strengths go into the down factors: the result is a LoRA.

    Args:
        loras: of one family, with different names, already multiplied by their weights.
        loss: of the merged LoRA; differentiable in its factors.
        steps: of the optimizer.
        rate: of learning, falling to zero along a half cosine.
        overlap: weight of the penalty.
        control: fit random LoRAs too, which doubles the time.
        seed: of the random LoRAs.
        name: of the result; the names joined by ``+`` if none is given.
        on_step: called after every step.

    Raises:
        CmloraError: if names repeat, or LoRAs do not fit each other.
    """
    loras, _ = prepared(loras)
    title = name or "+".join(lora.name for lora in loras)
    whole = [
        replace(lora, updates={m: _flat(update) for m, update in lora.updates.items()})
        for lora in loras
    ]
    columns = [
        {m: torch.ones(u.down.shape[1:], requires_grad=True) for m, u in lora.updates.items()}
        for lora in whole
    ]

    def merged() -> LoRA:
        rows = []
        for lora, own in zip(whole, columns, strict=True):
            updates = {m: replace(u, down=u.down * own[m]) for m, u in lora.updates.items()}
            rows.append((replace(lora, updates=updates), 1.0))
        return stack(rows, title)

    def losses_of() -> tuple[Tensor, Tensor]:
        found = loss(merged())
        return found, found + overlap * shared(columns)

    trained = [column for own in columns for column in own.values()]
    best, losses = descend(trained, losses_of, steps=steps, rate=rate, on_step=on_step)
    with torch.no_grad():
        for column, value in zip(trained, best, strict=True):
            column.copy_(value)
        result = merged()
    beaten = None
    if control:
        again: dict[str, Any] = {"steps": steps, "rate": rate, "overlap": overlap}
        others = random_like(loras, seed)
        found = ziplora_trained(others, loss, **again, control=False, on_step=on_step)
        beaten = min(found.losses)
    told = signed(result, "ziplora_trained", loras, steps=steps, overlap=overlap)
    means = {
        lora.name: {m: float(column.detach().mean()) for m, column in own.items()}
        for lora, own in zip(whole, columns, strict=True)
    }
    return Fitted(told, tuple(losses), means, beaten)


def shared(columns: Sequence[dict[str, Tensor]]) -> Tensor:
    """``sum_layers mean |m_a * m_b|`` over all pairs."""
    rows = [
        (one[module].flatten() * other[module].flatten()).abs().mean()
        for one, other in combinations(columns, 2)
        for module in sorted(one.keys() & other.keys())
    ]
    return torch.stack(rows).sum() if rows else torch.zeros(())


def _flat(update: Update) -> Update:
    """Two factors in single precision."""
    both = update.folded()
    return replace(both, down=both.down.float(), up=both.up.float())
