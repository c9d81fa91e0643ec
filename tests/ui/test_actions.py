"""Orders become pictures that are their recipes' and nobody else's; work can be stopped."""

import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from cmlora.errors import CmloraError
from cmlora.pipelines.render import Wish, assemble, render, write_recipe
from cmlora.recipe import from_png, image_seed, save_png
from cmlora.ui.actions import generate, replay
from cmlora.ui.jobs import Progress, Stopped, Ticket
from cmlora.ui.studio import Studio
from tests.ui.working import made, order, pictures


def _pixels(path: Path) -> bytes:
    with Image.open(path) as picture:
        return picture.convert("RGB").tobytes()


def test_a_picture_is_what_the_library_makes_of_the_same_wish(
    warm: Studio, model_folder: Path, lora_folder: Path
) -> None:
    made(warm, loras={"ink": 0.5}, prompt="the ink", seed=1)  # what ran before has no part in it
    (picture,) = made(warm)

    pipe = assemble(model_folder, [("cat", 1.0), ("hat", 0.8)], folder=lora_folder)
    drawn: dict[str, Any] = {"execution": "fused", "threads": picture.recipe.threads}
    wish = Wish("the cat, the hat", steps=3, seed=7, **drawn)
    alone = render(pipe, write_recipe(pipe, wish))

    assert _pixels(picture.path) == alone.image.tobytes()
    assert from_png(picture.path) == picture.recipe
    assert picture.recipe.model == "tiny"  # and not where the model is on this machine
    assert str(model_folder) not in picture.path.read_bytes().decode("latin-1")


def test_loras_are_fused_where_strengths_stay(warm: Studio) -> None:
    (constant,), (changing,) = made(warm), made(warm, schedule="<lora:cat:0@0,1@1>")
    assert (constant.recipe.execution, changing.recipe.execution) == ("fused", "sequential")


def test_pictures_of_a_batch_have_seeds_of_their_own(warm: Studio) -> None:
    both = made(warm, pictures=2)
    alone = made(warm, seed=7)
    assert [p.recipe.image_seed() for p in both] == [7, image_seed(7, 1)]
    assert _pixels(both[0].path) == _pixels(alone[0].path)
    assert _pixels(both[0].path) != _pixels(both[1].path)


def test_progress_counts_every_step_and_shows_previews(warm: Studio) -> None:
    events = list(generate(warm, order(pictures=2), Ticket()))
    told = [event for event in events if isinstance(event, Progress)]
    assert [event.done for event in told if event.seconds_left is not None] == [1, 2, 3, 4, 5, 6]
    assert {event.total for event in told} == {6}
    assert told[-1].seconds_left == 0
    assert any(event.preview.startswith("data:image/png;base64,") for event in told)


