"""Defects of diffusers that we go around: each still there, and each without effect on our path.

A test here that fails at its first half says that diffusers has changed; what goes around the
defect can then be simplified. A failure of the second half is a defect of ours.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils.peft_utils import set_weights_and_activate_adapters
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from cmlora import compose, files
from cmlora.dropped import dropped
from cmlora.errors import CmloraError
from cmlora.lora import LoRA
from cmlora.pipelines.models import open_pipeline
from cmlora.switching import AdapterSwitch
from tests import tiny, trainers
from tests.formats.cases import CASES

SCALE = 3 / 4  # of the tiny LoRAs


def scales(model: nn.Module, name: str, wanted: Callable[[str], bool] = lambda _: True) -> set[Any]:
    """The strengths of an adapter in the layers of a model, without what its file says."""
    return {
        round(layer.scaling[name] / SCALE, 6)
        for key, layer in model.named_modules()
        if isinstance(layer, BaseTunerLayer) and wanted(key)
    }


def changed_by(trap: str) -> str:
    return f"diffusers no longer {trap}; see what of our path can go"


@pytest.fixture
def pipe() -> Any:
    pipe = tiny.sd15(**tiny.WHOLE)
    tiny.add_loras(pipe, ["a", "b"])
    return pipe


def test_one_dictionary_of_strengths_serves_the_first_adapter_only(pipe: Any) -> None:
    pipe.set_adapters(["a", "b"], [{"unet": 0.3}] * 2)
    shared = {"unet": 0.3}
    pipe.set_adapters(["a", "b"], [shared, shared])
    found = scales(pipe.unet, "a"), scales(pipe.unet, "b")
    assert found == ({0.3}, {1.0}), changed_by("empties a dictionary that two adapters share")
    switch = AdapterSwitch(pipe.unet)
    switch.activate({"a": 0.3, "b": 0.3})
    assert (scales(pipe.unet, "a"), scales(pipe.unet, "b")) == ({0.3}, {0.3})


class Blocks(nn.Module):
    """Names as in FLUX."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(12))
        self.single_transformer_blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
        self.proj_out = nn.Linear(2, 2)


def test_block_names_of_transformers_match_as_substrings_and_short_names_crash() -> None:
    model = Blocks()
    targets = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "." in n]
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=3, target_modules=targets), model, "a")
    every = {"transformer_blocks.1": 0.5, "blocks": 1.0}
    set_weights_and_activate_adapters(model, ["a"], [every])
    hit = {
        key
        for key, layer in model.named_modules()
        if isinstance(layer, BaseTunerLayer) and layer.scaling["a"] != SCALE
    }
    expected = {f"transformer_blocks.{n}" for n in (1, 10, 11)} | {"single_transformer_blocks.1"}
    assert hit == expected, changed_by("looks for block names anywhere in a name")
    whole = Blocks()
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["proj_out"]), whole, "a")
    with pytest.raises(IndexError):
        set_weights_and_activate_adapters(whole, ["a"], [{"transformer_blocks.1": 0.5}])
    switch = AdapterSwitch(model)
    switch.activate({"a": ((r"^transformer_blocks\.1$", 0.5), ("", 1.0))})
    assert scales(model, "a", lambda key: key == "transformer_blocks.1") == {0.5}
    assert scales(model, "a", lambda key: key != "transformer_blocks.1") == {1.0}
    AdapterSwitch(whole).activate({"a": (("proj", 0.5),)})


def test_block_strengths_miss_resnets(pipe: Any) -> None:
    pipe.set_adapters(["a"], [{"unet": {"mid": 0.5, "up": {"block_3": 0.5}}}])

    def resnets(key: str) -> bool:
        return key.startswith(("mid_block.resnets", "up_blocks.0.resnets"))

    missed = scales(pipe.unet, "a", resnets)
    assert missed == {1.0}, changed_by("forgets the ResNets of blocks")
    AdapterSwitch(pipe.unet).activate({"a": (("^mid_block", 0.5), ("^up_blocks", 0.25))})
    assert scales(pipe.unet, "a", lambda k: k.startswith("mid_block")) == {0.5}
    assert scales(pipe.unet, "a", lambda k: k.startswith("up_blocks")) == {0.25}


