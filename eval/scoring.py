"""Scores the pictures of a run, and keeps the scores; nothing is ever generated or scored twice."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cmlora.errors import CmloraError
from cmlora.eval.manifest import Manifest
from cmlora.eval.records import Journal, rows
from cmlora.eval.scorers import SCORERS, USUAL
from cmlora.eval.scorers.clip_model import EMBEDDED, Clip, default_clip
from cmlora.eval.scorers.scorer import Item, Marks, Scorer
from cmlora.eval.shard import Shard
from cmlora.eval.study import Record, Study

BATCH = 16


@dataclass(frozen=True)
class Score:
    """A scorer's marks of one picture, as kept.

    Args:
        key: of the job.
        image: SHA-256 of the picture's file.
        scorer: its name.
        version: of its model.
        values: numbers by metric.
        concepts: numbers by metric, per LoRA id.
    """

    key: str
    image: str
    scorer: str
    version: str
    values: Mapping[str, float]
    concepts: Mapping[str, Mapping[str, float]]


def usual(manifest: Manifest) -> tuple[str, ...]:
    """The scorers that need nothing but what the testbed comes with."""
    return ("probe", "fidelity", *USUAL) if manifest.model == EMBEDDED else USUAL


def make_scorer(name: str, manifest: Manifest, device: str | None = None, **options: Any) -> Scorer:
    """A scorer by name, with its options as values or texts.

    Raises:
        CmloraError: for an unknown name or option, or a missing model.
    """
    maker = SCORERS[name].object
    known = [
        parameter.name
        for parameter in inspect.signature(maker).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; its options: {known or 'none'}"
            raise CmloraError(f"{name} has no option {option!r}{hint}")
    return maker(manifest, device, **options)


def score(
    study: Study,
    name: str,
    *,
    device: str | None = None,
    shard: Shard | None = None,
    options: Mapping[str, Any] | None = None,
    on_picture: Callable[[int], None] = lambda count: None,
) -> int:
    """Score what has no score of this scorer and version yet.

    Args:
        study: the run.
        name: of the scorer.
        device: where to compute.
        shard: this process among those that score together.
        options: of the scorer.
        on_picture: called with the number of pictures that were scored since the last call.

    Returns:
        How many pictures were scored now.

    Raises:
        CmloraError: see `make_scorer`; or if a picture cannot be read, or a score is no number.
    """
    manifest, mine = study.manifest, shard or Shard()
    judge = make_scorer(name, manifest, device, **dict(options or {}))
    with Journal(study.folder / "scores" / f"{name}-{mine.index:05}.jsonl") as journal:
        known = {s.image for s in scores(study, name) if s.version == judge.version}
        records = mine.share(list(study.records().values()))
        wanted = [record for record in records if record.sha256 not in known]
        for start in range(0, len(wanted), BATCH):
            some = wanted[start : start + BATCH]
            marks = judge([item_of(study, manifest, record) for record in some])
            for record, mark in zip(some, marks, strict=True):
                _check(name, record, mark)
                journal.append(
                    {
                        "key": record.key,
                        "image": record.sha256,
                        "scorer": name,
                        "version": judge.version,
                        "values": dict(mark.values),
                        "concepts": {id_: dict(m) for id_, m in mark.concepts.items()},
                    }
                )
            on_picture(len(some))
    return len(wanted)


def item_of(study: Study, manifest: Manifest, record: Record) -> Item:
    """A recorded picture as scorers see it."""
    took = {key: getattr(record, key) for key in ("seconds", "full", "light", "macs")}
    return Item(study.folder / record.image, record.ids, manifest, took)


def scores(study: Study, name: str | None = None) -> list[Score]:
    """All scores of a run that belong to its present pictures.

    Args:
        study: the run.
        name: of one scorer; all if ``None``.
    """
    pattern = "*.jsonl" if name is None else f"{name}-*.jsonl"
    present = {record.sha256 for record in study.records().values()}
    found = [Score(**row) for row in rows(sorted((study.folder / "scores").glob(pattern)))]
    return [s for s in found if s.image in present and (name is None or s.scorer == name)]


def latest(study: Study, version: Mapping[str, str] | None = None) -> list[Score]:
    """The scores of one version of every scorer: the one that was used last.

    Args:
        study: the run.
        version: by scorer, where another one is wanted.
    """
    found = scores(study)
    chosen = {s.scorer: s.version for s in found} | dict(version or {})
    unique = {(s.scorer, s.image): s for s in found if s.version == chosen[s.scorer]}
    return list(unique.values())


def _check(name: str, record: Record, marks: Marks) -> None:
    for metric, value in marks.values.items():
        if not math.isfinite(value):
            raise CmloraError(f"{name}: {metric} of {record.image} is {value}")


def listed(names: Sequence[str]) -> tuple[str, ...]:
    """Scorer names, checked and without repetition.

    Raises:
        CmloraError: for an unknown name.
    """
    return tuple(dict.fromkeys(SCORERS[name].name for name in names))


def guide(manifest: Manifest, device: str | None = None) -> Callable[..., list[float]]:
    """CLIPScore of pictures and prompts, which is what LoraHub's search climbs.

    The embedded world has a guide of its own; this one is for other models.

    Args:
        manifest: the testbed; its default CLIP is used.
        device: where to compute.

    Raises:
        CmloraError: if the CLIP is missing.
    """
    clip = Clip(*default_clip(manifest, "", ""), device)

    def clip_score(pictures: Sequence[Any], prompts: Sequence[str]) -> list[float]:
        marks: list[float] = (100 * (clip.images(pictures) * clip.texts(prompts)).sum(1)).tolist()
        return marks

    return clip_score
