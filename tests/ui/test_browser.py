"""The page as a person uses it, in a real Chromium; screenshots are kept as artifacts."""

import asyncio
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cmlora.ui.launch import Server, serving
from cmlora.ui.settings import Settings
from tests import disk
from tests.ui.browsing import CHROMIUM, DRIVER, Page, browser, newest

gradio = pytest.importorskip("gradio")
pytest.importorskip("selenium")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason="there is no Chromium here"),
]

SHOTS = Path(os.environ.get("CMLORA_SCREENSHOTS", "demo/screenshots"))


@pytest.fixture(scope="module")
def server(
    model_folder: Path, lora_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    place = tmp_path_factory.mktemp("browser")
    folder = place / "loras"
    shutil.copytree(lora_folder, folder)
    disk.save_lora(folder, "wide", wide=2)  # for another base: it loads nowhere
    (folder / "torn.safetensors").write_bytes((folder / "cat.safetensors").read_bytes()[:900])
    settings = Settings(models=(model_folder,), loras=(folder,), out=place / "out")
    with serving(settings) as running:
        yield running


@pytest.fixture(scope="module")
def chromium(server: Server) -> Iterator[Page]:
    with browser(server.url) as page:
        yield page


@pytest.fixture
def page(chromium: Page) -> Page:
    chromium.size(1440, 1000)
    chromium.open()
    return chromium


def _generate(page: Page) -> str:
    page.click("#generate")
    source = page.picture()
    page.wait(lambda: page.one("#generate").is_enabled())
    return source


def test_three_loras_make_a_picture_with_its_recipe(page: Page, server: Server) -> None:
    page.pick("cat", "hat", "ink")
    page.wait(lambda: page.value("#prompt") == "the cat, the hat, the ink")
    page.wait(lambda: "full" in page.one("#cost").text)
    frame = page.one("#stage .frame").size
    _generate(page)
    assert page.one("#stage .frame").size == frame  # nothing moves while it runs
    words = page.wait(lambda: page.one("#recipe .recipe").text)
    for part in ("the cat, the hat, the ink", "cmlora", "nonuniform", "tiny"):
        assert part in words
    _, recipe = newest(server.studio.settings.out)
    assert [lora.name for lora in recipe.loras] == ["cat", "hat", "ink"]
    assert recipe.method == "cmlora"
    assert page.errors() == []


def test_quick_clicks_come_to_rest(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    """Listeners to the selection do not call each other for ever when their answers overlap."""
    asked: list[float] = []
    process = gradio.Blocks.process_api

    async def recorded(*given: Any, **named: Any) -> Any:
        asked.append(time.monotonic())
        await asyncio.sleep(0.4)
        return await process(*given, **named)

    monkeypatch.setattr(gradio.Blocks, "process_api", recorded)
    page.open()
    page.pick("cat", "hat", "ink")
    page.wait(lambda: asked and time.monotonic() > asked[-1] + 2, seconds=20)
    assert page.value("#prompt") == "the cat, the hat, the ink"
    assert "full" in page.one("#cost").text


def test_stopping_in_mid_run_and_generating_again(page: Page) -> None:
    page.pick("cat", "hat")
    page.fill("#steps input[type=number]", "150")
    page.click("#generate")
    page.wait(lambda: page.one("#stage .stage.busy img"))
    page.click("#stop")
    page.wait(lambda: "Stopped" in page.one("#stage").text, seconds=10)
    page.wait(lambda: page.one("#generate").is_enabled(), seconds=10)
    page.fill("#steps input[type=number]", "3")
    _generate(page)


def test_a_dropped_picture_comes_back(page: Page, server: Server, tmp_path: Path) -> None:
    page.pick("cat")
    page.fill("#steps input[type=number]", "3")
    _generate(page)
    path, _ = newest(server.studio.settings.out)
    dropped = tmp_path / "dropped.png"
    shutil.copy(path, dropped)
    path.unlink()
    page.open()
    page.one("#replay input[type=file]").send_keys(str(dropped))
    page.picture()
    assert "bit for bit" in page.one("#stage .words").text
    assert path.read_bytes() == dropped.read_bytes()


def test_settings_of_a_picture_come_back(page: Page, server: Server) -> None:
    page.click("#reuse")
    page.wait(lambda: "no picture yet" in page.one("#recipe").text)
    page.pick("cat", "hat")
    page.wait(lambda: page.value("#prompt") == "the cat, the hat")
    page.fill("#prompt textarea", "a cat, a hat")
    page.fill('.lora[data-name="hat"] input[type=range]', "0.5")
    page.wait(lambda: "0.5" in page.value("#lora-state"))
    page.fill("#steps input[type=number]", "4")
    page.fill("#seed input", "9")
    _generate(page)
    path, first = newest(server.studio.settings.out)
    page.pick("ink")
    page.wait(lambda: page.value("#prompt").endswith("the ink"))
    page.fill('.lora[data-name="hat"] input[type=range]', "0.8")
    page.wait(lambda: "0.8" in page.value("#lora-state"))
    page.fill("#seed input", "5")
    page.click("#reuse")
    page.wait(lambda: page.value("#prompt") == "a cat, a hat")
    assert json.loads(page.value("#lora-state")) == {"cat": 1, "hat": 0.5}
    page.wait(lambda: page.selected() == ["cat", "hat"], seconds=10)
    page.wait(lambda: page.value('.lora[data-name="hat"] .strength') == "0.5", seconds=10)
    path.unlink()
    _generate(page)
    again, second = newest(server.studio.settings.out)
    assert again == path
    assert second == first
    assert page.errors() == []


def test_a_broken_file_says_what_is_wrong(page: Page) -> None:
    torn = page.one('.lora.broken[data-name="torn"]')
    assert "cut short" in torn.text
    assert "/" not in torn.find_element("css selector", "small").text
    page.pick("wide")
    page.click("#generate")
    words = page.wait(lambda: page.one("#stage .stage.error .words").text)
    assert "wide" in words
    assert "Traceback" not in words


def test_comparing_and_judging_ten_pairs(page: Page, server: Server) -> None:
    page.pick("cat", "hat")
    page.fill("#steps input[type=number]", "2")
    page.click("#to-compare")
    page.wait(lambda: page.one("#compare").is_displayed())
    page.wait(lambda: page.value("#seeds") == "0-1")
    page.click("#compare")
    page.wait(lambda: len(page.all("#board img")) == 10, seconds=120)
    page.wait(lambda: page.one("#wipe .wipe").is_displayed())
    page.wait(lambda: page.one("#compare").is_enabled())
    page.tab("Judge")
    page.wait(lambda: page.value("#run") != "")
    page.click("#begin")
    keys = ["\ue012", "\ue014", "\ue015"]  # left, right, down
    for count in range(10):
        page.wait(lambda: page.one("#vote-left").is_enabled())
        before = page.one("#judge-said").text
        page.press(keys[count % 3])
        page.wait(lambda before=before: page.one("#judge-said").text != before)  # type: ignore[misc]
    assert page.one("#judge-said").text.startswith("10 votes")
    page.click("#standings-show")
    page.wait(lambda: "Bradley-Terry" in page.one("#standings").text)
    (run,) = (server.studio.settings.out / "comparisons").iterdir()
    table = json.loads(page.wait(lambda: (run / "votes.json").read_text()))
    assert {item["method"] for item in table["items"]} <= {
        "naive",
        "merge",
        "switch",
        "composite",
        "cmlora@nonuniform",
    }


def test_every_control_has_a_name_and_keys_reach_it(page: Page) -> None:
    nameless = page.driver.execute_script(
        """
        const named = (e) => e.getAttribute('aria-label') || e.getAttribute('title')
          || e.textContent.trim() || (e.labels && e.labels.length)
          || e.getAttribute('aria-labelledby') || e.getAttribute('placeholder');
        return [...document.querySelectorAll('#rail button, #rail input, #rail textarea, '
            + '#tabs button, #tabs input, #tabs textarea, #tabs select')]
          .filter(e => e.offsetParent !== null && e.type !== 'file' && !named(e))
          .map(e => e.outerHTML.slice(0, 200));
        """
    )
    assert nameless == []
    box = page.one('.lora[data-name="cat"] input[type=checkbox]')
    box.send_keys(" ")
    page.wait(lambda: '"cat"' in page.value("#lora-state"))
    slider = page.one('.lora[data-name="cat"] input[type=range]')
    slider.send_keys("\ue012\ue012")
    page.wait(lambda: '"cat":0.9' in page.value("#lora-state"))
    assert page.driver.switch_to.active_element == slider


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1440, 1000), (390, 844)])
def test_it_fits_both_widths_and_both_themes(
    chromium: Page, width: int, height: int, theme: str
) -> None:
    page = chromium
    page.size(width, height)
    page.open(theme)
    page.pick("cat", "hat", "ink")
    page.fill("#steps input[type=number]", "4")
    _generate(page)
    for name in ("Generate", "Compare", "Understand", "Judge", "Zoo"):
        page.tab(name)
        page.wait(lambda: page.driver.execute_script("return document.readyState") == "complete")
        page.driver.execute_script("window.scrollTo(0, 0)")
        over = page.driver.execute_script(
            "return document.documentElement.scrollWidth - window.innerWidth"
        )
        page.shot(SHOTS / f"{name.lower()}-{width}-{theme}.png")
        assert over <= 1, name  # nothing sticks out to the side
    dark = page.driver.execute_script("return document.body.classList.contains('dark')")
    assert dark == (theme == "dark")
