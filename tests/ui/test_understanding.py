"""What is foretold is what happens, and measuring changes nothing."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from cmlora.errors import CmloraError
from cmlora.strategies import METHODS
from cmlora.ui import charts
from cmlora.ui.contributions import contributions, overlay
from cmlora.ui.estimates import cost_panel, estimate
from cmlora.ui.jobs import Result, Ticket
from cmlora.ui.studio import Studio
from cmlora.ui.tab_understand import (
    findings_html,
    measured,
    painted_html,
    profiles_html,
    timeline_html,
)
from cmlora.ui.understanding import profiles, timeline
from tests.ui.working import made, order

_OPTIONS = {"lorahub": {"coefficients": "1,0.5"}}


def _order(method: str, **more: object) -> object:
    return order(method=method, options=_OPTIONS.get(method, {}), **more)


@pytest.mark.parametrize("method", ["naive", "switch", "cmlora", "lorahub"])
def test_foretold_passes_are_the_ones_that_run(warm: Studio, method: str) -> None:
    wanted = _order(method, steps=6)
    found = timeline(warm, wanted)  # type: ignore[arg-type]
    expected = estimate(warm, wanted)  # type: ignore[arg-type]
    (picture,) = made(warm, method=method, options=_OPTIONS.get(method, {}), steps=6)
    full, light = sum(picture.report.full.values()), sum(picture.report.light.values())
    assert (found.full, found.light) == (full, light)
    assert (expected.full, expected.light) == (full, light)
    assert expected.macs == picture.macs
    if method not in ("naive", "lorahub"):
        mean = {n: sum(v) / found.steps for n, v in found.strengths.items()}
        assert all(value > 0 for value in mean.values())


def test_every_method_has_a_timeline(warm: Studio) -> None:
    for method in METHODS:
        page = timeline_html(warm, _order(method))  # type: ignore[arg-type]
        assert page.count("<svg") >= 1, method


def test_the_pace_of_a_picture_gives_the_next_ones_seconds(studio: Studio) -> None:
    assert estimate(studio, order()).seconds is None
    (picture,) = made(studio)
    found = estimate(studio, order())
    assert found.seconds == pytest.approx(picture.report.seconds)
    assert found.bytes is not None
    place = studio.model_place("tiny")
    assert isinstance(place, Path)
    assert found.bytes > sum(path.stat().st_size for path in place.rglob("*.safetensors"))
    page = cost_panel(studio, order(pictures=3))
    assert "for all" in page
    assert "No LoRA is selected" in cost_panel(studio, order(loras={}))


@pytest.mark.parametrize("method", ["merge", "cmlora", "select"])
def test_measuring_changes_no_bit_of_the_picture(warm: Studio, method: str) -> None:
    (plain,) = made(warm, method=method, steps=4)
    pixels = Image.open(plain.path).tobytes()
    (event,) = [
        e
        for e in contributions(warm, order(method=method, steps=4), Ticket())
        if isinstance(e, Result)
    ]
    found = event.value
    assert Image.open(found.picture.path).tobytes() == pixels
    assert found.names == ("cat", "hat")
    assert all(len(values) == 4 for values in found.sizes.values())
    total = sum(found.maps.values())
    assert torch.allclose(total, torch.ones_like(total))
    assert sum(found.shares().values()) == pytest.approx(1)
    page = painted_html(found)
    assert page.count("<img") == 3


def test_curves_of_strength_are_foretold_and_carried_out(warm: Studio) -> None:
    curved = order(method="merge", steps=4, schedule="<lora:cat:0@0,1@1>")
    found = timeline(warm, curved)
    assert found.strengths["cat"][0] == 0.0
    assert list(found.strengths["cat"]) == sorted(set(found.strengths["cat"]))
    assert set(found.strengths["hat"]) == {0.8}
    (event,) = [e for e in contributions(warm, curved, Ticket()) if isinstance(e, Result)]
    assert event.value.sizes["cat"][0] == 0.0
    assert event.value.sizes["cat"][3] > 0.0
    (scheduled,) = made(warm, method="merge", steps=4, schedule="<lora:cat:0@0,1@1>")
    (plain,) = made(warm, method="merge", steps=4)
    assert scheduled.recipe.schedule
    assert Image.open(scheduled.path).tobytes() != Image.open(plain.path).tobytes()
    assert Image.open(event.value.picture.path).tobytes() == Image.open(scheduled.path).tobytes()


def test_a_lora_without_strength_painted_nothing(warm: Studio) -> None:
    wanted = order(loras={"cat": 1.0, "hat": 0.0}, method="composite")
    (event,) = [e for e in contributions(warm, wanted, Ticket()) if isinstance(e, Result)]
    found = event.value
    assert not found.maps["hat"].any()
    assert set(found.sizes["hat"]) == {0.0}
    assert found.shares() == {"cat": 1.0, "hat": 0.0}
    assert "Hardly any effect: hat" in painted_html(found)


def test_the_overlay_colours_what_was_painted() -> None:
    picture = Image.new("RGB", (8, 8), "white")
    share = torch.zeros(4, 4)
    share[:, :2] = 1
    image = overlay(picture, share, (255, 0, 0))
    left, right = image.getpixel((0, 4)), image.getpixel((7, 4))
    assert left[0] > 1.5 * left[1]  # type: ignore[index]
    assert right[0] == right[1]  # type: ignore[index]


def test_profiles_are_measured_kept_and_used(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cmlora.ui.tab_understand._PROFILE_STEPS", 3)
    assert profiles(studio, order()) == {}
    assert "No profile" in profiles_html(studio, order())
    before = set(studio.settings.loras[0].iterdir())
    list(measured(studio, order(), Ticket()))
    found = profiles(studio, order())
    assert set(found) == {"cat", "hat"}
    assert profiles_html(studio, order()).count("<svg") == 2
    (picture,) = made(studio)
    for lora in picture.recipe.loras:
        assert lora.frequency == pytest.approx(found[lora.name].frequency)
    assert set(studio.settings.loras[0].iterdir()) == before  # nothing is written there


def test_the_doctor_reads_the_selected_files(warm: Studio, tmp_path: Path) -> None:
    page = findings_html(warm, order())
    assert "cat / hat" in page
    with pytest.raises(CmloraError, match="no LoRA is selected"):
        findings_html(warm, order(loras={}))
    folder = tmp_path / "own"
    folder.mkdir()
    shutil.copy(warm.settings.loras[0] / "cat.safetensors", folder / "cat.safetensors")
    (folder / "torn.safetensors").write_bytes(b"torn")
    broken = Studio(replace(warm.settings, loras=(folder,)))
    with pytest.raises(CmloraError, match=r"^torn.safetensors") as mistake:
        findings_html(broken, order(loras={"cat": 1.0, "torn": 1.0}))
    assert str(tmp_path) not in str(mistake.value)


def test_curves_stay_inside_their_drawing() -> None:
    drawing = charts.lines({"a<b": [0.0, 3.0, 1e9], "c": [1.0]}, 'say "hi"')
    points = drawing.split('points="')[1].split('"')[0].split()
    for point in points:
        x, y = map(float, point.split(","))
        assert 0 <= x <= 720
        assert 0 <= y <= 180
    assert "a&lt;b" in drawing
    assert "&quot;hi&quot;" in drawing
