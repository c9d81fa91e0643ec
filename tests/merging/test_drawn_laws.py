"""The laws of merging methods for drawn shapes, ranks and scales, over the registry."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cmlora.adapters.merging import MERGES
from cmlora.files import read
from cmlora.lora import LoRA, Update
from tests.merging.makers import distance, do, named, rank_stabilised, regauged, without
from tests.merging.test_missing import WEIGHTS, expected

METHODS = list(MERGES)
LINEAR, KERNEL = "unet.mid_block.attentions.0.proj_in", "unet.mid_block.resnets.0.conv1"

few = settings(
    deadline=None,
    derandomize=True,
    max_examples=4,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@dataclass(frozen=True)
class Case:
    """Two LoRAs of a linear layer and a convolution.

    Args:
        loras: a and b, of different ranks, with scales alpha / rank or alpha / sqrt(rank).
        even: the same with one rank, for methods that need it.
        seed: for whatever is drawn beside them.
    """

    loras: tuple[LoRA, LoRA]
    even: tuple[LoRA, LoRA]
    seed: int

    def of(self, method: str) -> tuple[LoRA, LoRA]:
        return self.loras if "ranks" in MERGES[method].object.promises else self.even


@st.composite
def cases(draw: st.DrawFn) -> Case:
    sides = st.integers(6, 14)
    shapes = {
        LINEAR: (draw(sides), draw(sides), *draw(st.sampled_from([(), (1, 1)]))),
        KERNEL: (draw(sides), draw(st.integers(2, 4)), 3, 3),
    }
    ranks = draw(st.permutations([1, 2, 3, 4]))[:2]
    alpha = draw(st.sampled_from([0.5, 6.0, 11.0]))
    power = draw(st.sampled_from([1.0, 0.5]))
    seed = draw(st.integers(0, 2**20))

    def one(name: str, rank: int, own: int) -> LoRA:
        g = torch.Generator().manual_seed(seed + own)
        updates = {
            module: Update(
                torch.randn((rank, *shape[1:]), generator=g),
                torch.randn((shape[0], rank), generator=g),
                alpha / rank**power,
            )
            for module, shape in shapes.items()
        }
        return LoRA(name, updates, triggers=(name,))

    a = one("a", ranks[0], 0)
    return Case((a, one("b", ranks[1], 1)), (a, one("b", ranks[0], 1)), seed)


def obeying(law: str) -> list[str]:
    return [name for name in METHODS if law in MERGES[name].object.laws]


@pytest.mark.parametrize("method", obeying("L1"))
@few
@given(cases())
def test_one_lora_is_itself(method: str, case: Case) -> None:
    alone = case.loras[0]
    assert distance(do(method, [alone], **MERGES[method].object.lossless).lora, alone) < 1e-5


@pytest.mark.parametrize("method", obeying("L2a") + obeying("L2b"))
@few
@given(cases(), st.integers(2, 4))
def test_copies(method: str, case: Case, count: int) -> None:
    rules = MERGES[method].object
    count = count if "many" in rules.promises else 2
    original = case.loras[1]
    copies = [named(original, f"x{index}") for index in range(count)]
    weight = 1 / count if rules.kind == "sum" else 1.0
    merged = do(method, copies, [weight] * count, **rules.lossless)
    assert distance(merged.lora, original) < 1e-5


@pytest.mark.parametrize("method", obeying("L3"))
@few
@given(cases())
def test_order_of_rank_units(method: str, case: Case) -> None:
    loras, g = case.of(method), torch.Generator().manual_seed(case.seed)
    shuffled = []
    for lora in loras:
        updates = {}
        for module, update in lora.updates.items():
            order = torch.randperm(update.rank, generator=g)
            updates[module] = replace(update, down=update.down[order], up=update.up[:, order])
        shuffled.append(replace(lora, updates=updates))
    plain = do(method, loras, WEIGHTS).lora
    assert distance(plain, do(method, shuffled, WEIGHTS).lora) < 1e-5


@pytest.mark.parametrize("method", obeying("L4"))
@few
@given(cases())
def test_other_factors_of_the_same_delta(method: str, case: Case) -> None:
    loras = case.of(method)
    plain = do(method, loras, WEIGHTS).lora
    changed = [regauged(lora, case.seed) for lora in loras]
    assert distance(plain, do(method, changed, WEIGHTS).lora) < 1e-4


@pytest.mark.parametrize("method", obeying("L5"))
@few
@given(cases())
def test_order_of_loras(method: str, case: Case) -> None:
    loras = case.of(method)
    one = do(method, loras, WEIGHTS).lora
    again = do(method, loras[::-1], WEIGHTS[::-1]).lora
    assert one.updates.keys() == again.updates.keys()
    for module, update in one.updates.items():
        assert torch.equal(update.up, again.updates[module].up)
        assert torch.equal(update.down, again.updates[module].down)


@pytest.mark.parametrize("method", obeying("L6"))
@few
@given(cases(), st.sampled_from([LINEAR, KERNEL]))
def test_a_missing_module_is_zero(method: str, case: Case, module: str) -> None:
    one, other = case.of(method)
    merged = do(method, [one, without(other, module)], WEIGHTS).lora
    found = merged.updates[module].delta().double().flatten(1).numpy()
    wanted = expected(method, one.updates[module], module)
    assert np.linalg.norm(found - wanted) < 1e-4 * np.linalg.norm(wanted)


@pytest.mark.parametrize("method", obeying("L9"))
@few
@given(case=cases())
def test_scales_are_baked_in(method: str, case: Case) -> None:
    loras = case.of(method)
    plain = [
        replace(
            lora,
            updates={m: Update(u.down, u.up * u.scale) for m, u in lora.updates.items()},
        )
        for lora in loras
    ]
    found = do(method, loras, WEIGHTS).lora
    assert distance(found, do(method, plain, WEIGHTS).lora) < 1e-4
    assert all(update.scale == 1 for update in found.updates.values())


@pytest.mark.parametrize("method", obeying("L9"))
@few
@given(case=cases(), alpha=st.sampled_from([1.0, 5.0, 8.0]))
def test_rank_stabilised_files(method: str, case: Case, alpha: float, tmp_path: Path) -> None:
    """The scale alpha / sqrt(rank) is written nowhere but in a setting."""
    files, loud = [], []
    for lora in case.of(method):
        files.append(read(rank_stabilised(lora, tmp_path, alpha)))
        updates = {m: Update(u.down, u.up * (alpha / u.rank**0.5)) for m, u in lora.updates.items()}
        loud.append(replace(lora, updates=updates))
    found = do(method, files, WEIGHTS).lora
    assert distance(found, do(method, loud, WEIGHTS).lora) < 1e-4
    assert all(update.scale == 1 for update in found.updates.values())
