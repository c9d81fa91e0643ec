"""Combining raw outputs of a denoiser."""

from itertools import permutations
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from hypothesis import given, settings
from hypothesis import strategies as st

from cmlora.outputs import combine
from cmlora.plan import Pass, Plan

SHARES = st.lists(st.floats(0.01, 1), min_size=1, max_size=5)


def plan_of(shares: list[float]) -> Plan:
    passes = tuple(Pass({f"lora{i}": 1.0}) for i in range(len(shares)))
    total = sum(shares)
    return Plan(passes, tuple(share / total for share in shares))


def random(count: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn((2, 4, 3, 3), generator=generator).to(dtype) for _ in range(count)]


@settings(max_examples=30, deadline=None)
@given(shares=SHARES, dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_shares_are_a_weighted_mean(shares: list[float], dtype: torch.dtype) -> None:
    plan, tensors = plan_of(shares), random(len(shares), dtype)
    assert isinstance(plan.combine, tuple)
    expected = sum(s * t.double() for s, t in zip(plan.combine, tensors, strict=True))
    result = combine(tensors, plan)
    assert result.dtype == dtype
    torch.testing.assert_close(result, torch.as_tensor(expected).to(dtype))


def test_bfloat16_is_summed_in_float32() -> None:
    one = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16)
    plan = Plan(tuple(Pass({f"l{i:03}": 1.0}) for i in range(1000)), (0.001,) * 1000)
    assert combine([one] * 1000, plan) == one  # a sum in bfloat16 would stop far below


@settings(max_examples=10, deadline=None)
@given(shares=st.lists(st.floats(0.01, 1), min_size=4, max_size=4), seed=st.integers(0, 99))
def test_order_of_passes_changes_no_bit(shares: list[float], seed: int) -> None:
    plan, tensors = plan_of(shares), random(4, seed=seed)
    assert isinstance(plan.combine, tuple)
    expected = combine(tensors, plan)
    for order in permutations(range(4)):
        shuffled = Plan(tuple(plan.passes[i] for i in order), tuple(plan.combine[i] for i in order))
        assert torch.equal(combine([tensors[i] for i in order], shuffled), expected)


def wrap_tensor(tensor: torch.Tensor) -> Any:
    return tensor


def wrap_tuple(tensor: torch.Tensor) -> Any:
    return (tensor, {"more": 1})


def wrap_output(tensor: torch.Tensor) -> Any:
    return UNet2DConditionOutput(sample=tensor)


def wrap_list(tensor: torch.Tensor) -> Any:
    return (list(tensor),)


def unwrap(output: Any) -> torch.Tensor:
    if isinstance(output, list):
        return torch.stack(output)
    if isinstance(output, tuple):
        return unwrap(output[0])
    return output if isinstance(output, torch.Tensor) else unwrap(output.sample)


@pytest.mark.parametrize("wrap", [wrap_tensor, wrap_tuple, wrap_output, wrap_list])
@pytest.mark.parametrize("how", ["shares", "one hot", "function"])
def test_outputs_keep_their_kind(wrap: Any, how: str) -> None:
    tensors = random(3)
    shares: Any = {"shares": (0.2, 0.3, 0.5), "one hot": (0.0, 1.0, 0.0)}.get(how)
    weights = torch.tensor([0.2, 0.3, 0.5]).reshape(3, 1, 1, 1, 1)
    plan = Plan(
        tuple(Pass({name: 1.0}) for name in "abc"),
        shares or (lambda stacked: (stacked * weights).sum(0)),
    )
    result = combine([wrap(tensor) for tensor in tensors], plan)
    assert type(result) is type(wrap(tensors[0]))
    if isinstance(result, tuple):
        assert result[1:] == wrap(tensors[0])[1:]
    if how == "one hot":
        assert torch.equal(unwrap(result), tensors[1])
    else:
        torch.testing.assert_close(unwrap(result), (torch.stack(tensors) * weights).sum(0))


def test_a_function_that_makes_another_shape_is_refused() -> None:
    plan = Plan((Pass({}),), lambda stacked: stacked)
    with pytest.raises(ValueError, match=r"expected \(2, 4, 3, 3\)"):
        combine(random(1), plan)
