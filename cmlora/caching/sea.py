"""What SeaCache compares from step to step: the picture in a denoiser's input.

diffusers finds it in Cosmos 3 and in Wan's text-to-video model. In any other it runs every step in
full, unless it is told where the picture is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cmlora.calls import Signature
from cmlora.denoisers import kind
from cmlora.latents import as_tensor, layout

if TYPE_CHECKING:
    from torch import Tensor, nn


def picture(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[Tensor] | None:
    """The noisy latents of a call, (C, F, H, W) per picture, without what they are made from.

    Args:
        model: the denoiser, of a family in `cmlora.denoisers.KINDS`.
        args: of the call.
        kwargs: of the call.

    Returns:
        ``None`` where no picture is found.
    """
    row, signature = kind(model), Signature(model)

    def find(name: str) -> Any:
        return signature.find((name,), tuple(args), kwargs)

    sample = as_tensor(find("hidden_states"))
    if sample is None:
        return None
    config: Any = model.config
    channels = config.out_channels or config.in_channels
    if row.latent == "tokens":
        sample = sample[..., : channels * config.patch_size**2]
    else:
        sample = sample[:, :channels]
    maps = layout(row, sample, find)
    if sample.ndim == 5:
        return list(sample)
    found = maps.unpack(sample)
    return [each[:, None] for each in found] if found.ndim == 4 else None
