"""Scorers against independent computations, and scoring that never does a thing twice."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cmlora.errors import CmloraError
from cmlora.eval.metrics import METRICS
from cmlora.eval.scorers import SCORERS
from cmlora.eval.scorers.sanity import facts
from cmlora.eval.scorers.scorer import Item, Marks
from cmlora.eval.scoring import item_of, latest, listed, make_scorer, score, scores
from cmlora.eval.study import Study
from cmlora.eval.testbeds import find_testbed
from tests.eval import beds, models


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save_clip(tmp_path_factory.mktemp("judges") / "clip")


@pytest.fixture
def study(whole: Path, tmp_path: Path) -> Study:
    """A copy, for scores of its own."""
    return Study(shutil.copytree(whole, tmp_path / "run"))


def items(study: Study) -> list[Item]:
    return [item_of(study, study.manifest, record) for record in study.records().values()]


def test_clip_score_is_an_independent_loop(study: Study, clip: Path) -> None:
    """One picture and one text at a time, with open_clip's own calls."""
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{clip}")
    tokenize = open_clip.get_tokenizer(f"local-dir:{clip}")
    model.eval()
    marks = make_scorer("clip_score", study.manifest, model=str(clip))(items(study))
    whole = make_scorer("clip_concepts", study.manifest, model=str(clip))(items(study))
    for item, mark, per_concept in zip(items(study), marks, whole, strict=True):
        with torch.no_grad(), Image.open(item.path) as file:
            seen = model.encode_image(preprocess(file.convert("RGB"))[None])[0].double()

            def cosine(text: str, seen: torch.Tensor = seen) -> float:
                said = model.encode_text(tokenize([text]))[0].double()
                return float(100 * seen @ said / (seen.norm() * said.norm()))

            assert mark.values["clip_score"] == pytest.approx(cosine(", ".join(item.ids)), abs=1e-4)
            each = {id_: cosine(id_) for id_ in item.ids}
        for id_, expected in each.items():
            assert per_concept.concepts[id_]["clip"] == pytest.approx(expected, abs=1e-4)
        assert per_concept.values["clip_worst"] == pytest.approx(min(each.values()), abs=1e-4)
        mean = float(np.mean(list(each.values())))
        assert per_concept.values["clip_concepts"] == pytest.approx(mean, abs=1e-4)


def test_clip_score_can_use_the_whole_prompt(study: Study, clip: Path) -> None:
    from dataclasses import replace

    other = replace(study.manifest, clip_text="prompt", prompt="a drawing of {triggers}")
    one = items(study)[0]
    changed = replace(one, manifest=other)
    short = make_scorer("clip_score", study.manifest, model=str(clip))
    long = make_scorer("clip_score", other, model=str(clip))
    assert short.version != long.version
    assert short([one])[0].values != long([changed])[0].values


def test_marks_do_not_depend_on_the_batch(study: Study, clip: Path) -> None:
    judge = make_scorer("clip_score", study.manifest, model=str(clip))
    together = [m.values["clip_score"] for m in judge(items(study))]
    alone = [judge([item])[0].values["clip_score"] for item in items(study)]
    assert together == pytest.approx(alone, abs=1e-4)


def test_likeness_and_preference_are_plain_cosines(
    study: Study, clip: Path, tmp_path: Path
) -> None:
    from transformers import AutoImageProcessor, AutoModel, CLIPModel, CLIPProcessor

    references = tmp_path / "references"
    for place, id_ in enumerate(beds.CATEGORIES):
        (references / id_).mkdir(parents=True)
        for number in range(2):
            colour = (40 * place, 90 * number, 120)
            Image.new("RGB", (40, 32), colour).save(references / id_ / f"{number}.png")
    dino = models.save_vision(tmp_path / "dino")
    judge = make_scorer("dino_image", study.manifest, model=str(dino), references=str(references))
    network, processor = AutoModel.from_pretrained(dino), AutoImageProcessor.from_pretrained(dino)

    def feature(picture: Image.Image) -> Any:
        with torch.no_grad():
            token = network(**processor(images=picture, return_tensors="pt")).last_hidden_state
        vector = token[0, 0].double().numpy()
        return vector / np.linalg.norm(vector)

    one = items(study)[5]
    for id_ in one.ids:
        shown = [Image.open(p) for p in sorted((references / id_).glob("*.png"))]
        expected = np.mean([100 * feature(one.image()) @ feature(p) for p in shown])
        assert judge([one])[0].concepts[id_]["dino_image"] == pytest.approx(expected, abs=1e-3)
    by_clip = make_scorer("clip_image", study.manifest, model=str(clip), references=str(references))
    assert by_clip([one])[0].values["clip_image"] != judge([one])[0].values["dino_image"]

    dual = models.save_dual_encoder(tmp_path / "dual")
    picked = make_scorer("pick_score", study.manifest, model=str(dual))(items(study)[:3])
    model, both = CLIPModel.from_pretrained(dual), CLIPProcessor.from_pretrained(dual)
    for item, mark in zip(items(study)[:3], picked, strict=True):
        values = both(text=[item.prompt], images=[item.image()], return_tensors="pt")
        with torch.no_grad():
            expected = float(model(**values).logits_per_image)
        assert mark.values["pick_score"] == pytest.approx(expected, abs=1e-4)


