"""`compose` computes what it says, and names mistakes."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from cmlora.caching.policy import tally
from cmlora.compose import compose
from cmlora.errors import CmloraError
from cmlora.plan import Member
from cmlora.strategies import METHODS, schedule
from tests import tiny
from tests.composing import NAMES, assert_near, average, freeze, pipeline, plain, state, together


@pytest.fixture(params=["sd15", "sdxl"])
def loaded(request: pytest.FixtureRequest) -> Any:
    return pipeline(request.param)


@pytest.fixture
def sd15() -> Any:
    return pipeline("sd15")


@pytest.mark.parametrize("weight", [1.0, 0.7])
def test_one_lora_is_plain_diffusers(loaded: Any, weight: float) -> None:
    expected = plain(loaded, "ink", weight)
    loaded.set_adapters(["alice", "forest"])
    with compose(loaded, {"ink": weight}, method=average):
        composed = tiny.run(loaded)
    assert torch.equal(composed, expected)


def test_all_loras_in_one_pass_is_set_adapters(loaded: Any) -> None:
    weights = {"ink": 0.6, "alice": 0.8, "forest": 0.3}
    loaded.set_adapters(sorted(weights), [weights[name] for name in sorted(weights)])
    freeze(loaded)
    expected = tiny.run(loaded)
    with compose(loaded, weights, method=together):
        composed = tiny.run(loaded)
    assert torch.equal(composed, expected)


def test_dictionaries_of_weights_are_no_trap(sd15: Any) -> None:
    # diffusers itself gives only the first adapter its component weight
    sd15.set_adapters(["ink", "alice"], [{"unet": 0.3}, {"unet": 0.3}])
    with compose(sd15, {"ink": 0.3, "alice": 0.3}, method=together, text_encoder="none"):
        composed = tiny.run(sd15)
        scales = {
            module.scaling[name]
            for module in sd15.unet.modules()
            if isinstance(module, BaseTunerLayer)
            for name in ("ink", "alice")
        }
    assert scales == {0.3 * 3 / 4}
    assert torch.isfinite(composed).all()


def reference_average(
    pipe: Any, weights: dict[str, float], steps: int = 4, **options: Any
) -> torch.Tensor:
    """Composite written as a plain loop over single-LoRA calls inside the denoiser call."""
    with averaging(pipe, weights):
        return tiny.run(pipe, steps=steps, **options)


@contextmanager
def averaging(pipe: Any, weights: dict[str, float]) -> Iterator[None]:
    """Within the context the denoiser is a plain loop over single LoRAs."""
    forward = pipe.unet.forward

    @functools.wraps(forward)
    def looped(*args: Any, **kwargs: Any) -> Any:
        outputs = []
        for name, weight in weights.items():
            pipe.unet.set_adapters([name], [weight])
            outputs.append(forward(*args, **kwargs)[0])
        return (torch.stack(outputs).mean(0),)

    for encoder in ("text_encoder", "text_encoder_2"):
        if getattr(pipe, encoder, None) is not None:
            for module in getattr(pipe, encoder).modules():
                if isinstance(module, BaseTunerLayer):
                    module.set_adapter(sorted(weights))
                    for name, weight in weights.items():
                        module.set_scale(name, weight)
    pipe.unet.forward = looped
    try:
        yield
    finally:
        del pipe.unet.forward


def test_composite_is_the_mean_of_single_lora_calls(loaded: Any) -> None:
    weights = {"ink": 1.0, "alice": 0.8, "forest": 0.5}
    expected = reference_average(loaded, weights)
    with compose(loaded, weights, method=average):
        composed = tiny.run(loaded)
    assert_near(composed, expected)


def test_one_hot_shares_are_a_switch(loaded: Any) -> None:
    with compose(loaded, ["alice"], method=average, text_encoder="none"):
        alone = tiny.run(loaded)
    with compose(loaded, NAMES, method=average, shares=(0.0, 1.0, 0.0), text_encoder="none"):
        composed = tiny.run(loaded)
    assert torch.equal(alone, composed)


def test_strengths_of_zero_are_the_base_model(loaded: Any) -> None:
    loaded.disable_lora()
    expected = tiny.run(loaded)
    loaded.enable_lora()
    for method in (average, together):
        with compose(loaded, dict.fromkeys(NAMES, 0.0), method=method):
            composed = tiny.run(loaded)
        torch.testing.assert_close(
            composed, expected, rtol=0, atol=2e-6 * float(expected.abs().max())
        )


@pytest.mark.parametrize("method", ["merge", "switch", "composite", "select", "cmlora", "auto"])
def test_a_strength_of_zero_is_no_part(sd15: Any, method: str) -> None:
    options: dict[str, Any] = {"method": method, "cache": "uniform:2"}
    with compose(sd15, {"ink": 1.0, "forest": 0.8}, **options) as two:
        expected = tiny.run(sd15, steps=4)
    with compose(sd15, {"ink": 1.0, "alice": 0.0, "forest": 0.8}, **options) as three:
        assert torch.equal(tiny.run(sd15, steps=4), expected)
    assert three.report.full == two.report.full


def test_auto_counts_what_takes_part(sd15: Any) -> None:
    weights = {"ink": 1.0, "alice": 0.0}
    with compose(sd15, weights, method="auto", plain=False, budget=3.0) as composition:
        tiny.run(sd15, steps=2)
        assert composition.reason.startswith("merge: a single LoRA")
    assert composition.report.full == {"ink": 2}
    with compose(sd15, dict.fromkeys(weights, 0.0), method="auto") as composition:
        tiny.run(sd15, steps=2)
    assert (composition.report.full, composition.reason) == ({"base": 2}, "")


@pytest.mark.parametrize("text_encoder", ["all", "none", "per_lora"])
def test_a_lora_of_the_text_encoder_has_a_pass_for_its_own_embeddings(text_encoder: Any) -> None:
    pipe = tiny.sd15()
    tiny.add_loras(pipe, ["ink"], text=True)
    tiny.adapt(pipe.text_encoder, ["words"], tiny.TEXT_TARGETS)
    with compose(
        pipe, ["ink", "words"], method="composite", text_encoder=text_encoder
    ) as composition:
        tiny.run(pipe, steps=2)
    passes = composition.report.full
    assert passes == ({"ink": 2, "words": 2} if text_encoder == "per_lora" else {"ink": 2})
    with compose(pipe, ["words"], method="composite", text_encoder=text_encoder) as composition:
        tiny.run(pipe, steps=2)
    assert composition.report.full == {"words" if text_encoder == "per_lora" else "base": 2}


@pytest.mark.parametrize(("steps", "cache"), [(8, "none"), (8, "uniform:4"), (12, "none")])
def test_what_auto_chose_for_more_steps_is_not_reused_in_few(steps: int, cache: str) -> None:
    pipe = pipeline("sd15")
    with compose(pipe, ["ink", "alice"], method="auto", plain=False, cache=cache) as composition:
        tiny.run(pipe, steps=steps)
        assert composition.reason.startswith("merge" if steps == 8 else "select with uniform:2")
    assert bool(composition.report.light) == (steps == 12 or cache != "none")


@pytest.mark.parametrize(("method", "cache"), [("merge", "none"), ("cmlora", "uniform:2")])
def test_order_of_loading_changes_no_bit(method: str, cache: str) -> None:
    results = []
    for names in (NAMES, NAMES[::-1]):
        pipe = tiny.sd15()
        tiny.add_loras(pipe, names, text=True)
        with compose(pipe, NAMES, method=method, cache=cache):
            results.append(tiny.run(pipe))
    assert torch.equal(*results)


@pytest.mark.parametrize("method", [n for n in METHODS if n not in ("lorahub", "klora")])
def test_every_method_runs_what_it_plans(sd15: Any, method: str) -> None:
    with compose(sd15, NAMES, method=method, cache="nonuniform") as composition:
        result = tiny.run(sd15, steps=6)
    planned = tally(schedule(method, [Member(n) for n in NAMES], 6, "nonuniform"))
    assert torch.isfinite(result).all()
    assert composition.report.full == dict(planned.full)
    assert composition.report.light == dict(planned.light)


def test_naive_is_the_base_model_with_or_without_names(sd15: Any) -> None:
    sd15.disable_lora()
    expected = tiny.run(sd15)
    sd15.enable_lora()
    nobody: tuple[str, ...] = ()
    for loras in (nobody, NAMES):
        with compose(sd15, loras, method="naive"):
            assert_near(tiny.run(sd15), expected)


@pytest.mark.parametrize(
    ("loras", "options", "message"),
    [
        (["ink"], {"method": "compsite"}, "did you mean composite"),
        (["ink"], {"method": "switch", "tua": 3}, "tua"),
        (["alcie"], {}, r"unknown LoRA 'alcie'; did you mean alice\? loaded: alice, forest, ink"),
        (["zz"], {}, r"unknown LoRA 'zz'; loaded: alice, forest, ink"),
        (["ink", "ink"], {}, "ink: listed more than once"),
        ("ink", {}, "expected a list of names"),
        ([], {}, "no LoRAs to compose; name some of those that are loaded"),
        ({"ink": float("nan")}, {}, "ink: weight nan is not finite"),
        ({"ink": float("inf")}, {}, "ink: weight inf is not finite"),
        ({"ink": "1"}, {}, "ink: weight '1' is not a number"),
        ({"ink": True}, {}, "ink: weight True is not a number"),
        (["ink"], {"roles": {"ink": "loud"}}, "role 'loud'; expected 'high' or 'low'"),
        (["ink"], {"roles": {"alice": "low"}}, "roles: unknown LoRA 'alice'; composed: ink"),
        (["ink"], {"members": [Member("alice")]}, "members describe alice, but loras are ink"),
        (["ink"], {"text_encoder": "some"}, "expected 'all', 'none' or 'per_lora'"),
        (["ink"], {"cache": "uniform:2", "cut": (0, 7)}, r"possible .*: \(0, -1\), \(0, 0\)"),
    ],
)
def test_mistakes_are_named(sd15: Any, loras: Any, options: dict[str, Any], message: str) -> None:
    before = state(sd15)
    with pytest.raises(CmloraError, match=message):
        compose(sd15, loras, **{"method": average} | options)
    assert state(sd15) == before


def test_mistakes_about_the_pipeline_are_named(sd15: Any) -> None:
    with pytest.raises(CmloraError, match="the pipeline has no LoRAs loaded"):
        compose(tiny.sd15(), ["ink"], method=average)
    with pytest.raises(CmloraError, match="none are loaded"):
        compose(tiny.sd15(), [], method=average)
    with pytest.raises(CmloraError, match="has no unet or transformer"):
        compose(object(), ["ink"], method=average)
