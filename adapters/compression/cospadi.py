"""A dictionary learnt for the layer: sparse coding and atom updates in turn (OMP and K-SVD)."""

from __future__ import annotations

import torch
from torch import Tensor

from cmlora.adapters.compression.form import Sparse, check_keep, root
from cmlora.adapters.compression.rocket import layout

_RIDGE = 1e-10  # where two atoms of a row are the same
_TURNS = 100


def cospadi(
    matrix: Tensor, keep: float, gram: Tensor | None = None, sweeps: int = 8
) -> Sparse | None:
    """``min |W L - S D|`` with s codes per output (arXiv:2509.22075), L as in `root`.

    Starts from the eigenvectors that `rocket` uses. Coding again may be worse than the codes
    there were, so the best of all sweeps is returned. Minutes for layers of a thousand inputs.

    Args:
        matrix: W (O, I).
        keep: share of the bytes, mask included.
        gram: see `cmlora.adapters.compression.form.root`.
        sweeps: how often codes and atoms are improved.
    """
    check_keep(keep)
    rank, each = layout(matrix, keep)
    if each < 1:
        return None
    whiten = root(gram, matrix.shape[1])
    seen = matrix.double() @ whiten
    atoms = torch.linalg.svd(seen, full_matrices=False)[2][:rank].clone()
    best, result = float("inf"), (atoms, seen.new_zeros(len(seen), rank))
    for _ in range(sweeps):
        codes = pursue(seen, atoms, each)
        improve(seen, atoms, codes)
        error = float((seen - codes @ atoms).norm())
        if error < best:
            best, result = error, (atoms.clone(), codes)
    atoms, codes = result
    atoms = torch.linalg.solve_triangular(whiten, atoms, upper=False, left=False)
    return Sparse.of(atoms.to(matrix.dtype), codes.to(matrix.dtype))


def pursue(rows: Tensor, atoms: Tensor, count: int) -> Tensor:
    """Orthogonal matching pursuit of all rows at once, by growing Cholesky factors (Batch-OMP).

    Args:
        rows: (O, I).
        atoms: (k, I) of length 1.
        count: s, atoms per row.

    Returns:
        Codes (O, k) with at most s that are not zero in a row.
    """
    matches, square = rows @ atoms.T, atoms @ atoms.T
    chosen = torch.zeros(len(rows), 0, dtype=torch.long)
    # of each row's normal equations, the matches of its atoms, and the solution
    factor = rows.new_zeros(len(rows), count, count)
    wanted, codes = rows.new_zeros(len(rows), count), torch.zeros_like(matches)
    for step in range(count):
        free = (matches - codes @ square).abs().scatter(1, chosen, -1.0)
        atom = free.argmax(1, keepdim=True)
        known = factor[:, :step, :step]
        corner = torch.full_like(atom, 1.0 + _RIDGE, dtype=rows.dtype)
        if step:
            beside = square[chosen, atom][:, :, None]
            edge = torch.linalg.solve_triangular(known, beside, upper=False)[:, :, 0]
            factor[:, step, :step] = edge
            corner -= edge.square().sum(1, keepdim=True)
        factor[:, step, step] = corner.clamp_min(_RIDGE)[:, 0].sqrt()
        wanted[:, step] = matches.gather(1, atom)[:, 0]
        chosen = torch.cat([chosen, atom], 1)
        solved = torch.cholesky_solve(
            wanted[:, : step + 1, None], factor[:, : step + 1, : step + 1]
        )
        codes.scatter_(1, chosen, solved[:, :, 0])
    return codes


def improve(rows: Tensor, atoms: Tensor, codes: Tensor) -> None:
    """One K-SVD pass: each atom and its codes become the best rank-one fit of what they explain.

    Never raises the error. Both are changed in place; an atom that nobody uses becomes the row
    that is explained worst.
    """
    rest = rows - codes @ atoms
    for index in range(len(atoms)):
        users = codes[:, index].nonzero()[:, 0]
        if not len(users):
            worst = rest[int(rest.norm(dim=1).argmax())]
            if float(worst.norm()) > 0:
                atoms[index] = worst / worst.norm()
            continue
        own = rest[users] + codes[users, index][:, None] * atoms[index]
        atoms[index], codes[users, index] = leading(own, codes[users, index])
        rest[users] = own - codes[users, index][:, None] * atoms[index]


def leading(matrix: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """The first right singular vector (I,) and the matrix times it (O,), by power iteration.

    Every turn is a least squares fit of one of the two, so the product fits no worse than any
    ``start v^T`` does, even where singular values are close and turns run out.

    Args:
        matrix: (O, I).
        start: (O,), not orthogonal to the first left singular vector.
    """
    left, size = start, 0.0
    for _ in range(_TURNS):
        right = matrix.T @ left
        right = right / right.norm().clamp_min(torch.finfo(right.dtype).tiny)
        left = matrix @ right
        now = float(left.norm())
        if now <= size * (1 + 1e-12):
            break
        size = now
    return right, left
