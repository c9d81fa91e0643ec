"""Slow independent references of the ways to combine predictions: loops over single numbers."""

import math
from collections.abc import Sequence

import numpy as np


def softmax(values: Sequence[float]) -> list[float]:
    top = max(values)
    powers = [math.exp(value - top) for value in values]
    return [power / sum(powers) for power in powers]


def block_mean(values: np.ndarray, side: int) -> np.ndarray:
    """(H, W): every number is replaced by the mean of its square of the grid."""
    result = np.empty_like(values)
    height, width = values.shape
    for top in range(0, height, side):
        for left in range(0, width, side):
            square = [
                values[y, x]
                for y in range(top, min(top + side, height))
                for x in range(left, min(left + side, width))
            ]
            for y in range(top, min(top + side, height)):
                for x in range(left, min(left + side, width)):
                    result[y, x] = sum(square) / len(square)
    return result


def weighed(
    departures: np.ndarray,
    measured: np.ndarray,
    sharpness: float,
    scale: str,
    patch: int,
    logits: Sequence[float],
) -> np.ndarray:
    """sum_j w_j(x) d_j of one picture, departures (N, C, H, W) measured by others of that shape."""
    n, channels, height, width = departures.shape
    size = np.zeros((n, height, width))
    for j in range(n):
        for y in range(height):
            for x in range(width):
                size[j, y, x] = math.sqrt(sum(float(v) ** 2 for v in measured[j, :, y, x]))
        size[j] = block_mean(size[j], patch)
    usual = []
    for j in range(n):
        numbers = [float(v) for v in size[j].flatten()]
        everything = [float(v) for v in size.flatten()]
        usual.append(
            {
                "mean": sum(numbers) / len(numbers),
                "rms": math.sqrt(sum(v * v for v in numbers) / len(numbers)),
                "max": max(numbers),
                "joint": sum(everything) / len(everything),
            }[scale]
        )
    result = np.zeros((channels, height, width))
    for y in range(height):
        for x in range(width):
            shares = softmax([sharpness * size[j, y, x] / usual[j] + logits[j] for j in range(n)])
            for j in range(n):
                result[:, y, x] += shares[j] * departures[j, :, y, x]
    return result


def selected_with(
    outputs: np.ndarray,
    *,
    strength: float = 1.5,
    sharpness: float = 4.0,
    scale: str = "mean",
    patch: int = 1,
    band_sharpness: tuple[float, float] | None = None,
    logits: Sequence[float] = (),
    guidance: float | None = None,
) -> np.ndarray:
    """Select on (1 + N, B, C, H, W); with ``band_sharpness`` low and high bands by themselves."""
    n = len(outputs) - 1
    departures = outputs[1:] - outputs[0]
    result: np.ndarray = outputs[0].copy()
    half = outputs.shape[1] // 2
    for b in range(outputs.shape[1]):
        one = departures[:, b]
        seen = one
        if guidance is not None:
            without, with_ = departures[:, b % half], departures[:, half + b % half]
            seen = without + guidance * (with_ - without)
        extra = list(logits) or [0.0] * n
        if band_sharpness is None:
            result[b] += strength * weighed(one, seen, sharpness, scale, patch, extra)
            continue
        low = np.stack([[block_mean(channel, 2) for channel in lora] for lora in one])
        low_seen = np.stack([[block_mean(channel, 2) for channel in lora] for lora in seen])
        for part, part_seen, sharp in (
            (low, low_seen, band_sharpness[0]),
            (one - low, seen - low_seen, band_sharpness[1]),
        ):
            result[b] += strength * weighed(part, part_seen, sharp, scale, patch, extra)
    return result


def patchwise_softmin(
    outputs: np.ndarray, patch: int, temperature: float, recentre: float, top: int, halves: bool
) -> np.ndarray:
    """LoRAtorio on (1 + N, B, C, H, W), the base first."""
    _, batch, _, height, width = outputs.shape
    n = len(outputs) - 1
    result: np.ndarray = np.zeros_like(outputs[0])
    for b in range(batch):
        source = batch // 2 + b % (batch // 2) if halves else b
        cosine = np.zeros((n, height, width))
        for j in range(n):
            for y0 in range(0, height, patch):
                for x0 in range(0, width, patch):
                    place = (slice(y0, y0 + patch), slice(x0, x0 + patch))
                    ours = outputs[(j + 1, source, slice(None), *place)].flatten()
                    base = outputs[(0, source, slice(None), *place)].flatten()
                    lengths = np.linalg.norm(ours) * np.linalg.norm(base)
                    cosine[(j, *place)] = ours @ base / lengths if lengths else 1.0
        chosen = sorted(range(n), key=lambda j: cosine[j].mean())[: top or n]
        for y in range(height):
            for x in range(width):
                shares = softmax([-cosine[j, y, x] / temperature for j in chosen])
                for share, j in zip(shares, chosen, strict=True):
                    result[b, :, y, x] += share * outputs[j + 1, b, :, y, x]
        if halves and b < batch // 2:
            result[b] = (1 - recentre) * result[b] + recentre * outputs[0, b]
    return result


