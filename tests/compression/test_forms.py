"""Every compact form: smaller than before, true bytes, an error that falls with the share."""

import copy
from pathlib import Path
from typing import Literal

import numpy as np
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from cmlora.adapters.calibration import grams
from cmlora.adapters.compression import COMPRESSIONS, RULES
from cmlora.adapters.compression.cospadi import improve, leading, pursue
from cmlora.adapters.compression.form import GRID, Factors, Form, Sparse, dense, nbytes, root
from cmlora.adapters.compression.heal import Call, heal
from cmlora.adapters.compression.layers import CompactLinear, matrix_of
from cmlora.adapters.compression.model import (
    compress,
    load,
    model_bytes,
    relative_error,
    save,
    spread,
)
from cmlora.adapters.compression.mxfp4 import CLIP, exponent
from cmlora.adapters.compression.rocket import rocket
from cmlora.errors import CmloraError
from tests.compression import references

SHARES = (0.25, 0.45, 0.7, 0.9)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(width: int, count: int = 200, seed: int = 5) -> Tensor:
    """Inputs (n, I) whose directions matter very differently, as those of trained layers do."""
    return random(count, width, seed=seed) @ (
        random(width, width, seed=seed + 1) * torch.logspace(0, -2, width)
    )


def made(name: str, matrix: Tensor, keep: float, gram: Tensor | None = None) -> Form:
    form = COMPRESSIONS[name].object(matrix, keep, gram)
    assert form is not None
    return form


class Toy(nn.Module):
    """A convolution, a strided one, a narrow one, one with groups, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.down = nn.Conv2d(16, 24, 3, padding=1, stride=2)
        self.grouped = nn.Conv2d(24, 24, 3, padding=1, groups=4)
        self.mlp = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 24, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.down(self.first(x)))
        out: Tensor = self.mlp(x.flatten(2).transpose(1, 2))
        return out


def toy(seed: int = 0) -> Toy:
    torch.manual_seed(seed)
    return Toy()


@pytest.mark.parametrize("name", list(COMPRESSIONS))
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("shape", [(32, 48), (48, 32), (24, 72)])
def test_error_falls_and_bytes_hold(name: str, known: bool, shape: tuple[int, int]) -> None:
    matrix = random(*shape)
    seen = inputs(shape[1])
    gram = (seen.T @ seen).double() if known else None
    errors = []
    for keep in SHARES:
        form = COMPRESSIONS[name].object(matrix, keep, gram)
        if form is None:
            continue
        assert dense(form).shape == matrix.shape
        assert nbytes(form) == sum(t.nbytes for t in form.tensors().values())
        assert nbytes(form) <= keep * matrix.nbytes
        errors.append(relative_error(matrix, dense(form), gram))
    assert len(errors) >= 3
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 1
    if known:
        lost = seen @ (matrix - dense(form or made(name, matrix, 0.9, gram))).T
        expected = float(lost.norm() / (seen @ matrix.T).norm())
        assert errors[-1] == pytest.approx(expected, rel=1e-3)


DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(COMPRESSIONS))
def test_nothing_grows(name: str, dtype: torch.dtype) -> None:
    for shape in ((2, 2), (1, 9), (9, 1), (40, 40), (64, 64)):
        matrix = random(*shape).to(dtype)
        for keep in (0.01, 0.5, 1.0):
            form = COMPRESSIONS[name].object(matrix, keep, None)
            assert form is None or nbytes(form) < matrix.nbytes
            assert form is None or nbytes(form) <= keep * matrix.nbytes
    with pytest.raises(CmloraError, match="above 0"):
        COMPRESSIONS[name].object(random(9, 9), 0.0, None)


@pytest.mark.parametrize("name", ["svd", "lord"])
@pytest.mark.parametrize("keep", [0.3, 0.5, 0.9])
def test_factors_reach_the_best_output_error(name: str, keep: float) -> None:
    """The tail of the outputs' singular values, which are the roots of the eigenvalues."""
    matrix, seen = random(32, 48).double(), inputs(48).double()
    form = made(name, matrix, keep, seen.T @ seen)
    assert isinstance(form, Factors)
    rank = len(form.down)
    assert rank == int(keep * 32 * 48 / 80)
    assert form.up.numel() + form.down.numel() == rank * 80
    lost = (seen @ (matrix - dense(form)).T).norm() / (seen @ matrix.T).norm()
    best = references.output_tail(matrix.numpy(), seen.numpy(), rank)
    assert float(lost) == pytest.approx(best, rel=1e-6)


