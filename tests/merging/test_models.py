"""Whole models: units in step, merged by weights or by least squares, and the way between them."""

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention import FeedForward
from torch import Tensor, nn
from torch.func import functional_call

from cmlora.adapters.analysis.merging import barrier, between, mergeability, score
from cmlora.adapters.merging.factors import Pair
from cmlora.adapters.merging.models import merge_models
from cmlora.adapters.merging.rebasin import (
    best_order,
    combined,
    match,
    similarity,
    straight_through,
)
from cmlora.adapters.merging.units import (
    Kind,
    Order,
    Place,
    Units,
    identity,
    reorder,
    rows,
    shuffled,
    units_of,
)
from cmlora.errors import CmloraError
from tests import tiny
from tests.merging.makers import SHAPES, make, permuted, regauged


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def answer(unet: nn.Module, state: Mapping[str, Tensor] | None = None) -> Tensor:
    arguments = (tiny.latents(), 10, random(1, 16, 16))
    with torch.no_grad():
        found = functional_call(unet, dict(state or unet.state_dict()), arguments)
    first = found.sample
    assert isinstance(first, Tensor)
    return first


def scramble(model: nn.Module, seed: int = 1) -> tuple[dict[str, Tensor], dict[str, Order]]:
    generator = torch.Generator().manual_seed(seed)
    state, orders = dict(model.state_dict()), {}
    for units in units_of(model):
        orders[units.name] = shuffled(units, generator)
        state = reorder(state, units, orders[units.name])
    return state, orders


@pytest.mark.parametrize("which", range(4))
def test_every_declared_order_leaves_the_function_alone(which: int) -> None:
    """Block by block, for one of four sorts of blocks at a time."""
    unet = tiny.unet_sd15()
    before = answer(unet)
    sorts = ("attn", ".ff", "resnets", "time_embedding")
    chosen = [
        u for u in units_of(unet) if sorts[which] in u.name and (which or ".ff" not in u.name)
    ]
    assert chosen
    generator = torch.Generator().manual_seed(which)
    state = dict(unet.state_dict())
    for units in chosen:
        state = reorder(state, units, shuffled(units, generator))
    changed = [
        key for key, tensor in unet.state_dict().items() if not torch.equal(tensor, state[key])
    ]
    assert len(changed) >= 2 * len(chosen)
    assert torch.allclose(answer(unet, state), before, atol=1e-5)
    for key in changed:
        values = (
            [torch.linalg.svdvals(s[key].double().flatten(1)) for s in (state, unet.state_dict())]
            if state[key].ndim > 1
            else [s[key].sort().values for s in (state, unet.state_dict())]
        )
        assert torch.allclose(values[0], values[1], rtol=0, atol=1e-10)


def test_text_encoders_have_units_too() -> None:
    encoder = tiny.text_encoder()
    state, _ = scramble(encoder)
    tokens = torch.arange(16)[None]
    with torch.no_grad():
        before = encoder(tokens)[0]
        after = functional_call(encoder, state, (tokens,))[0]
    assert torch.allclose(before, after, atol=1e-5)
    names = {units.name.rpartition(".")[2] for units in units_of(encoder)}
    assert names == {"mlp", "self_attn"}


def test_channels_may_not_leave_their_group() -> None:
    """What is not declared does change the function: groups and heads are no decoration."""
    unet = tiny.unet_sd15()
    before = answer(unet)
    for part in ("resnets.0", "attn1"):
        units = next(u for u in units_of(unet) if u.name.endswith(part))
        length = units.count * units.kinds[0].size
        flat = torch.randperm(length, generator=torch.Generator().manual_seed(0))
        everything = Units(
            units.name, 1, (units.kinds[0].__class__(length, units.kinds[0].places),)
        )
        state = reorder(
            dict(unet.state_dict()), everything, Order(torch.zeros(1).long(), (flat[None],))
        )
        assert float((answer(unet, state) - before).abs().max()) > 1e-5


def test_a_scrambled_copy_is_found_again() -> None:
    unet = tiny.unet_sd15()
    state, orders = scramble(unet)
    units = units_of(unet)
    reference = dict(unet.state_dict())
    found = match(reference, state, units)
    for own in units:
        both = combined(orders[own.name], found.orders[own.name])
        for kind in range(len(own.kinds)):
            assert torch.equal(both.flat(kind), identity(own).flat(kind))
    assert all(torch.equal(tensor, reference[key]) for key, tensor in found.state.items())
    assert min(found.similarity.values()) == pytest.approx(1, abs=1e-9)

    def loss(t: float) -> float:
        return float(
            (answer(unet, between(reference, found.state, t)) - answer(unet)).square().mean()
        )

    assert barrier(loss, 3).height <= 1e-6
    apart = barrier(
        lambda t: float(
            (answer(unet, between(reference, state, t)) - answer(unet)).square().mean()
        ),
        3,
    )
    assert apart.height > 1e-5


