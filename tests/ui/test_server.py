"""A running server: programs use it through its endpoints, and attackers get nothing."""

import http.client
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
import pytest
from PIL import Image

from cmlora.recipe import from_png
from cmlora.ui.launch import Server, serving
from cmlora.ui.settings import Limits, Settings
from cmlora.ui.studio import Studio
from tests.ui import attacks
from tests.ui.working import made

pytest.importorskip("gradio")

REQUEST = {
    "model": "tiny",
    "prompt": "the cat, the hat",
    "loras": {"cat": 1.0, "hat": 0.8},
    "steps": 2,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server runs; everything outside of ``out`` must stay as it is."""
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def server(model_folder: Path, lora_folder: Path, place: Path) -> Iterator[Server]:
    """A server with the tiny model, a folder of links and small limits."""
    folder, _ = attacks.make(place)
    for name in ("cat", "hat", "ink"):
        shutil.copy(lora_folder / f"{name}.safetensors", folder)
    (folder / "torn.safetensors").write_bytes(b"torn")
    settings = Settings(
        models=(model_folder,),
        loras=(folder,),
        out=place / "out",
        limits=Limits(upload=2 * 2**20, steps=50),
    )
    with serving(settings, preload=False) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from gradio_client import Client

    downloads = tmp_path_factory.mktemp("downloads")
    return Client(server.url, verbose=False, download_files=str(downloads))


def _call(url: str, name: str, data: list[Any]) -> str:
    """Put a request into the queue and return its number at once."""
    answer = httpx.post(f"{url}gradio_api/call/{name}", json={"data": data}, timeout=60)
    answer.raise_for_status()
    number: str = answer.json()["event_id"]
    return number


def _answer(url: str, name: str, number: str) -> tuple[str, Any]:
    """The last event of a request and what came with it."""
    event, found = "", None
    with httpx.stream("GET", f"{url}gradio_api/call/{name}/{number}", timeout=120) as lines:
        for line in lines.iter_lines():
            if line.startswith("event: "):
                event = line[7:]
            elif line.startswith("data: "):
                found = json.loads(line[6:])
                if event in ("complete", "error"):
                    return event, found
    return event, found


def test_it_listens_here_only(server: Server) -> None:
    assert urlsplit(server.url).hostname == "127.0.0.1"
    assert server.share_url == ""


def test_the_page_loads_nothing_from_elsewhere(server: Server) -> None:
    page = httpx.get(server.url, timeout=60).text
    assert "fonts.googleapis.com/css" not in page
    config = httpx.get(f"{server.url}config", timeout=60).json()
    assert config["analytics_enabled"] is False


@pytest.mark.parametrize("count", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_requests_at_once_are_answered_in_order_and_not_mixed_up(
    server: Server, model_folder: Path, lora_folder: Path, tmp_path: Path, count: int
) -> None:
    requests = [
        {**REQUEST, "steps": 1, "seed": seed, "method": ("merge", "cmlora", "switch")[seed % 3]}
        for seed in range(100, 100 + count)
    ]
    numbers = [_call(server.url, "generate", [request]) for request in requests]
    answers = [_answer(server.url, "generate", number) for number in numbers]

    assert [event for event, _ in answers] == ["complete"] * count
    found = [picture for _, data in answers for picture in data[0]]
    assert [p["recipe"]["seed"] for p in found] == list(range(100, 100 + count))
    files = [server.studio.settings.out / p["file"]["orig_name"] for p in found]
    finished = [file.stat().st_mtime_ns for file in files]
    assert finished == sorted(finished)

    alone = Studio(Settings(models=(model_folder,), loras=(lora_folder,), out=tmp_path / "out"))
    for request, file in zip(requests, files, strict=True):
        changes = {key: value for key, value in request.items() if key != "model"}
        (picture,) = made(alone, **changes)
        assert picture.path.read_bytes() == file.read_bytes()
        assert from_png(file).seed == request["seed"]


def test_twenty_jobs_of_a_client_at_once_each_get_their_own_picture(
    client: Any, model_folder: Path, lora_folder: Path, tmp_path: Path
) -> None:
    requests = [
        {**REQUEST, "steps": 1, "seed": seed, "method": ("merge", "cmlora", "switch")[seed % 3]}
        for seed in range(300, 320)
    ]
    jobs = [client.submit(request, api_name="/generate") for request in requests]
    answers = [job.result(timeout=300) for job in jobs]

    alone = Studio(Settings(models=(model_folder,), loras=(lora_folder,), out=tmp_path / "out"))
    for request, (picture,) in zip(requests, answers, strict=True):
        changes = {key: value for key, value in request.items() if key != "model"}
        (expected,) = made(alone, **changes)
        file = picture["file"] if isinstance(picture["file"], str) else picture["file"]["path"]
        assert picture["recipe"]["seed"] == request["seed"]
        assert Path(file).read_bytes() == expected.path.read_bytes()


def test_a_client_generates_compares_and_replays(
    client: Any, server: Server, tmp_path: Path
) -> None:
    from gradio_client import handle_file

    assert client.predict(api_name="/models") == ["emoji", "tiny"]
    listed = {row["name"]: row for row in client.predict("tiny", api_name="/loras")}
    assert listed["cat"]["triggers"] == ["the cat"]
    assert "safetensors" in listed["torn"]["problem"]
    assert client.predict(REQUEST, api_name="/cost")["full"] > 0

    (picture,) = client.predict(REQUEST, api_name="/generate")
    file = picture["file"] if isinstance(picture["file"], str) else picture["file"]["path"]
    recipe = from_png(file)
    assert json.loads(recipe.to_json()) == picture["recipe"]

    again, text = client.predict(handle_file(file), "tiny", api_name="/replay")
    assert Path(again).read_bytes() == Path(file).read_bytes()
    assert json.loads(text) == picture["recipe"]

    run = client.predict(REQUEST, ["merge", "switch"], "0", api_name="/compare")
    assert [cell["row"] for cell in run["cells"]] == ["merge", "switch"]
    assert client.predict(api_name="/stop") == 0


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("generate", [{**REQUEST, "loras": {"../secret": 1.0}}], "There is no LoRA '../secret'"),
        ("generate", [{**REQUEST, "loras": {"torn": 1.0}}], "not a safetensors file"),
        ("generate", [{**REQUEST, "steps": 10**6}], "not between 1 and 50"),
        ("generate", [{**REQUEST, "width": 10**6, "height": 64}], "not between"),
        ("generate", [{**REQUEST, "pictures": 10**6}], "not between"),
        ("generate", [{**REQUEST, "wdith": 64}], "did you mean width"),
        ("generate", [["no table"]], "not a table"),
        ("generate", [{"prompt": "a"}], "names no model"),
        ("cost", [{**REQUEST, "model": "/etc"}], "There is no model"),
        ("inspect", ["../secret", "tiny"], "There is no LoRA"),
        ("compare", [REQUEST, ["merge"], "0-9999"], "no range"),
    ],
)
def test_mistakes_come_back_as_sentences(
    server: Server, name: str, data: list[Any], words: str
) -> None:
    event, answer = _answer(server.url, name, _call(server.url, name, data))
    assert event == "error"
    text = answer if isinstance(answer, str) else json.dumps(answer)
    assert words in text
    assert "Traceback" not in text
    assert str(server.studio.settings.out.parent) not in text


def test_after_mistakes_it_still_works(server: Server) -> None:
    event, _ = _answer(server.url, "generate", _call(server.url, "generate", [REQUEST]))
    assert event == "complete"


def _raw(url: str, path: str) -> tuple[int, bytes]:
    """A request whose path nobody tidies up on the way."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
    connection.putrequest("GET", path, skip_host=False)
    connection.endheaders()
    answer = connection.getresponse()
    return answer.status, answer.read()


def test_files_outside_of_the_output_folder_are_not_served(
    server: Server, place: Path, model_folder: Path
) -> None:
    secret, out = place / "secret.safetensors", server.studio.settings.out
    lora = place / "loras" / "cat.safetensors"
    weights = next(model_folder.rglob("*.safetensors"))
    (out / "link.png").symlink_to(secret)
    forms = [
        *(str(path) for path in (secret, lora, weights, "/etc/passwd", "/proc/self/environ")),
        f"{out}/../secret.safetensors",
        f"{out}/link.png",
        f"{out}/./../loras/cat.safetensors",
        *(f"{out}/{form}" for form in attacks.FORMS if "\x00" not in form and form.strip(" ./")),
        *attacks.FORMS,
    ]
    first = "gradio_api/file="
    for form in forms:
        encodings = [quote(form), quote(form, safe=""), quote(quote(form, safe=""), safe="")]
        attempts = {(first, written) for written in encodings}
        attempts |= {(r, encodings[0]) for r in ("file=", "gradio_api/file/", "static/")}
        for route, written in sorted(attempts):
            status, body = _raw(server.url, f"/{route}{written}")
            assert b"nobody may read" not in body, form
            assert b"root:" not in body, form
            if route == first and form.startswith(("/etc", "/proc", str(secret))):
                assert status >= 400
    (out / "link.png").unlink()


def test_a_named_file_is_no_upload(server: Server, place: Path) -> None:
    for path in ("/etc/passwd", str(place / "secret.safetensors"), "../secret.safetensors"):
        data = [{"path": path, "meta": {"_type": "gradio.FileData"}}, "tiny"]
        answer = httpx.post(f"{server.url}gradio_api/call/replay", json={"data": data}, timeout=60)
        if answer.status_code == 200:
            event, found = _answer(server.url, "replay", answer.json()["event_id"])
            assert event == "error"
            assert "nobody may read" not in json.dumps(found)


def test_uploads_that_are_too_large_or_malformed_are_refused(
    client: Any, server: Server, tmp_path: Path
) -> None:
    from gradio_client import handle_file

    url = f"{server.url}gradio_api/upload"
    answer = httpx.post(url, files={"files": ("a.png", b"0" * (3 * 2**20))}, timeout=60)
    assert answer.status_code == 413
    temporary = Path(os.environ["GRADIO_TEMP_DIR"])
    assert not [path for path in temporary.rglob("a.png") if path.stat().st_size > 2 * 2**20]

    plain = tmp_path / "plain.png"
    Image.new("RGB", (8, 8)).save(plain)
    torn = tmp_path / "torn.png"
    torn.write_bytes(plain.read_bytes()[:40])
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(b"\x89PNG\r\n\x1a\n" + b"\xff" * 1000)
    for file, words in ((plain, "no recipe"), (torn, "torn.png"), (bomb, "bomb.png")):
        with pytest.raises(Exception, match=words):
            client.predict(handle_file(file), "tiny", api_name="/replay")


def test_names_of_uploads_stay_in_the_temporary_folder(server: Server, place: Path) -> None:
    before = {path for path in place.rglob("*") if "out" not in path.relative_to(place).parts}
    for name in ("../../evil.png", "/tmp/evil.png", "..\\evil.png", "a/../../evil.png"):
        answer = httpx.post(
            f"{server.url}gradio_api/upload", files={"files": (name, b"evil")}, timeout=60
        )
        if answer.status_code == 200:
            for path in answer.json():
                inside = Path(path).resolve()
                assert inside.is_relative_to(Path(os.environ["GRADIO_TEMP_DIR"]).resolve())
    assert {p for p in place.rglob("*") if "out" not in p.relative_to(place).parts} == before


def test_a_server_removes_its_temporary_files_and_writes_only_to_its_folder(
    model_folder: Path, lora_folder: Path, tmp_path: Path
) -> None:
    before = {
        path: path.stat().st_mtime_ns
        for path in [*model_folder.rglob("*"), *lora_folder.rglob("*")]
    }
    settings = Settings(models=(model_folder,), loras=(lora_folder,), out=tmp_path / "out")
    leftover = tmp_path / "out" / ".temporary" / "old.png"
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(b"of a server that was killed")
    with serving(settings, preload=False) as running:
        assert not leftover.exists()
        event, _ = _answer(running.url, "generate", _call(running.url, "generate", [REQUEST]))
        assert event == "complete"
        assert list((tmp_path / "out" / ".temporary").iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.suffix for path in (tmp_path / "out").iterdir()] == [".png"]
    after = {
        path: path.stat().st_mtime_ns
        for path in [*model_folder.rglob("*"), *lora_folder.rglob("*")]
    }
    assert after == before


def test_a_password_is_asked_for(model_folder: Path, tmp_path: Path) -> None:
    settings = Settings(models=(model_folder,), out=tmp_path / "out", auth=("me", "secret"))
    with serving(settings, preload=False) as running:
        answer = httpx.post(f"{running.url}gradio_api/call/models", json={"data": []}, timeout=60)
        assert answer.status_code == 401


def test_wrong_folders_are_said_before_anything_starts(tmp_path: Path) -> None:
    from cmlora.errors import CmloraError

    missing = tmp_path / "nothing"
    for settings in (
        Settings(models=(missing,), out=tmp_path),
        Settings(loras=(missing,), out=tmp_path),
        replace(Settings(), out=tmp_path / "file"),
    ):
        (tmp_path / "file").touch()
        with pytest.raises(CmloraError, match=r"--(model|loras|out)"), serving(settings):
            pass


@pytest.mark.slow
def test_the_command_serves_and_cleans_up_when_it_is_terminated(
    model_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = ["--model", str(model_folder), "--out", str(out), "--no-browser"]
    server = subprocess.Popen(
        [sys.executable, "-m", "cmlora.ui", *options], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        assert httpx.get(url, timeout=60).status_code == 200
        assert (out / ".temporary").is_dir()
    finally:
        server.terminate()
        server.wait(timeout=60)
    assert not (out / ".temporary").exists()
