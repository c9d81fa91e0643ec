"""What a compressed matrix is stored as. Bytes are those of the tensors, indices included."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from cmlora.errors import CmloraError


class Form(Protocol):
    """A stored matrix (O, I)."""

    kind: ClassVar[str]

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by field."""

    def stages(self) -> tuple[Tensor, ...]:
        """Matrices to be applied one after the other: (k, I) and (O, k), or one (O, I)."""


Method = Callable[..., Form | None]
"""``method(matrix, keep, gram) -> form``.

``matrix`` is (O, I), ``keep`` the share of its bytes that may be used, ``gram`` (I, I) the inputs'
second moments ``sum x x^T`` or nothing; the answer is nothing where no form is small enough.
"""


def nbytes(form: Form) -> int:
    """Bytes of everything stored."""
    return sum(t.numel() * t.element_size() for t in form.tensors().values())


def dense(form: Form) -> Tensor:
    """The matrix (O, I) that a form stands for."""
    result, *rest = form.stages()
    for stage in rest:
        result = stage @ result
    return result


def in_precision(form: Form, dtype: torch.dtype) -> Form:
    """The form with its floating-point tensors in another precision."""
    tensors = {k: t.to(dtype) if t.is_floating_point() else t for k, t in form.tensors().items()}
    return KINDS[form.kind](**tensors)


@dataclass(frozen=True, eq=False)
class Factors:
    """``up @ down``: (O, k) and (k, I)."""

    kind: ClassVar[str] = "factors"
    up: Tensor
    down: Tensor

    def tensors(self) -> dict[str, Tensor]:
        return {"up": self.up, "down": self.down}

    def stages(self) -> tuple[Tensor, ...]:
        return self.down, self.up


@dataclass(frozen=True, eq=False)
class Sparse:
    """``codes @ atoms`` with few codes per output.

    Args:
        atoms: (k, I).
        mask: which codes are not zero, (O, ceil(k / 8)) bytes, the lowest bit first.
        values: those codes, row by row.
    """

    kind: ClassVar[str] = "sparse"
    atoms: Tensor
    mask: Tensor
    values: Tensor

    @classmethod
    def of(cls, atoms: Tensor, codes: Tensor) -> Sparse:
        """From (k, I) atoms and (O, k) codes, most of them zero."""
        used = codes != 0
        padded = torch.nn.functional.pad(used, (0, -used.shape[1] % 8)).to(torch.uint8)
        bits = padded.reshape(len(padded), -1, 8) << torch.arange(8, dtype=torch.uint8)
        return cls(atoms, bits.sum(2, dtype=torch.uint8), codes[used])

    def tensors(self) -> dict[str, Tensor]:
        return {"atoms": self.atoms, "mask": self.mask, "values": self.values}

    def stages(self) -> tuple[Tensor, ...]:
        bits = torch.arange(8, dtype=torch.uint8, device=self.mask.device)
        used = ((self.mask[:, :, None] >> bits) & 1).flatten(1)[:, : len(self.atoms)].bool()
        codes = self.values.new_zeros(used.shape).masked_scatter(used, self.values)
        return self.atoms, codes


def largest_rank(matrix: Tensor, keep: float) -> int:
    """The largest rank whose factors use at most the share of the bytes and save some; or 0."""
    outputs, inputs = matrix.shape
    rank = int(keep * outputs * inputs / (outputs + inputs) + 1e-9)
    return rank if rank * (outputs + inputs) < outputs * inputs else rank - 1


def check_keep(keep: float) -> None:
    """Raises `CmloraError` unless the share is above 0 and at most 1."""
    if not 0 < keep <= 1:
        raise CmloraError(f"a compressed layer keeps a share above 0 and up to 1, not {keep:g}")


def root(gram: Tensor | None, inputs: int) -> Tensor:
    """Lower triangular L with ``L L^T = gram``, damped; the identity without a gram.

    ``|X (A - B)^T| = |(A - B) L|`` for inputs X (n, I) with the gram ``X^T X``.

    Args:
        gram: (I, I), or (I / g, g, g) for blocks of inputs that are taken as unrelated.
        inputs: I.

    Returns:
        (I, I) in float64.
    """
    if gram is None:
        return torch.eye(inputs, dtype=torch.double)
    blocks = gram.double() if gram.ndim == 3 else gram.double()[None]
    size = blocks.shape[-1]
    mean = float(blocks.diagonal(dim1=1, dim2=2).sum()) / inputs
    # Fewer samples than inputs are normal for pictures.
    damping = 1e-6 * mean if mean > 0 else 1.0
    eye = torch.eye(size, dtype=torch.double)
    triangle, failed = torch.linalg.cholesky_ex(blocks + damping * eye)
    while bool(failed.any()):  # rounding of a stored gram can outweigh what was added
        damping *= 10
        triangle, failed = torch.linalg.cholesky_ex(blocks + damping * eye)
    whole = torch.zeros(inputs, inputs, dtype=torch.double)
    for index, block in enumerate(triangle):
        place = slice(index * size, (index + 1) * size)
        whole[place, place] = block
    return whole


def from_tensors(kind: str, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Form:
    """The form that was stored, see `Form.tensors`.

    Raises:
        CmloraError: if the kind is unknown or the tensors are not its own.
    """
    if kind not in KINDS:
        raise CmloraError(f"unknown form {kind!r}; known: {', '.join(KINDS)}")
    try:
        form: Form = KINDS[kind](**tensors)
        found = tuple(dense(form).shape)
    except (TypeError, RuntimeError) as error:
        raise CmloraError(f"the tensors of a {kind} layer do not fit: {error}") from None
    if found != shape:
        raise CmloraError(f"a {kind} layer is {found} instead of {shape}")
    return form


@dataclass(frozen=True, eq=False)
class Packed:
    """MXFP4: two 4-bit codes per byte, and one power-of-two scale for 32 values of a row.

    Args:
        codes: (O, B * 16) bytes, B blocks per row; the first of two values in the low half.
        scales: (O, B) bytes, exponents offset by 127.
        inputs: () I, as the last block may be filled up.
    """

    kind: ClassVar[str] = "packed"
    codes: Tensor
    scales: Tensor
    inputs: Tensor

    def tensors(self) -> dict[str, Tensor]:
        return {"codes": self.codes, "scales": self.scales, "inputs": self.inputs}

    def stages(self) -> tuple[Tensor, ...]:
        grid = GRID.to(self.codes.device)
        halves = torch.stack([self.codes & 15, self.codes >> 4], -1).flatten(1).int()
        values = grid[halves & 7] * (1 - 2 * (halves >> 3))
        powers = torch.exp2(self.scales.float() - 127)
        blocks = values.reshape(len(values), -1, 32) * powers[:, :, None]
        return (blocks.flatten(1)[:, : int(self.inputs)],)


GRID = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
"""The magnitudes of E2M1."""

KINDS: dict[str, Callable[..., Form]] = {f.kind: f for f in (Factors, Sparse, Packed)}
