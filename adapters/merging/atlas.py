"""One strength per LoRA and module instead of one slider per LoRA, learnt from a loss."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cmlora.adapters.merging.check import check_shape, check_values
from cmlora.errors import CmloraError
from cmlora.lora import LoRA, Update, stack

Loss = Callable[[LoRA], Tensor]


@dataclass(frozen=True)
class Fitted:
    """What was learnt.

    Args:
        lora: the merged LoRA with the strengths in it.
        strengths: by LoRA and module.
        losses: of every step; the first one is that of the base model.
        control: the least loss that random LoRAs of the same shapes and norms reach the same way.
            What the real ones know is only what they do better.
    """

    lora: LoRA
    strengths: dict[str, dict[str, float]]
    losses: tuple[float, ...]
    control: float | None = None


def atlas(
    loras: Sequence[LoRA],
    loss: Loss,
    *,
    steps: int = 100,
    rate: float = 0.1,
    decay: float = 0.0,
    penalty: float = 0.0,
    control: bool = True,
    seed: int = 0,
    name: str | None = None,
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
        control: fit random LoRAs too, which doubles the time.
        seed: of the random LoRAs.
        name: of the result; the names joined by ``+`` if none is given.

    Raises:
        CmloraError: if names repeat, LoRAs do not fit each other, or the loss is not finite.
    """
    names = [lora.name for lora in loras]
    if not names or len(set(names)) < len(names):
        raise CmloraError(f"strengths are told apart by names, and these are {names}")
    check_values(loras)
    modules = sorted({module for lora in loras for module in lora.updates})
    for module in modules:
        check_shape(module, [(x.name, x.updates[module]) for x in loras if module in x.updates])
    title = name or "+".join(sorted(names))
    table = torch.zeros((len(loras), len(modules)), requires_grad=True)
    optimizer = torch.optim.AdamW([table], lr=rate, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    best, least, losses = table.detach().clone(), float("inf"), []
    for step in range(steps + 1):
        found = loss(_scaled(loras, modules, table, title))
        total = found + penalty * table.abs().sum()
        if not torch.isfinite(total):
            raise CmloraError(f"the loss is {float(total.detach())} in step {step}; lower the rate")
        losses.append(float(found.detach()))
        if float(total.detach()) < least:
            best, least = table.detach().clone(), float(total.detach())
        if step == steps:
            break
        optimizer.zero_grad()
        torch.autograd.backward(total)
        torch.nn.utils.clip_grad_norm_([table], 1.0)
        optimizer.step()
        schedule.step()
    strengths = {
        lora.name: {m: float(best[i, k]) for k, m in enumerate(modules) if m in lora.updates}
        for i, lora in enumerate(loras)
    }
    merged = _scaled(loras, modules, best, title)
    recipe = {"method": "atlas", "loras": names, "strengths": strengths, "steps": steps}
    metadata = {"modelspec.merged_from": ",".join(names), "cmlora.merge": json.dumps(recipe)}
    beaten = None
    if control:
        others = [
            _random(lora, torch.Generator().manual_seed(seed + i)) for i, lora in enumerate(loras)
        ]
        fitted = atlas(
            others, loss, steps=steps, rate=rate, decay=decay, penalty=penalty, control=False
        )
        beaten = min(fitted.losses)
    return Fitted(replace(merged, metadata=metadata), strengths, tuple(losses), beaten)


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


def _random(lora: LoRA, generator: torch.Generator) -> LoRA:
    """Random updates with the shapes and norms of a LoRA's."""
    updates = {}
    for module, update in lora.updates.items():
        both = update.folded()
        up = torch.randn(both.up.shape, generator=generator)
        found = Update(torch.randn(both.down.shape, generator=generator), up)
        updates[module] = replace(found, scale=update.norm() / max(found.norm(), 1e-30))
    return replace(lora, updates=updates)
