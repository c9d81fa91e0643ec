"""A composition as one LoRA file, as `cmlora bake` makes it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cmlora import checks
from cmlora.errors import CmloraError
from cmlora.ui import libraries
from cmlora.ui.actions import read_recipe
from cmlora.ui.jobs import Clock, Event, Progress, Result, Ticket, stream
from cmlora.ui.jobs import Report as Tell
from cmlora.ui.studio import Studio
from cmlora.ui.writing import Made, count_of, new_file, rank_of, sized, write

FIT = ("none", "strengths", "factors")
"""What is free: nothing, one strength per LoRA and module, all numbers."""

_STEPS = 500


def bake(
    studio: Studio,
    path: str | Path,
    model: str,
    ticket: Ticket,
    *,
    fit: str = "factors",
    steps: Any = 60,
    rank: Any = None,
    name: str = "",
) -> Iterator[Event]:
    """The LoRA that comes nearest to a picture's composition, among the server's LoRAs.

    Args:
        studio: the server's.
        path: of a PNG with a recipe, which a visitor sent.
        model: the model that is selected on the page.
        ticket: stops the work.
        fit: one of `FIT`.
        steps: of learning, in either stage.
        rank: the largest of a module; the sum of the ranks if empty.
        name: of the result; made of the method and the names if empty.

    Yields:
        `Progress`, and a `Result` with the `Made` file.

    Raises:
        CmloraError: see `cmlora.ui.actions.replay`; also if the picture was made without LoRAs.
    """
    checks.choice("request", "fit", fit, FIT)
    count, most = count_of("steps", steps, _STEPS), rank_of(rank)
    recipe = read_recipe(path, studio.settings.limits)
    if not recipe.loras:
        raise CmloraError("this picture was made without a LoRA; there is nothing to bake")

    def work(tell: Tell) -> None:
        libraries.ready()
        from cmlora.pipelines.bake import bake as turn

        clock = Clock(max(1, FIT.index(fit) * count))
        tell(Progress(0, clock.total, "loading what the recipe names"))

        def stepped() -> None:
            ticket.check()
            clock.tick()
            tell(Progress(clock.done, clock.total, f"fitting to {recipe.method}", clock.left()))

        wish = name or f"{recipe.method}_{'_'.join(lora.name for lora in recipe.loras)}"
        with studio.replaying(recipe, model) as pipe:
            found = turn(pipe, recipe, rank=most, fit=fit, steps=count, name=wish, on_step=stepped)
        target = new_file(studio.uploads, wish, "baked")
        write(found.lora, target)
        ranks = max(update.rank for update in found.lora.updates.values())
        facts = {
            "distance from the composition": f"{found.distance:.3f}; the model alone is at 1",
            "of the LoRAs added up": f"{found.merged:.3f}",
            "of their mean": f"{found.started:.3f}",
            "rank": str(ranks),
            **sized(target),
        }
        tell(Result(Made(target.stem, target, facts)))

    return stream(work, ticket)
