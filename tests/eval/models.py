"""Tiny random judges, saved as their users have them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

CLIP_CONFIG: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {
        "context_length": 24,
        "vocab_size": 49408,
        "width": 16,
        "heads": 2,
        "layers": 2,
    },
}


def save_clip(folder: Path, seed: int = 0) -> Path:
    """A CLIP in open_clip's format, with open_clip's own tokenizer."""
    import open_clip

    torch.manual_seed(seed)
    model = open_clip.CLIP(**CLIP_CONFIG)
    folder.mkdir(parents=True)
    preprocess = {"mean": [0.4, 0.4, 0.4], "std": [0.2, 0.2, 0.2], "interpolation": "bicubic"}
    config = {"model_cfg": CLIP_CONFIG, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    state = {k: v.contiguous().clone() for k, v in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return folder


def save_dual_encoder(folder: Path) -> Path:
    """A `CLIPModel` of transformers with its processor."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    from tests import tiny

    torch.manual_seed(1)
    text = {
        "vocab_size": 128,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tiny.tokenizer()).save_pretrained(folder)
    return folder


def save_vision(folder: Path, labels: dict[int, str] | None = None) -> Path:
    """A DINOv2 of transformers; with labels, a classifier."""
    from transformers import (
        BitImageProcessor,
        Dinov2Config,
        Dinov2ForImageClassification,
        Dinov2Model,
    )

    torch.manual_seed(2)
    config = Dinov2Config(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        **({} if labels is None else {"id2label": labels, "num_labels": len(labels)}),
    )
    kind = Dinov2Model if labels is None else Dinov2ForImageClassification
    kind(config).save_pretrained(folder)
    size = {"height": 28, "width": 28}
    BitImageProcessor(size={"shortest_edge": 28}, crop_size=size).save_pretrained(folder)
    return folder


REWARD_SIZES: dict[str, Any] = {
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
        "layer_norm_eps": 1e-6,
    },
    "text_config": {
        "vocab_size": 128,
        "hidden_size": 12,
        "encoder_hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "max_position_embeddings": 40,
    },
}


def reward_tensors() -> dict[str, torch.Tensor]:
    """A small ImageReward under the names of the published file, with what training left in it."""
    made: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(4)

    def put(name: str, *shape: int) -> None:
        made[name] = torch.randn(shape, generator=generator) * 0.3

    def linear(name: str, out: int, into: int) -> None:
        put(f"{name}.weight", out, into)
        put(f"{name}.bias", out)

    def norm(name: str, width: int) -> None:
        put(f"{name}.weight", width)
        put(f"{name}.bias", width)

    eye = "blip.visual_encoder"
    put(f"{eye}.cls_token", 1, 1, 16)
    put(f"{eye}.pos_embed", 1, 17, 16)
    put(f"{eye}.patch_embed.proj.weight", 16, 3, 8, 8)
    put(f"{eye}.patch_embed.proj.bias", 16)
    for block in (f"{eye}.blocks.{number}" for number in range(2)):
        norm(f"{block}.norm1", 16)
        linear(f"{block}.attn.qkv", 48, 16)
        linear(f"{block}.attn.proj", 16, 16)
        norm(f"{block}.norm2", 16)
        linear(f"{block}.mlp.fc1", 32, 16)
        linear(f"{block}.mlp.fc2", 16, 32)
    norm(f"{eye}.norm", 16)
    read = "blip.text_encoder"
    put(f"{read}.embeddings.word_embeddings.weight", 128, 12)
    put(f"{read}.embeddings.position_embeddings.weight", 40, 12)
    norm(f"{read}.embeddings.LayerNorm", 12)
    for layer in (f"{read}.encoder.layer.{number}" for number in range(2)):
        for kind, width in (("attention", 12), ("crossattention", 16)):
            linear(f"{layer}.{kind}.self.query", 12, 12)
            linear(f"{layer}.{kind}.self.key", 12, width)
            linear(f"{layer}.{kind}.self.value", 12, width)
            linear(f"{layer}.{kind}.output.dense", 12, 12)
            norm(f"{layer}.{kind}.output.LayerNorm", 12)
        linear(f"{layer}.intermediate.dense", 24, 12)
        linear(f"{layer}.output.dense", 12, 24)
        norm(f"{layer}.output.LayerNorm", 12)
    for place, (into, out) in {
        0: (12, 1024),
        2: (1024, 128),
        4: (128, 64),
        6: (64, 16),
        7: (16, 1),
    }.items():
        linear(f"mlp.layers.{place}", out, into)
    made[f"{read}.embeddings.position_ids"] = torch.arange(40)[None]
    linear("blip.text_decoder.cls", 12, 12)
    return made


CHAT = (
    "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def save_vlm(folder: Path) -> Path:
    """A LLaVA of transformers with its processor: one token per byte, four per picture."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import (
        CLIPImageProcessor,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(BPE({letter: place for place, letter in enumerate(letters)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    torch.manual_seed(3)
    config = LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 16,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 16384,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        chat_template=CHAT,
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(folder)
    return folder
