"""Optimizers: sizes of their states, limits in which they are AdamW, and what each promises."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import scipy.fft
import torch
from torch import Tensor, nn

from cmlora.adapters.training import state
from cmlora.adapters.training.optim import OPTIMIZERS, make, options_of
from cmlora.adapters.training.optim.dct import Cosines, cosines, transformed
from cmlora.adapters.training.optim.fira import sequence
from cmlora.adapters.training.optim.frugal import chosen
from cmlora.adapters.training.optim.lowrank import direction, numbers
from cmlora.adapters.training.optim.projector import Random, Select, Svd
from cmlora.errors import CmloraError

OURS = ["galore", "fira", "frugal", "dct"]
OPTIONS: dict[str, dict[str, Any]] = {
    "galore": {"rank": 3, "gap": 4, "scale": 1.0},
    "fira": {"rank": 3, "gap": 4, "scale": 1.0},
    "frugal": {"density": 0.3, "gap": 4},
    "dct": {"rank": 3},
}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.Flatten(), nn.Linear(96, 5), nn.Linear(5, 8)
    )


def optimizer(name: str, model: nn.Sequential, rate: float = 1e-2, **options: Any) -> Any:
    groups: Any = list(model.parameters())
    if name == "lora_pro":
        # The last two layers as the factors of one update.
        groups = [{"params": [model[2].weight, model[3].weight], "strength": 2.0}]
    return make(name, groups, rate, OPTIONS.get(name, {}) | options)


def descend(model: nn.Sequential, made: Any, steps: range) -> list[float]:
    losses = []
    for step in steps:
        x, y = noise(4, 3, 4, 4, seed=step % 3), noise(4, 8, seed=100 + step % 3)
        loss = (model(x) - y).square().mean()
        made.zero_grad()
        torch.autograd.backward(loss)
        made.step()
        losses.append(float(loss.detach()))
    return losses


HERE = [name for name in OPTIMIZERS if name != "adamw_8bit"]


@pytest.mark.parametrize("name", HERE)
def test_the_loss_falls(name: str) -> None:
    net = model()
    losses = descend(net, optimizer(name, net), range(60))
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("after", [3, 6])
def test_a_saved_state_continues_identically(name: str, after: int, tmp_path: Path) -> None:
    straight = model()
    descend(straight, optimizer(name, straight), range(10))
    first = model()
    made = optimizer(name, first)
    descend(first, made, range(after))
    path = tmp_path / "state.safetensors"
    state.save(path, {"model": first.state_dict(), "optimizer": made.state_dict()})
    second = model(seed=1)
    kept = state.load(path)
    second.load_state_dict(kept["model"])
    again = optimizer(name, second)
    again.load_state_dict(kept["optimizer"])
    assert state.equal(again.state_dict(), made.state_dict())
    descend(second, again, range(after, 10))
    for one, two in zip(straight.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, two)


def stepped(name: str, shape: tuple[int, ...], steps: int = 2, **options: Any) -> Any:
    """An optimizer after a few steps on one random matrix; and the matrix."""
    parameter = nn.Parameter(noise(*shape))
    made = make(name, [parameter], 1e-2, options)
    for step in range(steps):
        parameter.grad = noise(*shape, seed=step + 1)
        made.step()
    return made, parameter


@pytest.mark.parametrize(("shape", "rank"), [((40, 24), 4), ((24, 40), 4), ((8, 4, 3, 3), 4)])
def test_sizes_of_states(shape: tuple[int, ...], rank: int) -> None:
    outputs, inputs = shape[0], int(torch.tensor(shape[1:]).prod())
    long, short = max(outputs, inputs), min(outputs, inputs)
    assert numbers(stepped("galore", shape, rank=rank)[0]) == 2 * rank * long + rank * short
    assert numbers(stepped("fira", shape, rank=rank)[0]) == 2 * rank * long + rank * short
    assert numbers(stepped("dct", shape, rank=rank)[0]) == 2 * rank * long + rank
    made = stepped("frugal", shape, density=0.25)[0]
    (kept,) = made.state.values()
    share = round(0.25 * inputs)
    assert kept["first"].numel() == kept["second"].numel() == share * outputs
    assert numbers(made) == 2 * share * outputs + share
    fed = stepped("dct", shape, rank=rank, feedback=True)[0]
    assert numbers(fed) == 2 * rank * long + rank + outputs * inputs


@pytest.mark.parametrize(
    ("name", "shape", "share"),
    [
        ("galore", (1280, 1280), 0.075),
        ("galore", (320, 1280), 0.225),
        ("dct", (1280, 1280), 0.05),
        ("dct", (320, 1280), 0.2),
    ],
)
def test_the_sizes_that_are_promised(name: str, shape: tuple[int, int], share: float) -> None:
    """Of AdamW's state at rank 64; cosines take one number more for each that is chosen."""
    own = numbers(stepped(name, shape, steps=1, rank=64)[0])
    whole = numbers(stepped("adamw", shape, steps=1)[0])
    assert own - (64 if name == "dct" else 0) == round(share * whole)