def test_a_dictionary_beats_factors_of_the_same_numbers() -> None:
    matrix, seen = random(48, 32), inputs(32)
    gram = (seen.T @ seen).double()
    factors, plain = made("svd", matrix, 0.54, gram), made("svd", matrix, 0.54)
    sparse = made("rocket", matrix, 0.54, gram)
    assert isinstance(sparse, Sparse)
    assert isinstance(factors, Factors)
    numbers = sparse.atoms.numel() + sparse.values.numel()
    assert (numbers, factors.up.numel() + factors.down.numel()) == (784, 800)
    error = [relative_error(matrix, dense(form), gram) for form in (sparse, factors, plain)]
    assert error == sorted(error)


def test_a_dictionary_without_zeros_is_the_whitened_svd() -> None:
    """As many codes as atoms leave the tail of the singular values behind the root, damped."""
    matrix, seen = random(48, 32).double(), inputs(32).double()
    whiten = root(seen.T @ seen, 32)
    values = torch.linalg.svdvals(matrix @ whiten).square()
    ranks = []
    for keep in (0.11, 0.32, 0.54, 0.75, 0.97):
        form = rocket(matrix, keep, seen.T @ seen, ratio=1.0)
        assert form is not None
        rank = len(form.atoms)
        assert form.values.numel() == rank * 48
        tail = float((values[rank:].sum() / values.sum()).sqrt())
        found = relative_error(matrix, dense(form), whiten @ whiten.T)
        assert found == pytest.approx(tail, rel=1e-6)
        ranks.append(rank)
    assert ranks == [2, 6, 10, 14, 18]


@settings(max_examples=20)
@given(st.integers(1, 9), st.integers(1, 20), st.integers(0, 2**31))
def test_sparse_codes_survive_packing(outputs: int, atoms: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    codes = torch.randn((outputs, atoms), generator=g)
    codes = codes * (torch.rand((outputs, atoms), generator=g) < 0.4)
    book = torch.randn((atoms, 5), generator=g)
    form = Sparse.of(book, codes)
    assert torch.equal(form.stages()[1], codes)
    assert form.mask.numel() == outputs * -(-atoms // 8)


def test_mxfp4_is_the_nearest_of_the_grid() -> None:
    matrix = random(5, 70) * torch.logspace(-3, 3, 5)[:, None]
    form = made("mxfp4", matrix, 1.0)
    expected = references.nearest_on_grid(matrix.double().numpy(), CLIP)
    assert np.allclose(dense(form).double(), expected, rtol=1e-6)
    assert nbytes(made("mxfp4", random(4, 64), 1.0)) == 4 * 2 * 17 + 8


def test_mxfp4_error_of_gaussians() -> None:
    matrix = random(400, 64, seed=3) * torch.exp(2 * random(400, 1, seed=4))
    error = relative_error(matrix / matrix.norm(dim=1, keepdim=True), _unit(matrix))
    assert error**2 <= 1.40e-2
    units = torch.exp2(exponent(matrix.double().reshape(400, 2, 32)))
    scaled = dense(made("mxfp4", matrix, 1.0)).reshape(400, 2, 32) / units[:, :, None]
    assert set(scaled.abs().flatten().tolist()) == set(GRID.tolist())


def _unit(matrix: Tensor) -> Tensor:
    rounded: Tensor = dense(made("mxfp4", matrix, 1.0)) / matrix.norm(dim=1, keepdim=True)
    return rounded


@pytest.mark.parametrize("rule", [None, "knapsack", "budget"])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_the_share_is_one_of_the_bytes_that_are_stored(
    rule: Literal["knapsack", "budget"] | None, dtype: torch.dtype
) -> None:
    """A model is compressed in single precision and stored in half of it; masks do not shrink."""
    for keep in (0.5, 0.99):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 48))
        given = RULES["budget"].object if rule == "budget" else rule
        done = compress(model, COMPRESSIONS["rocket"].object, keep, rule=given, dtype=dtype)
        assert all(p.dtype == torch.float32 for p in model.parameters())
        model.to(dtype)
        for name, saved in done.layers.items():
            layer = model.get_submodule(name)
            assert isinstance(layer, CompactLinear)
            assert nbytes(layer.form()) == saved.after < saved.before == 2 * layer.weight.numel()
        stored = sum(saved.after for saved in done.layers.values())
        stored += sum(2 * matrix_of(model.get_submodule(name)).numel() for name in done.kept)
        assert stored <= keep * 2 * (64 * 64 + 64 * 48)


