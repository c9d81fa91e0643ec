"""Safetensors files as bytes: opened with distrust, written whole or not at all, and hashed."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import reprlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from cmlora.atomic import replacing
from cmlora.errors import CmloraError

_PICKLES = {".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle"}
_HEADER_LIMIT = 100 * 2**20


@dataclass(frozen=True)
class Header:
    """What a safetensors file says about itself.

    Args:
        metadata: free strings.
        shapes: of every tensor, by key.
        start: where the tensors' bytes begin.
    """

    metadata: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    start: int


def header(path: str | os.PathLike[str]) -> Header:
    """Reads and checks the header of a safetensors file, without touching the tensors.

    Raises:
        CmloraError: if there is no such file, or it is empty, a folder, a pickle, cut short or
            anything else than safetensors.
    """
    path = Path(path)
    _refuse_pickle_name(path)
    with _reading(path) as file:
        start = file.read(8)
        rest = file.read(1)
        size = os.fstat(file.fileno()).st_size
        if not size:
            raise CmloraError(f"{path} is empty; copy or download it again")
        length = int.from_bytes(start, "little")
        # A header may well be 640 bytes long, and its length then looks like a pickle's first
        # bytes: the brace decides.
        if rest != b"{":
            _refuse_pickle(path, start)
        if rest != b"{" or length > _HEADER_LIMIT:
            raise CmloraError(f"{path} is not a safetensors file; LoRAs are read from safetensors")
        if length + 8 > size:
            raise CmloraError(f"{path} is cut short inside its header; copy or download it again")
        text = rest + file.read(length - 1)
    try:
        return _parse(text, path, size)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if isinstance(error, CmloraError):
            raise
        raise CmloraError(f"{path} is not a safetensors file: its header is damaged") from None


def _parse(text: bytes, path: Path, size: int) -> Header:
    table = json.loads(text)
    metadata = {str(k): str(v) for k, v in (table.pop("__metadata__", None) or {}).items()}
    shapes: dict[str, tuple[int, ...]] = {}
    start = end = 8 + len(text)
    for key, entry in table.items():
        shapes[key], stop = _entry(path, key, entry)
        end = max(end, start + stop)
    if end > size:
        raise CmloraError(f"{path} is cut short: {size} of {end} bytes; copy or download it again")
    return Header(metadata, shapes, start)


def _entry(path: Path, key: str, entry: Any) -> tuple[tuple[int, ...], int]:
    """The shape of a tensor and the place behind its last byte."""
    if len(key.splitlines()) > 1:
        raise CmloraError(f"{path}: the name {key!r} in the header has line breaks; write it anew")
    found: list[list[int]] = []
    for name, count in (("shape", None), ("data_offsets", 2)):
        value = entry.get(name) if isinstance(entry, dict) else None
        whole = isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)
        if not isinstance(value, list) or not whole or len(value) != (count or len(value)):
            wanted = f"{'two ' if count else ''}whole numbers"
            raise CmloraError(
                f"{path}: {name} of {key!r} in the header is {reprlib.repr(value)}, not {wanted}; "
                "copy or download it again"
            )
        found.append(value)
    shape, (_, stop) = found
    return tuple(shape), stop


def content(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], str]:
    """All tensors of a safetensors file, on the CPU, and the file's SHA-256, of the same bytes.

    Raises:
        CmloraError: see `header`; also if a tensor is not floating point or of a type that is not
            read, or holds NaN or infinity.
    """
    path = Path(path)
    with _reading(path) as file:
        data = file.read()
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        said = " ".join(str(error).split())
        raise CmloraError(f"{path} is damaged: {said}; copy or download it again") from None
    except KeyError as error:  # a type that the format has and its reader has not, such as F4
        table = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        kind = error.args[0]
        held = sorted(k for k, entry in table.items() if entry.get("dtype") == kind)
        raise CmloraError(
            f"{path}: {', '.join(held[:1])} holds numbers of type {kind}, which cannot be read; "
            "get the file in F8_E4M3, F16, BF16 or F32"
        ) from None
    for key, tensor in sorted(tensors.items()):
        if not tensor.is_floating_point():
            if key.endswith((".alpha", ".on_input")):
                continue
            raise CmloraError(f"{path}: {key} holds {tensor.dtype}, not floating point numbers")
        if not bool(torch.isfinite(tensor.float()).all()):
            raise CmloraError(f"{path}: {key} holds NaN or infinity; the training diverged")
    return tensors, hashlib.sha256(data).hexdigest()


def save(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Writes a safetensors file; a reader sees the old file or the whole new one, never a part.

    Equal content gives equal bytes, so that a file's hash says what is in it.
    """
    plain = {key: tensor.detach().contiguous().clone() for key, tensor in tensors.items()}
    data: bytes = safetensors.torch.save(plain)
    # The library would write the metadata in an order of its own that differs from run to run.
    end = 8 + int.from_bytes(data[:8], "little")
    table = {"__metadata__": dict(sorted(metadata.items())), **json.loads(data[8:end])}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.write(memoryview(data)[end:])


def sha256(path: str | os.PathLike[str], start: int = 0) -> str:
    """SHA-256 of a file from byte ``start`` on, 64 hex digits.

    Civitai's AutoV2 is its first 10 digits. AutoV3 is the first 12 digits from behind the header
    (`Header.start`) on, which is also what Stable Diffusion web UIs show.
    """
    digest = hashlib.sha256()
    with _reading(Path(path)) as file:
        file.seek(start)
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def _reading(path: Path) -> Iterator[IO[bytes]]:
    try:
        usable = b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        usable = False
    if not usable:
        raise CmloraError(f"{str(path)!r} cannot be the name of a file; check where it comes from")
    try:
        with path.open("rb") as file:
            yield file
    except FileNotFoundError:
        names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, names, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise CmloraError(f"there is no file {path}{hint}") from None
    except IsADirectoryError:
        names = sorted(p.name for p in path.glob("*.safetensors"))
        inside = f"it holds {', '.join(names[:3])}" if names else "it holds no safetensors"
        raise CmloraError(f"{path} is a folder; name the file in it ({inside})") from None
    except OSError as error:
        raise CmloraError(f"cannot read {path}: {error.strerror}") from None


def _refuse_pickle_name(path: Path) -> None:
    if path.suffix.lower() in _PICKLES and not path.is_dir():
        _pickle_error(path)


def _refuse_pickle(path: Path, start: bytes) -> None:
    if start.startswith(b"PK") or (start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05"):
        _pickle_error(path)


def _pickle_error(path: Path) -> None:
    raise CmloraError(
        f"{path} is a pickle, which can run any code when it is opened; "
        "get the safetensors file, or convert it in a sandbox"
    )
