"""Files that may be named, by name: the only way from a text of a visitor to a path.

A name is a key of a listing that the server made itself. It is never joined to a folder, so no
``..``, absolute path, drive, encoding or look-alike letter can lead anywhere; and what a link
inside a folder points to outside of it is not in the listing.
"""

import difflib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from cmlora.errors import CmloraError

DEPTH = 4
"""Folders inside folders that are looked into."""

MOST = 20_000
"""Entries of the file system that one listing looks at."""


class Shelf:
    """Named files in given folders.

    Args:
        what: what they are, in the singular; used in messages.
        folders: where they are; a file stands for itself.
        wanted: whether a path is one of them.
    """

    def __init__(self, what: str, folders: Iterable[Path], wanted: Callable[[Path], bool]) -> None:
        self.what = what
        self.folders = tuple(Path(folder).expanduser() for folder in folders)
        self._wanted = wanted

    def listing(self) -> dict[str, Path]:
        """Every file by its name: the path inside its folder, without the suffix.

        Where two folders have a file of the same name, the later one's carries its folder's name
        in front, and after that a number.
        """
        found: dict[str, Path] = {}
        for folder in self.folders:
            for name, path in _inside(folder, self._wanted):
                unique, number = name, 1
                if unique in found:
                    name = unique = f"{folder.name}/{name}"
                while unique in found:
                    number += 1
                    unique = f"{name} {number}"
                found[unique] = path
        return found

    def find(self, name: object) -> Path:
        """The file of a name.

        Raises:
            CmloraError: if the listing has no such name.
        """
        known = self.listing()
        if isinstance(name, str) and name in known:
            return known[name]
        raise CmloraError(unknown(self.what, name, known))


def unknown(what: str, name: object, known: Iterable[str]) -> str:
    """What to say about a name that is not there; near ones are listed, paths are not."""
    said = name if isinstance(name, str) else type(name).__name__
    said = said if len(said) <= 60 else f"{said[:57]}..."
    near = difflib.get_close_matches(said, list(known), n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "choose one from the list"
    return f"there is no {what} {said!r}; {hint}"


def is_safetensors(path: Path) -> bool:
    """Whether a path is a safetensors file; nothing is opened."""
    return path.suffix == ".safetensors" and path.is_file()


def is_model(path: Path) -> bool:
    """Whether a path is a diffusers folder or a single file that may be a model."""
    return is_safetensors(path) or (path / "model_index.json").is_file()


def _inside(folder: Path, wanted: Callable[[Path], bool]) -> Iterator[tuple[str, Path]]:
    """Name and path of everything wanted in a folder, sorted; or of the folder itself."""
    if wanted(folder):
        yield (folder.stem if folder.is_file() else folder.name), folder
        return
    try:
        root = folder.resolve(strict=True)
    except OSError:
        return
    left = MOST
    todo = [(folder, 0)]
    while todo:
        place, depth = todo.pop()
        try:
            entries = sorted(place.iterdir(), reverse=True)
        except OSError:
            continue
        deeper = []
        for path in reversed(entries):
            left -= 1
            if left < 0:
                return
            if path.name.startswith(".") or not _stays(path, root):
                continue
            if wanted(path):
                relative = path.relative_to(folder)
                yield (relative if path.is_dir() else relative.with_suffix("")).as_posix(), path
            elif depth < DEPTH and path.is_dir() and not path.is_symlink():
                deeper.append((path, depth + 1))
        todo += reversed(deeper)


def _stays(path: Path, root: Path) -> bool:
    """Whether a path, links followed, is inside the folder."""
    try:
        return path.resolve(strict=True).is_relative_to(root)
    except (OSError, RuntimeError):
        return False
