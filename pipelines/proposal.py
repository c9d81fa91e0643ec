"""A composition proposed for LoRA files: what of a recipe follows from them alone, as a file."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from cmlora import checks
from cmlora.adapters.analysis.advice import Findings, in_turns, needless, rivals, turns
from cmlora.adapters.analysis.balance import weights
from cmlora.adapters.analysis.saturation import Saturation
from cmlora.container import sha256
from cmlora.errors import CmloraError
from cmlora.frequency.card import Profile
from cmlora.pipelines.library import adapter_name, by_hash
from cmlora.plan import Member
from cmlora.schedules.parse import parse_schedule
from cmlora.strategies import check_options
from cmlora.strategies.auto import choose

FORMAT = 1
"""Number of the JSON form."""
STEPS = 30
"""For how many steps a method is proposed."""
_KEY = "cmlora_proposal"


@dataclass(frozen=True)
class Part:
    """One LoRA of a proposal.

    Args:
        name: that it gets in a pipeline.
        file: where it was.
        sha256: of the file.
        weight: its strength.

    Raises:
        CmloraError: if a value has the wrong type.
    """

    name: str
    file: str
    sha256: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        where = "proposal: a LoRA"
        for key in ("name", "file", "sha256"):
            checks.text(where, key, getattr(self, key), empty=False)
        object.__setattr__(self, "weight", checks.real(where, "weight", self.weight))


@dataclass(frozen=True)
class Proposal:
    """How LoRAs should be composed; prompt, model, seed and steps are left to whoever draws.

    Args:
        loras: those to use, in the user's order.
        order: their names in the order of their turns.
        method: composition method.
        options: of the method.
        cache: the cache policy as text.
        uncond: whose unconditional predictions are used.
        schedule: curves on the weights, as text.
        reason: of the method, in one line.

    Raises:
        CmloraError: if a value has the wrong type or is impossible.
    """

    loras: tuple[Part, ...]
    order: tuple[str, ...]
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    cache: str = "none"
    uncond: str = "per_lora"
    schedule: str = ""
    reason: str = ""

    def __post_init__(self) -> None:
        where = "proposal"
        for key in ("method", "cache", "uncond"):
            checks.text(where, key, getattr(self, key), empty=False)
        for key in ("schedule", "reason"):
            checks.text(where, key, getattr(self, key))
        names = [part.name for part in self.loras]
        if not names or len(set(names)) < len(names):
            raise CmloraError(f"{where}: loras are {', '.join(names) or 'none'}")
        if sorted(map(str, self.order)) != sorted(names):
            raise CmloraError(f"{where}: order does not name its LoRAs, {', '.join(names)}")
        checks.choice(where, "uncond", self.uncond, ("per_lora", "shared"))
        check_options(self.method, checks.table(where, "options", self.options))
        parse_schedule(self.schedule).check(names)

    def table(self) -> dict[str, Any]:
        """The proposal in JSON types."""
        return {_KEY: FORMAT, **json.loads(json.dumps(asdict(self)))}

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> "Proposal":
        """The proposal that `table` gave.

        Raises:
            CmloraError: if it is none, is from a newer version, or has wrong values.
        """
        checks.whole("proposal", _KEY, table.get(_KEY), 1, FORMAT)
        given = {key: value for key, value in table.items() if key != _KEY}
        loras = given.get("loras")
        if not isinstance(loras, list) or not isinstance(given.get("order"), list):
            raise CmloraError("proposal: loras and order must be lists")
        parts = tuple(Part(**_known(Part, part)) for part in loras)
        return cls(**{**_known(cls, given), "loras": parts, "order": tuple(given["order"])})

    def files(self, *, model: str | Path, folder: str | Path | None = None) -> list[Path]:
        """Where its LoRAs are: the files as they were, wherever those are now.

        Args:
            model: its embedded LoRAs are looked at, if it is ``emoji``.
            folder: where else to look.

        Raises:
            CmloraError: that names all that are not there, or are others by now.
        """
        places = {part.name: Path(part.file) for part in self.loras}
        there = {n: p for n, p in places.items() if p.is_file() and sha256(p) == _digest(self, n)}
        lost = [part for part in self.loras if part.name not in there]
        wanted = [(Path(part.file).name, part.sha256) for part in lost]
        found = by_hash(wanted, model=model, folder=folder) if lost else []
        there |= {part.name: path for part, path in zip(lost, found, strict=True)}
        return [there[part.name] for part in self.loras]

    def words(self) -> str:
        """The proposal in one line."""
        strengths = {part.name: f"{part.name}:{part.weight:g}" for part in self.loras}
        said = f"{self.method} of {', '.join(strengths[name] for name in self.order)}"
        return f"{said}; schedule {self.schedule}" if self.schedule else said


def is_proposal(table: object) -> bool:
    """Whether JSON is a proposal, good or bad, and not a recipe."""
    return isinstance(table, dict) and _KEY in table


def propose(
    found: Findings,
    paths: Mapping[str, Path],
    profiles: Mapping[str, Profile],
    limits: Sequence[Saturation] = (),
) -> Proposal:
    """What the doctor's findings come to, with the method that "auto" would choose.

    LoRAs that change nothing, and copies, are left out. Weights, order and turns are those of the
    advice in words; where it has no order, that of "auto".

    Args:
        found: see `cmlora.adapters.analysis.doctor.examine`.
        paths: of the files, by name.
        profiles: measured profiles, by name, of as many as there are.
        limits: how strong the LoRAs may be, if that was measured.
    """
    gone = needless(found)
    kept = [name for name in found.names if name not in gone] or list(found.names)
    renamed: dict[str, str] = {}
    for name in kept:
        renamed[name] = adapter_name(paths[name], renamed.values())
    strengths = dict(zip(found.names, weights(found.norms), strict=True))
    chosen = choose(
        [_member(found, name, strengths[name], profiles.get(name)) for name in kept],
        STEPS,
    )
    safest = {row.name: row.safest for row in limits}
    strengths = {name: min(strengths[name], safest.get(name, 1.0)) for name in kept}
    known = turns(found)
    order = [name for name in (known[0] if known else chosen.order) if name in kept]
    groups = [[renamed[name] for name in group if name in kept] for group in rivals(found)]
    return Proposal(
        loras=tuple(
            Part(
                renamed[name],
                str(paths[name].absolute()),
                sha256(paths[name]),
                round(strengths[name], 2),
            )
            for name in kept
        ),
        order=tuple(renamed[name] for name in order),
        method=chosen.method,
        options=dict(chosen.options),
        cache=chosen.cache,
        uncond=chosen.uncond,
        schedule=" ".join(in_turns(group) for group in groups if len(group) > 1),
        reason=chosen.reason,
    )


def _member(found: Findings, name: str, weight: float, profile: Profile | None) -> Member:
    """A LoRA as the choice of a method sees it."""
    member = Member(name, weight, category=found.categories.get(name))
    if profile is None or name not in found.frequency:
        return member
    return replace(
        member,
        frequency=profile.frequency,
        window=profile.window,
        importance=profile.importance,
    )


def _digest(proposal: Proposal, name: str) -> str:
    return next(part.sha256 for part in proposal.loras if part.name == name)


def _known(kind: type, table: object) -> dict[str, Any]:
    """The table if it has only fields of a class, and all that it needs."""
    needed = {"Part": {"name", "file", "sha256"}, "Proposal": {"loras", "order", "method"}}
    names = {each.name for each in fields(kind)}
    if not isinstance(table, Mapping) or not needed[kind.__name__] <= set(table) <= names:
        keys = ", ".join(map(str, table)) if isinstance(table, Mapping) else repr(table)
        raise CmloraError(f"proposal: expected {', '.join(sorted(names))}; found {keys:.200}")
    return dict(table)
