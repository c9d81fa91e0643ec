"""What cannot be merged is said in one line, and what only looks strange is merged."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from cmlora.adapters.merging import merge
from cmlora.errors import CmloraError
from cmlora.lora import LoRA
from tests.merging.makers import SHAPES, distance, make


@pytest.mark.parametrize(
    ("loras", "weights", "options", "message"),
    [
        ([make("a")], [1.0, 2.0], {}, "1 LoRAs and 2 weights"),
        ([make("a")], [float("nan")], {}, "weight of a is nan"),
        ([make("a")], [0.0], {}, "nothing to merge"),
        ([], [], {}, "nothing to merge"),
        ([make("a")], [1.0], {"method": "tise"}, "did you mean ties"),
        ([make("a")], [1.0], {"method": "ties", "densty": 1}, "no option 'densty'"),
        ([make("a")], [1.0], {"method": "ties", "density": "much"}, "density is 'much'"),
        ([make("a")], [1.0], {"method": "ties", "density": 0}, "density is 0"),
        ([make("a")], [1.0], {"method": "ties", "sign": "all"}, "sign is 'all'"),
        ([make("a", 3)], [1.0], {"rank": 4}, "rank 4 is not possible; these LoRAs allow 1 to 3"),
        ([make("a")], [1.0], {"rank": 0}, "rank 0"),
        ([make(n) for n in "abc"], [1.0] * 3, {"method": "slerp"}, "merges two LoRAs, not 3"),
        ([make(n) for n in "ab"], [1.0, -1.0], {"method": "karcher"}, "cannot be negative"),
    ],
)
def test_mistakes(
    loras: list[LoRA], weights: list[float], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(CmloraError, match=message):
        merge(loras, weights, **options)


def test_not_a_number_is_named() -> None:
    module = min(SHAPES)
    broken = make("a")
    broken.updates[module].up[0, 0] = torch.nan
    with pytest.raises(CmloraError, match=rf"{module} \(up\) holds NaN"):
        merge([make("b"), broken], [1.0, 1.0])


def test_other_shapes_are_another_model() -> None:
    module = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    update = make("a").updates[module]
    other = LoRA("b", {module: replace(update, up=update.up[:5])})
    with pytest.raises(
        CmloraError, match=r"to_q is \(13, 15, 1, 1\) in a and \(5, 15, 1, 1\) in b"
    ):
        merge([make("a"), other], [1.0, 1.0])


def test_other_families_are_refused() -> None:
    def of(width: int, name: str) -> LoRA:
        update = make("a").updates["transformer.transformer_blocks.0.attn.to_k"]
        down = torch.ones(update.rank, width)
        return LoRA(name, {f"unet.{name}.attn2.to_k": replace(update, down=down)})

    with pytest.raises(CmloraError, match="for different models"):
        merge([of(768, "a"), of(2048, "b")], [1.0, 1.0])


def test_a_matrix_and_a_kernel_of_one_pixel_are_the_same_layer() -> None:
    module = "unet.down_blocks.0.attentions.0.proj_in"
    kernel = LoRA("a", {module: make("a").updates[module]})
    update = make("b").updates[module]
    matrix = LoRA("b", {module: replace(update, down=update.down.flatten(1))})
    merged = merge([kernel, matrix], [1.0, 1.0], "cat").lora
    assert merged.updates[module].shape == SHAPES[module]


def test_values_too_large_for_half_precision_stay_single() -> None:
    loud = make("a", dtype=torch.float16)
    updates = {m: replace(u, scale=1e7) for m, u in loud.updates.items()}
    result = merge([replace(loud, updates=updates)], [1.0], "cat")
    assert result.report.warnings
    assert all(update.up.isfinite().all() for update in result.lora.updates.values())
    assert distance(result.lora, replace(loud, updates=updates)) < 1e-5
