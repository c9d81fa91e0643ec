"""The laws that learned methods declare, and the report of a learned merge."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cmlora.adapters.merging.method import LAWS, Method
from cmlora.errors import CmloraError
from cmlora.files import read, write
from cmlora.lora import LoRA, Update, stack
from cmlora.pipelines.learning import LEARNED, Learned, learn
from tests import tiny
from tests.merging.makers import SHAPES, distance, make, rank_stabilised, without, zeroed

METHODS = list(LEARNED)
LENGTH: dict[str, dict[str, Any]] = {
    "lorahub": {"budget": 8},
    "atlas": {"steps": 4},
    "concrete": {"steps": 4},
    "ziplora_trained": {"steps": 4},
}
MODULE = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


@dataclass(frozen=True)
class Near:
    """How far a LoRA's denoiser is from given updates; a module that is missing is zero."""

    target: Mapping[str, Tensor]
    component: str = "unet"
    differentiable: bool = True

    def loss(self, lora: LoRA | None) -> Tensor:
        parts = []
        for module, wanted in self.target.items():
            update = None if lora is None else lora.updates.get(module)
            found = torch.zeros_like(wanted) if update is None else update.delta()
            gap = found.reshape(wanted.shape) - wanted
            parts.append(gap.square().sum() / wanted.square().sum())
        return torch.stack(parts).mean()

    def value(self, lora: LoRA | None) -> float:
        with torch.no_grad():
            return float(self.loss(lora))


def do(method: str, loras: list[LoRA], weights: tuple[float, ...], **options: Any) -> Learned:
    target = {m: u.delta() for m, u in make("y", 3).updates.items() if m.startswith("unet.")}
    given = {"control": False} | LENGTH[method] | options
    return learn(method, loras, weights, Near(target), **given)


def obeying(law: str) -> list[str]:
    return [name for name, entry in LEARNED.items() if law in entry.object.laws]


def test_every_learned_method_declares_known_laws() -> None:
    for entry in LEARNED.values():
        rules: Method = entry.object
        assert rules.laws <= LAWS.keys()
        assert {"L5", "L6", "L9", "L10", "L11"} <= rules.laws
        assert rules.needs == "objective"


@pytest.mark.parametrize(
    ("method", "options"),
    [(method, {}) for method in obeying("L5")]
    + [("concrete", {"granularity": kind}) for kind in ("element", "module")],
)
def test_order_of_loras(method: str, options: dict[str, str]) -> None:
    loras = [make("b", 2), make("a", 3), make("c", 2)]
    one = do(method, loras, (0.6, 0.8, 1.0), control=True, **options)
    again = do(method, loras[::-1], (1.0, 0.8, 0.6), control=True, **options)
    assert one.losses == again.losses
    assert one.lora.metadata == again.lora.metadata
    assert one.lora.triggers == again.lora.triggers == ("a", "b", "c")
    recipe = json.loads(one.lora.metadata["cmlora.merge"])
    assert (recipe["loras"], recipe["weights"]) == (["a", "b", "c"], [0.8, 0.6, 1.0])
    for module, update in one.lora.updates.items():
        assert torch.equal(update.up, again.lora.updates[module].up)
        assert torch.equal(update.down, again.lora.updates[module].down)


@pytest.mark.parametrize("method", obeying("L6"))
def test_a_missing_module_is_zero(method: str) -> None:
    loras = [make("a", 3), make("b", 2)]
    missing = do(method, [loras[0], without(loras[1], MODULE)], (1.0, 1.0))
    zero = do(method, [loras[0], zeroed(loras[1], MODULE)], (1.0, 1.0))
    assert distance(missing.lora, zero.lora) == 0
    assert missing.losses == zero.losses
    nothing = LoRA("a", zeroed(make("a"), MODULE).updates)
    alone = LoRA("b", {MODULE: zeroed(make("b"), MODULE).updates[MODULE]})
    assert MODULE not in do(method, [nothing, alone], (1.0, 1.0)).lora.updates
    with pytest.raises(CmloraError, match="b change nothing"):
        do(method, [alone], (1.0,))


