"""A picture of another program, as far as its text tells how it was made."""

from pathlib import Path
from typing import Any

from cmlora.errors import CmloraError
from cmlora.infotext import Infotext
from cmlora.pipelines import library
from cmlora.pipelines.cmlora_pipeline import CMLoRAPipeline
from cmlora.pipelines.render import Wish, assemble, write_recipe
from cmlora.recipe import SAMPLERS, Recipe


def retell(
    told: Infotext,
    model: str | Path,
    *,
    folder: str | Path | None = None,
    device: str | None = None,
    config: str | Path | None = None,
) -> tuple[CMLoRAPipeline, Recipe]:
    """The model and a recipe with the prompt, seed, sampler, size and LoRAs of an infotext.

    LoRAs are applied as web UIs do it, all at once. LoRAs with a hash are found by it, others by
    their names. What the text does not say is the model's own.

    Args:
        told: what the text says.
        model: see `cmlora.pipelines.models.locate`.
        folder: where the LoRA files are.
        device: where to compute.
        config: see `cmlora.pipelines.render.assemble`.

    Raises:
        CmloraError: if there is no prompt, or a LoRA is not there.
    """
    if not told.prompt.strip():
        raise CmloraError("the picture's text has no prompt")
    hashed = [(lora.name, lora.hash) for lora in told.loras if lora.hash]
    paths = dict(
        zip(
            (name for name, _ in hashed),
            library.by_hash(hashed, model=model, folder=folder),
            strict=True,
        )
    )
    loras = [(str(paths.get(lora.name, lora.name)), lora.weight) for lora in told.loras]
    pipe = assemble(model, loras, folder=folder, device=device, config=config)
    _use_sampler(pipe, told)
    wish = Wish(
        told.prompt,
        method="merge" if loras else "naive",
        cache="none",
        negative_prompt=told.negative_prompt,
        steps=told.whole("Steps") or 20,
        guidance_scale=told.real("CFG scale"),
        size=told.size,
        seed=told.whole("Seed") or 0,
    )
    return pipe, write_recipe(pipe, wish)


def _use_sampler(pipe: Any, told: Infotext) -> None:
    """Sets the scheduler that a web UI's sampler is, if there is one."""
    import diffusers

    sampler = told.values.get("Sampler", "").removesuffix(" Karras")
    name = next((name for name, said in SAMPLERS.items() if said == sampler), None)
    if name is None:
        return
    kind = getattr(diffusers, name)
    karras = "Karras" in (told.values.get("Schedule type", "") + told.values.get("Sampler", ""))
    options = {"use_karras_sigmas": True} if karras else {}
    pipe.pipe.scheduler = kind.from_config(pipe.scheduler.config, **options)
