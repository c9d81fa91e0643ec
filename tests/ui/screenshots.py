"""The README's pictures of the page: ``python -m tests.ui.screenshots FOLDER``.

Needs the embedded weights and Chromium. It also says how long the first picture took, counted from
the command ``python -m cmlora.ui`` to the finished picture in the browser.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from cmlora.ui.launch import serving
from cmlora.ui.settings import Settings
from tests.ui.browsing import Page, browser

LORAS = ("character_1", "clothing_1", "object_1")


def first_picture() -> float:
    """Seconds from the command to the first picture in the browser."""
    with tempfile.TemporaryDirectory() as place:
        started = time.monotonic()
        command = [sys.executable, "-m", "cmlora.ui", "--out", place, "--no-browser"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            with browser(server.stdout.readline().strip()) as page:
                page.open()
                page.pick(*LORAS)
                page.click("#generate")
                page.picture()
                return time.monotonic() - started
        finally:
            server.terminate()
            server.wait()


def main(folder: Path) -> None:
    """Make four pictures: a picture, a comparison, who painted what, and a phone in the dark."""
    with tempfile.TemporaryDirectory() as place:
        settings = Settings(out=Path(place))
        with serving(settings) as server, browser(server.url) as page:
            page.size(1440, 1080)
            page.open("light")
            page.pick(*LORAS)
            page.fill("#seed input", "7")
            page.click("#generate")
            page.picture()
            page.wait(lambda: page.one("#generate").is_enabled())
            _keep(page, folder / "generate.png")

            page.click("#to-compare")
            page.wait(lambda: page.one("#compare").is_displayed())
            page.click("#compare")
            page.wait(lambda: len(page.all("#board img")) == 10, seconds=600)
            page.wait(lambda: page.one("#compare").is_enabled())
            _keep(page, folder / "compare.png")

            page.tab("Understand")
            page.click("#witness")
            page.wait(lambda: len(page.all("#painted img")) == 4, seconds=300)
            page.driver.execute_script("document.querySelector('#painted').scrollIntoView()")
            _keep(page, folder / "understand.png", scroll=False)

            page.size(390, 844)
            page.open("dark")
            page.pick(*LORAS)
            page.click("#generate")
            page.picture()
            page.driver.execute_script("document.querySelector('#stage').scrollIntoView()")
            _keep(page, folder / "phone.png", scroll=False)


def _keep(page: Page, path: Path, *, scroll: bool = True) -> None:
    if scroll:
        page.driver.execute_script("window.scrollTo(0, 0)")
    page.shot(path)
    with Image.open(path) as image:
        image.convert("RGB").quantize(128).save(path, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "screenshots"))
    print(f"first picture after {first_picture():.1f} s")
