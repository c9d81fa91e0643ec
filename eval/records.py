"""Rows of JSON that survive being killed: one line per finished thing, in one file per process."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from cmlora.errors import CmloraError

Row = Mapping[str, Any]


class Journal:
    """A file of JSON lines that one process at a time appends to; a context manager.

    A line that was cut short by the end of its writer is removed before anything is added. While
    it is open no other process can open it; the system ends that with the process, however it ends.

    Args:
        path: the file; its folder is made.

    Raises:
        CmloraError: on entering, if another process has it open, or it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Self:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b")
        except OSError as error:
            raise CmloraError(f"cannot write {self.path}: {error.strerror}") from None
        try:
            _lock(self._file)
        except OSError:
            self._file.close()
            raise CmloraError(
                f"another process is writing {self.path}; let it finish, or stop it first"
            ) from None
        self._mend()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def append(self, row: Row) -> None:
        """Write a row so that it survives whatever comes next."""
        line = json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        try:
            self._file.write(line.encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise CmloraError(f"cannot write {self.path}: {error.strerror}") from None

    def _mend(self) -> None:
        """Cut off what follows the last line end."""
        self._file.seek(0)
        data = self._file.read()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            self._file.truncate(whole)
        self._file.seek(0, os.SEEK_END)


def _lock(file: IO[bytes]) -> None:
    """Claim a file for this process; OSError if another one has it. The claim ends with it."""
    if sys.platform == "win32":
        import msvcrt

        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def rows(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """All whole rows of some journals, file by file; a last line that is cut short is left out.

    Raises:
        CmloraError: if a line in the middle is damaged, or a file cannot be read.
    """
    found: list[dict[str, Any]] = []
    for path in paths:
        try:
            lines = path.read_bytes().split(b"\n")
        except OSError as error:
            raise CmloraError(f"cannot read {path}: {error.strerror}") from None
        for number, line in enumerate(lines[:-1], 1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise CmloraError(f"{path}: line {number} is damaged; remove the line to go on")
            found.append(row)
    return found
