"""Testbeds as data: which model, which LoRAs, which sets of them, prompted and sampled how."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import combinations, product
from pathlib import Path
from typing import Any, Literal, get_args

from cmlora import checks
from cmlora.errors import CmloraError
from cmlora.plan import Role

FORMAT = 1
"""Number of the manifest's form; raised when an older program could misread it."""

Rule = Literal["one_per_category", "all", "listed"]
SLOT = "{triggers}"
_KEY = "cmlora_testbed"
_LONGEST = 64


@dataclass(frozen=True)
class Concept:
    """One LoRA of a testbed.

    Args:
        id: names it in sets, files and reports.
        category: what it draws; the rule for sets goes by it.
        triggers: its trigger words, in the order in which the prompt has them.
        file: of its weights, below the LoRA folder; ``<id>.safetensors`` if empty.
        name: what people call it; compared with what the file says of itself.
        weight: its strength.
        role: ``high`` or ``low`` frequency, where you know better than the measurement.
        sha256: of the file; another file is refused. Not checked if empty.

    Raises:
        CmloraError: if a value has the wrong type or is impossible.
    """

    id: str
    category: str
    triggers: tuple[str, ...]
    file: str = ""
    name: str = ""
    weight: float = 1.0
    role: Role | None = None
    sha256: str = ""

    def __post_init__(self) -> None:
        checks.text("testbed", "id of a LoRA", self.id, empty=False)
        where = f"LoRA {self.id!r} of the testbed"
        if not all(c.isalnum() or c in "_-" for c in self.id) or len(self.id) > _LONGEST:
            raise CmloraError(f"{where}: an id is up to {_LONGEST} letters, digits, _ and -")
        checks.text(where, "category", self.category, empty=False)
        for name in ("file", "name", "sha256"):
            checks.text(where, name, getattr(self, name))
        if self.file and not self.file.endswith(".safetensors"):
            raise CmloraError(f"{where}: file is {self.file!r}, which is not a .safetensors file")
        _texts(where, "triggers", self.triggers)
        object.__setattr__(self, "triggers", tuple(self.triggers))
        object.__setattr__(self, "weight", checks.real(where, "weight", self.weight))
        checks.choice(where, "role", self.role, (None, "high", "low"))

    @property
    def trigger(self) -> str:
        """The trigger words as one text, which is also what CLIPScore compares with."""
        return ", ".join(self.triggers)


