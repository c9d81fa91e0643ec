"""The closed-form parts of the embedded models, without trained weights."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from cmlora.emoji import autoencoder
from cmlora.emoji.base import emphasis, to_tensor
from cmlora.emoji.dataset import labels_of
from cmlora.emoji.latents import PatchBasis
from cmlora.emoji.probe import Probe
from cmlora.emoji.scenes import Scene, pictures, render
from cmlora.emoji.schedule import noised, scheduler, v_target, v_weight
from cmlora.emoji.tokens import train_tokenizer
from cmlora.emoji.truth import kernel_distance
from cmlora.emoji.weights import lora_path
from cmlora.emoji.world import CATEGORIES, ELEMENTS, KNOWN, Element
from cmlora.errors import CmloraError


@pytest.fixture(scope="module")
def renders() -> torch.Tensor:
    return to_tensor(pictures(200, 5)[1])


def test_basis_is_the_principal_components(renders: torch.Tensor, tmp_path: Path) -> None:
    basis = PatchBasis.fit(renders)
    latents = basis.encode(renders)
    assert latents.shape == (200, 12, 16, 16)
    covariance = torch.cov(latents.permute(1, 0, 2, 3).flatten(1).double())
    off = covariance - covariance.diag().diag()
    assert off.abs().max() < 1e-3
    patches = renders.numpy().reshape(200, 3, 16, 4, 16, 4).transpose(0, 2, 4, 1, 3, 5)
    flat = patches.reshape(-1, 48).astype(np.float64)
    values = np.linalg.svd(flat - flat.mean(0), compute_uv=False) ** 2 / len(flat)
    lost = float((basis.decode(latents) - renders).square().mean())
    assert lost == pytest.approx(values[12:].sum() / 48, rel=1e-3)
    basis.save(tmp_path / "basis.safetensors")
    again = PatchBasis.load(tmp_path / "basis.safetensors")
    assert torch.equal(again.encode(renders), latents)


def test_encoder_in_closed_form_computes_the_basis(renders: torch.Tensor) -> None:
    basis = PatchBasis.fit(renders)
    model = autoencoder.build()
    autoencoder.set_encoder(model, basis)
    with torch.no_grad():
        posterior = model.encode(renders[:16]).latent_dist
    wanted = basis.encode(renders[:16])
    assert (posterior.mean - wanted).abs().max() < 5e-3
    assert posterior.std.max() < 1e-5
    assert model.decode(wanted).sample.shape == renders[:16].shape


def test_velocity_is_consistent_with_the_schedule() -> None:
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 4, 12, 16, 16, generator=generator)
    alphas = scheduler().alphas_cumprod[torch.tensor([0, 300, 700, 999])]
    mixed = noised(clean, noise, alphas)
    velocity = v_target(clean, noise, alphas)
    a = alphas[:, None, None, None]
    assert torch.allclose(a.sqrt() * mixed - (1 - a).sqrt() * velocity, clean, atol=1e-5)
    weights = v_weight(alphas)
    assert (weights[2:] == 1).all(), "what a picture shows is decided at high noise"
    assert 0 < weights[0] < weights[1] <= 1


def test_tokenizer_round_trip(tmp_path: Path) -> None:
    texts = ["a fox in a top hat", "zorbo, brown bird", "a pear on a beach"] * 10
    tokenizer = train_tokenizer(texts, 200)
    ids = tokenizer(texts[1]).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id == len(tokenizer) - 1
    assert tokenizer.decode(ids[1:-1]).replace(" ,", ",").strip() == texts[1]
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    assert [again(t).input_ids for t in texts] == [tokenizer(t).input_ids for t in texts]


def test_probe_names_one_element_per_category() -> None:
    torch.manual_seed(0)
    probe = Probe().eval()
    logits = probe(torch.zeros(3, 3, 64, 64))
    assert {c: v.shape for c, v in logits.items()} == {
        c: (3, 1 + len(ELEMENTS[c])) for c in CATEGORIES
    }


def test_kernel_distance_tells_same_from_different() -> None:
    generator = torch.Generator().manual_seed(0)

    def cloud(shift: float) -> torch.Tensor:
        points = torch.randn(200, 16, generator=generator)
        points[:, 0] += shift
        return torch.nn.functional.normalize(points, dim=1)

    here = cloud(0.0)
    assert abs(kernel_distance(here, cloud(0.0))) < 0.02
    assert kernel_distance(here, cloud(3.0)) > 0.2


def test_unknown_concept_is_named() -> None:
    with pytest.raises(CmloraError, match="no embedded LoRA 'character_9'"):
        lora_path("character_9")


@pytest.mark.parametrize("category", ["clothing", "object"])
@pytest.mark.parametrize("beside", [True, False])
def test_emphasis_lies_where_things_are_drawn(category: str, beside: bool) -> None:
    """What changes with the element is nearly all inside its box, whatever the jitter."""
    first, second = KNOWN[category][:2]  # type: ignore[index]
    others: dict[str, Element | None] = (
        {"character": None} if category == "object" else {"object": None}
    )
    if beside:
        others = {"character": KNOWN["character"][2], "object": KNOWN["object"][0]}
    scene = Scene(**{"character": KNOWN["character"][2], **others, category: first})
    other = dataclasses.replace(scene, **{category: second})
    weights = emphasis(np.array([labels_of(scene)]))[0].numpy()
    least = 4 if category == "object" else 3
    inside = np.kron(weights >= least, np.ones((4, 4), bool))
    changed = np.zeros((64, 64))
    for seed in range(40):
        a, b = (render(s, np.random.default_rng(seed)).astype(int) for s in (scene, other))
        changed += np.abs(a - b).sum(-1)
    assert changed[inside].sum() > 0.9 * changed.sum() > 0