@pytest.mark.parametrize("method", obeying("L9"))
def test_scales_are_baked_in(method: str, tmp_path: Path) -> None:
    plain = [make("a", 4), make("b", 2)]
    files = [read(rank_stabilised(lora, tmp_path)) for lora in plain]
    assert all(update.scale not in (0.5, 1.0) for update in files[0].updates.values())
    loud = [
        replace(x, updates={m: replace(u, scale=6 / u.rank**0.5) for m, u in x.updates.items()})
        for x in plain
    ]
    found, wanted = do(method, files, (0.8, 0.6)), do(method, loud, (0.8, 0.6))
    assert distance(found.lora, wanted.lora) < 1e-5
    assert all(update.scale == 1 for update in found.lora.updates.values())
    alone = do(method, files[:1], (0.8,)).lora
    assert all(update.scale == 1 and update.mid is None for update in alone.updates.values())


@pytest.mark.parametrize("method", METHODS)
def test_convolutions_in_three_factors(method: str) -> None:
    """One LoRA alone has them in its file, and its core is part of the result."""
    module = "unet.down_blocks.0.resnets.0.conv1"
    g = torch.Generator().manual_seed(0)
    shapes = ((4, 5, 1, 1), (16, 4), (4, 4, 3, 3))
    down, up, mid = (torch.randn(shape, generator=g) for shape in shapes)
    tucker = LoRA("a", {module: Update(down, up, 0.5, mid)})
    folded = LoRA("a", {module: tucker.updates[module].folded()})
    found, wanted = do(method, [tucker], (1.0,)).lora, do(method, [folded], (1.0,)).lora
    assert distance(found, wanted) < 1e-5
    assert found.updates[module].shape == SHAPES[module]


@pytest.fixture(scope="module")
def tiny_loras() -> list[LoRA]:
    unet = tiny.sd15().unet
    shapes = {
        f"unet.{name}": layer.weight.shape
        for name, layer in unet.named_modules()
        if name.startswith("mid") and name.endswith((".attn1.to_q", "conv1", "ff.net.2"))
    }
    found = []
    for seed, (name, rank) in enumerate({"a": 3, "b": 2}.items()):
        g = torch.Generator().manual_seed(seed)
        updates = {
            key: Update(
                torch.randn((rank, *shape[1:]), generator=g),
                torch.randn((shape[0], rank), generator=g),
                0.3,
            )
            for key, shape in shapes.items()
        }
        found.append(LoRA(name, updates))
    return found


@pytest.mark.parametrize("method", obeying("L10"))
def test_a_pipeline_computes_the_weight_and_the_update(
    method: str, tiny_loras: list[LoRA], tmp_path: Path
) -> None:
    target = {
        m: d + d.flip(0) for m, d in stack([(x, 1.0) for x in tiny_loras], "y").deltas().items()
    }
    merged = learn(
        method, tiny_loras, [1.0, 1.0], Near(target), control=False, **LENGTH[method]
    ).lora
    write(merged, tmp_path / "m.safetensors")
    loaded, plain = tiny.sd15(), tiny.sd15()
    loaded.load_lora_weights(str(tmp_path / "m.safetensors"))
    arguments = (tiny.latents(), 10, torch.randn(1, 16, 16))
    with torch.no_grad():
        before = plain.unet(*arguments).sample
        for module, update in merged.updates.items():
            weight = plain.unet.get_submodule(module.removeprefix("unet.")).weight
            weight.data += update.delta().reshape(weight.shape)
        wanted, found = plain.unet(*arguments).sample, loaded.unet(*arguments).sample
    assert float((found - wanted).norm()) < 1e-4 * float(wanted.norm())
    assert float((wanted - before).norm()) > 1e-3 * float(before.norm())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", obeying("L11"))
def test_half_precision(method: str, dtype: torch.dtype) -> None:
    loras = [make("a", 3, dtype=dtype), make("b", 2, dtype=dtype)]
    for weights, rank in (((0.8, 0.6), None), ((0.8, 0.6), 2)):
        for update in do(method, loras, weights, rank=rank).lora.updates.values():
            assert update.up.dtype == update.down.dtype == dtype
            assert update.up.isfinite().all()
            assert update.down.isfinite().all()
    mixed = do(method, [loras[0], make("b", 2)], (0.8, 0.6)).lora
    assert {update.up.dtype for update in mixed.updates.values()} == {torch.float32}


