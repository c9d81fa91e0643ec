"""Options: names, kinds, limits, and the texts of the command line."""

import math
from typing import Any

import pytest

from cmlora.errors import CmloraError
from cmlora.strategies import METHODS, check_options
from cmlora.strategies.options import defaults


@pytest.mark.parametrize("method", METHODS)
def test_the_defaults_of_every_method_are_valid_and_stay_what_they_are(method: str) -> None:
    known = defaults(METHODS[method].object)
    assert check_options(method, known) == known


@pytest.mark.parametrize("method", METHODS)
def test_the_defaults_of_every_method_can_be_written_as_text(method: str) -> None:
    known = defaults(METHODS[method].object)
    texts = {name: str(value).lower() for name, value in known.items()}
    assert check_options(method, texts) == known


@pytest.mark.parametrize(
    ("method", "option", "value", "expected"),
    [
        ("switch", "tau", "3", 3),
        ("switch", "tau", 3.0, 3),
        ("select", "sharpness", "1e1", 10.0),
        ("select", "strength", 2, 2.0),
        ("cmlora", "max_age", "none", None),
        ("cmlora", "max_age", None, None),
        ("cmlora", "decay", "true", True),
        ("cmlora", "decay", "0.25", 0.25),
        ("cmlora", "decay", False, False),
        ("cmlora", "order", "low_first", "low_first"),
        ("lorahub", "coefficients", "0.5, -1,2", (0.5, -1.0, 2.0)),
        ("lorahub", "coefficients", [1, 2], (1.0, 2.0)),
        ("lorahub", "coefficients", "1", (1.0,)),
    ],
)
def test_values_and_texts_are_read(method: str, option: str, value: Any, expected: Any) -> None:
    found = check_options(method, {option: value})[option]
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("method", "option", "value", "message"),
    [
        ("switch", "tau", 0, "a whole number, 1 or more"),
        ("switch", "tau", 2.5, "a whole number"),
        ("switch", "tau", True, "a whole number"),
        ("switch", "tau", "many", "a whole number"),
        ("switch", "tau", None, "a whole number"),
        ("switch", "tau", math.inf, "a whole number"),
        ("switch_a", "late", 1.5, "a number, 0 to 1"),
        ("switch_a", "late", math.nan, "a number"),
        ("switch_a", "order", "alphabetical", "'measured' or 'high_first' or 'low_first'"),
        ("cmlora", "mode", "fast", "'paper' or 'released'"),
        ("cmlora", "decay", -0.5, "true or false or a number, 0 to 1"),
        ("cmlora", "dominance", "big", "a number or none, 0 or more"),
        ("lorahub", "coefficients", "1,x", "numbers separated by commas or none"),
        ("lorahub", "coefficients", 3, "separated by commas"),
    ],
)
def test_a_wrong_value_names_what_was_expected(
    method: str, option: str, value: Any, message: str
) -> None:
    with pytest.raises(CmloraError, match=f"{method}: {option} is ") as caught:
        check_options(method, {option: value})
    assert message in str(caught.value)
    assert "default" in str(caught.value)


def test_a_near_name_is_suggested() -> None:
    with pytest.raises(CmloraError, match="did you mean tau"):
        check_options("switch", {"taw": 3})
    with pytest.raises(CmloraError, match="it has no options"):
        check_options("merge", {"tau": 3})
