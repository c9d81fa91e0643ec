"""From names to a model with LoRAs in it, and from a recipe to those it was made with."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from cmlora.errors import CmloraError
from cmlora.pipelines import library
from cmlora.pipelines.cmlora_pipeline import CMLoRAPipeline
from cmlora.pipelines.feasible import check_size, scheduler_of
from cmlora.pipelines.models import fingerprint, resolve
from cmlora.plan import Role, Scope
from cmlora.recipe import Recipe


def assemble(
    model: str | Path,
    loras: Sequence[tuple[str | Path, float]],
    *,
    folder: str | Path | None = None,
    roles: Mapping[str, Role] | None = None,
    scopes: Mapping[str, Scope] | None = None,
    dtype: str | None = None,
    device: str | None = None,
    config: str | Path | None = None,
    into: Mapping[str, Sequence[str]] | None = None,
    second: Mapping[str, tuple[str | Path, float]] | None = None,
) -> CMLoRAPipeline:
    """A model with LoRAs loaded, all by name or path.

    Args:
        model: see `cmlora.pipelines.models.locate`.
        loras: name or path, and strength, of each LoRA.
        folder: where LoRA names are looked up.
        roles: ``high`` or ``low`` by the name a LoRA gets in the pipeline.
        scopes: ``global`` or ``local`` by the same names.
        dtype: of the weights.
        device: where to compute.
        config: for a model in a single file, a diffusers folder of its family.
        into: by the same names, the denoisers a LoRA's file goes into.
        second: by the same names, a LoRA's file for ``transformer_2`` and the strength it has there
            relative to the LoRA's; its first file then goes into ``transformer`` alone.

    Raises:
        CmloraError: for anything that is missing or does not fit. LoRA files are looked for before
            the model is loaded, so that a wrong name costs no time.
    """
    where = resolve(model)
    files = [library.find(reference, model=model, folder=folder) for reference, _ in loras]
    names: list[str] = []
    for file in files:
        names.append(library.adapter_name(file, names))
    said = {"role": roles, "scope": scopes, "into": into, "second file": second}
    for what, given in said.items():
        for name in given or {}:
            if name not in names:
                listed = ", ".join(names) or "none"
                raise CmloraError(f"{what} for {name!r}: the LoRAs are {listed}")
    others = {
        name: (library.find(reference, model=model, folder=folder), weight)
        for name, (reference, weight) in (second or {}).items()
    }
    places: dict[str, Sequence[str]] = {**dict.fromkeys(others, ("transformer",)), **(into or {})}
    layout = {} if config is None else {"config": config}
    if layout and where.is_dir():
        raise CmloraError(f"config is for a model in a single file; {where} is a folder")
    pipe = CMLoRAPipeline.from_pretrained(where, dtype=dtype, device=device, **layout)
    pipe.ensemble.source = model
    pipe.set_progress_bar_config(disable=True)
    for name, file, (_, weight) in zip(names, files, loras, strict=True):
        role, scope = (roles or {}).get(name), (scopes or {}).get(name)
        place = places.get(name)
        pipe.load_lora_weights(file, name, weight=weight, role=role, scope=scope, into=place)
    for name, (file, weight) in others.items():
        pipe.load_lora_weights(file, name, weight=weight, into="transformer_2")
    return pipe


def restore(
    recipe: Recipe,
    *,
    model: str | Path | None = None,
    folder: str | Path | None = None,
    device: str | None = None,
    config: str | Path | None = None,
) -> CMLoRAPipeline:
    """The model and LoRAs of a recipe, checked by their hashes, and its scheduler.

    Args:
        recipe: what is to be made again.
        model: where the model is now, if it moved.
        folder: where the LoRA files are now; not needed for embedded ones.
        device: where to compute.
        config: see `assemble`.

    Raises:
        CmloraError: if the model or a LoRA is missing or is not the one of the recipe, or the model
            cannot make a picture of its size with its scheduler.
    """
    place = model or recipe.model
    if recipe.model_hash != fingerprint(place):
        raise CmloraError(f"model {place} is not the one of the recipe: its hash differs")
    further = [(lora, each) for lora in recipe.loras for each in lora.companions]
    wanted = [(lora.file, lora.sha256) for lora in recipe.loras]
    wanted += [(each.file, each.sha256) for _, each in further]
    found = library.by_hash(wanted, model=place, folder=folder)
    files, others = found[: len(recipe.loras)], found[len(recipe.loras) :]
    pipe = assemble(place, (), dtype=recipe.dtype, device=device, config=config)
    check_size(pipe.pipe, (recipe.width, recipe.height), "recipe: ")
    pipe.pipe.scheduler = scheduler_of(recipe, pipe.pipe.scheduler)
    for lora, file in zip(recipe.loras, files, strict=True):
        pipe.load_lora_weights(
            file,
            lora.name,
            weight=lora.weight,
            role=lora.role,
            scope=lora.scope,
            into=lora.into or None,
        )
    for (lora, each), file in zip(further, others, strict=True):
        pipe.load_lora_weights(file, lora.name, weight=each.weight, into=each.into)
    return pipe
