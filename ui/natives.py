"""What a model was made for, read from its configuration without loading it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmlora.errors import CmloraError
from cmlora.pipelines.models import EMBEDDED
from cmlora.ui.studio import Studio


@dataclass(frozen=True)
class Natives:
    """Values that suit a model.

    Args:
        size: width and height in pixels; ``None`` if the configuration is out of reach.
        steps: denoising steps.
        guidance: guidance scale.
        unet: the UNet's configuration; ``None`` for other denoisers or if it is out of reach.
        scale: pixels per latent cell.
        tokens: of a prompt.
    """

    size: tuple[int, int] | None = None
    steps: int = 30
    guidance: float = 7.5
    unet: dict[str, Any] | None = None
    scale: int = 8
    tokens: int = 77


def natives(studio: Studio, model: str) -> Natives:
    """What suits a model; guesses where its configuration is not here.

    Raises:
        CmloraError: if there is no such model.
    """
    place = studio.model_place(model)
    steps, guidance = 30, 7.5
    if place == EMBEDDED:
        from cmlora.emoji import weights

        place, steps, guidance = weights.model_path(), weights.STEPS, weights.GUIDANCE
    if not (isinstance(place, Path) and place.is_dir()):
        return Natives()
    unet, vae = _config(place / "unet"), _config(place / "vae")
    denoiser = unet or _config(place / "transformer")
    widths = vae.get("block_out_channels")
    scale = 2 ** (len(widths) - 1) if isinstance(widths, list) and widths else 8
    side = denoiser.get("sample_size")
    height, width = side if isinstance(side, list) and len(side) == 2 else (side, side)
    size = None
    if isinstance(height, int) and isinstance(width, int):
        size = (width * scale, height * scale)
    tokens = _config(place / "tokenizer", "tokenizer_config.json").get("model_max_length", 77)
    return Natives(size, steps, guidance, unet or None, scale, tokens if 0 < tokens < 1000 else 77)


def natives_or_guess(studio: Studio, model: str) -> Natives:
    """As `natives`, for pages that must show something."""
    try:
        return natives(studio, model)
    except CmloraError:
        return Natives()


def _config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    try:
        found = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
