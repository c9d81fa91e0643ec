"""Slow independent references: every formula once more, in loops over plain lists and numpy."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

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


class Happened(NamedTuple):
    """One step of a run: who was dominant and who ran in full."""

    dominant: str
    full: set[str]


def published_offline(
    count: int, high: Sequence[str], low: Sequence[str], interval: int
) -> list[Happened]:
    """The published offline pipeline's bookkeeping, with its list of slots and its slice bug.

    Args:
        count: number of steps.
        high: names of the first list.
        low: names of the second.
        interval: 0 non-uniform, 1 every step, n every n steps.
    """
    return _published(count, high, low, interval, lambda step: step > 120)


def published_online(
    count: int, high: Sequence[str], low: Sequence[str], interval: int, measures: Sequence[float]
) -> list[Happened]:
    """The same with a measured change of phase; ``measures`` holds m after every step."""
    before = [1.0, *measures]
    return _published(count, high, low, interval, lambda step: not (before[step] >= 0.40))


def _published(
    count: int,
    high: Sequence[str],
    low: Sequence[str],
    interval: int,
    is_late: Callable[[int], bool],
) -> list[Happened]:
    adapters = [*high, *low]
    sequence = _published_sequence(count, interval)
    quick_replicate = interval > 1
    features: list[int | None] = [None] * len(adapters)
    k = 0
    trace = []
    for step in range(count):
        emptying = step in sequence
        if emptying:
            k += 1
        if not low or not is_late(step):
            index = (k - 1) % len(high)
            dominant = adapters[index]
            if emptying:
                features[index] = None
        else:
            index = (k - 1) % len(high)
            dominant = adapters[1:][index]
            if emptying:
                features[1:][index] = None  # a slice is a copy: nothing is emptied
        full = set()
        for j, name in enumerate(adapters):
            if not (quick_replicate and features[j] is not None):
                full.add(name)
                features[j] = step
        trace.append(Happened(dominant, full))
    return trace


def published_async(count: int, names: Sequence[str], interval: int) -> list[Happened]:
    """The published asynchronous pipeline: emptied before the switch, dominant one behind."""
    sequence = _published_sequence(count, interval)
    quick_replicate = interval > 1
    changes = [20, 40, 60, 80, 100, 120, 140, 160, 180, 200]
    features: list[int | None] = [None] * len(names)
    k = 0
    trace = []
    for step in range(count):
        if step in sequence:
            features[k % len(names)] = None
        if step in changes:
            k += 1
        dominant = names[(k - 1) % len(names)]
        full = set()
        for j, name in enumerate(names):
            if not (quick_replicate and features[j] is not None):
                full.add(name)
                features[j] = step
        trace.append(Happened(dominant, full))
    return trace


def _published_sequence(count: int, interval: int) -> list[int]:
    if interval == 0:
        return nonuniform_refreshes(count, 2, 3)
    return [step for step in range(count) if step % interval == 0]


def corrected_cmlora(
    count: int,
    early: Sequence[str],
    late: Sequence[str],
    refreshes: Sequence[int],
    switches: Sequence[int],
    late_from: float,
    max_age: int | None,
    always: bool,
) -> list[Happened]:
    """CMLoRA without defects, one step after the other with all state in the open.

    ``early`` and ``late`` are both the whole set where there is a single phase.
    """
    names = sorted({*early, *late})
    two_phases = list(early) != list(late)
    ran = dict.fromkeys(names, 0)
    waiting = {False: list(early), True: list(late)}
    in_late = False
    dominant = ""
    trace = []
    for step in range(count):
        full: set[str] = set(names) if step == 0 else set()
        if step in switches:
            now_late = two_phases and step >= late_from * count - 1e-9
            dominant = waiting[now_late].pop(0)
            waiting[now_late].append(dominant)
            if now_late != in_late and max_age is not None:
                full |= set(names)
            in_late = now_late
        if step in switches or step in refreshes:
            full.add(dominant)
            for name in names:
                if max_age is not None and step - ran[name] >= max_age:
                    full.add(name)
        if always:
            full.add(dominant)
        for name in full:
            ran[name] = step
        trace.append(Happened(dominant, full))
    return trace


def dominant_weight(n: int, switches: int) -> float:
    """c after some switches: 0.5, 0.25, 0.125, ... taken away in turn, never below 1."""
    c = n - 0.5
    for j in range(1, switches + 1):
        c -= 0.5**j
    return max(1.0, c)


def selected(outputs: np.ndarray, strength: float, sharpness: float) -> np.ndarray:
    """The selecting combination, location by location; outputs (1 + N, B, C, H, W), base first."""
    _, batch, channels, height, width = outputs.shape
    n = len(outputs) - 1
    result = np.zeros(outputs.shape[1:])
    for b in range(batch):
        size = np.zeros((n, height, width))
        for j in range(n):
            for y in range(height):
                for x in range(width):
                    difference = outputs[1 + j, b, :, y, x] - outputs[0, b, :, y, x]
                    size[j, y, x] = math.sqrt(sum(float(v) ** 2 for v in difference))
        for y in range(height):
            for x in range(width):
                scores = []
                for j in range(n):
                    mean = size[j].mean()
                    scores.append(sharpness * size[j, y, x] / mean if mean > 0 else 0.0)
                top = max(scores)
                raw = [math.exp(score - top) for score in scores]
                for c in range(channels):
                    base = outputs[0, b, c, y, x]
                    result[b, c, y, x] = base + strength * sum(
                        raw[j] / sum(raw) * (outputs[1 + j, b, c, y, x] - base) for j in range(n)
                    )
    return result
