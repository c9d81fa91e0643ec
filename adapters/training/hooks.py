"""What some tuners need besides a gradient, called by the trainer at fixed points of each step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cmlora.adapters.compression.trp import prune
from cmlora.adapters.training.parts import Parts
from cmlora.adapters.training.quartet import QuartetLinear
from cmlora.adapters.tuners import dylora, lora_sb, maestro, snella
from cmlora.adapters.tuners.dylora import DyloraLayer
from cmlora.errors import CmloraError

Gradients = dict[str, dict[str, Tensor]]
"""By part and layer, averages over a few batches."""


class Hook:
    """Does nothing at any point; methods override what they need.

    Args:
        parts: what is trained.
    """

    samples = 0
    """How many batches of gradients of the weights it wants before anything is trained."""

    def __init__(self, parts: Parts) -> None:
        self.parts, self.settings = parts, parts.settings

    def begin(self, gradients: Gradients, rate: float) -> None:
        """After the adapters were put in; the gradients were taken before (H0).

        They are missing where a checkpoint is about to be taken up.
        """

    def before_forward(self, step: int, random: torch.Generator) -> None:
        """Before a step's first forward pass (H1)."""

    def penalty(self) -> Tensor | None:
        """What is added to the loss of every batch."""
        return None

    def after_backward(self, step: int) -> None:
        """When a step's gradients are complete, before they are clipped (H2)."""

    def after_step(self, step: int) -> None:
        """After the optimizer's step (H3)."""

    def epoch_start(self, epoch: int) -> None:
        """Before the first step of an epoch (H5)."""

    def param_groups(self) -> list[dict[str, Any]] | None:
        """The optimizer's groups (H4), if they are not simply what is trained."""
        return None

    def settle(self) -> None:
        """Before the model is used for something else: a sample, a file."""

    def state(self) -> dict[str, Any]:
        """What a resumed training needs."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes up a `state`."""


class Prime(Hook):
    """LoRA-SB's start: the factors of the first step of full training.

    Args:
        parts: what is trained.
        samples: batches whose gradients are averaged.
    """

    def __init__(self, parts: Parts, samples: int = 50) -> None:
        super().__init__(parts)
        self.samples = samples

    def begin(self, gradients: Gradients, rate: float) -> None:
        for part, found in gradients.items():
            lora_sb.prime(self.parts.models[part], self.settings.name, found, rate)


class DrawRank(Hook):
    """DyLoRA: one rank for all layers in each step; what it leaves out does not move.

    Gradients of the ranks left out are zero, but momentum and weight decay would still move them.
    """

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self._kept: list[tuple[Tensor, Tensor]] = []

    def before_forward(self, step: int, random: torch.Generator) -> None:
        name, layers = self.settings.name, self.parts.tuners(DyloraLayer)
        most = min(layer.r[name] for _, layer in layers)
        rank = int(torch.randint(1, most + 1, (), generator=random))
        for model in self.parts.models.values():
            dylora.set_rank(model, name, rank)
        self._kept = []
        for _, layer in layers:
            first = rank - 1 if layer.config[name].frozen else 0
            up, down = layer.held(name, "up"), layer.held(name, "down")
            for still in (up[:, :first], up[:, rank:], down[:first], down[rank:]):
                self._kept.append((still.detach(), still.detach().clone()))

    def after_step(self, step: int) -> None:
        for place, value in self._kept:
            place.copy_(value)
        self._kept = []

    def settle(self) -> None:
        for _, layer in self.parts.tuners(DyloraLayer):
            layer.set_rank(self.settings.name, layer.r[self.settings.name])


class DrawLayer(Hook):
    """Maestro: one layer at a time is cut to a rank; a penalty empties the last ranks.

    Args:
        parts: what is trained.
        weight: of the penalty.
    """

    def __init__(self, parts: Parts, weight: float = 1e-4) -> None:
        super().__init__(parts)
        self.weight = weight

    def before_forward(self, step: int, random: torch.Generator) -> None:
        for model in self.parts.models.values():
            maestro.draw_layer(model, self.settings.name, random)

    def penalty(self) -> Tensor | None:
        models = self.parts.models.values()
        total = sum((maestro.penalty(m, self.settings.name) for m in models), torch.zeros(()))
        return self.weight * total

    def settle(self) -> None:
        for _, layer in self.parts.tuners(DyloraLayer):
            layer.set_rank(self.settings.name, layer.r[self.settings.name])


