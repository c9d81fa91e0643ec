"""Which passes share a call, and what cannot."""

from typing import Any

import pytest
import torch
from peft import LoKrConfig, LoraConfig, inject_adapter_in_model
from torch import nn

from cmlora.batching import Gauge, MixedBatch, Unbatchable, free_memory, split
from cmlora.compose import compose
from cmlora.denoisers import KINDS, Kind
from cmlora.errors import CmloraError
from cmlora.plan import Pass
from cmlora.switching import AdapterSwitch
from tests import families, tiny
from tests.composing import NAMES, pipeline


class Net(nn.Module):
    """One layer that sees samples, one that sees all of them as one sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.second(self.first(x).flatten(0, 1))
        return result


def net(config: Any = None, targets: tuple[str, ...] = ("first",)) -> MixedBatch:
    model = Net()
    for name in ("a", "b"):
        settings = config or LoraConfig(r=2, target_modules=list(targets))
        inject_adapter_in_model(settings, model, adapter_name=name)
    return MixedBatch(AdapterSwitch(model), Kind(""))


PASSES = (
    Pass({"a": 1.0}),
    Pass({"b": 1.0}),
    Pass({"a": 1.0, "b": 1.0}),
    Pass({}),
    Pass({"a": 0.5}),
    Pass({"b": 1.0}),
)


def test_passes_that_fit_share_a_call() -> None:
    full = [False] * len(PASSES)
    assert net().groups(PASSES, full, 9) == [[0, 1, 3, 5], [2], [4]]
    assert net().groups(PASSES, full, 2) == [[0, 1], [2], [3, 4], [5]]
    light = [False, True, False, False, False, True]
    assert net().groups(PASSES, light, 9) == [[0, 3], [1, 5], [2], [4]]


def test_what_peft_cannot_mix_is_named() -> None:
    net().check(["a", "b"])
    with pytest.raises(Unbatchable, match="a cannot be batched: it is no plain LoRA"):
        net(LoraConfig(r=2, target_modules=["first"], use_dora=True)).check(["a"])
    with pytest.raises(Unbatchable, match="takes no adapter per sample"):
        net(LoKrConfig(r=2, target_modules=["first"])).check(["a"])


def test_layers_that_mix_samples_are_refused() -> None:
    zimage = families.zimage()
    zimage.pipe.set_progress_bar_config(disable=True)
    families.add_loras(zimage.models(), families.NAMES, ["all_x_embedder.2-1", "to_q"])
    names = list(families.NAMES)
    with (
        compose(zimage.pipe, names, method="composite", execution="batched"),
        pytest.raises(CmloraError, match="this model mixes samples; use execution='sequential'"),
    ):
        zimage.run()
    with compose(zimage.pipe, names, method="composite"):
        expected = zimage.run()
    with compose(zimage.pipe, names, method="composite", execution="auto"):
        torch.testing.assert_close(zimage.run(), expected, rtol=1e-4, atol=1e-4)


def test_arguments_are_repeated_by_their_meaning() -> None:
    mixed = MixedBatch(AdapterSwitch(Net()), KINDS["FluxTransformer2DModel"])
    ids, states = torch.zeros(2, 3), torch.arange(4.0).reshape(2, 2)
    assert mixed.repeat("img_ids", ids, 3, 2) is ids
    assert mixed.repeat("hidden_states", states, 3, 2).tolist() == states.tolist() * 3
    assert mixed.repeat("timestep", torch.tensor(5), 3, 2).ndim == 0
    nested = mixed.repeat("added", {"text": states, "flag": True}, 2, 2)
    assert (len(nested["text"]), nested["flag"]) == (4, True)
    residuals = mixed.repeat("controlnet_block_samples", (states, states), 3, 2)
    assert [len(each) for each in residuals] == [6, 6]
    listed = MixedBatch(AdapterSwitch(Net()), KINDS["ZImageTransformer2DModel"])
    assert listed.repeat("x", [1, 2], 2, 2) == [1, 2, 1, 2]


def test_outputs_are_cut_into_passes() -> None:
    assert [part.tolist() for part in split(torch.arange(4), 2)] == [[0, 1], [2, 3]]
    rows = [torch.tensor(i) for i in range(4)]
    assert split(rows, 2) == [rows[:2], rows[2:]]


def test_a_gauge_says_how_many_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    gauge = Gauge(model)
    cpu = torch.device("cpu")
    assert gauge.most(cpu, 2) == 1
    with gauge.measuring(cpu, 2):
        model(torch.zeros(2, 3, 4))
    assert not any(module._forward_hooks for module in model.modules())
    largest = 2 * 2 * 3 * 4 * 4  # bytes of the first layer's input and output
    for passes, most in ((0, 1), (1, 1), (2.6, 2), (5, 5)):
        room = passes * 8 * largest / 0.8
        monkeypatch.setattr("cmlora.batching.free_memory", lambda _, room=room: room)
        assert gauge.most(cpu, 2) == most
        assert gauge.most(cpu, 4) == max(1, int(passes / 2))
    assert free_memory(cpu) > 0
    assert free_memory(torch.device("meta")) == 0


def test_a_step_is_split_as_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, rows = pipeline("sd15"), []
    handle = pipe.unet.conv_in.register_forward_hook(lambda _, args, out: rows.append(len(args[0])))
    monkeypatch.setattr(Gauge, "most", lambda self, device, rows: 2 if self.known else 1)
    with compose(pipe, NAMES, method="composite", execution="auto"):
        ours = tiny.run(pipe, steps=3)
    # one pass to measure with, both guidance branches; then as many as fit
    assert rows == [2, 2, 2, 4, 2, 4, 2]
    handle.remove()
    with compose(pipe, NAMES, method="composite"):
        torch.testing.assert_close(ours, tiny.run(pipe, steps=3), rtol=1e-4, atol=1e-5)


def test_every_denoiser_is_measured_in_every_run() -> None:
    wan = families.family("wan")
    rows: dict[str, list[int]] = {name: [] for name in wan.denoisers}
    handles = [
        model.patch_embedding.register_forward_hook(
            lambda _, args, out, name=name: rows[name].append(len(args[0]))
        )
        for name, model in zip(wan.denoisers, wan.models(), strict=True)
    ]
    with compose(wan.pipe, families.NAMES, method="composite", execution="auto"):
        wan.run()
        first = {name: list(seen) for name, seen in rows.items()}
        wan.run()
    for handle in handles:
        handle.remove()
    for name, seen in first.items():
        assert seen[:2] == [1, 1]  # the first call of a run, one pass after the other
        assert seen[2:] == [2] * len(seen[2:]) != []
        assert rows[name] == [*seen, *seen]


def test_unknown_executions_are_named() -> None:
    with pytest.raises(CmloraError, match="expected 'sequential', 'batched', 'auto' or 'fused'"):
        compose(pipeline("sd15"), NAMES, execution="parallel")  # type: ignore[arg-type]
