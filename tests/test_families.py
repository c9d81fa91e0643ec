"""Every family of pipelines: compositions compute what a plain loop over LoRAs computes."""

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from cmlora import denoisers
from cmlora.batching import Execution
from cmlora.compose import compose
from cmlora.latents import layout
from cmlora.plan import Member, Pass, Plan, Policy, Step
from tests import families
from tests.composing import average, state
from tests.families import NAMES, Family


@pytest.fixture(params=list(families.FAMILIES))
def family(request: pytest.FixtureRequest) -> Family:
    return families.family(request.param)


@pytest.fixture(params=[n for n in families.FAMILIES if n not in ("sd2", "flux_distilled")])
def denoiser(request: pytest.FixtureRequest) -> Family:
    """One family per class of denoisers."""
    return families.family(request.param)


def activate(family: Family, name: str, weight: float = 1.0) -> None:
    """One LoRA, as diffusers does it."""
    for model in family.models():
        families.activate(model, name, weight)
        model.requires_grad_(False)


def loop_over_loras(family: Family, weights: dict[str, float], **options: Any) -> torch.Tensor:
    """Composite as a plain loop over single-LoRA calls inside every denoiser call."""
    for model in family.models():
        forward = type(model).forward.__get__(model)

        @functools.wraps(forward)
        def looped(*args: Any, _model: Any = model, _forward: Any = forward, **kwargs: Any) -> Any:
            outputs = []
            for name, weight in weights.items():
                families.activate(_model, name, weight)
                outputs.append(_forward(*args, **{**kwargs, "return_dict": False})[0])
            if isinstance(outputs[0], list):
                return ([torch.stack(each).mean(0) for each in zip(*outputs, strict=True)],)
            return (torch.stack(outputs).mean(0),)

        model.forward = looped
    try:
        return family.run(**options)
    finally:
        for model in family.models():
            del model.forward
            model.requires_grad_(False)


def assert_near(result: torch.Tensor, expected: torch.Tensor) -> None:
    scale = float(expected.abs().max())
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5 * max(scale, 1.0))


def always(step: Step, members: Sequence[Member], policy: Policy, *, to: str = "") -> Plan:
    """Every pass reuses what it can; with `to` only that LoRA counts."""
    passes = tuple(Pass({m.name: m.weight}, may_reuse=step.index % 2 == 1) for m in members)
    shares = tuple(float(m.name == to) for m in members)
    return Plan(passes, shares if to else tuple(1 / len(passes) for _ in passes))


def test_one_lora_is_plain_diffusers(family: Family) -> None:
    activate(family, "ink", 0.7)
    expected = family.run()
    activate(family, "alice")
    other = family.run()
    with compose(family.pipe, {"ink": 0.7}, method=average):
        assert torch.equal(family.run(), expected)
    assert not torch.allclose(other, expected, atol=1e-3)


def test_composite_is_the_plain_loop(family: Family) -> None:
    weights = {"ink": 1.0, "alice": 0.6}
    expected = loop_over_loras(family, weights)
    with compose(family.pipe, weights, method="composite") as composition:
        assert_near(family.run(), expected)
    report = composition.report
    assert report.steps == 4
    assert set(report.full) == set(NAMES)


def test_refreshing_always_is_no_cache_and_reuse_is_light(denoiser: Family) -> None:
    class Always:
        name, reuse = "always", True

        def refreshes(self, count: int) -> tuple[int, ...]:
            return tuple(range(count))

    results = {}
    for label, cache in (("none", "none"), ("always", Always()), ("two", "uniform:2")):
        with compose(denoiser.pipe, NAMES, method="composite", cache=cache) as composition:
            results[label] = denoiser.run(steps=5)
        report = composition.report
        assert bool(report.light) == (label == "two")
    assert torch.equal(results["none"], results["always"])
    assert torch.isfinite(results["two"]).all()
    error = float((results["two"] - results["none"]).norm() / results["none"].norm())
    assert 0 < error < 1


def test_features_of_loras_never_mix(denoiser: Family) -> None:
    with compose(denoiser.pipe, ["ink"], method=always, cache="uniform:2", to="ink"):
        alone = denoiser.run()
    with compose(denoiser.pipe, NAMES, method=always, cache="uniform:2", to="ink") as composition:
        assert torch.equal(denoiser.run(), alone)
    assert composition.report.light["alice"] == composition.report.light["ink"] > 0


