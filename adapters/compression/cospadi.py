"""A dictionary learnt for the layer: sparse coding and atom updates in turn (OMP and K-SVD)."""

from __future__ import annotations

import torch
from torch import Tensor

from cmlora.adapters.compression.form import Sparse, check_keep, root
from cmlora.adapters.compression.rocket import layout


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
    """Orthogonal matching pursuit of all rows at once.

    Args:
        rows: (O, I).
        atoms: (k, I) of length 1.
        count: s, atoms per row.

    Returns:
        Codes (O, k) with at most s that are not zero in a row.
    """
    chosen = torch.zeros(len(rows), 0, dtype=torch.long)
    solved = rows.new_zeros(len(rows), 0)
    matches, square = rows @ atoms.T, atoms @ atoms.T
    left = matches
    for _ in range(count):
        free = left.abs().scatter(1, chosen, -1.0)
        chosen = torch.cat([chosen, free.argmax(1, keepdim=True)], 1)
        # (O, s, s) normal equations of each row's own atoms
        normal = square[chosen[:, :, None], chosen[:, None, :]]
        normal = normal + 1e-10 * torch.eye(normal.shape[1], dtype=rows.dtype)
        solved = torch.linalg.solve(normal, matches.gather(1, chosen))
        left = matches - torch.einsum("os,osk->ok", solved, square[chosen])
    return torch.zeros_like(matches).scatter_(1, chosen, solved)


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
        u, s, vh = torch.linalg.svd(own, full_matrices=False)
        atoms[index], codes[users, index] = vh[0], s[0] * u[:, 0]
        rest[users] = own - codes[users, index][:, None] * atoms[index]
