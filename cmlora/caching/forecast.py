"""What a cached feature would be by now, from how it changed at its last refreshes.

The idea of TaylorSeer (arXiv 2503.06923): a feature changes smoothly in the course of a run, so the
polynomial through its last values forecasts it better than its last value alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def forecast(history: Sequence[tuple[int, Tensor]], step: int, order: int) -> Tensor:
    """Newton's polynomial through the newest ``order + 1`` values, at a step.

    f(s) = f[s_0] + (s - s_0) f[s_0, s_1] + (s - s_0)(s - s_1) f[s_0, s_1, s_2] + .., with divided
    differences f[..] and s_0 the newest step. Steps need not be evenly spaced. At evenly spaced
    ones this is the paper's expansion in finite differences.

    Args:
        history: (step, feature) pairs in ascending order of steps, one or more.
        step: where.
        order: degree of the polynomial; less where the history is shorter; 0 is the newest value.

    Returns:
        In the features' dtype, computed in fp32 or wider.

    >>> forecast([(0, 1.0), (2, 5.0)], 3, order=1)
    7.0
    """
    known = list(history)[-(order + 1) :][::-1]
    steps = [at for at, _ in known]
    newest: Any = known[0][1]
    column: list[Any] = [_wide(value) for _, value in known]
    result, factor = column[0], 1.0
    for level in range(1, len(known)):
        column = [
            (column[i] - column[i + 1]) / (steps[i] - steps[i + level])
            for i in range(len(column) - 1)
        ]
        factor *= step - steps[level - 1]
        result = result + factor * column[0]
    return result.to(newest.dtype) if hasattr(newest, "dtype") else result  # type: ignore[no-any-return]


def _wide(value: Any) -> Any:
    """Half precision would lose the differences."""
    return value.float() if hasattr(value, "dtype") and value.dtype.itemsize < 4 else value
