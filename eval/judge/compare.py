"""Shows pairs of pictures to a judge, in both orders, and keeps every answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from PIL import Image

from cmlora.errors import CmloraError
from cmlora.eval.judge.backend import Answer, Backend, Turn
from cmlora.eval.judge.protocol import Marks, Protocol, Unreadable
from cmlora.eval.manifest import Manifest, set_id
from cmlora.eval.records import Journal, rows
from cmlora.eval.shard import Shard
from cmlora.eval.study import Record, Study


@dataclass(frozen=True)
class Pair:
    """Two pictures of the same set and seed, in the order in which they are shown."""

    first: Record
    second: Record

    @property
    def turned(self) -> Pair:
        """The same with the other one first."""
        return Pair(self.second, self.first)


@dataclass(frozen=True)
class Example:
    """A pair that was judged before, shown to the model with its marks.

    Args:
        first: a picture.
        second: another one.
        concepts: what they were made for.
        marks: what they got.
    """

    first: Image.Image
    second: Image.Image
    concepts: str
    marks: Marks

    @property
    def pixels(self) -> frozenset[str]:
        """Hashes of the pictures' pixels."""
        return frozenset((_pixels(self.first), _pixels(self.second)))


def pairs(
    records: Sequence[Record],
    *,
    labels: Sequence[str] = (),
    against: str = "",
    most: int | None = None,
) -> list[Pair]:
    """Pictures of the same set and seed by two methods, each pair once.

    Args:
        records: of a run.
        labels: methods to compare; all if empty.
        against: only pairs with this method in them; all pairs if empty.
        most: so many sets and seeds per N at most, chosen by a hash.

    Raises:
        CmloraError: if a method has no pictures.
    """
    present = list(dict.fromkeys(record.label for record in records))
    for label in (*labels, *((against,) if against else ())):
        if label not in present:
            raise CmloraError(f"no pictures of {label!r}; there are {', '.join(present)}")
    chosen = set(labels or present) | ({against} if against else set())
    places: dict[tuple[str, int], list[Record]] = {}
    for record in sorted(records, key=lambda r: (r.n, r.ids, r.seed, r.label)):
        if record.label in chosen:
            places.setdefault((set_id(record.ids), record.seed), []).append(record)
    if most is not None:
        places = _sampled(places, most)
    return [
        Pair(one, other)
        for found in places.values()
        for one, other in combinations(found, 2)
        if not against or against in (one.label, other.label)
    ]


def judge(
    study: Study,
    backend: Backend,
    protocol: Protocol,
    wanted: Sequence[Pair],
    *,
    examples: Sequence[Example] = (),
    shots: int = 1,
    shard: Shard | None = None,
    on_answer: Callable[[dict[str, Any]], None] = lambda row: None,
) -> int:
    """Ask about every pair in both orders, unless it was asked before.

    Args:
        study: the run.
        backend: who is asked.
        protocol: what is asked.
        wanted: the pairs; the order within a pair does not matter.
        examples: pairs to show beforehand; never one with a picture of the question.
        shots: how many of them to show.
        shard: this process among those that judge together.
        on_answer: called with every row that was written.

    Returns:
        How many questions were asked.

    Raises:
        CmloraError: if the judge cannot be asked, or a picture cannot be read.
    """
    mine, manifest = shard or Shard(), study.manifest
    asked = 0
    place = study.folder / "verdicts" / f"{slug(backend.name, protocol)}-{mine.index:05}.jsonl"
    example_ids = _examples_digest(examples, shots)
    with Journal(place) as journal:
        known = {row["key"] for row in answers(study)}
        for pair in mine.share(wanted):
            for shown in (pair, pair.turned):
                key = _key(shown, backend, protocol, example_ids)
                if key in known:
                    continue
                row = {
                    "key": key,
                    "judge": backend.name,
                    "protocol": protocol.name,
                    "protocol_digest": protocol.digest(),
                    "dimensions": list(protocol.dimensions),
                    "examples": example_ids,
                    "first": shown.first.key,
                    "second": shown.second.key,
                    "images": [shown.first.sha256, shown.second.sha256],
                    **_ask(study, manifest, backend, protocol, shown, examples, shots),
                }
                journal.append(row)
                on_answer(row)
                asked += 1
    return asked


def answers(study: Study) -> list[dict[str, Any]]:
    """Every row that judges left in a run."""
    return rows(sorted((study.folder / "verdicts").glob("*.jsonl")))


