"""Every form in which trainers store a change of a layer, one row each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from cmlora.forms.change import Change as Change
from cmlora.forms.change import Parts as Parts
from cmlora.forms.change import combined
from cmlora.forms.change import joined as joined
from cmlora.forms.dora import dora
from cmlora.forms.full import full, lora_bias, norm, values
from cmlora.forms.glora import glora
from cmlora.forms.ia3 import ia3, peft_ia3
from cmlora.forms.loha import loha
from cmlora.forms.lokr import lokr
from cmlora.forms.lora import embedding, lora
from cmlora.forms.miss import miss
from cmlora.forms.oft import oft, peft_boft, peft_oft
from cmlora.registry import Entry, Registry


class Form(NamedTuple):
    """How a form is stored.

    Args:
        read: its tensors to what they do to a layer.
        needed: roles of the tensors that must be there; of a group joined by ``|`` one is enough.
        optional: roles of those that may be.
        title: what people call it.
        base: whether it can only be worked out with the model's own weights.
    """

    read: Callable[[Parts], Change]
    needed: tuple[str, ...]
    optional: tuple[str, ...] = ()
    title: str = ""
    base: bool = False

    def missing(self, roles: Collection[str]) -> list[str]:
        """What of the needed tensors is not among the roles."""
        return [
            each.replace("|", " or ")
            for each in self.needed
            if not any(all(p in roles for p in one.split("+")) for one in each.split("|"))
        ]

    def roles(self) -> set[str]:
        """All roles of the form."""
        needed = {p for each in self.needed for one in each.split("|") for p in one.split("+")}
        return needed | set(self.optional)


_HADA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_KRON = ("lokr_w1|lokr_w1_a+lokr_w1_b", "lokr_w2|lokr_w2_a+lokr_w2_b")

FORMS: Registry[Form] = Registry(
    "form",
    Entry(
        "lora",
        Form(lora, ("down", "up"), ("mid",), "LoRA"),
        "a product of two factors, with a Tucker core if there is one",
        "arXiv:2106.09685",
    ),
    Entry(
        "loha",
        Form(loha, _HADA, ("hada_t1", "hada_t2"), "LoHa"),
        "the product of two low-rank matrices, entry by entry",
        "arXiv:2108.06098",
    ),
    Entry(
        "lokr",
        Form(lokr, _KRON, ("lokr_t2",), "LoKr"),
        "the Kronecker product of a small and a larger matrix",
        "arXiv:2309.14859",
    ),
    Entry("full", Form(full, ("diff|diff_b",), (), "full difference"), "whole differences"),
    Entry("norm", Form(norm, ("w_norm|b_norm",), (), "norm"), "differences of a norm's weights"),
    Entry(
        "ia3",
        Form(ia3, ("weight", "on_input"), (), "(IA)^3", True),
        "inputs or outputs rescaled, as LyCORIS stores it",
        "arXiv:2205.05638",
    ),
    Entry(
        "glora",
        Form(glora, ("a1", "a2", "b1", "b2"), ("bm",), "GLoRA", True),
        "a low-rank update and a low-rank change of the inputs",
        "arXiv:2306.07967",
    ),
    Entry(
        "oft",
        Form(oft, ("oft_blocks",), ("rescale",), "OFT", True),
        "outputs rotated in blocks (OFT) or butterflies (BOFT), of kohya and LyCORIS",
        "arXiv:2306.07280",
    ),
    Entry(
        "peft_oft",
        Form(peft_oft, ("oft_R",), (), "OFT of PEFT", True),
        "inputs rotated in blocks, of PEFT and OneTrainer",
        "arXiv:2306.07280",
    ),
    Entry(
        "peft_boft",
        Form(peft_boft, ("boft_R",), ("boft_s",), "BOFT of PEFT", True),
        "inputs rotated in butterfly order",
        "arXiv:2311.06243",
    ),
    Entry(
        "peft_ia3",
        Form(peft_ia3, ("ia3_l",), (), "(IA)^3 of PEFT", True),
        "inputs or outputs rescaled, as PEFT stores it",
        "arXiv:2205.05638",
    ),
    Entry(
        "miss",
        Form(miss, ("miss_block",), (), "MiSS", True),
        "one small matrix repeated over shards of the weight; once Bone",
        "arXiv:2409.15371",
    ),
    Entry(
        "lora_bias",
        Form(lora_bias, ("up_bias",), (), "LoRA with bias"),
        "an addition to the bias beside a LoRA",
    ),
    Entry(
        "embedding",
        Form(embedding, ("embedding_A", "embedding_B"), (), "LoRA of an embedding"),
        "PEFT's LoRA of a table of embeddings",
    ),
    Entry(
        "values",
        Form(values, ("value",), (), "replaced norm", True),
        "values that take the place of the model's own, in BFL's control LoRAs",
    ),
)

DECOMPOSED = ("dora_scale", "magnitude")
"""Roles of the lengths that make a DoRA of any form."""

_OWNER = {role: name for name, entry in FORMS.items() for role in entry.object.roles()}


def names(roles: Collection[str]) -> tuple[str, ...]:
    """The forms that a layer's tensors belong to, in the order of the table.

    >>> names({"down", "up", "alpha", "diff_b"})
    ('lora', 'full')
    """
    found = {_OWNER[role] for role in roles if role in _OWNER}
    return tuple(name for name in FORMS if name in found)


def titles(roles: Collection[str]) -> tuple[str, ...]:
    """What people call the forms of a layer.

    >>> titles({"hada_w1_a", "dora_scale"})
    ('LoHa', 'DoRA')
    """
    extra = ("DoRA",) if set(roles) & set(DECOMPOSED) else ()
    return (*(FORMS[name].object.title for name in names(roles)), *extra)


def missing(roles: Collection[str]) -> list[str]:
    """What is missing beside a layer's tensors, by role; everything is there if it is empty."""
    found = names(roles)
    if not found or (set(found) == {"lora_bias"}):
        return ["down", "up"]
    return [role for name in found for role in FORMS[name].object.missing(roles)]


def read(parts: Parts) -> Change:
    """What a layer's tensors do to it.

    Raises:
        ValueError: if the tensors do not fit each other.
    """
    found = [FORMS[name].object.read(parts) for name in names(parts.tensors)]
    change = combined(found)
    if any(role in parts for role in DECOMPOSED):
        return dora(change, parts)
    return change


def needs_base(roles: Collection[str]) -> bool:
    """Whether a layer's tensors can only be worked out with the model's own weights."""
    return bool(set(roles) & set(DECOMPOSED)) or any(
        FORMS[name].object.base for name in names(roles)
    )


def rank(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """The rank that a layer's tensors state, by the shapes of its roles; ``None`` without one."""
    for role in ("mid", "down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b", "a2", "embedding_A"):
        if shapes.get(role):
            return shapes[role][0]
    return None


def inputs(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """How many inputs a layer has, by the shapes of its roles, if they tell."""
    for role in ("down", "hada_w1_b", "diff", "a2"):
        if len(shapes.get(role, ())) > 1:
            return shapes[role][1]
    small = shapes.get("lokr_w1", shapes.get("lokr_w1_b", ()))
    large = shapes.get("lokr_w2", shapes.get("lokr_w2_b", ()))
    return small[1] * large[1] if len(small) > 1 and len(large) > 1 else None
