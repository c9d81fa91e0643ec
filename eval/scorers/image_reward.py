"""ImageReward (arXiv:2304.05977): a BLIP that reads prompt and picture together, and a head.

The published file is a pickle, which is not read here. Once, on a machine that may read it,

    python -m cmlora.eval.scorers.image_reward ImageReward.pt FOLDER

writes its tensors as FOLDER/model.safetensors, under their own names.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from cmlora.errors import CmloraError
from cmlora.eval.manifest import Manifest
from cmlora.eval.scorers.scorer import Item, Marks, weights_digest

MEAN, DEVIATION = 0.16717363, 1.03333950
"""Of the rewards on the training pictures; rewards are given in these units."""

TOKENS = 35
HEAD = (1024, 128, 64, 16, 1)
"""Widths of the head, which is linear throughout."""

SIZES: dict[str, dict[str, Any]] = {
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 16,
        "layer_norm_eps": 1e-6,
    },
    "text_config": {
        "vocab_size": 30524,
        "hidden_size": 768,
        "encoder_hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 512,
    },
}
"""Of the published model; a ``config.json`` in the folder may say otherwise."""

HOW = (
    "hf download zai-org/ImageReward ImageReward.pt --local-dir FOLDER && "
    "python -m cmlora.eval.scorers.image_reward FOLDER/ImageReward.pt FOLDER && "
    "hf download google-bert/bert-base-uncased tokenizer.json tokenizer_config.json vocab.txt "
    "--local-dir FOLDER"
)

# the vision transformer's names in the published file, and those of transformers
_VISION = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
)


class ImageReward:
    """The reward of a picture for its whole prompt.

    Args:
        manifest: the testbed.
        device: where to compute.
        model: a folder with the weights as safetensors, under the published names, a BERT
            tokenizer, and a ``config.json`` with ``vision_config`` and ``text_config`` if the
            sizes are others than the published ones.
        tokenizer: a folder or hub id, if it is not in the same folder.

    Raises:
        CmloraError: if the model is missing, or its tensors are not those of the architecture.
    """

    def __init__(
        self,
        manifest: Manifest,
        device: str | None = None,
        *,
        model: str = "",
        tokenizer: str = "",
    ) -> None:
        if not model:
            raise CmloraError(
                f"image_reward needs a folder: --set image_reward.model=FOLDER; to get it, on a "
                f"machine with a network: {HOW}"
            )
        self._network = _loaded(Path(model).expanduser()).to(torch.device(device or "cpu"))
        self._tokenizer = _tokenizer(tokenizer or model)
        self._prepare = _preparation(self._network.side)
        self.version = f"{Path(model).name} {weights_digest(self._network)}"

    @torch.no_grad()
    def __call__(self, items: Sequence[Item]) -> list[Marks]:
        """``image_reward`` of every picture; more is better."""
        device = next(self._network.parameters()).device
        words = self._tokenizer(
            [item.prompt for item in items],
            padding="max_length",
            truncation=True,
            max_length=TOKENS,
            return_tensors="pt",
        ).to(device)
        pixels = torch.stack([self._prepare(item.image()) for item in items]).to(device)
        rewards = self._network(pixels, words.input_ids, words.attention_mask)
        return [Marks({"image_reward": float(reward)}) for reward in rewards]


class Network(nn.Module):
    """The picture's tokens, the prompt that attends to them, and the head on its first token.

    Args:
        sizes: ``vision_config`` and ``text_config`` of transformers' BLIP.
    """

    def __init__(self, sizes: Mapping[str, Mapping[str, Any]]) -> None:
        from transformers import BlipTextConfig, BlipVisionConfig
        from transformers.models.blip.modeling_blip import BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        super().__init__()
        vision = BlipVisionConfig(**sizes["vision_config"])
        text = BlipTextConfig(**{"bos_token_id": 0, "sep_token_id": 0, **sizes["text_config"]})
        self.side = int(vision.image_size)
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        widths = (text.hidden_size, *HEAD)
        self.head = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Rewards (n,) of pictures (n, 3, side, side) for prompts (n, tokens)."""
        seen = self.vision(pixel_values=pixels).last_hidden_state
        everywhere = torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device)
        read = self.text(
            input_ids=ids,
            attention_mask=mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=everywhere,
        ).last_hidden_state
        reward: Tensor = read[:, 0].float()
        for layer in self.head:
            reward = layer(reward)
        return (reward.squeeze(1) - MEAN) / DEVIATION


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under their published names as those of `Network`.

    The file also holds what training alone needed; that is left out.

    Args:
        tensors: by name.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith("blip.visual_encoder."):
            own = name.removeprefix("blip.visual_encoder.")
            for pattern, replacement in _VISION:
                own = re.sub(pattern, replacement, own)
            found[f"vision.{own}"] = tensor
        elif name.startswith("blip.text_encoder.") and not name.endswith("position_ids"):
            found[f"text.{name.removeprefix('blip.text_encoder.')}"] = tensor
        elif name.startswith("mlp.layers."):
            found[name] = tensor
    # the published head has dropout layers in between, which count as places
    head = sorted({int(name.split(".")[2]) for name in found if name.startswith("mlp.")})
    for place, number in enumerate(head):
        for kind in ("weight", "bias"):
            if f"mlp.layers.{number}.{kind}" in found:
                found[f"head.{place}.{kind}"] = found.pop(f"mlp.layers.{number}.{kind}")
    return found


