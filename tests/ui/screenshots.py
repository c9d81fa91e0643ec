"""Pictures of the page with real pictures in it: ``python -m tests.ui.screenshots FOLDER``.

Every tab at both widths and in both themes goes into FOLDER; with ``--readme DOCS`` the README's
four of them go into DOCS as well, small enough to be fetched. Needs the embedded weights and
Chromium. How long the first picture takes is measured by ``benchmarks/ui_start.py``.
"""

import argparse
import tempfile
import time
from pathlib import Path

from PIL import Image

from cmlora.ui.launch import serving
from cmlora.ui.settings import Settings
from tests.ui.browsing import Page, browser

LORAS = ("character_1", "clothing_1", "object_1")
SCREENS = {"1440": (1440, 1080), "390": (390, 844)}
README = {
    "generate.png": "generate-1440-light",
    "compare.png": "compare-1440-light",
    "understand.png": "understand-1440-dark",
    "phone.png": "generate-390-dark",
}


def main(folder: Path, docs: Path | None, steps: int) -> None:
    """Use every tab as a person would and keep what is seen.

    Args:
        folder: for all pictures.
        docs: for the README's; nothing if not given.
        steps: of every picture.
    """
    with (
        tempfile.TemporaryDirectory() as place,
        serving(Settings(out=Path(place))) as server,
        browser(server.url) as page,
    ):
        _generate(page, folder, steps)
        _compare(page, folder)
        _understand(page, folder)
        _judge(page, folder)
        _zoo(page, folder)
    for name, source in README.items() if docs is not None else ():
        assert docs is not None
        with Image.open(folder / f"{source}.png") as image:
            image.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(
                docs / name, optimize=True
            )


def _generate(page: Page, folder: Path, steps: int) -> None:
    page.size(*SCREENS["1440"])
    page.open("light")
    page.pick(*LORAS)
    page.fill("#steps input[type=number]", str(steps))
    for seed in ("3", "7"):
        page.fill("#seed input", seed)
        page.click("#generate")
        page.wait(lambda: page.one("#stage .stage.busy"))
        page.picture()
        page.wait(lambda: page.one("#generate").is_enabled())
    page.wait(lambda: len(page.all("#gallery img")) == 2)
    _shots(page, folder, "generate", "#stage")


def _compare(page: Page, folder: Path) -> None:
    page.click("#to-compare")
    page.wait(lambda: page.one("#compare").is_displayed())
    page.click("#compare")
    page.wait(lambda: len(page.all("#board img")) == 10, seconds=900)
    page.wait(lambda: page.one("#compare").is_enabled())
    _shots(page, folder, "compare", "#board")


def _understand(page: Page, folder: Path) -> None:
    page.tab("Understand")
    page.click("#witness")
    page.wait(lambda: len(page.all("#painted img")) == 4, seconds=600)
    _shots(page, folder, "plan", "#timeline")
    _shots(page, folder, "understand", "#painted", everywhere=True)


def _judge(page: Page, folder: Path) -> None:
    page.tab("Judge")
    page.wait(lambda: page.value("#run") != "")
    page.click("#begin")
    page.wait(lambda: len(page.all("#duel img")) == 2)
    _shots(page, folder, "judge", "#duel")


def _zoo(page: Page, folder: Path) -> None:
    page.tab("Zoo")
    page.click("#merge")
    page.wait(lambda: page.one("#merged table"), seconds=300)
    _shots(page, folder, "zoo", "#merge-note")
    _shots(page, folder, "zoo-below", "#calibrate", everywhere=True)


def _shots(page: Page, folder: Path, name: str, place: str, *, everywhere: bool = False) -> None:
    """What is seen at both widths and in both themes; on the narrow one from ``place`` on."""
    for screen, (width, height) in SCREENS.items():
        page.size(width, height)
        narrow = screen == "390"
        for theme in ("light", "dark"):
            if (theme == "dark") != page.driver.execute_script(_DARK):
                page.driver.execute_script("document.querySelector('[data-act=theme]').click()")
            target = f"document.querySelector('{place}').getBoundingClientRect().top"
            top = f"scrollY + {target} - 90" if narrow or everywhere else "0"
            page.driver.execute_script(f"window.scrollTo(0, {top})")
            time.sleep(0.5)  # until everything is painted
            page.shot(folder / f"{name}-{screen}-{theme}.png")
    page.size(*SCREENS["1440"])


_DARK = "return document.body.classList.contains('dark')"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="pictures of the page")
    parser.add_argument("folder", type=Path, nargs="?", default=Path("demo/screenshots"))
    parser.add_argument("--readme", type=Path, metavar="DOCS")
    parser.add_argument("--steps", type=int, default=30)
    given = parser.parse_args()
    main(given.folder, given.readme, given.steps)