def haar_bands(values: np.ndarray) -> list[np.ndarray]:
    """LL, HL, LH, HH of an (H, W) map with even sides, by inner products with the four squares."""
    patterns = ([1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1])
    height, width = values.shape
    bands = []
    for pattern in patterns:
        band = np.zeros((height // 2, width // 2))
        for y in range(height // 2):
            for x in range(width // 2):
                square = values[2 * y : 2 * y + 2, 2 * x : 2 * x + 2].flatten()
                band[y, x] = sum(p * v for p, v in zip(pattern, square, strict=True)) / 2
        bands.append(band)
    return bands


def from_haar(bands: Sequence[np.ndarray]) -> np.ndarray:
    """The map with these four bands: every pattern painted with its coefficient."""
    patterns = ([1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1])
    height, width = bands[0].shape
    values = np.zeros((2 * height, 2 * width))
    for pattern, band in zip(patterns, bands, strict=True):
        for y in range(height):
            for x in range(width):
                square = np.array(pattern).reshape(2, 2) * band[y, x] / 2
                values[2 * y : 2 * y + 2, 2 * x : 2 * x + 2] += square
    return values


def bandwise(now: np.ndarray, before: np.ndarray | None, sharpness: float, top: int) -> np.ndarray:
    """MultLFG's mixture of one level, (N, C, H, W) to (C, H, W), of one picture."""
    n, channels, _, _ = now.shape
    split = [[haar_bands(now[j, c]) for c in range(channels)] for j in range(n)]
    old = None
    if before is not None:
        old = [[haar_bands(before[j, c]) for c in range(channels)] for j in range(n)]
    merged: list[list[np.ndarray]] = [[] for _ in range(channels)]
    for band in range(4):
        change = [1.0] * n
        if old is not None:
            change = [
                math.sqrt(
                    sum(
                        float(((split[j][c][band] - old[j][c][band]) ** 2).sum())
                        for c in range(channels)
                    )
                )
                for j in range(n)
            ]
        most = n if old is None else top or n
        chosen = sorted(range(n), key=lambda j: -change[j])[:most]
        mean = sum(change) / n
        shares = softmax([sharpness * change[j] / mean for j in chosen])
        for c in range(channels):
            total = np.zeros_like(split[0][c][band])
            for share, j in zip(shares, chosen, strict=True):
                total += share * split[j][c][band]
            merged[c].append(total)
    return np.stack([from_haar(bands) for bands in merged])


def klora_call(
    content: np.ndarray, style: np.ndarray, ranks: tuple[int, int], gamma: float, scale: float
) -> str:
    """The published rule at one call of one layer, from the dense updates."""
    count = ranks[0] * ranks[1]
    largest = [sum(sorted(abs(float(v)) for v in m.flatten())[-count:]) for m in (content, style)]
    return "content" if largest[0] / gamma > largest[1] * scale else "style"


def klora_gamma(contents: Sequence[np.ndarray], styles: Sequence[np.ndarray]) -> float:
    """Mean ratio of the sums of all entries, taken again without what is above three means."""
    ratios = [
        float(np.abs(c).sum() / np.abs(s).sum()) for c, s in zip(contents, styles, strict=True)
    ]
    mean = sum(ratios) / len(ratios)
    usual = [ratio for ratio in ratios if ratio <= 3 * mean]
    return sum(usual) / len(usual)


def accumulated(changes: Sequence[float], limit: float) -> list[int]:
    """TeaCache's refresh steps: run when the sum since the last run has reached the limit."""
    steps = [0]
    for step in range(1, len(changes)):
        if sum(changes[steps[-1] + 1 : step + 1]) >= limit:
            steps.append(step)
    return steps
