"""LoRA files into either or both denoisers of Wan, against diffusers' own loader; and replayed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel
from typer.testing import CliRunner

from cmlora import pictures
from cmlora.cli.app import app
from cmlora.errors import CmloraError
from cmlora.pipelines.cmlora_pipeline import CMLoRAPipeline
from cmlora.recipe import Companion, Ingredient, Recipe
from tests import families
from tests.composing import state
from tests.families import Family
from tests.pipelines.test_families import saved

BOTH = ("transformer", "transformer_2")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """LoRA files as diffusers saves them; they say nothing of the denoiser they are for."""
    folder = tmp_path_factory.mktemp("wan")
    return {name: saved(families.family("wan"), name, folder) for name in families.NAMES}


def fresh() -> tuple[Family, CMLoRAPipeline]:
    """A Wan without LoRAs, and the wrapper around it."""
    family = families.wan()
    family.pipe.set_progress_bar_config(disable=True)
    return family, CMLoRAPipeline(family.pipe)


def draw(family: Family, pipe: CMLoRAPipeline, **options: Any) -> torch.Tensor:
    """The wrapper called as the family calls its pipeline."""
    wrapped = Family(pipe, family.denoisers, family.call)
    return wrapped.run(composition="composite", cache="none", **options)


def passes(pipe: CMLoRAPipeline) -> dict[str, float]:
    """Full passes of the last run."""
    assert pipe.report is not None
    return dict(pipe.report.full)


def theirs(load: Callable[[Any], None], **weights: float) -> torch.Tensor:
    """The picture of diffusers' loader with one adapter, at a strength in each denoiser."""
    family, _ = fresh()
    load(family.pipe)
    for name, weight in weights.items():
        getattr(family.pipe, name).set_adapters(["x"], [weight])
    for model in family.models():
        model.requires_grad_(False)
    return family.run()


