"""One strength per LoRA and module instead of one slider per LoRA, learnt from a loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cmlora.adapters.merging.learn import Fitted, Loss, descend, prepared, random_like, signed
from cmlora.lora import LoRA, Update, stack


def atlas(
    loras: Sequence[LoRA],
    loss: Loss,
    *,
    steps: int = 100,
    rate: float = 0.1,
    decay: float = 0.0,
    penalty: float = 0.0,
    start: float = 0.0,
    control: bool = True,
    seed: int = 0,
    name: str | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> Fitted:
    """W = W_0 + sum_j Lambda_j D_j with one entry of Lambda_j per module (arXiv:2407.02880).

    Strengths start at zero, which is the base model, and follow AdamW with gradients clipped to
    norm 1; those of the least loss are kept.

    Args:
        loras: of one family, with different names.
        loss: of a LoRA that changes with the strengths; differentiable in its factors.
        steps: of the optimizer.
        rate: of learning, falling to zero along a half cosine.
        decay: of the weights, decoupled.
        penalty: times the sum of all strengths' magnitudes, added to the loss.
        start: of all strengths; 1 is the sum of the LoRAs.
        control: fit random LoRAs too, which doubles the time.
        seed: of the random LoRAs.
        name: of the result; the names joined by ``+`` if none is given.
        on_step: called after every step.

    Raises:
        CmloraError: if names repeat, LoRAs do not fit each other, or the loss is not finite.
    """
    loras, modules = prepared(loras)
    title = name or "+".join(lora.name for lora in loras)
    table = torch.full((len(loras), len(modules)), start, requires_grad=True)

    def losses_of() -> tuple[Tensor, Tensor]:
        found = loss(_scaled(loras, modules, table, title))
        return found, found + penalty * table.abs().sum()

    (best,), losses = descend(
        [table], losses_of, steps=steps, rate=rate, decay=decay, on_step=on_step
    )
    strengths = {
        lora.name: {m: float(best[i, k]) for k, m in enumerate(modules) if m in lora.updates}
        for i, lora in enumerate(loras)
    }
    merged = _scaled(loras, modules, best, title)
    beaten = None
    if control:
        others = random_like(loras, seed)
        again: dict[str, Any] = {
            "steps": steps,
            "rate": rate,
            "decay": decay,
            "penalty": penalty,
            "start": start,
        }
        beaten = min(atlas(others, loss, **again, control=False, on_step=on_step).losses)
    told = signed(merged, "atlas", loras, strengths=strengths, steps=steps)
    return Fitted(told, tuple(losses), strengths, beaten)


def _scaled(loras: Sequence[LoRA], modules: Sequence[str], table: Tensor, name: str) -> LoRA:
    """The sum with strengths (N, modules), through which gradients flow."""
    rows = []
    for i, lora in enumerate(loras):
        updates: dict[str, Update] = {}
        for k, module in enumerate(modules):
            if module in lora.updates:
                update = lora.updates[module]
                updates[module] = replace(update, up=update.up * table[i, k].to(update.up.dtype))
        rows.append((replace(lora, updates=updates), 1.0))
    return stack(rows, name)
