"""What the Zoo asks the model, or keeps in files of its own, is what the library makes."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from cmlora.adapters.analysis.library import survey
from cmlora.adapters.calibration import load
from cmlora.adapters.merging import merge as combine
from cmlora.errors import CmloraError
from cmlora.files import read
from cmlora.ui import calibrations, learned, packs, pairs, zoo_measure, zoo_survey
from cmlora.ui.baking import bake
from cmlora.ui.jobs import Event, Progress, Result, Stopped, Ticket
from cmlora.ui.learned import Task, learn
from cmlora.ui.pairs import Alignment, align
from cmlora.ui.settings import Settings
from cmlora.ui.studio import Studio
from cmlora.ui.surveys import Survey, look_over
from cmlora.ui.workbench import merge
from cmlora.ui.writing import Made
from cmlora.ui.zoo_merge import needs
from tests.ui import attacks
from tests.ui.working import made

BOTH = {"cat": 1.0, "hat": 0.5}


def _result(events: Iterator[Event]) -> Made:
    """The file that a piece of work ends with; it has told its progress before."""
    told = list(events)
    assert any(isinstance(event, Progress) for event in told)
    (made_,) = [event.value for event in told if isinstance(event, Result)]
    assert isinstance(made_, Made)
    return made_


@pytest.fixture(scope="module")
def measured(warm: Studio) -> Made:
    """Calibration data of two LoRAs in the store."""
    return _result(calibrations.calibrate(warm, "tiny", BOTH, Ticket(), steps=2))


def test_merges_that_need_calibration_data_get_them_from_the_store(
    warm: Studio, measured: Made
) -> None:
    assert list(calibrations.shelf(warm).listing()) == [measured.name]
    assert needs(warm, "tiny", "pleas", BOTH).startswith("pleas needs calibration data")
    assert needs(warm, "tiny", "pleas", BOTH, measured.name) == ""
    assert "knows nothing of ink" in needs(
        warm, "tiny", "pleas", {"cat": 1.0, "ink": 1.0}, measured.name
    )
    done = merge(warm, "tiny", BOTH, "pleas", calib=measured.name)

    data = load(measured.path)
    loras = [read(warm.lora_path(name, "tiny")) for name in BOTH]
    grams = {lora.name: data.grams(name) for lora, name in zip(loras, BOTH, strict=True)}
    expected = combine(loras, list(BOTH.values()), "pleas", grams=grams).lora
    found = read(done.path)
    assert found.updates.keys() == expected.updates.keys()
    for module, update in found.updates.items():
        torch.testing.assert_close(update.delta(), expected.updates[module].delta())


def test_calibration_data_about_other_loras_are_refused(warm: Studio, measured: Made) -> None:
    with pytest.raises(CmloraError, match="knows nothing of ink"):
        merge(warm, "tiny", {"cat": 1.0, "ink": 1.0}, "pleas", calib=measured.name)
    with pytest.raises(CmloraError, match="no LoRA is selected"):
        calibrations.calibrate(warm, "tiny", {}, Ticket())
    with pytest.raises(CmloraError, match="steps"):
        calibrations.calibrate(warm, "tiny", BOTH, Ticket(), steps=10**6)


def test_safe_strengths_come_from_the_store(warm: Studio, measured: Made) -> None:
    found = calibrations.safe_strengths(warm, "tiny", BOTH, measured.name)
    assert {row.name for row in found} >= set(BOTH)
    page = zoo_measure.strengths_html(found)
    assert all(row.where in page for row in found)


@pytest.mark.parametrize("name", attacks.FORMS)
def test_no_name_of_a_kept_file_leads_out_of_its_folder(studio: Studio, name: str) -> None:
    attempts = (
        lambda: calibrations.uncovered(studio, "tiny", BOTH, name),
        lambda: calibrations.grams(studio, "tiny", BOTH, name),
        lambda: packs.names_in(studio, name),
        lambda: packs.unpack(studio, name),
    )
    for attempt in attempts:
        with pytest.raises(CmloraError, match="there is no"):
            attempt()
    assert not studio.settings.out.exists()


def test_a_learned_merge_is_written_with_what_it_is_worth(warm: Studio) -> None:
    task = Task(questions=1, control=False)
    done = _result(
        learn(warm, "tiny", BOTH, "atlas", task, Ticket(), name="both", options={"steps": "2"})
    )
    recipe = json.loads(read(done.path).metadata["cmlora.merge"])
    assert (recipe["method"], recipe["model"], recipe["objective"]) == ("atlas", "tiny", "distill")
    assert done.name == "both"
    assert "loss of what was learnt" in done.facts
    assert {"distance from the exact sum", "rank"} <= done.facts.keys()
    assert "loss of the same method on random LoRAs" not in done.facts


def test_the_names_of_learned_merges_are_those_there_are() -> None:
    from cmlora.pipelines.learning import LEARNED

    assert tuple(LEARNED) == learned.NAMES


@pytest.mark.parametrize(
    ("method", "loras", "task", "words"),
    [
        ("atlas", {"cat": 1.0}, Task(), "two or more"),
        ("atlas", BOTH, Task("clip_score"), "choose lorahub"),
        ("atlas", BOTH, Task("denoise_mse"), "add the pictures"),
        ("atlas", BOTH, Task("magic"), "objective"),
        ("magic", BOTH, Task(), "method"),
        ("atlas", BOTH, Task(questions=10**6), "questions"),
        ("atlas", BOTH, Task("denoise_mse", pictures=[Path("no.png")]), "no picture"),
        ("atlas", BOTH, Task("denoise_mse", pictures=[Path("a.png")] * 99), "at most"),
    ],
)
def test_what_a_learned_merge_lacks_is_said(
    warm: Studio, method: str, loras: dict[str, float], task: Task, words: str
) -> None:
    with pytest.raises(CmloraError, match=words):
        learn(warm, "tiny", loras, method, task, Ticket())


def test_pictures_to_learn_from_are_bounded(warm: Studio, tmp_path: Path) -> None:
    Image.new("L", (5000, 2)).save(tmp_path / "wide.png")
    task = Task("denoise_mse", pictures=[tmp_path / "wide.png"])
    with pytest.raises(CmloraError, match=r"wide.png is larger than"):
        learn(warm, "tiny", BOTH, "atlas", task, Ticket())


@pytest.mark.slow
def test_learning_too_long_is_refused_and_can_be_stopped(warm: Studio) -> None:
    task = Task(questions=1, control=False)
    with pytest.raises(CmloraError, match="between 1 and"):
        list(learn(warm, "tiny", BOTH, "atlas", task, Ticket(), options={"steps": "99999"}))
    ticket = Ticket()
    events = learn(warm, "tiny", BOTH, "atlas", task, ticket, options={"steps": "1000"})
    words = ""
    while words != "learning":
        event = next(events)
        words = event.words if isinstance(event, Progress) else words
    ticket.stop()
    with pytest.raises(Stopped):
        list(events)
    assert made(warm)  # and the model still works


@pytest.mark.slow
def test_a_picture_is_baked_into_one_lora(warm: Studio) -> None:
    (picture,) = made(warm, method="composite")
    done = _result(bake(warm, picture.path, "tiny", Ticket(), fit="none", rank=1))
    lora = read(done.path)
    assert max(update.rank for update in lora.updates.values()) == 1
    assert json.loads(lora.metadata["cmlora.baked"])["method"] == "composite"
    assert done.name == "composite_cat_hat"
    (naive,) = made(warm, loras={}, method="naive")
    for bad, words in ((naive.path, "without a LoRA"), (Path("none.png"), "none.png")):
        with pytest.raises(CmloraError, match=words):
            bake(warm, bad, "tiny", Ticket())


def test_packing_and_unpacking_lose_what_is_said(warm: Studio) -> None:
    three = {"cat": 1.0, "hat": 1.0, "ink": 1.0}
    packed = packs.pack(warm, "tiny", three, size=1, name="../three of them")
    assert packed.path.parent == warm.settings.out / "packs"
    assert packs.names_in(warm, packed.name) == ("cat", "hat", "ink")
    (one,) = packs.unpack(warm, packed.name, ["hat"])
    original, again = read(warm.lora_path("hat", "tiny")), read(one.path)
    away = whole = 0.0
    for module, update in original.updates.items():
        away += float((again.updates[module].delta() - update.delta()).square().sum())
        whole += float(update.delta().square().sum())
    assert packed.facts["lost of hat"] == f"{(away / whole) ** 0.5:.2%}"
    assert len(packs.unpack(warm, packed.name)) == 3
    for act, words in (
        (lambda: packs.pack(warm, "tiny", {"cat": 1.0}), "two or more"),
        (lambda: packs.pack(warm, "tiny", three, size=9), "size"),
        (lambda: packs.pack(warm, "tiny", three, granularity="all"), "granularity"),
        (lambda: packs.unpack(warm, packed.name, ["dog"]), "no LoRA in this pack"),
    ):
        with pytest.raises(CmloraError, match=words):
            act()


@pytest.mark.parametrize("on_model", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_loras_are_compared(warm: Studio, on_model: bool) -> None:
    events = align(warm, "tiny", BOTH, Ticket(), on_model=on_model)
    (event,) = [event for event in events if isinstance(event, Result)]
    found: Alignment = event.value
    assert found.names == ("cat", "hat")
    assert (found.hill is not None) == on_model
    page = zoo_measure.alignment_html(found)
    assert all(block in page for block in found.likeness.blocks)
    assert ("Barrier" in page) == on_model
    with pytest.raises(CmloraError, match="exactly two"):
        align(warm, "tiny", {"cat": 1.0}, Ticket())
    assert pairs.missing(2) == ""


def test_a_shelf_is_looked_over_and_what_does_not_fit_is_named(
    model_folder: Path, lora_folder: Path, tmp_path: Path
) -> None:
    shelf = tmp_path / "shelf"
    shutil.copytree(lora_folder, shelf)
    shutil.copy(shelf / "cat.safetensors", shelf / "kitten.safetensors")
    (shelf / "torn.safetensors").write_bytes(b"torn")
    studio = Studio(Settings(models=(model_folder,), loras=(shelf,), out=tmp_path / "out"))
    (event,) = [e for e in look_over(studio, "tiny", Ticket()) if isinstance(e, Result)]
    found: Survey = event.value
    paths = [path for path in sorted(shelf.glob("*.safetensors")) if path.stem != "torn"]
    expected = survey([replace(read(path), name=path.stem) for path in paths])
    assert found.library.names == expected.names
    assert torch.equal(found.library.similarity, expected.similarity)
    assert found.library.duplicates == (("cat", "kitten"),)
    assert list(found.left_out) == ["torn"]
    assert str(shelf) not in found.left_out["torn"]
    page = zoo_survey.survey_html(found)
    assert "cat and kitten are one LoRA." in page
    assert "torn was left out" in page
    assert all(f"<td>{name}</td>" in page for name in expected.names)
    empty = Studio(Settings(models=(model_folder,), out=tmp_path / "out"))
    with pytest.raises(CmloraError, match="0 LoRAs"):
        look_over(empty, "tiny", Ticket())
