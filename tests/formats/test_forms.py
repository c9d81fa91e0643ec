"""Every form against its definition, against PEFT's own layers and, if it is there, LyCORIS."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import (
    BOFTConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    inject_adapter_in_model,
)
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from cmlora import forms, keys
from cmlora.forms.change import Parts
from cmlora.forms.oft import _neumann
from tests.formats.cases import ALPHA, CASES, RANK, Case, Tensors

SHAPES = {"linear": (8, 12), "tall": (16, 4), "kernel": (8, 4, 3, 3), "point": (8, 6, 1, 1)}


def parts_of(tensors: Tensors, settings: dict[str, Any] | None = None) -> Parts:
    """The tensors as reading a file hands them on."""
    stem = "unet.mid_block.layer"
    roles = keys.layout([f"{stem}.{end}" for end in tensors]).modules[stem]
    held = {role: tensors[key.removeprefix(f"{stem}.")] for role, key in roles.items()}
    alpha = float(held["alpha"]) if "alpha" in held else None

    def ratio(rank: int) -> float:
        if alpha is not None:
            return alpha / rank
        given = settings or {}
        return float(given.get("lora_alpha", given.get("alpha", rank))) / rank

    return Parts(held, settings or {}, ratio, alpha)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CASES)
def test_deltas_are_what_the_definitions_say(name: str, shape: str) -> None:
    case: Case = CASES[name]
    size = SHAPES[shape]
    torch.manual_seed(sum(size))
    tensors, weight, bias = case.make(size), torch.randn(size), torch.randn(size[0])
    change = forms.read(parts_of(tensors))
    assert change.base == case.base
    delta = change.delta(weight)
    assert delta is not None
    expected = case.delta(tensors, weight)
    assert float(expected.norm()) > 1e-2
    torch.testing.assert_close(delta, expected, rtol=1e-4, atol=1e-5)
    if case.bias is None:
        assert change.bias is None
    else:
        assert change.bias is not None
        torch.testing.assert_close(change.bias(bias), case.bias(tensors, bias))


@pytest.mark.parametrize("name", ["loha", "lokr", "lokr_both"])
def test_products_stay_factors_where_that_is_smaller(name: str) -> None:
    tensors = CASES[name].make((96, 64))
    change = forms.read(parts_of(tensors))
    assert change.update is not None
    held = change.update.down.numel() + change.update.up.numel()
    assert held < 96 * 64
    weight = torch.zeros(96, 64)
    torch.testing.assert_close(change.delta(weight), CASES[name].delta(tensors, weight))


# ------------------------------------------------------------------ PEFT's own layers


class Net(nn.Module):
    """One layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(12, 8)
        self.kernel = nn.Conv2d(4, 8, 3)
        self.point = nn.Conv2d(8, 4, 1)


