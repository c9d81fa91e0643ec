"""Slow independent references: every formula once more, in loops over plain lists and numpy."""

import math

import numpy as np


def nonuniform_refreshes(count: int, c1: int, c2: int) -> list[int]:
    """The published loop: walk through the run with the interval of the place one is at."""
    first, last = int(count * 0.375), int(count * 0.875)
    steps: list[int] = []
    position = 0
    while position < first:
        steps.append(position)
        position += c1
    position = first
    while position < last:
        steps.append(position)
        position += c2
    position = last
    while position < count:
        steps.append(position)
        position += c1
    return steps


def radial_profile(u: np.ndarray, log: bool = False) -> list[float]:
    """a(r) of one (H, W) map, sample by sample."""
    height, width = u.shape
    amplitude = np.abs(np.fft.fftshift(np.fft.fft2(u)))
    if log:
        amplitude = np.log(amplitude + 1e-8)
    rings: dict[int, list[float]] = {}
    for y in range(height):
        for x in range(width):
            radius = int(math.sqrt((x - width // 2) ** 2 + (y - height // 2) ** 2))
            rings.setdefault(radius, []).append(float(amplitude[y, x]))
    return [sum(rings[radius]) / len(rings[radius]) for radius in sorted(rings)]


def high_intensity(u: np.ndarray, first_bin: int, log: bool = False) -> float:
    """Mean of a(r) / max a over r >= first_bin; NaN if there is no such ring."""
    profile = radial_profile(u, log)
    tail = [value / max(profile) for value in profile[first_bin:]]
    return sum(tail) / len(tail) if tail else math.nan


def high_energy_share(u: np.ndarray, split: float) -> float:
    """R_h of one (C, H, W) map, by the textbook sum of the discrete Fourier transform."""
    channels, height, width = u.shape
    high = everything = 0.0
    for c in range(channels):
        spectrum = np.fft.fft2(u[c])
        for ky in range(height):
            for kx in range(width):
                fy = (ky if 2 * ky < height else ky - height) / height
                fx = (kx if 2 * kx < width else kx - width) / width
                rho = math.sqrt((2 * fx) ** 2 + (2 * fy) ** 2) / math.sqrt(2)
                energy = abs(spectrum[ky, kx]) ** 2
                everything += energy if rho > 0 else 0.0
                high += energy if rho >= split else 0.0
    return high / everything