@pytest.mark.parametrize("side", ["std", "reverse_std", "left", "right", "full"])
@pytest.mark.parametrize("shape", [(20, 12), (12, 20)])
def test_projections_are_orthonormal_and_the_best(side: str, shape: tuple[int, int]) -> None:
    gradient, space = noise(*shape), dict[str, Any]()
    projector = Svd(5, side)
    projector.fit(gradient, space, 0)
    for key, matrix in space.items():
        gram = matrix.T @ matrix if key == "left" else matrix @ matrix.T
        assert torch.allclose(gram, torch.eye(5), atol=1e-5)
    inside = projector.up(projector.down(gradient, space), space, gradient.shape)
    tail = torch.linalg.svdvals(gradient.double())[5:]
    assert float((gradient - inside).norm()) == pytest.approx(float(tail.norm()), rel=1e-4)


@pytest.mark.parametrize(
    "projector",
    [Svd(5), Random(5), Select(0.4), Select(0.4, "rows"), Select(0.4, "entries"), Cosines(5)],
)
@pytest.mark.parametrize("shape", [(20, 12), (12, 20)])
def test_pythagoras(projector: Any, shape: tuple[int, int]) -> None:
    gradient, space = noise(*shape).double(), dict[str, Any]()
    projector.fit(gradient, space, 3)
    space = {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in space.items()
    }
    inside = projector.up(projector.down(gradient, space), space, gradient.shape)
    total = float(inside.square().sum() + (gradient - inside).square().sum())
    assert total == pytest.approx(float(gradient.square().sum()), rel=1e-5)
    assert 0 < float(inside.norm()) < float(gradient.norm())


def test_galore_of_full_rank_moves_like_the_gradient() -> None:
    gradient, space = noise(9, 6), dict[str, Any]()
    projector = Svd(6)
    projector.fit(gradient, space, 0)
    assert torch.allclose(
        projector.up(projector.down(gradient, space), space, gradient.shape), gradient, atol=1e-5
    )
    one = stepped("galore", (9, 6), rank=6, gap=1)[1]
    two = stepped("fira", (9, 6), rank=6, gap=1)[1]
    assert torch.allclose(one, two, atol=1e-5)


def test_galore_keeps_its_moments_when_the_subspace_changes() -> None:
    made, _ = stepped("galore", (9, 6), steps=3, rank=2, gap=2)
    (kept,) = made.state.values()
    assert kept["count"] == 3
    assert kept["turn"] == 1


def test_vectors_and_frugal_of_density_one_are_adamw() -> None:
    for name, shape, options in (
        ("galore", (7,), {"rank": 2}),
        ("frugal", (7, 5), {"density": 1.0}),
        ("frugal", (7, 5), {"density": 1.0, "space": "entries"}),
    ):
        settings = {"weight_decay": 0.1, "betas": (0.8, 0.9)}
        ours = stepped(name, shape, steps=5, **settings, **options)[1]
        theirs = stepped("adamw", shape, steps=5, **settings)[1]
        assert torch.allclose(ours, theirs, atol=1e-6), name


@pytest.mark.parametrize("space", ["columns", "svd", "random", "blocks"])
def test_frugal_of_density_zero_is_sign_descent(space: str) -> None:
    start = noise(7, 5)
    found = stepped("frugal", (7, 5), steps=1, density=0.0, space=space)[1]
    assert torch.allclose(start - found, 1e-2 * noise(7, 5, seed=1).sign(), atol=1e-6)


def test_frugal_starts_its_moments_anew_at_every_turn() -> None:
    made, _ = stepped("frugal", (7, 5), steps=5, density=0.4, gap=4)
    (kept,) = made.state.values()
    assert (kept["turn"], kept["count"]) == (1, 1)


