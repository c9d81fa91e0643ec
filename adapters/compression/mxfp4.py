"""Four bits per value: blocks of 32 share a power-of-two scale (OCP microscaling, E2M1)."""

from __future__ import annotations

import torch
from torch import Tensor

from cmlora.adapters.compression.form import GRID, Packed, check_keep

CLIP = 2.92247856
"""Standard deviations at which clipping a Gaussian to this grid costs the least (QuEST)."""
_BLOCK = 32


def mxfp4(matrix: Tensor, keep: float = 1.0, gram: Tensor | None = None) -> Packed | None:
    """Round every value to the nearest of the grid, ``2^round(log2(CLIP * rms / 6))`` as the unit.

    17 bytes for 32 values, whatever the share asked for; nothing if that is more than the share.
    The gram is not used.

    Args:
        matrix: (O, I); the last block of a row is filled up with zeros.
        keep: share of the bytes.
        gram: ignored.
    """
    check_keep(keep)
    outputs, inputs = matrix.shape
    blocks = -(-inputs // _BLOCK)
    stored = outputs * blocks * (_BLOCK // 2 + 1) + 8
    if stored > keep * matrix.numel() * matrix.element_size():
        return None
    padded = torch.nn.functional.pad(matrix.double(), (0, blocks * _BLOCK - inputs))
    rows = padded.reshape(outputs, blocks, _BLOCK)
    exponents = exponent(rows)
    codes = encode(rows / torch.exp2(exponents)[:, :, None]).flatten(1)
    packed = codes[:, 0::2] | (codes[:, 1::2] << 4)
    scales = (exponents + 127).to(torch.uint8)
    return Packed(packed, scales, torch.tensor(inputs))


def exponent(rows: Tensor) -> Tensor:
    """The blocks' scale exponents (...) of (..., 32), rounded to the nearest power of two."""
    rms = rows.square().mean(-1).sqrt()
    wanted = torch.log2((CLIP * rms / 6).clamp(min=2.0**-127))
    return wanted.round().clamp(-127, 127)


def encode(scaled: Tensor) -> Tensor:
    """4-bit codes: sign in the highest bit, then the nearest of the grid; ties go up.

    >>> encode(torch.tensor([0.2, -0.3, 2.6, 99.0])).tolist()
    [0, 9, 5, 7]
    """
    middles = (GRID[1:] + GRID[:-1]) / 2
    size = torch.bucketize(scaled.abs().contiguous(), middles.to(scaled.dtype), right=True)
    negative = (scaled < 0) & (size > 0)
    return (size + 8 * negative).to(torch.uint8)
