"""Where testbeds come from: the ones that are shipped, a file, a folder of LoRAs."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from cmlora.atomic import replacing
from cmlora.container import header, sha256
from cmlora.errors import CmloraError
from cmlora.eval.manifest import Concept, Manifest, read_manifest
from cmlora.files import describe

SHIPPED = ("emoji", "emoji-unbiased", "composlora-anime", "composlora-reality")
FILE = "testbed.json"
SUFFIXES = (".json", ".yaml", ".yml")
_NAMES = (
    "cmlora.name",
    "cmlora.triggers",
    "modelspec.title",
    "modelspec.trigger_phrase",
    "ss_output_name",
    "ss_tag_frequency",
)
"""Where trainers write what a LoRA is."""


class OtherName(UserWarning):
    """A LoRA file that says of itself that it is something else."""


def find_testbed(name: str | Path) -> Manifest:
    """A testbed by its shipped name, its file, or the folder that holds `testbed.json`.

    Raises:
        CmloraError: if there is none, or it is not valid.
    """
    if str(name) in SHIPPED:
        text = resources.files("cmlora.eval").joinpath("data", f"{name}.json").read_text("utf-8")
        return Manifest.from_dict(json.loads(text), str(name))
    path = Path(name).expanduser()
    if path.is_dir():
        inside = [path / f"testbed{suffix}" for suffix in SUFFIXES]
        for file in inside:
            if file.is_file():
                return read_manifest(file)
        raise CmloraError(f"{path} has no {FILE}: make one with cmlora evaluate init {path}")
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise CmloraError(f"{path}: a testbed is a .json, .yaml or .yml file")
        return read_manifest(path)
    raise CmloraError(f"no testbed {str(name)!r}: give {', '.join(SHIPPED)}, a file, or a folder")


def weights_of(concept: Concept, manifest: Manifest, folder: str | Path | None) -> Path:
    """The file of a testbed's LoRA.

    In `folder` it is looked for by the manifest's file name, then by the id, alone or followed by
    other words (``style_1.safetensors``, ``style_1_lineart.safetensors``), in sub-folders too.

    Args:
        concept: which one.
        manifest: of the testbed; the embedded LoRAs need no folder.
        folder: where the LoRAs are.

    Raises:
        CmloraError: if there is none, or more than one, or it is not the manifest's by its hash.
    """
    if folder is None:
        from cmlora.pipelines.library import find

        try:
            return find(concept.file or concept.id, model=manifest.model)
        except CmloraError:
            raise CmloraError(
                f"LoRA {concept.id!r} of testbed {manifest.name}: name the folder with "
                f"{concept.file or concept.id + '.safetensors'} in it (--lora-dir)"
            ) from None
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise CmloraError(f"LoRA folder {root} does not exist")
    wanted = concept.file or f"{concept.id}.safetensors"
    if (root / wanted).is_file():
        return root / wanted
    pattern = re.compile(rf"{re.escape(concept.id)}(?![0-9]).*\.safetensors", re.IGNORECASE)
    found = sorted(p for p in root.rglob("*.safetensors") if pattern.fullmatch(p.name))
    if len(found) == 1:
        return found[0]
    if found:
        listed = ", ".join(str(p.relative_to(root)) for p in found)
        raise CmloraError(f"LoRA {concept.id!r}: {root} has {listed}; name one as its file")
    called = f" ({concept.name})" if concept.name else ""
    raise CmloraError(f"LoRA {concept.id!r}{called}: there is no {wanted} in {root}")


def check_weights(concept: Concept, path: Path) -> None:
    """Compare a LoRA's file with what the testbed says it is.

    A hash must agree. Names cannot be relied on, so a file that mentions neither the testbed's
    name nor a trigger word is warned of and used.

    Raises:
        CmloraError: if the manifest has a hash and the file's is another.
    """
    digest = sha256(path)
    if concept.sha256 and digest != concept.sha256:
        raise CmloraError(
            f"LoRA {concept.id!r}: sha256 of {path} is {digest[:12]}.., and the testbed "
            f"expects {concept.sha256[:12]}..; it is another file"
        )
    metadata = header(path).metadata
    said = _words(" ".join(metadata.get(key, "") for key in _NAMES))
    wanted = _words(concept.name) | _words(concept.triggers[0] if concept.triggers else "")
    if wanted and said - _words(path.stem) and not said & wanted:
        warnings.warn(
            f"LoRA {concept.id!r}: {path.name} mentions nothing of "
            f"{concept.name or concept.trigger!r}; is it the right file?",
            OtherName,
            stacklevel=2,
        )


def init(folder: Path, model: str, *, loras: Sequence[Path] | None = None) -> Path:
    """Make a testbed of a folder of LoRA files: `testbed.json` in it, to be edited.

    Ids are the files' stems. Category, triggers and hash are what the files say; a LoRA that names
    no trigger gets its stem's words, and one without a category the category ``lora``. With
    categories a set has at most one LoRA of each; without, every combination is a set.

    Args:
        folder: of the LoRAs.
        model: base model, see `cmlora.pipelines.models.locate`.
        loras: the files; all in `folder` if ``None``.

    Returns:
        The manifest's path.

    Raises:
        CmloraError: if there is no LoRA, or a testbed already.
    """
    if not folder.is_dir():
        raise CmloraError(f"{folder} is not a folder")
    target = folder / FILE
    if target.exists():
        raise CmloraError(f"{target} exists already; edit it, or remove it to start again")
    files = sorted(folder.glob("*.safetensors")) if loras is None else list(loras)
    if not files:
        raise CmloraError(f"{folder} has no .safetensors file")
    concepts = [_concept(path) for path in files]
    known = {c.category for c in concepts} - {"lora"}
    manifest = Manifest(
        name=re.sub(r"\W+", "-", folder.resolve().name).strip("-") or "testbed",
        model=model,
        loras=tuple(concepts),
        rule="one_per_category" if len(known) > 1 else "all",
        required=("character",) if "character" in known and len(known) > 1 else (),
        note=f"made from the LoRA files of {folder.resolve().name}; edit it as you like",
    )
    with replacing(target) as file:
        file.write((json.dumps(manifest.to_dict(), indent=2, ensure_ascii=False) + "\n").encode())
    return target


def _concept(path: Path) -> Concept:
    facts = describe(path)
    stem = re.sub(r"[^0-9A-Za-z_-]+", "_", path.stem)
    triggers = tuple(facts.get("triggers") or ()) or (" ".join(re.split(r"[\W_]+", path.stem)),)
    return Concept(
        id=stem,
        category=str(facts.get("category") or "lora"),
        triggers=triggers,
        file=path.name,
        name=str(facts.get("name") or ""),
        sha256=facts["sha256"],
    )


def _words(text: str) -> set[str]:
    """Words of three letters or more, in small letters."""
    return {word for word in re.split(r"[\W_]+", text.lower()) if len(word) > 2}
