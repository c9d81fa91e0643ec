"""LoRAs in exchanged weights: the pictures of LoRAs beside their layers, at the base's cost."""

from typing import Any

import pytest
import torch
from diffusers.hooks import apply_group_offloading
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from cmlora.compose import compose
from cmlora.errors import CmloraError
from cmlora.fusing import FusedWeight, fusable
from cmlora.switching import AdapterSwitch
from tests import families, tiny
from tests.composing import NAMES, interrupt_after, pipeline, state

METHODS: dict[str, dict[str, Any]] = {
    "merge": {},
    "switch": {"tau": 1},
    "composite": {},
    "cmlora": {"cache": "uniform:2"},
    "select": {"cache": "none"},
}


@pytest.fixture(params=["sd15", "sdxl"])
def loaded(request: pytest.FixtureRequest) -> Any:
    return pipeline(request.param)


def memory(pipe: Any) -> list[int]:
    """Where every weight of the denoiser lies."""
    return [parameter.data_ptr() for parameter in pipe.unet.parameters()]


@pytest.mark.parametrize(
    ("family", "method"), [*(("sd15", method) for method in METHODS), ("sdxl", "composite")]
)
def test_pictures_are_those_of_loras_beside_their_layers(family: str, method: str) -> None:
    loaded = pipeline(family)
    strengths = {name: 0.5 + 0.3 * i for i, name in enumerate(NAMES)}
    pictures = []
    for execution in ("sequential", "fused"):
        how = {"method": method, "execution": execution, **METHODS[method]}
        with compose(loaded, strengths, **how):
            pictures.append(tiny.run(loaded, steps=3))
    torch.testing.assert_close(pictures[1], pictures[0], rtol=1e-4, atol=1e-4)
    assert not torch.equal(pictures[1], tiny.run(loaded, steps=3))


def test_transformers_are_fused_too() -> None:
    flux = families.flux()
    flux.pipe.set_progress_bar_config(disable=True)
    families.add_loras(flux.models(), families.NAMES, ["to_q", "to_out.0"])
    pictures = []
    for execution in ("sequential", "fused"):
        with compose(flux.pipe, families.NAMES, method="composite", execution=execution):
            pictures.append(flux.run())
    torch.testing.assert_close(pictures[1], pictures[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("failing", [False, True])
def test_the_very_same_memory_comes_back(loaded: Any, failing: bool) -> None:
    before = tiny.run(loaded)
    places, adapters = memory(loaded), state(loaded)
    composition = compose(loaded, NAMES, method="composite", execution="fused")
    if failing:
        with pytest.raises(KeyboardInterrupt), composition:
            tiny.run(loaded, callback_on_step_end=interrupt_after(1))
    else:
        with composition:
            tiny.run(loaded)
            assert memory(loaded) != places
    assert memory(loaded) == places
    assert state(loaded) == adapters
    assert torch.equal(tiny.run(loaded), before)


def test_strengths_of_the_moment_and_patterns_are_kept() -> None:
    loaded = pipeline("sd15")
    schedule = f"<lora:{NAMES[0]}:unet=1@0,0@1:blocks=attn1> <lora:{NAMES[1]}:0@0,1@1>"
    pictures = []
    for execution in ("sequential", "fused"):
        with compose(loaded, NAMES, method="merge", execution=execution, schedule=schedule):
            pictures.append(tiny.run(loaded, steps=4))
    torch.testing.assert_close(pictures[1], pictures[0], rtol=1e-4, atol=1e-4)


class Net(nn.Module):
    """A convolution with groups and one without, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 8)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2, padding=1)
        self.conv = nn.Conv2d(8, 4, 3, padding=1, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.second(self.first(x).tanh()).tanh()
        result: torch.Tensor = self.conv(self.grouped(hidden.movedim(-1, 1)))
        return result


def net(dtype: torch.dtype = torch.float32, **settings: Any) -> Net:
    torch.manual_seed(0)
    model = Net().to(dtype)
    for name in ("a", "b"):
        config = LoraConfig(
            r=2, lora_alpha=3, target_modules=["first", "second", "grouped", "conv"], **settings
        )
        inject_adapter_in_model(config, model, adapter_name=name)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data.normal_(std=0.3)
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dora", [False, True])
def test_layers_that_cannot_be_fused_act_beside(dtype: torch.dtype, dora: bool) -> None:
    model = net(dtype, use_dora=dora, exclude_modules=["grouped"] if dora else None)
    plain, fused = AdapterSwitch(model), AdapterSwitch(model, fused=True)
    x = torch.randn(2, 5, 5, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    with torch.no_grad():
        for weights in ({"a": 1.0}, {"a": 0.4, "b": -0.7}, {}, {"b": 0.0}):
            plain.activate(weights)
            expected = model(x)
            fused.activate(weights)
            torch.testing.assert_close(model(x), expected, rtol=tolerance, atol=tolerance)
            fused.activate({})
    able = {name for name, layer in model.named_children() if fusable(layer)}
    assert able == (set() if dora else {"first", "second", "conv"})


def test_copies_are_bounded_by_the_number_of_loras() -> None:
    model = net()
    switch = AdapterSwitch(model, fused=True)
    for step in range(20):
        switch.activate({"a": step / 20, "b": 1.0})
    assert len(switch._activations) == len(switch.names) + 1
    wanted = net()
    AdapterSwitch(wanted, fused=True).activate({"a": 0.95, "b": 1.0})
    for ours, theirs in zip(model.parameters(), wanted.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_channels_last_weights_stay_so() -> None:
    model = net().to(memory_format=torch.channels_last)
    layer: Any = model.conv
    fused = FusedWeight(layer).under({"a": 1.0})
    assert fused.stride() == layer.base_layer.weight.stride()
    expected = layer.base_layer.weight + layer.get_delta_weight("a") / layer.scaling["a"]
    torch.testing.assert_close(fused, expected)


def own_pipeline() -> Any:
    """One that no other test sees."""
    pipe = tiny.sd15()
    tiny.add_loras(pipe, NAMES)
    return pipe


def test_a_model_that_moves_is_refused() -> None:
    pipe = own_pipeline()
    before = {name: value.double() for name, value in pipe.unet.named_parameters()}
    with compose(pipe, NAMES, method="composite", execution="fused"):
        tiny.run(pipe)
        pipe.unet.to(torch.float64)
        with pytest.raises(CmloraError, match="weights were moved while LoRAs are fused"):
            tiny.run(pipe)
    for name, value in pipe.unet.named_parameters():
        assert value.dtype == torch.float64
        assert torch.equal(value, before[name]), name


def test_an_offloaded_model_is_refused() -> None:
    pipe = own_pipeline()
    apply_group_offloading(
        pipe.unet, onload_device=torch.device("cpu"), offload_type="leaf_level", use_stream=False
    )
    with pytest.raises(CmloraError, match="offloading moves them away; use execution='sequential'"):
        compose(pipe, NAMES, method="composite", execution="fused")
