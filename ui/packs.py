"""Many similar LoRAs in one smaller file, and out of it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cmlora import checks
from cmlora.adapters.merging import rmm
from cmlora.errors import CmloraError
from cmlora.ui.order import check_strengths
from cmlora.ui.shelf import Shelf, is_safetensors, unknown
from cmlora.ui.studio import Studio
from cmlora.ui.writing import Made, count_of, new_file, plainly, read, sized, sources, write

GRANULARITIES = ("module", "position")


def shelf(studio: Studio) -> Shelf:
    """The packs there are, by name."""
    return Shelf("pack", (studio.settings.out / "packs",), is_safetensors)


def missing(count: int) -> str:
    """What packing still needs; empty if it can begin.

    >>> missing(2)
    ''
    """
    return "" if count >= 2 else "select two or more LoRAs"


def pack(
    studio: Studio,
    model: str,
    loras: Mapping[str, float],
    *,
    size: Any = 1,
    granularity: str = "module",
    name: str = "",
) -> Made:
    """Store LoRAs as a mean, a basis and coefficients in one file among the server's packs.

    Args:
        studio: the server's.
        model: whose LoRAs they are.
        loras: the LoRAs by name; strengths have no part in it.
        size: basis vectors; more are more exact and larger.
        granularity: what shares a basis, one of `GRANULARITIES`.
        name: of the pack; made of the names if empty.

    Raises:
        CmloraError: if fewer than two are selected, or they do not fit each other.
    """
    loras = check_strengths(loras, studio.settings.limits)
    if missing(len(loras)):
        raise CmloraError(missing(len(loras)))
    checks.choice("request", "granularity", granularity, GRANULARITIES)
    count = count_of("size", size, len(loras))
    paths = sources(studio, model, loras)
    found = [read(path, own) for own, path in paths.items()]
    shared: Any = granularity
    packed = rmm.pack(found, count, granularity=shared)
    target = new_file(studio.settings.out / "packs", name or "_".join(paths), "pack")
    rmm.save(packed, target)
    before = sum(path.stat().st_size for path in paths.values())
    lost = {f"lost of {own}": f"{error:.2%}" for own, error in packed.errors.items()}
    share = {"of the bytes": f"{target.stat().st_size / before:.0%}"}
    return Made(target.stem, target, {**lost, **share, **sized(target)})


def names_in(studio: Studio, name: str) -> tuple[str, ...]:
    """The LoRAs in a pack.

    Raises:
        CmloraError: if there is no such pack, or it is damaged.
    """
    path = shelf(studio).find(name)
    return tuple(plainly(path, lambda: rmm.load(path)).names)


def unpack(studio: Studio, name: str, wanted: Sequence[str] = ()) -> list[Made]:
    """LoRAs out of a pack as files among the server's LoRAs.

    Args:
        studio: the server's.
        name: of the pack.
        wanted: names of LoRAs in it; all if empty.

    Raises:
        CmloraError: if there is no such pack, or no such LoRA in it.
    """
    path = shelf(studio).find(name)
    packed = plainly(path, lambda: rmm.load(path))
    for lora in wanted:
        if lora not in packed.names:
            raise CmloraError(unknown("LoRA in this pack", lora, packed.names))
    made = []
    for lora in wanted or packed.names:
        target = new_file(studio.uploads, lora)
        write(rmm.rebuild(packed, lora), target)
        made.append(Made(target.stem, target, sized(target)))
    return made
