"""Pipelines, strategies and comparisons for the tests of compositions."""

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from cmlora.plan import Member, Pass, Plan, Policy, Step
from tests import tiny

NAMES = ("ink", "alice", "forest")


@functools.cache
def pipeline(family: str) -> Any:
    """A pipeline with three LoRAs, made once; tests may change which of them are active."""
    pipe = {"sd15": tiny.sd15, "sdxl": tiny.sdxl}[family]()
    tiny.add_loras(pipe, NAMES, text=True)
    return pipe


def average(
    step: Step,
    members: Sequence[Member],
    policy: Policy,
    *,
    shares: tuple[float, ...] | None = None,
    seen: list[Step] | None = None,
) -> Plan:
    """One pass per LoRA with given or equal shares, in the user's order."""
    if seen is not None:
        seen.append(step)
    reuse = policy.reuse and step.index not in policy.refreshes(step.count)
    passes = tuple(Pass({m.name: m.weight}, may_reuse=reuse) for m in members)
    return Plan(passes, shares or tuple(1 / len(passes) for _ in passes))


def together(step: Step, members: Sequence[Member], policy: Policy) -> Plan:
    """One pass with all LoRAs."""
    return Plan((Pass({m.name: m.weight for m in members}),))


def state(pipe: Any) -> list[Any]:
    """Everything a composition could leave behind, as comparable values."""
    found: list[Any] = []
    for component in ("unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2"):
        model = getattr(pipe, component, None)
        for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
            attributes = {
                key: value
                for key, value in vars(module).items()
                if not isinstance(value, dict | list | set | torch.Tensor)
            }
            registry = vars(module).get("_diffusers_hook")
            found.append((component, name, type(module), attributes))
            found.append(None if registry is None else list(registry._hook_order))
            if isinstance(module, BaseTunerLayer):
                active = copy.copy(module.active_adapter)
                found.append((active, module.disable_adapters, dict(module.scaling)))
            found += [(n, p.requires_grad) for n, p in module.named_parameters(recurse=False)]
    return found


def plain(pipe: Any, name: str, weight: float = 1.0, **options: Any) -> torch.Tensor:
    """One LoRA in plain diffusers; leaves the adapter state changed."""
    pipe.set_adapters([name], [weight])
    freeze(pipe)
    return tiny.run(pipe, **options)


def freeze(pipe: Any) -> None:
    """As for inference; ``requires_grad`` alone changes how kernels on a CPU round."""
    for component in ("unet", "text_encoder", "text_encoder_2"):
        if getattr(pipe, component, None) is not None:
            getattr(pipe, component).requires_grad_(False)


def assert_near(result: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to the rounding of a few steps."""
    torch.testing.assert_close(result, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


def interrupt_after(step: int) -> Callable[..., dict[str, Any]]:
    """A pipeline callback that acts like Ctrl-C."""

    def interrupt(_: Any, index: int, __: Any, values: dict[str, Any]) -> dict[str, Any]:
        if index == step:
            raise KeyboardInterrupt
        return values

    return interrupt
