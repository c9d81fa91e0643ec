"""One unconditional branch for all LoRAs, in every family of pipelines."""

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.guiders import ClassifierFreeGuidance

from cmlora import denoisers
from cmlora.compose import compose
from cmlora.errors import CmloraError
from cmlora.guided import OFF, Guidance, guidance
from tests import families, tiny
from tests.families import NAMES, Family

BATCHED = ("sd15", "sd2", "sdxl", "sd3", "zimage", "pixart", "sana")
APART = ("flux", "qwen", "wan")


def looped(family: Family, **options: Any) -> torch.Tensor:
    """The conditional half is the mean over the LoRAs, the other one the base model's."""
    models = family.models()
    calls = [0]
    for model in models:
        forward = type(model).forward.__get__(model)

        @functools.wraps(forward)
        def own(*args: Any, _model: Any = model, _forward: Any = forward, **kwargs: Any) -> Any:
            given = {**kwargs, "return_dict": False}
            calls[0] += 1
            loras = []
            for name in NAMES:
                families.activate(_model, name)
                loras.append(_forward(*args, **given)[0])
            switch(_model, on=False)
            base = _forward(*args, **given)[0]
            switch(_model, on=True)
            mean = [torch.stack(each).mean(0) for each in zip(*loras, strict=True)]
            first = denoisers.kind(_model).first
            if first is None:  # the conditional call comes first
                rows = mean if calls[0] % 2 else list(base)
            else:
                half = len(mean) // 2
                uncond = slice(0, half) if first == "uncond" else slice(half, None)
                rows = list(mean)
                rows[uncond] = list(base)[uncond]
            return (rows if isinstance(base, list) else torch.stack(rows),)

        model.forward = own
    try:
        return family.run(**options)
    finally:
        for model in models:
            del model.forward
            model.requires_grad_(False)


def switch(model: Any, *, on: bool) -> None:
    """All adapters of a model."""
    for module in model.modules():
        if hasattr(module, "enable_adapters") and module is not model:
            module.enable_adapters(on)


@pytest.mark.parametrize("name", BATCHED + APART)
def test_it_is_the_base_models_and_costs_one_half(name: str) -> None:
    family = families.family(name)
    expected = looped(family)
    with compose(family.pipe, NAMES, method="composite", uncond="shared") as composition:
        ours = family.run()
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 * scale)
    calls = 1 if name in APART else 0.5
    assert composition.report.full == dict.fromkeys(("base", *NAMES), 4 * calls)
    with compose(family.pipe, NAMES, method="composite"):
        assert not torch.allclose(family.run(), expected, atol=1e-4)


def test_two_pictures_keep_their_halves() -> None:
    family = families.family("zimage")
    options = {"num_images_per_prompt": 2}
    expected = looped(family, **options)
    with compose(family.pipe, NAMES, method="composite", uncond="shared"):
        torch.testing.assert_close(family.run(**options), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("pictures", [1, 2])
def test_guidance_that_ends_early_leaves_nothing_to_share(pictures: int) -> None:
    family = families.family("zimage")
    options: dict[str, Any] = {
        "num_images_per_prompt": pictures,
        "cfg_truncation": -1.0,
        "steps": 3,
    }
    with compose(family.pipe, NAMES, method="composite", uncond="shared") as composition:
        ours = family.run(**options)
    with compose(family.pipe, NAMES, method="composite"):
        assert torch.equal(family.run(**options), ours)
    assert composition.report.full == dict.fromkeys(NAMES, 3)


def test_without_guidance_pixart_has_nothing_to_share() -> None:
    family = families.family("pixart")
    with compose(family.pipe, NAMES, method="composite", uncond="shared") as composition:
        ours = family.run(guidance_scale=1.0)
    assert composition.report.full == dict.fromkeys(NAMES, 4)
    with compose(family.pipe, NAMES, method="composite"):
        assert torch.equal(family.run(guidance_scale=1.0), ours)


@pytest.mark.parametrize("name", ["zimage", "pixart"])
def test_methods_of_both_branches_find_them(name: str) -> None:
    """Re-centred wholly, the unconditional branch is the base model's, as with a shared one."""
    family = families.family(name)
    results = []
    for uncond, recentre in (("per_lora", 1.0), ("shared", 1.0), ("per_lora", 0.0)):
        options: dict[str, Any] = {"recentre": recentre, "uncond": uncond}
        with compose(family.pipe, NAMES, method="loratorio", **options):
            results.append(family.run())
    scale = max(1.0, float(results[0].abs().max()))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-5 * scale)
    assert not torch.allclose(results[2], results[0], atol=1e-4)


def test_what_cannot_be_shared_is_refused() -> None:
    unet = tiny.unet_sd15(channels=(8, 16), layers_per_block=1)
    loop = SimpleNamespace(unet=unet, scheduler=tiny.scheduler())
    tiny.add_loras(loop, NAMES)
    loop.scheduler.set_timesteps(2)
    inputs = tiny.latents(2), loop.scheduler.timesteps[0], families.embedding(2, 5, 16)
    with (
        compose(loop, NAMES, method="composite", uncond="shared"),
        pytest.raises(CmloraError, match=r"uncond='shared' .*does not say whether its batch"),
    ):
        unet(*inputs)
    loop.do_classifier_free_guidance = loop.do_perturbed_attention_guidance = True
    loop.guidance_scale = 3.0
    with (
        compose(loop, NAMES, method="composite", uncond="shared"),
        pytest.raises(CmloraError, match=r"uncond='shared' .*third part"),
    ):
        unet(*inputs)
    with compose(loop, NAMES, method="merge", uncond="shared"):  # has one pass, shares nothing
        unet(*inputs)


def test_what_is_known_of_a_call() -> None:
    flux, unet = denoisers.KINDS["FluxTransformer2DModel"], denoisers.KINDS["UNet2DConditionModel"]
    latent = torch.zeros(2, 4, 4, 4)

    def known(kind: Any, branch: str = "", *, named: bool = False, **attributes: Any) -> Guidance:
        pipe = SimpleNamespace(**attributes)
        return guidance(pipe, None, kind, branch, latent, named=named, whole=True)

    scaled: dict[str, Any] = {"do_classifier_free_guidance": True, "guidance_scale": 3.0}
    assert known(unet, **scaled) == Guidance("both", 3.0)
    assert known(unet, do_classifier_free_guidance=False) == OFF
    assert known(flux, "cond", named=True, **scaled) == Guidance("cond", 3.0, paired=True)
    assert known(flux, "uncond#1", named=True, **scaled) == Guidance("uncond", 3.0)
    assert known(flux, "#1", **scaled) == Guidance("uncond", 3.0, paired=True)
    assert known(flux, do_true_cfg=False) == OFF
    assert known(flux, "audio", named=True).side is None
    assert known(denoisers.Kind("other"), "cond_uncond", named=True, **scaled).side is None
    guider = ClassifierFreeGuidance(3.0, use_original_formulation=True)
    guider.set_state(0, 4, torch.tensor(1))
    guider.prepare_models(None)
    assert known(unet, guider=guider) == Guidance("cond", 4.0, paired=True)
    guider.disable()
    assert known(unet, guider=guider) == OFF
    first, second = ClassifierFreeGuidance(3.0), ClassifierFreeGuidance(5.0)
    second.prepare_models(None)  # of two denoisers each has its own
    pipe = SimpleNamespace(guider=first, guider_2=second, transformer_2=object())
    found = guidance(pipe, pipe.transformer_2, flux, "", latent, named=False, whole=True)
    assert found == Guidance("cond", 5.0, paired=True)
