"""PEFT's own adapters and ours, with the same numbers in them: the same layer."""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from tests.tuners import bench
from tests.tuners.bench import quiet

Pair = tuple[Any, Any]


def pair(theirs: Any, name: str, kind: str = "linear", **options: Any) -> Pair:
    """A layer with PEFT's adapter, and the same layer with ours; both hold random numbers."""
    model = bench.Holder(bench.base(kind)).eval()
    with quiet():
        bench.inject(model, theirs, "a")
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=random) * 0.3)
    ours: Any = bench.layers(bench.adapt(name, kind, **options))[0]
    return model.layer, ours


def pissa() -> Pair:
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["layer"], init_lora_weights="pissa")
    theirs, ours = pair(config, "pissa")
    fill(ours, down=theirs.lora_A["a"].weight, up=theirs.lora_B["a"].weight)
    return theirs, ours


def oft() -> Pair:
    config = peft.OFTConfig(
        oft_block_size=4, r=0, target_modules=["layer"], use_cayley_neumann=False
    )
    theirs, ours = pair(config, "oft", r=4)
    fill(ours, skew=theirs.oft_R["a"].weight)
    return theirs, ours


def boft() -> Pair:
    config = peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=1, target_modules=["layer"])
    theirs, ours = pair(config, "boft", r=4, count=1)
    blocks = theirs.boft_R["a"]
    rows, columns = torch.triu_indices(4, 4, 1)
    # PEFT turns by the transposed matrix, which is the one of the negative half.
    skew = -0.5 * (blocks - blocks.transpose(-1, -2))
    fill(ours, skew=skew[..., rows, columns], scale=theirs.boft_s["a"].flatten() - 1)
    return theirs, ours


def miss() -> Pair:
    theirs, ours = pair(peft.MissConfig(r=3, target_modules=["layer"]), "miss", r=3)
    fill(ours, shard=theirs.miss_block["a"])
    return theirs, ours


def miss_mini() -> Pair:
    config = peft.MissConfig(r=3, mini_r=4, target_modules=["layer"], init_weights="mini")
    theirs, ours = pair(config, "miss", r=3, form="mini", mini_r=4)
    fill(ours, shard=theirs.miss_block["a"])
    return theirs, ours


def miss_bat() -> Pair:
    config = peft.MissConfig(r=4, target_modules=["layer"], init_weights="bat")
    theirs, ours = pair(config, "miss", r=4, form="bat")
    fill(ours, shard=theirs.miss_block["a"])
    return theirs, ours


def ia3() -> Pair:
    config = peft.IA3Config(target_modules=["layer"], feedforward_modules=[])
    theirs, ours = pair(config, "ia3")
    fill(ours, scale=theirs.ia3_l["a"].flatten() - 1)
    return theirs, ours


def ia3_inputs() -> Pair:
    config = peft.IA3Config(target_modules=["layer"], feedforward_modules=["layer"])
    theirs, ours = pair(config, "ia3", side="input")
    fill(ours, scale=theirs.ia3_l["a"].flatten() - 1)
    return theirs, ours


def vera() -> Pair:
    theirs, ours = pair(peft.LoraConfig(r=5, target_modules=["layer"]), "vera")
    model = peft.get_peft_model(
        bench.Holder(bench.base("linear")), peft.VeraConfig(r=5, target_modules=["layer"])
    ).eval()
    theirs = model.base_model.model.layer
    with torch.no_grad():
        theirs.vera_A["default"][:, :8].copy_(ours.frozen("a", "down"))
        theirs.vera_B["default"][:12].copy_(ours.frozen("a", "up"))
        theirs.vera_lambda_b["default"].normal_(generator=torch.Generator().manual_seed(1))
        theirs.vera_lambda_d["default"].normal_(generator=torch.Generator().manual_seed(2))
    fill(ours, output=theirs.vera_lambda_b["default"], inner=theirs.vera_lambda_d["default"])
    return theirs, ours


@torch.no_grad()
def fill(layer: Any, **tensors: Tensor) -> None:
    """Puts numbers into an adapter of ours."""
    assert set(tensors) == set(layer.trained)
    for title, value in tensors.items():
        layer.held("a", title).copy_(value.reshape(layer.held("a", title).shape))


@pytest.mark.parametrize(
    "make", [pissa, oft, boft, miss, miss_mini, miss_bat, ia3, ia3_inputs, vera]
)
def test_the_same_numbers_make_the_same_layer(make: Callable[[], Pair]) -> None:
    theirs, ours = make()
    x = bench.data(bench.base("linear"))
    with torch.no_grad():
        plain = bench.base("linear")(x)
        expected = theirs(x)
        torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-5)
        assert (expected - plain).abs().max() > 1e-2
        ours.merge()
        torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-4)


