"""Which file a LoRA's name stands for, and what the LoRA is called in a pipeline."""

import difflib
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from cmlora.container import header, sha256
from cmlora.errors import CmloraError
from cmlora.pipelines.models import EMBEDDED

SUFFIX = ".safetensors"


def find(
    reference: str | Path, *, model: str | Path | None = None, folder: str | Path | None = None
) -> Path:
    """The file of a LoRA.

    Args:
        reference: a path; or the name of a file in `folder`, with or without its suffix; or, for
            the embedded model, the id of one of its LoRAs.
        model: the model it is meant for; its embedded LoRAs are found if this is ``emoji``.
        folder: where else to look.

    Raises:
        CmloraError: if nothing is found; near names are listed.
    """
    path, name = Path(reference).expanduser(), str(reference)
    if path.is_file():
        return path
    known = ids(model, folder)
    if name in known:
        return known[name]
    if path.is_dir():
        raise CmloraError(f"LoRA {name}: this is a folder; name the {SUFFIX} file in it")
    near = difflib.get_close_matches(path.stem, known, n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else "; there is no such file"
    listed = f"{'' if near else ';'} known: {', '.join(known)}" if known else ""
    raise CmloraError(f"LoRA {name!r} not found{hint}{listed}")


def ids(model: str | Path | None = None, folder: str | Path | None = None) -> dict[str, Path]:
    """Every LoRA that has a short name: the embedded ones of both series, then those in `folder`.

    Raises:
        CmloraError: if `folder` is not there.
    """
    found: dict[str, Path] = {}
    if str(model) == EMBEDDED:
        from cmlora.emoji import weights

        found |= {name: weights.lora_path(name) for name in weights.LORAS}
        for path in (weights.lora_path(name, "unbiased") for name in weights.LORAS):
            found |= {f"unbiased/{path.stem}": path, f"unbiased/{path.name}": path}
    if folder is not None:
        inside = Path(folder).expanduser()
        if not inside.is_dir():
            raise CmloraError(f"LoRA folder {inside} does not exist")
        for path in sorted(inside.glob(f"*{SUFFIX}")):
            found |= {path.stem: path, path.name: path}
    return found


def adapter_name(path: Path, taken: Collection[str]) -> str:
    """A name for the file's adapter: its stem in letters peft accepts, numbered if taken.

    >>> adapter_name(Path("loras/ink v1.5.safetensors"), [])
    'ink_v1_5'
    >>> adapter_name(Path("ink.safetensors"), ["ink"])
    'ink_2'
    """
    stem = re.sub(r"\W+", "_", path.stem).strip("_") or "lora"
    name, number = stem, 1
    while name in taken:
        number += 1
        name = f"{stem}_{number}"
    return name


def by_hash(
    wanted: Sequence[tuple[str, str]],
    *,
    model: str | Path | None = None,
    folder: str | Path | None = None,
) -> list[Path]:
    """The files of LoRAs that are known by their content, wherever they are now.

    Files of the right name are looked at first, then all others in the folder and below it.

    Args:
        wanted: name of the file, and its SHA-256 or the first digits of it (AutoV2), or of that
            of its tensors (AutoV3).
        model: its embedded LoRAs are looked at, if it is ``emoji``.
        folder: where else to look.

    Raises:
        CmloraError: that names all that are not there.
    """
    places = list(dict.fromkeys(ids(model, folder).values()))
    if folder is not None:
        below = sorted(Path(folder).expanduser().rglob(f"*{SUFFIX}"))
        places = list(dict.fromkeys([*places, *below]))
    hashes: dict[Path, tuple[str, str]] = {}

    def fits(path: Path, digest: str) -> bool:
        if path not in hashes:
            try:
                hashes[path] = sha256(path), sha256(path, header(path).start)
            except CmloraError:  # a broken file is not the one
                hashes[path] = "", ""
        return any(each.startswith(digest) for each in hashes[path])

    found: list[Path] = []
    missing: list[str] = []
    for file, digest in wanted:
        named = [path for path in places if file in (path.name, path.stem)]
        path = next(
            (p for p in [*named, *(p for p in places if p not in named)] if fits(p, digest)), None
        )
        if path is None or len(digest) < 8:
            missing.append(f"{file} (sha256 {digest[:12] or 'unknown'}..)")
        else:
            found.append(path)
    if missing:
        where = f"in {folder} or below" if folder is not None else "here; name its folder"
        raise CmloraError(
            f"LoRA {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not among the "
            f"embedded ones or {where}"
        )
    return found
