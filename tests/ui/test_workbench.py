"""Files made on the page are those that the library makes, beside the server's other LoRAs."""

from pathlib import Path

import pytest
import torch

from cmlora.adapters.merging import MERGES
from cmlora.errors import CmloraError
from cmlora.files import describe, read
from cmlora.ui.cards import card, cards, first_triggers
from cmlora.ui.studio import Studio
from cmlora.ui.workbench import compress, convert, inspect, merge, missing
from cmlora.ui.zoo_merge import note_html
from tests.ui.working import made


def test_a_merge_is_the_weighted_sum_and_can_be_used_at_once(studio: Studio) -> None:
    done = merge(studio, "tiny", {"cat": 0.5, "hat": 1.0}, "cat", name="both of them")
    assert done.name == "both_of_them"
    one, other = (read(studio.lora_path(name, "tiny")) for name in ("cat", "hat"))
    merged = read(done.path)
    for module, update in merged.updates.items():
        expected = 0.5 * one.updates[module].delta() + other.updates[module].delta()
        assert torch.allclose(update.delta(), expected, atol=1e-5)
    (picture,) = made(studio, loras={done.name: 1.0}, method="merge", prompt="a")
    assert picture.recipe.loras[0].file == "both_of_them.safetensors"


def test_methods_say_what_they_need(studio: Studio) -> None:
    for name, entry in MERGES.items():
        needs = entry.object.needs_grams
        assert missing(name, 1) == "select two or more LoRAs"
        assert ("calibration" in missing(name, 2)) == needs
        assert missing(name, 2, "measured") == ""
        assert bool(missing(name, 3, "measured")) == ("many" not in entry.object.promises)
        assert "Select two or more LoRAs." in note_html(studio, "tiny", name, {"cat": 1.0})


def test_a_merge_without_what_it_needs_is_refused(studio: Studio) -> None:
    with pytest.raises(CmloraError, match="calibration"):
        merge(studio, "tiny", {"cat": 1.0, "hat": 1.0}, "pleas")
    with pytest.raises(CmloraError, match="merging method"):
        merge(studio, "tiny", {"cat": 1.0, "hat": 1.0}, "magic")
    with pytest.raises(CmloraError, match="rank"):
        merge(studio, "tiny", {"cat": 1.0, "hat": 1.0}, "svd", rank=10**6)
    assert not list(studio.uploads.glob("*"))


def test_compressing_and_converting_make_new_files(studio: Studio) -> None:
    original = studio.lora_path("cat", "tiny").read_bytes()
    small = compress(studio, "tiny", "cat", "fixed", 1)
    turned = convert(studio, "tiny", "cat", rank=1)
    again = convert(studio, "tiny", "cat")
    assert describe(small.path)["rank"] == describe(turned.path)["rank"] == [1, 1]
    assert again.facts["relative error"] == "0.00e+00"
    assert {small.name, turned.name, again.name} <= set(studio.lora_paths("tiny"))
    assert len({small.path, turned.path, again.path}) == 3
    assert studio.lora_path("cat", "tiny").read_bytes() == original


def test_inspecting_says_what_the_file_is_and_not_where(studio: Studio) -> None:
    facts = inspect(studio, "tiny", "cat")
    assert facts["file"] == "cat.safetensors"
    assert facts["triggers"] == "the cat"
    assert facts["rank"] == "2, 2"


def test_cards_show_what_headers_say(studio: Studio, tmp_path: Path) -> None:
    found = {each.name: each for each in cards(studio, "tiny")}
    assert found["cat"].rank == "2"
    assert found["cat"].triggers == ("the cat",)
    assert found["cat"].thumbnail.startswith("data:image/svg+xml")
    assert first_triggers(list(found.values()))["hat"] == "the hat"
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(b"not a LoRA at all")
    assert "is not a safetensors file" in card("torn", torn).problem
    assert str(tmp_path) not in card("torn", torn).problem
    assert card("gone", tmp_path / "gone.safetensors").problem


def test_thumbnails_are_drawn_anew_and_small(tmp_path: Path, lora_folder: Path) -> None:
    import base64
    import io
    import shutil

    from PIL import Image

    path = tmp_path / "cat.safetensors"
    shutil.copy(lora_folder / "cat.safetensors", path)
    Image.new("RGB", (800, 400), "red").save(tmp_path / "cat.png")
    source = card("cat", path).thumbnail
    with Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))) as thumbnail:
        assert thumbnail.size == (96, 48)
    (tmp_path / "cat.png").write_bytes(b"<svg onload=alert(1)>")
    assert card("other", path).thumbnail.startswith("data:image/svg+xml")  # its own monogram
