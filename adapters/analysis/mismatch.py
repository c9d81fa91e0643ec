"""LoRAs that were not made for the same model, or that answer to the same word."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from cmlora import family
from cmlora.errors import CmloraError
from cmlora.lora import TEXT_ENCODERS, LoRA

UNKNOWN = family.UNKNOWN

BASES = {
    "sd1": "Stable Diffusion 1.x",
    "sd15": "Stable Diffusion 1.x",
    "sd2": "Stable Diffusion 2.x",
    "sd3": "Stable Diffusion 3",
    "sdxl": "Stable Diffusion XL",
    "emoji": "a UNet for text of width 128",
    "flux": "FLUX.1",
    "flux1": "FLUX.1",
    "flux2": "FLUX.2",
    "wan": "Wan",
    "qwen": "Qwen-Image",
    "qwen-image": "Qwen-Image",
    "z-image": "Z-Image",
    "pixart": "PixArt",
    "sana": "Sana",
    "chroma": "Chroma",
    "hidream": "HiDream",
    "hunyuan": "HunyuanVideo",
    "ltx": "LTX-Video",
    "lumina2": "Lumina 2",
    "auraflow": "AuraFlow",
}
"""Names by which a person calls a family."""


def families(loras: Sequence[LoRA]) -> dict[str, str]:
    """The family of base models of every LoRA, by name."""
    return {lora.name: family.of_lora(lora) for lora in loras}


def check_families(loras: Sequence[LoRA], base: str | None = None) -> str:
    """The one family that all LoRAs, and the base, are of.

    Files that say less than others, such as a FLUX LoRA for double blocks only, may be of any
    family that they do not contradict, as when LoRAs are merged; see `cmlora.family.distinct`.

    Args:
        loras: those that are to be used together.
        base: a key of `BASES`, or the family as `cmlora.family.of_lora` says it.

    Raises:
        CmloraError: if there is more than one, naming each; or if the base is not known.
    """
    found = families(loras)
    apart = family.distinct(found.values())
    if len(apart) > 1:
        said = (f"{name} is for {kind}" for name, kind in found.items() if kind != UNKNOWN)
        raise CmloraError(f"these LoRAs cannot be used together: {', '.join(said)}")
    one = apart[0] if apart else UNKNOWN
    if base is None:
        return one
    wanted = one if base == one else _base(base)
    if len(family.distinct((one, wanted))) > 1:
        raise CmloraError(f"the LoRAs are for {one}, the base is {wanted}")
    return wanted


def _base(said: str) -> str:
    """The family a person means."""
    titles = {title.casefold(): title for title in BASES.values()}
    wanted = BASES.get(said.casefold()) or titles.get(said.casefold())
    if wanted is None:
        raise CmloraError(f"unknown base {said!r}; known bases: {', '.join(BASES)}")
    return wanted


def bases(loras: Sequence[LoRA]) -> dict[str, str]:
    """What each file says it was trained on, by name, where it says so."""
    said = {
        lora.name: lora.metadata.get("cmlora.base") or lora.metadata.get("ss_sd_model_name") or ""
        for lora in loras
    }
    return {name: base for name, base in said.items() if base}


def text_encoders(loras: Sequence[LoRA]) -> dict[str, tuple[str, ...]]:
    """Which text encoders each LoRA changes, by name."""
    return {
        lora.name: tuple(part for part in TEXT_ENCODERS if part in lora.parts) for lora in loras
    }


def shared_triggers(loras: Sequence[LoRA]) -> dict[str, tuple[str, ...]]:
    """Trigger phrases that call more than one LoRA, with the names of those.

    A phrase also calls a LoRA if it contains the LoRA's own phrase as whole words.

    >>> one, two = LoRA("one", {}, triggers=("ink cat",)), LoRA("two", {}, triggers=("cat",))
    >>> shared_triggers([one, two])
    {'ink cat': ('one', 'two')}
    """
    found: dict[str, set[str]] = {}
    for one, other in combinations(loras, 2):
        for phrase in one.triggers:
            for another in other.triggers:
                shorter, longer = sorted(map(_words, (phrase, another)), key=len)
                if shorter.strip() and shorter in longer:
                    found.setdefault(longer.strip(), set()).update((one.name, other.name))
    return {phrase: tuple(sorted(names)) for phrase, names in sorted(found.items())}


def _words(phrase: str) -> str:
    return f" {' '.join(phrase.casefold().split())} "
