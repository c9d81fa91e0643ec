"""Merges learnt from a loss: masks and columns, beside what they have to beat."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageStat
from torch import Tensor

from cmlora.adapters.merging.atlas import atlas
from cmlora.adapters.merging.concrete import concrete, drawn
from cmlora.adapters.merging.learn import Fitted
from cmlora.adapters.merging.ziplora_trained import shared, ziplora_trained
from cmlora.errors import CmloraError
from cmlora.files import read
from cmlora.lora import LoRA, Update, stack
from cmlora.pipelines.learning import LEARNED, learn, lorahub
from cmlora.pipelines.objectives import Scored
from cmlora.pipelines.render import assemble
from tests.merging.makers import SHAPES, distance, make, permuted, regauged, without

MODULE = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def contested() -> list[LoRA]:
    """Two LoRAs of one layer, half of whose rank units undo the other's work on its inputs."""
    up = torch.linalg.qr(random(24, 24))[0]
    down = torch.linalg.qr(random(20, 20, seed=1))[0]
    one, other = slice(0, 4), slice(4, 8)
    sizes = torch.linspace(2, 1, 4)[:, None]
    first = torch.cat([sizes * down[one], 0.8 * sizes * down[other]])
    second = torch.cat([sizes * down[other], 0.7 * sizes * down[one]])
    return [
        LoRA("a", {MODULE: Update(first, torch.cat([up[:, one], -up[:, other]], 1))}),
        LoRA("b", {MODULE: Update(second, torch.cat([up[:, other], -up[:, one]], 1))}),
    ]


def own_inputs() -> list[Tensor]:
    """Every LoRA's prompts, which hardly reach what only the other one is for."""
    down = torch.linalg.qr(random(20, 20, seed=1))[0]
    inputs = []
    for index, foreign in enumerate((slice(4, 8), slice(0, 4))):
        strengths = torch.ones(20)
        strengths[foreign] = 0.05
        inputs.append(random(50, 20, seed=10 + index) * strengths @ down)
    return inputs


def own_answers(loras: list[LoRA]) -> Callable[[LoRA], Tensor]:
    """What every LoRA does to inputs of its own, as a distillation loss."""
    inputs = own_inputs()
    wanted = [x @ lora.updates[MODULE].delta().T for x, lora in zip(inputs, loras, strict=True)]

    def loss(lora: LoRA) -> Tensor:
        delta = lora.updates[MODULE].delta()
        parts = [
            (x @ delta.T - y).square().mean() / y.square().mean()
            for x, y in zip(inputs, wanted, strict=True)
        ]
        return torch.stack(parts).mean()

    return loss


def nearest(target: Mapping[str, Tensor]) -> Callable[[LoRA], Tensor]:
    def loss(lora: LoRA) -> Tensor:
        parts = [
            (lora.updates[m].delta() - delta).square().sum() / delta.square().sum()
            for m, delta in target.items()
        ]
        return torch.stack(parts).mean()

    return loss


@pytest.mark.parametrize(
    ("granularity", "rescale", "share"),
    [("rank", True, 0.9), ("rank", False, 0.5), ("element", True, 0.9)],
)
def test_a_mask_keeps_both_concepts(granularity: Any, rescale: bool, share: float) -> None:
    loras = contested()
    loss = own_answers(loras)
    plain = float(loss(stack([(x, 1.0) for x in loras], "sum")))
    found = concrete(loras, loss, granularity=granularity, rescale=rescale, control=False)
    assert found.losses[0] == pytest.approx(plain, rel=1e-5)
    assert float(loss(found.lora)) == pytest.approx(found.losses[-1], rel=1e-4)
    assert found.losses[-1] <= share * plain


