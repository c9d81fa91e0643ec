"""The algebra of factors against dense matrices."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cmlora.lora import LoRA, Update, stack

sizes = st.integers(1, 9)
unhurried = settings(deadline=None, max_examples=40)


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, ...]:
    """(O, I) or (O, I, kh, kw)."""
    size = (draw(sizes), draw(sizes))
    kernel = draw(st.sampled_from([(), (1, 1), (3, 3), (1, 3)]))
    return (*size, *kernel)


@st.composite
def updates(draw: st.DrawFn, shape: tuple[int, ...] | None = None) -> Update:
    """Any update, Tucker-decomposed convolutions included; rank may exceed both sides."""
    shape = shape or draw(shapes())
    rank, seed = draw(sizes), draw(st.integers(0, 2**31))
    scale = draw(st.floats(-2, 2))
    generator = torch.Generator().manual_seed(seed)

    def normal(*dimensions: int) -> Tensor:
        return torch.randn(dimensions, generator=generator)

    up = normal(shape[0], rank)
    if len(shape) == 4 and draw(st.booleans()):
        middle = draw(sizes)
        return Update(normal(middle, shape[1], 1, 1), up, scale, normal(rank, middle, *shape[2:]))
    return Update(normal(rank, *shape[1:]), up, scale)


def dense(update: Update) -> Tensor:
    """The delta by running the layers themselves on unit inputs, in double precision."""
    down, up = update.down.double(), update.up.double()
    if down.ndim == 2:
        return update.scale * (up @ down)
    outputs = []
    for channel in range(down.shape[1]):
        height, width = update.shape[2:]
        unit = torch.zeros(1, down.shape[1], 2 * height - 1, 2 * width - 1, dtype=torch.double)
        unit[0, channel, height - 1, width - 1] = 1.0
        hidden = torch.nn.functional.conv2d(unit, down)
        if update.mid is not None:
            hidden = torch.nn.functional.conv2d(hidden, update.mid.double())
        response = torch.nn.functional.conv2d(hidden, up[:, :, None, None])
        outputs.append(response[0].flip(-1, -2))  # a convolution answers an impulse mirrored
    return update.scale * torch.stack(outputs, 1)


def close(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((one.double() - other.double()).norm() <= tolerance * (1 + other.double().norm()))


@unhurried
@given(updates())
def test_delta_is_what_the_layers_compute(update: Update) -> None:
    assert update.delta().shape == update.shape == dense(update).shape
    assert close(update.delta(), dense(update))
    assert close(update.folded().delta(), dense(update))
    assert update.folded().mid is None


@unhurried
@given(st.data(), shapes())
def test_inner_product_and_norm_are_dense(data: st.DataObject, shape: tuple[int, ...]) -> None:
    one, other = data.draw(updates(shape)), data.draw(updates(shape))
    expected = float((dense(one) * dense(other)).sum())
    size = float(dense(one).norm() * dense(other).norm())
    assert math.isclose(one.inner(other), expected, abs_tol=1e-5 * (1 + size))
    assert one.inner(other) == pytest.approx(other.inner(one), abs=1e-9 * (1 + size))
    assert math.isclose(one.norm(), float(dense(one).norm()), rel_tol=1e-5, abs_tol=1e-6)


@unhurried
@given(updates(), st.integers(1, 12))
def test_truncation_is_the_best_of_its_rank(update: Update, rank: int) -> None:
    cut = update.truncate(rank)
    values = torch.linalg.svdvals(dense(update).flatten(1))
    best = float(values[rank:].norm())
    assert cut.rank <= rank
    assert cut.shape == update.shape
    error = float((cut.delta().double() - dense(update)).norm())
    assert error == pytest.approx(best, abs=1e-4 * (1 + float(values.norm())))


@unhurried
@given(updates(), st.floats(0, 0.9))
def test_truncation_by_tolerance_loses_no_more_than_that(update: Update, tolerance: float) -> None:
    cut = update.truncate(tolerance=tolerance)
    norm = float(dense(update).norm())
    error = float((cut.delta().double() - dense(update)).norm())
    assert error <= tolerance * norm + 1e-4 * (1 + norm)
    if cut.rank > 1:
        rest = update.singular_values()[cut.rank - 1 :]
        assert float(rest.norm()) > tolerance * norm * (1 - 1e-5)


@unhurried
@given(st.data(), shapes(), st.lists(st.floats(-2, 2), min_size=1, max_size=4))
def test_stack_is_the_weighted_sum(
    data: st.DataObject, shape: tuple[int, ...], weights: list[float]
) -> None:
    members = [
        (
            LoRA(
                f"lora{i}",
                {"unet.a": data.draw(updates(shape)), f"unet.own{i}": data.draw(updates())},
            ),
            w,
        )
        for i, w in enumerate(weights)
    ]
    total = stack(members, "sum")
    expected = sum((w * dense(lora.updates["unet.a"]) for lora, w in members), torch.zeros(shape))
    assert close(total.updates["unet.a"].delta(), expected)
    assert total.updates["unet.a"].rank == sum(lora.updates["unet.a"].rank for lora, _ in members)
    for i, (lora, weight) in enumerate(members):
        own = lora.updates[f"unet.own{i}"]
        assert close(total.updates[f"unet.own{i}"].delta(), weight * dense(own))
    again = stack(members[::-1], "sum")
    assert all(
        torch.equal(total.updates[m].delta(), again.updates[m].delta()) for m in total.updates
    )


def test_stack_of_one_with_weight_one_returns_its_tensors() -> None:
    update = Update(torch.randn(2, 3), torch.randn(4, 2), 0.5)
    only = stack([(LoRA("a", {"unet.x": update}), 1.0)], "b").updates["unet.x"]
    assert only.down is update.down
    assert only.up is update.up
    assert only.scale == update.scale


def test_stack_takes_a_matrix_and_a_1x1_kernel_for_the_same_layer() -> None:
    matrix = Update(torch.randn(2, 3), torch.randn(4, 2))
    kernel = Update(torch.randn(1, 3, 1, 1), torch.randn(4, 1))
    total = stack([(LoRA("a", {"unet.x": matrix}), 1.0), (LoRA("b", {"unet.x": kernel}), 1.0)], "c")
    assert total.updates["unet.x"].shape == (4, 3, 1, 1)
    assert close(
        total.updates["unet.x"].delta().flatten(1), matrix.delta() + kernel.delta().flatten(1)
    )


def test_stack_refuses_different_shapes() -> None:
    one = LoRA("a", {"unet.x": Update(torch.randn(2, 3), torch.randn(4, 2))})
    other = LoRA("b", {"unet.x": Update(torch.randn(2, 3), torch.randn(5, 2))})
    with pytest.raises(ValueError, match=r"unet\.x has different shapes"):
        stack([(one, 1.0), (other, 1.0)], "c")


def test_lora_norm_and_cosine_run_over_all_modules() -> None:
    one = LoRA("a", {m: Update(torch.randn(2, 3), torch.randn(4, 2)) for m in ("unet.x", "unet.y")})
    other = LoRA(
        "b", {m: Update(torch.randn(2, 3), torch.randn(4, 2)) for m in ("unet.y", "unet.z")}
    )
    flat = torch.cat([d.flatten() for d in one.deltas().values()])
    assert one.norm() == pytest.approx(float(flat.norm()), rel=1e-5)
    expected = float((one.updates["unet.y"].delta() * other.updates["unet.y"].delta()).sum())
    assert one.inner(other) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert one.cosine(one) == pytest.approx(1.0)
    assert LoRA("none", {}).cosine(one) == 0.0


def test_half_precision_factors_multiply_in_single() -> None:
    update = Update(torch.randn(8, 16).bfloat16(), torch.randn(16, 8).bfloat16(), 0.25)
    assert update.delta().dtype == torch.float32
    assert torch.equal(update.delta(), (update.up.float() @ update.down.float()) * 0.25)
    assert update.truncate(3).up.dtype == torch.float32


@pytest.mark.parametrize(
    ("down", "up", "mid"),
    [
        ((2, 3), (4, 3), None),
        ((2, 3, 3), (4, 2), None),
        ((2, 3), (4, 2, 1, 1), None),
        ((2, 3, 1, 1), (4, 2), (2, 3, 3, 3)),
        ((2, 3, 3, 3), (4, 2), (2, 2, 3, 3)),
    ],
)
def test_factors_that_do_not_fit_are_refused(
    down: tuple[int, ...], up: tuple[int, ...], mid: tuple[int, ...] | None
) -> None:
    with pytest.raises(ValueError, match=r"down|mid"):
        Update(torch.zeros(down), torch.zeros(up), mid=None if mid is None else torch.zeros(mid))


def test_parts_split_by_component() -> None:
    update = Update(torch.zeros(1, 2), torch.zeros(2, 1))
    lora = LoRA("a", {"unet.b.c": update, "text_encoder.d": update})
    assert {k: list(v) for k, v in lora.parts.items()} == {"text_encoder": ["d"], "unet": ["b.c"]}
