"""What `cmlora generate --recipe` is given: a recipe, or what `cmlora doctor` proposes."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmlora import pictures
from cmlora.errors import CmloraError

if TYPE_CHECKING:
    from cmlora.pipelines.proposal import Proposal
    from cmlora.recipe import Recipe


def read(path: Path) -> "Recipe | Proposal":
    """The recipe inside a picture or in a .json file, or the proposal in one.

    Raises:
        CmloraError: if there is none.
    """
    from cmlora.pipelines.proposal import Proposal, is_proposal
    from cmlora.recipe import Recipe

    if path.suffix.lower() != ".json":
        return pictures.read(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CmloraError(f"cannot read {path}: {error}") from None
    try:
        table = json.loads(text)
        return Proposal.from_table(table) if is_proposal(table) else Recipe.from_json(text)
    except CmloraError as error:
        raise CmloraError(f"{path}: {error}") from None
    except (ValueError, RecursionError):
        raise CmloraError(f"{path} is not a recipe: it is not JSON") from None


def followed(
    proposal: "Proposal",
    given: Collection[str],
    loras: Sequence[tuple[str, float]],
    wished: dict[str, Any],
    *,
    model: str,
    folder: str | None,
) -> tuple[list[tuple[str | Path, float]], dict[str, Any]]:
    """A proposal with what was asked for besides, which comes first wherever both speak.

    A LoRA that both name has the strength asked for; further ones are added. Another method than
    the proposal's has its own options and cache.

    Args:
        proposal: what the doctor said.
        given: names of the options that were given.
        loras: those asked for, with their strengths.
        wished: what was asked for, or defaults, by name of the option.
        model: whose embedded LoRAs are known.
        folder: where else LoRAs are looked for.

    Returns:
        the LoRAs to load, and what to ask for.
    """
    from cmlora.pipelines.library import adapter_name, find

    files = proposal.files(model=model, folder=folder)
    found: dict[Path, float] = {
        file.resolve(): part.weight for file, part in zip(files, proposal.loras, strict=True)
    }
    for reference, weight in loras:
        found[find(reference, model=model, folder=folder).resolve()] = weight
    names: list[str] = []
    for file in found:
        names.append(adapter_name(file, names))
    wished = dict(wished)
    if "method" not in given or wished["method"] == proposal.method:
        wished["method"] = proposal.method
        wished["options"] = {**proposal.options, **wished["options"]}
        for key in {"cache", "uncond"} - set(given):
            wished[key] = getattr(proposal, key)
    if "schedule" not in given and not wished["schedule"]:
        wished["schedule"] = proposal.schedule
    if not wished["order"]:
        wished["order"] = (*proposal.order, *names[len(proposal.order) :])
    return list(found.items()), wished
