"""Every form as a trainer stores it, and what it means, computed the plain way.

The references follow the definitions with dense matrices and loops over indices; they share no
code with the package.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

RANK, ALPHA = 3, 2.0

Tensors = dict[str, Tensor]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """One form.

    Args:
        make: tensors by the end of their key, for a weight of a shape.
        delta: what they do to a weight (O, I[, kh, kw]).
        bias: what they do to a bias (O,).
        kernels: whether it is defined for kernels of convolutions.
        base: whether it depends on the weight.
    """

    make: Callable[[Shape], Tensors]
    delta: Callable[[Tensors, Tensor], Tensor]
    bias: Callable[[Tensors, Tensor], Tensor] | None = None
    kernels: bool = True
    base: bool = False


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape) * 0.4


def alpha() -> Tensor:
    return torch.tensor(ALPHA)


# ------------------------------------------------------------------ LoRA


def lora(shape: Shape) -> Tensors:
    ones = [1] * (len(shape) - 2)
    return {
        "lora_down.weight": noise(RANK, *shape[1:]),
        "lora_up.weight": noise(shape[0], RANK, *ones),
        "alpha": alpha(),
    }


def lora_delta(t: Tensors, weight: Tensor) -> Tensor:
    product = t["lora_up.weight"].reshape(-1, RANK) @ t["lora_down.weight"].reshape(RANK, -1)
    return (ALPHA / RANK * product).reshape(weight.shape)


def tucker(shape: Shape) -> Tensors:
    return {
        "lora_down.weight": noise(RANK, shape[1], 1, 1),
        "lora_up.weight": noise(shape[0], RANK, 1, 1),
        "lora_mid.weight": noise(RANK, RANK, *(shape[2:] or (1, 1))),
        "alpha": alpha(),
    }


def tucker_delta(t: Tensors, weight: Tensor) -> Tensor:
    up, mid, down = (t[f"lora_{k}.weight"] for k in ("up", "mid", "down"))
    total = torch.zeros(len(up), down.shape[1], *mid.shape[2:])
    for r in range(RANK):
        for q in range(RANK):
            outer = torch.outer(up[:, r, 0, 0], down[q, :, 0, 0])
            total += outer[:, :, None, None] * mid[r, q]
    return (ALPHA / RANK * total).reshape(weight.shape)


# ------------------------------------------------------------------ LyCORIS


def loha(shape: Shape) -> Tensors:
    columns = weight_columns(shape)
    return {
        "hada_w1_a": noise(shape[0], RANK),
        "hada_w1_b": noise(RANK, columns),
        "hada_w2_a": noise(shape[0], RANK),
        "hada_w2_b": noise(RANK, columns),
        "alpha": alpha(),
    }


def loha_delta(t: Tensors, weight: Tensor) -> Tensor:
    one, two = (t[f"hada_w{i}_a"] @ t[f"hada_w{i}_b"] for i in (1, 2))
    return (ALPHA / RANK * one * two).reshape(weight.shape)


def loha_core(shape: Shape) -> Tensors:
    found = {"alpha": alpha()}
    for i in (1, 2):
        found[f"hada_t{i}"] = noise(RANK, RANK, *(shape[2:] or (1, 1)))
        found[f"hada_w{i}_a"], found[f"hada_w{i}_b"] = noise(RANK, shape[0]), noise(RANK, shape[1])
    return found


def loha_core_delta(t: Tensors, weight: Tensor) -> Tensor:
    both = []
    for i in (1, 2):
        core, up, down = t[f"hada_t{i}"], t[f"hada_w{i}_a"], t[f"hada_w{i}_b"]
        total = torch.zeros(up.shape[1], down.shape[1], *core.shape[2:])
        for r in range(RANK):
            for q in range(RANK):
                total += torch.outer(up[r], down[q])[:, :, None, None] * core[r, q]
        both.append(total)
    return (ALPHA / RANK * both[0] * both[1]).reshape(weight.shape)


def lokr(small: bool, large: bool, core: bool = False) -> Callable[[Shape], Tensors]:
    """LoKr whose matrices are products where asked for; 2 of the outputs and inputs are C's."""

    def make(shape: Shape) -> Tensors:
        rows, columns, kernel = shape[0] // 2, shape[1] // 2, shape[2:]
        found = {"alpha": alpha()}
        if small:
            found |= {"lokr_w1_a": noise(2, RANK), "lokr_w1_b": noise(RANK, 2)}
        else:
            found |= {"lokr_w1": noise(2, 2)}
        if core:
            found |= {
                "lokr_t2": noise(RANK, RANK, *(kernel or (1, 1))),
                "lokr_w2_a": noise(RANK, rows),
                "lokr_w2_b": noise(RANK, columns),
            }
        elif large:
            width = columns * weight_columns((1, 1, *kernel))
            found |= {"lokr_w2_a": noise(rows, RANK), "lokr_w2_b": noise(RANK, width)}
        else:
            found |= {"lokr_w2": noise(rows, columns, *kernel)}
        return found

    return make


