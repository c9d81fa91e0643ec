"""How much of a feature map is high-frequency, by amplitude or by energy.

Two measures. The *intensity* is the one of the CMLoRA paper (arXiv 2502.04923, the quantity behind
its Delta-H_0.2): a mean over the bins of a radial amplitude profile. The *energy ratio* is ours and
the default everywhere: a share of the spectral energy, which does not depend on how many bins a
size happens to have, and treats both axes alike on pictures that are not square.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def corner_radius(height: int, width: int) -> int:
    """r_max = floor(sqrt((H/2)^2 + (W/2)^2)), the largest radius of a spectrum, in bins.

    >>> corner_radius(64, 64), corner_radius(96, 128), corner_radius(512, 512)
    (45, 80, 362)
    """
    return math.floor(math.hypot(height / 2, width / 2))


def radial_amplitude(u: Tensor, log: bool = False) -> Tensor:
    """Mean amplitude of the spectrum on rings of whole radius: a(r), r = 0, 1, ...

    Args:
        u: real maps, (..., H, W).
        log: average ln(A + 1e-8) instead of A.

    Returns:
        (..., R): one value per ring around the zero frequency, up to the corner. Radii are counted
        in samples of the spectrum, without regard to the aspect ratio.
    """
    u = _real(u)
    height, width = u.shape[-2:]
    amplitude = torch.fft.fftshift(torch.fft.fft2(u), dim=(-2, -1)).abs()
    if log:
        amplitude = (amplitude + 1e-8).log()
    y = torch.arange(height, dtype=torch.float64) - height // 2
    x = torch.arange(width, dtype=torch.float64) - width // 2
    ring = torch.hypot(y[:, None], x[None, :]).long().flatten()  # (H W)
    size = torch.bincount(ring)
    total: Tensor = amplitude.new_zeros(*u.shape[:-2], len(size))
    total.index_add_(-1, ring.to(u.device), amplitude.flatten(-2))
    return total / size.to(u.device)


def intensity(
    u: Tensor, split: float = 0.2, *, log: bool = False, first_bin: int | None = None
) -> Tensor:
    """High-frequency intensity H_h: mean of a(r) / max a over the rings r >= r_c.

    Args:
        u: real maps, (..., H, W).
        split: h, where high frequencies begin, as a fraction of the corner radius;
            r_c = floor(h r_max).
        log: see `radial_amplitude`.
        first_bin: r_c itself, in bins, instead of ``split``. If a map of this size has no such
            ring the result is NaN.

    Returns:
        (...), 0 for maps that are zero.
    """
    profile = radial_amplitude(u, log)
    largest = profile.amax(-1, keepdim=True)
    relative = torch.where(largest == 0, 0.0, profile / largest)
    if first_bin is None:
        edge = math.floor(split * corner_radius(u.shape[-2], u.shape[-1]) + 1e-9)
        first_bin = min(edge, profile.shape[-1] - 1)
    return relative[..., first_bin:].mean(-1)


def energy_ratio(u: Tensor, split: float = 0.2) -> Tensor:
    """Share of spectral energy at high frequencies, the mean left aside.

    R_h(u) = sum_{rho >= h} |F|^2 / sum_{rho > 0} |F|^2, both summed over channels, with the
    normalised radius rho = sqrt((2 f_x)^2 + (2 f_y)^2) / sqrt(2) in [0, 1] and f in cycles per
    sample, so that a stripe of one pixel counts the same along either axis.

    Args:
        u: real maps, (..., C, H, W).
        split: h in (0, 1].

    Returns:
        (...) in [0, 1]; 0 where a map is constant.
    """
    u = _real(u)
    height, width = u.shape[-2:]
    fy = torch.fft.fftfreq(height, dtype=torch.float64)[:, None]
    fx = torch.fft.fftfreq(width, dtype=torch.float64)[None, :]
    rho = torch.hypot(2 * fy, 2 * fx) / math.sqrt(2)
    energy = torch.fft.fft2(u).abs().square().sum(-3)  # (..., H, W)
    high = (energy * (rho >= split - 1e-12).to(energy)).sum((-2, -1))
    varying = (energy * (rho > 0).to(energy)).sum((-2, -1))
    # what is left of a constant map is the rounding of its mean
    silent = varying <= 1e-11 * energy[..., 0, 0]
    return torch.where(silent, 0.0, high / varying)


def _real(u: Tensor) -> Tensor:
    return u if u.dtype == torch.float64 else u.float()
