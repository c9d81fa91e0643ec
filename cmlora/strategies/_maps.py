"""What the methods that weigh places or frequency bands share: pure functions of stacked outputs.

Shapes: outputs are (P, B, C, H, W), per-place quantities (N, B, 1, H, W).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Scale = Literal["mean", "rms", "max", "joint"]


def exact(outputs: Tensor) -> Tensor:
    """In fp32 or wider."""
    return outputs.float() if outputs.dtype.itemsize < 4 else outputs


def sizes(departures: Tensor) -> Tensor:
    """Norm over the channels, (N, B, C, H, W) to (N, B, 1, H, W)."""
    return departures.square().sum(2, keepdim=True).sqrt()


def relative(size: Tensor, scale: Scale) -> Tensor:
    """Sizes as multiples of what is usual, 0 where a LoRA changes nothing anywhere.

    Args:
        size: (N, B, 1, H, W).
        scale: what they are divided by: the LoRA's own ``mean``, root mean square or maximum over
            the picture, or (``joint``) the mean over all LoRAs and places.
    """
    if scale == "mean":
        usual = size.mean((-2, -1), keepdim=True)
    elif scale == "rms":
        usual = size.square().mean((-2, -1), keepdim=True).sqrt()
    elif scale == "max":
        usual = size.amax((-2, -1), keepdim=True)
    else:
        usual = size.mean((0, -2, -1), keepdim=True)
    return size / usual.where(usual > 0, 1)


def blurred(values: Tensor, side: int) -> Tensor:
    """Means over squares of ``side`` places, (.., H, W) to the same shape; cut off at the edges."""
    if side == 1:
        return values
    from torch.nn.functional import avg_pool2d

    height, width = values.shape[-2:]
    flat = values.reshape(1, -1, height, width)
    means = avg_pool2d(flat, side, ceil_mode=True, count_include_pad=False)
    wide = means.repeat_interleave(side, -2).repeat_interleave(side, -1)
    return wide[..., :height, :width].reshape(values.shape)


def mixed(weights: Tensor, values: Tensor) -> Tensor:
    """sum_j weights[j] values[j], in the order of the LoRAs, whatever their number."""
    total = weights[0] * values[0]
    for weight, value in zip(weights[1:], values[1:], strict=True):
        total = total + weight * value
    return total


def guided(values: Tensor, guidance: float) -> Tensor:
    """u + s (c - u) of a batch with the unconditional half first, (.., B, C, H, W) to B / 2."""
    unconditional, conditional = values.chunk(2, dim=-4)
    return unconditional + guidance * (conditional - unconditional)


def conditional(values: Tensor) -> Tensor:
    """The conditional half of a batch, twice, so that both halves are weighed alike."""
    half = values.chunk(2, dim=-4)[1]
    return half.repeat(*([1] * (half.ndim - 4)), 2, 1, 1, 1)


def haar(values: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """One level of the orthonormal Haar transform, (.., H, W) to four bands of half the sides.

    Odd sides are continued by their last row or column; `unhaar` cuts it off again.

    Returns:
        the low band, and the three high ones (horizontal, vertical, diagonal detail).
    """
    from torch.nn.functional import pad

    height, width = values.shape[-2:]
    flat = values.reshape(1, -1, height, width)
    flat = pad(flat, (0, width % 2, 0, height % 2), mode="replicate")
    values = flat.reshape(*values.shape[:-2], height + height % 2, width + width % 2)
    a, b = values[..., 0::2, 0::2], values[..., 0::2, 1::2]
    c, d = values[..., 1::2, 0::2], values[..., 1::2, 1::2]
    return (a + b + c + d) / 2, ((a - b + c - d) / 2, (a + b - c - d) / 2, (a - b - c + d) / 2)


def unhaar(low: Tensor, high: tuple[Tensor, Tensor, Tensor], height: int, width: int) -> Tensor:
    """The inverse of `haar`, (.., H, W)."""
    x, y, z = high
    wide = low.new_empty(*low.shape[:-2], 2 * low.shape[-2], 2 * low.shape[-1])
    wide[..., 0::2, 0::2] = (low + x + y + z) / 2
    wide[..., 0::2, 1::2] = (low - x + y - z) / 2
    wide[..., 1::2, 0::2] = (low + x - y - z) / 2
    wide[..., 1::2, 1::2] = (low - x - y + z) / 2
    return wide[..., :height, :width]
