"""Files of every form in real models: what is loaded is the base plus what the file says."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import BOFTConfig, IA3Config, LoHaConfig, LoKrConfig, MissConfig, OFTConfig
from peft import inject_adapter_in_model as inject
from torch import Tensor, nn

from cmlora import compose, files
from cmlora.adapters.tuners import store
from cmlora.errors import CmloraError
from cmlora.shift import ShiftLayer
from tests import tiny, trainers
from tests.formats.cases import CASES

PLACES = {
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": "lora_unet",
    "unet.mid_block.resnets.0.conv1": "lora_unet",
    "unet.mid_block.attentions.0.proj_in": "lora_unet",
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": "lora_te",
}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny.sd15(**tiny.WHOLE)


def layer_of(pipe: Any, module: str) -> Any:
    component, _, name = module.partition(".")
    model = getattr(pipe, component)
    if not hasattr(model, "text_model"):
        name = name.removeprefix("text_model.")
    return model.get_submodule(name)


def make(pipe: Any, form: str) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """A file of a form for the places, and for each what is to be added to its parameters."""
    case = CASES[form]
    stored: dict[str, Tensor] = {}
    shifts: dict[str, dict[str, Tensor]] = {}
    torch.manual_seed(5)
    for module, prefix in PLACES.items():
        layer = layer_of(pipe, module)
        if ("core" in form or form == "tucker") and layer.weight.ndim != 4:
            continue
        weight = layer.weight.detach()
        tensors = case.make(tuple(weight.shape))
        stem = f"{prefix}_{module.partition('.')[2].replace('.', '_')}"
        stored |= {f"{stem}.{end}": tensor for end, tensor in tensors.items()}
        shifts[module] = {"weight": case.delta(tensors, weight)}
        if case.bias is not None and layer.bias is not None:
            shifts[module]["bias"] = case.bias(tensors, layer.bias.detach())
        elif case.bias is not None:
            end = "diff_b" if form == "full" else "lora_B.bias"
            stored.pop(f"{stem}.{end}")
    return stored, shifts


def moved(shifts: dict[str, dict[str, Tensor]], strength: float = 1.0) -> Any:
    """The base's models with weights that are changed in place."""
    other = SimpleNamespace(unet=tiny.unet_sd15(), text_encoder=tiny.text_encoder())
    with torch.no_grad():
        for module, found in shifts.items():
            layer = layer_of(other, module)
            for name, shift in found.items():
                parameter = getattr(layer, name)
                parameter.add_(strength * shift.reshape(parameter.shape))
    return other


@torch.no_grad()
def outputs(pipe: Any) -> Tensor:
    """What the two models of a pipeline say to fixed inputs."""
    ids = torch.arange(16)[None]
    text = pipe.text_encoder(ids).last_hidden_state
    sample = tiny.latents(1, seed=1)
    return torch.cat([text.flatten(), pipe.unet(sample, 10, text).sample.flatten()])


@pytest.mark.parametrize("form", CASES)
def test_the_model_is_the_base_plus_what_the_file_says(
    form: str, pipe: Any, tmp_path: Path
) -> None:
    stored, shifts = make(pipe, form)
    path = trainers.save(stored, tmp_path / "x.safetensors")
    before = outputs(pipe)
    applied = files.load(pipe, path, "x")
    try:
        assert applied.modules + applied.text_modules == len(shifts)
        expected = outputs(moved(shifts))
        assert float((expected - before).abs().max()) > 1e-3
        torch.testing.assert_close(outputs(pipe), expected, rtol=1e-3, atol=2e-4)
    finally:
        pipe.unload_lora_weights()
    assert torch.equal(outputs(pipe), before)
    assert not any(isinstance(m, ShiftLayer) for m in pipe.unet.modules())


def test_half_strength_is_half_the_change(pipe: Any, tmp_path: Path) -> None:
    stored, shifts = make(pipe, "dora")
    path = trainers.save(stored, tmp_path / "x.safetensors")
    files.load(pipe, path, "x")
    try:
        pipe.set_adapters(["x"], [0.5])
        expected = outputs(moved(shifts, 0.5))
        torch.testing.assert_close(outputs(pipe), expected, rtol=1e-3, atol=2e-4)
    finally:
        pipe.unload_lora_weights()


