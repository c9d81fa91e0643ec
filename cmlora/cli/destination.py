"""Where a command's picture goes: refused before the work if it cannot be written after it."""

from pathlib import Path
from tempfile import NamedTemporaryFile

from cmlora import pictures
from cmlora.errors import CmloraError


def check_destination(path: Path, source: Path | None = None) -> None:
    """Refuses what ``--out`` cannot be.

    Args:
        path: the picture to write.
        source: the picture that is made again, which has to stay.

    Raises:
        CmloraError: if the name is not that of a picture, is that of a folder or of the source, or
            nothing can be written there.
    """
    if path.is_dir():
        raise CmloraError(f"--out {path}: this is a folder; name a picture in it")
    pictures.check_name(path, "--out ")
    if not path.parent.is_dir():
        raise CmloraError(f"--out {path}: there is no folder {path.parent}")
    if source is not None and path.exists() and source.exists() and path.samefile(source):
        raise CmloraError(
            f"--out {path} is the picture that is made again and would be lost; name another file"
        )
    try:  # what a disk allows is known for sure only when it is asked
        with NamedTemporaryFile(prefix=f".{path.name}.", dir=path.parent):
            pass
    except OSError as error:
        raise CmloraError(
            f"--out {path}: nothing can be written there ({error.strerror}); choose another place "
            "or a shorter name"
        ) from None
