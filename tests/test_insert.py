"""LoRAs in real pipelines: exact updates, the same picture from every form, all or nothing."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from cmlora import files, insert
from cmlora.errors import CmloraError
from cmlora.lora import LoRA, Update
from tests import tiny, trainers

COMPONENTS = ("unet", "text_encoder", "text_encoder_2", "vae")


def build(family: str) -> Any:
    """With the module tree of the real model, for what depends on names."""
    return getattr(tiny, family)(**tiny.WHOLE)


def fingerprint(pipe: Any) -> list[tuple[Any, ...]]:
    """Everything a LoRA could change in a pipeline's modules, by identity and by value."""
    found: list[tuple[Any, ...]] = []
    for component in COMPONENTS:
        model = getattr(pipe, component, None)
        for name, module in model.named_modules() if model is not None else ():
            contents = {
                key: list(value.items()) if type(value) is dict and key != "_parameters" else value
                for key, value in vars(module).items()
            }
            scalars = {k: v for k, v in contents.items() if isinstance(v, (str, bool, list, float))}
            grads = [(k, id(p), p.requires_grad) for k, p in module.named_parameters(recurse=False)]
            found.append((component, name, id(module), sorted(vars(module)), str(scalars), grads))
    return found


def test_the_model_holds_exactly_the_deltas(tmp_path: Path) -> None:
    pipe = build("sdxl")
    lora = trainers.lora(pipe)
    files.write(lora, tmp_path / "x.safetensors")
    applied = files.load(pipe, tmp_path / "x.safetensors", "x")
    parts = lora.parts
    assert applied.modules == len(parts["unet"])
    assert applied.text_modules == len(parts["text_encoder"]) + len(parts["text_encoder_2"])
    assert applied.sha256 == files.sha256(tmp_path / "x.safetensors")
    for component, updates in parts.items():
        model = getattr(pipe, component)
        for name, update in updates.items():
            if not hasattr(model, "text_model"):
                name = name.removeprefix("text_model.")
            tuner = model.get_submodule(name)
            delta = tuner.get_delta_weight("x")
            if update.shape[2:] in ((), (1, 1)):
                assert torch.equal(delta, update.delta())
            torch.testing.assert_close(delta, update.delta())


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_every_form_makes_the_same_picture(family: str, tmp_path: Path) -> None:
    lora = trainers.lora(build(family))
    rename = trainers.ldm_names(build(family).unet)
    kohya = trainers.save(trainers.kohya(lora), tmp_path / "kohya.safetensors")
    ldm = trainers.save(trainers.kohya(lora, rename), tmp_path / "ldm.safetensors")
    own = tmp_path / "own.safetensors"
    files.write(lora, own)

    def picture(path: Path, plain: bool) -> torch.Tensor:
        pipe = build(family)
        if plain:
            pipe.load_lora_weights(str(path), adapter_name="x")
        else:
            files.load(pipe, path, "x")
        return tiny.run(pipe, steps=2)

    expected = picture(own, plain=False)
    assert not torch.equal(expected, tiny.run(build(family), steps=2))
    for path in (kohya, ldm):
        assert torch.equal(picture(path, plain=False), expected)
    # Not to the last bit: matrix products depend on where in memory a matrix begins, and diffusers
    # leaves the weights wherever they were in the file.
    torch.testing.assert_close(picture(own, plain=True), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("alphas", ["equal", "different"])
def test_diffusers_own_conversion_agrees_where_it_is_right(alphas: str, tmp_path: Path) -> None:
    # Attention of the UNet, the part whose names diffusers' converter knows in LDM numbering.
    # It drops the alphas of modules whose alpha is not the usual one; if this fails, it no longer
    # does, and the two cases can become one.
    pipe, other = build("sdxl"), build("sdxl")
    lora = trainers.lora(pipe, wanted=lambda m: ".attentions." in m and "text" not in m)
    if alphas == "equal":
        lora = LoRA("x", {m: replace(u, scale=2 / u.rank) for m, u in lora.updates.items()})
    rename = trainers.ldm_names(pipe.unet)
    path = trainers.save(trainers.kohya(lora, rename), tmp_path / "x.safetensors")
    files.load(pipe, path, "x")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other.load_lora_weights(str(path), adapter_name="x")
    difference = (tiny.run(pipe) - tiny.run(other)).abs().max()
    assert (difference < 1e-4) == (alphas == "equal")


def test_what_diffusers_saves_is_read_back(tmp_path: Path) -> None:
    from peft.utils import get_peft_model_state_dict

    pipe = build("sd15")
    tiny.add_loras(pipe, ["a"], text=True)
    states = [
        get_peft_model_state_dict(m, adapter_name="a") for m in (pipe.unet, pipe.text_encoder)
    ]
    configs = [m.peft_config["a"].to_dict() for m in (pipe.unet, pipe.text_encoder)]
    pipe.save_lora_weights(
        tmp_path,
        unet_lora_layers=states[0],
        text_encoder_lora_layers=states[1],
        unet_lora_adapter_metadata=configs[0],
        text_encoder_lora_adapter_metadata=configs[1],
    )
    fresh = build("sd15")
    applied = files.load(fresh, tmp_path / "pytorch_lora_weights.safetensors", "a")
    assert applied.text_modules > 0
    assert torch.equal(tiny.run(fresh), tiny.run(pipe))


def test_loading_is_silent_and_draws_no_random_numbers(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pipe = tiny.sd15()
    files.write(trainers.lora(pipe), tmp_path / "x.safetensors")
    before = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        files.load(pipe, tmp_path / "x.safetensors", "one")
        files.load(pipe, tmp_path / "x.safetensors", "two")
    assert torch.equal(torch.get_rng_state(), before)
    assert capfd.readouterr() == ("", "")
    assert pipe.get_active_adapters() == ["two"]
    assert pipe.get_list_adapters() == {
        "unet": ["one", "two"],
        "text_encoder": ["one", "two"],
    }


def test_unloading_with_diffusers_restores_the_base() -> None:
    pipe = tiny.sd15()
    before = tiny.run(pipe)
    insert.insert(pipe, trainers.lora(pipe), "x")
    assert not torch.equal(tiny.run(pipe), before)
    pipe.unload_lora_weights()
    assert torch.equal(tiny.run(pipe), before)


def test_a_matrix_is_taken_for_a_1x1_convolution_and_back() -> None:
    pipe = tiny.sd15()
    name = "mid_block.attentions.0.proj_in"
    assert isinstance(pipe.unet.get_submodule(name), nn.Conv2d)
    kernel = Update(torch.randn(2, 16, 1, 1), torch.randn(16, 2))
    matrix = Update(kernel.down.flatten(1), kernel.up)
    other = tiny.sd15()
    insert.insert(pipe, LoRA("a", {f"unet.{name}": kernel}), "x")
    insert.insert(other, LoRA("a", {f"unet.{name}": matrix}), "x")
    assert torch.equal(tiny.run(pipe), tiny.run(other))


def test_precision_follows_the_model() -> None:
    pipe = tiny.sd15().to(torch.bfloat16)
    insert.insert(pipe, trainers.lora(pipe), "x")
    dtypes = {p.dtype for n, p in pipe.unet.named_parameters() if ".lora_" in n}
    assert dtypes == {torch.bfloat16}
    assert torch.isfinite(tiny.run(pipe).float()).all()


def test_a_pipeline_under_group_offloading_still_runs() -> None:
    from diffusers.hooks import apply_group_offloading

    pipe, plain = tiny.sd15(), tiny.sd15()
    cpu = torch.device("cpu")
    apply_group_offloading(
        pipe.unet, onload_device=cpu, offload_device=cpu, offload_type="leaf_level"
    )
    lora = trainers.lora(plain)
    for each in (pipe, plain):
        insert.insert(each, lora, "x")
    assert torch.equal(tiny.run(pipe), tiny.run(plain))


# ------------------------------------------------------------------ refused, and nothing changed


@pytest.mark.parametrize("occupied", [False, True])
def test_a_lora_of_another_family_changes_nothing(occupied: bool, tmp_path: Path) -> None:
    pipe = tiny.sd15()
    if occupied:
        tiny.add_loras(pipe, ["first"], text=True)
    path = tmp_path / "xl.safetensors"
    files.write(trainers.lora(tiny.sdxl()), path)
    before, picture = fingerprint(pipe), tiny.run(pipe)
    with pytest.raises(CmloraError) as caught:
        files.load(pipe, path, "x")
    for words in (
        "text of width 32",
        "text of width 16",
        "attn2.to_k",
        ", 32)",
        ", 16)",
        str(path),
    ):
        assert words in str(caught.value)
    assert fingerprint(pipe) == before
    assert torch.equal(tiny.run(pipe), picture)


def test_families_are_called_by_their_names() -> None:
    pipe = tiny.sd15()
    module = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    lora = LoRA("x", {module: Update(torch.ones(1, 2048), torch.ones(8, 1))})
    with pytest.raises(CmloraError, match=r"for Stable Diffusion XL .* is \(8, 2048\) in the file"):
        insert.insert(pipe, lora, "x")


def test_missing_modules_are_an_error_or_a_counted_warning() -> None:
    pipe = tiny.sd15()
    lora = trainers.lora(pipe, wanted=lambda m: "mid_block" in m)
    extra = {
        f"unet.mid_block.extra.{i}": Update(torch.ones(1, 2), torch.ones(2, 1)) for i in range(5)
    }
    more = LoRA("x", {**lora.updates, **extra})
    before = fingerprint(pipe)
    listed = ", ".join(rf"unet\.mid_block\.extra\.{i}" for i in range(5))
    with pytest.raises(CmloraError, match=f": {listed} are not in the pipe"):
        insert.insert(pipe, more, "x")
    assert fingerprint(pipe) == before
    with pytest.warns(UserWarning, match=f": {listed} left out"):
        applied = insert.insert(pipe, more, "x", strict=False)
    assert applied.modules == len(lora.updates)
    assert applied.skipped == tuple(extra)
    with pytest.raises(CmloraError, match="not in the pipeline"):
        insert.insert(pipe, LoRA("x", extra), "y", strict=False)


def test_half_matching_loras_list_all_that_is_missing_in_order() -> None:
    pipe = tiny.sd15()
    lora = trainers.lora(pipe, wanted=lambda m: "mid_block" in m)

    def said(*names: str, wrong: int = 0) -> str:
        extra = {f"unet.{name}": Update(torch.ones(1, 2), torch.ones(2, 1)) for name in names}
        updates = {
            m: Update(torch.ones(1, 5), torch.ones(5, 1)) if i < wrong else u
            for i, (m, u) in enumerate(lora.updates.items())
        }
        with pytest.raises(CmloraError) as caught:
            insert.insert(pipe, LoRA("x", {**updates, **extra}), "x")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    ten = said(*(f"blocks.{i}.to_q" for i in (10, 11, 12, 2, 1, 0, 3, 4, 5, 6)))
    assert "unet.blocks.1.to_q, unet.blocks.2.to_q, unet.blocks.3.to_q" in ten
    assert "unet.blocks.6.to_q, unet.blocks.10.to_q, unet.blocks.11.to_q" in ten
    many = said(*(f"blocks.{i}.to_{x}" for i in range(60) for x in "qkv"))
    assert "unet.blocks.{0-59}.to_k, unet.blocks.{0-59}.to_q, unet.blocks.{0-59}.to_v are" in many
    odd = said(*(f"part{chr(97 + i // 9)}{chr(97 + i % 9)}" for i in range(70)))
    assert odd.count("unet.part") == 40
    assert "and 30 more are not in the pipeline" in odd
    mixed = said("blocks.1.to_q", wrong=2)
    one, other = list(lora.updates)[:2]
    assert "(5, 5) in the file" in mixed
    assert f"; so is {other}" in mixed or f"; so is {one}" in mixed
    assert mixed.endswith("; unet.blocks.1.to_q is not there")


def test_a_component_the_pipeline_lacks_is_missing() -> None:
    pipe = tiny.sd15()
    lora = trainers.lora(pipe)
    pipe.text_encoder = None
    with pytest.raises(CmloraError, match=r"text_encoder\.text_model"):
        insert.insert(pipe, lora, "x")


def test_a_layer_that_is_no_matrix_is_named() -> None:
    pipe = tiny.sd15()
    lora = LoRA("x", {"unet.conv_norm_out": Update(torch.ones(1, 8), torch.ones(8, 1))})
    with pytest.raises(CmloraError, match="no linear or convolution layer"):
        insert.insert(pipe, lora, "x")


@pytest.mark.parametrize("name", ["", "a.b", "keys", "pop"])
def test_impossible_names(name: str) -> None:
    pipe = tiny.sd15()
    with pytest.raises(CmloraError, match="cannot name a LoRA"):
        insert.insert(pipe, trainers.lora(pipe), name)


def test_a_name_in_use() -> None:
    pipe = tiny.sd15()
    lora = trainers.lora(pipe, wanted=lambda m: m.startswith("text_encoder"))
    insert.insert(pipe, lora, "x")
    with pytest.raises(CmloraError, match="already has a LoRA called 'x'"):
        insert.insert(pipe, lora, "x")


MOMENTS = [(3, False), (200, True), (1500, False)]
OTHERS = [(3, True), (200, False), (1500, True)]


@pytest.mark.parametrize(
    ("after", "occupied"), MOMENTS + [pytest.param(*m, marks=pytest.mark.slow) for m in OTHERS]
)
def test_an_interrupt_in_the_middle_leaves_no_trace(after: int, occupied: bool) -> None:
    pipe = tiny.sd15()
    lora = trainers.lora(pipe)
    if occupied:
        tiny.add_loras(pipe, ["first"], text=True)
    before, picture = fingerprint(pipe), tiny.run(pipe, steps=1)
    count = 0

    def interrupt(*_: object) -> None:
        nonlocal count
        count += 1
        if count > after:
            raise KeyboardInterrupt

    handle = register_module_module_registration_hook(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            insert.insert(pipe, lora, "x")
    finally:
        handle.remove()
    assert fingerprint(pipe) == before
    assert torch.equal(tiny.run(pipe, steps=1), picture)
    insert.insert(pipe, lora, "x")