def test_masks_have_mean_one() -> None:
    loras = contested()
    seen: list[LoRA] = []

    def watched(lora: LoRA) -> Tensor:
        seen.append(lora)
        return own_answers(loras)(lora)

    concrete(loras, watched, steps=5, control=False)
    whole = stack([(x, 1.0) for x in loras], "sum").updates[MODULE]
    for lora in seen:
        update = lora.updates[MODULE]
        # Canonical units are orthogonal here: their lengths give the mask back.
        masks = update.up.norm(dim=0) / seen[0].updates[MODULE].up.norm(dim=0)
        assert float(masks.detach().mean()) == pytest.approx(1, abs=1e-6)
    assert seen[0].updates[MODULE].delta().norm() == pytest.approx(
        float(whole.delta().norm()), rel=1e-5
    )


def test_masks_are_half_open_at_first() -> None:
    """Relaxed Bernoulli masks with logits of zero, over 200000 draws, and what stands for them."""
    logits, generator = torch.zeros(200_000), torch.Generator().manual_seed(0)
    for temperature in (0.1, 0.5, 2.0):
        masks = drawn(logits, temperature, generator)
        assert float(masks.mean()) == pytest.approx(0.5, abs=0.005)
        assert 0 <= float(masks.min()) < float(masks.max()) <= 1
        assert float(drawn(logits[:1], temperature, None)) == pytest.approx(0.5, abs=1e-6)


def test_module_masks_shift_strength_between_modules() -> None:
    loras = [make("a"), make("b")]
    half = sorted(SHAPES)[:2]
    sums = stack([(x, 1.0) for x in loras], "s").deltas()
    kept = {m: 2.5 * delta for m, delta in sums.items() if m in half}

    def loss(lora: LoRA) -> Tensor:
        rest = [lora.updates[m].delta().square().mean() for m in sums if m not in half]
        return nearest(kept)(lora) + torch.stack(rest).mean()

    found = concrete(loras, loss, granularity="module", control=False)
    assert found.losses[-1] < 0.3 * found.losses[0]


def test_a_mask_that_does_not_help_is_not_used() -> None:
    lora = make("a")
    loss = nearest(lora.deltas())
    found = concrete([lora], loss, steps=3, rate=5.0, control=False)
    assert found.losses[-1] <= found.losses[0] < 1e-9
    assert distance(found.lora, lora) < 1e-5


def test_columns_reach_the_layerwise_optimum() -> None:
    loras = contested()
    loss = own_answers(loras)
    found = ziplora_trained(loras, loss, steps=300, rate=0.05, overlap=0.0, control=False)
    # The loss is quadratic in the columns: solve it once more with everything written out.
    inputs = own_inputs()
    deltas = [x.updates[MODULE].delta() for x in loras]
    wanted = [x @ d.T for x, d in zip(inputs, deltas, strict=True)]
    rows, target = [], []
    for x, y in zip(inputs, wanted, strict=True):
        size = float(y.norm())
        blocks = [torch.einsum("nm,om->nom", x, d).flatten(0, 1) for d in deltas]
        rows.append(torch.cat(blocks, 1) / size)
        target.append(y.flatten() / size)
    system, right = torch.cat(rows).double(), torch.cat(target).double()
    best = torch.linalg.lstsq(system, right, driver="gelsd").solution
    least = float((system @ best - right).square().sum()) / 2
    assert least <= min(found.losses) * (1 + 1e-4)
    assert min(found.losses) - least < 0.05 * (found.losses[0] - least)


def test_a_penalty_separates_the_columns() -> None:
    loras = contested()
    loss = own_answers(loras)
    overlaps = []
    for weight in (0.0, 0.3, 3.0):
        found = ziplora_trained(loras, loss, steps=150, rate=0.05, overlap=weight, control=False)
        down = found.lora.updates[MODULE].down
        own = [x.updates[MODULE].down for x in loras]
        columns = [
            {MODULE: (part * d).sum(0) / d.square().sum(0)}
            for part, d in zip((down[:8], down[8:]), own, strict=True)
        ]
        overlaps.append(float(shared(columns)))
    assert overlaps == sorted(overlaps, reverse=True)
    assert overlaps[-1] < 0.5 * overlaps[0]


