"""Loading libraries, and requests that replace each other."""

import subprocess
import sys
import threading

import pytest

from cmlora.ui.jobs import Newest, Tickets

pytest.importorskip("gradio")

LOAD = """
import inspect

find, asked = inspect.getfile, []
def recorded(found):
    asked.append(type(found).__name__)
    return find(found)
inspect.getfile = recorded

from cmlora.ui.libraries import unstubbed
with unstubbed():
    import gradio

assert inspect.getfile is recorded
print("ComponentMeta" in asked, hasattr(gradio.Textbox, "submit"), find(gradio.Textbox)[-10:])
"""


def test_gradio_loads_without_writing_stubs() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", LOAD], capture_output=True, text=True, check=True, timeout=300
    )
    assert ran.stdout.split() == ["False", "True", "textbox.py"]


def test_only_the_newest_of_waiting_requests_is_wanted() -> None:
    newest, wanted = Newest(), {}
    entered, leave = threading.Event(), threading.Event()

    def first() -> None:
        with newest.turn("a") as mine:
            wanted["first"] = mine
            entered.set()
            assert leave.wait(30)

    def later(name: str, visitor: str) -> None:
        with newest.turn(visitor) as mine:
            wanted[name] = mine

    running = [threading.Thread(target=first)]
    running[0].start()
    assert entered.wait(30)
    for name, visitor in (("second", "a"), ("other", "b"), ("third", "a")):
        running.append(threading.Thread(target=later, args=(name, visitor)))
        running[-1].start()
        while newest.asked < len(running):
            pass
    assert wanted == {"first": True}
    leave.set()
    for thread in running:
        thread.join(30)
    assert wanted == {"first": True, "second": False, "other": True, "third": True}


def test_what_can_wait_lets_all_work_end_but_not_for_ever() -> None:
    tickets = Tickets()
    assert tickets.idle(0)
    with tickets.take("a"):
        assert not tickets.idle(0.01)
        answers: list[bool] = []
        waiting = threading.Thread(target=lambda: answers.append(tickets.idle(60)))
        with tickets.take("b"):
            waiting.start()
        waiting.join(0.05)
        assert not answers  # one of two has ended
    waiting.join(30)
    assert answers == [True]
