"""Pairs of LoRAs whose relation is known: equal, orthogonal, negated, scaled."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from cmlora import denoisers, family
from cmlora.adapters.analysis.alignment import block_of, cosines, gram, overlap
from cmlora.adapters.analysis.balance import sizes, stacking, weights
from cmlora.adapters.analysis.detail import detail
from cmlora.adapters.analysis.doctor import Report, examine
from cmlora.adapters.analysis.heatmap import Heatmap, of_pairs
from cmlora.adapters.analysis.mismatch import BASES, check_families, shared_triggers
from cmlora.adapters.analysis.spikes import first_share, spectrum, spikes
from cmlora.adapters.compression import RULES
from cmlora.adapters.compression.resize import resize
from cmlora.adapters.merging import merge
from cmlora.errors import CmloraError
from cmlora.files import read
from cmlora.lora import LoRA, Update
from cmlora.pipelines.library import find
from tests.synthetic import MODULES, lora, orthogonal, scaled

ONE = lora("one", 1)


def said(report: Report, topic: str) -> str:
    return " | ".join(f"{a.do} because {a.because}" for a in report.advice if a.topic == topic)


@pytest.mark.parametrize(
    ("other", "cosine", "shared", "strength"),
    [
        (scaled(ONE, "other", 1), 1.0, 1.0, math.sqrt(2)),
        (scaled(ONE, "other", -1), -1.0, 1.0, 0.0),
        (scaled(ONE, "other", 3), 1.0, 1.0, 4 / math.sqrt(10)),
        (orthogonal(ONE, "other"), 0.0, 0.0, 1.0),
    ],
)
def test_known_pairs(other: LoRA, cosine: float, shared: float, strength: float) -> None:
    (pair,) = examine([ONE, other]).pairs()
    assert pair["cosine"] == pytest.approx(cosine, abs=1e-6)
    assert pair["shared_directions"] == pytest.approx(shared, abs=1e-6)
    assert pair["stacking"] == pytest.approx(strength, abs=1e-6)
    assert set(pair["blocks"]) == {block_of(module) for module in MODULES}
    for block in pair["blocks"].values():
        assert block["cosine"] == pytest.approx(cosine, abs=1e-6)
        assert block["shared_outputs"] == pytest.approx(shared, abs=1e-6)
        assert block["chance"] == pytest.approx(3 / 10)


def test_advice_for_known_pairs() -> None:
    assert "use one of" in said(examine([ONE, scaled(ONE, "other", 1)]), "method")
    assert "never merge" in said(examine([ONE, scaled(ONE, "other", -1)]), "method")
    assert "merge comes second" in said(examine([ONE, orthogonal(ONE, "other")]), "method")
    assert "other:0.5" in said(examine([ONE, scaled(ONE, "other", 9)]), "weights")
    assert "71" in said(examine([ONE, scaled(ONE, "other", 1)]), "weights")
    for report in (examine([ONE]), examine([ONE, orthogonal(ONE, "other")])):
        assert all(advice.do and advice.because for advice in report.advice)


@settings(max_examples=30)
@given(st.integers(0, 2**31), st.integers(1, 12), st.sampled_from([(12, 10), (6, 4, 3, 3)]))
def test_gram_is_the_dense_one(seed: int, rank: int, shape: tuple[int, ...]) -> None:
    trio = [lora(str(i), seed + i, shape=shape, rank=rank) for i in range(3)]
    for block, table in gram(trio).items():
        for i, one in enumerate(trio):
            for j, other in enumerate(trio):
                dense = sum(
                    float((one.updates[m].delta() * other.updates[m].delta()).sum())
                    for m in MODULES
                    if block_of(m) == block
                )
                assert float(table[i, j]) == pytest.approx(dense, rel=1e-4, abs=1e-3)


def test_overlap_is_that_of_orthonormal_bases() -> None:
    other = lora("other", 2, rank=5)
    for module, shared in zip(MODULES, overlap(ONE, other).values(), strict=True):
        (up, down), (other_up, other_down) = (x.updates[module].factors() for x in (ONE, other))
        q, p = torch.linalg.qr(up)[0], torch.linalg.qr(other_up)[0]
        assert shared.outputs == pytest.approx(float((q.T @ p).square().sum()) / 3)
        q, p = torch.linalg.qr(down.T)[0], torch.linalg.qr(other_down.T)[0]
        assert shared.inputs == pytest.approx(float((q.T @ p).square().sum()) / 3)


def test_overlap_of_random_directions_is_chance() -> None:
    pairs = [(lora("a", 2 * i), lora("b", 2 * i + 1)) for i in range(40)]
    shared = [s for a, b in pairs for s in overlap(a, b).values()]
    assert sum(s.inputs for s in shared) / len(shared) == pytest.approx(shared[0].chance, abs=0.03)


def test_a_module_on_one_side_only_shares_nothing() -> None:
    left, right = lora("left", 1, MODULES[:2]), lora("right", 2, MODULES[2:])
    report = examine([left, right])
    (pair,) = report.pairs()
    assert "no module in common" in said(report, "file")
    assert pair["cosine"] == 0.0
    assert pair["blocks"] == {}


def test_an_untrained_lora_is_named() -> None:
    silent = scaled(ONE, "silent", 0)
    report = examine([ONE, silent])
    assert "leave out silent" in said(report, "file")
    assert report.pairs()[0]["cosine"] == 0.0
    assert report.json()["loras"]["silent"]["norm"] == 0.0


@settings(max_examples=50)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=6))
def test_weights_never_raise_and_never_silence(norms: list[float]) -> None:
    assert all(0.5 <= weight <= 1 for weight in weights(norms))


def test_sizes_are_of_the_denoiser() -> None:
    both = lora("both", 3, (*MODULES, "text_encoder.text_model.encoder.layers.0.mlp.fc1"))
    alone = replace(both, updates={m: both.updates[m] for m in MODULES})
    assert sizes(gram([both]))[0] == pytest.approx(alone.norm())
    assert stacking(torch.zeros(2, 2), [1, 1]) == 1.0
    assert cosines(torch.zeros(2, 2)).tolist() == [[0, 0], [0, 0]]


def test_spikes_are_found_and_only_those() -> None:
    ordinary = lora("ordinary", 4, rank=6)
    assert spikes(ordinary) == ()
    noise = torch.Generator().manual_seed(0)
    up = torch.randn((12, 6), generator=noise) * 0.01
    down = torch.randn((6, 10), generator=noise) * 0.01
    up[:, 0], down[0] = 20 * torch.ones(12), torch.ones(10)
    spiked = replace(ordinary, updates={**ordinary.updates, MODULES[2]: Update(down, up)})
    (spike,) = spikes(spiked)
    assert spike.module == MODULES[2]
    assert spike.share == pytest.approx(1, abs=1e-3)
    assert spike.lift > 3
    assert "loud direction" in said(examine([spiked]), "file")
    assert spikes(resize(spiked, RULES["clip"].object).lora) == ()


@settings(max_examples=30)
@given(st.integers(0, 2**31), st.integers(1, 9))
def test_spectrum_is_that_of_the_dense_update(seed: int, rank: int) -> None:
    update = lora("any", seed, MODULES[:1], rank=rank).updates[MODULES[0]]
    expected = update.singular_values()[: min(rank, 10)]
    found = spectrum(update)[: len(expected)]
    assert torch.allclose(found, expected, atol=1e-6 * float(expected[0]))
    energy = expected.square()
    assert first_share(found) == pytest.approx(float(energy[0] / energy.sum()), rel=1e-5)


def test_detail_is_where_the_energy_is() -> None:
    top, bottom = lora("top", 1, MODULES[:1]), lora("bottom", 1, MODULES[2:4])
    assert detail(gram([top, bottom, ONE]))[:2] == (1.0, 0.0)
    ordered = examine([bottom, top, lora("all", 2)])
    assert said(ordered, "order").startswith("top then all then bottom")
    transformer = lora("x", 1, ("transformer.transformer_blocks.0.attn.to_q",))
    assert math.isnan(detail(gram([transformer]))[0])


def test_measured_order_and_categories_come_first() -> None:
    other = orthogonal(ONE, "other")
    measured = examine([ONE, other], frequency={"one": 0.2, "other": 0.6})
    assert said(measured, "order").startswith("other then one")
    back = replace(ONE, metadata={"cmlora.category": "background"})
    assert said(examine([back, other]), "order").startswith("other then one")
    same = replace(other, metadata=back.metadata)
    assert "take turns" in said(examine([back, same]), "schedule")


def test_triggers_are_compared_as_words() -> None:
    def called(name: str, *words: str) -> LoRA:
        return replace(ONE, name=name, triggers=words)

    assert shared_triggers([called("a", "Ink  Style"), called("b", "ink style")])
    assert shared_triggers([called("a", "inked"), called("b", "ink")]) == {}
    assert shared_triggers([called("a", ""), called("b", "ink")]) == {}
    report = examine([called("a", "ink"), called("b", "red ink", "cat"), called("c", "cat")])
    assert report.findings.triggers == {"red ink": ("a", "b"), "cat": ("b", "c")}
    assert "different words" in said(report, "prompt")


def test_families_must_agree() -> None:
    one = lora("sd", 1, ("unet.mid_block.attn2.to_k",), (8, 768))
    xl = lora("xl", 1, ("unet.mid_block.attn2.to_k",), (8, 2048))
    assert check_families([one, ONE]) == check_families([ONE], "sd15") == "Stable Diffusion 1.x"
    with pytest.raises(CmloraError, match="xl is for Stable Diffusion XL"):
        examine([one, xl])
    with pytest.raises(CmloraError, match=r"the base is FLUX\.1"):
        check_families([one], "flux")
    with pytest.raises(CmloraError, match="known bases: sd1"):
        check_families([one], "sd51")
    wide = lora("wide", 1, shape=(12, 20))
    with pytest.raises(CmloraError, match="different shapes in one and wide"):
        examine([lora("one", 1), wide])


FLUX = tuple(
    f"transformer.{block}"
    for block in ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.attn.to_q")
)


def test_a_file_that_says_less_is_of_the_family_it_does_not_contradict() -> None:
    whole, double = lora("whole", 1, FLUX), lora("double", 2, FLUX[:1])
    for pair in ([whole, double], [double, whole]):
        assert examine(pair).family == family.of_lora(whole)
        merge(pair, [1.0, 1.0], "svd")
    assert check_families([double], "flux") == family.of_lora(whole)
    with pytest.raises(CmloraError, match="cannot be used together: one is for"):
        examine([lora("one", 1, ("unet.mid_block.attn2.to_k",), (12, 768)), double])
    with pytest.raises(CmloraError, match="the base is Wan"):
        check_families([whole], "wan")


def test_every_base_that_a_person_may_say() -> None:
    known = {row.family for row in denoisers.KINDS.values() if row.stacks}
    assert {*family.UNETS, *known} <= set(BASES.values())
    for said, title in BASES.items():
        assert check_families([ONE], said.upper()) == check_families([ONE], title) == title
    with pytest.raises(CmloraError, match="unknown base 'foo'"):
        check_families([ONE], "foo")
    embedded = read(find("style_1", model="emoji"))
    assert check_families([embedded], "emoji") == family.of_lora(embedded)
    with pytest.raises(CmloraError, match="the base is Stable Diffusion XL"):
        check_families([embedded], "sdxl")


def test_wide_layers_are_compared_without_their_matrices() -> None:
    wide = {
        "unet.down_blocks.0.ff.net.0.proj": (2560, 320),
        "unet.mid_block.ff.net.2": (1280, 5120),
    }
    trio = []
    for seed in range(3):
        parts = (lora("x", seed, (name,), shape, 8).updates for name, shape in wide.items())
        trio.append(LoRA(str(seed), {m: u for part in parts for m, u in part.items()}))
    largest = max(rows * 8 for shape in wide.values() for rows in shape)
    with Largest() as made:  # type: ignore[no-untyped-call]
        examine(trio)
    assert 0 < made.size <= largest


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """How many numbers the largest tensor has that is made meanwhile."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, tuple | list) else (made,):
            if isinstance(each, torch.Tensor):
                self.size = max(self.size, each.numel())
        return made


