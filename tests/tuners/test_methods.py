"""What the papers claim of their methods, in numbers, on small layers."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cmlora.adapters.tuners import TUNERS, lora_sb
from cmlora.adapters.tuners.snella import Allocator, shared_out
from cmlora.errors import CmloraError
from tests.tuners import bench
from tests.tuners.references import REFERENCES

COUNTS = {  # of (O, I) = (12, 8), with the bench's settings
    "nola": 7 + 5,
    "randlora": 3 * 3 + 3 * 8,
    "vera": 5 + 12,
    "lora_xs": 9,
    "lora_sb": 9,
    "pissa": 3 * 20,
    "loldu": 3,
    "svfit": 4,
    "hydra": 2 * 20 + 2 * 3 * 12,
    "block_lora": 4 * 12 + 4 * 8 // 2,
    "snell": 4 * 20,
    "snella": 4 * 20 + 3,
    "s2ft": 12 * 2,
    "dylora": 4 * 20,
    "maestro": 4 * 20,
    "allora": 3 * 20,
    "orthogonal": 2 * 12,
    "sltrain": 2 * 20 + 9,
    "lost": 2 * 20 + 12 * 2,
    "oft": 2 * 6,
    "boft": 4 + 12,
    "miss": 3 * 12,
    "ia3": 12,
}


@pytest.mark.parametrize("name", COUNTS)
def test_number_of_trained_parameters(name: str) -> None:
    layer = bench.adapted(name, shaken=False)
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == COUNTS[name]


def test_variants_have_the_references_update() -> None:
    cases: list[tuple[str, dict[str, Any]]] = [
        ("block_lora", {"split": "input"}),
        ("snell", {"sparsify": "official"}),
        ("snell", {"sparsify": "hard"}),
        ("snell", {"tie_heads": False, "sparsity": 0.0}),
        ("snella", {"mix": 1.0}),
        ("s2ft", {"side": "output"}),
        ("miss", {"form": "mini", "mini_r": 4}),
        ("miss", {"form": "bat", "r": 4}),
        ("boft", {"count": 3}),
    ]
    for (name, options), kind in itertools.product(cases, ("linear", "conv3")):
        if kind == "conv3" and name == "boft":
            continue  # 36 is no multiple of 8
        layer = bench.adapted(name, kind, **options)
        weight = layer.matrix().double().numpy()
        config = layer.config["a"]
        expected = REFERENCES[name](weight, bench.tensors(layer), config, layer.seeds["a"])
        expected = torch.tensor(expected).float() * config.strength()
        torch.testing.assert_close(bench.delta(layer), expected, rtol=1e-4, atol=1e-5)


def test_nola_trains_fewer_numbers_than_rank_one_whatever_the_rank() -> None:
    counts = {
        r: sum(p.numel() for p in bench.adapted("nola", r=r).parameters() if p.requires_grad)
        for r in (2, 4)
    }
    assert counts[2] == counts[4] < 12 + 8
    assert bench.rank(bench.delta(bench.adapted("nola", "bare", r=2))) == 2


def test_randlora_has_full_rank_only_with_distinct_outer_scales() -> None:
    layer = bench.adapted("randlora", "bare")
    assert bench.rank(bench.delta(layer)) == 12
    with torch.no_grad():
        layer.cmrandlora_outer["a"].fill_(0.3)
    assert bench.rank(bench.delta(layer)) <= 3


@pytest.mark.parametrize("name", ["nola", "randlora"])
def test_what_is_drawn_is_kept_until_something_changes(name: str) -> None:
    layer = bench.adapted(name)
    layer.eval()
    x = bench.data(layer.base_layer)
    with torch.no_grad():
        first = layer(x)
        kept = layer.ready["a"][1]
        assert torch.equal(layer(x), first)
        assert layer.ready["a"][1] is kept
        bench.shake(layer, seed=5)
        changed = layer(x)
        assert not torch.equal(changed, first)
        layer.set_scale("a", 0.5)
        assert not torch.equal(layer(x), changed)
        layer.set_scale("a", 1.0)
        assert torch.equal(layer(x), changed)
    assert torch.allclose(layer(x), changed, atol=1e-5)
    assert not layer.ready


def test_vera_layers_share_their_bases_through_the_seed() -> None:
    one, other, wide = (
        bench.adapted("vera"),
        bench.adapted("vera", "conv1"),
        bench.adapted("vera", "bare"),
    )
    assert torch.equal(one.frozen("a", "down"), other.frozen("a", "down"))
    ratio = wide.frozen("a", "down")[:, :8] / one.frozen("a", "down")
    assert torch.allclose(ratio, torch.full_like(ratio, (8 / 12) ** 0.5))


def test_lora_xs_stays_in_the_span_and_reaches_the_best_there() -> None:
    layer = bench.adapted("lora_xs")
    u, s, vh = torch.linalg.svd(layer.matrix(), full_matrices=False)
    update = bench.delta(layer)
    assert torch.allclose(u[:, :3] @ u[:, :3].T @ update, update, atol=1e-5)
    target = torch.randn(12, 8, generator=torch.Generator().manual_seed(3))
    best = u[:, :3].T @ target @ vh[:3].T / s[:3] / layer.scaling["a"]
    signs = layer.frozen("a", "up").T @ u[:, :3]
    with torch.no_grad():
        layer.cmlora_xs_core["a"].copy_(signs @ best @ signs)
    projected = u[:, :3] @ u[:, :3].T @ target @ vh[:3].T @ vh[:3]
    assert torch.allclose(bench.delta(layer), projected, atol=1e-5)


def test_lora_sb_starts_at_the_best_copy_of_the_first_step() -> None:
    model = bench.adapt("lora_sb", "conv3", alpha=6)
    layer: Any = bench.layers(model)[0]
    gradient = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(3))
    for sign in (True, False):
        lora_sb.prime(model, "a", {"layer": gradient}, 0.01, sign)
        step = (-0.01 * (gradient.sign() if sign else gradient)).flatten(1)
        values = torch.linalg.svdvals(step)
        error = (bench.delta(layer) - step).norm()
        assert torch.isclose(error, values[3:].norm(), rtol=1e-4)
        assert not torch.isclose(error, torch.tensor(0.0))
        up = layer.tensor("a", "up")
        assert torch.allclose(up.T @ up, torch.eye(3), atol=1e-5)
    # a step on the core is the projection of the gradient
    layer.zero_grad()
    x = bench.data(layer.base_layer)
    layer.base_layer.weight.requires_grad_(True)
    model(x).square().sum().backward()
    full, core = layer.base_layer.weight.grad.flatten(1), layer.cmlora_sb_core["a"].grad
    up, down = layer.tensor("a", "up"), layer.tensor("a", "down")
    expected = up @ up.T @ full @ down.T @ down * layer.scaling["a"]
    assert torch.allclose(up @ core @ down, expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(CmloraError, match="no gradient for layer"):
        lora_sb.prime(model, "a", {}, 0.01)


def test_pissa_holds_the_leading_part() -> None:
    layer = bench.adapted("pissa", shaken=False)
    with torch.no_grad():
        layer.cmpissa_up["a"].zero_()
    rest = layer.matrix() + bench.delta(layer)
    values = torch.linalg.svdvals(layer.matrix())
    assert torch.isclose(rest.norm(), values[3:].norm(), rtol=1e-4)


def test_svfit_keeps_the_singular_vectors_and_chooses_by_energy() -> None:
    layer = bench.adapted("svfit")
    assert torch.isclose(bench.delta(layer).norm(), layer.tensor("a", "values").norm(), rtol=1e-4)
    values = torch.linalg.svdvals(layer.matrix()).square()
    count = len(bench.adapted("svfit", r=8, energy=0.9).tensor("a", "values"))
    assert values[:count].sum() >= 0.9 * values.sum() > values[: count - 1].sum()


def test_hydra_sequential_branch_recombines_the_weight() -> None:
    layer = bench.adapted("hydra", "wide")
    with torch.no_grad():
        layer.cmhydra_up["a"].zero_()
    _, _, vh = torch.linalg.svd(layer.matrix(), full_matrices=False)
    assert torch.allclose(bench.delta(layer) @ vh.T @ vh, bench.delta(layer), atol=1e-5)
    assert layer.bias_update("a").abs().max() > 1e-3
    only = bench.adapted("hydra", sequential_r=0)
    assert bench.rank(bench.delta(only)) == 2
    assert not only.bias_update("a").any()


def test_block_lora_over_ranks_moves_its_blocks_together() -> None:
    layer = bench.adapted("block_lora", shaken=False)
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        (layer(bench.data(layer.base_layer)) - 1).square().mean().backward()
        optimizer.step()
    up = layer.tensor("a", "up")
    assert torch.equal(up[0], up[1])
    assert bench.rank(bench.delta(layer)) == 2
    assert bench.rank(bench.delta(bench.adapted("block_lora", split="input"))) == 4


@given(share=st.floats(0, 0.99), form=st.sampled_from(["official", "soft", "hard"]))
def test_snell_has_exactly_the_sparsity_asked_for(share: float, form: str) -> None:
    layer = bench.adapted("snell", sparsity=share, sparsify=form)
    assert int((bench.delta(layer) == 0).sum()) == round(share * 96)


def test_snell_is_of_full_rank_and_ties_heads_for_a_start_at_zero() -> None:
    assert bench.rank(bench.delta(bench.adapted("snell", "bare", sparsity=0.0))) == 12
    assert (
        bench.delta(bench.adapted("snell", shaken=False, tie_heads=False, sparsity=0.0)).abs().max()
        > 0
    )


def test_snella_shares_a_falling_budget_by_score() -> None:
    model = nn.Sequential(bench.base("linear"), bench.base("wide"), bench.base("linear"))
    bench.inject(model, bench.settings("snella", ["0", "1", "2"], sparsity=0.0), "a")
    bench.shake(model)
    allocator = Allocator(model, "a", target=0.3, steps=10)
    (model(torch.randn(5, 8)) * torch.tensor([100.0] + [0.01] * 11)).square().sum().backward()
    allocator.observe()
    scores = allocator._scores()
    assert allocator.allocate(0) == [96, 96, 96]
    counts = allocator.allocate(10)
    assert sum(counts) == round(0.3 * 288)
    order = np.argsort(scores)
    assert sorted(counts) == [counts[n] for n in order]
    for layer, count in zip(bench.layers(model), counts, strict=True):
        assert int((bench.delta(layer) != 0).sum()) == count


@given(
    budget=st.integers(0, 60),
    rows=st.lists(st.tuples(st.floats(0, 10), st.integers(1, 20)), min_size=1, max_size=5),
)
def test_shares_spend_the_whole_budget_and_fit(budget: int, rows: list[tuple[float, int]]) -> None:
    scores, sizes = [row[0] for row in rows], [row[1] for row in rows]
    counts = shared_out(budget, scores, sizes)
    assert sum(counts) == min(budget, sum(sizes))
    assert all(0 <= count <= size for count, size in zip(counts, sizes, strict=True))


def test_s2ft_leaves_all_other_entries_alone() -> None:
    layer = bench.adapted("s2ft", "conv3", side="output", select="weight")
    chosen = layer.chosen("a").tolist()
    norms = layer.matrix().norm(dim=1)
    assert set(chosen) == set(norms.topk(len(chosen)).indices.tolist())
    before = layer.base_layer.weight.clone()
    layer.merge()
    changed = (layer.base_layer.weight != before).flatten(1).any(1)
    assert changed.nonzero().flatten().tolist() == chosen
    blocks = bench.adapted("s2ft", "bare", block=4, share=0.5).chosen("a").reshape(-1, 4)
    assert torch.equal(blocks - blocks[:, :1], torch.arange(4).expand_as(blocks))
    assert not (blocks[:, 0] % 4).any()


def test_allora_scales_gradients_of_the_factors_alone() -> None:
    for kind in ("linear", "strided"):
        plain, paced = bench.adapted("dylora", kind, r=3, alpha=None), bench.adapted("allora", kind)
        with torch.no_grad():
            for title in ("up", "down"):
                value = plain.tensor("a", title)
                getattr(paced, f"cmallora_{title}")["a"].copy_(value)
        inputs = []
        for layer in (plain, paced):
            x = bench.data(layer.base_layer).requires_grad_()
            layer(x).square().sum().backward()
            inputs.append(x.grad)
        torch.testing.assert_close(*inputs, rtol=1e-4, atol=1e-4)
        norms = bench.delta(paced).norm(dim=1)
        pace = 1 / (norms + 1 / 2.0**2).sqrt()
        expected = pace[:, None] * plain.cmdylora_up["a"].grad
        torch.testing.assert_close(paced.cmallora_up["a"].grad, expected, rtol=1e-3, atol=1e-3)
    assert torch.allclose(bench.adapted("allora", shaken=False).pace("a"), torch.tensor(2.0))


def test_orthogonal_slots_do_not_meet() -> None:
    layers = [bench.adapted("orthogonal", slot=slot) for slot in range(4)]
    for one, other in itertools.combinations(layers, 2):
        a, b = bench.delta(one), bench.delta(other)
        assert abs(float((a * b).sum())) <= 1e-6 * float(a.norm() * b.norm())
        assert (a @ other.frozen("a", "down").T).abs().max() <= 1e-6
    with pytest.raises(CmloraError, match="slot 4"):
        bench.adapted("orthogonal", slot=4)


def test_sltrain_exceeds_its_rank() -> None:
    assert bench.rank(bench.delta(bench.adapted("sltrain", "bare", density=0.3))) > 2


def test_lost_takes_the_columns_that_the_factors_miss_most() -> None:
    layer = bench.adapted("lost", shaken=False, balance=1.0)
    u, s, vh = torch.linalg.svd(layer.matrix(), full_matrices=False)
    rest = layer.matrix() - (u[:, :2] * s[:2]) @ vh[:2]
    top = set(rest.norm(dim=0).topk(2).indices.tolist())
    assert set(layer.frozen("a", "chosen").tolist()) == top
    with torch.no_grad():
        layer.cmlost_up["a"].zero_()
    assert torch.allclose(layer.matrix() + bench.delta(layer), rest, atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "wide", "bare", "conv3"])
def test_lost_with_all_its_weight_on_the_factors_is_the_truncated_svd(kind: str) -> None:
    layer = bench.adapted("lost", kind, shaken=False, balance=1.0)
    matrix = layer.matrix().double()
    low = (layer.frozen("a", "up").double() @ layer.frozen("a", "down").double()).detach()
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    assert float((low - (u[:, :2] * s[:2]) @ vh[:2]).norm()) <= 2e-6 * float(matrix.norm())
    rest = matrix - low
    assert abs(float((low * rest).sum())) <= 1e-6 * float(low.norm() * rest.norm())
    with torch.no_grad():
        layer.cmlost_columns["a"].add_(1.0)  # of no weight
        layer.cmlost_up["a"].mul_(3.0)
    found = matrix + bench.delta(layer).double()
    assert float((found - (3 * low + rest)).norm()) <= 1e-6 * float(matrix.norm())


def test_lost_with_a_function_between_its_factors_is_no_update_of_the_weight() -> None:
    layer = bench.adapted("lost", shaken=False, nonlinear=True)
    x = bench.data(layer.base_layer)
    assert torch.equal(layer(x), layer.base_layer(x))
    bench.shake(layer)
    change = layer.change("a", x)
    assert not torch.allclose(layer.change("a", 2 * x), 2 * change, rtol=1e-2)
    with pytest.raises(CmloraError, match="neither merged nor exported"):
        layer.merge()
    assert not layer.supports_lora_conversion("a")


@pytest.mark.parametrize("name", ["oft", "boft"])
def test_rotations_keep_singular_values(name: str) -> None:
    layer = bench.adapted(name, "conv3")
    if name == "boft":
        with torch.no_grad():
            layer.cmboft_scale["a"].zero_()
    before = torch.linalg.svdvals(layer.matrix())
    after = torch.linalg.svdvals(layer.matrix() + bench.delta(layer))
    assert bench.delta(layer).norm() > 0.1
    assert torch.allclose(before, after, atol=1e-5)


def test_settings_that_make_no_sense() -> None:
    bad: list[tuple[str, dict[str, Any]]] = [
        ("block_lora", {"r": 4, "blocks": 3}),
        ("block_lora", {"split": "both"}),
        ("snell", {"sparsity": 1.0}),
        ("snell", {"sparsify": "none"}),
        ("snell", {"r": 3}),
        ("s2ft", {"share": 0.0}),
        ("s2ft", {"side": "top"}),
        ("hydra", {"sequential_r": -1}),
        ("orthogonal", {"slot": -1}),
        ("sltrain", {"density": 2.0}),
        ("lost", {"balance": 2.0}),
        ("miss", {"form": "maxi"}),
        ("ia3", {"side": "top"}),
    ]
    for name, options in bad:
        with pytest.raises(CmloraError, match=name):
            bench.settings(name, **options)
    for name, options in (("miss", {"form": "bat", "r": 5}), ("boft", {"r": 5, "count": 1})):
        with pytest.raises(CmloraError, match=name):
            bench.adapt(name, "linear", **options)
    assert set(COUNTS) == {n for n in TUNERS if n in bench.OPTIONS}
