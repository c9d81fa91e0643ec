"""A mask over all LoRAs, learnt so that what they do together resembles what each does alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cmlora.adapters.merging.factors import Pair, canonical
from cmlora.adapters.merging.learn import Fitted, Loss, descend, prepared, random_like, signed
from cmlora.errors import CmloraError
from cmlora.lora import LoRA, Update

Granularity = Literal["rank", "element", "module"]

_QUANTILES = 32


def concrete(
    loras: Sequence[LoRA],
    loss: Loss,
    *,
    granularity: Granularity = "rank",
    steps: int = 200,
    rate: float = 0.1,
    temperature: float = 0.5,
    rescale: bool = True,
    control: bool = True,
    seed: int = 0,
    name: str | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> Fitted:
    """sum_j D_j * m / mean(m) with a relaxed Bernoulli mask m (arXiv:2312.06173).

    m = sigmoid((l + log u - log(1 - u)) / T), with fresh uniform u in every step and logits l that
    start at zero. The published masks hide single entries of full weights and follow the entropy
    of a classifier; here the loss is whatever is given, and masks of whole rank units keep the
    result a LoRA. The last mask is the mean over u; if it is no better than the sum, the sum is
    kept.

    Args:
        loras: of one family, with different names, already multiplied by their weights.
        loss: of the merged LoRA; differentiable in its factors.
        granularity: ``rank`` has a logit for every unit of every LoRA's canonical factors,
            ``element`` one for every entry, which all LoRAs share and which needs as much memory
            as the weights; ``module`` one for every module, with the mean over all modules.
        steps: of the optimizer.
        rate: of learning, falling to zero along a half cosine.
        temperature: T.
        rescale: divide by the mean of the mask, so that what is kept makes up for what is hidden;
            otherwise by 1/2, the mean at the start, so that hiding a part leaves the rest alone.
        control: fit random LoRAs too, which doubles the time.
        seed: of the masks and of the random LoRAs.
        name: of the result; the names joined by ``+`` if none is given.
        on_step: called after every step.

    Raises:
        CmloraError: if names repeat, LoRAs do not fit each other, or the temperature is not
            positive.
    """
    if not (temperature > 0 and math.isfinite(temperature)):
        raise CmloraError(f"temperature is {temperature:g}, expected more than 0")
    loras, modules = prepared(loras)
    title = name or "+".join(lora.name for lora in loras)
    triggers = tuple(dict.fromkeys(word for lora in loras for word in lora.triggers))
    parts = {module: _part(loras, module, granularity) for module in modules}
    logits = [torch.zeros(part.shape, requires_grad=True) for part in parts.values()]
    generator = torch.Generator().manual_seed(seed)

    def merged(noise: bool) -> LoRA:
        masks = [drawn(own, temperature, generator if noise else None) for own in logits]
        everywhere = torch.cat([own.flatten() for own in masks]).mean()
        updates = {}
        for (module, part), own in zip(parts.items(), masks, strict=True):
            level = everywhere if granularity == "module" else own.mean()
            updates[module] = part.masked(own / (level if rescale else 0.5))
        return LoRA(title, updates, triggers=triggers)

    def losses_of() -> tuple[Tensor, Tensor]:
        found = loss(merged(noise=True))
        return found, found

    with torch.no_grad():
        plain = float(loss(merged(noise=False)))
    _, losses = descend(logits, losses_of, steps=steps, rate=rate, on_step=on_step)
    with torch.no_grad():
        last = float(loss(merged(noise=False)))
        if last > plain:
            for own in logits:
                own.zero_()
        result = merged(noise=False)
    beaten = None
    if control:
        again = concrete(
            random_like(loras, seed),
            loss,
            granularity=granularity,
            steps=steps,
            rate=rate,
            temperature=temperature,
            rescale=rescale,
            control=False,
            seed=seed,
            on_step=on_step,
        )
        beaten = again.losses[-1]
    told = signed(result, "concrete", loras, granularity=granularity, steps=steps, seed=seed)
    return Fitted(told, (plain, *losses, min(last, plain)), {}, beaten)


@dataclass(frozen=True)
class _Part:
    """What the LoRAs do to one module together, in the pieces that a mask may hide.

    Args:
        shape: of the mask.
        up: (O, K), or the summed update (O, M) where entries are masked.
        down: (K, I[, kh, kw]).
    """

    shape: tuple[int, ...]
    up: Tensor
    down: Tensor

    def masked(self, mask: Tensor) -> Update:
        return Update(self.down, self.up * mask)


def _part(loras: Sequence[LoRA], module: str, granularity: Granularity) -> _Part:
    there = {lora.name: lora.updates[module] for lora in loras if module in lora.updates}
    shape = max((update.shape for update in there.values()), key=len)
    pairs = [canonical(Pair(*update.factors())) for update in there.values()]
    up = torch.cat([pair.up for pair in pairs], 1).float()
    down = torch.cat([pair.down for pair in pairs]).float()
    if granularity == "element":
        columns = down.shape[1]
        whole = torch.eye(columns).reshape(columns, *shape[1:])
        return _Part((shape[0], columns), up @ down, whole)
    units = (up.shape[1],) if granularity == "rank" else (1,)
    return _Part(units, up, down.reshape(-1, *shape[1:]))


def drawn(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """A mask with entries between 0 and 1; the mean of all without a generator."""
    if generator is None:
        mean = torch.zeros_like(logits)
        for u in (torch.arange(_QUANTILES) + 0.5) / _QUANTILES:
            mean = mean + torch.sigmoid((logits + u.log() - (1 - u).log()) / temperature)
        return mean / _QUANTILES
    u = torch.rand(logits.shape, generator=generator).clamp(1e-6, 1 - 1e-6)
    return torch.sigmoid((logits + u.log() - (1 - u).log()) / temperature)
