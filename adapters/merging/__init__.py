"""Several LoRAs become one: the methods, each a function of the matrices of one module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cmlora.adapters.merging.cat import cat
from cmlora.adapters.merging.iso import iso_c, iso_cts
from cmlora.adapters.merging.karcher import karcher, slerp
from cmlora.adapters.merging.knots import knots_dare, knots_ties, survey
from cmlora.adapters.merging.lego import lego
from cmlora.adapters.merging.linear import factor_linear, linear
from cmlora.adapters.merging.method import Method
from cmlora.adapters.merging.pleas import pleas
from cmlora.adapters.merging.result import MergeResult
from cmlora.adapters.merging.run import Grams, run
from cmlora.adapters.merging.sparse import (
    breadcrumbs,
    breadcrumbs_ties,
    dare_linear,
    dare_ties,
    della,
    magnitude,
    ties,
)
from cmlora.adapters.merging.svd import svd
from cmlora.adapters.merging.tsv import tsv_m
from cmlora.adapters.merging.ziplora import ziplora
from cmlora.lora import LoRA
from cmlora.registry import Entry, Registry

_ALL = frozenset({"identity", "units", "gauge", "ranks", "many"})
_WHOLE = {"density": 1.0}

MERGES: Registry[Method] = Registry(
    "merging method",
    Entry("cat", Method(cat, "sum", _ALL), "the exact sum, ranks added up"),
    Entry(
        "linear",
        Method(linear, "sum", _ALL),
        "the exact sum in as few rank units as it needs",
        "arXiv:2212.04089",
    ),
    Entry("svd", Method(svd, "sum", _ALL), "the sum cut to a rank by singular values"),
    Entry(
        "factor_linear",
        Method(factor_linear, "other", _ALL - {"gauge", "ranks"}),
        "up and down factors added apart, as PEFT's linear does",
    ),
    Entry(
        "slerp",
        Method(slerp, "average", _ALL - {"many"}, absent=True),
        "the direction between two LoRAs, at their mean length",
    ),
    Entry(
        "karcher",
        Method(karcher, "average", _ALL, absent=True),
        "the mean direction at the mean length",
    ),
    Entry(
        "magnitude",
        Method(magnitude, "sum", _ALL, _WHOLE),
        "the largest entries of every LoRA, added up",
    ),
    Entry(
        "dare_linear",
        Method(dare_linear, "sum", _ALL, _WHOLE),
        "random entries of every LoRA, scaled up and added",
        "arXiv:2311.03099",
    ),
    Entry(
        "dare_ties",
        Method(dare_ties, "average", _ALL, _WHOLE),
        "random entries, scaled up and averaged where signs agree",
        "arXiv:2311.03099",
    ),
    Entry(
        "ties",
        Method(ties, "average", _ALL, _WHOLE),
        "trim to the largest entries, elect a sign, average what agrees",
        "arXiv:2306.01708",
    ),
    Entry(
        "della",
        Method(della, "average", _ALL, _WHOLE | {"epsilon": 0.0}),
        "random entries, larger ones more often, averaged where signs agree",
        "arXiv:2406.11617",
    ),
    Entry(
        "breadcrumbs",
        Method(breadcrumbs, "sum", _ALL, _WHOLE | {"gamma": 0.0}),
        "all but the very largest and the small entries, added up",
        "arXiv:2312.06795",
    ),
    Entry(
        "breadcrumbs_ties",
        Method(breadcrumbs_ties, "average", _ALL, _WHOLE | {"gamma": 0.0}),
        "all but the very largest and the small entries, averaged where signs agree",
        "arXiv:2312.06795",
    ),
    Entry(
        "knots_ties",
        Method(knots_ties, "average", _ALL, _WHOLE, survey=survey),
        "ties in a basis that all LoRAs share",
        "arXiv:2410.19735",
    ),
    Entry(
        "knots_dare",
        Method(knots_dare, "sum", _ALL, _WHOLE),
        "dare_linear in a basis that all LoRAs share",
        "arXiv:2410.19735",
    ),
    Entry(
        "iso_c",
        Method(iso_c, "other", _ALL - {"identity"}),
        "the sum with equal strength in all its directions",
        "arXiv:2502.04959",
    ),
    Entry(
        "iso_cts",
        Method(iso_cts, "other", _ALL - {"identity"}),
        "the same with directions reserved for every LoRA",
        "arXiv:2502.04959",
    ),
    Entry(
        "tsv_m",
        Method(tsv_m, "other", _ALL),
        "the singular vectors of all LoRAs made orthogonal",
        "arXiv:2412.00081",
    ),
    Entry(
        "lego",
        Method(lego, "average", _ALL),
        "similar rank units of all LoRAs become one",
        "arXiv:2409.16167",
    ),
    Entry(
        "pleas",
        Method(pleas, "average", _ALL, absent=True),
        "least squares on the inputs that the layers see with each LoRA",
        "arXiv:2407.02447",
    ),
    Entry(
        "ziplora",
        Method(ziplora, "average", _ALL, absent=True),
        "one strength per input column, found by least squares on the inputs",
        "arXiv:2311.13600",
    ),
)


def merge(
    loras: Sequence[LoRA],
    weights: Sequence[float],
    method: str = "svd",
    *,
    name: str | None = None,
    rank: int | None = None,
    seed: int = 0,
    grams: Grams | None = None,
    advance: Callable[[int, int], None] | None = None,
    **options: Any,
) -> MergeResult:
    """Merges LoRAs into one whose scales are all 1.

    A module that a LoRA does not have counts as unchanged by it, which is an update of zero for
    means and least squares too; ranks may differ between LoRAs and between modules. The order of
    the LoRAs is irrelevant, and a LoRA with weight 0 is left out.

    Args:
        loras: of one model family.
        weights: one per LoRA; what they mean depends on the method's kind.
        method: a name from `MERGES`.
        name: of the result; the names of the LoRAs joined by ``+`` if none is given.
        rank: the largest rank of a module in the result; by default the method's own choice, and
            the sum of the ranks for methods that work on entries.
        seed: of methods that draw random numbers.
        grams: for methods that need calibration data, by LoRA name and module the second moments
            X^T X (M, M) of the module's inputs.
        advance: called before every module with its number and the count of modules.
        options: of the method.

    Raises:
        CmloraError: for an unknown method or option, LoRAs of different models, values that are
            not finite, or a rank that is not possible.
    """
    return run(
        method,
        MERGES[method].object,
        loras,
        weights,
        name=name,
        rank=rank,
        seed=seed,
        grams=grams,
        options=options,
        advance=advance,
    )