def test_deleted_adapters_leave_their_layers_behind(pipe: Any, tmp_path: Path) -> None:
    pipe.delete_adapters(["a", "b"])
    left = [m for m in pipe.unet.modules() if isinstance(m, BaseTunerLayer)]
    assert left, changed_by("leaves empty layers when adapters are deleted")
    assert AdapterSwitch(pipe.unet).names == ()
    with pytest.raises(CmloraError, match=r"has no LoRAs loaded|unknown LoRA"):
        compose(pipe, ["a"])
    files.load(pipe, save(trainers.lora(tiny.sd15(**tiny.WHOLE)), tmp_path / "x.safetensors"), "c")
    assert AdapterSwitch(pipe.unet).names == ("c",)
    assert isinstance(tiny.run(pipe, steps=2), Tensor)


def save(lora: LoRA, path: Path) -> Path:
    files.write(lora, path)
    return path


def test_setting_adapters_makes_them_trainable(pipe: Any) -> None:
    pipe.unet.requires_grad_(False)
    pipe.set_adapters(["a"])
    trainable = [p for p in pipe.unet.parameters() if p.requires_grad]
    assert trainable, changed_by("makes the adapters that it activates trainable")
    pipe.unet.requires_grad_(False)
    AdapterSwitch(pipe.unet).activate({"a": 1.0})
    assert not any(p.requires_grad for p in pipe.unet.parameters())


def test_the_lengths_of_dora_are_thrown_away(tmp_path: Path) -> None:
    module = "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    torch.manual_seed(0)
    tensors = CASES["dora"].make((8, 8))
    stored = {f"lora_unet_{module}.{end}": tensor for end, tensor in tensors.items()}
    plain = {key: tensor for key, tensor in stored.items() if "dora" not in key}
    path = trainers.save(stored, tmp_path / "dora.safetensors")
    bare = trainers.save(plain, tmp_path / "plain.safetensors")
    pictures = []
    for file in (path, bare):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = tiny.sd15(**tiny.WHOLE)
            theirs.load_lora_weights(str(file), adapter_name="x")
        pictures.append(tiny.run(theirs, steps=2))
    assert torch.equal(*pictures), changed_by("drops dora_scale")
    found = dropped(path, "Stable Diffusion 1.x")
    assert found["loads"]
    assert found["dropped"] == [f"lora_unet_{module}.dora_scale"]
    ours = tiny.sd15(**tiny.WHOLE)
    files.load(ours, path, "x")
    assert not torch.allclose(tiny.run(ours, steps=2), pictures[0], atol=1e-3)


def test_loha_and_kohyas_sd3_files_are_not_loaded(tmp_path: Path) -> None:
    module = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    stored = {f"{module}.{end}": t for end, t in CASES["loha"].make((8, 8)).items()}
    path = trainers.save(stored, tmp_path / "loha.safetensors")
    with pytest.raises(ValueError, match=r"hada|Invalid|not.*converted|keys"):
        tiny.sd15(**tiny.WHOLE).load_lora_weights(str(path))
    assert dropped(path, "Stable Diffusion 1.x")["loads"] is False
    files.load(tiny.sd15(**tiny.WHOLE), path, "x")
    stem = "lora_unet_joint_blocks_0_x_block_attn_proj"
    stored = {f"{stem}.{end}": t for end, t in CASES["lora"].make((8, 8)).items()}
    path = trainers.save(stored, tmp_path / "sd3.safetensors")
    found = dropped(path, "Stable Diffusion 3")
    whole = found["loads"] and not found["dropped"]
    from diffusers import StableDiffusion3Pipeline

    state = StableDiffusion3Pipeline.lora_state_dict(dict(stored))
    untouched = all(key.startswith("lora_unet_") for key in state)
    assert untouched or not whole, changed_by("lacks a converter for kohya's SD3 files")
    assert list(files.read(path).updates) == ["transformer.transformer_blocks.0.attn.to_out.0"]


