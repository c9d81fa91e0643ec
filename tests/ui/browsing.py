"""A real headless Chromium that does what a person does on the page."""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from cmlora.recipe import Recipe, from_png

T = TypeVar("T")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver") or shutil.which("chromium-driver")


class Page:
    """The page in a browser.

    Args:
        driver: a selenium driver.
        url: of the server.
    """

    def __init__(self, driver: Any, url: str) -> None:
        self.driver, self.url = driver, url

    def open(self, theme: str = "light") -> None:
        """Load the page afresh."""
        self.driver.get(f"{self.url}?__theme={theme}")
        self.wait(lambda: self.one("#generate").is_enabled())

    def size(self, width: int, height: int) -> None:
        """Make the window as large as a given screen."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def one(self, selector: str) -> Any:
        """The first element of a CSS selector."""
        return self.driver.find_element("css selector", selector)

    def all(self, selector: str) -> list[Any]:
        """Every element of a CSS selector."""
        found: list[Any] = self.driver.find_elements("css selector", selector)
        return found

    def wait(self, condition: Callable[[], T], seconds: float = 60) -> T:
        """The condition's value as soon as it is one; elements may come and go meanwhile."""
        end, last = time.monotonic() + seconds, None
        while time.monotonic() < end:
            try:
                value = condition()
                if value:
                    return value
            except Exception as error:  # stale elements, which the next look finds again
                last = error
            time.sleep(0.1)
        raise AssertionError(f"nothing came of it in {seconds} s ({last})")

    def click(self, selector: str) -> None:
        """Press something once it can be pressed."""

        def press() -> bool:
            element = self.one(selector)
            self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
            if not element.is_enabled():
                return False
            element.click()
            return True

        self.wait(press)

    def tab(self, name: str) -> None:
        """Go to a tab."""
        buttons = [b for b in self.all("#tabs [role=tab]") if b.text.strip() == name]
        if buttons:
            buttons[0].click()
            return
        self.click("#tabs .overflow-menu > button")  # on narrow screens some are in a menu
        menu = [b for b in self.all("#tabs .overflow-dropdown button") if b.text.strip() == name]
        menu[0].click()

    def fill(self, selector: str, text: str) -> None:
        """Replace the text of a field."""
        field = self.one(selector)
        self.driver.execute_script(
            "arguments[0].value = arguments[1];"
            "arguments[0].dispatchEvent(new Event('input', {bubbles: true}));"
            "arguments[0].dispatchEvent(new Event('change', {bubbles: true}));"
            "arguments[0].dispatchEvent(new Event('blur', {bubbles: true}));",
            field,
            text,
        )

    def pick(self, *names: str) -> None:
        """Select LoRAs in the list."""
        for name in names:
            self.click(f'.lora[data-name="{name}"] input[type=checkbox]')
            self.wait(lambda name=name: f'"{name}"' in self.value("#lora-state"))  # type: ignore[misc]

    def selected(self) -> list[Any]:
        """The names of the LoRAs whose boxes are checked."""
        return [row.get_attribute("data-name") for row in self.all(".lora:has(input:checked)")]

    def value(self, holder: str) -> str:
        """The text in the field inside an element."""
        text: str = self.one(f"{holder} textarea, {holder} input").get_attribute("value")
        return text

    def picture(self) -> str:
        """The finished picture on the stage, as a ``data:`` address."""
        source: str = self.wait(
            lambda: self.one("#stage .stage.done img").get_attribute("src"), seconds=240
        )
        return source

    def press(self, key: str) -> None:
        """Press a key while nothing has the focus."""
        self.driver.execute_script("document.activeElement && document.activeElement.blur()")
        self.one("body").send_keys(key)

    def shot(self, path: Path) -> Path:
        """A picture of what is seen."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.driver.save_screenshot(str(path))
        return path

    def errors(self) -> list[str]:
        """What the browser's console says went wrong."""
        return [
            row["message"] for row in self.driver.get_log("browser") if row["level"] == "SEVERE"
        ]


@contextmanager
def browser(url: str) -> Iterator[Page]:
    """A browser on the page, closed at the end."""
    from selenium.webdriver import Chrome
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = str(CHROMIUM)
    for switch in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        "--window-size=1440,1000",
    ):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options=options, service=Service(str(DRIVER)))
    try:
        yield Page(driver, url)
    finally:
        driver.quit()


def newest(folder: Path) -> tuple[Path, Recipe]:
    """The picture that was written last, and its recipe."""
    path = max(folder.glob("*.png"), key=lambda file: file.stat().st_mtime_ns)
    return path, from_png(path)