@pytest.mark.parametrize("kind", ["random", "ascending", "descending", "mirror"])
def test_blocks_take_turns(kind: str) -> None:
    turns = [chosen(6, 2, turn, kind) for turn in range(60)]
    assert all(len(turn) == 2 for turn in turns)
    assert set().union(*turns) == set(range(6))
    if kind != "random":
        counts = [sum(block in turn for turn in turns) for block in range(6)]
        assert counts == [20] * 6


def test_frugal_blocks_move_by_adam_where_they_are_active() -> None:
    parameters = [nn.Parameter(noise(4, 3, seed=i)) for i in range(4)]
    before = [p.detach().clone() for p in parameters]
    made = make(
        "frugal", parameters, 1e-2, {"density": 0.5, "space": "blocks", "turn": "ascending"}
    )
    for i, parameter in enumerate(parameters):
        parameter.grad = noise(4, 3, seed=10 + i)
    made.step()
    sizes = [made.state[p]["first"].numel() for p in parameters]
    assert sizes == [12, 12, 0, 0]
    for parameter, old in zip(parameters, before, strict=True):
        assert not torch.equal(parameter, old)


def test_the_limiter() -> None:
    found = sequence([1, 1.005, 1.2, 1.2, 1.2, 0.5])
    assert [round(x, 5) for x in found] == [1, 1.005, 1.01505, 1.0252, 1.03545, 0.5]


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_fira_adds_the_rest_at_the_pace_of_adam(shape: tuple[int, int]) -> None:
    start, gradient = noise(*shape), noise(*shape, seed=1)
    for parity in (False, True):
        made, found = stepped("fira", shape, steps=1, rank=2, scale=0.25, parity=parity)
        (kept,) = made.state.values()
        space = kept["space"]
        small = Svd(2).down(gradient, space)
        table: dict[str, Any] = {}
        adapted = direction(small, table, {"betas": (0.9, 0.999), "eps": 1e-8})
        phi = adapted.norm(dim=1 if shape[0] >= shape[1] else 0)
        phi = phi / small.norm(dim=1 if shape[0] >= shape[1] else 0)
        phi = phi[:, None] if shape[0] >= shape[1] else phi[None]
        inside = Svd(2).up(small, space, gradient.shape)
        rest = phi * (gradient - (0.25 if parity else 1.0) * inside)
        expected = 0.25 * Svd(2).up(adapted, space, gradient.shape) + rest
        assert torch.allclose(start - found, 1e-2 * expected, atol=1e-6)
        assert torch.linalg.matrix_rank((start - found).detach()) == min(shape)


@pytest.mark.parametrize("size", [1, 2, 5, 8, 30])
def test_cosines_are_orthonormal_and_the_fft_is_the_same(size: int) -> None:
    matrix = cosines(size, torch.device("cpu"), torch.double)
    assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=torch.double), atol=1e-12)
    rows = noise(4, size).double()
    fast = transformed(rows)
    assert torch.allclose(fast, rows @ matrix.T, atol=1e-12)
    theirs = scipy.fft.dct(rows.numpy(), type=2, norm="ortho")
    assert torch.allclose(fast, torch.from_numpy(theirs), atol=1e-12)


@pytest.mark.parametrize("shape", [(30, 12), (12, 30)])
@pytest.mark.parametrize("norm", [1, 2])
def test_what_cosines_leave_out(shape: tuple[int, int], norm: int) -> None:
    gradient, space = noise(*shape).double(), dict[str, Any]()
    projector = Cosines(5, norm)
    projector.fit(gradient, space, 0)
    inside = projector.up(projector.down(gradient, space), space, gradient.shape)
    left = float((gradient - inside).square().sum())
    spectrum = transformed(gradient if shape[0] > shape[1] else gradient.T)
    kept = float(spectrum[:, space["chosen"]].square().sum())
    assert left == pytest.approx(float(gradient.square().sum()) - kept, rel=1e-6)
    if norm == 2:
        assert left <= (1 - 5 / 12) * float(gradient.square().sum())


