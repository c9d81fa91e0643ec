"""Files as PEFT writes them: the tensors in one file, and what they mean in another beside it."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, get_peft_model
from torch import Tensor

from cmlora import files, peft_config
from cmlora.errors import CmloraError
from tests import tiny, trainers

NAMES = ["to_q", "to_k"]
TO_Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
RANKS = {"rank_pattern": {"attn2.to_k": 3}}
ALPHAS = {"alpha_pattern": {"attn2.to_q": 5, f"^{TO_Q}": 1}}
REGULAR = {"alpha_pattern": {r".*attn2.*": 8, r"^down_blocks\.\d+\..*to_k$": 3}}

CONFIGS: dict[str, Any] = {
    "lora": lambda: LoraConfig(r=2, lora_alpha=8, target_modules=NAMES),
    "convolutions": lambda: LoraConfig(r=2, lora_alpha=6, target_modules=["conv1", "proj_in"]),
    "rslora": lambda: LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=NAMES),
    "patterns": lambda: LoraConfig(r=2, lora_alpha=8, target_modules=NAMES, **RANKS, **ALPHAS),
    "regular": lambda: LoraConfig(r=2, lora_alpha=2, target_modules=NAMES, **REGULAR),
    "all": lambda: LoraConfig(
        r=2, lora_alpha=2, use_rslora=True, target_modules=NAMES, **RANKS, **REGULAR
    ),
    "dora": lambda: LoraConfig(r=2, lora_alpha=8, use_dora=True, target_modules=NAMES),
    "loha": lambda: LoHaConfig(r=3, alpha=2, target_modules=NAMES),
    "lokr": lambda: LoKrConfig(r=2, alpha=3, target_modules=NAMES, rank_pattern={"attn2.to_q": 8}),
    "oft": lambda: OFTConfig(oft_block_size=4, use_cayley_neumann=False, target_modules=NAMES),
    "coft": lambda: OFTConfig(oft_block_size=4, coft=True, eps=0.05, target_modules=NAMES),
    "ia3": lambda: IA3Config(target_modules=["to_k", "conv1"], feedforward_modules=["conv1"]),
}


def written(config: Any, folder: Path) -> tuple[Path, Any]:
    """The file that PEFT writes of a UNet with random adapters, and the UNet."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that patterns and rank stabilisation go together
        model = get_peft_model(tiny.sd15().unet, config)
    torch.manual_seed(4)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".default" in key:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    model.save_pretrained(str(folder))
    return folder / "adapter_model.safetensors", model.eval()


@torch.no_grad()
def answer(unet: Any) -> Tensor:
    result: Tensor = unet(tiny.latents(1, seed=1), 10, torch.ones(1, 7, 16)).sample
    return result


def silent(path: Path) -> Any:
    """The file as it is read, without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return files.read(path)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_model_is_what_peft_computes(name: str, tmp_path: Path) -> None:
    path, theirs = written(CONFIGS[name](), tmp_path)
    pipe = tiny.sd15()
    before = answer(pipe.unet)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        files.load(pipe, path, "x")
    expected = answer(theirs)
    assert float((expected - before).abs().max()) > 2e-3
    torch.testing.assert_close(answer(pipe.unet), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["lora", "rslora", "patterns", "regular", "all", "loha", "lokr"])
def test_every_update_is_that_of_pefts_layer(name: str, tmp_path: Path) -> None:
    path, theirs = written(CONFIGS[name](), tmp_path)
    lora = silent(path)
    assert len(lora.updates) > 10
    for module, update in lora.updates.items():
        layer = theirs.base_model.model.get_submodule(module.removeprefix("unet."))
        expected = layer.get_delta_weight("default")
        torch.testing.assert_close(update.delta(), expected, rtol=1e-4, atol=1e-5)


def test_the_alpha_that_is_shown_is_that_of_peft(tmp_path: Path) -> None:
    path, _ = written(CONFIGS["lora"](), tmp_path)
    assert files.describe(path)["alpha"] == [8.0, 8.0]


def test_a_copy_without_the_configuration_says_that_its_strength_is_not_known(
    tmp_path: Path,
) -> None:
    path, _ = written(CONFIGS["lora"](), tmp_path / "peft")
    assert next(iter(silent(path).updates.values())).scale == 4.0
    copy = Path(shutil.copy(path, tmp_path / "copy.safetensors"))
    with pytest.warns(UserWarning, match=r"copy\.safetensors: its strength is not known.* no adap"):
        lora = files.read(copy)
    assert next(iter(lora.updates.values())).scale == 1.0
    with pytest.warns(UserWarning, match=r"strength is not known"):
        files.load(tiny.sd15(), copy, "x")


def test_a_configuration_of_another_rank_is_not_that_of_the_file(tmp_path: Path) -> None:
    path, _ = written(CONFIGS["lora"](), tmp_path / "one")
    other, _ = written(CONFIGS["rslora"](), tmp_path / "other")
    copy = Path(shutil.copy(path, other.parent / "one.safetensors"))
    with pytest.warns(UserWarning, match=r"adapter_config\.json is of another LoRA, of rank 4"):
        assert next(iter(files.read(copy).updates.values())).scale == 1.0


def test_alphas_in_the_file_need_no_configuration(tmp_path: Path) -> None:
    stem = f"base_model.model.{TO_Q}"
    stored = {f"{stem}.lora_{s}.weight": torch.ones(2, 2) for s in "AB"}
    path = trainers.save(stored | {f"{stem}.alpha": torch.tensor(6.0)}, tmp_path / "x.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 100}))
    assert silent(path).updates[f"unet.{TO_Q}"].scale == 3.0


def test_files_of_others_take_no_notice_of_what_is_beside_them(tmp_path: Path) -> None:
    stored = {f"unet.{TO_Q}.lora_{s}.weight": torch.ones(2, 2) for s in "AB"}
    path = trainers.save(stored, tmp_path / "x.safetensors")
    (tmp_path / "adapter_config.json").write_text("damaged")
    assert silent(path).updates[f"unet.{TO_Q}"].scale == 1.0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no table in JSON"),
        ("[]", "no table in JSON"),
        ('{"r": 2, "lora_alpha": NaN}', "no table in JSON"),
        ('{"r": 2, "lora_alpha": "much"}', "lora_alpha is 'much', not a number"),
        ('{"r": 2, "lora_alpha": null}', "lora_alpha is None, not a number"),
        (f'{{"r": 2, "lora_alpha": 1{"0" * 400}}}', "lora_alpha is 1"),
        ('{"r": 2, "alpha_pattern": [3]}', "alpha_pattern is [3], not a table"),
        ('{"r": 2, "alpha_pattern": {"to_q": []}}', "alpha_pattern of 'to_q' is []"),
        ('{"r": 2, "rank_pattern": {"to_q": []}}', "rank_pattern of 'to_q' is []"),
        ('{"r": 2, "alpha_pattern": {"(a|b)+": 3}}', "'(a|b)+', which is not read"),
        (json.dumps({"x": "y" * 2**20}), "is larger than 1048576 bytes"),
    ],
)
def test_a_damaged_configuration_is_named(text: str, words: str, tmp_path: Path) -> None:
    path, _ = written(CONFIGS["lora"](), tmp_path)
    beside = tmp_path / "adapter_config.json"
    beside.write_text(text)
    with pytest.raises(CmloraError) as caught:
        files.read(path)
    assert str(caught.value).startswith(str(beside))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------ patterns


def theirs_matches(pattern: str, name: str) -> bool:
    """As PEFT's own `get_pattern_key`."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