def _loaded(folder: Path) -> Network:
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CmloraError(
            f"image_reward: there is no .safetensors file in {folder}; on a machine with a "
            f"network: {HOW}"
        )
    config = folder / "config.json"
    try:
        sizes = json.loads(config.read_bytes()) if config.exists() else SIZES
        network = Network(sizes)
        tensors: dict[str, Tensor] = {}
        for file in files:
            tensors |= load_file(file)
    except Exception as failure:  # JSON, transformers and safetensors each have their own
        reason = f"{type(failure).__name__}: {' '.join(str(failure).split())[:160]}"
        raise CmloraError(f"image_reward: {folder} cannot be read ({reason})") from failure
    _fill(network, renamed(tensors), folder)
    return network.float().eval()


def _fill(network: Network, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Put tensors in, all of them and nothing else."""
    wanted = network.state_dict()
    for what, names in (
        ("lacks", [n for n in wanted if n not in tensors]),
        ("has, which the architecture has not,", [n for n in tensors if n not in wanted]),
    ):
        if names:
            raise CmloraError(
                f"image_reward: {folder} {what} {len(names)} tensors, the first {names[0]}; "
                "it must hold the published ones, and config.json their sizes"
            )
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise CmloraError(
                f"image_reward: {folder}: {name} is {tuple(tensor.shape)}, expected "
                f"{tuple(wanted[name].shape)}; config.json has the sizes"
            )
    network.load_state_dict(dict(tensors))


def _tokenizer(place: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(place)
    except Exception as failure:  # transformers and the hub have many
        reason = " ".join(str(failure).split())[:160]
        raise CmloraError(
            f"image_reward: there is no tokenizer in {place} ({reason}); on a machine with a "
            "network: hf download google-bert/bert-base-uncased tokenizer.json "
            f"tokenizer_config.json vocab.txt --local-dir {place}"
        ) from failure


def _preparation(side: int) -> Any:
    """Pictures to tensors (3, side, side), as the model was trained on them."""
    from torchvision import transforms as t

    def rgb(picture: Image.Image) -> Image.Image:
        return picture.convert("RGB")

    mean, deviation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return t.Compose(
        [
            t.Resize(side, interpolation=t.InterpolationMode.BICUBIC),
            t.CenterCrop(side),
            rgb,
            t.ToTensor(),
            t.Normalize(mean, deviation),
        ]
    )


def convert(source: Path, folder: Path) -> Path:
    """The published pickle as safetensors, read so that nothing but tensors is made of it.

    Args:
        source: ``ImageReward.pt``.
        folder: where ``model.safetensors`` goes.

    Returns:
        The file.
    """
    from safetensors.torch import save_file

    state = torch.load(source, map_location="cpu", weights_only=True)
    kept = {
        name: tensor.contiguous().clone()
        for name, tensor in state.items()
        if re.match(r"blip\.(visual|text)_encoder\.|mlp\.", name)
    }
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "model.safetensors"
    save_file(kept, target)
    return target


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(
            f"python -m cmlora.eval.scorers.image_reward ImageReward.pt FOLDER, not {sys.argv}"
        )
    print(convert(Path(sys.argv[1]), Path(sys.argv[2])))
