"""Optimizers for training with little memory: one per file, all made the same way."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from torch.optim import Optimizer

from cmlora.adapters.training.optim.adamw import adamw
from cmlora.adapters.training.optim.adamw_8bit import adamw_8bit
from cmlora.adapters.training.optim.dct import Dct
from cmlora.adapters.training.optim.fira import Fira
from cmlora.adapters.training.optim.frugal import Frugal
from cmlora.adapters.training.optim.galore import GaLore
from cmlora.adapters.training.optim.lora_pro import LoraPro
from cmlora.errors import CmloraError
from cmlora.registry import Entry, Registry

OPTIMIZERS: Registry[Callable[..., Optimizer]] = Registry(
    "optimizer",
    Entry("adamw", adamw, "Adam with decoupled weight decay", "arXiv:1711.05101"),
    Entry("adamw_8bit", adamw_8bit, "the same with moments in 8 bits, by bitsandbytes or torchao"),
    Entry("galore", GaLore, "Adam on the gradient's leading directions", "arXiv:2403.03507"),
    Entry("fira", Fira, "galore, and the rest of the gradient in step", "arXiv:2410.01623"),
    Entry("frugal", Frugal, "AdamW in a moving subspace, signs elsewhere", "arXiv:2411.07837"),
    Entry("dct", Dct, "Adam on the strongest cosine components, no SVD", "arXiv:2505.17967"),
    Entry("lora_pro", LoraPro, "factors step as full training would", "arXiv:2407.18242"),
)


def options_of(name: str) -> set[str]:
    """What an optimizer can be told besides parameters and learning rate."""
    made: Any = OPTIMIZERS[name].object
    kinds = (
        [made] if not isinstance(made, type) else [k for k in made.__mro__ if k is not Optimizer]
    )
    found: set[str] = set()
    for kind in kinds:
        if kind is object or kind.__module__.startswith("torch"):
            break
        function: Any = vars(kind).get("__init__", kind) if isinstance(kind, type) else kind
        found |= {
            p.name
            for p in inspect.signature(function).parameters.values()
            if p.kind is not p.VAR_KEYWORD
        }
    return found - {"self", "params", "lr"}


def make(name: str, groups: Iterable[Any], rate: float, options: Mapping[str, Any]) -> Optimizer:
    """An optimizer by name.

    Args:
        name: of the table.
        groups: parameters or groups of them.
        rate: learning rate.
        options: its settings.

    Raises:
        CmloraError: for an unknown name, option or value.
    """
    known = options_of(name)
    for key in options:
        if key not in known:
            near = get_close_matches(key, known, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise CmloraError(
                f"train: {name} has no option {key!r}{hint} known: {', '.join(sorted(known))}"
            )
    try:
        return OPTIMIZERS[name].object(groups, rate, **options)
    except (TypeError, ValueError) as error:
        if isinstance(error, CmloraError):
            raise
        raise CmloraError(f"train: {name} does not take these options: {error}") from None