@pytest.mark.parametrize("name", list(COMPRESSIONS))
def test_a_model_runs_on_compact_layers(name: str, tmp_path: Path) -> None:
    model, x = toy(), random(2, 3, 8, 8)
    expected = toy()
    before = model_bytes(model)
    moments = grams(model, lambda: model(x))
    assert set(moments) == {"first", "down", "grouped", "mlp.0", "mlp.2"} - {"grouped"}
    done = compress(model, COMPRESSIONS[name].object, 0.6, moments, least=8)
    assert {"down", "mlp.0", "mlp.2"} <= set(done.layers)
    assert done.before == before
    assert done.after == model_bytes(model) < before
    for layer, saved in done.layers.items():
        assert saved.after < saved.before
        assert isinstance(model.get_submodule(layer), nn.Linear | nn.Conv2d)
        expected.get_submodule(layer).weight.data = model.get_submodule(layer).weight.data
    assert torch.allclose(model(x), expected(x), atol=1e-5)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    save(model, tmp_path / "small.safetensors")
    assert sum(t.nbytes for t in load_file(tmp_path / "small.safetensors").values()) == done.after
    again = toy(seed=1)
    load(again, tmp_path / "small.safetensors")
    assert torch.equal(again(x), model(x))


def test_a_lora_on_a_compact_model() -> None:
    model, x = toy(), random(2, 3, 8, 8)
    done = compress(model, COMPRESSIONS["svd"].object, 0.6, least=8)
    expected = toy()
    for layer in done.layers:
        expected.get_submodule(layer).weight.data = model.get_submodule(layer).weight.data
    config = peft.LoraConfig(r=2, target_modules=["down", "mlp.0"], init_lora_weights=False)
    on_compact = peft.inject_adapter_in_model(config, model)
    on_dense = peft.inject_adapter_in_model(config, expected)
    state = {k: v for k, v in on_compact.state_dict().items() if "lora_" in k}
    on_dense.load_state_dict(state, strict=False)
    assert torch.allclose(on_compact(x), on_dense(x), atol=1e-4)


def test_moments_of_convolutions_are_those_of_patches() -> None:
    model, x = toy(), random(2, 3, 8, 8)
    moments = grams(model, lambda: model(x))
    layer = model.down
    hidden = model.first(x)
    out = layer(hidden) - layer.bias[None, :, None, None]  # type: ignore[index]
    matrix = layer.weight.detach().flatten(1).double()
    energy = float((matrix @ moments["down"] * matrix).sum())
    mean = out.detach().double().square().sum(1).mean()  # over all places
    assert energy == pytest.approx(float(mean), rel=1e-4)
    assert not model.down._forward_pre_hooks


def test_a_gram_that_lost_its_digits_still_has_a_root() -> None:
    rows = random(6, 300) * torch.logspace(3, -3, 300)
    gram = (rows.T @ rows).double()  # of rank 6, with the rounding of single precision
    gram = gram - 1e-4 * float(gram.diagonal().max()) * torch.eye(300).double()
    found = root(gram, 300)
    assert found.isfinite().all()
    largest = float(gram.diagonal().max())
    assert float((found @ found.T - gram).abs().max()) < 1e-2 * largest


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    model, path = toy(), tmp_path / "small.safetensors"
    compress(model, COMPRESSIONS["svd"].object, 0.6, least=8)
    save(model, path)
    with pytest.raises(CmloraError, match="the model has not"):
        load(nn.Sequential(nn.Linear(3, 3)), path)
    with pytest.raises(CmloraError, match="becomes smaller"):
        compress(nn.Sequential(nn.Linear(3, 3)), COMPRESSIONS["svd"].object, 0.6)


def test_pursuit_is_the_textbook_one() -> None:
    rows, atoms = random(6, 10).double(), random(14, 10, seed=1).double()
    atoms = atoms / atoms.norm(dim=1, keepdim=True)
    codes = pursue(rows, atoms, 4)
    for row, found in zip(rows, codes, strict=True):
        expected = references.matching_pursuit(row.numpy(), atoms.numpy(), 4)
        assert np.allclose(found, expected, atol=1e-6)


def test_an_atom_update_never_raises_the_error() -> None:
    rows, atoms = random(20, 10).double(), random(8, 10, seed=1).double()
    atoms = atoms / atoms.norm(dim=1, keepdim=True)
    codes = pursue(rows, atoms, 3)
    codes[:, 5] = 0
    for _ in range(3):
        before = float((rows - codes @ atoms).norm())
        improve(rows, atoms, codes)
        assert float((rows - codes @ atoms).norm()) <= before + 1e-9


