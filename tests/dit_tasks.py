"""Image to image, inpainting and ControlNet pipelines of the transformers in `families`."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    QwenImageControlNetModel,
    QwenImageControlNetPipeline,
    QwenImageImg2ImgPipeline,
    QwenImageInpaintPipeline,
    SD3ControlNetModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    ZImageControlNetModel,
    ZImageControlNetPipeline,
    ZImageImg2ImgPipeline,
    ZImageInpaintPipeline,
)

from tests import families
from tests.families import Family

SIDE = 16
"""Of a picture in pixels; the autoencoders halve it."""

PIPELINES: dict[str, dict[str, Any]] = {
    "sd3": {
        "img2img": StableDiffusion3Img2ImgPipeline,
        "inpaint": StableDiffusion3InpaintPipeline,
        "controlnet": StableDiffusion3ControlNetPipeline,
    },
    "flux": {
        "img2img": FluxImg2ImgPipeline,
        "inpaint": FluxInpaintPipeline,
        "controlnet": FluxControlNetPipeline,
    },
    "qwen": {
        "img2img": QwenImageImg2ImgPipeline,
        "inpaint": QwenImageInpaintPipeline,
        "controlnet": QwenImageControlNetPipeline,
    },
    "zimage": {
        "img2img": ZImageImg2ImgPipeline,
        "inpaint": ZImageInpaintPipeline,
        "controlnet": ZImageControlNetPipeline,
    },
}
"""By family and task."""

TASKS = [(family, task) for family, tasks in PIPELINES.items() for task in tasks]


def vae(family: str, channels: int = 4) -> Any:
    """An autoencoder of the family's kind that halves the sides of a picture."""
    torch.manual_seed(0)
    if family == "qwen":
        return AutoencoderKLQwenImage(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[0.1] * 4,
            latents_std=[1.5] * 4,
        ).eval()
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        shift_factor=0.1,
        scaling_factor=0.5,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def picture() -> torch.Tensor:
    """A picture (1, 3, H, W) with values from 0 to 1."""
    return torch.rand((1, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(7))


def mask() -> torch.Tensor:
    """(1, 1, H, W): the right half is to be drawn anew."""
    half = torch.zeros(1, 1, SIDE, SIDE)
    half[..., SIDE // 2 :] = 1
    return half


def controlnet(family: str) -> Any:
    """A ControlNet for the family whose answers are not zero, as they are when it is new."""
    plain = families.FAMILIES[family]().models()[0]  # one without LoRAs
    heads: dict[str, Any] = {}
    torch.manual_seed(3)
    if family == "sd3":
        kind: Any = SD3ControlNetModel
        names = ["num_attention_heads", "attention_head_dim", "joint_attention_dim"]
        names += ["caption_projection_dim", "pooled_projection_dim", "pos_embed_max_size"]
        shape = {name: plain.config[name] for name in (*names, "sample_size", "in_channels")}
        net = kind(num_layers=2, out_channels=4, **shape)
    elif family == "zimage":
        net = ZImageControlNetModel(
            control_layers_places=[0, 2],
            control_refiner_layers_places=[0],
            control_in_dim=4,
            dim=32,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
        )
    else:
        kind = FluxControlNetModel if family == "flux" else QwenImageControlNetModel
        heads = {n: plain.config[n] for n in ("attention_head_dim", "num_attention_heads")}
        options = {"num_single_layers": 1} if family == "flux" else {}
        net = kind.from_transformer(
            plain, num_layers=2, load_weights_from_transformer=False, **heads, **options
        )
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return net.eval()


class Task(Family):
    """A family whose pipeline may draw from the global generator, as SD3's ControlNet does."""

    def run(self, **options: Any) -> torch.Tensor:
        torch.manual_seed(5)
        return super().run(**options)


def task(family: str, name: str) -> Task:
    """A pipeline of one task, with the transformer and LoRAs of `families.family`."""
    base, channels = families.family(family), 4
    if (family, name) == ("sd3", "inpaint"):  # it wants as many channels as the real one has
        base, channels = families.sd3(channels=16), 16
        families.add_loras(base.models(), families.NAMES, families.TARGETS)
    parts = {**base.pipe.components, "vae": vae(family, channels)}
    if name == "controlnet":
        parts["controlnet"] = controlnet(family)
    kind = PIPELINES[family][name]
    pipe = kind(**parts)
    pipe.set_progress_bar_config(disable=True)
    call = {**base.call, "height": SIDE, "width": SIDE}
    if name == "controlnet":
        call["control_image"] = picture()
        call["controlnet_conditioning_scale"] = 0.8
    else:
        call |= {"image": picture(), "strength": 0.8}
    if name == "inpaint":
        call["mask_image"] = mask()
    return Task(pipe, base.denoisers, call)
