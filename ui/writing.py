"""New LoRA files of the server: where they go, how they are named, what is said about them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cmlora import checks
from cmlora.errors import CmloraError
from cmlora.files import read as read_file
from cmlora.files import write as write_file
from cmlora.pipelines import library
from cmlora.ui.uploads import plain_name

if TYPE_CHECKING:
    from cmlora.lora import LoRA
    from cmlora.ui.studio import Studio

T = TypeVar("T")

RANK = 1024
"""The largest rank that can be asked for."""


@dataclass(frozen=True)
class Made:
    """A file that was written.

    Args:
        name: of the new LoRA in the list.
        path: of the file.
        facts: what to say about it, in words by title.
    """

    name: str
    path: Path
    facts: Mapping[str, str]


def plainly(path: Path, act: Callable[[], T]) -> T:
    """What the act gives; its refusals name the file without its place on this machine."""
    try:
        return act()
    except CmloraError as error:
        raise CmloraError(str(error).replace(str(path), path.name)) from None


def new_file(folder: Path, wish: str, fallback: str = "merged") -> Path:
    """A path that is not taken, in one of the server's own folders.

    Args:
        folder: made if it is not there.
        wish: any text; letters, digits, ``_``, ``-`` and inner dots of it are kept.
        fallback: the name if nothing of it is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name, number = plain_name(wish, fallback), 1
    target = folder / f"{name}.safetensors"
    while target.exists():
        number += 1
        target = folder / f"{name}-{number}.safetensors"
    return target


def sources(studio: Studio, model: str, loras: Iterable[str]) -> dict[str, Path]:
    """The files of selected LoRAs by the names that adapters made of them would have.

    Raises:
        CmloraError: if one is not there.
    """
    found: dict[str, Path] = {}
    for reference in loras:
        path = studio.lora_path(reference, model)
        found[library.adapter_name(path, found)] = path
    return found


def read(path: Path, name: str | None = None) -> LoRA:
    """A LoRA file, under another name if one is given.

    Raises:
        CmloraError: see `cmlora.files.read`.
    """
    lora: LoRA = plainly(path, lambda: read_file(path))
    return lora if name is None else replace(lora, name=name)


def write(lora: LoRA, target: Path) -> None:
    """Write a LoRA file.

    Raises:
        CmloraError: see `cmlora.files.write`.
    """
    plainly(target, lambda: write_file(lora, target))


def rank_of(value: Any) -> int | None:
    """A rank from a field that may be empty; 0 is empty too.

    Raises:
        CmloraError: if it is no whole number between 1 and `RANK`.
    """
    if value in (None, "", 0):
        return None
    number = int(value) if isinstance(value, float) and value.is_integer() else value
    checks.whole("request", "rank", number, 1, RANK)
    return int(number)


def count_of(name: str, value: Any, most: int) -> int:
    """A whole number from a field, between 1 and ``most``.

    Raises:
        CmloraError: if it is none.
    """
    number = int(value) if isinstance(value, float) and value.is_integer() else value
    checks.whole("request", name, number, 1, most)
    return int(number)


def sized(path: Path) -> dict[str, str]:
    """The file's name and size."""
    return {"file": f"{path.name}, {path.stat().st_size / 2**20:.2f} MB"}