def test_watching_changes_no_bit(warm: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cmlora.ui.actions._PREVIEW_EVERY", 0.0)
    monkeypatch.setattr("cmlora.ui.actions._PREVIEW_SHARE", 0)
    (watched,) = made(warm, sampler="Euler a")
    monkeypatch.setattr("cmlora.ui.actions._PREVIEW_EVERY", 1e9)
    (unwatched,) = made(warm, sampler="Euler a")
    assert _pixels(watched.path) == _pixels(unwatched.path)
    assert watched.recipe.scheduler == "EulerAncestralDiscreteScheduler"


def test_stopping_ends_inside_a_pass_and_the_next_picture_is_right(warm: Studio) -> None:
    (before,) = made(warm)
    unet = warm.loaded("tiny").unet  # type: ignore[union-attr]
    hooks = [len(module._forward_pre_hooks) for module in unet.modules()]
    ticket = Ticket()
    calls = 0

    def stop_in_the_middle(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            ticket.stop()

    handle = unet.down_blocks[1].register_forward_pre_hook(stop_in_the_middle)
    events = generate(warm, order(steps=20), ticket)
    try:
        with pytest.raises(Stopped):
            list(events)
    finally:
        handle.remove()

    assert calls == 2  # the second pass was not carried through, let alone the other steps
    assert [len(module._forward_pre_hooks) for module in unet.modules()] == hooks
    (after,) = made(warm)
    assert _pixels(after.path) == _pixels(before.path)


def test_work_that_nobody_listens_to_is_stopped(warm: Studio) -> None:
    ticket = Ticket()
    events = generate(warm, order(steps=100), ticket)
    next(events)
    events.close()  # type: ignore[attr-defined]
    assert ticket.stopped
    assert not [thread for thread in threading.enumerate() if thread.name == "cmlora-work"]


def test_a_visitor_stops_only_their_own_work(warm: Studio) -> None:
    with warm.tickets.take("me") as mine, warm.tickets.take("you") as yours:
        assert warm.tickets.stop("me") == 1
        assert mine.stopped
        assert not yours.stopped
    assert warm.tickets.stop("me") == 0


def test_what_still_waits_can_be_withdrawn(warm: Studio) -> None:
    number = warm.tickets.ask("me")
    warm.tickets.stop("me")
    later = warm.tickets.ask("me")
    with warm.tickets.take("me", number) as ticket, pytest.raises(Stopped):
        list(generate(warm, order(), ticket))
    with warm.tickets.take("me", later) as ticket:
        assert not ticket.stopped


def test_a_failure_in_the_model_leaves_it_usable(warm: Studio) -> None:
    (before,) = made(warm)
    unet = warm.loaded("tiny").unet  # type: ignore[union-attr]

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    handle = unet.mid_block.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        made(warm, seed=8)
    handle.remove()
    (after,) = made(warm)
    assert _pixels(after.path) == _pixels(before.path)


def test_lora_tags_in_the_prompt_select_and_weigh(warm: Studio) -> None:
    (tagged,) = made(warm, prompt="the cat, the hat <lora:cat:1> <lora:hat:0.8>", loras={})
    (chosen,) = made(warm)
    assert tagged.recipe == chosen.recipe


def test_the_prompt_defaults_to_the_trigger_words(warm: Studio) -> None:
    (picture,) = made(warm, prompt="")
    assert picture.recipe.prompt == "the cat, the hat"


def test_a_picture_comes_back_from_its_file(studio: Studio, tmp_path: Path) -> None:
    (picture,) = made(studio, sampler="DPM++ 2M", pictures=2, method="switch")[1:]
    dropped = tmp_path / "dropped.png"
    shutil.copy(picture.path, dropped)
    picture.path.unlink()

    (again,) = pictures(replay(studio, dropped, "tiny", Ticket()))

    assert again.path.read_bytes() == dropped.read_bytes()


def test_a_recipe_opens_nothing_by_name(studio: Studio, tmp_path: Path) -> None:
    (picture,) = made(studio)
    image = Image.open(picture.path)
    secret = tmp_path / "secret"
    foreign = tmp_path / "foreign.png"
    save_png(image, foreign, replace(picture.recipe, model=str(secret), model_hash="0" * 64))
    with pytest.raises(CmloraError, match="another model"):
        list(replay(studio, foreign, "tiny", Ticket()))

    lora = replace(picture.recipe.loras[0], sha256="0" * 64)
    save_png(image, foreign, replace(picture.recipe, loras=(lora,)))
    with pytest.raises(CmloraError, match=r"LoRA cat.safetensors .* is not in the LoRA folders"):
        list(replay(studio, foreign, "tiny", Ticket()))

    levels = {**picture.recipe.scheduler_config, "num_train_timesteps": 10**12}
    save_png(image, foreign, replace(picture.recipe, scheduler_config=levels))
    with pytest.raises(CmloraError, match="impossible number of noise levels"):
        list(replay(studio, foreign, "tiny", Ticket()))

    for huge in ({"steps": 10**5}, {"width": 8 * 10**4}, {"guidance_scale": 1e9}):
        save_png(image, foreign, replace(picture.recipe, **huge))
        with pytest.raises(CmloraError, match="not between"):
            replay(studio, foreign, "tiny", Ticket())
    save_png(image, foreign, replace(picture.recipe, threads=256))
    with pytest.raises(CmloraError, match="threads are 256; this server allows 64"):
        replay(studio, foreign, "tiny", Ticket())
    image.save(foreign)
    with pytest.raises(CmloraError, match=r"^foreign.png holds no recipe"):
        replay(studio, foreign, "tiny", Ticket())


def test_mistakes_are_sentences(warm: Studio) -> None:
    for changes, message in (
        ({"loras": {"cta": 1.0}}, "there is no LoRA 'cta'; did you mean cat"),
        ({"model": "tony"}, "there is no model 'tony'; did you mean tiny"),
        ({"loras": {}}, "no LoRA is selected"),
        ({"loras": {}, "prompt": " ", "method": "naive"}, "say what to draw"),
        ({"method": "lorahub"}, "coefficients"),
        ({"width": 100, "height": 50}, "multiples of 8"),
        ({"prompt": "<lora:cat:much>"}, "'much' is not a number"),
        ({"options": {"tau": 3}}, "no option 'tau'"),
    ):
        with pytest.raises(CmloraError, match=message) as mistake:
            made(warm, **changes)
        assert "/" not in str(mistake.value)


def test_naive_needs_no_lora(warm: Studio) -> None:
    (picture,) = made(warm, loras={}, method="naive")
    assert picture.recipe.loras == ()


def test_a_changed_file_is_loaded_again(studio: Studio, lora_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    shutil.copy(lora_folder / "cat.safetensors", folder / "one.safetensors")
    studio = Studio(
        type(studio.settings)(
            models=studio.settings.models, loras=(folder,), out=studio.settings.out
        )
    )
    (first,) = made(studio, loras={"one": 1.0})
    shutil.copy(lora_folder / "hat.safetensors", folder / "one.safetensors")
    (second,) = made(studio, loras={"one": 1.0})
    assert first.recipe.loras[0].sha256 != second.recipe.loras[0].sha256
    assert _pixels(first.path) != _pixels(second.path)


def test_strengths_are_those_of_the_order(warm: Studio) -> None:
    (strong,) = made(warm, loras={"cat": 2.0})
    (weak,) = made(warm, loras={"cat": 0.1})
    assert strong.recipe.loras[0].weight == 2.0
    assert weak.recipe.loras[0].weight == 0.1
    assert _pixels(strong.path) != _pixels(weak.path)


def test_torch_is_not_left_with_other_random_numbers(warm: Studio) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    made(warm)
    assert torch.equal(torch.rand(1), expected)
