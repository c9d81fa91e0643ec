"""Profiles in short, and the cards they are kept on."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmlora.errors import CmloraError
from cmlora.frequency.card import Profile, StaleCard, card_path, read_card, write_card

sizes = st.lists(st.floats(0, 10), min_size=1, max_size=12)


def profile(norm: list[float], base: str = "base") -> Profile:
    count = len(norm)
    fractions = tuple(i / count for i in range(count))
    return Profile("", base, fractions, (0.5,) * count, tuple(norm))


def test_the_frequency_is_the_mean_over_steps_that_contribute() -> None:
    rows = Profile("", "base", (0.0, 0.25, 0.5, 0.75), (0.9, 0.5, 0.1, 0.0), (1, 2, 3, 0.0))
    assert rows.frequency == pytest.approx(0.5)
    assert math.isnan(profile([0.0, 0.0]).frequency)


@pytest.mark.parametrize(
    ("norm", "window"),
    [
        ([0, 0, 1, 0], (0.5, 0.75)),
        ([1, 1, 1, 1], (0.0, 0.5)),
        ([0, 1, 1, 5], (0.75, 1.0)),
        ([1, 2, 2, 1], (0.25, 0.75)),
        ([0, 0, 0, 0], (0.0, 1.0)),
    ],
)
def test_the_window_is_the_shortest_half(norm: list[float], window: tuple[float, float]) -> None:
    assert profile(norm).window == window


@settings(deadline=None)
@given(sizes)
def test_the_window_holds_half_and_no_shorter_one_does(norm: list[float]) -> None:
    count, (first, last) = len(norm), profile(norm).window
    i, j = round(first * count), round(last * count)
    half = math.fsum(norm) / 2
    assert math.fsum(norm[i:j]) >= half
    if half > 0:
        shorter = [math.fsum(norm[k : k + j - i - 1]) for k in range(count)]
        assert all(held < half for held in shorter)


def test_rows_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="rows of one length"):
        Profile("", "base", (0.0, 0.5), (0.5,), (1.0,))
    with pytest.raises(ValueError, match="rows of one length"):
        Profile("", "base", (), (), ())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "ink.safetensors"
    path.write_bytes(b"weights")
    return path


@settings(deadline=None)
@given(sizes)
def test_a_card_gives_back_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, norm: list[float]
) -> None:
    path = tmp_path_factory.mktemp("cards") / "ink.safetensors"
    path.write_bytes(b"weights")
    card = write_card(path, profile(norm))
    assert card == card_path(path)
    assert card.name == "ink.safetensors.profile.json"
    found = read_card(path, "base")
    assert found is not None
    assert (found.fractions, found.ratio, found.norm) == (
        profile(norm).fractions,
        profile(norm).ratio,
        tuple(map(float, norm)),
    )
    assert len(found.lora) == 64


def test_no_card_is_no_profile(file: Path) -> None:
    assert read_card(file) is None


def test_a_card_of_another_file_is_reported_and_not_used(file: Path) -> None:
    write_card(file, profile([1.0]))
    file.write_bytes(b"other weights")
    with pytest.warns(StaleCard, match="another version of the file"):
        assert read_card(file, "base") is None


def test_a_card_of_another_base_is_reported_and_not_used(file: Path) -> None:
    write_card(file, profile([1.0], base="anime"))
    with pytest.warns(StaleCard, match="on base model anime, not on photo"):
        assert read_card(file, "photo") is None


def test_one_card_holds_a_profile_for_every_base(file: Path) -> None:
    write_card(file, profile([1.0], base="anime"))
    write_card(file, profile([2.0], base="photo"))
    write_card(file, profile([3.0], base="anime"))
    for base, norm in (("anime", 3.0), ("photo", 2.0), (None, 3.0)):
        found = read_card(file, base)
        assert found is not None
        assert found.norm == (norm,)


def test_a_new_version_of_the_file_drops_the_old_profiles(file: Path) -> None:
    write_card(file, profile([1.0], base="anime"))
    file.write_bytes(b"other weights")
    write_card(file, profile([2.0], base="photo"))
    with pytest.warns(StaleCard, match="on base model photo, not on anime"):
        assert read_card(file, "anime") is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"profiles": 3}',
        '{"profiles": [{"lora": "", "base": ""}]}',
        json.dumps(
            {"profiles": [{"lora": "", "base": "", "fractions": [0], "ratio": [], "norm": []}]}
        ),
        '{"profiles": [{"lora": "", "base": "", "fractions": [0], "ratio": [NaN], "norm": [1]}]}',
        '{"profiles": [{"lora": "", "base": "", "fractions": "x", "ratio": "x", "norm": "x"}]}',
    ],
)
def test_a_broken_card_is_reported_and_replaced(file: Path, text: str) -> None:
    card_path(file).write_text(text)
    with pytest.warns(StaleCard, match="is not a profile card"):
        assert read_card(file, "base") is None
    write_card(file, profile([1.0]))
    assert read_card(file, "base") is not None


def test_a_card_for_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CmloraError, match="no file"):
        write_card(tmp_path / "missing.safetensors", profile([1.0]))
