"""The embedded autoencoder: an `AutoencoderKL` whose encoder is known in closed form.

The encoder's weights are set, not trained, so that it computes the principal components of
`cmlora.emoji.latents`: its residual branches are zero, its strided convolutions gather 4x4 patches,
and the last norm and activation are passed through unharmed by carrying every value twice, with
both signs, since silu(x) - silu(-x) = x. The decoder is trained against pictures.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from rich.console import Console
from torch import Tensor, nn

from cmlora.emoji.base import PICTURES, encoded, to_tensor
from cmlora.emoji.checkpoint import Averaged, Checkpoint
from cmlora.emoji.dataset import dataset
from cmlora.emoji.latents import CHANNELS, PATCH, PatchBasis
from cmlora.emoji.paths import work_folder

CARRIER = 200.0
"""Constant that dominates the variance in the last group norm, so that it divides every picture by
the same number."""
GROUPS = 8
BATCH = 16
RATE = 3e-3
BLUR = 0.03
"""Standard deviation of the noise on the latents that the decoder learns from: the denoiser's
latents are not exact either."""


def build() -> AutoencoderKL:
    """An untrained autoencoder: 64x64 RGB to 12 channels on a 16x16 grid."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=GROUPS,
        sample_size=64,
        scaling_factor=1.0,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


@torch.no_grad()
def set_encoder(model: AutoencoderKL, basis: PatchBasis) -> None:
    """Make the encoder compute `basis.encode`, with a variance of practically zero."""
    encoder = model.encoder
    for parameter in encoder.parameters():
        parameter.zero_()
    for block in (encoder.down_blocks, [encoder.mid_block]):
        for part in block:
            for resnet in part.resnets:
                resnet.norm1.weight.fill_(1.0)
                resnet.norm2.weight.fill_(1.0)
                if resnet.conv_shortcut is not None:
                    _identity(resnet.conv_shortcut)
    encoder.conv_in.weight[:3, :, 1, 1] = torch.eye(3)
    gather = encoder.down_blocks[0].downsamplers[0].conv
    for y in range(2):
        for x in range(2):
            for colour in range(3):
                gather.weight[(y * 2 + x) * 3 + colour, colour, y, x] = 1.0
    project = encoder.down_blocks[1].downsamplers[0].conv
    rows = basis.analysis.reshape(CHANNELS, 3, PATCH, PATCH)
    offset = basis.analysis @ basis.mean
    gain = CARRIER / 2
    encoder.conv_norm_out.weight.fill_(1.0)
    logvar = encoder.conv_out.bias[CHANNELS:]
    logvar.fill_(-30.0)
    per_group = encoder.conv_norm_out.num_channels // GROUPS
    values = (per_group - 2) // 2
    for component in range(CHANNELS):
        group, place = divmod(component, values)
        for sign, channel in (
            (1.0, group * per_group + 2 * place),
            (-1.0, group * per_group + 2 * place + 1),
        ):
            for py in range(PATCH):
                for px in range(PATCH):
                    source = ((py % 2) * 2 + px % 2) * 3
                    project.weight[channel, source : source + 3, py // 2, px // 2] = (
                        sign * rows[component, :, py, px]
                    )
            project.bias[channel] = -sign * offset[component]
            encoder.conv_out.weight[component, channel, 1, 1] = sign * gain
        project.bias[(group + 1) * per_group - 2] = CARRIER
        project.bias[(group + 1) * per_group - 1] = -CARRIER


def _identity(convolution: nn.Conv2d) -> None:
    """A 1x1 convolution that copies its input channels."""
    for channel in range(min(convolution.weight.shape[:2])):
        convolution.weight[channel, channel, 0, 0] = 1.0


def psnr(pictures: Tensor, others: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in -1..1, over all of them together."""
    return 10 * math.log10(4 / float((pictures - others).square().mean()))


def train(steps: int, seed: int = 0) -> Path:
    """Train the decoder, or continue; saves the averaged model to the work folder's `vae/`."""
    console = Console(stderr=True)
    folder = work_folder()
    torch.manual_seed(seed)
    torch.set_flush_denormal(True)
    data = dataset("base", PICTURES, seed=1, held_out=False)
    everything = dataset("probe", 40_000, seed=2, held_out=True)
    _, basis = encoded(data, "base")
    model = build()
    set_encoder(model, basis)
    decoder = model.decoder.to(memory_format=torch.channels_last)
    modules = nn.ModuleList([decoder])
    average = Averaged(modules)
    optimizer = torch.optim.AdamW(decoder.parameters(), RATE, betas=(0.9, 0.99), weight_decay=0.0)
    checkpoint = Checkpoint(folder / "vae.checkpoint.pt", modules, average, optimizer)
    start = checkpoint.resume()
    test = to_tensor(dataset("test", 1000, seed=3, held_out=True).pictures[:256])
    began, losses = time.monotonic(), []
    for step in range(start, steps):
        rng = np.random.default_rng((seed, step))
        rows = np.sort(rng.integers(len(everything.pictures), size=BATCH))
        clean = to_tensor(everything.pictures[rows])
        generator = torch.Generator().manual_seed(seed * 10_000_019 + step)
        latents = basis.encode(clean)
        latents = latents + BLUR * torch.randn(latents.shape, generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 200) * max(0.0, 1 - step / steps)
        drawn = decoder(latents.contiguous(memory_format=torch.channels_last))
        loss = (drawn - clean).square().mean() + 0.05 * (drawn - clean).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        average.update()
        losses.append(float(loss.detach()))
        if (step + 1) % 200 == 0 or step + 1 == steps:
            checkpoint.save(step + 1)
            final = build()
            with average.applied(), torch.no_grad():
                quality = psnr(test, decoder(basis.encode(test)))
                final.load_state_dict(model.state_dict())
            final.half().save_pretrained(folder / "vae")
            pace = (step + 1 - start) * BATCH / (time.monotonic() - began)
            console.print(
                f"step {step + 1}/{steps} loss {np.mean(losses[-200:]):.4f} "
                f"held-out PSNR {quality:.2f} dB {pace:.1f} pictures/s"
            )
    return folder / "vae"