def assert_near(result: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


def test_a_file_into_the_second_denoiser(files: dict[str, Path]) -> None:
    def load(pipe: Any) -> None:
        pipe.load_lora_weights(files["ink"], adapter_name="x", load_into_transformer_2=True)

    expected, base = theirs(load, transformer_2=0.7), theirs(lambda _: None)
    results = []
    for said in ({"load_into_transformer_2": True}, {"into": "transformer_2"}):
        family, pipe = fresh()
        pipe.load_lora_weights(files["ink"], weight=0.7, **said)
        assert not hasattr(family.pipe.transformer, "peft_config")
        results.append(draw(family, pipe))
        pipe.unload_lora_weights()
        assert torch.equal(family.run(), base)
    assert_near(results[0], expected)
    assert torch.equal(results[0], results[1])
    assert not torch.allclose(base, expected, atol=1e-3)


def test_one_file_into_both(files: dict[str, Path]) -> None:
    def load(pipe: Any) -> None:
        pipe.load_lora_weights(files["ink"], adapter_name="x")
        pipe.load_lora_weights(files["ink"], adapter_name="x", load_into_transformer_2=True)

    family, pipe = fresh()
    pipe.load_lora_weights(files["ink"], into=BOTH)
    assert pipe.loras["ink"].applied.modules == len(load_file(files["ink"]))  # two keys a layer
    assert_near(draw(family, pipe), theirs(load, transformer=1.0, transformer_2=1.0))


def test_two_files_are_one_lora_with_a_strength_in_each(files: dict[str, Path]) -> None:
    def load(pipe: Any) -> None:
        pipe.load_lora_weights(files["ink"], adapter_name="x")
        pipe.load_lora_weights(files["alice"], adapter_name="x", load_into_transformer_2=True)

    family, pipe = fresh()
    pipe.load_lora_weights(files["ink"], "style", weight=0.8)
    pipe.load_lora_weights(files["alice"], "style", weight=0.5, into="transformer_2")
    assert list(pipe.loras) == ["style"]
    assert_near(draw(family, pipe), theirs(load, transformer=0.8, transformer_2=0.4))
    again = draw(family, pipe, lora_weights={"style": 1.0})
    assert_near(again, theirs(load, transformer=1.0, transformer_2=0.5))
    assert pipe.report is not None
    assert set(passes(pipe)) == {"style"}


def test_whole_matrices_go_the_same_way(files: dict[str, Path], tmp_path: Path) -> None:
    torch.manual_seed(0)
    stem, delta = "blocks.1.attn1.to_q", 0.2 * torch.randn(24, 24)
    path = tmp_path / "full.safetensors"
    save_file({f"lycoris_{stem.replace('.', '_')}.diff": delta}, path)
    family, pipe = fresh()
    pipe.load_lora_weights(files["ink"], "x")
    pipe.load_lora_weights(path, "x", weight=0.5, into="transformer_2")
    result = draw(family, pipe)
    other, _ = fresh()
    other.pipe.load_lora_weights(files["ink"], adapter_name="x")
    with torch.no_grad():
        other.pipe.transformer_2.get_submodule(stem).weight.add_(0.5 * delta)
    other.pipe.transformer.requires_grad_(False)
    assert_near(result, other.run())


def test_a_lora_has_passes_where_it_acts_only(files: dict[str, Path]) -> None:
    """One in each denoiser: composing them is running each where it is."""
    family, pipe = fresh()
    pipe.load_lora_weights(files["ink"], "high", into="transformer")
    pipe.load_lora_weights(files["alice"], "low", into="transformer_2")
    results = [draw(family, pipe)]
    assert set(passes(pipe)) == {"high", "low"}
    calls = sum(passes(pipe).values())
    wrapped = Family(pipe, family.denoisers, family.call)
    for method in ("merge", "switch", "cmlora"):
        results.append(wrapped.run(composition=method, cache="none"))
        assert sum(passes(pipe).values()) == calls
    for result in results[1:]:
        assert_near(result, results[0])

    other, alone = fresh()
    alone.load_lora_weights(files["ink"], "high", into="transformer")
    assert not torch.allclose(draw(other, alone), results[0], rtol=1e-3, atol=1e-4)
    assert set(passes(alone)) == {"high", "base"}


def test_a_pipeline_with_nothing_but_the_second(files: dict[str, Path]) -> None:
    family, pipe = fresh()
    family.pipe.register_modules(transformer=None)
    pipe.load_lora_weights(files["ink"])
    assert "ink" in family.pipe.transformer_2.peft_config


def test_what_cannot_be_meant_is_named(files: dict[str, Path], tmp_path: Path) -> None:
    family, pipe = fresh()
    pipe.load_lora_weights(files["ink"], "x", into="transformer")
    before = state(family.pipe)
    both = {
        k.replace("transformer.", "transformer_2."): v for k, v in load_file(files["ink"]).items()
    }
    save_file({**both, **load_file(files["ink"])}, tmp_path / "both.safetensors")
    mistakes: list[tuple[str, Path, dict[str, Any]]] = [
        ("say into which other denoiser", files["alice"], {}),
        ("already has a LoRA called 'x' in its transformer;", files["alice"], {"into": BOTH}),
        ("into='transformer_3': expected unet", files["alice"], {"into": "transformer_3"}),
        ("no such denoiser; it has transformer, transformer_2", files["alice"], {"into": "unet"}),
        ("not both", files["alice"], {"into": "unet", "load_into_transformer_2": True}),
        ("its role is None", files["alice"], {"into": "transformer_2", "role": "high"}),
        ("says itself", tmp_path / "both.safetensors", {"into": "transformer_2"}),
    ]
    for message, path, options in mistakes:
        with pytest.raises(CmloraError, match=message):
            pipe.load_lora_weights(path, "x", **options)
        assert state(family.pipe) == before
    assert pipe.loras["x"].further == ()
    flux = CMLoRAPipeline(families.flux().pipe)
    with pytest.raises(
        CmloraError, match=r"FluxPipeline has no such denoiser; it has transformer$"
    ):
        flux.load_lora_weights(files["ink"], load_into_transformer_2=True)


def test_recipes_hold_both_files() -> None:
    low = Companion("low.safetensors", "b" * 64, ("transformer_2",), 0.5)
    lora = Ingredient("x", "high.safetensors", "a" * 64, into=("transformer",), companions=(low,))
    recipe = Recipe("wan", "a cat", 1, 2, 32, 32, loras=(lora,))
    assert Recipe.from_json(recipe.to_json()) == recipe
    plain = Recipe("wan", "a cat", 1, 2, 32, 32, loras=(Ingredient("x"),))
    assert "companions" not in plain.to_json()
    table = json.loads(recipe.to_json())
    wrong: list[tuple[str, Any]] = [
        ("companions", [{"file": "a"}]),
        ("companions", "low.safetensors"),
        ("into", ["transformer_9"]),
        ("into", "transformer"),
    ]
    for key, value in wrong:
        changed = {**table, "loras": [{**table["loras"][0], key: value}]}
        with pytest.raises(CmloraError, match=key):
            Recipe.from_json(json.dumps(changed))
    with pytest.raises(CmloraError, match="into is empty"):
        Companion("low.safetensors", "b" * 64, ())


def whole_wan(folder: Path) -> Path:
    """A tiny Wan with everything that a prompt needs, as a diffusers folder."""
    words = ["<pad>", "</s>", "<unk>", "a", "cat"]
    table = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    split = Tokenizer(table)
    split.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=split, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    width = families.WIDTH
    config = UMT5Config(
        vocab_size=len(words), d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    vae = AutoencoderKLWan(
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
        temperal_downsample=[False, True, True],
    )
    made = families.wan().pipe
    made.register_modules(
        tokenizer=tokenizer, text_encoder=UMT5EncoderModel(config).eval(), vae=vae.eval()
    )
    made.save_pretrained(folder)
    return folder


def test_generated_and_replayed(files: dict[str, Path], tmp_path: Path) -> None:
    folder = whole_wan(tmp_path / "model")
    made = tmp_path / "made.png"

    def run(*arguments: str) -> Any:
        result = CliRunner().invoke(app, [*arguments], env={"COLUMNS": "200"})
        assert result.exit_code == 0, result.output
        return result

    where = ["--model", str(folder), "--lora-dir", str(files["ink"].parent), "--size", "32"]
    ask = ["--prompt", "a cat", "--steps", "3", "--method", "composite", "--out", str(made)]
    run("generate", *where, *ask, "--lora", "ink:0.8", "--second", "ink=alice:0.5")
    lora = pictures.read(made).loras[0]
    assert (lora.file, lora.into) == ("ink.safetensors", ("transformer",))
    assert [(c.file, c.into, c.weight) for c in lora.companions] == [
        ("alice.safetensors", ("transformer_2",), 0.5)
    ]
    again = run("replay", str(made), "--lora-dir", str(files["ink"].parent))
    assert "byte for byte" in again.stderr
    run("generate", *where, *ask, "--lora", "ink:0.8", "--into", "ink=transformer_2")
    assert pictures.read(made).loras[0].into == ("transformer_2",)
    wrong = ["--lora", "ink", "--second", "inc=alice"]
    result = CliRunner().invoke(app, ["generate", *where, *ask, *wrong])
    assert "second file for 'inc': the LoRAs are ink" in result.stderr