@pytest.mark.parametrize(
    ("pattern", "matching"),
    [
        (r".*attn2.*", {"mid.attn2.to_q", "down.1.attn2.to_k"}),
        (r"down\.\d+\.attn2\.to_k", {"down.1.attn2.to_k"}),
        (r"^attn2.to_k", set()),
        (r"attn[0-9]+.to_q", {"mid.attn2.to_q", "mid.attn1.to_q"}),
        (r"^.*to_q$", {"mid.attn2.to_q", "mid.attn1.to_q"}),
        (r"to_q", {"mid.attn2.to_q", "mid.attn1.to_q"}),
        (r"o_q", set()),
        (r"^mid.attn1.to_q", {"mid.attn1.to_q"}),
    ],
)
def test_patterns_mean_the_modules_that_they_mean_to_peft(pattern: str, matching: set[str]) -> None:
    names = ("mid.attn2.to_q", "mid.attn1.to_q", "down.1.attn2.to_k")
    assert {name for name in names if peft_config.matches(pattern, name)} == matching
    assert {name for name in names if theirs_matches(pattern, name)} == matching


steps = st.tuples(st.sampled_from([r"\.", ".", r"\d", "[0-9]", *"ab1"]), st.sampled_from("*+? "))
patterns = st.tuples(st.sampled_from(["", "^"]), st.lists(steps, min_size=1, max_size=5))


@settings(deadline=None, max_examples=500)
@given(patterns, st.text("ab1.", max_size=6).map(lambda text: text.strip(".") or "a"))
def test_any_pattern_that_is_read_means_what_it_means_to_peft(
    pattern: tuple[str, list[tuple[str, str]]], name: str
) -> None:
    text = pattern[0] + "".join(step + times.strip() for step, times in pattern[1])
    if not any(times.strip() for _, times in pattern[1]) and re.search(r"(?<!\\)\.", text):
        return  # the dots of plain names are taken as dots
    assert peft_config.matches(text, name) == theirs_matches(text, name)


def test_the_time_that_a_pattern_takes_is_bounded() -> None:
    assert not peft_config.matches(".*a" * 60 + "b", "a" * 500)


def headed(settings_: Mapping[str, Any], folder: Path) -> Path:
    stored = {f"unet.{TO_Q}.lora_{s}.weight": torch.ones(2, 2) for s in "AB"}
    text = json.dumps({f"unet.{key}": value for key, value in settings_.items()})
    return trainers.save(stored, folder / "x.safetensors", lora_adapter_metadata=text)


def test_patterns_of_a_diffusers_header_are_read_too(tmp_path: Path) -> None:
    found = {"r": 2, "lora_alpha": 2, "alpha_pattern": {r".*attn\d+.*": 6}}
    assert files.read(headed(found, tmp_path)).updates[f"unet.{TO_Q}"].scale == 3.0


def test_a_regular_expression_that_is_not_run_is_named(tmp_path: Path) -> None:
    found = {"r": 2, "lora_alpha": 2, "alpha_pattern": {r".*(attn1|attn2).*": 6}}
    path = headed(found, tmp_path)
    with pytest.raises(CmloraError, match=r"\.\*\(attn1\|attn2\)\.\*.* is not read.* stranger"):
        files.read(path)
    # Ranks are those of the tensors, whatever a pattern says of them.
    found = {"r": 2, "lora_alpha": 4, "rank_pattern": {r".*(attn1|attn2).*": 2}}
    assert files.read(headed(found, tmp_path)).updates[f"unet.{TO_Q}"].scale == 2.0
