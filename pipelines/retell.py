"""A picture of another program, as far as its text tells how it was made."""

import re
from pathlib import Path

from cmlora.errors import CmloraError
from cmlora.infotext import Infotext
from cmlora.pipelines import library
from cmlora.pipelines.cmlora_pipeline import CMLoRAPipeline
from cmlora.pipelines.render import Wish, assemble, write_recipe
from cmlora.pipelines.samplers import use_sampler
from cmlora.recipe import Recipe

_STEPS = 20
_CARRIED = ("Sampler", "Schedule type", "Seed", "Steps", "CFG scale", "Size", "Lora hashes")
_OUTSIDE = ("Model", "Model hash", "Hashes", "Version", "Created Date", "Time taken", "User")
_OTHERS = ("Civitai resources", "Civitai metadata", "RNG")
_HEARD = frozenset((*_CARRIED, *_OUTSIDE, *_OTHERS))
"""What is carried out, is about the file or the model, which the user names, or about the noise."""
_MARKED = re.compile(r"(?<!\\)[(\[][^()\[\]]*(?<!\\)[)\]]|\bBREAK\b|\bAND\b|<\w+:[^<>]*>")
"""Weights, turns and tags of web UIs' prompts, which are no words."""
_SHOWN = 60  # characters of a stranger's text
_MARKS = 5


def retell(
    told: Infotext,
    model: str | Path,
    *,
    folder: str | Path | None = None,
    device: str | None = None,
    config: str | Path | None = None,
) -> tuple[CMLoRAPipeline, Recipe, list[str]]:
    """The model and a recipe with the prompt, seed, sampler, size and LoRAs of an infotext.

    LoRAs are applied as web UIs do it, all at once. LoRAs with a hash are found by it, others by
    their names. What the text does not say is the model's own. The curves of LoRAs' tags are not
    in the recipe, see `cmlora.infotext.Infotext.schedule`.

    Args:
        told: what the text says.
        model: see `cmlora.pipelines.models.locate`.
        folder: where the LoRA files are.
        device: where to compute.
        config: see `cmlora.pipelines.render.assemble`.

    Returns:
        The model, the recipe, and what of the text is not carried out, a line for each thing.

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
    sampler, kind = (told.values.get(key, "").strip() for key in ("Sampler", "Schedule type"))
    left = use_sampler(pipe.pipe, sampler[:_SHOWN], kind[:_SHOWN])
    wish = Wish(
        told.prompt,
        method="merge" if loras else "naive",
        cache="none",
        negative_prompt=told.negative_prompt,
        steps=told.whole("Steps") or _STEPS,
        guidance_scale=told.real("CFG scale"),
        size=told.size,
        seed=told.whole("Seed") or 0,
    )
    recipe = write_recipe(pipe, wish)
    known = told.values.get("Model hash", "").lower()
    if known and Path(model).is_file() and not recipe.model_hash.startswith(known):
        left.append(f"Model hash {known[:_SHOWN]} is not that of {model}")
    return pipe, recipe, [*left, *_unheard(told), *told.notes()]


def _unheard(told: Infotext) -> list[str]:
    """What of an infotext is not carried out, and what is made up in its place."""
    found = []
    for key, number, instead in (
        ("Seed", told.whole("Seed"), "0 is used"),
        ("Steps", told.whole("Steps") or None, f"{_STEPS} are used"),
        ("CFG scale", told.real("CFG scale"), "the model's own is used"),
        ("Size", told.size, "the model's own is used"),
    ):
        value = told.values.get(key, "")
        if number is None and (value or key in ("Seed", "Steps")):
            found.append(f"{key} {value[:_SHOWN] or 'not stated'}: {instead}")
    for key, value in told.values.items():
        if key not in _HEARD and (key, value) != ("Clip skip", "1"):
            found.append(f"{key} {value[:_SHOWN]} is left out")
    for what, text in (("prompt", told.prompt), ("negative prompt", told.negative_prompt)):
        marks = dict.fromkeys(match[0][:_SHOWN] for match in _MARKED.finditer(text))
        for mark in list(marks)[:_MARKS]:
            found.append(f"{mark!r} in the {what} is read as plain words")
        if len(marks) > _MARKS:
            found.append(f"so are {len(marks) - _MARKS} more in the {what}")
    return found