@dataclass(frozen=True)
class Manifest:
    """A testbed.

    Args:
        name: of the testbed.
        model: a folder, a ``.safetensors`` file, a hub id, or ``emoji``.
        loras: the LoRAs; categories count in the order of their first LoRA.
        prompt: the prompt of a set, with ``{triggers}`` where the trigger words go.
        negative_prompt: the same for every picture.
        rule: ``one_per_category``, ``all`` combinations, or ``listed``.
        required: categories that every set has, for ``one_per_category``.
        sets: the sets themselves, for ``listed``.
        vae: replaces the model's autoencoder; empty for the model's own.
        scheduler: diffusers class name; empty for the model's own.
        scheduler_config: what to change in its configuration.
        steps: denoising steps.
        guidance_scale: of classifier-free guidance.
        width: in pixels; ``None`` is the model's own.
        height: in pixels; ``None`` is the model's own.
        seeds: used unless others are asked for.
        clip_text: whether CLIPScore compares with the ``triggers`` or the whole ``prompt``.
        references: folder of pictures per LoRA id, for similarity scores; empty for none.
        note: where all this is from.

    Raises:
        CmloraError: if a value has the wrong type or the parts do not fit each other.
    """

    name: str
    model: str
    loras: tuple[Concept, ...]
    prompt: str = SLOT
    negative_prompt: str = ""
    rule: Rule = "one_per_category"
    required: tuple[str, ...] = ()
    sets: tuple[tuple[str, ...], ...] = ()
    vae: str = ""
    scheduler: str = ""
    scheduler_config: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 30
    guidance_scale: float = 7.5
    width: int | None = None
    height: int | None = None
    seeds: tuple[int, ...] = (0,)
    clip_text: Literal["triggers", "prompt"] = "triggers"
    references: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        where = "testbed"
        for key in ("name", "model"):
            checks.text(where, key, getattr(self, key), empty=False)
        for key in ("prompt", "negative_prompt", "vae", "scheduler", "references", "note"):
            checks.text(where, key, getattr(self, key))
        if self.prompt.count(SLOT) != 1:
            raise CmloraError(f"{where}: prompt is {self.prompt!r}, without {SLOT} exactly once")
        checks.choice(where, "rule", self.rule, get_args(Rule))
        checks.choice(where, "clip_text", self.clip_text, ("triggers", "prompt"))
        checks.whole(where, "steps", self.steps, 1, 10_000)
        for key in ("width", "height"):
            if getattr(self, key) is not None:
                checks.whole(where, key, getattr(self, key), 8, 2**16)
        real = checks.real(where, "guidance_scale", self.guidance_scale)
        object.__setattr__(self, "guidance_scale", real)
        table = checks.table(where, "scheduler_config", self.scheduler_config)
        object.__setattr__(self, "scheduler_config", table)
        if not isinstance(self.seeds, (list, tuple)) or not self.seeds:
            raise CmloraError(f"{where}: seeds is {self.seeds!r}, not a list of at least one")
        for seed in self.seeds:
            checks.whole(where, "a seed", seed, 0, 2**63 - 1)
        object.__setattr__(self, "seeds", tuple(self.seeds))
        _texts(where, "required", self.required)
        object.__setattr__(self, "required", tuple(self.required))
        self._check_loras()
        self._check_sets()

    def __hash__(self) -> int:
        return hash(self.digest())

    @property
    def by_id(self) -> dict[str, Concept]:
        """The LoRAs by id."""
        return {lora.id: lora for lora in self.loras}

    @property
    def categories(self) -> tuple[str, ...]:
        """Every category once, in the order of first appearance."""
        return tuple(dict.fromkeys(lora.category for lora in self.loras))

    def combinations(self, size: int) -> list[tuple[str, ...]]:
        """All sets of so many LoRAs that the rule allows, always in the same order.

        Ids of a set come in the order of the categories, then of the manifest: that is the order
        of the prompt and of methods that take turns.
        """
        if self.rule == "listed":
            return [ids for ids in self.sets if len(ids) == size]
        if self.rule == "all":
            return [self.ordered(ids) for ids in combinations([c.id for c in self.loras], size)]
        rest = [c for c in self.categories if c not in self.required]
        found = []
        if size < max(1, len(self.required)):
            return []
        for others in combinations(rest, size - len(self.required)):
            chosen = [c for c in self.categories if c in self.required or c in others]
            pools = [[lora.id for lora in self.loras if lora.category == c] for c in chosen]
            found += [tuple(ids) for ids in product(*pools)]
        return found

    def sample(self, size: int, most: int | None = None) -> list[tuple[str, ...]]:
        """Sets of so many LoRAs, or some of them, chosen by a hash of their ids.

        A smaller sample is part of every larger one, and nothing else has an influence.

        Args:
            size: LoRAs per set.
            most: how many sets at most; all if ``None``.
        """
        sets = self.combinations(size)
        if most is None or most >= len(sets):
            return sets
        chosen = sorted(sets, key=lambda ids: hashlib.sha256(set_id(ids).encode()).digest())[:most]
        return [ids for ids in sets if ids in set(chosen)]

    def ordered(self, ids: Iterable[str]) -> tuple[str, ...]:
        """The ids in the order of categories, then of the manifest."""
        places = {lora.id: i for i, lora in enumerate(self.loras)}
        order = {category: i for i, category in enumerate(self.categories)}
        found = self.by_id
        return tuple(sorted(ids, key=lambda id_: (order[found[id_].category], places[id_])))

    def triggers(self, ids: Sequence[str]) -> str:
        """The trigger words of a set, comma-separated."""
        return ", ".join(self.by_id[id_].trigger for id_ in ids)

    def prompt_of(self, ids: Sequence[str]) -> str:
        """The prompt of a set."""
        return self.prompt.replace(SLOT, self.triggers(ids))

    def to_dict(self) -> dict[str, Any]:
        """As JSON types; `from_dict` makes the same manifest of it."""
        table = {_KEY: FORMAT, **asdict(self)}
        copy: dict[str, Any] = json.loads(json.dumps(table))
        return copy

    @classmethod
    def from_dict(cls, table: Any, where: str = "testbed") -> Manifest:
        """A manifest from what a JSON or YAML file holds.

        Raises:
            CmloraError: if it is none; the message begins with `where` and names the key.
        """
        if not isinstance(table, dict) or _KEY not in table:
            raise CmloraError(f"{where} is not a testbed: it has no key {_KEY!r}")
        checks.whole(where, _KEY, table[_KEY], 1, 2**31)
        if table[_KEY] > FORMAT:
            raise CmloraError(
                f"{where} has format {table[_KEY]} and this program reads up to {FORMAT}; "
                "upgrade cmlora"
            )
        try:
            arguments = _known(cls, {k: v for k, v in table.items() if k != _KEY})
            loras = arguments.get("loras")
            if not isinstance(loras, list) or not all(isinstance(lora, dict) for lora in loras):
                raise CmloraError("testbed: loras is not a list of tables")
            arguments["loras"] = tuple(Concept(**_known(Concept, lora)) for lora in loras)
            return cls(**arguments)
        except CmloraError as mistake:
            raise CmloraError(f"{where}: {mistake}") from None

    def digest(self) -> str:
        """SHA-256 of everything in it, 64 hex digits."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def _check_loras(self) -> None:
        object.__setattr__(self, "loras", tuple(self.loras))
        if not self.loras:
            raise CmloraError("testbed: there are no loras")
        seen: set[str] = set()
        for lora in self.loras:
            if lora.id.lower() in seen:
                raise CmloraError(f"testbed: two LoRAs have the id {lora.id!r}")
            seen.add(lora.id.lower())
        for category in self.required:
            if category not in self.categories:
                listed = ", ".join(self.categories)
                raise CmloraError(f"testbed: required category {category!r} is none of {listed}")

    def _check_sets(self) -> None:
        if (self.rule == "listed") != bool(self.sets):
            raise CmloraError("testbed: sets are listed if, and only if, the rule is 'listed'")
        if not isinstance(self.sets, (list, tuple)):
            raise CmloraError(f"testbed: sets is {self.sets!r}, not a list of lists")
        checked = []
        for ids in self.sets:
            _texts("testbed", "a set", ids)
            for id_ in ids:
                if id_ not in self.by_id:
                    near = difflib.get_close_matches(id_, self.by_id, n=1)
                    hint = f"; did you mean {near[0]}?" if near else ""
                    raise CmloraError(f"testbed: a set has {id_!r}, which is no LoRA here{hint}")
            checked.append(self.ordered(ids))
            if not ids or len(set(ids)) < len(ids) or checked.count(checked[-1]) > 1:
                raise CmloraError(f"testbed: the set {list(ids)} is empty or says something twice")
        object.__setattr__(self, "sets", tuple(checked))


def set_id(ids: Sequence[str]) -> str:
    """The name of a set in files and reports."""
    return "+".join(ids)


def read_manifest(path: Path) -> Manifest:
    """A manifest from a ``.json``, ``.yaml`` or ``.yml`` file.

    Relative places in it (``model``, ``references``) are looked up from the file's folder.

    Raises:
        CmloraError: if the file is missing, is not JSON or YAML, or holds no valid manifest.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CmloraError(f"cannot read the testbed {path}: {error}") from None
    return _anchored(Manifest.from_dict(_parsed(text, path), str(path)), path.parent)