def slug(name: str, protocol: Protocol) -> str:
    """A file name for a judge and a protocol."""
    text = "".join(c if c.isalnum() or c in "-." else "_" for c in f"{name}_{protocol.name}")
    return text[:100]


def concepts_text(manifest: Manifest, ids: Sequence[str]) -> str:
    """What a set's picture should show, one LoRA per line."""
    return "\n".join(f"- {manifest.by_id[i].category}: {manifest.by_id[i].trigger}" for i in ids)


def read_examples(path: Path, protocol: Protocol) -> list[Example]:
    """Examples from a JSON file beside their pictures.

    The file is a list of tables with ``first`` and ``second`` (picture files), ``concepts`` (a
    text) and ``marks`` (in the form of an answer).

    Raises:
        CmloraError: if a picture is missing, or marks are not in the protocol's form.
    """
    try:
        table = json.loads(path.read_text("utf-8"))
        found = []
        for row in table:
            marks = protocol.read(json.dumps(row["marks"]))
            first, second = (_open(path.parent / row[side]) for side in ("first", "second"))
            found.append(Example(first, second, str(row["concepts"]), marks))
        return found
    except Unreadable as error:
        raise CmloraError(f"{path}: marks of example {len(found)}: {error}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CmloraError(f"{path} is not a list of examples: {error}") from None


def _ask(
    study: Study,
    manifest: Manifest,
    backend: Backend,
    protocol: Protocol,
    pair: Pair,
    examples: Sequence[Example],
    shots: int,
) -> dict[str, Any]:
    """The part of a row that comes from the judge: marks, or why there are none, and all texts."""
    pictures = tuple(_open(study.folder / r.image) for r in (pair.first, pair.second))
    question = protocol.question(concepts_text(manifest, pair.first.ids))
    shown = frozenset(map(_pixels, pictures))
    turns = [*_shown(protocol, examples, shots, shown), Turn("user", question, pictures)]
    said: list[Answer] = []
    error = ""
    for attempt in range(2):
        said.append(backend.ask(turns))
        try:
            marks = protocol.read(said[-1].text)
        except Unreadable as why:
            error = str(why)
            turns += [
                Turn("assistant", said[-1].text),
                Turn("user", protocol.repair(error)),
            ]
            continue
        return {"marks": marks, "repaired": attempt == 1, **_used(said)}
    return {"marks": None, "error": error, "repaired": False, **_used(said)}


def _shown(
    protocol: Protocol, examples: Sequence[Example], shots: int, question: frozenset[str]
) -> Iterator[Turn]:
    """The first examples that share no picture with the question."""
    for example in [e for e in examples if not e.pixels & question][:shots]:
        yield Turn("user", protocol.question(example.concepts), (example.first, example.second))
        yield Turn("assistant", json.dumps(example.marks))


def _used(said: Sequence[Answer]) -> dict[str, Any]:
    return {
        "raw": [answer.text for answer in said],
        "tokens": [sum(a.tokens_in for a in said), sum(a.tokens_out for a in said)],
        "cost": sum(answer.cost for answer in said),
    }


def _key(pair: Pair, backend: Backend, protocol: Protocol, examples: str) -> str:
    parts = [pair.first.sha256, pair.second.sha256, backend.name, protocol.digest(), examples]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _examples_digest(examples: Sequence[Example], shots: int) -> str:
    if not examples or not shots:
        return ""
    parts = [[sorted(e.pixels), e.concepts, e.marks] for e in examples]
    return hashlib.sha256(json.dumps([parts, shots], sort_keys=True).encode()).hexdigest()[:12]


def _sampled(
    places: dict[tuple[str, int], list[Record]], most: int
) -> dict[tuple[str, int], list[Record]]:
    by_size: dict[int, list[tuple[str, int]]] = {}
    for place, found in places.items():
        by_size.setdefault(found[0].n, []).append(place)
    kept = set()
    for found_places in by_size.values():
        ranked = sorted(found_places, key=lambda p: hashlib.sha256(repr(p).encode()).digest())
        kept |= set(ranked[:most])
    return {place: found for place, found in places.items() if place in kept}


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as file:
            return file.convert("RGB")
    except OSError as error:
        raise CmloraError(f"cannot read the picture {path}: {error}") from None


def _pixels(image: Image.Image) -> str:
    return hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()