@pytest.mark.parametrize("first", ["lora", "oft"])
def test_forms_stand_beside_each_other_in_either_order(
    first: str, pipe: Any, tmp_path: Path
) -> None:
    second = "oft" if first == "lora" else "lora"
    total: dict[str, dict[str, Tensor]] = {}
    before = outputs(pipe)
    for form in (first, second):
        stored, shifts = make(pipe, form)
        files.load(pipe, trainers.save(stored, tmp_path / f"{form}.safetensors"), form)
        for module, found in shifts.items():
            sum_ = total.setdefault(module, {"weight": torch.zeros(())})
            sum_["weight"] = sum_["weight"] + found["weight"]
    try:
        # What was loaded last is active alone.
        torch.testing.assert_close(outputs(pipe), outputs(moved(shifts)), rtol=1e-3, atol=2e-4)
        pipe.set_adapters(["lora", "oft"], [1.0, 1.0])
        expected = outputs(moved(total))
        torch.testing.assert_close(outputs(pipe), expected, rtol=1e-3, atol=5e-4)
        picture = tiny.run(pipe, steps=2)
        with compose(pipe, {"lora": 1.0, "oft": 1.0}, method="merge"):
            torch.testing.assert_close(tiny.run(pipe, steps=2), picture, rtol=1e-3, atol=1e-3)
        pipe.set_adapters(["lora", "oft"], [0.0, 0.0])
        torch.testing.assert_close(outputs(pipe), before)
    finally:
        pipe.unload_lora_weights()
    assert torch.equal(outputs(pipe), before)


def test_norms_biases_and_embeddings(pipe: Any, tmp_path: Path) -> None:
    torch.manual_seed(2)
    norm, table = "mid_block.attentions.0.norm", "token_embedding"
    stored = {
        f"lora_unet_{norm.replace('.', '_')}.w_norm": torch.randn(16),
        f"lora_unet_{norm.replace('.', '_')}.b_norm": torch.randn(16),
        "lora_unet_conv_in.diff_b": torch.randn(8),
        "text_encoder.text_model.embeddings.token_embedding.lora_embedding_A": torch.randn(2, 128),
        "text_encoder.text_model.embeddings.token_embedding.lora_embedding_B": torch.randn(16, 2),
    }
    shifts = {
        f"unet.{norm}": {
            "weight": stored[f"lora_unet_{norm.replace('.', '_')}.w_norm"],
            "bias": stored[f"lora_unet_{norm.replace('.', '_')}.b_norm"],
        },
        "unet.conv_in": {"bias": stored["lora_unet_conv_in.diff_b"]},
        f"text_encoder.text_model.embeddings.{table}": {
            "weight": (
                stored["text_encoder.text_model.embeddings.token_embedding.lora_embedding_B"]
                @ stored["text_encoder.text_model.embeddings.token_embedding.lora_embedding_A"]
            ).T
        },
    }
    path = trainers.save(stored, tmp_path / "x.safetensors")
    with pytest.raises(CmloraError, match="left over"):
        files.read(path)
    before = outputs(pipe)
    files.load(pipe, path, "x")
    try:
        torch.testing.assert_close(outputs(pipe), outputs(moved(shifts)), rtol=1e-3, atol=2e-4)
    finally:
        pipe.unload_lora_weights()
    assert torch.equal(outputs(pipe), before)


