"""The state of a training on disk: nested tables of tensors and numbers as one safetensors file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from cmlora import container
from cmlora.errors import CmloraError

_KEY = "cmlora.checkpoint"


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes a state; the file before stays until the new one is whole.

    Raises:
        CmloraError: if it cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    plan = _plain(state, "", tensors)
    container.save(path, tensors, {"format": "pt", _KEY: json.dumps(plan)})


def load(path: Path) -> dict[str, Any]:
    """Reads what `save` wrote, bit for bit.

    Raises:
        CmloraError: if it is damaged or something else.
    """
    header = container.header(path)
    if _KEY not in header.metadata:
        raise CmloraError(f"{path} is no checkpoint of a training")
    try:
        tensors = load_file(path)
        state: dict[str, Any] = _restored(json.loads(header.metadata[_KEY]), tensors)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CmloraError(f"{path} is damaged: {error}; delete it to start anew") from None
    return state


def _plain(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """The value as JSON, its tensors set aside."""
    if isinstance(value, Tensor):
        key = f"{len(tensors):06d}{path}"
        # Safetensors has no complex numbers and no shared memory.
        tensors[key] = value.detach().cpu()
        return {"tensor": key}
    if isinstance(value, dict):
        return {"table": [[k, _plain(v, f"{path}.{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_plain(v, f"{path}.{i}", tensors) for i, v in enumerate(value)]}
    if value is None or isinstance(value, bool | int | str):
        return {"value": value}
    if isinstance(value, float):
        return {"float": value.hex()}
    raise TypeError(f"{path}: a {type(value).__name__} cannot be part of a checkpoint")


def _restored(plan: Any, tensors: dict[str, Tensor]) -> Any:
    ((kind, value),) = plan.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "table":
        return {key: _restored(v, tensors) for key, v in value}
    if kind in ("list", "tuple"):
        found = [_restored(v, tensors) for v in value]
        return tuple(found) if kind == "tuple" else found
    if kind == "float":
        return float.fromhex(value)
    return value


def equal(a: Any, b: Any) -> bool:
    """Whether two states agree in every bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        same = type(a) is type(b) and len(a) == len(b)
        return same and all(map(equal, a, b))
    return bool(a == b)
