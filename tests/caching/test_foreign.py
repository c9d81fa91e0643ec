"""diffusers' own caches under a composition: one state per LoRA, on and off without a trace."""

import json
from typing import Any

import diffusers.hooks
import pytest
import torch
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    ModelHook,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks.hooks import CacheContext
from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS

from cmlora import hooks
from cmlora.caching.contexts import Contexts
from cmlora.caching.foreign import NAMES as NAMES_OF_CACHES
from cmlora.caching.foreign import ForeignCache, canonical, is_config, named
from cmlora.caching.sea import picture
from cmlora.compose import compose
from cmlora.errors import CmloraError
from cmlora.pipelines.magnitudes import measure
from tests import families
from tests.composing import state
from tests.families import NAMES, Family

STEPS = 6
FIRST_BLOCK = FirstBlockCacheConfig(threshold=10.0)
TAYLOR = TaylorSeerCacheConfig(
    cache_interval=2, disable_cache_before_step=2, taylor_factors_dtype=torch.float32
)
MAG = MagCacheConfig(
    threshold=10.0, max_skip_steps=2, num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS
)
BROADCAST = PyramidAttentionBroadcastConfig(
    spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 1001)
)
FASTER = FasterCacheConfig(is_guidance_distilled=True, attention_weight_callback=lambda _: 0.3)
SEA = SeaCacheConfig(threshold=10.0)

CASES = [
    ("flux", FIRST_BLOCK),
    ("flux", TAYLOR),
    ("flux", MAG),
    ("flux", BROADCAST),
    ("flux", FASTER),
    ("qwen", FIRST_BLOCK),
    ("sd3", TAYLOR),
    ("zimage", BROADCAST),
    ("flux2", MAG),
    ("wan", SEA),
    ("wan", FASTER),
    ("flux", SEA),
    ("qwen", SEA),
    ("sd3", FASTER),
]


