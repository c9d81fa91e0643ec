"""Prompts that every LoRA reads with its own text encoders."""

import functools
from typing import Any

import pytest
import torch

from cmlora.compose import compose
from cmlora.errors import CmloraError
from cmlora.prompts import Prompts
from cmlora.switching import AdapterSwitch
from tests import tiny
from tests.composing import NAMES, assert_near, average, pipeline, plain, state
from tests.families import embedding


@pytest.fixture(params=["sd15", "sdxl"])
def loaded(request: pytest.FixtureRequest) -> Any:
    return pipeline(request.param)


run = functools.partial(tiny.run, steps=2)


def encodings(pipe: Any, name: str) -> dict[str, torch.Tensor]:
    """What the denoiser gets for the prompt if only one LoRA is there: negative half first."""
    pipe.set_adapters([name])
    with torch.no_grad():
        encoded = pipe.encode_prompt(
            prompt="a cat", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
        )
    found = {"states": torch.cat([encoded[1], encoded[0]])}
    if len(encoded) > 2:
        found["pooled"] = torch.cat([encoded[3], encoded[2]])
    return found


def loop_over_loras(pipe: Any) -> torch.Tensor:
    """Composite with separate embeddings, as a plain loop inside the denoiser call."""
    known = {name: encodings(pipe, name) for name in NAMES}
    forward = pipe.unet.forward

    @functools.wraps(forward)
    def looped(*args: Any, **kwargs: Any) -> Any:
        outputs = []
        for name in NAMES:
            pipe.unet.set_adapters([name])
            own = {**kwargs, "encoder_hidden_states": known[name]["states"]}
            if "pooled" in known[name]:
                pooled = {"text_embeds": known[name]["pooled"]}
                own["added_cond_kwargs"] = {**kwargs["added_cond_kwargs"], **pooled}
            outputs.append(forward(*args, **own)[0])
        return (torch.stack(outputs).mean(0),)

    pipe.unet.forward = looped
    try:
        return run(pipe)
    finally:
        del pipe.unet.forward


def test_every_lora_reads_the_prompt_itself(loaded: Any) -> None:
    expected = loop_over_loras(loaded)
    before = state(loaded)
    with compose(loaded, NAMES, method=average, text_encoder="per_lora"):
        first = run(loaded)
        other = run(loaded, prompt="two dogs")
        again = run(loaded)
    assert_near(first, expected)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-3)
    with compose(loaded, NAMES, method=average, text_encoder="all"):
        assert not torch.allclose(run(loaded), first, atol=1e-3)
    assert state(loaded) == before
    assert "encode_prompt" not in vars(loaded)


def test_one_lora_reads_as_in_plain_diffusers(loaded: Any) -> None:
    expected = plain(loaded, "ink", 0.7, steps=2)
    with compose(loaded, {"ink": 0.7}, method=average, text_encoder="per_lora"):
        assert torch.equal(run(loaded), expected)


def test_several_pictures_and_prompts(loaded: Any) -> None:
    noise = tiny.latents(2)
    prompts = ["a cat", "two dogs"]
    with compose(loaded, NAMES, method=average, text_encoder="per_lora", cache="uniform:2"):
        both = run(loaded, prompt=prompts, latents=noise)
        alone = [run(loaded, prompt=p, latents=noise[i : i + 1]) for i, p in enumerate(prompts)]
    torch.testing.assert_close(both, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_text_encoders_have_strengths_of_their_own() -> None:
    pipe = pipeline("sd15")
    with compose(pipe, {"ink": 0.5}, method=average, text_weights={"ink": 0.0}):
        silent = run(pipe)
    with compose(pipe, {"ink": 0.5}, method=average, text_encoder="none"):
        assert torch.equal(run(pipe), silent)
    with pytest.raises(CmloraError, match="text_weights: unknown LoRA 'inc'; did you mean ink"):
        compose(pipe, ["ink"], text_weights={"inc": 1.0})


def test_loras_without_text_encoders_change_nothing() -> None:
    pipe = tiny.sd15()
    tiny.add_loras(pipe, NAMES)
    results = []
    for text_encoder in ("all", "per_lora"):
        with compose(pipe, NAMES, method=average, text_encoder=text_encoder):
            results.append(run(pipe))
    assert torch.equal(*results)


class Lists:
    """A pipeline whose embeddings are lists of one tensor per prompt, as Z-Image's are."""

    def __init__(self) -> None:
        self.text_encoder = tiny.text_encoder()
        tiny.adapt(self.text_encoder, NAMES, tiny.TEXT_TARGETS)
        self.text_encoder.requires_grad_(False)

    def encode_prompt(self, lengths: tuple[int, ...]) -> list[torch.Tensor]:
        return [self.text_encoder(torch.arange(n)[None] + 5)[0][0] for n in lengths]


@torch.no_grad()
def test_lists_of_embeddings() -> None:
    pipe = Lists()
    prompts = Prompts(pipe, [AdapterSwitch(pipe.text_encoder)], dict.fromkeys(NAMES, 1.0))
    prompts.attach()
    given = pipe.encode_prompt((3, 4))
    picture = embedding(1, 3)
    exchanged = prompts.arguments(["ink"], {"x": [picture], "cap_feats": given * 2})
    prompts.detach()
    AdapterSwitch(pipe.text_encoder).activate({"ink": 1.0})
    own = pipe.encode_prompt((3, 4))
    assert exchanged["x"][0] is picture
    for value, expected in zip(exchanged["cap_feats"], own * 2, strict=True):
        assert torch.equal(value, expected)
        assert not torch.allclose(value, given[0][:1])


def test_embeddings_that_cannot_be_found_are_named() -> None:
    pipe = pipeline("sd15")

    def doubled(step_pipe: Any, index: int, _: Any, values: dict[str, Any]) -> dict[str, Any]:
        return {**values, "prompt_embeds": values["prompt_embeds"] * 2}

    with (
        compose(pipe, NAMES, method=average, text_encoder="per_lora"),
        pytest.raises(CmloraError, match="changes its embeddings"),
    ):
        run(
            pipe,
            callback_on_step_end=doubled,
            callback_on_step_end_tensor_inputs=["prompt_embeds"],
        )
