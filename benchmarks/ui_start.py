"""How long it takes from ``cmlora ui`` to the first embedded picture in a browser, and why.

Starts the command as a person does, opens the page in a headless Chromium, picks three LoRAs and
presses Generate. Beside the wall time of every stage stands the processor time that the server has
used by then: on a machine that does other things too, that is the number to compare.

    python -m benchmarks.ui_start --repeats 3
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tests.ui.browsing import Page, browser

LORAS = ("character_1", "clothing_1", "object_1")
TICKS = os.sysconf("SC_CLK_TCK")


def processor(pid: int) -> float:
    """Seconds of processor time that a process has used (Linux)."""
    with open(f"/proc/{pid}/stat", encoding="ascii") as file:
        fields = file.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


@contextmanager
def server(folder: str) -> Iterator[tuple[int, str]]:
    """The command, as soon as it has said its address: process id and address."""
    command = [sys.executable, "-m", "cmlora", "ui", "--out", folder, "--no-browser"]
    running = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert running.stdout is not None
        yield running.pid, running.stdout.readline().strip()
    finally:
        running.terminate()
        running.wait(timeout=60)


def stages() -> list[tuple[str, float, float]]:
    """Every stage with wall and processor seconds since the command."""
    found: list[tuple[str, float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        with server(folder) as (pid, url):

            def note(stage: str) -> None:
                found.append((stage, time.monotonic() - started, processor(pid)))

            note("the command says its address")
            with browser(url) as page:
                _use(page, note)
    return found


def _use(page: Page, note: object) -> None:
    assert callable(note)
    note("the browser runs")
    page.open()
    note("the page is there")
    page.pick(*LORAS)
    note("three LoRAs are picked")
    page.click("#generate")
    page.wait(lambda: page.one("#stage .stage.busy img"), seconds=300)
    note("the first preview")
    page.wait(lambda: page.one("#stage .stage.done img"), seconds=300)
    note("the picture")


def main() -> None:
    """Print one table per run, and the fastest run."""
    parser = argparse.ArgumentParser(description="from cmlora ui to the first picture")
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    runs = []
    for _ in range(options.repeats):
        print(f"load of the machine {os.getloadavg()[0]:.1f}, {os.cpu_count()} processors")
        print(f"{'':32s}     wall  server's processor")
        runs.append(stages())
        for stage, wall, used in runs[-1]:
            print(f"{stage:32s} {wall:6.1f} s {used:6.1f} s", flush=True)
    best = min(runs, key=lambda run: run[-1][1])
    print(f"fastest: {best[-1][1]:.1f} s, {best[-1][2]:.1f} s of processor time in the server")


if __name__ == "__main__":
    main()