class Calls:
    """A denoiser's calls in a run whose input changes little from step to step."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.model = family.models()[0]
        self.given: dict[str, Any] = {}
        self.args: tuple[Any, ...] = ()
        handle = self.model.register_forward_pre_hook(self._note, with_kwargs=True)
        family.run(steps=4)
        handle.remove()
        self.timestep = 0.0

    def _note(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.given:
            self.args, self.given = args, kwargs

    @torch.no_grad()
    def run(self, *, context: bool) -> list[torch.Tensor]:
        """All outputs; with `context` the calls name the step, as some pipelines do."""
        scheduler = self.family.pipe.scheduler
        families.set_timesteps(scheduler, STEPS)
        outputs = []
        for number in range(STEPS):
            self.timestep = float(scheduler.timesteps[number])
            scheduler._step_index = number
            scale = 1 - 0.02 * number
            args, kwargs = list(self.args), dict(self.given)
            if args:
                args[0] = [each * scale for each in args[0]]
            else:
                kwargs["hidden_states"] = kwargs["hidden_states"] * scale
            named = CacheContext("cond", number, STEPS, sigma=float(scheduler.sigmas[number]))
            if context:
                with hooks.cache_context(self.model, named, None):
                    output = self.model(*args, **kwargs)[0]
            else:
                output = self.model(*args, **kwargs)[0]
            outputs.append(torch.stack(output) if isinstance(output, list) else output)
        return outputs

    def alone(self, name: str, config: Any) -> list[torch.Tensor]:
        """One LoRA, without a composition."""
        self.model.set_adapters([name])
        self.model.requires_grad_(False)
        if config is None:
            return self.run(context=True)
        cache = ForeignCache(self.model, config, lambda: self.timestep)
        try:
            return self.run(context=True)
        finally:
            cache.remove()


@pytest.mark.parametrize(("name", "config"), CASES, ids=lambda c: getattr(c, "__name__", None))
def test_every_lora_has_a_state_of_its_own(name: str, config: Any) -> None:
    calls = Calls(families.family(name))
    cached = [calls.alone(lora, config) for lora in NAMES]
    plain = [calls.alone(lora, None) for lora in NAMES]
    assert any(not torch.equal(a, b) for a, b in zip(cached[0], plain[0], strict=True))
    expected = [torch.stack(step).mean(0) for step in zip(*cached, strict=True)]
    before = state(calls.family.pipe)
    with compose(calls.family.pipe, NAMES, method="composite", cache=config):
        for context in (True, False):
            for step, output in enumerate(calls.run(context=context)):
                torch.testing.assert_close(
                    output, expected[step], rtol=1e-4, atol=1e-5, msg=f"step {step}, {context}"
                )
    assert state(calls.family.pipe) == before


def test_sea_sees_the_picture_alone() -> None:
    flux = families.family("flux")
    given = Calls(flux)
    found = picture(given.model, given.args, given.given)
    assert found is not None
    tokens = given.given["hidden_states"]
    side = int(tokens.shape[1] ** 0.5) * 2
    assert [each.shape for each in found] == [(tokens.shape[2] // 4, 1, side, side)]
    # reference pictures follow it, and have no part in the result
    ids, more = given.given["img_ids"], dict(given.given)
    more["hidden_states"] = torch.cat([tokens, tokens[:, :3]], 1)
    more["img_ids"] = torch.cat([ids, torch.tensor([[1, 0, 0], [1, 0, 1], [1, 0, 2]]).to(ids)])
    again = picture(given.model, (), more)
    assert again is not None
    assert torch.equal(again[0], found[0])


@pytest.mark.parametrize(
    "config", [FIRST_BLOCK, TAYLOR, MAG, BROADCAST, SEA, FASTER], ids=lambda c: type(c).__name__
)
def test_what_was_made_at_one_strength_does_not_serve_another(config: Any) -> None:
    calls = Calls(families.family("flux"))
    plain = calls.alone("ink", None)
    schedule = "[<lora:ink:0.1>:<lora:ink:1>:0.5]"
    with compose(calls.family.pipe, ["ink"], method="merge", schedule=schedule, cache=config):
        ours = calls.run(context=True)
    half = STEPS // 2
    torch.testing.assert_close(ours[half], plain[half], rtol=1e-4, atol=1e-5)


def test_a_whole_pipeline_with_a_cache_that_it_does_not_know() -> None:
    zimage = families.family("zimage")
    never = PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=1)
    with compose(zimage.pipe, NAMES, method="composite", cache=never):
        exact = zimage.run()
    with compose(zimage.pipe, NAMES, method="composite", cache=BROADCAST):
        assert not torch.allclose(zimage.run(), exact, atol=1e-4)
    with compose(zimage.pipe, NAMES, method="composite"):
        torch.testing.assert_close(zimage.run(), exact, rtol=1e-4, atol=1e-4)


def test_a_state_that_missed_a_step_is_dropped() -> None:
    calls = Calls(families.family("flux"))
    cache = ForeignCache(calls.model, TAYLOR, lambda: 0.0)
    try:
        contexts = Contexts(calls.model, besides=ModelHook())
        hook = next(hook for hook, _ in hooks.stateful_hooks(calls.model, besides=ModelHook()))
        seen = []
        for step in (0, 1, 4):
            with contexts.isolated({"ink": 1.0}, CacheContext("ink", step), None), torch.no_grad():
                calls.model(**calls.given)
                seen.append(hook.state_manager.get_state().current_step)
        assert seen == [0, 1, 0]
    finally:
        cache.remove()


def test_sharing_a_context_is_an_error() -> None:
    calls = Calls(families.family("flux"))
    cache = ForeignCache(calls.model, FIRST_BLOCK, lambda: 0.0)
    try:
        contexts = Contexts(calls.model, besides=ModelHook())
        with contexts.isolated({"ink": 1.0}, CacheContext("cond"), None):
            pass
        with (
            pytest.raises(CmloraError, match="LoRAs cannot share a cache"),
            contexts.isolated({"alice": 1.0}, CacheContext("cond"), None),
        ):
            pass
    finally:
        cache.remove()


def test_a_hook_whose_state_cannot_be_kept_apart_is_an_error() -> None:
    class Hoarder(ModelHook):  # type: ignore[misc]
        _is_stateful = True

        def reset_state(self, module: Any) -> Any:
            return module

    flux = families.family("flux")
    attached = hooks.Attachment(flux.models()[0], Hoarder(), "hoarder")
    try:
        with (
            compose(flux.pipe, NAMES, method="composite"),
            pytest.raises(CmloraError, match="Hoarder on FluxTransformer2DModel keeps one state"),
        ):
            flux.run()
    finally:
        attached.remove()


def test_batched_passes_and_other_caches_exclude_each_other() -> None:
    flux = families.family("flux")
    with (
        compose(flux.pipe, NAMES, method="composite", cache=FIRST_BLOCK, execution="batched"),
        pytest.raises(CmloraError, match=r"one of diffusers' caches is on"),
    ):
        flux.run()


def test_caches_that_do_not_fit_are_named() -> None:
    with pytest.raises(CmloraError, match=r"first_block does not fit Sana .*broadcast and faster"):
        compose(families.family("sana").pipe, NAMES, cache=FIRST_BLOCK)
    nowhere = TaylorSeerCacheConfig(cache_identifiers=["no_such_layer"])
    with pytest.raises(CmloraError, match="TaylorSeerCacheConfig finds nothing to cache in Sana"):
        compose(families.family("sana").pipe, NAMES, cache=nowhere)
    flux = families.family("flux")
    flux.pipe.transformer.enable_cache(FIRST_BLOCK)
    try:
        with pytest.raises(CmloraError, match="has a cache already"):
            compose(flux.pipe, NAMES, cache=TAYLOR)
    finally:
        flux.pipe.transformer.disable_cache()


def test_caches_by_text() -> None:
    for name in NAMES_OF_CACHES:
        assert is_config(named(name))
    assert named("taylorseer:4").cache_interval == 4
    assert named("nonuniform") is None
    with pytest.raises(CmloraError, match=r"write first_block or first_block:0\.1"):
        named("first_block:often")
    flux = families.family("flux")
    results = []
    for cache in ("first_block:10", FIRST_BLOCK, "none"):
        with compose(flux.pipe, NAMES, method="composite", cache=cache):
            results.append(flux.run())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_every_cache_of_diffusers_has_a_text() -> None:
    theirs = {name for name in dir(diffusers.hooks) if name.endswith("CacheConfig")}
    theirs |= {"PyramidAttentionBroadcastConfig"}
    configs = [named(name) for name in NAMES_OF_CACHES if name != "mag"]
    assert theirs == {type(config).__name__ for config in configs} | {"MagCacheConfig"}
    with pytest.raises(CmloraError, match="text_kv takes no number"):
        named("text_kv:2")
    assert named("faster:3").is_guidance_distilled
    with pytest.raises(CmloraError, match="text_kv does not fit FLUX"):
        compose(families.family("flux").pipe, NAMES, cache="text_kv")


def test_mag_by_text_is_the_configuration_for_any_number_of_steps() -> None:
    flux = families.family("flux")
    before = state(flux.pipe)
    for steps in (6, 4):
        table = FLUX_MAG_RATIOS.tolist()
        whole = MagCacheConfig(threshold=10.0, num_inference_steps=steps, mag_ratios=table)
        results = []
        for cache in ("mag:10", whole, "none", f"mag:10.0:{','.join(map(str, table))}"):
            with compose(flux.pipe, NAMES, method="composite", cache=cache):
                results.append(flux.run(steps=steps))
                if steps == 6 and cache == "mag:10":  # the same composition, another run
                    flux.run(steps=4)
                    assert torch.equal(flux.run(steps=steps), results[0])
        assert torch.equal(results[0], results[1])
        assert not torch.equal(results[0], results[2])
        assert torch.equal(results[0], results[3])
    assert state(flux.pipe) == before


def test_mag_needs_a_table_of_the_model() -> None:
    qwen = families.family("qwen")
    before = state(qwen.pipe)
    with pytest.raises(CmloraError, match=r"no table for QwenImage.*magnitudes\.measure"):
        compose(qwen.pipe, NAMES, cache="mag")
    assert state(qwen.pipe) == before
    assert canonical("mag") == "mag:0.06"
    assert canonical(" mag:0.1:1.0,1.25") == "mag:0.1:1,1.25"
    for text in ("mag:often", "mag:0.1:1,x", "mag:0.1:1:2", "mag:-1", "mag:0.1:0,1", "mag:nan"):
        with pytest.raises(CmloraError, match=r"cache .?mag"):
            named(text)


def test_measured_tables_are_diffusers_own(capsys: pytest.CaptureFixture[str]) -> None:
    flux = families.flux_distilled()
    flux.pipe.set_progress_bar_config(disable=True)
    text = measure(flux.pipe, lambda: flux.run(steps=5), threshold=0.2)
    assert capsys.readouterr().out == ""
    found = named(text)
    flux.pipe.transformer.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=5))
    flux.run(steps=5)
    printed = capsys.readouterr().out
    expected = json.loads(printed[printed.index("\n[", 5) :])
    assert found.threshold == 0.2
    assert found.ratios == pytest.approx(expected, rel=1e-4)


def test_tables_of_two_denoisers_and_two_branches() -> None:
    wan = families.family("wan")
    before = state(wan.pipe)
    text = measure(wan.pipe, lambda: wan.run(steps=6))
    assert state(wan.pipe) == before
    ratios = named(text).ratios
    assert len(ratios) == 6
    assert ratios[0] == 1.0
    assert ratios.count(1.0) == 2  # each begins anew
    with compose(wan.pipe, NAMES, method="composite", cache=f"mag:10:{text.split(':')[2]}"):
        cached = wan.run(steps=6)
    with compose(wan.pipe, NAMES, method="composite"):
        assert not torch.equal(wan.run(steps=6), cached)
    with pytest.raises(CmloraError, match="did not run the denoiser of this WanPipeline"):
        measure(wan.pipe, lambda: None)