def lokr_delta(t: Tensors, weight: Tensor) -> Tensor:
    small = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    rows, columns = weight.shape[0] // 2, weight.shape[1] // 2
    kernel = weight.shape[2:]
    if "lokr_t2" in t:
        large = torch.zeros(rows, columns, *t["lokr_t2"].shape[2:])
        for r in range(RANK):
            for q in range(RANK):
                outer = torch.outer(t["lokr_w2_a"][r], t["lokr_w2_b"][q])
                large += outer[:, :, None, None] * t["lokr_t2"][r, q]
        large = large.reshape(rows, columns, *kernel)
    elif "lokr_w2" in t:
        large = t["lokr_w2"]
    else:
        large = (t["lokr_w2_a"] @ t["lokr_w2_b"]).reshape(rows, columns, *kernel)
    scale = 1.0 if "lokr_w1" in t and "lokr_w2" in t else ALPHA / RANK
    result = torch.zeros_like(weight)
    for a in range(2):
        for b in range(2):
            place = result[a * rows : (a + 1) * rows, b * columns : (b + 1) * columns]
            place += scale * small[a, b] * large
    return result


def full(shape: Shape) -> Tensors:
    return {"diff": noise(*shape), "diff_b": noise(shape[0])}


def ia3(on_input: bool) -> Callable[[Shape], Tensors]:
    def make(shape: Shape) -> Tensors:
        width = shape[1 if on_input else 0]
        plain = (width,) if len(shape) == 2 else (1, width, 1, 1)
        return {"weight": noise(*plain), "on_input": torch.tensor(int(on_input))}

    return make


def ia3_delta(t: Tensors, weight: Tensor) -> Tensor:
    factor, result = t["weight"].flatten(), torch.zeros_like(weight)
    for n, value in enumerate(factor):
        if t["on_input"]:
            result[:, n] = value * weight[:, n]
        else:
            result[n] = value * weight[n]
    return result


def glora(shape: Shape) -> Tensors:
    ones = [1] * (len(shape) - 2)
    return {
        "a1.weight": noise(shape[1], RANK, *ones),
        "a2.weight": noise(RANK, shape[1], *ones),
        "b1.weight": noise(shape[0], RANK, *ones),
        "b2.weight": noise(RANK, *shape[1:]),
        "alpha": alpha(),
    }


def glora_delta(t: Tensors, weight: Tensor) -> Tensor:
    first = t["a1.weight"].reshape(-1, RANK) @ t["a2.weight"].reshape(RANK, -1)
    moved = torch.stack([weight[:, i] for i in range(weight.shape[1])], -1) @ first
    moved = moved.movedim(-1, 1)
    product = t["b1.weight"].reshape(-1, RANK) @ t["b2.weight"].reshape(RANK, -1)
    return ALPHA / RANK * (product.reshape(weight.shape) + moved)


