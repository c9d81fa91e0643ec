"""Which layer is worth how many bytes: the best choice of one form per layer within a budget."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cmlora.adapters.compression.form import Form, Method, dense, in_precision, nbytes
from cmlora.errors import CmloraError

SHARES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
"""Shares of a layer's bytes that are tried, ROCKET's list (arXiv:2602.11008) from the other end."""
RATIOS = (1.0, 1.5, 2.0, 3.0)
"""Atoms per code that are tried, for methods that have a choice."""
UNITS = 4000
"""Parts that the budget is counted in."""


class Choice(NamedTuple):
    """One way to store a layer.

    Args:
        cost: bytes.
        loss: squared error of the layer's outputs, relative to their size.
    """

    cost: int
    loss: float


def knapsack(choices: Mapping[str, Sequence[Choice]], budget: int) -> dict[str, int]:
    """By name which choice to take, so that the sum of the losses is least within the budget.

    Dynamic programming over the budget in `UNITS` parts, with costs rounded up: the budget always
    holds, and the best sum of a budget smaller by a part per layer is always reached.

    Args:
        choices: one or more per name.
        budget: bytes.

    Raises:
        CmloraError: if even the cheapest choices do not fit.
    """
    names = sorted(choices)
    least = sum(min(choice.cost for choice in choices[name]) for name in names)
    if least > budget:
        raise CmloraError(f"{budget} bytes are too few: the smallest forms need {least}")
    # The cheapest of every layer are paid exactly; only what comes on top is rounded.
    unit = max((budget - least) / UNITS, 1e-9)
    best = np.zeros(UNITS + 1)
    taken: list[np.ndarray[Any, np.dtype[np.int64]]] = []
    for name in names:
        base = min(choice.cost for choice in choices[name])
        after = np.full(UNITS + 1, np.inf)
        which = np.zeros(UNITS + 1, dtype=np.int64)
        for index, choice in enumerate(choices[name]):
            extra = int(np.ceil((choice.cost - base) / unit - 1e-9))
            if extra > UNITS:
                continue
            total = np.full(UNITS + 1, np.inf)
            total[extra:] = best[: UNITS + 1 - extra] + choice.loss
            better = total < after
            after[better], which[better] = total[better], index
        best = after
        taken.append(which)
    place, found = int(best.argmin()), {}
    for name, which in zip(reversed(names), reversed(taken), strict=True):
        index = int(which[place])
        found[name] = index
        base = min(choice.cost for choice in choices[name])
        place -= int(np.ceil((choices[name][index].cost - base) / unit - 1e-9))
    return found


def forms(
    matrices: Mapping[str, Tensor],
    method: Method,
    keep: float,
    grams: Mapping[str, Tensor],
    error: Any,
    shares: Sequence[float] = SHARES,
) -> dict[str, Form | None]:
    """The best form of every layer within a share of all their bytes; nothing where it stays.

    Args:
        matrices: (O, I) by name.
        method: an entry of `cmlora.adapters.compression.COMPRESSIONS`; those with a ``ratio`` are
            tried with several.
        keep: share of the bytes of all matrices together.
        grams: of the layers' inputs, as far as they are known.
        error: ``error(matrix, other, gram)``, relative.
        shares: of a layer's bytes that are tried.

    Raises:
        CmloraError: if the budget is too small for any choice.
    """
    ratios = RATIOS if "ratio" in inspect.signature(method).parameters else (None,)
    choices: dict[str, list[Choice]] = {}
    made: dict[str, list[Form | None]] = {}
    for name, matrix in matrices.items():
        size = matrix.numel() * matrix.element_size()
        choices[name], made[name] = [Choice(size, 0.0)], [None]
        for share in shares:
            for ratio in ratios:
                extra = {} if ratio is None else {"ratio": ratio}
                form = method(matrix, share, grams.get(name), **extra)
                if form is None or nbytes(form) >= size:
                    continue
                exact = dense(in_precision(form, torch.promote_types(matrix.dtype, torch.float32)))
                loss = float(error(matrix, exact, grams.get(name))) ** 2
                choices[name].append(Choice(nbytes(form), loss))
                made[name].append(form)
    total = sum(matrix.numel() * matrix.element_size() for matrix in matrices.values())
    found = knapsack(choices, int(keep * total))
    return {name: made[name][index] for name, index in found.items()}