def test_text_encoders_and_bases_are_compared() -> None:
    both = lora("both", 3, (*MODULES, "text_encoder.text_model.encoder.layers.0.mlp.fc1"))
    report = examine([replace(ONE, metadata={"cmlora.base": "x"}), both])
    assert "text-encoder part of both" in said(report, "file")
    report = examine(
        [
            replace(ONE, metadata={"ss_sd_model_name": "x"}),
            replace(both, metadata={"ss_sd_model_name": "y"}),
        ]
    )
    assert "one on x, both on y" in said(report, "file")


def test_what_cannot_be_examined() -> None:
    with pytest.raises(CmloraError, match="no LoRA"):
        examine([])
    with pytest.raises(CmloraError, match="called one"):
        examine([ONE, ONE])
    with pytest.raises(CmloraError, match="no updates"):
        examine([LoRA("bare", {})])


def test_the_plot_in_both_formats(tmp_path: Path) -> None:
    drawn = of_pairs("a & b", examine([ONE, scaled(ONE, "other<", -1)]).pairs())
    assert [row[0] for row in drawn.values] == pytest.approx([-1] * 5)
    drawn.save(tmp_path / "x.svg")
    drawn.save(tmp_path / "x.png")
    texts = ElementTree.parse(tmp_path / "x.svg").getroot().itertext()
    assert {"a & b", "one / other<", "-1.00", "unet.mid_block"} <= set(texts)
    with Image.open(tmp_path / "x.png") as image:
        assert len(image.getcolors(10**6) or []) > 2
    with pytest.raises(CmloraError, match="should end in"):
        drawn.save(tmp_path / "x.pdf")
    empty = Heatmap("nothing", (), (), ())
    empty.save(tmp_path / "x.svg")
