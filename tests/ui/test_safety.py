"""Nobody reaches a file outside the given folders, asks for too much, or leaves anything behind."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmlora.errors import CmloraError
from cmlora.ui.actions import complete
from cmlora.ui.arena import entries
from cmlora.ui.order import Order, check, check_strengths, read_numbers, read_options, read_seeds
from cmlora.ui.settings import Limits, Settings, read_auth
from cmlora.ui.shelf import Shelf, is_safetensors
from cmlora.ui.studio import Studio
from cmlora.ui.uploads import keep_lora, plain_name
from cmlora.ui.workbench import compress, convert, inspect, merge
from tests.ui import attacks


@pytest.fixture
def trapped(model_folder: Path, lora_folder: Path, tmp_path: Path) -> Iterator[Studio]:
    """A studio whose LoRA folder is full of links out of it, started in that folder."""
    folder, _ = attacks.make(tmp_path)
    shutil.copy(lora_folder / "cat.safetensors", folder / "cat.safetensors")
    before = Path.cwd()
    os.chdir(folder)  # so that relative names would find something
    yield Studio(Settings(models=(model_folder,), loras=(folder,), out=tmp_path / "out"))
    os.chdir(before)


def test_links_and_hidden_files_are_not_in_the_listing(trapped: Studio) -> None:
    assert list(trapped.lora_paths("tiny")) == ["cat"]


@pytest.mark.parametrize("name", attacks.FORMS)
def test_no_name_leads_out_of_the_folders(trapped: Studio, name: str) -> None:
    order = Order(model="tiny", prompt="a", loras={name: 1.0})
    attempts = (
        lambda: trapped.lora_path(name, "tiny"),
        lambda: complete(trapped, order),
        lambda: inspect(trapped, "tiny", name),
        lambda: compress(trapped, "tiny", name, "energy"),
        lambda: convert(trapped, "tiny", name),
        lambda: merge(trapped, "tiny", {"cat": 1.0, name: 1.0}, "svd"),
        lambda: trapped.model_place(name),
        lambda: complete(trapped, replace(order, model=name)),
        lambda: entries(trapped, name),
        lambda: complete(trapped, replace(order, loras={}, prompt=f"a <lora:{name}:1>")),
    )
    for attempt in attempts:
        with pytest.raises(CmloraError) as refused:
            attempt()
        assert "nobody may read" not in str(refused.value)
    assert not trapped.settings.out.exists()


@given(st.text(max_size=40))
def test_any_name_that_is_not_listed_is_refused(
    tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    folder = tmp_path_factory.getbasetemp() / "shelf"
    folder.mkdir(exist_ok=True)
    (folder / "cat.safetensors").touch()
    shelf = Shelf("LoRA", (folder,), is_safetensors)
    if name == "cat":
        assert shelf.find(name) == folder / "cat.safetensors"
    else:
        with pytest.raises(CmloraError, match="there is no LoRA"):
            shelf.find(name)


@pytest.mark.parametrize("name", [None, 3, ["cat"], {"cat": 1}, b"cat", Path("cat")])
def test_names_are_texts(trapped: Studio, name: object) -> None:
    with pytest.raises(CmloraError):
        Shelf("LoRA", trapped.settings.loras, is_safetensors).find(name)
    with pytest.raises(CmloraError):
        entries(trapped, name)


def test_a_folder_of_links_may_itself_be_given(tmp_path: Path, lora_folder: Path) -> None:
    (tmp_path / "mine").symlink_to(lora_folder)
    shelf = Shelf("LoRA", (tmp_path / "mine",), is_safetensors)
    assert set(shelf.listing()) == {"cat", "hat", "ink"}


def test_subfolders_and_equal_names_have_names_of_their_own(tmp_path: Path) -> None:
    for place in ("one/a", "one/styles/ink", "two/a"):
        path = tmp_path / f"{place}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    shelf = Shelf("LoRA", (tmp_path / "one", tmp_path / "two"), is_safetensors)
    found = {name: path.relative_to(tmp_path).as_posix() for name, path in shelf.listing().items()}
    assert found == {
        "a": "one/a.safetensors",
        "styles/ink": "one/styles/ink.safetensors",
        "two/a": "two/a.safetensors",
    }


@pytest.mark.parametrize(
    "name", ["owner/model", "a/b"], ids=["a hub id", "a folder that looks like one"]
)
def test_the_hub_is_off_unless_asked_for(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_folder, tmp_path / "a" / "b")
    closed = Studio(Settings(models=(model_folder,), out=tmp_path / "out"))
    with pytest.raises(CmloraError):
        closed.model_place(name)
    opened = Studio(Settings(models=(model_folder,), out=tmp_path / "out", hub=True))
    if name == "owner/model":
        assert opened.model_place(name) == name
    else:
        with pytest.raises(CmloraError, match="there is no model"):
            opened.model_place(name)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": 10**6}, "steps"),
        ({"steps": 2.5}, "steps"),
        ({"steps": True}, "steps"),
        ({"steps": "30"}, "steps"),
        ({"steps": float("nan")}, "steps"),
        ({"steps": None}, "steps"),
        ({"pictures": 0}, "pictures"),
        ({"pictures": 1000}, "pictures"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"width": 10**5, "height": 64}, "width"),
        ({"width": 64, "height": -8}, "height"),
        ({"width": 64}, "both"),
        ({"guidance": float("inf")}, "guidance"),
        ({"guidance": -1}, "guidance"),
        ({"guidance": 1e6}, "guidance"),
        ({"prompt": "a" * 10**5}, "letters"),
        ({"prompt": 3}, "prompt"),
        ({"negative_prompt": "\ud800"}, "character"),
        ({"loras": {f"l{i}": 1.0 for i in range(100)}}, "at most"),
        ({"loras": {"cat": 1e9}}, "strength"),
        ({"loras": {"cat": float("nan")}}, "strength"),
        ({"loras": {"cat": "1"}}, "strength"),
        ({"loras": ["cat"]}, "loras"),
        ({"options": ["tau"]}, "options"),
        ({"scopes": {"cat": "wide"}}, "scope of cat is 'wide'"),
        ({"scopes": ["cat"]}, "scopes"),
        ({"method": "magic"}, "magic"),
        ({"sampler": "__class__"}, "sampler"),
        ({"cache": "magic"}, "magic"),
        ({"text_encoder": "both"}, "text_encoder"),
        ({"schedule": "hello"}, "no part of a schedule"),
        ({"schedule": "<lora:cat:unet=1@0,0@1:blocks=(a+)+$>"}, "for ever"),
        ({"schedule": "<lora:cat:0@0,1@1>" * 1000}, "letters"),
    ],
)
def test_requests_are_bounded(changes: dict[str, object], field: str) -> None:
    order = Order(model="tiny", prompt="a cat")
    with pytest.raises(CmloraError, match=field):
        check(replace(order, **changes), Limits())  # type: ignore[arg-type]


def test_pages_may_send_whole_numbers_as_floats() -> None:
    order = check(Order(model="tiny", prompt="a", steps=30.0, seed=7.0), Limits())  # type: ignore[arg-type]
    assert (order.steps, order.seed) == (30, 7)
    assert isinstance(order.steps, int)


@pytest.mark.parametrize("text", ["", "a", "1-", "3-1", "0-1000", "1,1", "9" * 40, "0--1"])
def test_seeds_are_bounded(text: str) -> None:
    with pytest.raises(CmloraError, match="seeds"):
        read_seeds(text, Limits())


@pytest.mark.parametrize("text", ["", "a", "1,,2", "1,1", "nan", "inf", "1e999"])
def test_numbers_are_numbers(text: str) -> None:
    with pytest.raises(CmloraError, match="strengths"):
        read_numbers("strengths", text)


@pytest.mark.parametrize("text", ["tau", "=3", "tau=", "tau=1;tau=2"])
def test_options_are_pairs(text: str) -> None:
    with pytest.raises(CmloraError, match="option"):
        read_options(text)


def test_strengths_are_bounded_by_the_settings() -> None:
    with pytest.raises(CmloraError, match="not between -2 and 2"):
        check_strengths({"cat": 3.0}, Limits(strength=2.0))


def test_uploads_are_looked_at_before_they_are_kept(studio: Studio, tmp_path: Path) -> None:
    refused = {
        "pickle.safetensors": b"\x80\x04\x95rest",
        "empty.safetensors": b"",
        "text.safetensors": b"hello, I am a LoRA",
        "torn.safetensors": (studio.lora_path("cat", "tiny")).read_bytes()[:900],
        "bomb.safetensors": (2**62).to_bytes(8, "little") + b"{}",
        "other.safetensors": b"\x02\x00\x00\x00\x00\x00\x00\x00{}",
        "cat.ckpt": studio.lora_path("cat", "tiny").read_bytes(),
        "cat.safetensors.exe": studio.lora_path("cat", "tiny").read_bytes(),
    }
    for name, data in refused.items():
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(CmloraError) as mistake:
            keep_lora(studio, path)
        assert str(tmp_path) not in str(mistake.value)
    assert not studio.uploads.exists()


def test_uploads_have_a_largest_size(studio: Studio, lora_folder: Path) -> None:
    small = Studio(replace(studio.settings, limits=Limits(upload=100)))
    with pytest.raises(CmloraError, match="more than"):
        keep_lora(small, lora_folder / "cat.safetensors")


def test_an_upload_becomes_a_lora_and_replaces_none(studio: Studio, lora_folder: Path) -> None:
    first = keep_lora(studio, lora_folder / "cat.safetensors")
    second = keep_lora(studio, lora_folder / "cat.safetensors")
    assert (first, second) == ("cat", "cat-2")
    assert {"cat", "loras/cat", "cat-2"} <= set(studio.lora_paths("tiny"))


@given(st.text(max_size=60))
def test_plain_names_are_plain(text: str) -> None:
    name = plain_name(text)
    assert name
    assert Path(name).name == name
    assert not name.startswith(".")
    assert name.isascii()
    assert plain_name(name) == name


def test_others_are_let_in_only_with_a_warning() -> None:
    assert Settings().warning() == ""
    assert not Settings(host="localhost").open_to_others
    for settings in (Settings(host="0.0.0.0"), Settings(share=True), Settings(host="10.0.0.7")):
        assert "--auth" in settings.warning()
        assert replace(settings, auth=("me", "secret")).warning() == ""


@pytest.mark.parametrize("text", ["me", "me:", ":secret", ":"])
def test_a_password_is_not_repeated(text: str) -> None:
    with pytest.raises(CmloraError) as mistake:
        read_auth(text)
    assert "secret" not in str(mistake.value)


def test_error_pages_and_cards_escape_what_files_say(studio: Studio, tmp_path: Path) -> None:
    from cmlora.ui.cards import card
    from cmlora.ui.panels import lora_list, message, stage

    evil = "<img src=x onerror=alert(1)>"
    path = tmp_path / f"{evil[:8].replace('/', '')}.safetensors"
    path.write_bytes(b"not a LoRA")
    page = lora_list([card(f"{evil}", path)], {}) + message(evil) + stage(words=evil)
    assert evil not in page
    assert "&lt;img" in page