@pytest.mark.parametrize("shape", [(9, 30), (30, 9), (1, 5), (5, 1)])
def test_the_leading_pair_fits_as_well_as_the_decomposition(shape: tuple[int, int]) -> None:
    matrix, start = random(*shape).double(), random(shape[0], 1, seed=2).double()[:, 0]
    right, left = leading(matrix, start)
    assert torch.allclose(left, matrix @ right)
    found = float((matrix - torch.outer(left, right)).norm())
    least = float(torch.linalg.svdvals(matrix)[1:].norm())
    assert least - 1e-9 <= found <= least * (1 + 1e-4) + 1e-9


def test_leading_of_nothing_is_nothing() -> None:
    right, left = leading(torch.zeros(3, 4).double(), torch.zeros(3).double())
    assert not left.any()
    assert right.isfinite().all()


def test_a_union_of_subspaces_needs_a_learnt_dictionary() -> None:
    bases = [random(4, 32, seed=seed) for seed in range(4)]
    matrix = torch.cat([random(40, 4, seed=9 + i) @ basis for i, basis in enumerate(bases)])
    errors = [relative_error(matrix, dense(made(n, matrix, 0.38))) for n in ("cospadi", "svd")]
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("rule", ["welore", "budget"])
def test_a_budget_spread_over_layers_is_kept(rule: str) -> None:
    model = toy()
    steep = torch.linalg.svd(model.down.weight.detach().flatten(1), full_matrices=False)
    values = steep[1] * torch.logspace(0, -4, len(steep[1]))
    model.down.weight.data = ((steep[0] * values) @ steep[2]).reshape(model.down.weight.shape)
    layers = {"down": model.down, "mlp.0": model.mlp[0], "mlp.2": model.mlp[2]}
    sizes = {name: matrix_of(layer).numel() for name, layer in layers.items()}
    shares = spread(layers, RULES[rule].object, 0.6, {})
    spent = sum(shares[name] * size for name, size in sizes.items())
    assert 0.4 * sum(sizes.values()) < spent <= 0.6 * sum(sizes.values())
    assert shares["down"] < shares["mlp.0"]
    done = compress(model, COMPRESSIONS["svd"].object, 0.6, least=20, rule=RULES[rule].object)
    held = {**dict.fromkeys(layers, 0), **{n: s.after for n, s in done.layers.items()}}
    for name, size in sizes.items():
        held[name] = held[name] or 4 * size
    assert sum(held.values()) == pytest.approx(4 * spent, abs=1)


def test_healing_lowers_the_error() -> None:
    original, model = toy(), toy()
    batches = [random(2, 3, 8, 8, seed=i) for i in range(4)]
    compress(model, COMPRESSIONS["svd"].object, 0.35, least=8)
    frozen = model.grouped.weight.detach().clone()
    calls: list[Call] = [lambda m, x=x: m(x) for x in batches]  # type: ignore[misc]
    losses = heal(model, original, calls, steps=200, rate=3e-3, features=["down", "mlp.0"])
    assert losses[-1] <= 0.5 * losses[0]
    assert torch.equal(model.grouped.weight, frozen)
    assert model.grouped.weight.requires_grad
    assert not any(p.requires_grad for n, p in model.named_parameters() if "form_" in n)
    with pytest.raises(CmloraError, match="healing needs"):
        heal(toy(), original, calls)


def test_healing_does_no_harm() -> None:
    original, model = toy(), toy()
    compress(model, COMPRESSIONS["svd"].object, 0.35, least=8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = random(2, 3, 8, 8)
    losses = heal(model, original, [lambda m: m(x)], steps=5, rate=10.0)
    assert losses[-1] > losses[0]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    heal(model, original, [lambda m: m(x)], steps=5)
    assert any(not torch.equal(v, before[n]) for n, v in model.state_dict().items())


@pytest.mark.parametrize("keep", [0.4, 0.6])
def test_learning_the_dictionary_pays(keep: float) -> None:
    matrix, seen = random(48, 32), inputs(32)
    gram = (seen.T @ seen).double()
    forms = [made(name, matrix, keep, gram) for name in ("cospadi", "rocket")]
    assert nbytes(forms[0]) <= nbytes(forms[1]) + 1
    learnt, closed = (relative_error(matrix, dense(form), gram) for form in forms)
    assert learnt < closed