def oft(rescale: bool, bound: float) -> Callable[[Shape], Tensors]:
    def make(shape: Shape) -> Tensors:
        found = {"oft_blocks": noise(shape[0] // 4, 4, 4), "alpha": torch.tensor(bound)}
        if rescale:
            found["rescale"] = 1 + noise(shape[0], *[1] * (len(shape) - 1))
        return found

    return make


def turns(blocks: Tensor, bound: float, outputs: int) -> Tensor:
    skew = blocks - blocks.transpose(-1, -2)
    if bound and skew.norm() > bound * outputs:
        skew = skew * (bound * outputs / skew.norm())
    one = torch.eye(blocks.shape[-1])
    result: Tensor = (one + skew) @ torch.linalg.inv(one - skew)
    return result


def oft_delta(t: Tensors, weight: Tensor) -> Tensor:
    found = turns(t["oft_blocks"], float(t["alpha"]), len(weight))
    turned: Tensor = torch.block_diag(*found).T @ weight.flatten(1)  # type: ignore[no-untyped-call]
    if "rescale" in t:
        turned = t["rescale"].reshape(-1, 1) * turned
    return turned.reshape(weight.shape) - weight


def boft(shape: Shape) -> Tensors:
    return {"oft_blocks": noise(2, shape[0] // 4, 4, 4), "alpha": torch.tensor(0.0)}


def boft_delta(t: Tensors, weight: Tensor) -> Tensor:
    rows = weight.flatten(1).clone()
    for stage, found in enumerate(turns(t["oft_blocks"], 0.0, len(weight))):
        apart = 2 ** (stage + 1)  # half of a block of four, doubled at each stage
        order = []
        for start in range(0, len(rows), 2 * apart):
            for offset in range(apart):
                order += [start + offset, start + apart + offset]
        taken = torch.block_diag(*found) @ rows[order]  # type: ignore[no-untyped-call]
        for place, row in zip(order, taken, strict=True):
            rows[place] = row
    return rows.reshape(weight.shape) - weight


# ------------------------------------------------------------------ DoRA of any form


def dora(per_output: bool) -> Callable[[Shape], Tensors]:
    def make(shape: Shape) -> Tensors:
        ones = [1] * (len(shape) - 2)
        size = (shape[0], 1, *ones) if per_output else (1, shape[1], *ones)
        return {**lora(shape), "dora_scale": 1 + noise(*size).abs()}

    return make


def dora_delta(t: Tensors, weight: Tensor) -> Tensor:
    moved = weight + lora_delta(t, weight)
    result = torch.empty_like(weight)
    lengths = t["dora_scale"].flatten()
    per_output = t["dora_scale"].shape[0] == len(weight)
    for n, length in enumerate(lengths):
        if per_output:
            result[n] = length * moved[n] / moved[n].norm()
        else:
            result[:, n] = length * moved[:, n] / moved[:, n].norm()
    return result - weight


def decomposed_loha(shape: Shape) -> Tensors:
    return {**loha(shape), "dora_scale": 1 + noise(shape[0], *[1] * (len(shape) - 1)).abs()}


def decomposed_loha_delta(t: Tensors, weight: Tensor) -> Tensor:
    moved = (weight + loha_delta(t, weight)).flatten(1)
    lengths: Tensor = t["dora_scale"].reshape(-1, 1) / moved.norm(dim=1, keepdim=True)
    return (moved * lengths).reshape(weight.shape) - weight


def with_bias(shape: Shape) -> Tensors:
    found = lora(shape)
    ends = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
    return {
        **{ours: found[theirs] for ours, theirs in ends.items()},
        "alpha": alpha(),
        "lora_B.bias": noise(shape[0]),
    }


def with_bias_delta(t: Tensors, weight: Tensor) -> Tensor:
    names = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}
    return lora_delta({ours: t[theirs] for ours, theirs in names.items()}, weight)


def weight_columns(shape: Shape) -> int:
    return math.prod(shape[1:])


CASES = {
    "lora": Case(lora, lora_delta),
    "tucker": Case(tucker, tucker_delta),
    "loha": Case(loha, loha_delta),
    "loha_core": Case(loha_core, loha_core_delta),
    "lokr": Case(lokr(False, True), lokr_delta),
    "lokr_both": Case(lokr(True, True), lokr_delta),
    "lokr_small": Case(lokr(True, False), lokr_delta),
    "lokr_whole": Case(lokr(False, False), lokr_delta),
    "lokr_core": Case(lokr(False, False, core=True), lokr_delta),
    "full": Case(full, lambda t, w: t["diff"], lambda t, b: t["diff_b"]),
    "ia3": Case(ia3(False), ia3_delta, base=True),
    "ia3_input": Case(ia3(True), ia3_delta, base=True),
    "glora": Case(glora, glora_delta, base=True),
    "oft": Case(oft(False, 0.0), oft_delta, base=True),
    "oft_bound": Case(oft(True, 1e-2), oft_delta, base=True),
    "boft": Case(boft, boft_delta, base=True),
    "dora": Case(dora(True), dora_delta, base=True),
    "dora_input": Case(dora(False), dora_delta, base=True),
    "dora_loha": Case(decomposed_loha, decomposed_loha_delta, base=True),
    "lora_bias": Case(with_bias, with_bias_delta, lambda t, b: ALPHA / RANK * t["lora_B.bias"]),
}