@pytest.mark.parametrize("seed", range(3))
def test_coefficients_are_found_without_gradients(seed: int) -> None:
    loras = [LoRA(name, {MODULE: make(name).updates[MODULE]}) for name in "abcd"]
    loss = nearest(stack([(loras[0], 0.8), (loras[3], 0.6)], "y").deltas())
    found = lorahub(loras, loss, budget=200, control=False, seed=seed)
    strengths = {name: own[MODULE] for name, own in found.strengths.items()}
    assert strengths == pytest.approx({"a": 0.8, "b": 0, "c": 0, "d": 0.6}, abs=0.03)
    # The loss of the point that was chosen, with its own penalty.
    score = float(loss(found.lora)) + 0.05 * sum(map(abs, strengths.values())) / 4
    assert score <= 0.02
    # At zero the loss is 1, and the result is never worse than that.
    assert found.losses[0] == pytest.approx(1)
    assert len(found.losses) == 200


QUICK: dict[str, dict[str, Any]] = {
    "lorahub": {"budget": 12},
    "atlas": {"steps": 6},
    "concrete": {"steps": 6},
    "ziplora_trained": {"steps": 6},
}


def fit(method: str, loras: list[LoRA], **options: Any) -> Fitted:
    target = make("y").deltas()
    given = {"control": False} | QUICK[method] | options
    found: Fitted = LEARNED[method].object.function(loras, nearest(target), **given)
    return found


@pytest.mark.parametrize("method", list(LEARNED))
def test_laws_of_learned_methods(method: str) -> None:
    loras = [make("a", 3), make("b", 2)]
    plain = fit(method, loras).lora
    assert set(plain.updates) == set(SHAPES)
    assert distance(plain, fit(method, loras).lora) == 0
    promises = LEARNED[method].object.promises
    if "units" in promises:
        assert distance(plain, fit(method, [permuted(loras[0]), loras[1]]).lora) < 1e-4
    if "gauge" in promises:
        assert distance(plain, fit(method, [loras[0], regauged(loras[1])]).lora) < 1e-3
    module = min(SHAPES)
    fewer = fit(method, [loras[0], without(loras[1], module)]).lora
    assert fewer.updates[module].shape == plain.updates[module].shape
    half = fit(method, [make("a", 3, dtype=torch.float16), make("b", 3, dtype=torch.float16)])
    assert all(update.up.isfinite().all() for update in half.lora.updates.values())


@pytest.mark.parametrize("method", list(LEARNED))
def test_a_control_of_random_loras(method: str) -> None:
    loras = [make("y"), make("b")]  # one of them is the answer
    found = fit(method, loras, control=True, **({"budget": 40} if method == "lorahub" else {}))
    assert found.control is not None
    assert min(found.losses) < found.control
    assert not any(update.up.requires_grad for update in found.lora.updates.values())


def test_searching_by_pictures_needs_no_gradient(model_folder: Path, lora_folder: Path) -> None:
    """Darker pictures are better: whatever is found is no brighter than the model alone."""
    pipe = assemble(model_folder, [])
    loras = [read(lora_folder / f"{name}.safetensors") for name in ("cat", "hat")]

    def darkness(pictures: Sequence[Image.Image], _: Sequence[str]) -> list[float]:
        return [-ImageStat.Stat(picture.convert("L")).mean[0] for picture in pictures]

    objective = Scored(pipe, "unet", "a cat", darkness, seeds=(0,), steps=1)
    done = learn("lorahub", loras, [1.0, 1.0], objective, budget=4, control=False)
    assert done.losses["learned"] <= done.losses["base"]
    assert objective.value(None) == done.losses["base"] > 0
    with pytest.raises(CmloraError, match="atlas follows gradients"):
        learn("atlas", loras, [1.0, 1.0], objective)


def test_mistakes() -> None:
    with pytest.raises(CmloraError, match="temperature is 0"):
        concrete([make("a")], nearest(make("a").deltas()), temperature=0.0)
    with pytest.raises(CmloraError, match="0 steps or more"):
        atlas([make("a")], nearest(make("a").deltas()), steps=-1)
