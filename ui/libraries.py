"""The heavy libraries, loaded by one thread while the others wait."""

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_LOADING = threading.Lock()


def ready() -> None:
    """Load diffusers and what the page uses of it, if that is not done yet.

    Its modules load each other at first use, and two threads that do so at once find half of a
    module; so whatever may be the first to use it, beside the thread that loads the first model,
    asks here before.
    """
    with _LOADING, uncollected():
        from diffusers import (  # noqa: F401
            AutoencoderKL,
            DiffusionPipeline,
            StableDiffusionPipeline,
            UNet2DConditionModel,
        )

        import cmlora.cost
        import cmlora.pipelines.learning
        import cmlora.pipelines.render  # noqa: F401


@contextmanager
def uncollected() -> Iterator[None]:
    """While modules load, whose objects stay: looking for garbage takes a seventh of the time."""
    active = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if active:
            gc.enable()