def test_boft_of_peft_has_one_butterfly_without_its_extension() -> None:
    config = peft.BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=2, target_modules=["layer"])
    theirs, _ = pair(config, "boft", r=2, count=2)
    assert len(theirs.boft_R["a"]) == (2 if torch.cuda.is_available() else 1)
    assert len(bench.adapted("boft", r=2, count=2).held("a", "skew")) == 2


def test_s2ft_adapters_of_disjoint_channels_fuse_without_a_trace_of_each_other() -> None:
    """And switching is an addition and a subtraction that leaves the weight's bits."""
    for side in ("input", "output"):
        chosen: dict[int, set[int]] = {}
        seed = 1
        first: Any = bench.adapted("s2ft", "bare", share=0.25, side=side)
        places = set(first.chosen("a").tolist())
        while True:  # a seed whose channels are others
            second: Any = bench.adapted("s2ft", "bare", share=0.25, side=side, seed=seed)
            chosen[seed] = set(second.chosen("a").tolist())
            if not chosen[seed] & places:
                break
            seed += 1
        one, two = bench.delta(first), bench.delta(second)
        assert not bool(((one != 0) & (two != 0)).any())
        weight = first.base_layer.weight.detach().clone()
        both = weight + one + two
        assert torch.equal(both[one != 0], (weight + one)[one != 0])
        assert torch.equal(both[two != 0], (weight + two)[two != 0])
        first.merge()
        first.unmerge()
        assert torch.equal(first.base_layer.weight, weight)


def test_loldu_stays_between_the_factors_of_the_weight() -> None:
    layer = bench.adapted("loldu", "linear", r=8)
    weight, delta = layer.matrix().detach().double(), bench.delta(layer).double()
    permutation, lower, upper = torch.linalg.lu(weight)
    diagonal = upper.diagonal()
    left, right = permutation @ lower, upper / diagonal[:, None]
    torch.testing.assert_close(left @ torch.diag(diagonal) @ right, weight)
    core = torch.linalg.lstsq(left, delta).solution @ torch.linalg.inv(right)
    torch.testing.assert_close(left @ core @ right, delta, rtol=1e-4, atol=1e-5)
    off = core - torch.diag(core.diagonal())
    assert float(off.abs().max()) < 1e-4 * float(core.abs().max())
    assert bench.rank(bench.delta(bench.adapted("loldu", "linear", r=3))) == 3


def test_entries_of_snell_below_the_threshold_have_no_gradient() -> None:
    layer = bench.adapted("snell", "bare", sparsity=0.5, sparsify="soft")
    layer.zero_grad()
    delta = layer.get_delta_weight("a")
    gone = (delta == 0).float()
    assert 0 < float(gone.sum()) < gone.numel()
    (delta * gone).sum().backward(retain_graph=True)
    assert all(not p.grad.any() for p in layer.parameters() if p.requires_grad)
    delta.sum().backward()
    assert all(p.grad.any() for p in layer.parameters() if p.requires_grad)


def test_the_first_step_of_allora_is_eta_times_that_of_lora() -> None:
    plain = bench.adapted("dylora", "linear", r=3, alpha=None, shaken=False)
    paced = bench.adapted("allora", "linear", shaken=False)
    with torch.no_grad():
        paced.held("a", "down").copy_(plain.held("a", "down"))
    x = bench.data(plain.base_layer)
    for layer in (plain, paced):
        (layer(x) - 1).square().mean().backward()
    expected = 2.0 * plain.held("a", "up").grad
    torch.testing.assert_close(paced.held("a", "up").grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_allora_needs_fewer_steps_than_lora_while_updates_are_small(seed: int) -> None:
    """Plain gradient descent; PEFT's LoRA from the same start with the same rate."""
    random = torch.Generator().manual_seed(seed)
    change = torch.randn(12, 3, generator=random) @ torch.randn(3, 8, generator=random) * 0.06
    x = torch.randn(200, 8, generator=random)
    config = peft.LoraConfig(r=3, lora_alpha=3, target_modules=["layer"])
    plain, paced = bench.Holder(bench.base("linear")), bench.adapt("allora", "linear")
    bench.inject(plain, config, "a")
    layer: Any = plain.layer
    with torch.no_grad():
        layer.lora_A["a"].weight.copy_(bench.layers(paced)[0].held("a", "down"))
        wanted = layer.base_layer(x) + x @ change.T
    losses = []
    for model in (plain, paced):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, 0.1)
        row = []
        for _ in range(201):
            loss = (model(x) - wanted).square().mean()
            row.append(float(loss.detach()))
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
        losses.append(row)
    assert losses[0][0] == pytest.approx(losses[1][0])
    assert losses[0][200] < 0.6 * losses[0][0]
    assert min(losses[1][:151]) <= losses[0][200]
