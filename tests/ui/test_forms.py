"""Fields become orders and recipes become fields; what a model suits is read without loading it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from cmlora.cli.app import app
from cmlora.errors import CmloraError
from cmlora.recipe import Ingredient, Recipe, save_png
from cmlora.ui.actions import Picture, asked_again
from cmlora.ui.forms import FIELDS, order_of, read_selection
from cmlora.ui.natives import natives, natives_or_guess
from cmlora.ui.order import Order
from cmlora.ui.panels import lora_list, method_note, recipe_panel, stage, summary
from cmlora.ui.previews import Previewer
from cmlora.ui.studio import Studio
from tests import tiny
from tests.ui.working import made

_VALUES = {
    "model": "tiny",
    "loras": '{"cat": 0.5}',
    "prompt": "a cat",
    "negative_prompt": None,
    "method": "switch",
    "options": "tau=3",
    "cache": " none ",
    "sampler": "DDIM",
    "steps": 12.0,
    "guidance": 4,
    "width": None,
    "height": 0,
    "seed": None,
    "pictures": 2,
    "schedule": None,
    "everywhere": ["cat"],
}


def test_fields_become_an_order() -> None:
    assert order_of(*(_VALUES[name] for name in FIELDS)) == Order(
        model="tiny",
        prompt="a cat",
        loras={"cat": 0.5},
        method="switch",
        options={"tau": "3"},
        cache="none",
        sampler="DDIM",
        steps=12,
        guidance=4,
        pictures=2,
        scopes={"cat": "global"},
    )


def test_a_recipe_fills_the_fields_that_make_it_again(warm: Studio) -> None:
    (picture,) = made(warm, method="switch", options={"tau": "2"}, sampler="Euler")
    fields = asked_again(warm, picture.path, "tiny") | {"model": "tiny"}
    assert fields["loras"] == {"cat": 1.0, "hat": 0.8}
    (again,) = made(warm, **vars(order_of(*(fields[name] for name in FIELDS))))
    assert again.recipe == picture.recipe


@pytest.mark.parametrize("text", ["[", "[]", "3", '{"cat": "1"}', '{"cat": NaN}', "[" * 10**5])
def test_a_selection_is_a_table_of_numbers(text: str) -> None:
    with pytest.raises(CmloraError, match="selection"):
        read_selection(text)


def test_what_suits_a_model_is_what_the_pipeline_says(warm: Studio) -> None:
    found = natives(warm, "tiny")
    assert (found.size, found.scale, found.tokens) == ((32, 32), 2, 16)
    assert found.unet is not None
    (picture,) = made(warm)
    assert (picture.recipe.width, picture.recipe.height) == found.size
    assert natives_or_guess(warm, "nothing").size is None


def test_previews_reach_the_picture(warm: Studio) -> None:
    """The last preview is the finished picture, and earlier ones come nearer to it."""
    import torch

    pipe = tiny.sd15()
    previewer, distances = Previewer(pipe), []
    kept = []

    def look(_: object, index: int, __: object, values: dict[str, Any]) -> dict[str, Any]:
        kept.append(previewer.see(index, values["latents"]))
        return values

    generator = torch.Generator().manual_seed(1)
    final = pipe(
        "a cat",
        num_inference_steps=6,
        generator=generator,
        height=32,
        width=32,
        callback_on_step_end=look,
    ).images[0]
    for image in kept:
        assert image is not None
        pairs = zip(image.tobytes(), final.tobytes(), strict=True)
        distances.append(sum(abs(a - b) for a, b in pairs))
    assert distances[-1] <= len(final.tobytes())  # rounding
    assert distances[-1] < distances[1]


def test_panels_say_what_was_made(warm: Studio) -> None:
    (picture,) = made(warm, steps=6)
    page = recipe_panel(picture.recipe, summary(picture))
    for words in ("the cat, the hat", "cmlora", "nonuniform", "full passes", "light", "MACs"):
        assert words in page
    assert "tau" in method_note("switch")
    evil = Recipe("<b>", "<i>", 1, 1, 8, 8, loras=(Ingredient("<u>"),))
    for tag in ("<b>m", "<i>", "<u>"):
        assert tag not in recipe_panel(evil)
    assert 'role="alert"' in stage(words="no", kind="error")
    assert "No LoRA files" in lora_list([], {})
    assert isinstance(picture, Picture)


def test_the_command_refuses_mistakes_in_one_line(tmp_path: Path) -> None:
    for arguments, words in (
        (["--port", "0"], "--port 0"),
        (["--auth", "me"], "expected NAME:PASSWORD"),
        (["--loras", str(tmp_path / "nothing")], "no such file or folder"),
    ):
        result = CliRunner().invoke(app, ["ui", "--out", str(tmp_path), *arguments])
        assert result.exit_code == 2
        assert words in " ".join(result.stderr.split())
        assert "Traceback" not in result.output


def test_what_acts_on_the_whole_picture_is_of_one_request(warm: Studio) -> None:
    def drawn(**changes: Any) -> Any:
        (picture,) = made(warm, method="gate", **changes)
        return picture.recipe, picture.path, Image.open(picture.path).tobytes()

    recipe, path, wide = drawn(scopes={"cat": "global"})
    assert {lora.name: lora.scope for lora in recipe.loras} == {"cat": "global", "hat": None}
    assert asked_again(warm, path, "tiny")["everywhere"] == ["cat"]
    plain, _, narrow = drawn()
    assert {lora.scope for lora in plain.loras} == {None}
    assert wide != narrow
    assert drawn(scopes={"hat": "local", "cat": "local"})[2] == narrow
    with pytest.raises(CmloraError, match="no LoRA 'dog'"):
        made(warm, scopes={"dog": "global"})


def test_settings_of_another_model_or_of_missing_loras_are_refused(
    warm: Studio, tmp_path: Path
) -> None:
    (picture,) = made(warm)
    with pytest.raises(CmloraError, match="made with tiny; select that model first"):
        asked_again(warm, picture.path, "emoji")
    foreign = tmp_path / "foreign.png"
    loras = tuple(replace(lora, sha256="0" * 64) for lora in picture.recipe.loras)
    save_png(Image.open(picture.path), foreign, replace(picture.recipe, loras=loras))
    with pytest.raises(CmloraError, match="is not in the LoRA folders"):
        asked_again(warm, foreign, "tiny")
