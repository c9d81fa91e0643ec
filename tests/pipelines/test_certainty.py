"""The objective that wants CLIP to be sure, against pictures that are drawn and judged apart."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cmlora.emoji import clip
from cmlora.errors import CmloraError
from cmlora.files import read
from cmlora.lora import LoRA, stack
from cmlora.pipelines.certainty import clip_entropy
from cmlora.pipelines.library import find
from cmlora.pipelines.models import EMBEDDED
from cmlora.pipelines.render import assemble


def loras() -> list[LoRA]:
    names = ("character_1", "style_1")
    return [replace(read(find(name, model=EMBEDDED)), name=name) for name in names]


@pytest.mark.slow
def test_certainty_is_the_entropy_of_clips_choice() -> None:
    own = loras()
    pipe = assemble(EMBEDDED, [])
    objective = clip_entropy(pipe, own, steps=2, seed=3, guidance_scale=2.0)
    assert len(objective.calls) == 4
    texts = [lora.triggers[0] for lora in own]
    judge, _ = clip.load()
    found = []
    for call in objective.calls:
        with torch.no_grad():
            both = pipe.pipe.unet(**call)[0].double()
        epsilon = both[0] + 2 * (both[1] - both[0])
        alpha = float(pipe.pipe.scheduler.alphas_cumprod[int(call["timestep"])])
        assert pipe.pipe.scheduler.config.prediction_type in ("epsilon", "v_prediction")
        noisy = call["sample"][1].double()
        if pipe.pipe.scheduler.config.prediction_type == "v_prediction":
            epsilon = math.sqrt(alpha) * epsilon + math.sqrt(1 - alpha) * noisy
        clean = (noisy - math.sqrt(1 - alpha) * epsilon) / math.sqrt(alpha)
        with torch.no_grad():
            latent = clean[None].float() / pipe.pipe.vae.config.scaling_factor
            pixels = pipe.pipe.vae.decode(latent).sample
        picture = pipe.pipe.image_processor.postprocess(pixels)[0]
        marks = np.array(clip.score([picture] * 2, texts)) / 100
        chances = np.exp(marks * float(judge.logit_scale.exp()))
        chances /= chances.sum()
        found.append(-(chances * np.log2(chances)).sum())
    assert objective.value(None) == pytest.approx(np.mean(found), abs=0.03)


@pytest.mark.slow
def test_certainty_can_be_followed() -> None:
    own = loras()
    objective = clip_entropy(assemble(EMBEDDED, []), own, steps=2, guidance_scale=2.0)
    strength = torch.tensor(0.5, requires_grad=True)
    update = next(iter(own[0].updates))
    scaled = own[0].updates[update]
    merged = stack([(x, 0.5) for x in own], "both")
    changed = replace(scaled, up=scaled.up * strength)
    lora = replace(merged, updates={**merged.updates, update: changed})
    loss = objective.loss(lora)
    torch.autograd.backward(loss)
    assert 0 <= float(loss.detach()) <= 1
    assert strength.grad is not None
    assert float(strength.grad) != 0


def test_certainty_needs_a_judge_and_a_choice(model_folder: Path, lora_folder: Path) -> None:
    cat = read(lora_folder / "cat.safetensors")
    with pytest.raises(CmloraError, match="embedded model's CLIP"):
        clip_entropy(assemble(str(model_folder), []), [cat, cat])


@pytest.mark.slow
def test_one_prompt_is_no_choice() -> None:
    with pytest.raises(CmloraError, match="tells prompts apart"):
        clip_entropy(assemble(EMBEDDED, []), loras()[:1])
