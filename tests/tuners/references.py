"""Slow independent references of every tuner: the dense update, in numpy or loops.

Each takes the flattened weight (O, I), the trained and stored tensors, the settings and the seed of
the layer, and returns the update without its strength.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

Array = Any
KERNEL = {(8, 36): 9, (12, 18): 9}  # entries per input channel, of the test layers' weights
Reference = Callable[[Array, dict[str, Array], Any, int], Array]


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def signed(shape: tuple[int, ...], random: torch.Generator) -> Array:
    """Uniform in -1..1."""
    return torch.rand(shape, generator=random).numpy() * 2.0 - 1.0


def nola(weight: Array, t: dict[str, Array], config: Any, seed: int) -> Array:
    o, i = weight.shape
    down = signed((config.r, i), draw(seed)) / math.sqrt(i)
    up = np.zeros((o, config.r))
    random = draw(seed + 1)
    bases = signed((len(t["down"]), config.r * i), random)
    for coefficient, basis in zip(t["down"], bases, strict=True):
        down = down + coefficient * basis.reshape(config.r, i) / math.sqrt(len(t["down"]))
    bases = signed((len(t["up"]), o * config.r), draw(seed + 2))
    for coefficient, basis in zip(t["up"], bases, strict=True):
        up += coefficient * basis.reshape(o, config.r) / math.sqrt(len(t["up"]))
    return up @ down


def randlora(weight: Array, t: dict[str, Array], config: Any, seed: int) -> Array:
    o, i = weight.shape
    short, long = min(o, i), max(o, i)
    random = draw(seed)
    down = signed((config.r, short), random) / math.sqrt(short)
    total = np.zeros((long, short))
    for term in range(math.ceil(short / config.r)):
        up = signed((long, config.r), random) / math.sqrt(config.r)
        total += up @ np.diag(t["inner"][term]) @ down @ np.diag(t["outer"][term])
    return total if total.shape == weight.shape else total.T


def vera(weight: Array, t: dict[str, Array], config: Any, seed: int) -> Array:
    o, i = weight.shape
    down = signed((i, config.r), draw(2 * config.seed)).T * math.sqrt(3 / i)
    up = signed((o, config.r), draw(2 * config.seed + 1)) * math.sqrt(3 / config.r)
    return np.diag(t["output"]) @ up @ np.diag(t["inner"]) @ down


def lora_xs(weight: Array, t: dict[str, Array], config: Any, seed: int) -> Array:
    u, s, vh = np.linalg.svd(weight, full_matrices=False)
    total = np.zeros_like(weight)
    for a in range(len(t["core"])):
        sign_a = np.sign(u[np.abs(u[:, a]).argmax(), a])
        for b in range(len(t["core"])):
            sign_b = np.sign(u[np.abs(u[:, b]).argmax(), b])
            total += t["core"][a, b] * sign_a * sign_b * s[b] * np.outer(u[:, a], vh[b])
    return total


def lora_sb(weight: Array, t: dict[str, Array], config: Any, seed: int) -> Array:
    return t["up"] @ t["core"] @ t["down"]


def pissa(weight: Array, t: dict[str, Array], config: Any, seed: int) -> Array:
    # the leading part of the weight from the eigenvectors of its Gram matrix
    values, vectors = np.linalg.eigh(weight.T @ weight)
    leading = vectors[:, np.argsort(values)[::-1][: config.r]]
    return t["up"] @ t["down"] - weight @ leading @ leading.T / config.strength()


def loldu(weight: Array, t: dict[str, Array], config: Any, seed: int) -> Array:
    """Gaussian elimination with row exchanges, one column at a time."""
    o, i = weight.shape
    upper, order = weight.astype(float).copy(), list(range(o))
    lower = np.zeros((o, min(o, i)))
    for k in range(min(o, i)):
        best = k + int(np.abs(upper[k:, k]).argmax())
        upper[[k, best]] = upper[[best, k]]
        lower[[k, best], :k] = lower[[best, k], :k]
        order[k], order[best] = order[best], order[k]
        lower[k, k] = 1
        for row in range(k + 1, o):
            lower[row, k] = upper[row, k] / upper[k, k]
            upper[row] -= lower[row, k] * upper[k]
    total = np.zeros_like(weight)
    for k, z in enumerate(t["diagonal"]):
        column = np.zeros(o)
        column[order] = lower[:, k]
        total += z * np.outer(column, upper[k] / upper[k, k])
    return total


def svfit(weight: Array, t: dict[str, Array], config: Any, seed: int) -> Array:
    u, _, vh = np.linalg.svd(weight, full_matrices=False)
    return sum(z * np.outer(u[:, k], vh[k]) for k, z in enumerate(t["values"]))


def hydra(weight: Array, t: dict[str, Array], config: Any, seed: int) -> Array:
    return t["up"] @ t["down"] + t["after_up"] @ t["after_down"] @ weight


def block_lora(weight: Array, t: dict[str, Array], config: Any, seed: int) -> Array:
    if config.split == "rank":  # the whole factors, with one down block written N times
        up = np.concatenate(list(t["up"]), 1)
        return up @ np.concatenate([t["down"]] * config.blocks, 0)
    return np.concatenate([t["up"] @ t["down"]] * config.blocks, 1)


def _kernel(t: dict[str, Array], config: Any) -> Array:
    heads, inputs, _ = t["input"].shape
    total = np.zeros((t["output"].shape[1], inputs))
    for o in range(total.shape[0]):
        for i in range(inputs):
            for h in range(heads):
                distance = math.dist(t["input"][h, i], t["output"][h, o])
                total[o, i] += config.factor * (-1) ** h * distance
    return total


def _sparse(kernel: Array, share: float, form: str) -> Array:
    count = round(share * kernel.size)
    if count == 0:
        return kernel
    threshold = np.sort(np.abs(kernel).flatten())[count - 1]
    result = np.zeros_like(kernel)
    for place, k in np.ndenumerate(kernel):
        if abs(k) > threshold:
            survivor = {"hard": k, "official": k * abs(k), "soft": k - np.sign(k) * threshold}
            result[place] = survivor[form]
    return result


def snell(weight: Array, t: dict[str, Array], config: Any, seed: int) -> Array:
    return _sparse(_kernel(t, config), config.sparsity, config.sparsify)


def snella(weight: Array, t: dict[str, Array], config: Any, seed: int) -> Array:
    kernel = _kernel(t, config)
    soft = np.exp(kernel / t["heat"])
    soft /= soft.sum(0)
    mixed = kernel + t["mix"] * soft + t["offset"]
    return _sparse(mixed, float(t["sparsity_share"][0]), config.sparsify)


def s2ft(weight: Array, t: dict[str, Array], config: Any, seed: int) -> Array:
    """Only for one channel per block, chosen at random."""
    kernel = KERNEL.get(weight.shape, 1)
    columns = config.side == "input"
    channels = weight.shape[1] // kernel if columns else weight.shape[0]
    order = torch.randperm(channels, generator=draw(seed)).tolist()
    chosen = sorted(order[: max(1, round(config.share * channels))])
    total = np.zeros_like(weight)
    for number, channel in enumerate(chosen):
        if columns:
            for k in range(kernel):
                total[:, channel * kernel + k] = t["values"][:, number * kernel + k]
        else:
            total[channel] = t["values"][number]
    return total


def low_rank(weight: Array, t: dict[str, Array], config: Any, seed: int) -> Array:
    """An ordinary LoRA, which several methods are at their full rank."""
    return sum(np.outer(u, d) for u, d in zip(t["up"].T, t["down"], strict=True))


def orthogonal(weight: Array, t: dict[str, Array], config: Any, seed: int) -> Array:
    size = weight.shape[1]
    gauss = torch.randn(size, size, generator=draw(config.seed), dtype=torch.float64).numpy()
    basis: list[Array] = []
    for column in gauss.T:  # Gram and Schmidt, twice
        for _ in range(2):
            column = column - sum((b * (b @ column) for b in basis), np.zeros(size))
        basis.append(column / np.linalg.norm(column))
    rows = np.array(basis)[config.slot * config.r : (config.slot + 1) * config.r]
    return t["up"] @ rows


def sltrain(weight: Array, t: dict[str, Array], config: Any, seed: int) -> Array:
    count = int(config.density * weight.size)
    places = sorted(torch.randperm(weight.size, generator=draw(seed))[:count].tolist())
    total = t["up"] @ t["down"]
    for place, value in zip(places, t["values"], strict=True):
        total[place // weight.shape[1], place % weight.shape[1]] += value / config.strength()
    return total


def lost(weight: Array, t: dict[str, Array], config: Any, seed: int) -> Array:
    values, vectors = np.linalg.eigh(weight.T @ weight)
    leading = vectors[:, np.argsort(values)[::-1][: config.r]]
    start = weight @ leading @ leading.T
    norms = [float(np.linalg.norm(column)) for column in (weight - start).T]
    count = round(config.columns * weight.shape[1])
    chosen = sorted(sorted(range(len(norms)), key=lambda c: -norms[c])[:count])
    total = config.balance * (t["up"] @ t["down"] - start)
    for number, column in enumerate(chosen):
        total[:, column] += (1 - config.balance) * t["columns"][:, number]
    return total


def _rotation(upper: Array, size: int) -> Array:
    skew = np.zeros((size, size))
    values = iter(upper)
    for row in range(size):
        for column in range(row + 1, size):
            value = next(values)
            skew[row, column], skew[column, row] = value, -value
    return (np.eye(size) - skew) @ np.linalg.inv(np.eye(size) + skew)


def oft(weight: Array, t: dict[str, Array], config: Any, seed: int) -> Array:
    n = weight.shape[1]
    size = n // len(t["skew"])
    rotation = np.zeros((n, n))
    for block, upper in enumerate(t["skew"]):
        where = slice(block * size, (block + 1) * size)
        rotation[where, where] = _rotation(upper, size)
    return weight @ rotation.T - weight


def boft(weight: Array, t: dict[str, Array], config: Any, seed: int) -> Array:
    n, size = weight.shape[1], config.r
    turned = weight
    for order, uppers in enumerate(t["skew"]):
        apart, rotation = size**order, np.zeros((n, n))
        for first in range(n):
            if (first // apart) % size:
                continue  # not the first of a block
            number = (first // (apart * size)) * apart + first % apart
            places = [first + k * apart for k in range(size)]
            rotation[np.ix_(places, places)] = _rotation(uppers[number], size)
        turned = turned @ rotation
    return np.diag(1 + t["scale"]) @ turned - weight


def miss(weight: Array, t: dict[str, Array], config: Any, seed: int) -> Array:
    total = np.zeros_like(weight)
    shard, r = t["shard"], config.r
    if config.form == "bat":
        for a in range(weight.shape[0] // r):
            for b in range(weight.shape[1] // r):
                where = slice(a * r, (a + 1) * r), slice(b * r, (b + 1) * r)
                total[where] = (weight[where] + np.eye(r)) @ shard[a]
        return total
    for o, i in np.ndindex(*weight.shape):
        total[o, i] = shard[i % r, o % shard.shape[1]]
    return total


def ia3(weight: Array, t: dict[str, Array], config: Any, seed: int) -> Array:
    return np.diag(t["scale"]) @ weight


REFERENCES: dict[str, Reference] = {
    "nola": nola,
    "randlora": randlora,
    "vera": vera,
    "lora_xs": lora_xs,
    "lora_sb": lora_sb,
    "pissa": pissa,
    "loldu": loldu,
    "svfit": svfit,
    "hydra": hydra,
    "block_lora": block_lora,
    "snell": snell,
    "snella": snella,
    "s2ft": s2ft,
    "dylora": low_rank,
    "maestro": low_rank,
    "allora": low_rank,
    "orthogonal": orthogonal,
    "sltrain": sltrain,
    "lost": lost,
    "oft": oft,
    "boft": boft,
    "miss": miss,
    "ia3": ia3,
}
