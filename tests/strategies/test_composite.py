"""Composite: the plain mean."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmlora.plan import Member, Pass
from cmlora.strategies import schedule


@settings(deadline=None)
@given(st.integers(2, 9))
def test_one_pass_per_lora_with_equal_shares(n: int) -> None:
    members = [Member(f"lora{i}", (i + 1) / 10) for i in range(n)]
    for plan in schedule("composite", members, 5):
        assert plan.passes == tuple(Pass({member.name: member.weight}) for member in members)
        assert plan.combine == (1 / n,) * n


@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_the_mean_before_guidance_is_the_papers_mean_after_guidance(scale: float) -> None:
    plan = schedule("composite", [Member("a"), Member("b"), Member("c")], 1)[0]
    assert isinstance(plan.combine, tuple)
    outputs = torch.randn(3, 2, 4, 8, 8, dtype=torch.float64)  # uncond and cond in the batch
    raw = sum(share * output for share, output in zip(plan.combine, outputs, strict=True))
    assert isinstance(raw, torch.Tensor)
    ours = raw[0] + scale * (raw[1] - raw[0])
    papers = torch.stack([e[0] + scale * (e[1] - e[0]) for e in outputs]).mean(0)
    torch.testing.assert_close(ours, papers)
