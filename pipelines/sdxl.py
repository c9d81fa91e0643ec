"""Stable Diffusion XL for diffusers' ``custom_pipeline=``: give it the path of this file."""

from diffusers import StableDiffusionXLPipeline

from cmlora.pipelines.composed import Composed


class CMLoRAStableDiffusionXLPipeline(Composed, StableDiffusionXLPipeline):  # type: ignore[misc]
    """`diffusers.StableDiffusionXLPipeline` whose call composes the loaded LoRAs."""
