"""CMLoRAPipeline: the wrapped pipeline's pictures, per-picture seeds, LoRAs in and out."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline

from cmlora.errors import CmloraError
from cmlora.pipelines.cmlora_pipeline import CMLoRAPipeline
from cmlora.plan import Member
from cmlora.recipe import image_seed
from tests import tiny

CALL: dict[str, Any] = {
    "num_inference_steps": 4,
    "guidance_scale": 3.0,
    "output_type": "np",
}


@pytest.fixture
def pipe(model_folder: Path) -> CMLoRAPipeline:
    made = CMLoRAPipeline.from_pretrained(model_folder)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def loaded(pipe: CMLoRAPipeline, lora_folder: Path) -> CMLoRAPipeline:
    for name in ("cat", "hat", "ink"):
        pipe.load_lora_weights(lora_folder / f"{name}.safetensors")
    return pipe


def test_naive_is_the_wrapped_pipeline(pipe: CMLoRAPipeline, model_folder: Path) -> None:
    stock = StableDiffusionPipeline.from_pretrained(model_folder)
    expected = stock("a cat", generator=torch.Generator().manual_seed(3), **CALL).images
    output = pipe("a cat", composition="naive", seed=3, **CALL)
    np.testing.assert_array_equal(output.images, expected)
    assert type(output) is type(stock("a cat", **CALL | {"num_inference_steps": 1}))


def test_one_merged_lora_is_what_diffusers_makes_of_it(
    pipe: CMLoRAPipeline, model_folder: Path, lora_folder: Path
) -> None:
    pipe.load_lora_weights(lora_folder / "cat.safetensors")
    stock = StableDiffusionPipeline.from_pretrained(model_folder)
    stock.load_lora_weights(lora_folder / "cat.safetensors")
    expected = stock("a cat", generator=torch.Generator().manual_seed(3), **CALL).images
    ours = pipe("a cat", composition="merge", seed=3, **CALL).images
    np.testing.assert_allclose(ours, expected, atol=1e-6)
    base = pipe("a cat", composition="naive", seed=3, **CALL).images
    assert np.abs(ours - base).max() > 1e-3


@pytest.mark.parametrize("method", ["merge", "switch", "composite", "cmlora"])
def test_a_picture_depends_on_its_own_seed_only(loaded: CMLoRAPipeline, method: str) -> None:
    both = loaded("a cat", composition=method, seed=5, num_images_per_prompt=2, **CALL).images
    for index in range(2):
        alone = loaded("a cat", composition=method, seed=image_seed(5, index), **CALL).images[0]
        np.testing.assert_allclose(both[index], alone, atol=1e-5)
    assert np.abs(both[0] - both[1]).max() > 1e-3


def test_seeds_can_be_listed(loaded: CMLoRAPipeline) -> None:
    both = loaded(["a cat", "a hat"], seed=[9, 2], **CALL).images
    alone = loaded("a hat", seed=2, **CALL).images[0]
    np.testing.assert_allclose(both[1], alone, atol=1e-5)
    with pytest.raises(CmloraError, match="3 seeds for 2 pictures"):
        loaded(["a cat", "a hat"], seed=[9, 2, 1], **CALL)


def test_cmlora_reuses_features_and_says_so(loaded: CMLoRAPipeline) -> None:
    output = loaded("a cat", seed=1, **CALL | {"num_inference_steps": 10})
    report = loaded.report
    assert report is not None
    assert output.report == report
    assert (report.method, report.steps, report.calls) == ("cmlora", 10, 30)
    assert sum(report.light.values()) > 0
    assert set(report.full) == {"cat", "hat", "ink"}


def test_the_pipeline_is_its_old_self_after_a_call(loaded: CMLoRAPipeline) -> None:
    before = loaded.pipe("a cat", generator=torch.Generator().manual_seed(0), **CALL).images
    loaded("a cat", seed=1, **CALL)
    after = loaded.pipe("a cat", generator=torch.Generator().manual_seed(0), **CALL).images
    np.testing.assert_array_equal(before, after)


def test_weights_choose_and_scale(loaded: CMLoRAPipeline) -> None:
    loaded("a cat", composition="composite", lora_weights={"hat": 0.5, "ink": 1}, seed=1, **CALL)
    assert loaded.report is not None
    assert loaded.report.full == {"hat": 4, "ink": 4}
    assert loaded.ensemble.weights([1, 2, 3]) == {"cat": 1, "hat": 2, "ink": 3}
    zero = loaded("a cat", composition="merge", lora_weights=[0, 0, 0], seed=1, **CALL).images
    base = loaded("a cat", composition="naive", seed=1, **CALL).images
    np.testing.assert_allclose(zero, base, atol=1e-6)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"cta": 1.0}, "no LoRA 'cta' is loaded; loaded: cat, hat, ink"),
        ([1.0], "1 lora_weights for 3 LoRAs"),
        ({"cat": float("nan")}, "'cat' is not a finite number"),
        ({"cat": "strong"}, "'strong' of LoRA 'cat'"),
    ],
)
def test_wrong_weights(loaded: CMLoRAPipeline, weights: Any, message: str) -> None:
    with pytest.raises(CmloraError, match=message):
        loaded("a cat", lora_weights=weights, **CALL)


def test_seed_and_generator_exclude_each_other(loaded: CMLoRAPipeline) -> None:
    with pytest.raises(CmloraError, match="either seed or generator"):
        loaded("a cat", seed=1, generator=torch.Generator(), **CALL)


def test_unknown_method_and_option(loaded: CMLoRAPipeline) -> None:
    with pytest.raises(CmloraError, match="did you mean composite"):
        loaded("a cat", composition="compsite", **CALL)
    with pytest.raises(CmloraError, match="has no option 'tua'"):
        loaded("a cat", composition="switch", composition_options={"tua": 3}, **CALL)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_all_parts_have_one_precision(tmp_path: Path, dtype: str | None) -> None:
    tiny.sd15().to(torch.float16).save_pretrained(tmp_path)
    pipe = CMLoRAPipeline.from_pretrained(tmp_path, dtype=dtype)
    parts = {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder)}
    assert parts == {torch.bfloat16 if dtype else torch.float32}


def test_names_are_taken_once(pipe: CMLoRAPipeline, lora_folder: Path) -> None:
    path = lora_folder / "cat.safetensors"
    assert pipe.load_lora_weights(path) == "cat"
    assert pipe.load_lora_weights(path) == "cat_2"
    with pytest.raises(CmloraError, match="'cat' is loaded already"):
        pipe.load_lora_weights(path, "cat")


def test_unloading_leaves_the_base(loaded: CMLoRAPipeline) -> None:
    base = loaded("a cat", composition="naive", seed=1, **CALL).images
    loaded.unload_lora_weights()
    assert not loaded.loras
    np.testing.assert_array_equal(loaded("a cat", composition="naive", seed=1, **CALL).images, base)
    with pytest.raises(CmloraError, match="no LoRAs to compose"):
        loaded("a cat", **CALL)


def test_return_dict_false_stays_a_tuple(loaded: CMLoRAPipeline) -> None:
    output = loaded("a cat", seed=1, return_dict=False, **CALL)
    assert isinstance(output, tuple)
    assert loaded.report is not None


def test_everything_else_is_the_wrapped_pipelines(pipe: CMLoRAPipeline) -> None:
    assert pipe.scheduler is pipe.pipe.scheduler
    assert pipe.to("cpu") is pipe
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = pipe.no_such_thing


def test_what_is_set_is_set_in_the_wrapped_pipeline(loaded: CMLoRAPipeline) -> None:
    before = loaded("a cat", seed=1, **CALL).images
    other = EulerDiscreteScheduler.from_config(loaded.scheduler.config)
    loaded.scheduler = other
    assert loaded.pipe.scheduler is other
    assert "scheduler" not in vars(loaded)
    assert np.abs(loaded("a cat", seed=1, **CALL).images - before).max() > 1e-3
    loaded.mine = 3
    assert vars(loaded)["mine"] == 3
    assert not hasattr(loaded.pipe, "mine")


def test_a_schedule_may_name_the_file(
    pipe: CMLoRAPipeline, lora_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "hat v1.5.safetensors"
    shutil.copy(lora_folder / "hat.safetensors", file)
    assert pipe.load_lora_weights(file) == "hat_v1_5"
    by_name = pipe("a cat", seed=1, schedule="<lora:hat_v1_5:0.5>", **CALL).images
    by_file = pipe("a cat", seed=1, schedule="<lora:hat v1.5:0.5>", **CALL).images
    np.testing.assert_array_equal(by_name, by_file)
    with pytest.raises(CmloraError, match="no LoRA 'hat' is composed; composed: hat_v1_5"):
        pipe("a cat", seed=1, schedule="<lora:hat:0.5>", **CALL)


def test_some_loras_are_taken_out(loaded: CMLoRAPipeline, lora_folder: Path) -> None:
    whole = loaded("a cat", seed=1, **CALL).images
    rest = loaded("a cat", seed=1, lora_weights={"cat": 1.0, "ink": 1.0}, **CALL).images
    with pytest.raises(CmloraError, match="no LoRA 'dog' is loaded; loaded: cat, hat, ink"):
        loaded.delete_adapters(["hat", "dog"])
    assert list(loaded.loras) == ["cat", "hat", "ink"]
    loaded.delete_adapters(["hat", "hat"])
    assert list(loaded.loras) == ["cat", "ink"]
    np.testing.assert_array_equal(loaded("a cat", seed=1, **CALL).images, rest)
    loaded.load_lora_weights(lora_folder / "hat.safetensors")
    np.testing.assert_array_equal(loaded("a cat", seed=1, **CALL).images, whole)


def test_the_scale_of_a_call_is_that_of_the_denoiser(loaded: CMLoRAPipeline) -> None:
    names = list(loaded.loras)
    half = dict.fromkeys(names, 0.5)
    ours = loaded("a cat", composition="gate", seed=1, lora_scale=0.5, **CALL).images
    texts = dict.fromkeys(names, 1.0)
    same = loaded(
        "a cat", composition="gate", seed=1, lora_weights=half, text_weights=texts, **CALL
    ).images
    np.testing.assert_array_equal(ours, same)
    quiet = loaded(
        "a cat",
        composition="gate",
        seed=1,
        lora_scale=0.5,
        schedule="<lora:cat:te=0>",
        text_weights={"hat": 0.0, "ink": 0.0},
        **CALL,
    ).images
    silent = loaded(
        "a cat", composition="gate", seed=1, lora_weights=half, text_encoder="none", **CALL
    ).images
    np.testing.assert_allclose(quiet, silent, atol=1e-6)


def test_the_scale_of_a_call_leaves_the_strengths_of_members_alone(loaded: CMLoRAPipeline) -> None:
    weights = {"cat": 1.0, "hat": 1.0}
    members = [Member("cat", 0.3), Member("hat", 0.6)]
    said: dict[str, Any] = {"composition": "merge", "lora_weights": weights, "members": members}
    plain = loaded("a cat", seed=1, **said, **CALL).images
    once = loaded("a cat", seed=1, lora_scale=1.0, **said, **CALL).images
    np.testing.assert_array_equal(plain, once)