def _parsed(text: str, path: Path) -> Any:
    if path.suffix == ".json":
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CmloraError(f"{path} is not JSON: {error}") from None
    import yaml

    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise CmloraError(f"{path} is not YAML: {' '.join(str(error).split())}") from None


def _anchored(manifest: Manifest, folder: Path) -> Manifest:
    places: dict[str, Any] = {
        key: str((folder / value).resolve())
        for key in ("model", "vae", "references")
        if (value := getattr(manifest, key)) and (folder / value).exists()
    }
    return replace(manifest, **places) if places else manifest


def _texts(where: str, name: str, values: object) -> None:
    if not isinstance(values, (list, tuple)):
        raise CmloraError(f"{where}: {name} is {values!r}, not a list of texts")
    for value in values:
        checks.text(where, f"an entry of {name}", value, empty=False)


def _known(kind: type, table: Mapping[str, Any]) -> dict[str, Any]:
    """The table if it has only fields of the class, and all that have no default."""
    names = [f.name for f in fields(kind)]
    for key in table:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(names)}"
            raise CmloraError(f"unknown key {key!r}{hint}")
    required = ("name", "model", "loras") if kind is Manifest else ("id", "category", "triggers")
    for key in required:
        if key not in table:
            raise CmloraError(f"{key} is missing")
    return dict(table)
