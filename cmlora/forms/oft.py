"""OFT and BOFT: the weight is rotated in blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from cmlora.forms.change import Change, Parts


def oft(parts: Parts) -> Change:
    """``c * R^T W - W`` with R block-diagonal: the outputs are rotated, then rescaled by c.

    arXiv:2306.07280 as kohya and LyCORIS store it: ``oft_blocks`` (K, b, b) are arbitrary, Q is
    the difference of a block and its transpose, ``R = (1 + Q) (1 - Q)^-1``. An alpha bounds the
    norm of all Q together by alpha * O. Four-dimensional ``oft_blocks`` are BOFT's.
    """
    blocks, rescale = parts["oft_blocks"], parts.get("rescale")
    if blocks.ndim not in (3, 4) or blocks.shape[-1] != blocks.shape[-2]:
        raise ValueError(f"oft_blocks are {tuple(blocks.shape)}, not (blocks, size, size)")
    skew = blocks - blocks.transpose(-1, -2)
    outputs = blocks.shape[-3] * blocks.shape[-1]
    bound = (parts.alpha or 0.0) * outputs
    norm = float(skew.norm()) + 1e-8
    if 0 < bound < norm:
        skew = skew * (bound / norm)
    turns = _cayley(-skew)

    def weight(own: Tensor) -> Tensor:
        if len(own) != outputs:
            raise ValueError(
                f"oft_blocks are for {outputs} outputs, the layer is {tuple(own.shape)}"
            )
        rows = own.flatten(1)
        if turns.ndim == 3:
            turned = torch.einsum("knm,knj->kmj", turns, rows.reshape(*turns.shape[:2], -1))
        else:
            turned = _butterfly(turns, rows)
        turned = turned.reshape(own.shape)
        if rescale is not None:
            turned = turned * rescale.reshape(-1, *[1] * (own.ndim - 1))
        return turned - own

    return Change(weight=weight, base=True)


def peft_oft(parts: Parts) -> Change:
    """``W R^T - W``: PEFT rotates the inputs, ``R = (1 - Q) (1 + Q)^-1`` block by block.

    ``oft_R`` (blocks, b (b - 1) / 2) holds the upper halves of the skew-symmetric Q. By default
    PEFT replaces the inverse by five terms of its Neumann series, which is no exact rotation, and
    so is what the file was trained with. A single block may serve all inputs. The rotation acts
    on the flattened kernel of a convolution, as PEFT merges it.
    """
    upper = parts["oft_R"]
    if upper.ndim != 2:
        raise ValueError(f"oft_R is {tuple(upper.shape)}, not (blocks, entries)")
    size = round((1 + (1 + 8 * upper.shape[1]) ** 0.5) / 2)
    if size * (size - 1) // 2 != upper.shape[1]:
        raise ValueError(f"oft_R has {upper.shape[1]} entries per block, for which no size fits")
    rows, columns = torch.triu_indices(size, size, 1)
    skew = upper.new_zeros(len(upper), size, size)
    skew[:, rows, columns] = upper
    skew = skew - skew.transpose(1, 2)
    if parts.settings.get("coft"):
        most = float(parts.settings.get("eps") or 6e-5) / len(upper) ** 0.5
        skew = skew * (most / skew.norm(dim=(1, 2), keepdim=True).clamp(min=most))
    if parts.settings.get("use_cayley_neumann", True):
        terms = int(parts.settings.get("num_cayley_neumann_terms") or 5)
        if not 1 <= terms <= 100:
            raise ValueError(f"num_cayley_neumann_terms is {terms}")
        turns = _neumann(skew, terms)
    else:
        turns = _cayley(skew)

    def weight(own: Tensor) -> Tensor:
        matrix = own.flatten(1)
        count, left = divmod(matrix.shape[1], size)
        if left or len(turns) not in (1, count):
            raise ValueError(
                f"oft_R has {len(turns)} blocks of {size}, the layer is {tuple(own.shape)}"
            )
        parts_of = matrix.reshape(len(matrix), count, size)
        turned = torch.einsum("obi,bji->obj", parts_of, turns.expand(count, -1, -1))
        return turned.reshape(own.shape) - own

    return Change(weight=weight, base=True)


def peft_boft(parts: Parts) -> Change:
    """``diag(s) W R^T - W`` with R a product of rotations in blocks of permuted inputs.

    arXiv:2311.06243 as PEFT has it: ``boft_R`` (m, blocks, b, b), Q is half the difference of a
    block and its transpose. Factor i sees the inputs taken apart in halves of blocks, even ones
    first, within groups of ``2^i`` blocks. The bias stays as it is.
    """
    blocks, outer = parts["boft_R"], parts.get("boft_s")
    if blocks.ndim != 4:
        raise ValueError(f"boft_R is {tuple(blocks.shape)}, not (factors, blocks, size, size)")
    factors, count, size = blocks.shape[:3]
    inputs = count * size
    turns = _cayley((blocks - blocks.transpose(-1, -2)) / 2)
    rotation = torch.eye(inputs, dtype=blocks.dtype)
    for number, turn in enumerate(turns):
        order = _halves(inputs, size, 2**number) if factors > 1 else torch.arange(inputs)
        apart: Tensor = torch.block_diag(*turn)  # type: ignore[no-untyped-call]
        rotation = apart[order[:, None], order[None, :]] @ rotation
    scale = None if outer is None else outer.flatten()

    def weight(own: Tensor) -> Tensor:
        matrix = own.flatten(1)
        if matrix.shape[1] != inputs:
            raise ValueError(f"boft_R is for {inputs} inputs, the layer is {tuple(own.shape)}")
        turned = matrix @ rotation.T
        if scale is not None:
            turned = turned * scale[:, None]
        return turned.reshape(own.shape) - own

    return Change(weight=weight, base=True)


def _cayley(skew: Tensor) -> Tensor:
    """``(1 - Q) (1 + Q)^-1`` of skew-symmetric matrices (..., b, b)."""
    one = torch.eye(skew.shape[-1], dtype=skew.dtype)
    result: Tensor = torch.linalg.solve(one + skew, one - skew)  # both sides commute
    return result


def _neumann(skew: Tensor, terms: int) -> Tensor:
    """``1 + 2 Q + 2 Q^2 + ... + Q^k``: PEFT counts the last of several terms once, and k >= 3."""
    result = torch.eye(skew.shape[-1], dtype=skew.dtype).repeat(len(skew), 1, 1)
    last = max(terms - 1, 3) if terms > 2 else terms - 1
    power = result
    for number in range(1, last + 1):
        power = power @ skew
        result = result + power * (1.0 if terms > 2 and number == last else 2.0)
    return result


def _butterfly(turns: Tensor, rows: Tensor) -> Tensor:
    """BOFT of LyCORIS: stage i turns blocks of rows whose halves are ``2^i b / 2`` rows apart."""
    size = turns.shape[-1]
    for number, turn in enumerate(turns):
        apart = 2**number * size // 2
        if len(rows) % (2 * apart):
            raise ValueError(f"{len(rows)} outputs cannot be taken in pairs of {apart}")
        order = torch.arange(len(rows)).reshape(-1, 2, apart).transpose(1, 2).flatten()
        taken = rows[order].reshape(-1, size, rows.shape[1])
        turned = torch.einsum("kij,kjn->kin", turn, taken).reshape(rows.shape)
        rows = torch.empty_like(rows)
        rows[order] = turned
    return rows


def _halves(inputs: int, size: int, blocks: int) -> Tensor:
    """Inputs in groups of so many blocks, in each the even half blocks first, then the odd ones."""
    half, group = size // 2, size * blocks
    if half < 1 or inputs % group:
        raise ValueError(f"{inputs} inputs have no groups of {blocks} blocks of {size}")
    places = torch.arange(inputs).reshape(-1, group // half, half)
    return torch.cat([places[:, 0::2], places[:, 1::2]], 1).flatten()
