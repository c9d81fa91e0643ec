"""What methods that learn a merge from a loss have in common."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from cmlora.adapters.merging.check import NOTHING, check_shape, check_values
from cmlora.errors import CmloraError
from cmlora.lora import LoRA, Update, full

Loss = Callable[[LoRA], Tensor]
"""Of a LoRA that changes with what is learnt; differentiable in its factors."""


@dataclass(frozen=True)
class Fitted:
    """What was learnt.

    Args:
        lora: the merged LoRA, with scale 1 everywhere and factors in at least single precision.
        losses: of every step.
        strengths: by LoRA and module, of methods that learn one.
        control: the loss that random LoRAs of the same shapes and norms reach the same way. What
            the real ones know is only what they do better.
    """

    lora: LoRA
    losses: tuple[float, ...]
    strengths: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    control: float | None = None


def prepared(loras: Sequence[LoRA]) -> tuple[list[LoRA], list[str]]:
    """The LoRAs by name and without updates of zero, and the modules that any of them changes.

    What is drawn or penalised then depends neither on their order nor on how a file says nothing.

    Raises:
        CmloraError: if names repeat, LoRAs do not fit each other, or none changes anything.
    """
    names = [lora.name for lora in loras]
    if not names or len(set(names)) < len(names):
        raise CmloraError(f"strengths are told apart by names, and these are {names}")
    check_values(loras)
    ordered = [
        replace(lora, updates={m: u for m, u in lora.updates.items() if u.norm() > NOTHING})
        for lora in sorted(loras, key=lambda lora: lora.name)
    ]
    modules = sorted({module for lora in ordered for module in lora.updates})
    if not modules:
        raise CmloraError(f"nothing to learn: {', '.join(sorted(names))} change nothing")
    for module in modules:
        check_shape(module, [(x.name, x.updates[module]) for x in ordered if module in x.updates])
    return ordered, modules


def descend(
    trained: Sequence[Tensor],
    loss: Callable[[], tuple[Tensor, Tensor]],
    *,
    steps: int,
    rate: float,
    decay: float = 0.0,
    on_step: Callable[[], None] = lambda: None,
) -> tuple[list[Tensor], list[float]]:
    """Follows the gradient with AdamW, clipped to norm 1, the rate falling along a half cosine.

    Args:
        trained: leaf tensors that require gradients; changed in place.
        loss: computes, from them, the loss and the loss with penalties, which is followed.
        steps: of the optimizer.
        rate: where it starts.
        decay: of the weights, decoupled.
        on_step: called after every step.

    Returns:
        The tensors at the least penalised loss, and the losses of all steps and of the end.

    Raises:
        CmloraError: if the loss is not finite.
    """
    if steps < 0:
        raise CmloraError(f"learning takes 0 steps or more, not {steps}")
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    best, least, losses = [t.detach().clone() for t in trained], float("inf"), []
    for step in range(steps + 1):
        found, total = loss()
        if not torch.isfinite(total):
            raise CmloraError(f"the loss is {float(total.detach())} in step {step}; lower the rate")
        losses.append(float(found.detach()))
        if float(total.detach()) < least:
            best, least = [t.detach().clone() for t in trained], float(total.detach())
        if step == steps:
            break
        optimizer.zero_grad()
        torch.autograd.backward(total)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        on_step()
    return best, losses


def signed(lora: LoRA, method: str, loras: Sequence[LoRA], **facts: Any) -> LoRA:
    """The merged LoRA with a record of how it came to be, detached from what was learnt."""
    names = [own.name for own in loras]
    recipe = {"method": method, "loras": names, **facts}
    metadata = {
        "modelspec.merged_from": ",".join(names),
        "cmlora.merge": json.dumps(recipe, sort_keys=True),
    }
    updates = {}
    for module, update in lora.updates.items():
        both = update.folded()
        down, up = (full(factor.detach()).contiguous() for factor in (both.down, both.up))
        updates[module] = Update(down, up * both.scale)
    return replace(lora, updates=updates, metadata=metadata)


def random_like(loras: Sequence[LoRA], seed: int) -> list[LoRA]:
    """Random LoRAs with the names, shapes and norms of these."""
    return [_random(x, torch.Generator().manual_seed(seed + i)) for i, x in enumerate(loras)]


def _random(lora: LoRA, generator: torch.Generator) -> LoRA:
    updates = {}
    for module, update in lora.updates.items():
        both = update.folded()
        up = torch.randn(both.up.shape, generator=generator)
        found = Update(torch.randn(both.down.shape, generator=generator), up)
        updates[module] = replace(found, scale=update.norm() / max(found.norm(), 1e-30))
    return replace(lora, updates=updates)
