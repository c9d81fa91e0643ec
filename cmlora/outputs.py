"""The output of a denoiser, whatever its shape: combine several into one of the same shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from cmlora.latents import MAPS, Layout
from cmlora.plan import Combine, Compare, Plan


def combine(
    outputs: Sequence[Any], plan: Plan, maps: Layout = MAPS, previous: torch.Tensor | None = None
) -> Any:
    """One denoiser output from the outputs of a plan's passes.

    Sums run in fp32 (or wider) over the passes sorted by key, whatever the order of the passes,
    so that the same passes in another order give the same bits. A pass with share 0 is left out
    of the sum, and one pass with share 1 is returned as it is.

    Args:
        outputs: one output per pass: a tensor (B, C, H, W), a tuple that begins with it, a
            diffusers output with a ``sample``, or a list of one tensor per picture.
        plan: says how to combine them.
        maps: makes maps (B, C, H, W) of the tensors for a plan that combines by a function.
        previous: the outputs of the step before, (P, B, ...), for a plan that compares.

    Raises:
        ValueError: if a combining function returns another shape.
    """
    leaves = [leaf(output) for output in outputs]
    rule = plan.combine
    if plan.compare is not None:
        rule = _against(plan.compare, None if previous is None else maps.unpack(previous))
    if isinstance(rule, tuple):
        order = sorted(range(len(outputs)), key=lambda i: _order(plan, i))
        terms = [(rule[i], leaves[i]) for i in order if rule[i] != 0.0]
        if len(terms) == 1 and terms[0][0] == 1.0:
            result = terms[0][1]
        elif isinstance(leaves[0], list):
            each = range(len(leaves[0]))
            result = [weighted_sum([(share, value[i]) for share, value in terms]) for i in each]
        else:
            result = weighted_sum(terms)
        return replace_leaf(outputs[0], result)
    if isinstance(leaves[0], list) and len({each.shape for each in leaves[0]}) > 1:
        parts = [stack([value[i].unsqueeze(0) for value in leaves]) for i in range(len(leaves[0]))]
        result = [_checked(rule(part), part, leaves[0][0])[0] for part in parts]
        return replace_leaf(outputs[0], result)
    stacked = stack([leaf_tensor(output) for output in outputs])
    unpacked = maps.unpack(stacked)
    like = leaf_tensor(outputs[0])
    mixed = maps.pack(_checked(rule(unpacked), unpacked, like), like)
    return replace_leaf(outputs[0], list(mixed) if isinstance(leaves[0], list) else mixed)


def _against(compare: Compare, before: torch.Tensor | None) -> Combine:
    """A comparison with known outputs as a function of the new ones alone."""
    return lambda outputs: compare(outputs, before)


def weighted_sum(terms: Sequence[tuple[float, torch.Tensor]]) -> torch.Tensor:
    """``sum(share * tensor)`` in the given order, accumulated in fp32 or wider.

    Returns:
        a tensor of the first tensor's dtype.
    """
    dtype = terms[0][1].dtype
    wide = torch.promote_types(dtype, torch.float32)
    total = terms[0][1].to(wide) * terms[0][0]
    for share, tensor in terms[1:]:
        total = total + tensor.to(wide) * share
    return total.to(dtype)


def stack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Outputs (B, ...) of P passes as one tensor (P, B, ...) in fp32 or wider."""
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    return torch.stack([tensor.to(wide) for tensor in tensors])


def moved(output: Any, distance: torch.Tensor) -> Any:
    """An output with something added to the tensor inside, computed in fp32 or wider."""
    tensor = leaf_tensor(output)
    value = (tensor.to(distance.dtype) + distance).to(tensor.dtype)
    return replace_leaf(output, list(value) if isinstance(leaf(output), list) else value)


def leaf(output: Any) -> Any:
    """The tensor (or list of tensors) inside a denoiser's output."""
    if isinstance(output, torch.Tensor | list):
        return output
    if isinstance(output, tuple):
        return leaf(output[0])
    return leaf(output.sample)


def leaf_tensor(output: Any) -> torch.Tensor:
    """The tensor inside a denoiser's output, (B, ...); pictures in a list must have one size."""
    found = leaf(output)
    return torch.stack(found) if isinstance(found, list) else found


def replace_leaf(output: Any, value: Any) -> Any:
    """An output of the same type as ``output`` with another tensor inside."""
    if isinstance(output, torch.Tensor | list):
        return value
    if isinstance(output, tuple):
        return (replace_leaf(output[0], value), *output[1:])
    return dataclasses.replace(output, sample=replace_leaf(output.sample, value))


def _order(plan: Plan, index: int) -> tuple[str, tuple[tuple[str, str], ...]]:
    """Where a pass stands in a sum."""
    single = plan.passes[index]
    return single.key, tuple(sorted((name, repr(w)) for name, w in single.weights.items()))


def _checked(result: torch.Tensor, stacked: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The result of a combining function in the dtype of the model."""
    if result.shape != stacked.shape[1:]:
        raise ValueError(
            f"the plan's combine made {tuple(result.shape)} of {tuple(stacked.shape)}, "
            f"expected {tuple(stacked.shape[1:])}"
        )
    return result.to(like.dtype)
