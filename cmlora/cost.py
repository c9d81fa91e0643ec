"""What a composition costs, in multiply-accumulates, before anything is run.

A pass is counted on the meta device: the denoiser is built from its configuration without weights
and called once in full and once with a filled cache slot. Attention products are included. The
LoRAs' own products are not: they add about rank * (I + O) per token and layer, a few percent.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from cmlora.caching.policy import tally
from cmlora.caching.unet import Cut, UNetCache
from cmlora.errors import CmloraError
from cmlora.plan import Plan

KNOWN: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "sd15": {"cross_attention_dim": 768, "sample_size": 64},
        "sdxl": {
            "sample_size": 128,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (320, 640, 1280),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    }
)
"""UNet configurations that can be counted without a model on disk."""


@dataclass(frozen=True)
class PassCost:
    """Multiply-accumulates of one denoiser call on the whole (guidance-doubled) batch.

    Args:
        full: of a call that runs every block.
        light: of a call that reuses the deep part.
    """

    full: int
    light: int

    @property
    def ratio(self) -> float:
        """Light over full."""
        return self.light / self.full

    def of(self, full: Mapping[str, float], light: Mapping[str, float]) -> int:
        """Multiply-accumulates of the calls counted by pass key; half a call is on half a batch."""
        return round(sum(full.values()) * self.full + sum(light.values()) * self.light)


@dataclass(frozen=True)
class RunCost:
    """What the plans of one run add up to.

    Args:
        full: full calls per pass key; one on one branch of guidance is a half.
        light: light calls per pass key, likewise.
        macs: multiply-accumulates of the run.
        steps: denoising steps.
    """

    full: Mapping[str, float]
    light: Mapping[str, float]
    macs: int
    steps: int

    @property
    def per_step(self) -> float:
        """Mean multiply-accumulates of a denoising step."""
        return self.macs / self.steps


def shapes(
    config: Mapping[str, Any],
    height: int,
    width: int,
    *,
    batch: int = 2,
    scale: int = 8,
    tokens: int = 77,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The latent's shape (B, C, H, W) and the prompt embedding's (B, tokens, features).

    Args:
        config: the UNet's configuration.
        height: of the picture, in pixels.
        width: of the picture, in pixels.
        batch: 2 for one picture with classifier-free guidance.
        scale: pixels per latent cell (8 for Stable Diffusion's VAE).
        tokens: the prompt's length.

    Raises:
        CmloraError: if the size is not a positive multiple of `scale`.
    """
    if min(height, width) < scale or height % scale or width % scale:
        raise CmloraError(f"size {width}x{height}: both must be positive multiples of {scale}")
    channels, features = config.get("in_channels", 4), config.get("cross_attention_dim", 1280)
    features = features if isinstance(features, int) else features[0]
    return (batch, channels, height // scale, width // scale), (batch, tokens, features)


def pass_macs(
    unet: Any,
    sample_shape: Sequence[int],
    encoder_shape: Sequence[int],
    *,
    cut: Cut | None = None,
    attention: bool = True,
) -> PassCost:
    """Count one denoiser call.

    Args:
        unet: a `diffusers.UNet2DConditionModel`, or the mapping of its configuration.
        sample_shape: of the latent, (B, C, H, W), both guidance branches included.
        encoder_shape: of the prompt embedding, (B, tokens, features).
        cut: where the cache cuts the UNet; ``None`` is the family's default.
        attention: False leaves out the two products of attention, as counters do that only see
            convolutions and linear layers; for comparison with figures published that way.

    Raises:
        CmloraError: if the denoiser is no UNet2DConditionModel or does not have the cut's blocks.
    """
    config = {name: value for name, value in _config(unet).items() if name[0] != "_"}
    return _counted(
        json.dumps(config, sort_keys=True, default=str),
        tuple(sample_shape),
        tuple(encoder_shape),
        cut,
        attention,
    )


def plan_cost(plans: Sequence[Plan], full: int, light: int | None) -> RunCost:
    """Add up the plans of a run: a pass that may reuse is light while its slot holds a feature.

    Args:
        plans: one per denoising step, in order.
        full: multiply-accumulates of a full call.
        light: of a light call; ``None`` if there is no cache, then every call is full.

    >>> from cmlora.plan import Pass
    >>> one = Plan((Pass({"a": 1.0}, may_reuse=True),))
    >>> cost = plan_cost([one, one, one], 100, 40)
    >>> dict(cost.full), dict(cost.light), cost.per_step
    ({'a': 1}, {'a': 2}, 60.0)
    """
    calls = tally(plans)
    fulls, lights = dict(calls.full), dict(calls.light)
    if light is None:
        fulls = {key: fulls.get(key, 0) + lights.get(key, 0) for key in {**fulls, **lights}}
        lights = {}
    macs = PassCost(full, light or 0).of(fulls, lights)
    return RunCost(MappingProxyType(fulls), MappingProxyType(lights), macs, len(plans))


def _config(unet: Any) -> Mapping[str, Any]:
    """What the denoiser was built from."""
    from diffusers import UNet2DConditionModel

    config: Mapping[str, Any] = unet if isinstance(unet, Mapping) else unet.config
    found = config.get("_class_name", type(unet).__name__)
    if not isinstance(unet, Mapping | UNet2DConditionModel) or (
        "_class_name" in config and found != "UNet2DConditionModel"
    ):
        raise CmloraError(f"cost is counted for a UNet2DConditionModel; this denoiser is {found}")
    return config


@lru_cache(maxsize=64)
def _counted(
    config: str, sample: tuple[int, ...], encoder: tuple[int, ...], cut: Cut | None, attention: bool
) -> PassCost:
    """Count on a copy that has the shapes and none of the weights, adapters and hooks."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        model: Any = UNet2DConditionModel.from_config(json.loads(config)).eval()
    call = _arguments(model.config, sample, encoder)
    cache = UNetCache(model, cut)
    cache.attach()
    with cache.run("counted", reuse=False):
        full = _count(model, call, attention)
    with cache.run("counted", reuse=True):
        light = _count(model, call, attention)
    return PassCost(full, light)


def _arguments(
    config: Mapping[str, Any], sample_shape: Sequence[int], encoder_shape: Sequence[int]
) -> dict[str, Any]:
    """What the denoiser is called with, as tensors without values."""
    batch = sample_shape[0]
    call: dict[str, Any] = {
        "sample": torch.empty(*sample_shape, device="meta"),
        "timestep": torch.empty((), device="meta"),
        "encoder_hidden_states": torch.empty(*encoder_shape, device="meta"),
    }
    if config.get("addition_embed_type") == "text_time":  # SDXL: pooled text and six size numbers
        numbers = 6
        pooled = config["projection_class_embeddings_input_dim"]
        pooled -= numbers * config["addition_time_embed_dim"]
        call["added_cond_kwargs"] = {
            "text_embeds": torch.empty(batch, pooled, device="meta"),
            "time_ids": torch.empty(batch, numbers, device="meta"),
        }
    return call


def _count(model: Any, call: Mapping[str, Any], attention: bool) -> int:
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(**call)
    flops = counter.get_flop_counts()["Global"]
    products = ("bmm", "attention")  # also baddbmm and the fused kernels
    counted = (n for op, n in flops.items() if attention or not any(p in str(op) for p in products))
    return sum(counted) // 2
