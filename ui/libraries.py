"""The heavy libraries, loaded by one thread while the others wait."""

import gc
import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_LOADING = threading.Lock()
_LOADED = threading.Event()


def ready() -> None:
    """Load diffusers and what the page uses of it, if that is not done yet.

    Its modules load each other at first use, and two threads that do so at once find half of a
    module; so whatever may be the first to use it, beside the thread that loads the first model,
    asks here before.
    """
    if _LOADED.is_set():
        return
    with _LOADING, uncollected():
        if _LOADED.is_set():
            return
        from diffusers import (  # noqa: F401
            AutoencoderKL,
            DiffusionPipeline,
            StableDiffusionPipeline,
            UNet2DConditionModel,
        )

        import cmlora.cost
        import cmlora.pipelines.render  # noqa: F401

        gc.freeze()  # looking through all of it again would take a twentieth of the first picture
        _LOADED.set()


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


@contextmanager
def unstubbed() -> Iterator[None]:
    """While gradio loads: it writes a type stub for each of its components whenever it is loaded.

    That takes more than half of the time. It leaves components alone whose source is not in a
    file, so for the time of the block none of them is.
    """
    find = inspect.getfile

    def getfile(found: Any) -> str:
        if type(found).__name__ == "ComponentMeta":
            raise OSError("no stub is wanted")
        return find(found)

    inspect.getfile = getfile  # type: ignore[assignment]
    try:
        yield
    finally:
        inspect.getfile = find
