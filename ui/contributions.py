"""Who painted what: each LoRA's own effect on a run, measured while the run goes on.

Beside the passes of the method, base model and each LoRA alone predict from the same latents; they
have no share in the result, so the picture is the one of the recipe. A LoRA's contribution at a
step is the difference between its prediction and the base model's.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from cmlora.plan import Member, Pass, Plan, Policy, Step
from cmlora.strategies import METHODS
from cmlora.ui.actions import Picture, complete, paint, recipe_of
from cmlora.ui.jobs import Clock, Event, Progress, Result, Ticket, stream
from cmlora.ui.jobs import Report as Tell
from cmlora.ui.order import Order
from cmlora.ui.studio import Studio

_MARK = ""  # key of what is noted at steps at which the method itself observes nothing


@dataclass(frozen=True)
class Contributions:
    """What every LoRA contributed to one picture.

    Args:
        picture: the picture.
        names: of the LoRAs.
        sizes: per LoRA and step, the size of its contribution relative to the base's prediction.
        maps: per LoRA its share of all contributions in every place, (H, W), 0 to 1; places where
            nobody contributes are 0. Empty for denoisers whose output is no map.
    """

    picture: Picture
    names: tuple[str, ...]
    sizes: Mapping[str, tuple[float, ...]]
    maps: Mapping[str, Tensor]

    def shares(self) -> dict[str, float]:
        """Each LoRA's part of the sum of all sizes; they sum to 1 unless nobody did anything."""
        sums = {name: math.fsum(self.sizes[name]) for name in self.names}
        whole = math.fsum(sums.values())
        return {name: value / whole if whole else 0.0 for name, value in sums.items()}


class Witness:
    """A method that also measures; in reports and for the text encoders it is the method.

    Args:
        method: a key of `cmlora.strategies.METHODS`.
    """

    def __init__(self, method: str) -> None:
        self.__name__ = method
        self._strategy = METHODS[method].object
        self._sizes: list[dict[str, float]] = []
        self._energy: dict[str, Tensor] = {}

    def __call__(
        self, step: Step, members: Sequence[Member], policy: Policy, *args: Any, **options: Any
    ) -> Plan:
        """The method's plan with a pass of the base and one of every LoRA, which have no share."""
        own = replace(step, observed=tuple(o for o in step.observed if _MARK not in o))
        plan = self._strategy(own, members, policy, *args, **options)
        count = len(plan.passes)
        probes = (Pass({}), *(Pass({member.name: member.weight}) for member in members))

        def combine(outputs: Tensor) -> Tensor:
            assert not isinstance(plan.combine, tuple)
            return plan.combine(outputs[:count])

        def compare(outputs: Tensor, before: Tensor | None) -> Tensor:
            assert plan.compare is not None
            return plan.compare(outputs[:count], None if before is None else before[:count])

        def observe(sample: Tensor, outputs: Tensor) -> Mapping[str, float]:
            self._see([member.name for member in members], outputs[count:])
            if plan.observe is None:
                return {_MARK: 0.0}
            return plan.observe(sample, outputs[:count])

        shares: Any = combine
        if isinstance(plan.combine, tuple):
            shares = plan.combine + (0.0,) * len(probes)
        return replace(
            plan,
            passes=(*plan.passes, *probes),
            combine=shares,
            observe=observe,
            compare=None if plan.compare is None else compare,
        )

    def sizes(self, names: Sequence[str]) -> dict[str, tuple[float, ...]]:
        """Size of each LoRA's contribution at every step; 0 where it took no part."""
        return {name: tuple(row.get(name, 0.0) for row in self._sizes) for name in names}

    def maps(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Each LoRA's share of the energy in every place, over all steps; none without places."""
        if not self._energy:
            return {}
        total = sum(self._energy.values(), torch.zeros(()))
        nothing = total <= 0
        shares = {
            name: torch.where(nothing, 0.0, energy / torch.where(nothing, 1.0, total))
            for name, energy in self._energy.items()
        }
        return {name: shares.get(name, torch.zeros_like(total)) for name in names}

    def _see(self, names: Sequence[str], outputs: Tensor) -> None:
        """Note sizes and energies from stacked predictions, base first: (1 + N, B, C, H, W)."""
        base = outputs[0].float()
        size = max(float(base.norm()), 1e-12)
        row: dict[str, float] = {}
        self._sizes.append(row)
        for name, output in zip(names, outputs[1:], strict=True):
            delta = output.float() - base
            row[name] = float(delta.norm()) / size
            if delta.ndim == 4:
                energy = delta.square().sum((0, 1)).cpu()
                self._energy[name] = self._energy.get(name, 0.0) + energy


def contributions(studio: Studio, order: Order, ticket: Ticket) -> Iterator[Event]:
    """Make the first picture of an order and measure who contributed what.

    Args:
        studio: the server's.
        order: what is asked for.
        ticket: stops the work.

    Yields:
        `Progress`, and a `Result` with `Contributions`.

    Raises:
        CmloraError: if the order cannot be fulfilled.
    """
    order = complete(studio, replace(order, pictures=1))

    def work(tell: Tell) -> None:
        tell(Progress(0, order.steps, "loading"))
        with studio.pipeline(order.model, order.loras, order.sampler, order.scopes) as pipe:
            ticket.check()
            recipe = recipe_of(pipe, order, ticket, tell, studio.settings.out)
            witness, clock = Witness(recipe.method), Clock(order.steps)
            picture = paint(
                studio, pipe, recipe, ticket, tell, clock, "measuring", strategy=witness
            )
        names = tuple(lora.name for lora in recipe.loras)
        tell(Result(Contributions(picture, names, witness.sizes(names), witness.maps(names))))

    return stream(work, ticket)


def overlay(picture: Image.Image, share: Tensor, colour: tuple[int, int, int]) -> Image.Image:
    """The picture in grey, coloured where a LoRA has its share.

    Args:
        picture: of any size.
        share: (H, W), 0 to 1.
        colour: where the share is 1.
    """
    values = (share.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    mask = Image.fromarray(values).resize(picture.size, Image.Resampling.BILINEAR)
    grey = picture.convert("L").point(lambda v: 60 + v * 0.6).convert("RGB")
    return Image.composite(Image.new("RGB", picture.size, colour), grey, mask.point(_softer))


def _softer(value: int) -> float:
    return value * 0.85  # the picture shows through