def test_what_goes_on_comes_off(denoiser: Family) -> None:
    activate(denoiser, "alice", 0.4)
    before, output = state(denoiser.pipe), denoiser.run()
    ways: tuple[tuple[str, Execution], ...] = (("none", "batched"), ("uniform:2", "sequential"))
    for cache, execution in ways:
        with compose(denoiser.pipe, NAMES, method="composite", cache=cache, execution=execution):
            denoiser.run()
        assert state(denoiser.pipe) == before
    assert torch.equal(denoiser.run(), output)


def test_batched_passes_are_sequential_ones(denoiser: Family) -> None:
    def three(step: Step, members: Sequence[Member], policy: Policy) -> Plan:
        reuse = policy.reuse and step.index % 2 == 1
        passes = [Pass({m.name: m.weight}, reuse and m.name == "ink") for m in members]
        return Plan((Pass({}, reuse), *passes), (0.2, 0.5, 0.3))

    for cache in ("none", "uniform:2"):
        results = []
        for execution in ("sequential", "batched", "auto"):
            with compose(
                denoiser.pipe,
                {"ink": 1.0, "alice": 0.6},
                method=three,
                cache=cache,
                execution=execution,
            ) as composition:
                results.append((denoiser.run(), composition.report.full, composition.report.light))
        for result, full, light in results[1:]:
            assert_near(result, results[0][0])
            assert (full, light) == results[0][1:]


def test_strategies_see_maps(denoiser: Family) -> None:
    seen: list[tuple[int, ...]] = []

    def halves(step: Step, members: Sequence[Member], policy: Policy) -> Plan:
        def left_and_right(outputs: torch.Tensor) -> torch.Tensor:
            assert step.sample is not None
            assert outputs.shape[1] == len(step.sample)
            assert outputs.shape[-2:] == step.sample.shape[-2:]
            seen.append(tuple(step.sample.shape))
            columns = torch.arange(outputs.shape[-1])
            return torch.where(columns < len(columns) // 2, outputs[0], outputs[1])

        def observe(sample: torch.Tensor, outputs: torch.Tensor) -> dict[str, float]:
            assert outputs.shape[1:2] == sample.shape[:1]
            return {"columns": float(outputs.shape[-1])}

        return Plan(tuple(Pass({m.name: m.weight}) for m in members), left_and_right, observe)

    with compose(denoiser.pipe, NAMES, method=halves):
        mixed = denoiser.run(steps=1)
    pure = []
    for name in NAMES:
        with compose(denoiser.pipe, [name], method=average):
            pure.append(denoiser.run(steps=1))
    assert {len(shape) for shape in seen} == {4}
    maps = [unpacked(denoiser, latent) for latent in (mixed, *pure)]
    half = maps[0].shape[-1] // 2
    torch.testing.assert_close(maps[0][..., :half], maps[1][..., :half], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(maps[0][..., half:], maps[2][..., half:], rtol=1e-4, atol=1e-4)


def unpacked(family: Family, latent: torch.Tensor) -> torch.Tensor:
    """Final latents as the family's own pipeline unpacks them."""
    pipe = family.pipe
    kind = denoisers.kind(family.models()[0])
    if kind.family in ("FLUX.1", "Qwen-Image"):
        result: torch.Tensor = pipe._unpack_latents(latent, 64, 64, pipe.vae_scale_factor)
        return result
    if kind.family == "FLUX.2":
        grid = torch.unflatten(latent.transpose(1, 2), 2, (4, 4))
        final: torch.Tensor = pipe._unpatchify_latents(grid)
        return final
    return latent


def test_packing_undoes_unpacking() -> None:
    ids = torch.zeros(6, 3)
    ids[:, 1], ids[:, 2] = torch.arange(6) // 3, torch.arange(6) % 3
    reference = torch.cat([ids, ids + torch.tensor([1.0, 0, 0])])
    tokens = families.embedding(2, 12, 8)
    given = {"img_ids": reference}
    maps = layout(denoisers.KINDS["FluxTransformer2DModel"], tokens, given.get)
    assert maps.unpack(tokens).shape == (2, 2, 4, 6)
    assert torch.equal(maps.pack(maps.unpack(tokens), tokens), tokens)
    stacked = torch.stack([tokens, -tokens])
    assert torch.equal(maps.pack(maps.unpack(stacked), stacked), stacked)
    video = families.embedding(2, 4, 3, 6, 6)
    nothing: dict[str, torch.Tensor] = {}
    frames = layout(denoisers.KINDS["WanTransformer3DModel"], video, nothing.get)
    assert torch.equal(frames.unpack(video)[1], video[0, :, 1])
    assert torch.equal(frames.pack(frames.unpack(video), video), video)