class Allocate(Hook):
    """SNELLA: a falling number of non-zero entries is shared out among the layers every epoch.

    Args:
        parts: what is trained.
        target: share of the entries that are left at the end.
    """

    def __init__(self, parts: Parts, target: float = 0.3) -> None:
        super().__init__(parts)
        self.target, self._step = target, 0
        self.allocators: dict[str, snella.Allocator] = {}

    def begin(self, gradients: Gradients, rate: float) -> None:
        name, steps = self.settings.name, self.settings.steps
        self.allocators = {
            part: snella.Allocator(model, name, self.target, steps)
            for part, model in self.parts.models.items()
        }

    def after_backward(self, step: int) -> None:
        self._step = step
        for allocator in self.allocators.values():
            allocator.observe()

    def epoch_start(self, epoch: int) -> None:
        if self._step:
            for allocator in self.allocators.values():
                allocator.allocate(self._step)

    def state(self) -> dict[str, Any]:
        averages = {
            part: [[number, title, *pair] for (number, title), pair in a.averages.items()]
            for part, a in self.allocators.items()
        }
        return {"step": self._step, "averages": averages}

    def restore(self, state: dict[str, Any]) -> None:
        self._step = state["step"]
        for part, rows in state["averages"].items():
            found = {(number, title): (mean, spread) for number, title, mean, spread in rows}
            self.allocators[part].averages = found


class Pairs(Hook):
    """LoRA-Pro: down and up factors of each layer are a group, with the update's strength."""

    def param_groups(self) -> list[dict[str, Any]]:
        rate = self.settings.rate
        pairs = self.parts.pairs()
        return [{"params": [a, b], "strength": s, "lr": rate} for a, b, s in pairs]


class Prune(Hook):
    """Trained rank pruning: every few steps the weights are cut to the rank that holds the energy.

    Args:
        parts: what is trained.
        weight: of the nuclear norm.
    """

    def __init__(self, parts: Parts, weight: float = 3e-4) -> None:
        super().__init__(parts)
        self.weight = weight

    def after_backward(self, step: int) -> None:
        if (step + 1) % self.settings.trp_every == 0:
            for denoiser in self.parts.denoisers.values():
                prune(denoiser, self.settings.trp_energy, self.weight)


class Reseed(Hook):
    """Quartet's random rounding: its numbers follow from the seed and the step."""

    def before_forward(self, step: int, random: torch.Generator) -> None:
        for denoiser in self.parts.denoisers.values():
            for layer in denoiser.modules():
                if isinstance(layer, QuartetLinear):
                    layer.random.manual_seed(int(torch.randint(2**62, (), generator=random)))


HOOKS: dict[str, Callable[..., Hook]] = {
    "lora_sb": Prime,
    "dylora": DrawRank,
    "maestro": DrawLayer,
    "snella": Allocate,
}
"""By tuner; the tuners that are missing need none."""


def hooks_of(parts: Parts) -> list[Hook]:
    """The hooks that the settings ask for."""
    made: list[Hook] = []
    options = parts.settings.hook_options
    if parts.settings.tuner in HOOKS and not parts.alone:
        try:
            made.append(HOOKS[parts.settings.tuner](parts, **options))
        except TypeError as error:
            raise CmloraError(f"train: hook_options do not fit: {error}") from None
    elif options:
        raise CmloraError(f"train: {parts.settings.tuner} takes no hook_options")
    if parts.settings.optim == "lora_pro":
        made.append(Pairs(parts))
    if parts.settings.base_format == "quartet":
        made.append(Reseed(parts))
    if parts.settings.trp:
        made.append(Prune(parts))
    return made
