"""What a merging method is and what it promises."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from torch import Tensor

from cmlora.adapters.merging.factors import Pair
from cmlora.errors import CmloraError

Kind = Literal["sum", "average", "other"]
Needs = Literal["none", "calib", "objective"]

LAWS: Mapping[str, str] = {
    "L1": "one LoRA at weight 1 comes out unchanged",
    "L2a": "n copies at weight 1 / n are the original",
    "L2b": "n copies at weight 1 are the original",
    "L3": "the order of rank units is irrelevant",
    "L4": "any two factorisations of the same LoRA give the same result",
    "L5": "the order of the LoRAs is irrelevant",
    "L6": "a missing module counts as zero",
    "L7": "ranks may differ",
    "L8": "linear layers and convolutions of any kernel",
    "L9": "scales of any kind are in the factors of the result",
    "L10": "a pipeline with the written file computes W + D",
    "L11": "half precision in, finite half precision out",
}
"""What a method may promise. L5, L6 and L8 to L11 hold for all; a method without L7 says so."""

_GIVEN = ("rank", "exact", "generator", "grams", "limits", "control", "seed", "name", "on_step")


class Outcome(NamedTuple):
    """A merged matrix with numbers about how it came to be.

    Args:
        value: factors, or the dense matrix (O, M).
        notes: shares between 0 and 1 by name; the report averages them over the modules.
    """

    value: Pair | Tensor
    notes: Mapping[str, float]


Modules = Callable[[], Iterator[Mapping[int, Pair]]]
"""Goes through all modules: the pairs of those LoRAs that change one, by the LoRA's number."""
Survey = Callable[[Modules, int, Mapping[str, Any]], Sequence[float] | None]


@dataclass(frozen=True)
class Method:
    """A merging method: a function of the matrices of one module.

    Args:
        function: takes the pairs of factors and the weights of the LoRAs that change the module,
            and returns a `Pair`, a dense matrix or an `Outcome`; one that learns takes whole LoRAs
            and a loss, and returns a `cmlora.adapters.merging.learn.Fitted`. Keyword arguments
            called ``rank``, ``exact`` (the weighted sum), ``generator``, ``grams``, ``limits``,
            ``control``, ``seed``, ``name`` and ``on_step`` are filled in by the caller, all others
            are options.
        kind: what the weights mean. ``sum``: n copies at weight 1 / n are the original;
            ``average``: n copies at weight 1 are; ``other``: neither.
        promises: the optional laws it keeps. ``identity``: one LoRA at weight 1 comes out
            unchanged; ``units``: the order of rank units is irrelevant; ``gauge``: any two
            factorisations of the same LoRA give the same result; ``ranks``: ranks may differ;
            ``many``: any number of LoRAs, otherwise two.
        lossless: options under which identity and the law of its kind hold.
        absent: the function is given a pair of rank 0 for every LoRA that leaves the module alone,
            because a zero counts in its mean or its least squares; other formulas do not notice.
        survey: looks at all modules before the first is merged: takes a function that goes through
            them, the number of LoRAs and the options, and returns the ``limits`` of the LoRAs.
    """

    function: Callable[..., Any]
    kind: Kind
    promises: frozenset[str] = frozenset({"identity", "units", "gauge", "ranks", "many"})
    lossless: Mapping[str, Any] = field(default_factory=dict)
    absent: bool = False
    survey: Survey | None = None

    @property
    def laws(self) -> frozenset[str]:
        """Which of `LAWS` hold, under the lossless options."""
        named = {"identity": "L1", "units": "L3", "gauge": "L4", "ranks": "L7"}
        held = {law for promise, law in named.items() if promise in self.promises}
        of_kind = {"sum": {"L2a"}, "average": {"L2b"}, "other": set()}[self.kind]
        return frozenset(held | of_kind | {"L5", "L6", "L8", "L9", "L10", "L11"})

    @property
    def needs(self) -> Needs:
        """What it needs besides files: calibration data, an objective on a model, or nothing."""
        if self.needs_grams:
            return "calib"
        return "objective" if self.takes("loss") else "none"

    @property
    def needs_grams(self) -> bool:
        """Whether it needs the second moments of the inputs of every module."""
        return "grams" in inspect.signature(self.function).parameters

    def takes(self, name: str) -> bool:
        """Whether its function has this keyword argument."""
        return name in inspect.signature(self.function).parameters

    def options(self) -> dict[str, Any]:
        """Names and defaults of its options."""
        return {
            name: parameter.default
            for name, parameter in inspect.signature(self.function).parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name not in _GIVEN
        }


def read_options(name: str, method: Method, given: Mapping[str, Any]) -> dict[str, Any]:
    """Options with values of the right kind; texts are read as the command line gives them.

    Raises:
        CmloraError: for an unknown option, or a value of the wrong kind.
    """
    known, hints = method.options(), get_type_hints(method.function)
    values = {}
    for option, value in given.items():
        if option not in known:
            listed = f"its options: {', '.join(known)}" if known else "it has no options"
            raise CmloraError(f"{name} has no option {option!r}; {listed}")
        try:
            values[option] = _read(value, hints[option])
        except (ValueError, TypeError):
            expected = str(getattr(hints[option], "__name__", hints[option])).replace("typing.", "")
            raise CmloraError(f"{name}: {option} is {value!r}, expected {expected}") from None
    return values


def share(name: str, value: float, *, zero: bool = False) -> None:
    """Raises `CmloraError` unless the value is in (0, 1], or in [0, 1] with ``zero``."""
    if not (0 < value <= 1 or (zero and value == 0)):
        raise CmloraError(f"{name} is {value:g}, expected {'0' if zero else 'more than 0'} to 1")


def _read(value: Any, hint: Any) -> Any:
    """The value as one of the hint's kind; ValueError if it is none."""
    if get_origin(hint) is Literal:
        if value in get_args(hint):
            return value
        raise ValueError
    if get_origin(hint) in (Union, UnionType):
        if value in (None, "none"):
            return None
        hint = next(kind for kind in get_args(hint) if kind is not type(None))
    if hint is bool:
        found = {"true": True, "false": False}.get(str(value).lower())
        if found is None:
            raise ValueError
        return found
    number = hint(value)
    if isinstance(value, bool) or not math.isfinite(number) or number != float(value):
        raise ValueError
    return number