def test_the_order_is_the_best_of_all() -> None:
    """Two heads of three dimensions: every allowed order, tried."""
    from itertools import permutations, product

    units = Units("a", 2, (Kind(3, (Place("w", 0), Place("v", 1))), Kind(1, (Place("b"),))))
    one = {"w": random(6, 4), "v": random(5, 6, seed=1), "b": random(2, seed=2)}
    other = {"w": random(6, 4, seed=3), "v": random(5, 6, seed=4), "b": random(2, seed=5)}
    order, gain = best_order(one, other, units)

    def inner(state: Mapping[str, Tensor]) -> float:
        return sum(float((one[key].double() * state[key].double()).sum()) for key in one)

    inside = list(permutations(range(3)))
    best = -float("inf")
    for sets, first, second in product(permutations(range(2)), inside, inside):
        tried = Order(torch.tensor(sets), (torch.tensor([first, second]), torch.zeros(2, 1).long()))
        best = max(best, inner(reorder(other, units, tried)))
    assert inner(reorder(other, units, order)) == pytest.approx(best, rel=1e-9)
    assert gain > 0
    assert similarity(one, reorder(other, units, order), units) > similarity(one, other, units)
    assert rows(one, Place("v", 1), 6).shape == (6, 5)


def test_what_an_order_gains_is_in_the_singular_vectors() -> None:
    """<W_a, P W_b> = sum_ij s_i s'_j (u_i . P u'_j)(v_i . v'_j), which matching maximises."""
    units = Units("a", 1, (Kind(9, (Place("w"),)),))
    one, other = {"w": random(9, 7).double()}, {"w": random(9, 7, seed=1).double()}
    found = best_order(one, other, units)[0]
    for order in (identity(units), shuffled(units, torch.Generator().manual_seed(3)), found):
        moved = reorder(other, units, order)["w"]
        u, s, vh = torch.linalg.svd(one["w"], full_matrices=False)
        u_other, s_other, vh_other = torch.linalg.svd(other["w"], full_matrices=False)
        turned = u_other[order.flat(0)]
        spread = torch.outer(s, s_other) * (u.T @ turned) * (vh @ vh_other.T)
        assert float((one["w"] * moved).sum()) == pytest.approx(
            float(spread.sum()), rel=0, abs=1e-10
        )
        values = torch.linalg.svdvals(moved)
        assert torch.allclose(values, s_other, rtol=0, atol=1e-10)
    inner = [
        float((one["w"] * reorder(other, units, o)["w"]).sum()) for o in (identity(units), found)
    ]
    assert inner[1] > inner[0]


def feeds(seed: int, noise: float = 0.0) -> FeedForward:
    torch.manual_seed(seed)
    found = FeedForward(8, mult=3).eval()
    for parameter in found.parameters():
        parameter.data += noise * torch.randn_like(parameter)
    return found


def noisy_copy(model: nn.Module, noise: float) -> nn.Module:
    """Scrambled, with other values."""
    state, _ = scramble(model)
    copied = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(5)
    copied.load_state_dict(
        {
            k: t + noise * torch.randn(t.shape, generator=generator) * t.std()
            for k, t in state.items()
        }
    )
    return copied


def test_a_model_and_its_scrambled_copy_merge_into_it() -> None:
    model = feeds(0).double()
    found = merge_models(model, noisy_copy(model, 0.0), [lambda m: m(random(64, 8).double())])
    for key, tensor in model.state_dict().items():
        assert torch.allclose(tensor, found.model.state_dict()[key], rtol=0, atol=1e-9)
    assert max(after for _, after in found.residuals.values()) < 1e-9


def test_least_squares_beats_the_mean() -> None:
    model = feeds(0)
    other = noisy_copy(model, 0.5)
    x = random(200, 8)
    found = merge_models(model, other, [lambda m: m(x)])
    wanted = (model(x) + other(x)).detach() / 2
    mean = merge_models(model, other).model
    errors = [float((m(x) - wanted).square().mean()) for m in (found.model, mean)]
    assert errors[0] < errors[1]
    assert all(after <= before * (1 + 1e-9) for before, after in found.residuals.values())
    # The last layer by hand: the mean of both inputs to the mean of both outputs.
    units = units_of(model)
    twin = copy.deepcopy(other)
    twin.load_state_dict(match(dict(model.state_dict()), dict(other.state_dict()), units).state)
    hidden: list[Any] = [m.get_submodule("net.0") for m in (model, twin)]
    inputs = (hidden[0](x) + hidden[1](x)) / 2
    system = torch.cat([inputs, torch.ones(200, 1)], 1).detach().double().numpy()
    best = np.linalg.lstsq(system, wanted.double().numpy(), rcond=None)[0]
    weight = found.model.get_parameter("net.2.weight").detach()
    assert np.allclose(weight.numpy(), best[:-1].T, atol=1e-3)