CONFIGS: dict[str, Any] = {
    "oft": lambda: OFTConfig(oft_block_size=4, target_modules=["to_q", "to_k"]),
    "boft": lambda: BOFTConfig(boft_block_size=4, target_modules=["to_q", "conv1"]),
    "miss": lambda: MissConfig(r=4, target_modules=["to_q", "to_v"]),
    "bat": lambda: MissConfig(r=4, init_weights="bat", target_modules=["to_q", "to_v"]),
    "ia3": lambda: IA3Config(target_modules=["to_k", "to_out.0"], feedforward_modules=["to_k"]),
    "loha": lambda: LoHaConfig(r=3, alpha=2, target_modules=["to_q", "conv1"]),
    "lokr": lambda: LoKrConfig(r=2, alpha=3, target_modules=["to_q", "conv1"]),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_pefts_own_files(name: str, pipe: Any, tmp_path: Path) -> None:
    theirs = tiny.sd15(**tiny.WHOLE)
    inject(CONFIGS[name](), theirs.unet, "x")
    theirs.unet.peft_config = {"x": CONFIGS[name]()}
    torch.manual_seed(4)
    with torch.no_grad():
        for key, parameter in theirs.unet.named_parameters():
            if ".x" in key:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    path = tmp_path / "x.safetensors"
    store.save(theirs, "x", path)
    files.load(pipe, path, "x")
    try:
        torch.testing.assert_close(outputs(pipe), outputs(theirs), rtol=1e-3, atol=5e-4)
    finally:
        pipe.unload_lora_weights()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # (IA)^3 scales biases too
        lora, error = files.convert(path, pipe, strict=False)
    assert error == 0.0
    assert len(lora.updates) > 3


@pytest.mark.parametrize("form", ["loha", "full", "oft", "dora"])
def test_converted_files_are_ordinary_loras(form: str, pipe: Any, tmp_path: Path) -> None:
    stored, shifts = make(pipe, form)
    stored = {k: t for k, t in stored.items() if not k.endswith("diff_b")}
    path = trainers.save(stored, tmp_path / "x.safetensors")
    exact, nothing = files.convert(path, pipe)
    assert nothing == 0.0
    for module, found in shifts.items():
        delta = exact.updates[module].delta()
        torch.testing.assert_close(
            delta, found["weight"].reshape(delta.shape), rtol=1e-3, atol=1e-4
        )
    cut, error = files.convert(path, pipe, rank=2)
    assert max(update.rank for update in cut.updates.values()) <= 2
    lost = sum(
        float((cut.updates[m].delta() - exact.updates[m].delta()).norm()) ** 2 for m in shifts
    )
    assert error == pytest.approx((lost / exact.norm() ** 2) ** 0.5, rel=1e-3)
    files.write(exact, tmp_path / "plain.safetensors")
    pipe.load_lora_weights(str(tmp_path / "plain.safetensors"), adapter_name="x")
    try:
        torch.testing.assert_close(
            outputs(pipe),
            outputs(moved(shifts_of_weights(shifts))),
            rtol=1e-3,
            atol=5e-4,
        )
    finally:
        pipe.unload_lora_weights()


def shifts_of_weights(shifts: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    return {module: {"weight": found["weight"]} for module, found in shifts.items()}


def test_fusing_and_unfusing_restores_the_bits(pipe: Any, tmp_path: Path) -> None:
    stored, _ = make(pipe, "full")
    before = outputs(pipe)
    files.load(pipe, trainers.save(stored, tmp_path / "x.safetensors"), "x")
    try:
        active = outputs(pipe)
        for layer in pipe.unet.modules():
            if isinstance(layer, ShiftLayer):
                layer.merge()
        torch.testing.assert_close(outputs(pipe), active, rtol=1e-3, atol=2e-4)
        for layer in pipe.unet.modules():
            if isinstance(layer, ShiftLayer):
                layer.unmerge()
        torch.testing.assert_close(outputs(pipe), active, rtol=0, atol=0)
    finally:
        pipe.unload_lora_weights()
    assert torch.equal(outputs(pipe), before)


def test_a_form_for_another_family_names_both(pipe: Any, tmp_path: Path) -> None:
    name = "down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    for tensors in (CASES["dora"].make((8, 2048)), CASES["lokr_whole"].make((8, 2048))):
        stored = {f"lora_unet_{name}.{end}": tensor for end, tensor in tensors.items()}
        path = trainers.save(stored, tmp_path / "x.safetensors")
        before = outputs(pipe)
        with pytest.raises(CmloraError, match=r"Stable Diffusion XL and the .* text of width 16"):
            files.load(pipe, path, "x")
        assert torch.equal(outputs(pipe), before)
        assert not hasattr(pipe.unet, "peft_config")


def test_half_matching_files_list_what_is_missing(pipe: Any, tmp_path: Path) -> None:
    stored, shifts = make(pipe, "oft")
    stored["lora_unet_mid_block_attentions_7_proj_in.oft_blocks"] = torch.ones(2, 4, 4)
    path = trainers.save(stored, tmp_path / "x.safetensors")
    with pytest.raises(CmloraError, match=r"mid_block\.attentions\.7\.proj_in is not in the pipe"):
        files.load(pipe, path, "x")
    with pytest.warns(UserWarning, match="left out"):
        applied = files.load(pipe, path, "x", strict=False)
    try:
        assert applied.modules + applied.text_modules == len(shifts)
        assert applied.skipped == ("unet.mid_block.attentions.7.proj_in",)
    finally:
        pipe.unload_lora_weights()


def test_a_quantized_base_cannot_be_rotated_but_shifted(tmp_path: Path) -> None:
    pipe = tiny.sd15(**tiny.WHOLE)
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    layer = pipe.unet.get_submodule(name)
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    stem = f"lora_unet_{name.replace('.', '_')}"
    for form, refused in (("full", False), ("oft", True)):
        tensors = CASES[form].make((8, 8))
        tensors.pop("diff_b", None)
        stored = {f"{stem}.{end}": tensor for end, tensor in tensors.items()}
        path = trainers.save(stored, tmp_path / "x.safetensors")
        if refused:
            with pytest.raises(CmloraError, match="quantized"):
                files.load(pipe, path, form)
        else:
            files.load(pipe, path, form)