CONFIGS: dict[str, Any] = {
    "lora_bias": lambda: LoraConfig(r=3, lora_alpha=2, lora_bias=True, target_modules=["linear"]),
    "dora": lambda: LoraConfig(
        r=3, lora_alpha=2, use_dora=True, target_modules=["linear", "kernel"]
    ),
    "loha": lambda: LoHaConfig(r=3, alpha=2, target_modules=["linear", "kernel", "point"]),
    "loha_core": lambda: LoHaConfig(
        r=3, alpha=2, use_effective_conv2d=True, target_modules=["kernel"]
    ),
    "lokr": lambda: LoKrConfig(r=2, alpha=3, target_modules=["linear", "kernel", "point"]),
    "lokr_both": lambda: LoKrConfig(r=1, alpha=3, decompose_both=True, target_modules=["linear"]),
    "lokr_whole": lambda: LoKrConfig(r=32, alpha=3, target_modules=["linear", "kernel"]),
    "oft": lambda: OFTConfig(oft_block_size=4, target_modules=["linear"]),
    "oft_exact": lambda: OFTConfig(
        oft_block_size=4, use_cayley_neumann=False, target_modules=["linear", "point"]
    ),
    "oft_shared": lambda: OFTConfig(oft_block_size=4, block_share=True, target_modules=["linear"]),
    "boft": lambda: BOFTConfig(boft_block_size=4, target_modules=["linear", "kernel", "point"]),
    "ia3": lambda: IA3Config(target_modules=["linear", "kernel"], feedforward_modules=[]),
    "ia3_input": lambda: IA3Config(
        target_modules=["linear", "kernel"], feedforward_modules=["linear", "kernel"]
    ),
    "miss": lambda: MissConfig(r=4, target_modules=["linear"]),
    "mini": lambda: MissConfig(r=4, mini_r=2, init_weights="mini", target_modules=["linear"]),
    "bat": lambda: MissConfig(r=4, init_weights="bat", target_modules=["linear"]),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_pefts_files_mean_what_peft_computes(name: str) -> None:
    net, plain, config = Net(), Net(), CONFIGS[name]()
    inject_adapter_in_model(config, net, "x")
    torch.manual_seed(1)
    with torch.no_grad():
        for key, parameter in net.named_parameters():
            if ".x" in key:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    state = get_peft_model_state_dict(net, adapter_name="x")
    settings = {k: v for k, v in config.to_dict().items() if v is not None}
    settings["peft_type"] = getattr(config.peft_type, "value", config.peft_type)
    settings["feedforward"] = bool(settings.get("feedforward_modules"))
    for layer in sorted({key.split(".")[0] for key in state}):
        own = {k.removeprefix(f"{layer}."): v for k, v in state.items() if k.startswith(layer)}
        base: Any = plain.get_submodule(layer)
        change = forms.read(parts_of(own, settings))
        weight, bias = base.weight.detach(), base.bias.detach()
        with torch.no_grad():
            delta = change.delta(weight)
            assert delta is not None
            assert float(delta.abs().max()) > 1e-3
            base.weight.add_(delta)
            if change.bias is not None:
                base.bias.add_(change.bias(bias))
            shape = (2, 12) if layer == "linear" else (2, weight.shape[1], 7, 7)
            x = torch.randn(shape)
            torch.testing.assert_close(base(x), net.get_submodule(layer)(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("terms", [1, 2, 3, 4, 5, 6])
def test_the_series_has_pefts_terms(terms: int) -> None:
    from peft.tuners.oft.layer import OFTRotationModule

    theirs = OFTRotationModule(2, 6, 4, 8)
    upper = torch.randn(2, 6) * 0.3
    expected = theirs._cayley_batch(upper, 4, True, terms)
    skew = theirs._pytorch_skew_symmetric(upper, 4)
    torch.testing.assert_close(_neumann(skew, terms), expected)


@pytest.mark.parametrize("factors", [1, 2, 3])
def test_butterflies_of_peft_are_in_its_order(factors: int) -> None:
    # PEFT has more than one factor only with its CUDA extension, but the order is its own code.
    from peft.tuners.boft.layer import Linear

    layer = Linear(nn.Linear(16, 6), "x", BOFTConfig(boft_block_size=4))
    blocks = torch.randn(factors, 4, 4, 4) * 0.5
    rotation = torch.eye(16)
    for number in range(factors):
        order = layer.block_butterfly_perm(16, 4 // 2**number, 2, factors - 1)
        swap = layer.perm2mat(order)
        skew = (blocks[number] - blocks[number].transpose(1, 2)) / 2
        one = torch.eye(4)
        apart = torch.block_diag(  # type: ignore[no-untyped-call]
            *[(one - q) @ torch.linalg.inv(one + q) for q in skew]
        )
        rotation = swap @ apart @ swap.T @ rotation
    weight = torch.randn(6, 16)
    change = forms.read(parts_of({"boft_R": blocks, "boft_s": torch.ones(6, 1)}))
    torch.testing.assert_close(
        change.delta(weight), weight @ rotation.T - weight, rtol=1e-4, atol=1e-4
    )


# ------------------------------------------------------------------ LyCORIS, where installed


@pytest.mark.parametrize("shape", ["linear", "kernel", "point", "large"])
@pytest.mark.parametrize("name", sorted(set(CASES) - {"lora_bias"}))
def test_lycoris_computes_the_same(name: str, shape: str) -> None:
    modules = pytest.importorskip("lycoris.modules", exc_type=ImportError)
    size = (64, 96) if shape == "large" else SHAPES[shape]
    if (name in ("tucker", "loha_core", "lokr_core")) and size[2:] != (3, 3):
        pytest.skip("LyCORIS has cores for kernels alone")
    torch.manual_seed(3)
    tensors, weight = CASES[name].make(size), torch.randn(size)
    if "alpha" in tensors and "oft" not in name:
        # Its LoHa and LoKr multiply by alpha / rank twice when they are merged, once when they run.
        tensors["alpha"] = torch.tensor(float(RANK))
    layer = nn.Linear(size[1], size[0]) if len(size) == 2 else nn.Conv2d(size[1], size[0], size[2])
    layer.weight.data.copy_(weight)
    stored = {f"m.{end}": tensor for end, tensor in tensors.items()}
    kind, held = modules.get_module(stored, "m")
    try:
        module = modules.make_module(kind, held, "m", layer)
    except (RuntimeError, TypeError, AttributeError):
        pytest.skip("LyCORIS does not read its own form back")
    theirs = module.get_merged_weight(1.0, weight.shape)[0].detach().reshape(weight.shape)
    ours = forms.read(parts_of(tensors)).delta(weight)
    assert isinstance(ours, Tensor)
    torch.testing.assert_close(ours, theirs - weight, rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"oft_blocks": (2, 4, 3)}, "oft_blocks"),
        ({"oft_R.weight": (2, 5)}, "no size fits"),
        ({"boft_R": (4, 4)}, "boft_R"),
        ({"miss_block": (4,)}, "miss_block"),
        ({"lora_A.weight": (2, 8), "lora_B.weight": (8, 3)}, "ranks"),
        ({f"hada_w{i}_{s}": (2,) for i in (1, 2) for s in "ab"}, "no matrix"),
    ],
)
def test_impossible_tensors_are_values_errors(
    tensors: dict[str, tuple[int, ...]], message: str
) -> None:
    with pytest.raises((ValueError, RuntimeError), match=message):
        forms.read(parts_of({end: torch.ones(size) for end, size in tensors.items()}))


def test_a_change_of_another_layer_is_refused() -> None:
    for name in ("full", "oft", "ia3", "glora", "dora"):
        change = forms.read(parts_of(CASES[name].make((8, 12))))
        for size in ((12, 12), (12, 16)):
            with pytest.raises((ValueError, RuntimeError)):
                change.delta(torch.randn(size))


def test_alpha_scales_once() -> None:
    assert ALPHA != 3
    tensors = CASES["lora"].make((8, 12))
    weight = torch.zeros(8, 12)
    twice = {**tensors, "alpha": torch.tensor(2 * ALPHA)}
    one, two = (forms.read(parts_of(t)).delta(weight) for t in (tensors, twice))
    assert isinstance(one, Tensor)
    assert isinstance(two, Tensor)
    torch.testing.assert_close(2 * one, two)
