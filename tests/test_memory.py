"""What a composition costs in memory."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from cmlora.compose import compose
from cmlora.engine import HOOK
from cmlora.files import load
from cmlora.gating import GatedLoRAs
from tests import families, tiny
from tests.composing import average


def held(model: Any) -> dict[int, int]:
    """Bytes of every storage the model's tensors lie in, by address."""
    tensors = [*model.parameters(), *model.buffers()]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_loras_cost_their_own_size_and_a_slot_each(name: str) -> None:
    sizes: dict[int, int] = {}
    for count in (1, 2, 4):
        made = families.FAMILIES[name]()
        made.pipe.set_progress_bar_config(disable=True)
        model = made.models()[0]
        base = held(model)
        names = [f"lora{i}" for i in range(count)]
        families.add_loras([model], names, families.TARGETS)
        loras = sum(p.nbytes for key, p in model.named_parameters() if "lora_" in key)
        with compose(made.pipe, names, method=average, cache="uniform:4"):
            store = model._diffusers_hook.get_hook(HOOK)._cache.store
            peak = 0

            def note(*_: Any, store: Any = store) -> dict[str, Any]:
                nonlocal peak
                peak = max(peak, store.bytes)
                return {}

            made.run(callback_on_step_end=note)
            now = held(model)
        assert sum(now.values()) == sum(base.values()) + loras
        assert base.items() <= now.items()
        sizes[count] = peak
        assert not store.bytes
    assert sizes[4] == 2 * sizes[2] == 4 * sizes[1] > 0


def test_a_gate_costs_the_loras_once_more() -> None:
    pipe = tiny.sd15()
    names = ["a", "b", "c"]
    tiny.add_loras(pipe, names)
    model = pipe.unet
    base = sum(held(model).values())
    parts = {key: p.nbytes for key, p in model.named_parameters() if "lora_" in key}
    curves = "<lora:a:1@0,0.5@1>"  # a strength that changes at every step
    with compose(pipe, names, method="gate", keep="none", schedule=curves):
        tiny.run(pipe, steps=4)
        gc.collect()
        gates = [each for each in gc.get_objects() if type(each) is GatedLoRAs]
        factors = [t for gate in gates for t in vars(gate).values() if torch.is_tensor(t)]
        rows = [gate._roots for gate in gates]
        assert len(gates) == len(parts) / (2 * len(names))
        assert sum(t.nbytes for t in factors) == sum(parts.values()) + sum(r.nbytes for r in rows)
        assert sum(held(model).values()) == base
    del gates, factors, rows
    gc.collect()
    assert not any(type(each) is GatedLoRAs for each in gc.get_objects())


def tensors() -> int:
    """How many tensors are alive."""
    gc.collect()
    return sum(1 for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter))


def cycle(pipe: Any, files: list[Path], *, render: bool = True) -> None:
    """Load, compose, render, unload."""
    for file in files:
        load(pipe, file, file.stem)
    names = [file.stem for file in files]
    with compose(pipe, names, method=average, cache="uniform:2", text_encoder="per_lora"):
        if render:
            tiny.run(pipe, steps=2)
    pipe.unload_lora_weights()


def test_cycles_leave_no_tensor_behind(lora_folder: Path) -> None:
    pipe = tiny.sd15()
    files = sorted(lora_folder.glob("*.safetensors"))[:2]
    for _ in range(2):
        cycle(pipe, files)
    before = tensors()
    for _ in range(2):
        cycle(pipe, files)
    assert tensors() <= before


@pytest.mark.slow
def test_two_hundred_cycles_leave_memory_flat(lora_folder: Path) -> None:
    pipe = tiny.sd15()
    files = sorted(lora_folder.glob("*.safetensors"))[:2]
    sizes = []
    for count in range(200):
        cycle(pipe, files, render=count % 10 == 0)
        if count % 50 == 49:
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            sizes.append(pages * 4096)
    assert sizes[-1] - sizes[1] < 8 * 2**20
