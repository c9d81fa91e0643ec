"""The latent space: principal components of 4x4 patches, 12 channels on a 16x16 grid.

The components are found in closed form, so the base model's training can start at once; the
autoencoder's encoder then learns to compute them and its decoder to invert them better than a
linear map can (`cmlora.emoji.autoencoder`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

PATCH = 4
CHANNELS = 12


@dataclass(frozen=True)
class PatchBasis:
    """A linear map between 4x4 patches of RGB in -1..1 and latent channels.

    Channel i is the i-th principal component divided by the square root of its standard
    deviation (and all by one number, so that the mean variance is 1): between leaving small
    details tiny and giving them the weight of the large ones.

    Args:
        mean: (48,) the mean patch.
        analysis: (12, 48).
        synthesis: (48, 12), the least-squares inverse.
    """

    mean: Tensor
    analysis: Tensor
    synthesis: Tensor

    @classmethod
    def fit(cls, pictures: Tensor) -> PatchBasis:
        """Find the components of pictures, (n, 3, H, W) in -1..1."""
        patches = _to_patches(pictures).flatten(0, 2).double()
        mean = patches.mean(0)
        values, vectors = torch.linalg.eigh(torch.cov((patches - mean).T))
        values, vectors = values.flip(0)[:CHANNELS], vectors.flip(1)[:, :CHANNELS]
        std = values.sqrt()
        divisor = std.sqrt() * std.mean().sqrt()
        analysis, synthesis = (vectors / divisor).T, vectors * divisor
        return cls(mean.float(), analysis.float().contiguous(), synthesis.float().contiguous())

    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures (n, 3, H, W) in -1..1 to latents (n, 12, H / 4, W / 4)."""
        return ((_to_patches(pictures) - self.mean) @ self.analysis.T).permute(0, 3, 1, 2)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to pictures, the linear way."""
        patches = latents.permute(0, 2, 3, 1) @ self.synthesis.T + self.mean
        n, h, w, _ = patches.shape
        grid = patches.reshape(n, h, w, 3, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
        return grid.reshape(n, 3, h * PATCH, w * PATCH)

    def save(self, path: Path) -> None:
        """Write the basis as safetensors."""
        save_file({"mean": self.mean, "analysis": self.analysis, "synthesis": self.synthesis}, path)

    @classmethod
    def load(cls, path: Path) -> PatchBasis:
        """Read a basis that `save` wrote."""
        return cls(**load_file(path))


def _to_patches(pictures: Tensor) -> Tensor:
    """(n, 3, H, W) to (n, H / 4, W / 4, 48)."""
    n, c, h, w = pictures.shape
    grid = pictures.reshape(n, c, h // PATCH, PATCH, w // PATCH, PATCH)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(n, h // PATCH, w // PATCH, c * PATCH * PATCH)
