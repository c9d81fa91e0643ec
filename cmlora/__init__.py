"""Several LoRAs in one picture, with any diffusers pipeline.

>>> import cmlora
>>> sorted(cmlora.__all__)
['CMLoRAPipeline', 'METHODS', '__version__', 'compose']

Two ways in::

    pipe = cmlora.CMLoRAPipeline.from_pretrained("emoji")
    with cmlora.compose(stock_pipeline, ["alice", "ink"], method="cmlora"):
        image = stock_pipeline("a prompt").images[0]

Shape letters used throughout: B batch, C channel, H W height and width of the latent, N LoRAs,
P passes, R rank, I O in and out features, T steps.

Importing the package costs next to nothing: torch and diffusers load with the first name used.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cmlora.compose import compose as compose
    from cmlora.pipelines.cmlora_pipeline import CMLoRAPipeline as CMLoRAPipeline
    from cmlora.strategies import METHODS as METHODS

__version__ = "0.1.0"

__all__ = ["METHODS", "CMLoRAPipeline", "__version__", "compose"]

_HOMES = {
    "METHODS": "cmlora.strategies",
    "CMLoRAPipeline": "cmlora.pipelines.cmlora_pipeline",
}


class _Package(ModuleType):
    """The package with `compose` the function, also after its file of that name was imported."""

    @property
    def compose(self) -> object:
        """`cmlora.compose.compose`; imported on first use."""
        return vars(importlib.import_module("cmlora.compose"))["compose"]

    @compose.setter
    def compose(self, module: object) -> None:
        # The import system stores the submodule under its name here; the function stays.
        pass


sys.modules[__name__].__class__ = _Package


if not TYPE_CHECKING:  # a type checker would take it as leave to use any name at all

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(_HOMES[name]), name)
