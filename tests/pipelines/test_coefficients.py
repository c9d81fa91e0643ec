"""LoraHub's coefficients: found by the score of previews, and found again on disk."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmlora.errors import CmloraError
from cmlora.pipelines.cmlora_pipeline import CMLoRAPipeline
from cmlora.pipelines.coefficients import Previews, coefficients, user_cache

FEW = Previews(steps=2, seeds=(0, 1), budget=12)


def brightness(pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    assert len(pictures) == len(prompts) == len(FEW.seeds)
    # large, so that the penalty on the coefficients' size weighs nothing against it
    return [1000 * float(np.asarray(picture).mean()) for picture in pictures]


@pytest.fixture
def pipe(model_folder: Path, lora_folder: Path) -> CMLoRAPipeline:
    made = CMLoRAPipeline.from_pretrained(model_folder)
    made.set_progress_bar_config(disable=True)
    for name in ("hat", "cat"):
        made.load_lora_weights(lora_folder / f"{name}.safetensors")
    return made


def test_previews_get_a_better_score(pipe: CMLoRAPipeline, tmp_path: Path) -> None:
    weights = pipe.ensemble.weights()
    seen: list[float] = []

    def score(pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        marks = brightness(pictures, prompts)
        seen.append(sum(marks) / len(marks))
        return marks

    found = coefficients(
        pipe.ensemble, "a cat", weights, score=score, previews=FEW, folder=tmp_path
    )
    assert len(found) == 2
    assert all(abs(value) <= FEW.bound for value in found)
    assert len(seen) == FEW.budget

    def preview(point: tuple[float, ...]) -> float:
        output = pipe(
            ["a cat"] * 2,
            composition="lorahub",
            composition_options={"coefficients": point},
            seed=FEW.seeds,
            num_inference_steps=FEW.steps,
        )
        return sum(brightness(output.images, ["a cat"] * 2)) / 2

    assert preview(found) == pytest.approx(max(seen), abs=0.1)
    assert preview(found) >= preview((0.0, 0.0))


def test_a_second_search_reads_the_first(pipe: CMLoRAPipeline, tmp_path: Path) -> None:
    calls = []

    def search(prompt: str, **options: object) -> tuple[float, ...]:
        return coefficients(
            pipe.ensemble,
            prompt,
            pipe.ensemble.weights(),
            score=brightness,
            previews=FEW,
            folder=tmp_path,
            on_evaluation=lambda: calls.append(prompt),
            **options,
        )

    first = search("a cat")
    assert search("a cat") == first
    assert len(calls) == FEW.budget
    search("a hat")
    search("a cat", guidance_scale=2.0)
    assert len(calls) == 3 * FEW.budget
    for file in tmp_path.iterdir():
        file.write_text("{")
    assert search("a cat") == first
    assert len(calls) == 4 * FEW.budget


def test_one_lora_needs_no_search(pipe: CMLoRAPipeline) -> None:
    assert coefficients(pipe.ensemble, "a cat", {"cat": 1.0}) == (1.0,)


def test_without_a_score_there_is_no_search(pipe: CMLoRAPipeline, tmp_path: Path) -> None:
    with pytest.raises(CmloraError, match="pass coefficients="):
        coefficients(pipe.ensemble, "a cat", pipe.ensemble.weights(), folder=tmp_path)


def test_where_results_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    monkeypatch.delenv("CMLORA_CACHE", raising=False)
    assert user_cache() == Path("/somewhere/cmlora")
    monkeypatch.setenv("CMLORA_CACHE", "/own")
    assert user_cache() == Path("/own")
