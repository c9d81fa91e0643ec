"""Pictures, sizes, batches, settings and logs of a training."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cmlora.adapters.training.buckets import Order, fitted, nearest, sizes
from cmlora.adapters.training.log import Log, curve
from cmlora.adapters.training.pictures import Example, read_folder
from cmlora.adapters.training.settings import EXPLAINED, Settings, read, value
from cmlora.errors import CmloraError
from tests.training import bench


def test_captions_come_from_text_files_rows_and_the_trigger(tmp_path: Path) -> None:
    folder = bench.pictures(tmp_path, 3)
    (folder / "1.txt").unlink()
    (folder / "2.txt").write_text(" zorbo  in\nthe rain ")
    rows = [{"file_name": "0.png", "text": "from the table"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    captions = [e.caption for e in read_folder(folder, "zorbo")]
    assert captions == ["zorbo, from the table", "zorbo", "zorbo in the rain"]


def test_pictures_of_every_mode_become_rgb_on_white(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    clear.save(tmp_path / "a.png")
    Image.new("L", (4, 4), 7).save(tmp_path / "b.png")
    turned = Image.new("RGB", (8, 4))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "c.jpg", exif=exif)
    found = [e.open() for e in read_folder(tmp_path, "x")]
    assert [p.mode for p in found] == ["RGB"] * 3
    assert found[0].getpixel((0, 0)) == (255, 255, 255)
    assert found[1].getpixel((0, 0)) == (7, 7, 7)
    assert found[2].size == (4, 8)


def _nothing(folder: Path) -> None:
    folder.mkdir()


def _broken(folder: Path) -> None:
    bench.pictures(folder, 1)
    data = (folder / "0.png").read_bytes()
    (folder / "0.png").write_bytes(data[: len(data) // 2])


def _no_picture(folder: Path) -> None:
    bench.pictures(folder, 1)
    (folder / "9.txt").write_text("nine")


def _no_row(folder: Path) -> None:
    bench.pictures(folder, 1)
    (folder / "metadata.jsonl").write_text('{"file_name": "9.png", "text": "nine"}')


def _bad_row(folder: Path) -> None:
    bench.pictures(folder, 1)
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png"}')


def _no_caption(folder: Path) -> None:
    bench.pictures(folder, 1)
    (folder / "0.txt").unlink()


def _two_of_a_name(folder: Path) -> None:
    bench.pictures(folder, 1)
    Image.new("RGB", (4, 4)).save(folder / "0.jpg")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "there is no folder"),
        (_nothing, "holds no pictures"),
        (_broken, r"0\.png cannot be read as a picture"),
        (_no_picture, r"9\.txt is a caption without a picture"),
        (_no_row, r"metadata\.jsonl: there is no picture 9\.png"),
        (_bad_row, "line 1: expected an object with file_name and text"),
        (_no_caption, r"0\.png has no caption; write one to 0\.txt"),
        (_two_of_a_name, "share a caption file"),
    ],
)
def test_folders_that_cannot_be_trained_on(make: Any, message: str, tmp_path: Path) -> None:
    make(tmp_path / "data")
    with pytest.raises(CmloraError, match=message):
        read_folder(tmp_path / "data")


@given(st.integers(16, 1100), st.sampled_from([8, 16, 64]))
def test_sizes_have_the_area_and_the_step(resolution: int, step: int) -> None:
    found = sizes(resolution, step)
    step = min(step, resolution)
    assert found == sorted({*found, *((h, w) for w, h in found)})
    for width, height in found:
        assert width % step == height % step == 0
        assert width * height <= resolution**2
        assert max(width, height) <= 2 * min(width, height)


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 60), st.integers(1, 60))
def test_fitted_pictures_have_the_size_and_nothing_is_stretched(
    width: int, height: int, w: int, h: int
) -> None:
    assert fitted(Image.new("RGB", (width, height)), (w, h)).size == (w, h)


def test_fitting_cuts_off_both_sides_alike() -> None:
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 255
    assert np.asarray(fitted(Image.fromarray(pixels), (10, 10))).min() == 255


def test_the_nearest_shape_is_chosen() -> None:
    choices = sizes(512, 64)
    assert nearest((1000, 1000), choices) == (512, 512)
    assert nearest((3000, 2000), choices) == (640, 384)
    assert nearest((2000, 3000), choices) == (384, 640)


@given(st.integers(1, 7), st.integers(0, 9), st.integers(0, 5), st.integers(0, 3))
def test_every_epoch_shows_every_picture(batch: int, one: int, two: int, epoch: int) -> None:
    groups = {(8, 8): list(range(one)), (8, 16): list(range(one, one + two))}
    if not one + two:
        return
    order = Order(groups, batch, 3)
    numbers = range(epoch * order.per_epoch, (epoch + 1) * order.per_epoch)
    seen = []
    for number in reversed(numbers):  # in any order
        size, rows = order.at(number)
        assert order.epoch(number) == epoch
        assert len(rows) == batch
        assert set(rows) <= set(groups[size])
        seen += rows
    assert set(seen) == set(range(one + two))
    again = Order(groups, batch, 3)
    assert [again.at(n) for n in numbers] == [order.at(n) for n in numbers]


def test_random_draws_take_sizes_by_their_numbers_of_pictures() -> None:
    order = Order({(8, 8): [0], (8, 16): [1, 2, 3]}, 2, 0, random=True)
    rows = [row for number in range(400) for row in order.at(number)[1]]
    counts = np.bincount(rows, minlength=4) / len(rows)
    assert np.abs(counts - 0.25).max() < 0.06
    assert order.at(7) == Order({(8, 8): [0], (8, 16): [1, 2, 3]}, 2, 0, random=True).at(7)


def test_a_caption_may_be_drawn() -> None:
    example = Example(Image.new("RGB", (1, 1)), lambda rng: f"number {rng.integers(100)}")
    texts = [example.text(np.random.default_rng(i)) for i in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_settings_from_a_file_and_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text('steps = 7\ntargets = ["to_q"]\n[options]\nseed = 3\n')
    found = read(path, {"rate": 0.5, "options.slot": 2, "text_targets": "q_proj, v_proj"})
    assert (found.steps, found.rate, found.targets) == (7, 0.5, ("to_q",))
    assert found.options == {"seed": 3, "slot": 2}
    assert found.text_targets == ("q_proj", "v_proj")
    assert Settings(validation_prompts="a cat, sitting").validation_prompts == ("a cat, sitting",)  # type: ignore[arg-type]
    assert Settings(**found.to_dict()) == found
    assert EXPLAINED.keys() == found.to_dict().keys()
    assert [value(t) for t in ("3", "a b", "[1]", "false")] == [3, "a b", [1], False]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stepz": 1}, "unknown setting 'stepz'; did you mean steps"),
        ({"steps": 0}, "steps is 0, not between 1"),
        ({"steps": 1.5}, "steps is 1.5, not a whole number"),
        ({"rate": "fast"}, "rate is 'fast', not a number"),
        ({"rate": -1}, "rate is -1, not between 0"),
        ({"rate": 0}, "rate is 0, so nothing would be learnt"),
        ({"ema": 1}, "ema is 1, not between"),
        ({"schedule": "step"}, "schedule is 'step', not one of constant, linear, cosine"),
        ({"flip": 1}, "flip is 1, not true or false"),
        ({"targets": []}, "targets is empty"),
        ({"targets": [3]}, "not a list of texts"),
        ({"options": 3}, "options is 3, not a table"),
        ({"header": {"a": 3}}, "header.a is 3, not a text"),
        ({"full": True, "base_format": "mxfp4"}, "does not go with base_format"),
        ({"base_format": "quartet"}, "needs full"),
        ({"full": True, "text_targets": ["q"]}, "does not go with text_targets"),
        ({"trp": True}, "needs full"),
        ({"prior_data": "x"}, "prior_prompt is missing"),
        ({"validate_every": 5}, "needs validation_prompts"),
        ({"name": "a/b"}, "not a file name"),
    ],
)
def test_settings_that_are_not_possible(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CmloraError, match=message):
        read(None, changes)


def test_files_of_settings_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    with pytest.raises(CmloraError, match="cannot read"):
        read(path)
    path.write_text("steps = ")
    with pytest.raises(CmloraError, match=r"a\.toml is no TOML"):
        read(path)


def test_a_log_continues_where_the_checkpoint_is(tmp_path: Path) -> None:
    def row(step: int, loss: float) -> dict[str, Any]:
        return {"step": step, "epoch": 0, "loss": loss, "rate": 1, "gradient": 1, "seconds": 1}

    log = Log(tmp_path)
    for step in range(1, 6):
        log.add(**row(step, step))
    log.close()
    with log.path.open("a") as file:
        file.write("6,0,9")  # torn by an interruption
    log = Log(tmp_path, start=3)
    assert log.losses == [1, 2, 3]
    log.add(**row(4, 40))
    log.plot()
    log.close()
    lines = log.path.read_text().splitlines()
    assert [line.split(",")[2] for line in lines] == ["loss", "1", "2", "3", "40"]
    assert (tmp_path / "loss.svg").read_text().count("<polyline") == 2


@pytest.mark.parametrize("losses", [[], [1.0], [2.0, 2.0], list(range(5000))])
def test_any_losses_can_be_plotted(losses: list[float]) -> None:
    text = curve(losses)
    assert "nan" not in text
    assert len(text) < 200_000


def test_tensorboard_is_refused_where_it_is_missing(tmp_path: Path) -> None:
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        with pytest.raises(CmloraError, match="pip install tensorboard"):
            Log(tmp_path, tensorboard=True)
    else:
        log = Log(tmp_path, tensorboard=True)
        log.add(step=1, epoch=0, loss=1.0, rate=1.0, gradient=1.0, seconds=1)
        log.close()
        assert list((tmp_path / "tensorboard").iterdir())
