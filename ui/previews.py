"""Small pictures for a page: of finished pictures, and of a picture in the making."""

import base64
import io
import math
from typing import Any

import torch
from PIL import Image
from torch import Tensor

SIDE = 256
"""Longest side of a preview in pixels."""

_EXACT = 32 * 32  # latent cells up to which the decoder itself is quick enough for a preview


def data_uri(image: Image.Image, side: int | None = SIDE) -> str:
    """A picture as a ``data:`` address, made smaller if it is larger than ``side``.

    >>> data_uri(Image.new("RGB", (2, 2)))[:22]
    'data:image/png;base64,'
    """
    if side is not None and max(image.size) > side:
        image = image.copy()
        image.thumbnail((side, side))
    kind = "PNG" if max(image.size) <= 128 else "JPEG"
    file = io.BytesIO()
    image.convert("RGB").save(file, kind, **({} if kind == "PNG" else {"quality": 88}))
    text = base64.b64encode(file.getvalue()).decode()
    return f"data:image/{kind.lower()};base64,{text}"


class Previewer:
    """Shows what a run is heading for.

    From the latents of two neighbouring steps follow the picture and the noise they are made of:
    x_t = alpha_t x0 + sigma_t e and x_s = alpha_s x0 + sigma_s e give
    x0 = (sigma_s x_t - sigma_t x_s) / (sigma_s alpha_t - sigma_t alpha_s), exact for samplers that
    take straight steps (DDIM, Euler) and near it for the others.

    Args:
        pipe: a diffusers pipeline with an autoencoder; nothing of it is changed.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._before: tuple[int, Tensor] | None = None
        self._colours: Tensor | None = None

    def start(self) -> None:
        """A new run begins."""
        self._before = None

    def see(self, index: int, latents: Tensor, *, draw: bool = True) -> Image.Image | None:
        """The preview after a step.

        Args:
            index: of the step, 0 is the first.
            latents: after it, (B, C, H, W).
            draw: False only remembers the latents.

        Returns:
            the picture, or ``None`` if the latents are no maps or nothing is to be drawn.
        """
        if not isinstance(latents, Tensor) or latents.ndim != 4:
            return None
        state = latents[:1].detach().float()
        before, self._before = self._before, (index, state)
        if not draw:
            return None
        if before is not None and before[0] == index - 1:
            state = _heading_for(self._pipe.scheduler, index, before[1], state)
        return self._decode(state)

    def _decode(self, latents: Tensor) -> Image.Image | None:
        vae = getattr(self._pipe, "vae", None)
        if vae is None:
            return None
        with torch.no_grad():
            if latents.shape[-1] * latents.shape[-2] <= _EXACT:
                pixels = _decoded(vae, latents)[0]
            else:
                pixels = self._mixed(vae, latents)
        scaled = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
        return Image.fromarray(scaled.permute(1, 2, 0).numpy())

    def _mixed(self, vae: Any, latents: Tensor) -> Tensor:
        """Colours as a linear function of the latent, found once by least squares; (3, H, W)."""
        if self._colours is None:
            noise = torch.Generator().manual_seed(0)
            channels = latents.shape[1]
            flat = torch.randn((8, channels, 1, 1), generator=noise).expand(-1, -1, 8, 8)
            known = flat.to(latents)
            seen = _decoded(vae, known)
            seen = torch.nn.functional.adaptive_avg_pool2d(seen, 1).flatten(1)
            inputs = torch.cat([known[..., 0, 0], torch.ones_like(known[:, :1, 0, 0])], 1)
            self._colours = torch.linalg.pinv(inputs.cpu()) @ seen.cpu()
        weights = self._colours.to(latents)
        mixed = torch.einsum("chw,cr->rhw", latents[0], weights[:-1])
        return mixed + weights[-1][:, None, None]


def _decoded(vae: Any, latents: Tensor) -> Tensor:
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    scaled = latents / vae.config.scaling_factor + shift
    pixels: Tensor = vae.decode(scaled.to(vae.dtype), return_dict=False)[0]
    return pixels.float()


def _heading_for(scheduler: Any, index: int, earlier: Tensor, later: Tensor) -> Tensor:
    """x0 from the latents before and after a step, or the later ones where it does not follow."""
    try:
        (a, s), (b, r) = _level(scheduler, index), _level(scheduler, index + 1)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return later
    bottom = r * a - s * b
    if abs(bottom) < 1e-6:
        return later
    return (r * earlier - s * later) / bottom


def _level(scheduler: Any, index: int) -> tuple[float, float]:
    """(alpha, sigma) of the latents before step ``index``; (1, 0) behind the last one."""
    steps = len(scheduler.timesteps)
    if index >= steps:
        return 1.0, 0.0
    if float(scheduler.init_noise_sigma) > 1.5:  # latents that grow with sigma, as Euler's
        return 1.0, float(scheduler.sigmas[index])
    if "alphas_cumprod" not in vars(scheduler):  # flow matching
        sigma = float(scheduler.sigmas[index])
        return 1.0 - sigma, sigma
    kept = float(scheduler.alphas_cumprod[int(scheduler.timesteps[index])])
    return math.sqrt(kept), math.sqrt(1 - kept)
