"""Stable Diffusion 1.5 and 2 for diffusers' ``custom_pipeline=``: give it the path of this file."""

from diffusers import StableDiffusionPipeline

from cmlora.pipelines.composed import Composed


class CMLoRAStableDiffusionPipeline(Composed, StableDiffusionPipeline):  # type: ignore[misc]
    """`diffusers.StableDiffusionPipeline` whose call composes the loaded LoRAs."""