def test_missing_layers_are_no_error(tmp_path: Path) -> None:
    lora = trainers.lora(
        tiny.sd15(**tiny.WHOLE), wanted=lambda name: "mid_block.attentions" in name
    )
    odd = {"unet.mid_block.attentions.9.proj_in": next(iter(lora.updates.values()))}
    path = save(LoRA("x", {**lora.updates, **odd}), tmp_path / "x.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = tiny.sd15(**tiny.WHOLE)
        theirs.load_lora_weights(str(path), adapter_name="x")
    assert theirs.get_list_adapters() == {"unet": ["x"]}, changed_by("ignores missing layers")
    with pytest.raises(CmloraError, match=r"attentions\.9\.proj_in is not in the pipeline"):
        files.load(tiny.sd15(**tiny.WHOLE), path, "x")


def test_unfusing_subtracts_in_half_precision(tmp_path: Path) -> None:
    pipe = tiny.sd15(**tiny.WHOLE)
    pipe.unet.to(torch.bfloat16)
    files_path = save(trainers.lora(tiny.sd15(**tiny.WHOLE)), tmp_path / "x.safetensors")
    before = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    theirs = tiny.sd15(**tiny.WHOLE)
    theirs.unet.to(torch.bfloat16)
    files.load(theirs, files_path, "x")
    theirs.fuse_lora(["unet"])
    theirs.unfuse_lora(["unet"])
    theirs.unload_lora_weights()
    after = theirs.unet.state_dict()
    same = all(torch.equal(before[k], after[k]) for k in before)
    assert not same, changed_by("loses bits when it unfuses")
    files.load(pipe, files_path, "x")
    with compose(pipe, ["x"], method="merge"):
        pass
    pipe.unload_lora_weights()
    assert all(torch.equal(before[k], v) for k, v in pipe.unet.state_dict().items())


def test_the_old_name_of_dtype_is_on_its_way_out(model_folder: Path, pipe: Any) -> None:
    with pytest.warns(FutureWarning, match="torch_dtype"):
        DiffusionPipeline.from_pretrained(model_folder, torch_dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*torch_dtype.*")
        open_pipeline(model_folder, dtype=torch.float32)
    whole, part = inspect.signature(pipe.set_adapters), inspect.signature(pipe.unet.set_adapters)
    assert "adapter_weights" in whole.parameters, changed_by("calls strengths adapter_weights")
    assert "weights" in part.parameters, changed_by("calls a model's strengths weights")


def test_hotswapping_refuses_text_encoders(tmp_path: Path) -> None:
    pipe = tiny.sd15()
    one = save(trainers.lora(pipe, name="one"), tmp_path / "one.safetensors")
    two = save(trainers.lora(pipe, name="two", seed=1), tmp_path / "two.safetensors")
    pipe.load_lora_weights(str(one), adapter_name="x")
    with pytest.raises(ValueError, match="not supported for text encoders"):
        pipe.load_lora_weights(str(two), adapter_name="x", hotswap=True)
    ours, fresh = tiny.sd15(), tiny.sd15()
    files.load(ours, one, "x")
    ours.delete_adapters("x")
    files.load(ours, two, "x")
    files.load(fresh, two, "x")
    torch.testing.assert_close(tiny.run(ours, steps=2), tiny.run(fresh, steps=2))


def test_a_pickle_is_read_if_it_is_named(tmp_path: Path) -> None:
    lora = trainers.lora(
        tiny.sd15(**tiny.WHOLE), wanted=lambda name: "mid_block.attentions" in name
    )
    torch.save(trainers.peft(lora), tmp_path / "x.bin")
    pipe = tiny.sd15(**tiny.WHOLE)
    pipe.load_lora_weights(str(tmp_path), weight_name="x.bin", adapter_name="x")
    assert pipe.get_list_adapters() == {"unet": ["x"]}, changed_by("reads pickles")
    with pytest.raises(CmloraError, match="is a pickle"):
        files.load(tiny.sd15(**tiny.WHOLE), tmp_path / "x.bin", "x")
