"""Smaller weights: rules that shrink the rank of LoRAs and layers, and compact forms of layers."""

from __future__ import annotations

from cmlora.adapters.compression.budget import budget
from cmlora.adapters.compression.clip import clip
from cmlora.adapters.compression.cospadi import cospadi
from cmlora.adapters.compression.energy import energy
from cmlora.adapters.compression.fixed import fixed
from cmlora.adapters.compression.form import Method
from cmlora.adapters.compression.lord import lord
from cmlora.adapters.compression.mxfp4 import mxfp4
from cmlora.adapters.compression.rocket import rocket
from cmlora.adapters.compression.rule import Rule
from cmlora.adapters.compression.svd import svd
from cmlora.adapters.compression.trp import trp
from cmlora.adapters.compression.welore import welore
from cmlora.registry import Entry, Registry

RULES: Registry[Rule] = Registry(
    "resizing rule",
    Entry("fixed", fixed, "one rank for every module; keep is the rank"),
    Entry("energy", energy, "as much rank as holds a share of each module's energy"),
    Entry("budget", budget, "a share of the parameters, spent where it buys the most energy"),
    Entry("welore", welore, "a share of the parameters, by a threshold", "arXiv:2407.11239"),
    Entry("clip", clip, "same rank, spikes limited to a multiple of the usual strength"),
)

COMPRESSIONS: Registry[Method] = Registry(
    "compression method",
    Entry("svd", svd, "truncated SVD, weighted by the inputs if they are known"),
    Entry("lord", lord, "the same from the outputs, cheaper for convolutions", "arXiv:2309.14021"),
    Entry("rocket", rocket, "a dictionary and few codes per output", "arXiv:2602.11008"),
    Entry("cospadi", cospadi, "the dictionary learnt by K-SVD, slow", "arXiv:2509.22075"),
    Entry(
        "trp", trp, "the singular values that pruning left, within the share", "arXiv:1812.02402"
    ),
    Entry("mxfp4", mxfp4, "4-bit values with a scale per 32", "arXiv:2505.14669"),
)
