"""LoKr: the Kronecker product of a small and a larger matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from cmlora.forms.change import Change, Parts, additive, low_rank, matrix


def lokr(parts: Parts) -> Change:
    """``s C x D`` with the Kronecker product x; either matrix may be a product of rank R.

    LyCORIS arXiv:2309.14859. LyCORIS has s = 1 where both matrices are whole, PEFT has s = alpha /
    r there too. Where a matrix is a product, so is the whole:
    ``C x (D_a D_b) = (C x D_a) (1 x D_b) = (1 x D_a) (C x D_b)``; the smaller rank is taken.
    """
    small = _factors(parts, "lokr_w1")
    if "lokr_t2" in parts:
        core, up, down = parts["lokr_t2"], parts["lokr_w2_a"], parts["lokr_w2_b"]
        large = [torch.einsum("rqhw,ro,qi->oihw", core, up, down)]
        rank = core.shape[0]
    else:
        large = _factors(parts, "lokr_w2")
        rank = large[-1].shape[0] if len(large) == 2 else 0
    if len(small) == 2:
        rank = small[1].shape[0]
    kernel = _kernel(parts, large[-1])
    if not rank:
        theirs = str(parts.settings.get("peft_type", "")).upper() == "LOKR"
        scale = parts.ratio(int(parts.settings.get("r", 1))) if theirs else 1.0
    else:
        scale = parts.ratio(rank)
    large = [matrix(each) for each in large]
    outputs = len(small[0]) * len(large[0])
    inputs = small[-1].shape[1] * large[-1].shape[1]
    shape = (
        (outputs, inputs // (kernel[0] * kernel[1]), *kernel)
        if kernel != (1, 1)
        else (outputs, inputs)
    )
    if len(large) == 1 and len(small) == 1:
        return additive(torch.kron(small[0], large[0]).reshape(shape) * scale)
    up, down = _product(small, large)
    return low_rank(down, up, scale, shape)


def _factors(parts: Parts, name: str) -> list[Tensor]:
    """The matrix, or the two it is a product of."""
    whole = parts.get(name)
    return [parts[f"{name}_a"], parts[f"{name}_b"]] if whole is None else [whole]


def _product(small: list[Tensor], large: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Factors of the Kronecker product of two matrices of which at least one is a product."""
    if len(small) == 2 and len(large) == 2:
        return torch.kron(small[0], large[0]), torch.kron(small[1], large[1])
    if len(large) == 2:
        rows, columns = small[0].shape
        if rows <= columns:
            return torch.kron(_one(rows, small[0]), large[0]), torch.kron(small[0], large[1])
        return torch.kron(small[0], large[0]), torch.kron(_one(columns, small[0]), large[1])
    rows, columns = large[0].shape
    if rows <= columns:
        return torch.kron(small[0], _one(rows, large[0])), torch.kron(small[1], large[0])
    return torch.kron(small[0], large[0]), torch.kron(small[1], _one(columns, large[0]))


def _one(size: int, like: Tensor) -> Tensor:
    return torch.eye(size, dtype=like.dtype)


def _kernel(parts: Parts, large: Tensor) -> tuple[int, int]:
    """The sides of a convolution's kernel as far as the tensors show them."""
    if large.ndim == 4:
        return large.shape[2], large.shape[3]
    return 1, 1
