"""Recipes in PNG, WebP and JPEG: out as they went in, and nothing but errors from anything else."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cmlora import imagetext, pictures
from cmlora.errors import CmloraError
from cmlora.infotext import Infotext, parse
from cmlora.plan import Step
from cmlora.recipe import Ingredient, Recipe, infotext
from cmlora.schedules.parse import parse_schedule

LORA = Ingredient("ink", "ink style.safetensors", "ab" * 32, 0.5)
RECIPE = Recipe("emoji", 'ein Käse, "a": cat\n<3 \u65e5', 7, 4, 8, 8, loras=(LORA,))
unhurried = settings(deadline=None, max_examples=60)


def picture() -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    return Image.fromarray(noise)


@pytest.mark.parametrize("suffix", [".png", ".webp", ".jpg", ".JPEG"])
def test_a_recipe_comes_out_as_it_went_in(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x{suffix}"
    pictures.save(picture(), path, RECIPE)
    assert pictures.read(path) == RECIPE
    texts = imagetext.texts(path)
    assert texts["parameters"] == infotext(RECIPE)
    opened = Image.open(path)
    opened.load()
    if suffix in (".png", ".webp"):
        assert np.array_equal(np.asarray(opened), np.asarray(picture()))
    again = tmp_path / f"y{suffix}"
    pictures.save(picture(), again, RECIPE)
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("suffix", [".webp", ".jpg"])
def test_other_programs_read_our_exif(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x{suffix}"
    pictures.save(picture(), path, RECIPE)
    found = Image.open(path).getexif()
    assert found[0x010E] == RECIPE.to_json()
    comment: Any = found.get_ifd(0x8769)[0x9286]
    assert comment[:8] == b"UNICODE\0"
    assert comment[8:].decode("utf-16-be") == infotext(RECIPE)


@pytest.mark.parametrize("order", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("suffix", [".webp", ".jpg"])
def test_we_read_other_programs_exif(suffix: str, order: str, tmp_path: Path) -> None:
    text = "a cat <lora:ink:0.7>\nSteps: 20, Sampler: Euler a, Seed: 5, Size: 64x32"
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + text.encode(order)
    path = tmp_path / f"x{suffix}"
    picture().save(path, exif=exif)
    assert imagetext.texts(path)["parameters"] == text
    found = pictures.read_infotext(path)
    assert found is not None
    assert (found.prompt, found.size, found.whole("Seed")) == ("a cat", (64, 32), 5)
    with pytest.raises(CmloraError, match="another program's text"):
        pictures.read(path)


def test_what_does_not_fit_or_is_no_picture_is_said(tmp_path: Path) -> None:
    long = replace(RECIPE, prompt="x" * 70_000)
    with pytest.raises(CmloraError, match="does not fit into a JPEG"):
        pictures.save(picture(), tmp_path / "x.jpg", long)
    assert not list(tmp_path.iterdir())
    pictures.save(picture(), tmp_path / "x.webp", long)
    assert pictures.read(tmp_path / "x.webp") == long
    with pytest.raises(CmloraError, match=r"written as \.png"):
        pictures.save(picture(), tmp_path / "x.gif", RECIPE)
    picture().save(tmp_path / "bare.jpg")
    with pytest.raises(CmloraError, match=r"bare\.jpg holds no recipe"):
        pictures.read(tmp_path / "bare.jpg")
    (tmp_path / "x.txt").write_text("hello")
    with pytest.raises(CmloraError, match="is no PNG, WebP or JPEG"):
        pictures.read(tmp_path / "x.txt")


def test_no_pixel_is_decoded_and_no_size_believed(tmp_path: Path) -> None:
    path = tmp_path / "x.webp"
    huge = b"VP8L" + struct.pack("<I", 2**31) + b"EXIF" + struct.pack("<I", 2**32 - 1) + b"II*\0"
    path.write_bytes(b"RIFF" + struct.pack("<I", 2**32 - 1) + b"WEBP" + huge)
    with pytest.raises(CmloraError):
        pictures.read(path)
    path.write_bytes(b"\xff\xd8" + b"\xff\xe1\xff\xffExif\0\0")
    with pytest.raises(CmloraError):
        pictures.read(path)


@unhurried
@given(st.data(), st.sampled_from([".png", ".webp", ".jpg"]))
def test_a_damaged_picture_gives_its_recipe_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, suffix: str
) -> None:
    path = tmp_path_factory.mktemp("picture") / f"x{suffix}"
    recipe = Recipe("m", "p", 1, 2, 3, 4)
    pictures.save(Image.new("RGB", (4, 4)), path, recipe)
    whole = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        del whole[data.draw(st.integers(0, len(whole) - 1)) :]
    else:
        whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(whole)
    try:
        found = pictures.read(path)
    except CmloraError as error:
        assert "x." in str(error)  # noqa: PT017
    else:
        # Neither EXIF nor JPEG has a checksum, so a changed letter may be a changed recipe.
        assert found == recipe or suffix != ".png"


@unhurried
@given(st.binary(max_size=200), st.sampled_from(["exif", "jpeg", "webp", "png"]))
def test_noise_is_an_error_of_the_user(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes, frame: str
) -> None:
    path = tmp_path_factory.mktemp("noise") / "x"
    starts = {
        "exif": b"\xff\xd8\xff\xe1" + struct.pack(">H", len(noise) + 8) + b"Exif\0\0",
        "jpeg": b"\xff\xd8",
        "webp": b"RIFF\0\0\0\0WEBPEXIF" + struct.pack("<I", len(noise)),
        "png": b"\x89PNG\r\n\x1a\n",
    }
    path.write_bytes(starts[frame] + noise)
    with pytest.raises(CmloraError):
        pictures.read(path)


# ------------------------------------------------------------------ infotext


def test_our_own_infotext_is_read_back() -> None:
    plain = replace(RECIPE, prompt="a cat, sofa", negative_prompt="blurry\nbad")
    found = parse(infotext(plain))
    assert (found.prompt, found.negative_prompt) == ("a cat, sofa", "blurry\nbad")
    assert (found.whole("Steps"), found.whole("Seed"), found.size) == (4, 7, (8, 8))
    assert found.real("CFG scale") == 7.5
    (lora,) = found.loras
    assert (lora.name, lora.weight, lora.hash) == ("ink style", 0.5, "ab" * 5)


def told(*tags: str) -> Infotext:
    """The infotext of a picture with these tags."""
    return parse(f"x {' '.join(tags)}\nSteps: 1, Seed: 2, Size: 8x8")


def test_tags_say_strengths_for_the_text_and_the_picture() -> None:
    found = told("<lora:a:0.3:0.8>", "<lora:b>", "<lora:c:0.7:0.7>", "<lora:d:unet=0.4>")
    assert found.prompt == "x"
    assert [lora.weight for lora in found.loras] == [1, 1, 0.7, 1]
    schedule = parse_schedule(found.schedule(["one", "two", "three", "four"]))
    assert schedule.names == ("one", "four")
    assert (schedule.text_factor("one"), schedule.factor("one", Step(0, 9))) == (0.3, 0.8)
    assert (schedule.text_factor("four"), schedule.factor("four", Step(0, 9))) == (1.0, 0.4)
    assert not found.notes()
    assert told("<lora:a:0.5>").schedule(["a"]) == ""


def test_tags_with_curves_are_schedules() -> None:
    found = told("<lora:a:0@0,1@0.5>", "<lora:b:0.6:stop=4>")
    schedule = parse_schedule(found.schedule(["a", "b"]))
    assert [schedule.factor("a", Step(i, 4)) for i in range(3)] == [0, 0.5, 1]
    assert [schedule.factor("b", Step(i, 9)) for i in (3, 4)] == [0.6, 0]
    (note,) = found.notes()
    assert "LoRA a: its curve is for the denoiser" in note


def test_what_a_tag_says_to_another_program_alone_is_noted() -> None:
    found = told("<lora:c:0.5:1:lbw=ALL>", "<lora:d:0.5:0.5:64>")
    assert found.schedule(["c", "d"]) == "<lora:c:te=0.5:unet=1>"
    assert found.loras[1].weight == 0.5
    first, second = found.notes()
    assert first.startswith("LoRA c: 'lbw=ALL' is left out: lbw names a preset")
    assert second.startswith("LoRA d: '64' is left out: a third number would change the rank")


@pytest.mark.parametrize("tag", ["<lora:a:much>", "<lora:a:>", "<lora:a:te=x>", "<lora:a:1@x>"])
def test_a_strength_that_cannot_be_read_is_an_error(tag: str) -> None:
    found = told(tag)
    with pytest.raises(CmloraError, match=r"tag of LoRA a: .* is not a number"):
        found.schedule(["a"])
    many = told(f"<lora:a{':1' * 50_000}>")
    with pytest.raises(CmloraError, match="too many"):
        many.check()


@unhurried
@given(st.text(max_size=300))
def test_any_text_is_an_infotext(text: str) -> None:
    found = parse(text)
    assert isinstance(found, Infotext)
    assert found.whole("Steps") is None or found.whole("Steps") >= 0  # type: ignore[operator]


@pytest.mark.parametrize(
    "text",
    ['a:"' * 20_000, "<lora:" * 20_000, ": " * 60_000, '\\"a:' * 30_000],
    ids=["quotes", "tags", "colons", "escapes"],
)
def test_no_text_takes_long(text: str) -> None:
    parse(text + "\nSteps: 1, " + text)