def test_aesthetic_is_a_label(study: Study, tmp_path: Path) -> None:
    folder = models.save_vision(tmp_path / "judge", {0: "ugly", 1: "fine"})
    nice = make_scorer("aesthetic", study.manifest, model=str(folder), label="fine")
    ugly = make_scorer("aesthetic", study.manifest, model=str(folder), label="ugly")
    one = items(study)[:1]
    shares = [judge(one)[0].values["aesthetic"] for judge in (nice, ugly)]
    assert sum(shares) == pytest.approx(1)
    with pytest.raises(CmloraError, match="no label 'aesthetic'; it has ugly, fine"):
        make_scorer("aesthetic", study.manifest, model=str(folder))


def test_facts_about_pixels() -> None:
    grey = facts(Image.new("RGB", (8, 8), (100, 100, 100)))
    assert (grey["sharpness"], grey["saturation"], grey["clipped"]) == (0, 0, 0)
    assert grey["contrast"] == pytest.approx(0, abs=1e-12)
    assert facts(Image.new("RGB", (8, 8), (255, 0, 0)))["saturation"] == 1
    assert facts(Image.new("RGB", (8, 8), (255, 0, 0)))["clipped"] == 1
    board = np.indices((8, 8)).sum(0)[..., None] % 2 * np.full(3, 255)
    assert facts(Image.fromarray(board.astype(np.uint8)))["sharpness"] == pytest.approx(4)


MISSING: list[tuple[str, dict[str, Any], str]] = [
    ("clip_score", {"model": "ViT-B-99"}, "knows no architecture 'ViT-B-99'"),
    ("clip_score", {"pretrained": "weights.pt", "model": "ViT-B-32"}, "pickles can run code"),
    ("pick_score", {"model": "/no/such/folder"}, "hf download /no/such/folder"),
    ("dino_image", {"references": "/no/such"}, "reference pictures /no/such does not exist"),
    ("clip_image", {}, "similarity needs reference pictures"),
    ("aesthetic", {}, "--set aesthetic.model="),
    ("clip_score", {"modle": "x"}, "has no option 'modle'; did you mean model?"),
    ("clip_scor", {}, "did you mean clip_score"),
    ("probe", {}, "embedded world only, not 'ann'"),
    ("fidelity", {}, "embedded world only"),
]


@pytest.mark.parametrize(("name", "options", "message"), MISSING)
def test_what_is_missing_is_said(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(CmloraError) as caught:
        make_scorer(name, beds.manifest(), **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_scores_are_kept_and_never_made_again(
    study: Study, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert score(study, "clip_score", options={"model": str(clip)}) == 16
    before = latest(study)
    assert score(study, "clip_score", options={"model": str(clip)}) == 0
    assert latest(study) == before
    assert {s.version for s in before} == {before[0].version}
    assert before[0].version.startswith("open_clip")
    other = models.save_clip(study.folder / "other", seed=1)
    assert score(study, "clip_score", options={"model": str(other)}) == 16
    assert len(scores(study)) == 32
    assert len(latest(study)) == 16
    assert latest(study)[0].version != before[0].version
    assert latest(study, {"clip_score": before[0].version}) == before


def test_scoring_goes_on_where_it_was_stopped(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cmlora.eval import scoring

    real = SCORERS["sanity"].object
    seen: list[Item] = []

    class Stopping:
        version = "1"

        def __init__(self, *_: Any) -> None:
            self.inner = real(None)

        def __call__(self, some: Sequence[Item]) -> list[Marks]:
            if len(seen) >= 8:
                raise KeyboardInterrupt
            seen.extend(some)
            return self.inner(some)

    monkeypatch.setattr(scoring, "BATCH", 4)
    with monkeypatch.context() as patched:
        patched.setattr(scoring, "make_scorer", lambda *_, **__: Stopping())
        with pytest.raises(KeyboardInterrupt):
            score(study, "sanity")
    assert len(scores(study)) == 8
    assert score(study, "sanity") == 8
    assert len({s.image for s in scores(study)}) == 16


def test_costs_are_the_recorded_ones(study: Study) -> None:
    score(study, "cost")
    records = study.records()
    for found in latest(study):
        record = records[found.key]
        assert found.values["seconds"] == record.seconds
        assert record.macs is not None
        assert found.values["gmacs"] == pytest.approx(record.macs / 1e9)


def test_every_scorer_is_in_a_file_and_its_numbers_have_titles() -> None:
    assert listed(["cost", "sanity", "cost"]) == ("cost", "sanity")
    for name in ("clip_score", "clip_concepts", "clip_worst", "instances", "fidelity", "gmacs"):
        assert METRICS[name].title
    assert find_testbed("emoji").model == "emoji"
