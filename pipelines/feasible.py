"""Whether a picture can be made at all: its size, its scheduler, and the memory it takes."""

from collections.abc import Iterator
from contextlib import contextmanager
from traceback import walk_tb
from typing import Any

from cmlora import checks
from cmlora.errors import CmloraError, is_memory
from cmlora.pipelines.native import unit
from cmlora.recipe import Recipe

PIXELS = 2**26
"""Of a picture; nobody draws more, and files from elsewhere may say anything."""

_LARGEST = 10**6  # of the whole numbers in a scheduler's configuration, which tables are as long as
_SCHEDULERS = "diffusers.schedulers."


def check_size(pipe: Any, size: tuple[int, int], where: str = "") -> None:
    """Refuses a size that a model cannot make.

    Args:
        pipe: the model.
        size: width and height in pixels.
        where: what says so, for the message; ends in a blank.

    Raises:
        CmloraError: if a side is not a multiple of what the model counts in, or there are too many
            pixels.
    """
    least, said = unit(pipe), f"{where}size {size[0]}x{size[1]}"
    if min(size) < least or any(side % least for side in size):
        raise CmloraError(f"{said}: both must be positive multiples of {least}")
    if size[0] * size[1] > PIXELS:
        raise CmloraError(f"{said}: that is more than {PIXELS} pixels; make it smaller")


def scheduler_of(recipe: Recipe, own: Any) -> Any:
    """The scheduler of a recipe.

    Args:
        recipe: what is to be made.
        own: the model's scheduler, which an empty name stands for.

    Raises:
        CmloraError: if there is none of that name, or it does not take its configuration.
    """
    import diffusers

    kind: Any = getattr(diffusers, recipe.scheduler, None) if recipe.scheduler else type(own)
    is_scheduler = isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)
    if not is_scheduler:
        raise CmloraError(f"diffusers has no scheduler {recipe.scheduler!r}")
    if not (recipe.scheduler or recipe.scheduler_config):
        return own
    config = dict(recipe.scheduler_config)
    for key, value in config.items():
        if isinstance(value, int):
            checks.whole("recipe", f"scheduler_config.{key}", int(value), -_LARGEST, _LARGEST)
    try:
        return kind.from_config(config)
    except Exception as failure:  # the schedulers check little, so that anything may come
        raise CmloraError(
            f"recipe: {kind.__name__} cannot be made from scheduler_config ({_reason(failure)}); "
            "correct it, or leave scheduler and scheduler_config out"
        ) from failure


@contextmanager
def carrying_out(recipe: Recipe) -> Iterator[None]:
    """Turns what stops a run into one line: too little memory, or what the scheduler refuses."""
    try:
        yield
    except CmloraError:
        raise
    except Exception as failure:
        if is_memory(failure):
            raise CmloraError(_smaller(recipe)) from failure
        if _is_schedulers(failure):
            raise CmloraError(
                f"{recipe.scheduler or 'the scheduler'} cannot make {recipe.steps} steps with its "
                f"configuration ({_reason(failure)}); change the steps or the scheduler"
            ) from failure
        raise


def _is_schedulers(failure: Exception) -> bool:
    """Whether it came from inside of a scheduler."""
    frames = (frame for frame, _ in walk_tb(failure.__traceback__))
    return any(f.f_globals.get("__name__", "").startswith(_SCHEDULERS) for f in frames)


def _smaller(recipe: Recipe) -> str:
    remedies = ["make the picture smaller"]
    if recipe.loras:
        remedies.append("use fewer LoRAs")
    if recipe.execution != "sequential":
        remedies.append("use execution sequential")
    if recipe.dtype == "float32":
        remedies.append("use dtype bfloat16")
    what = f"{recipe.width}x{recipe.height} pixels"
    if recipe.loras:
        what += f" with {len(recipe.loras)} LoRAs"
    return f"the memory is not enough for {what}; {', or '.join(remedies)}"


def _reason(failure: Exception) -> str:
    first = next((line for line in str(failure).splitlines() if line.strip()), "")
    return f"{type(failure).__name__}: {first}"
