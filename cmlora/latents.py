"""Latents as maps (B, C, H, W), however a denoiser takes them, and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from cmlora.denoisers import Kind

_PATCH = 2


@dataclass(frozen=True)
class Layout:
    """How a denoiser's input and output become maps.

    Args:
        grid: rows and columns of patches if they are tokens (.., S, 4 C).
        frames: number of frames if they are videos (.., B, C, F, H, W), which become
            (.., B * F, C, H, W).
        swapped: whether the batch has the conditional half first; maps have it last.
    """

    grid: tuple[int, int] | None = None
    frames: int | None = None
    swapped: bool = False

    def unpack(self, latent: torch.Tensor) -> torch.Tensor:
        """Maps (.., B, C, H, W). Tokens past the grid (reference pictures) are left out."""
        return self._turned(self._unpacked(latent))

    def _unpacked(self, latent: torch.Tensor) -> torch.Tensor:
        if self.frames is not None:
            return latent.transpose(-4, -3).flatten(-5, -4)
        if self.grid is None:
            return latent
        rows, columns = self.grid
        patches = latent[..., : rows * columns, :]
        patches = torch.unflatten(patches, -1, (-1, _PATCH, _PATCH))
        patches = torch.unflatten(patches, -4, (rows, columns))
        # (.., rows, columns, C, 2, 2) to (.., C, rows, 2, columns, 2)
        order = (-3, -5, -2, -4, -1)
        leading = range(-patches.ndim, -5)
        maps = patches.permute(*leading, *order)
        return maps.flatten(-2, -1).flatten(-3, -2)

    def pack(self, maps: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """The inverse of `unpack`; what it left out is taken from ``like``."""
        maps = self._turned(maps)
        if self.frames is not None:
            return torch.unflatten(maps, -4, (-1, self.frames)).transpose(-4, -3)
        if self.grid is None:
            return maps
        rows, columns = self.grid
        split = torch.unflatten(maps, -1, (columns, _PATCH))
        split = torch.unflatten(split, -3, (rows, _PATCH))
        # (.., C, rows, 2, columns, 2) to (.., rows, columns, C, 2, 2)
        leading = range(-split.ndim, -5)
        tokens = split.permute(*leading, -4, -2, -5, -3, -1).flatten(-3, -1).flatten(-3, -2)
        return torch.cat([tokens, like[..., rows * columns :, :]], dim=-2)

    def _turned(self, maps: torch.Tensor) -> torch.Tensor:
        return maps.roll(maps.shape[-4] // 2, -4) if self.swapped else maps


MAPS = Layout()
"""Nothing to do."""


def as_tensor(sample: Any) -> torch.Tensor | None:
    """The denoiser's input (B, C, H, W); some models take a list of one tensor per picture."""
    if isinstance(sample, list):
        tensors = all(isinstance(each, torch.Tensor) for each in sample)
        same = tensors and len({tensor.shape for tensor in sample}) == 1
        return torch.stack(sample) if same else None
    return sample if isinstance(sample, torch.Tensor) else None


def layout(kind: Kind, sample: torch.Tensor | None, argument: Callable[[str], Any]) -> Layout:
    """The layout of a denoiser call.

    Args:
        kind: the denoiser's row.
        sample: what goes in.
        argument: gives the call's arguments by name, ``None`` for those it does not have.
    """
    if kind.latent != "tokens" and sample is not None and sample.ndim == 5:
        return Layout(frames=sample.shape[2])
    if kind.latent == "tokens" and sample is not None and sample.ndim == 3:
        grid = _of_shapes(argument("img_shapes")) or _of_ids(argument("img_ids"))
        whole = grid is not None and grid[0] * grid[1] <= sample.shape[1]
        return Layout(grid=grid) if whole and sample.shape[2] % _PATCH**2 == 0 else MAPS
    return MAPS


def _of_shapes(shapes: Any) -> tuple[int, int] | None:
    """The grid in ``img_shapes``: per picture a list of (frames, rows, columns), its own first."""
    if not shapes:
        return None
    first = shapes[0][0] if isinstance(shapes[0], list) else shapes[0]
    frames, rows, columns = first
    return (int(rows), int(columns)) if frames == 1 else None


def _of_ids(ids: Any) -> tuple[int, int] | None:
    """The grid in ``img_ids`` (S, 3) or (B, S, 4): which picture, row, column of every token."""
    if not isinstance(ids, torch.Tensor) or ids.ndim not in (2, 3):
        return None
    table = (ids[0] if ids.ndim == 3 else ids)[:, :3].tolist()
    own = [entry for entry in table if entry[0] == table[0][0]]
    rows, columns = (int(max(e[i] for e in own) - min(e[i] for e in own)) + 1 for i in (1, 2))
    return (rows, columns) if rows * columns == len(own) else None
