"""ImageReward against its formulas written out over the published names of its tensors."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as f

from cmlora.errors import CmloraError
from cmlora.eval.scorers.image_reward import SIZES, Network, convert
from cmlora.eval.scorers.scorer import Item
from cmlora.eval.scoring import make_scorer
from tests import tiny
from tests.eval import beds, models


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As its user has it: published pickle converted, a tokenizer, sizes."""
    made = tmp_path_factory.mktemp("reward")
    torch.save(models.reward_tensors(), made / "ImageReward.pt")
    assert convert(made / "ImageReward.pt", made) == made / "model.safetensors"
    tiny.tokenizer().save_pretrained(made)
    (made / "config.json").write_text(json.dumps(models.REWARD_SIZES))
    return made


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """One query set (a, width) over keys and values (b, width), head by head."""
    parts = []
    for one, two, three in zip(*(x.chunk(heads, 1) for x in (q, k, v)), strict=True):
        logits = one @ two.T / one.shape[1] ** 0.5
        if mask is not None:
            logits = logits.masked_fill(mask[None] == 0, -torch.inf)
        parts.append(logits.softmax(1) @ three)
    return torch.cat(parts, 1)


def reward(t: dict[str, Tensor], pixels: Tensor, ids: Tensor, mask: Tensor) -> float:
    """One picture (3, side, side) and one prompt (tokens,)."""

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    def norm(name: str, x: Tensor, eps: float) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        scale = (centred.square().mean(1, keepdim=True) + eps).sqrt()
        return centred / scale * t[f"{name}.weight"] + t[f"{name}.bias"]

    eye = "blip.visual_encoder"
    kernel = t[f"{eye}.patch_embed.proj.weight"]
    patches = pixels.unfold(1, 8, 8).unfold(2, 8, 8).permute(1, 2, 0, 3, 4).reshape(16, -1)
    tokens = patches @ kernel.reshape(16, -1).T + t[f"{eye}.patch_embed.proj.bias"]
    x = torch.cat([t[f"{eye}.cls_token"][0], tokens]) + t[f"{eye}.pos_embed"][0]
    for block in (f"{eye}.blocks.{number}" for number in range(2)):
        q, k, v = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x, 1e-6)).chunk(3, 1)
        x = x + linear(f"{block}.attn.proj", attention(q, k, v, heads=2))
        inner = f.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x, 1e-6)))
        x = x + linear(f"{block}.mlp.fc2", inner)
    seen = norm(f"{eye}.norm", x, 1e-6)

    read = "blip.text_encoder"
    places = t[f"{read}.embeddings.position_embeddings.weight"][: len(ids)]
    y = t[f"{read}.embeddings.word_embeddings.weight"][ids] + places
    y = norm(f"{read}.embeddings.LayerNorm", y, 1e-12)
    for layer in (f"{read}.encoder.layer.{number}" for number in range(2)):
        for kind, source, hidden in (("attention", None, mask), ("crossattention", seen, None)):
            own = f"{layer}.{kind}"
            other = y if source is None else source
            q = linear(f"{own}.self.query", y)
            k, v = (linear(f"{own}.self.{part}", other) for part in ("key", "value"))
            done = linear(f"{own}.output.dense", attention(q, k, v, 3, hidden))
            y = norm(f"{own}.output.LayerNorm", done + y, 1e-12)
        inner = linear(f"{layer}.output.dense", f.gelu(linear(f"{layer}.intermediate.dense", y)))
        y = norm(f"{layer}.output.LayerNorm", inner + y, 1e-12)
    found = y[:1]
    for place in (0, 2, 4, 6, 7):
        found = linear(f"mlp.layers.{place}", found)
    return (float(found) - 0.16717362830052426) / 1.0333394966054072