def test_units_that_do_not_match_may_be_kept() -> None:
    model, other = feeds(0), feeds(1)
    x = random(300, 8)
    wanted = (model(x) + other(x)).detach() / 2
    errors, widths = [], []
    for share in (0.0, 0.5, 1.0):
        found = merge_models(model, other, [lambda m: m(x)], separate=share)
        errors.append(float((found.model(x) - wanted).square().mean() / wanted.square().mean()))
        widths.append(found.model.get_parameter("net.2.weight").shape[1])
    assert widths == [24, 36, 48]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-6  # side by side, both are there
    halves = merge_models(model, other, separate=1.0).model
    assert torch.allclose(halves(x), wanted, atol=1e-5)


def test_following_the_loss_is_no_worse_than_weights_alone() -> None:
    model, other = feeds(0), noisy_copy(feeds(0), 0.6)
    x = random(100, 8)
    wanted = (model(x) + other(x)).detach() / 2

    def loss(state: Mapping[str, Tensor]) -> Tensor:
        found: Tensor = functional_call(model, dict(state), (x,))
        error: Tensor = (found - wanted).square().mean()
        return error

    reference, second = dict(model.state_dict()), dict(other.state_dict())
    units = units_of(model)
    plain = match(reference, second, units)
    found = straight_through(reference, second, units, loss, steps=8)
    with torch.no_grad():
        before = float(loss(between(reference, plain.state, 0.5)))
        after = float(loss(between(reference, found.state, 0.5)))
    assert found.losses[0] == pytest.approx(before, rel=1e-5)
    assert after <= before * (1 + 1e-6)
    assert after == pytest.approx(min(found.losses), rel=1e-5)


def test_models_of_different_kinds() -> None:
    with pytest.raises(CmloraError, match="different kinds"):
        merge_models(feeds(0), nn.Linear(3, 3))
    with pytest.raises(CmloraError, match=r"net\.0\.proj\.weight is"):
        merge_models(feeds(0), FeedForward(8, mult=2))
    with pytest.raises(CmloraError, match="separate is 2"):
        merge_models(feeds(0), feeds(1), separate=2.0)
    with pytest.raises(CmloraError, match="1 step or more"):
        straight_through({}, {}, (), lambda _: torch.zeros(()), steps=0)


def a_pair(seed: int, rows_: int = 30, columns: int = 25, rank: int = 4) -> Pair:
    return Pair(
        random(rows_, rank, seed=seed).double(), random(rank, columns, seed=seed + 99).double()
    )


def test_a_score_of_one_for_the_same_and_nothing_for_strangers() -> None:
    one = a_pair(0)
    for factor in (0.1, 1.0, 7.0):
        assert score(one, Pair(one.up * factor, one.down)) == pytest.approx(1)
    assert score(one, Pair(-one.up, one.down)) == pytest.approx(-1)
    assert abs(score(one, a_pair(1))) < 0.2
    u = torch.linalg.qr(random(30, 30).double())[0]
    assert score(Pair(u[:, :3], u[:3]), Pair(u[:, 3:6], u[3:6])) == pytest.approx(0, abs=1e-12)
    # A weak direction counts only if it is asked for.
    both = Pair(u[:, :2] * torch.tensor([1.0, 0.1]).double(), u[:2])
    assert score(both, Pair(u[:, :1], u[:1]), gamma=0.3) == pytest.approx(1)
    assert score(both, Pair(u[:, :1], u[:1]), gamma=0.0) == pytest.approx(0.5**0.5)


def test_mergeability_by_hand() -> None:
    one = make("a", 3)
    same = mergeability(one, permuted(one))
    assert (same.cosine, same.score) == pytest.approx((1.0, 1.0))
    assert same.factors["none"] > 0.3
    assert max(same.factors[how] for how in ("permute", "procrustes", "canon")) < 1e-6
    turned = mergeability(one, regauged(one))
    assert turned.factors["canon"] < 1e-6 < 0.1 < turned.factors["permute"]
    other = mergeability(one, make("b", 2))
    assert other.factors == {}  # ranks differ: factors cannot be added at all
    assert set(other.blocks) == {
        "text_encoder",
        "unet.down_blocks.0",
        "unet.mid_block",
        "transformer.transformer_blocks.0",
    }
    with pytest.raises(CmloraError, match="no module in common"):
        mergeability(one, type(one)("c", {}))
    assert len(SHAPES) == 5


def test_a_hill_between_two_valleys() -> None:
    found = barrier(lambda t: t * (1 - t) + 2 * t, 5)
    assert found.height == pytest.approx(0.25)
    assert barrier(lambda t: 1 + t * t, 4).height == pytest.approx(0)
    with pytest.raises(CmloraError, match="3 points"):
        barrier(lambda t: t, 2)
