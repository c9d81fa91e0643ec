"""How strong LoRAs may be, from calibration data alone."""

import math
import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cmlora.adapters.analysis.chart import Chart
from cmlora.adapters.analysis.saturation import TOGETHER, advise, saturation, to_json
from cmlora.adapters.analysis.strength import ROOM, attention_rank
from cmlora.adapters.calibration import BASE, Calibration, Seen
from cmlora.errors import CmloraError
from cmlora.lora import LoRA, Update
from tests.synthetic import scaled

Q, K = "unet.mid_block.attn.to_q", "unet.mid_block.attn.to_k"


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def measured(size: float = 1.0) -> tuple[Calibration, dict[str, Tensor]]:
    weights = {Q: random(8, 6, seed=1), K: random(8, 6, seed=2)}
    x = size * random(40, 6)
    seen = {name: Seen(x.T @ x, x.mean(0), x, x @ w.T) for name, w in weights.items()}
    return Calibration({BASE: seen}, {}, {"heads": {"unet.mid_block.attn": 2}}), weights


def a_lora(name: str, seed: int, size: float = 1.0) -> LoRA:
    updates = {
        key: Update(random(2, 6, seed=seed + i), size * random(8, 2, seed=seed + 10 + i))
        for i, key in enumerate((Q, K))
    }
    return LoRA(name, updates)


def test_the_first_layer_to_go_decides() -> None:
    calibration, weights = measured()
    lora = a_lora("a", 20)
    (found,) = saturation(calibration, [lora], [1.0])
    x = random(40, 6)
    for name, matrix in weights.items():
        base = float((x @ matrix.T).abs().max())
        strength = found.layers[name].safest
        grown = x @ (matrix + strength * lora.updates[name].delta()).T
        assert float(grown.abs().max()) == pytest.approx(ROOM * base, rel=1e-3)
    assert found.safest == min(own.safest for own in found.layers.values())
    assert found.layers[found.where].safest == found.safest


def test_attention_needs_more_rank_the_stronger_the_lora() -> None:
    calibration, weights = measured(0.2)
    lora = a_lora("a", 20)
    ranks = [saturation(calibration, [lora], [w])[0].ranks["unet.mid_block.attn"] for w in (0, 2)]
    x = 0.2 * random(40, 6)
    q, k = (x @ weights[name].T for name in (Q, K))
    plain = [attention_rank(a, b) for a, b in zip(q.chunk(2, 1), k.chunk(2, 1), strict=True)]
    assert ranks[0] == (sum(plain) / 2, sum(plain) / 2)
    assert ranks[1][1] > ranks[1][0]


def test_together_they_may_be_too_strong_though_each_is_not() -> None:
    calibration, _ = measured()
    (alone,) = saturation(calibration, [a_lora("a", 20)], [1.0])
    one = scaled(a_lora("a", 20), "a", 0.8 * alone.safest)
    pair = [one, replace(one, name="b")]
    found = saturation(calibration, pair, [1.0, 1.0])
    assert [row.name for row in found] == ["a", "b", TOGETHER]
    assert found[2].safest == pytest.approx(0.625, rel=1e-3)
    (advice,) = advise(found, {"a": 1.0, "b": 1.0})
    assert re.fullmatch(r"multiply all weights by 0\.6[23] if they are merged", advice.do)
    loud = advise(found[:1], {"a": 2.0})
    assert re.fullmatch(r"keep a at 1\.[23] or below", loud[0].do)


def test_a_silent_lora_is_safe_at_any_strength() -> None:
    calibration, _ = measured()
    found = saturation(calibration, [a_lora("a", 20, 0.0)], [1.0])
    assert found[0].safest == math.inf
    assert to_json(found)[0]["safest"] is None
    assert advise(found, {}) == ()
    with pytest.raises(CmloraError, match="no samples of what b changes"):
        saturation(calibration, [LoRA("b", {"unet.x": a_lora("b", 1).updates[Q]})], [1.0])


def test_charts() -> None:
    chart = Chart("way", [0.0, 0.5, 1.0], {"a<b": [1.0, math.nan, 3.0], "c": [2.0, 2.0, 2.0]})
    text = chart.drawing().svg()
    assert text.count("<polyline") == 3
    assert "a&lt;b" in text
    image = chart.drawing().image()
    assert image.size == (480, 296)
    assert len(image.getcolors(10_000) or ()) > 3
    assert Chart("flat", [0.0, 1.0], {"a": [1.0, 1.0]}).drawing().svg()
    with pytest.raises(CmloraError, match=r"\.png or \.svg"):
        chart.save("x.gif")