def test_moments_follow_their_cosines() -> None:
    made, parameter = stepped("dct", (12, 6), steps=1, rank=2)
    kept = made.state[parameter]
    rows = cosines(6, torch.device("cpu"), torch.float)
    old, first = kept["space"]["chosen"].tolist(), kept["first"].clone()
    new = [old[1], next(i for i in range(6) if i not in old)]
    parameter.grad = noise(12, 2, seed=5) @ rows[sorted(new)] * 10
    made.step()
    assert kept["space"]["chosen"].tolist() == sorted(new)
    place = sorted(new).index(old[1])
    small = parameter.grad @ rows[old[1]]
    assert torch.allclose(kept["first"][:, place], 0.9 * first[:, 1] + 0.1 * small, atol=1e-5)
    fresh = 1 - place
    assert torch.allclose(
        kept["first"][:, fresh], 0.1 * parameter.grad @ rows[sorted(new)[fresh]], atol=1e-5
    )


def test_error_feedback_gives_back_what_was_left_out() -> None:
    made, parameter = stepped("dct", (12, 6), steps=1, rank=2, feedback=True)
    kept = made.state[parameter]
    gradient, space = noise(12, 6, seed=1), kept["space"]
    projector = Cosines(2)
    inside = projector.up(projector.down(gradient, space), space, gradient.shape)
    assert torch.allclose(kept["error"], gradient - inside, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("galor", {}, "unknown optimizer 'galor'; did you mean galore"),
        ("galore", {"rnk": 2}, "galore has no option 'rnk'; did you mean rank"),
        ("galore", {"side": "top"}, "projection side is 'top'"),
        ("frugal", {"density": 2}, "density is 2"),
        ("frugal", {"space": "x"}, "space is 'x', not one of"),
        ("dct", {"norm": 3}, "norm is 3"),
        ("lora_pro", {"moments": "x"}, "moments is 'x'"),
        ("lora_pro", {}, "pairs of factors"),
        ("galore", {"betas": [1.0, 0.9]}, "betas are"),
        ("adamw", {"weight_decay": "x"}, "does not take these options"),
    ],
)
def test_what_cannot_be_made(name: str, options: dict[str, Any], message: str) -> None:
    parameter = nn.Parameter(torch.ones(3, 3))
    parameter.grad = torch.ones(3, 3)
    with pytest.raises(CmloraError, match=message):
        make(name, [parameter], 1e-3, options).step()


def test_eight_bits_where_a_library_is_installed() -> None:
    parameter = nn.Parameter(noise(64, 64))
    if find_spec("torchao") is None:
        with pytest.raises(CmloraError, match="pip install"):
            make("adamw_8bit", [parameter], 1e-2, {})
        return
    made = make("adamw_8bit", [parameter], 1e-2, {})
    parameter.grad = noise(64, 64, seed=1)
    made.step()
    assert not torch.equal(parameter, noise(64, 64))


def test_options_are_those_of_the_class_and_what_it_is_built_on() -> None:
    assert options_of("fira") >= {"parity", "rank", "gap", "betas", "weight_decay"}
    assert options_of("adamw") == {"betas", "eps", "weight_decay"}


def _theirs(module: str, name: str) -> Callable[..., Any]:
    found: Callable[..., Any] = getattr(pytest.importorskip(module), name)
    return found


def test_parity_with_the_published_galore() -> None:
    theirs = _theirs("galore_torch", "GaLoreAdamW")
    parameter = nn.Parameter(noise(40, 24))
    group = {
        "params": [parameter],
        "rank": 4,
        "update_proj_gap": 2,
        "scale": 0.25,
        "proj_type": "std",
    }
    made = theirs([group], lr=1e-2)
    for step in range(3):
        parameter.grad = noise(40, 24, seed=step + 1)
        made.step()
    ours = stepped("galore", (40, 24), steps=3, rank=4, gap=2)[1]
    assert torch.allclose(parameter, ours, atol=1e-5)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_parity_with_the_published_fira(shape: tuple[int, int]) -> None:
    theirs = _theirs("fira", "FiraAdamW")
    parameter = nn.Parameter(noise(*shape))
    group = {
        "params": [parameter],
        "rank": 4,
        "update_proj_gap": 2,
        "alpha": 0.25,
        "proj_type": "std",
    }
    made = theirs([group], lr=1e-2)
    for step in range(5):
        parameter.grad = noise(*shape, seed=step + 1)
        made.step()
    ours = stepped("fira", shape, steps=5, rank=4, gap=2, parity=True, eps=1e-6)[1]
    assert torch.allclose(parameter, ours, atol=5e-5)
    plain = stepped("fira", shape, steps=5, rank=4, gap=2)[1]
    assert not torch.allclose(parameter, plain, atol=1e-3)
