"""A run's folder: what was asked for, the records of the jobs, their pictures, and the scores.

run.json            testbed, hashes of model and LoRAs, settings; written before the first job
records/*.jsonl     a line per finished job, one file per process
images/<set>/*.png  the pictures, each with its recipe inside
scores/*.jsonl      a line per picture and scorer
verdicts/*.jsonl    a line per pair of pictures and order shown to a judge
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmlora.atomic import replacing
from cmlora.errors import CmloraError
from cmlora.eval.manifest import Manifest, set_id
from cmlora.eval.records import rows
from cmlora.eval.variants import Variant

if TYPE_CHECKING:
    from cmlora.cost import PassCost
    from cmlora.eval.jobs import Job
    from cmlora.eval.studio import Studio

FORMAT = 1
_KEY = "cmlora_run"
_NAME = 100
_NAMED = 3  # differences that are told
_NOTHING = object()


@dataclass(frozen=True)
class Record:
    """A finished job.

    Args:
        key: of the job.
        ids: the set.
        method: composition method.
        cache: cache policy.
        seed: as the user counts them.
        image: the picture's file, below the run's folder.
        sha256: of the file.
        seconds: from the first denoiser call to the last.
        full: full passes; half a pass is one branch of guidance.
        light: passes that reused features.
        macs: multiply-accumulates of all passes; ``None`` if they cannot be counted.
        options: of the method, as carried out.
        variant: the label that was asked for; method and cache if it is not in the record.
    """

    key: str
    ids: tuple[str, ...]
    method: str
    cache: str
    seed: int
    image: str
    sha256: str
    seconds: float
    full: float
    light: float
    macs: int | None
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    variant: str = ""

    @property
    def label(self) -> str:
        """Method, options of its own, and cache in one word."""
        return self.variant or Variant(self.method, self.cache).label

    @property
    def n(self) -> int:
        """How many LoRAs take part."""
        return len(self.ids)


class Study:
    """The folder of a run.

    Args:
        folder: where it is, or is to be.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()

    @property
    def file(self) -> Path:
        """Where the settings are."""
        return self.folder / "run.json"

    def begin(self, studio: Studio, options: Mapping[str, Any], cost: PassCost | None) -> None:
        """Write the settings, or see that they are those of the folder.

        More methods, seeds and sets may be added to a run later; what is common to all its
        pictures may not change.

        Raises:
            CmloraError: if the folder holds a run with other settings, or cannot be written.
        """
        settings = json.loads(json.dumps(_settings(studio, options, cost)))
        if self.file.exists():
            known = self.settings()
            for key in ("testbed", "model_hash", "dtype", "options", "loras"):
                found = list(_differences(_content(known.get(key)), _content(settings[key])))
                if found:
                    more = f"; {len(found) - _NAMED} more differ" if len(found) > _NAMED else ""
                    raise CmloraError(
                        f"{self.folder} holds a run with another {key} "
                        f"({'; '.join(found[:_NAMED])}{more}); choose another --out"
                    )
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CmloraError(f"cannot make the folder {self.folder}: {error.strerror}") from None
        with replacing(self.file) as file:
            file.write(json.dumps(settings, indent=1, ensure_ascii=False).encode())

    def settings(self) -> dict[str, Any]:
        """What `begin` wrote.

        Raises:
            CmloraError: if this is no run's folder, or one of a newer program.
        """
        try:
            table = json.loads(self.file.read_bytes())
        except FileNotFoundError:
            raise CmloraError(
                f"{self.folder} holds no run: make one with cmlora evaluate run"
            ) from None
        except (OSError, ValueError) as error:
            raise CmloraError(f"cannot read {self.file}: {error}") from None
        if not isinstance(table, dict) or table.get(_KEY) != FORMAT:
            raise CmloraError(f"{self.file} is not of a run that this program can read")
        return table

    @property
    def manifest(self) -> Manifest:
        """The testbed of the run."""
        return Manifest.from_dict(self.settings()["testbed"], str(self.file))

    def image_name(self, job: Job) -> str:
        """Where a job's picture goes, below the folder."""
        name = f"{job.variant.slug}_{job.seed}_{job.key[:12]}.png"
        return f"images/{set_id(job.ids)[:_NAME]}/{name}"

    def records(self) -> dict[str, Record]:
        """Finished jobs by key, whichever process wrote them, in the order of set, seed, label."""
        return {record.key: record for record in self._read()[0]}

    def failures(self) -> dict[str, str]:
        """Why jobs failed, by key, for those that did not succeed later."""
        return self._read()[1]

    def _read(self) -> tuple[list[Record], dict[str, str]]:
        done: dict[str, Record] = {}
        failed: dict[str, str] = {}
        for row in rows(sorted((self.folder / "records").glob("*.jsonl"))):
            if "error" in row:
                failed[row["key"]] = row["error"]
                continue
            try:
                done[row["key"]] = Record(**{**row, "ids": tuple(row["ids"])})
            except (KeyError, TypeError):
                raise CmloraError(
                    f"{self.folder}/records: a row is not of this program: {_short(row)}"
                ) from None
        ordered = sorted(done.values(), key=lambda r: (r.n, r.ids, r.seed, r.label, r.key))
        return ordered, {key: why for key, why in failed.items() if key not in done}


def digest_of(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _settings(studio: Studio, options: Mapping[str, Any], cost: PassCost | None) -> dict[str, Any]:
    loras = []
    for concept in studio.manifest.loras:
        file = studio.files[concept.id]
        row: dict[str, Any] = {"id": concept.id, "sha256": file.sha256}
        row |= {"config": file.config} if file.config else {}
        if file.profile is not None and math.isfinite(file.profile.frequency):
            curves = ("fractions", "ratio", "norm")
            row |= {"frequency": file.profile.frequency, "window": file.profile.window}
            row |= {curve: getattr(file.profile, curve) for curve in curves}
        loras.append(row)
    return {
        _KEY: FORMAT,
        "testbed": studio.manifest.to_dict(),
        "model_hash": studio.model_hash,
        "dtype": str(studio.pipe.dtype).removeprefix("torch."),
        "options": {key: str(value) for key, value in sorted(options.items())},
        "loras": loras,
        "pass_macs": None if cost is None else asdict(cost),
    }


def _content(value: Any) -> Any:
    """A setting without places, which may differ from machine to machine."""
    if isinstance(value, dict):
        return {k: v for k, v in value.items() if k not in ("model", "vae", "references")}
    return value


def _differences(there: Any, here: Any, place: str = "") -> Iterator[str]:
    """Where two settings differ, down to the single values."""
    if there == here:
        return
    one, other = _table(there), _table(here)
    if one is None or other is None or one == other:  # the same parts in another order
        head = f"{place}: " if place else ""
        yield f"{head}there {_shown(there)}, here {_shown(here)}"
        return
    for key in dict.fromkeys((*one, *other)):
        inner = f"{place}.{key}" if place else str(key)
        yield from _differences(one.get(key, _NOTHING), other.get(key, _NOTHING), inner)


def _table(value: Any) -> dict[Any, Any] | None:
    """A table as it is, and a list of tables by their ids; nothing else has parts worth naming."""
    if isinstance(value, dict):
        return value
    if isinstance(value, list) and all(isinstance(v, dict) and "id" in v for v in value):
        return {each["id"]: each for each in value}
    return None


def _shown(value: Any) -> str:
    return "nothing" if value is _NOTHING else value if isinstance(value, str) else _short(value)


def _short(value: Any) -> str:
    text = re.sub(r"\s+", " ", json.dumps(value, ensure_ascii=False, default=str))
    return text if len(text) <= 60 else f"{text[:57]}..."
