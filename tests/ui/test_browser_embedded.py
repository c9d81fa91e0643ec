"""The page with the embedded model: what a first visitor does, from three LoRAs to ten votes."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from cmlora.emoji import weights
from cmlora.ui.launch import Server, serving
from cmlora.ui.settings import Settings
from tests.ui.browsing import CHROMIUM, DRIVER, Page, browser, newest

pytest.importorskip("gradio")
pytest.importorskip("selenium")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason="there is no Chromium here"),
    pytest.mark.skipif(not weights.available(), reason="the embedded weights are not here"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(Settings(out=tmp_path_factory.mktemp("embedded") / "out")) as running:
        yield running


def test_a_first_visit(server: Server, tmp_path: Path) -> None:
    with browser(server.url) as page:
        page.open()
        page.pick("character_1", "clothing_1", "object_1")
        page.wait(
            lambda: (
                page.value("#prompt") == "zorbo, brown bird, krayo, golden hat, pynta, yellow fruit"
            )
        )
        _stopped_and_made(page)
        path, recipe = newest(server.studio.settings.out)
        assert (recipe.model, recipe.method) == ("emoji", "cmlora")
        assert [lora.name for lora in recipe.loras] == ["character_1", "clothing_1", "object_1"]
        assert "nonuniform" in page.one("#recipe .recipe").text

        dropped = tmp_path / "dropped.png"
        shutil.copy(path, dropped)
        path.unlink()
        page.one("#replay input[type=file]").send_keys(str(dropped))
        page.wait(lambda: "bit for bit" in page.one("#stage .words").text, seconds=240)
        assert path.read_bytes() == dropped.read_bytes()

        page.fill("#steps input[type=number]", "2")
        page.click("#to-compare")
        page.click("#compare")
        page.wait(lambda: len(page.all("#board img")) == 10, seconds=240)
        assert "CLIP" in page.one("#board figcaption").text  # the embedded world scores itself
        _ten_votes(page)


def _stopped_and_made(page: Page) -> None:
    page.fill("#steps input[type=number]", "150")
    page.click("#generate")
    page.wait(lambda: page.one("#stage .stage.busy img"), seconds=240)
    page.click("#stop")
    page.wait(lambda: "Stopped" in page.one("#stage").text)
    page.wait(lambda: page.one("#generate").is_enabled())
    page.fill("#steps input[type=number]", "4")
    page.click("#generate")
    page.picture()
    page.wait(lambda: page.one("#generate").is_enabled())


def _ten_votes(page: Page) -> None:
    page.wait(lambda: page.one("#compare").is_enabled())
    page.tab("Judge")
    page.wait(lambda: page.value("#run") != "")
    page.click("#begin")
    for _ in range(10):
        page.wait(lambda: page.one("#vote-left").is_enabled())
        before = page.one("#judge-said").text
        page.press("\ue012")  # the left arrow
        page.wait(lambda before=before: page.one("#judge-said").text != before)  # type: ignore[misc]
    assert page.one("#judge-said").text.startswith("10 votes")
