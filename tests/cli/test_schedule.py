"""`cmlora schedule`: shown step by step, and written for other programs."""

import json

import pytest
from typer.testing import CliRunner

from cmlora.cli.app import app

runner = CliRunner()


def answer(*arguments: str) -> str:
    result = runner.invoke(app, ["schedule", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_strengths_are_shown_step_by_step() -> None:
    rows = json.loads(answer("<lora:ink:0@0,1@0.5>", "--lora", "ink:0.5", "--steps", "4", "--json"))
    assert [row["ink"] for row in rows["steps"]] == [0.0, 0.25, 0.5, 0.5]
    assert "0.25" in answer("<lora:ink:0@0,1@0.5>", "--lora", "ink:0.5", "--steps", "4")
    blocks = json.loads(answer("<lora:ink:0.5:blocks=down>", "--steps", "1", "--json"))
    assert blocks["steps"] == [{"ink": [["down", 0.5], [".", 1.0]]}]


@pytest.mark.parametrize(
    ("to", "expected"),
    [
        ("loractl", "<lora:ink:te=1:unet=1@0,1@0.5,0@0.5>"),
        ("prompt-control", "[<lora:ink:1>::0.5]"),
        ("diffusers", "set_strengths"),
    ],
)
def test_it_is_written_for_other_programs(to: str, expected: str) -> None:
    assert expected in answer("[<lora:ink:1>::0.5]", "--to", to)
    assert expected in json.loads(answer("[<lora:ink:1>::0.5]", "--to", to, "--json"))["text"]


@pytest.mark.parametrize("to", ["loractl", "prompt-control", "a1111"])
def test_a_name_between_colons_stays_a_name(to: str) -> None:
    text = "<lora:cat:0.3>" if to == "a1111" else "<lora:cat:0@0,1@0.3>"
    assert "<lora:cat:" in answer(text, "--to", to)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("<lora:ink:x>",), "character 11: 'x' is not a number"),
        (("<lora:ink:1>", "--to", "word"), "loractl, prompt-control, a1111 or diffusers"),
        (("<lora:ink:0@0,1@1>", "--to", "a1111"), "one strength for the whole run"),
        (("<lora:ink:1>", "--steps", "0"), "at least 1"),
        (("<lora:ink:1>", "--order", "unet"), "te:unet or unet:te"),
    ],
)
def test_mistakes_are_one_line(arguments: tuple[str, ...], message: str) -> None:
    result = runner.invoke(app, ["schedule", *arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
