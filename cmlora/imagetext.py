"""Texts inside of picture files: PNG, WebP and JPEG, read with distrust.

Reading walks over the file's own structure and looks at nothing but texts: no pixel is decoded,
nothing is executed, no text is longer than a megabyte, and no file has more parts than a picture
has. Web UIs and image hosts write what they know under ``parameters``: in a text chunk of a PNG,
in the user comment of the EXIF block of the others.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import IO

from cmlora.errors import CmloraError

LIMIT = 2**20
"""Bytes of the longest text that is read."""

_PARTS = 100_000
_DESCRIPTION, _EXIF, _COMMENT = 0x010E, 0x8769, 0x9286
_SEGMENT = 2**16 - 3


def texts(path: str | PathLike[str]) -> dict[str, str]:
    """The texts of a picture, by keyword; of equal keywords the first.

    An EXIF block has two: ``parameters`` (its user comment) and ``cmlora`` (its description, if it
    is a record of ours).

    Raises:
        CmloraError: if there is no such file, or it is no PNG, WebP or JPEG, or damaged.
    """
    found: dict[str, str] = {}
    try:
        with Path(path).open("rb") as file:
            for keyword, text in _all(file, str(path)):
                found.setdefault(keyword, text)
    except OSError as error:
        raise CmloraError(f"cannot read {path}: {error.strerror}") from None
    return found


def exif(record: str, parameters: str) -> bytes:
    """An EXIF block (TIFF, little endian) with a record of ours and a web UI's text.

    Args:
        record: ASCII, stored as the image's description.
        parameters: any text, stored as user comment in UTF-16 as web UIs do.
    """
    description = record.encode("ascii") + b"\0"
    comment = b"UNICODE\0" + parameters.encode("utf-16-be")
    start = 8 + 2 + 2 * 12 + 4
    inner = start + len(description) + len(description) % 2
    value = inner + 2 + 12 + 4
    first = struct.pack("<HHLL", _DESCRIPTION, 2, len(description), start)
    second = struct.pack("<HHLL", _EXIF, 4, 1, inner)
    entry = struct.pack("<HHLL", _COMMENT, 7, len(comment), value)
    return b"".join(
        (
            b"II*\0" + struct.pack("<L", 8),
            struct.pack("<H", 2) + first + second + struct.pack("<L", 0),
            description + b"\0" * (len(description) % 2),
            struct.pack("<H", 1) + entry + struct.pack("<L", 0),
            comment,
        )
    )


def fits_jpeg(block: bytes) -> bool:
    """Whether an EXIF block fits into the one segment that a JPEG has for it."""
    return len(block) + len(b"Exif\0\0") <= _SEGMENT


def _all(file: IO[bytes], name: str) -> Iterator[tuple[str, str]]:
    start = file.read(12)
    if start[:8] == b"\x89PNG\r\n\x1a\n":
        file.seek(8)
        yield from png(file, name)
    elif start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        yield from _webp(file, name)
    elif start[:2] == b"\xff\xd8":
        file.seek(2)
        yield from _jpeg(file, name)
    else:
        raise CmloraError(f"{name} is no PNG, WebP or JPEG; recipes are read from these")


def png(file: IO[bytes], name: str) -> Iterator[tuple[str, str]]:
    """Keyword and text of every uncompressed text chunk (PNG specification, 11.3.3).

    Args:
        file: behind the signature.
        name: for messages.

    Raises:
        CmloraError: if the file is cut short, damaged or endless.
    """
    for _ in range(_PARTS):
        head = file.read(8)
        if len(head) < 8:
            raise CmloraError(f"{name} is cut short; copy it again")
        size, kind = struct.unpack(">I4s", head)
        if kind == b"IEND":
            return
        if kind not in (b"tEXt", b"iTXt") or size > LIMIT:
            file.seek(size + 4, 1)
            continue
        data, check = file.read(size), file.read(4)
        if check != struct.pack(">I", zlib.crc32(kind + data)):
            raise CmloraError(f"{name} is damaged: a text chunk has the wrong checksum")
        keyword, _, text = data.partition(b"\0")
        if kind == b"iTXt":
            compressed, text = text[:1] != b"\0", text[2:].split(b"\0", 2)[-1]
            if compressed:
                continue
        coding = "utf-8" if kind == b"iTXt" else "latin-1"
        yield keyword.decode("latin-1"), text.decode(coding, errors="replace")
    raise CmloraError(f"{name} has more than {_PARTS} chunks, which no picture has")


def _webp(file: IO[bytes], name: str) -> Iterator[tuple[str, str]]:
    for _ in range(_PARTS):
        head = file.read(8)
        if not head:
            return
        if len(head) < 8:
            raise CmloraError(f"{name} is cut short; copy it again")
        kind, size = struct.unpack("<4sI", head)
        if kind != b"EXIF" or size > 4 * LIMIT:
            file.seek(size + size % 2, 1)
            continue
        block = file.read(size)
        if len(block) < size:
            raise CmloraError(f"{name} is cut short; copy it again")
        yield from _tiff(block.removeprefix(b"Exif\0\0"))
        return
    raise CmloraError(f"{name} has more than {_PARTS} chunks, which no picture has")


def _jpeg(file: IO[bytes], name: str) -> Iterator[tuple[str, str]]:
    for _ in range(_PARTS):
        marker = file.read(2)
        if len(marker) < 2 or marker[0] != 0xFF:
            raise CmloraError(f"{name} is cut short or damaged; copy it again")
        if marker[1] in (0xDA, 0xD9):  # from here on there are pixels, or nothing
            return
        if marker[1] in (0x01, *range(0xD0, 0xD8)):
            continue
        if marker[1] == 0xFF:
            file.seek(-1, 1)
            continue
        size = int.from_bytes(file.read(2), "big")
        if size < 2:
            raise CmloraError(f"{name} is cut short or damaged; copy it again")
        if marker[1] != 0xE1:
            file.seek(size - 2, 1)
            continue
        data = file.read(size - 2)
        if data.startswith(b"Exif\0\0"):
            yield from _tiff(data[6:])
    raise CmloraError(f"{name} has more than {_PARTS} segments, which no picture has")


def _tiff(block: bytes) -> Iterator[tuple[str, str]]:
    """The two texts of an EXIF block; nothing of a damaged one."""
    order = {b"II": "<", b"MM": ">"}.get(block[:2])
    if order is None or len(block) < 8:
        return
    entries = _entries(block, struct.unpack(f"{order}L", block[4:8])[0], order)
    description = entries.get(_DESCRIPTION, b"").rstrip(b"\0").decode("latin-1")
    if description.startswith("{"):
        yield "cmlora", description
    if _EXIF in entries and len(entries[_EXIF]) == 4:
        inner = _entries(block, struct.unpack(f"{order}L", entries[_EXIF])[0], order)
        if _COMMENT in inner:
            yield "parameters", _comment(inner[_COMMENT])


def _entries(block: bytes, place: int, order: str) -> dict[int, bytes]:
    """The values of one directory that are bytes, texts or long numbers, by tag."""
    found: dict[int, bytes] = {}
    if place + 2 > len(block):
        return found
    (count,) = struct.unpack_from(f"{order}H", block, place)
    for number in range(min(count, 1000)):
        at = place + 2 + 12 * number
        if at + 12 > len(block):
            break
        tag, kind, size = struct.unpack_from(f"{order}HHL", block, at)
        length = size * {2: 1, 7: 1, 1: 1, 4: 4}.get(kind, 0)
        if not 0 < length <= 4 * LIMIT:
            continue
        start = at + 8 if length <= 4 else struct.unpack_from(f"{order}L", block, at + 8)[0]
        if start + length <= len(block):
            found.setdefault(tag, block[start : start + length])
    return found


def _comment(value: bytes) -> str:
    """A user comment, whose first eight bytes say how it is written."""
    code, text = value[:8], value[8:]
    if code == b"UNICODE\0":
        text = text[: len(text) // 2 * 2]
        # The order of bytes is not stated; that in which more letters are plain ones is right.
        big = text[0::2].count(0) >= text[1::2].count(0)
        return text.decode("utf-16-be" if big else "utf-16-le", errors="replace").strip("\0")
    return text.decode("utf-8", errors="replace").strip("\0")