def test_the_loss_is_that_of_what_is_written() -> None:
    loras = [make("a", 3, dtype=torch.bfloat16), make("b", 2, dtype=torch.bfloat16)]
    done = do("atlas", loras, (1.0, 1.0))
    target = {m: u.delta() for m, u in make("y", 3).updates.items() if m.startswith("unet.")}
    assert done.losses["learned"] == Near(target).value(done.lora)


@pytest.mark.parametrize("rank", [0, 6, 5000])
@pytest.mark.parametrize("method", METHODS)
def test_ranks_that_are_not_possible(method: str, rank: int) -> None:
    with pytest.raises(CmloraError, match=f"rank {rank} is not possible.*allow 1 to 5"):
        do(method, [make("a", 3), make("b", 2)], (1.0, 1.0), rank=rank)


@pytest.mark.parametrize("module", [MODULE, min(SHAPES)])
def test_not_a_number_is_named(module: str) -> None:
    """In text encoders too, which are not learnt."""
    broken = make("b")
    broken.updates[module].up[0, 0] = torch.nan
    with pytest.raises(CmloraError, match=rf"b: {module} \(up\) holds NaN"):
        do("atlas", [make("a"), broken], (1.0, 1.0))


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("method", METHODS)
def test_a_report(method: str, rank: int | None) -> None:
    base = {"modelspec.architecture": "stable-diffusion-v1/lora", "ss_base_model_version": "sd_1.5"}
    loras = [
        replace(make("a", 3), metadata={**base, "ss_sd_model_name": "one"}),
        replace(make("b", 2), metadata={**base, "ss_sd_model_name": "other"}),
    ]
    done = do(method, loras, (0.8, 0.6), rank=rank)
    report = done.report
    deltas = [lora.deltas() for lora in loras]
    lost = total = 0.0
    for module in SHAPES:
        exact = 0.8 * deltas[0][module].double() + 0.6 * deltas[1][module].double()
        lost += float((done.lora.updates[module].delta().double() - exact).square().sum())
        total += float(exact.square().sum())
    assert report.error == pytest.approx(math.sqrt(lost / total), abs=1e-5)
    assert "unet.mid_block.attentions.0" in report.errors
    text = report.errors["text_encoder.text_model.encoder.layers.0"]
    assert text < 1e-5 if rank is None else text > 0.1
    assert report.rank == max(update.rank for update in done.lora.updates.values())
    assert report.bytes == sum(u.up.nbytes + u.down.nbytes for u in done.lora.updates.values())
    assert report.seconds > 0
    assert (report.method, report.kind) == (method, "other")
    assert "only the unet is learnt; text encoders are added up" in report.warnings
    assert ("lost_to_rank" in report.notes) == (rank is not None)
    told = done.lora.metadata
    assert {key: told.get(key) for key in base} == base
    assert "ss_sd_model_name" not in told


def test_a_cut_after_learning_is_reported() -> None:
    loras = [make("a", 3), make("b", 2)]
    whole, cut = (do("atlas", loras, (1.0, 1.0), rank=rank) for rank in (None, 2))
    lost = total = 0.0
    for update in whole.lora.updates.values():
        values = update.singular_values().square()
        lost, total = lost + float(values[2:].sum()), total + float(values.sum())
    assert cut.report.notes["lost_to_rank"] == pytest.approx(math.sqrt(lost / total), abs=1e-5)
    assert cut.report.rank == 2


def test_a_control_that_wins_is_said() -> None:
    """With a target that no LoRA comes near, random ones do as well."""
    done = do("lorahub", [make("a", 1), make("b", 1)], (1.0, 1.0), control=True, budget=1)
    assert done.losses["random"] == done.losses["learned"] == pytest.approx(1)
    assert any("random LoRAs do as well" in warning for warning in done.report.warnings)
    better = do("lorahub", [make("y", 3)], (1.0,), control=True, budget=30)
    assert not any("random" in warning for warning in better.report.warnings)


def test_values_too_large_for_half_precision_stay_single() -> None:
    loud = make("a", dtype=torch.float16)
    updates = {m: replace(u, scale=1e7) for m, u in loud.updates.items()}
    done = do("ziplora_trained", [replace(loud, updates=updates)], (1.0,), steps=0)
    assert any("too large" in warning for warning in done.report.warnings)
    assert all(update.up.dtype == torch.float32 for update in done.lora.updates.values())
    assert distance(done.lora, replace(loud, updates=updates)) < 1e-5
