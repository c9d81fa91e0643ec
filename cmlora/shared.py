"""Models beside the denoiser that run some of its layers: the ControlNet of Z-Image.

Such a model runs once per step, not once per pass. What it says would depend on which LoRA the
pass before happened to leave active, even on what was active before the first step; so it is given
all LoRAs of the composition at their strengths, as a merge has them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

from torch import nn

from cmlora.plan import Strength
from cmlora.switching import AdapterSwitch

_BESIDE = ("controlnet",)


def attach(
    pipe: Any, switches: Iterable[AdapterSwitch], weights: Mapping[str, Strength]
) -> ExitStack:
    """Have such models see all LoRAs until the result is closed.

    Args:
        pipe: a diffusers pipeline.
        switches: of its denoisers.
        weights: the LoRAs and their strengths.
    """
    stack = ExitStack()
    models = [getattr(pipe, name, None) for name in _BESIDE]
    for model in (model for model in models if isinstance(model, nn.Module)):
        own = set(map(id, model.modules()))
        for switch in switches:
            if not any(id(layer) in own for layer in switch.layers):
                continue

            def activate(*_: Any, switch: AdapterSwitch = switch) -> None:
                switch.activate(weights)

            stack.callback(model.register_forward_pre_hook(activate).remove)
    return stack