def test_it_is_the_formula(folder: Path, tmp_path: Path) -> None:
    """Batch and prompts as the scorer sees them; the reference takes one picture at a time."""
    noise = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    for number, pixels in enumerate(noise):
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    tensors = {name: t.double() for name, t in models.reward_tensors().items() if "ids" not in name}
    items = [
        Item(path, ids, beds.manifest())
        for path, ids in zip(
            sorted(tmp_path.glob("*.png")),
            [("ann", "hat"), ("ann", "hat", "ink"), ("cat", "ink")],
            strict=True,
        )
    ]
    judge = make_scorer("image_reward", beds.manifest(), model=str(folder))
    marks = [mark.values["image_reward"] for mark in judge(items)]
    tokenizer = tiny.tokenizer()
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073], dtype=torch.double)[:, None, None]
    spread = torch.tensor([0.26862954, 0.26130258, 0.27577711], dtype=torch.double)[:, None, None]
    for pixels, item, mark in zip(noise, items, marks, strict=True):
        raw = torch.from_numpy(pixels).permute(2, 0, 1).double()
        words = tokenizer(
            item.prompt, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
        )
        expected = reward(
            tensors, (raw / 255 - mean) / spread, words.input_ids[0], words.attention_mask[0]
        )
        assert mark == pytest.approx(expected, abs=1e-4, rel=1e-4)
    assert len(set(marks)) == 3


def test_the_published_sizes_are_those_of_the_published_tensors() -> None:
    """Shapes of the real file, as its architecture (ViT-L/16 at 224 pixels, BERT) has them."""
    with torch.device("meta"):
        state = Network(SIZES).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert shapes["vision.embeddings.position_embedding"] == (1, 14 * 14 + 1, 1024)
    assert shapes["vision.encoder.layers.23.self_attn.qkv.weight"] == (3072, 1024)
    assert shapes["text.embeddings.word_embeddings.weight"] == (30524, 768)
    assert shapes["text.encoder.layer.11.crossattention.self.key.weight"] == (768, 1024)
    assert shapes["head.0.weight"] == (1024, 768)
    assert shapes["head.4.weight"] == (1, 16)
    vision = 24 * (12 * 1024**2 + 13 * 1024) + 1024 * (3 * 256 + 1 + 1 + 197 + 2)
    per_layer = (4 + 8 + 2) * 768**2 + 2 * 768 * 1024 + (8 + 4 + 1 + 6) * 768
    text = 12 * per_layer + (30524 + 512 + 2) * 768
    head = sum(a * b + b for a, b in ((768, 1024), (1024, 128), (128, 64), (64, 16), (16, 1)))
    assert sum(tensor.numel() for tensor in state.values()) == vision + text + head


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": "mlp.layers.7.bias"}, "lacks 1 tensors, the first head.4.bias"),
        ({"add": "blip.visual_encoder.blocks.2.norm1.bias"}, "has, which the architecture has not"),
        ({"shape": "mlp.layers.7.weight"}, "head.4.weight is (1, 17), expected (1, 16)"),
        ({"tokenizer": True}, "there is no tokenizer in"),
        ({"weights": True}, "there is no .safetensors file in"),
        ({"config": "{"}, "cannot be read (JSONDecodeError"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(
    folder: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    place = Path(shutil.copytree(folder, tmp_path / "copy"))
    tensors = load_file(place / "model.safetensors")
    if name := change.get("drop"):
        del tensors[name]
    if name := change.get("add"):
        tensors[name] = torch.zeros(16)
    if name := change.get("shape"):
        tensors[name] = torch.zeros(1, 17)
    save_file(tensors, place / "model.safetensors")
    if "tokenizer" in change:
        for file in place.glob("*token*"):
            file.unlink()
    if "weights" in change:
        (place / "model.safetensors").unlink()
    if "config" in change:
        (place / "config.json").write_text(change["config"])
    with pytest.raises(CmloraError) as caught:
        make_scorer("image_reward", beds.manifest(), model=str(place))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_a_folder_the_commands_are_said() -> None:
    with pytest.raises(CmloraError, match=r"hf download zai-org/ImageReward ImageReward\.pt"):
        make_scorer("image_reward", beds.manifest())
