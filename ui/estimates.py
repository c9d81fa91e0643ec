"""What an order will cost, while it is being written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from cmlora.caching.policy import parse
from cmlora.errors import CmloraError
from cmlora.pipelines.models import EMBEDDED
from cmlora.ui import libraries
from cmlora.ui.natives import Natives, natives
from cmlora.ui.order import Order
from cmlora.ui.panels import duration, macs
from cmlora.ui.studio import Studio
from cmlora.ui.talk import sentence
from cmlora.ui.understanding import default_policy, plans

if TYPE_CHECKING:
    from cmlora.cost import PassCost

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Estimate:
    """What one picture will take.

    Args:
        full: full passes of the denoiser.
        light: passes that reuse features.
        macs: multiply-accumulates of the run; ``None`` if they cannot be counted.
        seconds: of the denoiser; ``None`` until the machine's pace is known.
        bytes: of weights, LoRAs and kept features: memory that is needed at least.
        pictures: how many pictures are ordered.
    """

    full: float
    light: float
    macs: int | None
    seconds: float | None
    bytes: int | None
    pictures: int = 1


def estimate(studio: Studio, order: Order) -> Estimate:
    """Count an order without loading anything.

    Raises:
        CmloraError: if the order cannot be fulfilled.
    """
    libraries.ready()
    from cmlora.cost import plan_cost

    found = plans(studio, order)
    fit = natives(studio, order.model)
    reuses = parse(default_policy(order)).reuse
    cost = _pass_cost(fit, order)
    if cost is None:
        run = plan_cost(found, 0, 0 if reuses else None)
        total = None
    else:
        run = plan_cost(found, cost.full, cost.light if reuses else None)
        total = run.macs
    pace = studio.paces.get(order.model)
    seconds = total / pace if total is not None and pace else None
    slots = len({single.key for plan in found for single in plan.passes}) if reuses else 0
    return Estimate(
        sum(run.full.values()),
        sum(run.light.values()),
        total,
        seconds,
        _memory(studio, order, fit, slots),
        int(order.pictures),
    )


def cost_panel(studio: Studio, order: Order) -> str:
    """The estimate as the page shows it; what is missing for one is said in its place."""
    try:
        found = estimate(studio, order)
    except Exception as error:
        return f'<dl class="cost alone"><div><dt>{escape(sentence(error))}</dt></div></dl>'
    times = f" x {found.pictures}" if found.pictures > 1 else ""
    seconds, counted = found.seconds, found.macs
    light = f"and {found.light:g} light" if found.light else "none reused"
    return _cells(
        {
            "Passes": (f"{found.full:g} full", light),
            "Work": (macs(counted) if counted else "-", f"a picture{times}"),
            "Time": (
                f"~{duration(seconds * found.pictures)}" if seconds is not None else "-",
                "for all" if times else ("" if seconds is not None else "known after a picture"),
            ),
            "Memory": (
                size(found.bytes) if found.bytes else "-",
                "at least" if found.bytes else "",
            ),
        }
    )


def size(count: int) -> str:
    """Bytes in the unit that fits.

    >>> size(3 * 2**30), size(20 * 2**20)
    ('3 GB', '20 MB')
    """
    return f"{count / 2**30:.3g} GB" if count >= 2**30 else f"{count / 2**20:.3g} MB"


def _cells(values: Mapping[str, tuple[str, str]]) -> str:
    body = "".join(
        f"<div><dt>{name}</dt><dd>{escape(value)}"
        f"<small>{escape(more) or '&nbsp;'}</small></dd></div>"
        for name, (value, more) in values.items()
    )
    return f'<dl class="cost" aria-label="Expected cost">{body}</dl>'


def _pass_cost(fit: Natives, order: Order) -> PassCost | None:
    """Both kinds of pass at the order's size."""
    from cmlora.cost import pass_macs, shapes

    if fit.unet is None or fit.size is None:
        return None
    width, height = order.width or fit.size[0], order.height or fit.size[1]
    guided = (fit.guidance if order.guidance is None else order.guidance) > 1
    try:
        sample, encoder = shapes(
            fit.unet,
            int(height),
            int(width),
            batch=2 if guided else 1,
            scale=fit.scale,
            tokens=fit.tokens,
        )
        return pass_macs(fit.unet, sample, encoder)
    except CmloraError:
        return None


def _memory(studio: Studio, order: Order, fit: Natives, slots: int) -> int | None:
    """Weights on disk in the precision of the server, LoRA files, and the kept features."""
    place = studio.model_place(order.model)
    if place == EMBEDDED:
        from cmlora.emoji import weights

        place = weights.model_path()
    if not isinstance(place, Path):
        return None
    files = [place] if place.is_file() else sorted(place.rglob("*.safetensors"))
    loras = [studio.lora_path(name, order.model) for name in order.loras]
    stored = sum(path.stat().st_size for path in [*files, *loras])
    return stored + slots * _feature(fit, order, _BYTES.get(studio.settings.dtype or "float32", 4))


def _feature(fit: Natives, order: Order, size: int) -> int:
    """Bytes of the feature that enters the outermost level with attention."""
    if fit.unet is None or fit.size is None:
        return 0
    widths = fit.unet.get("block_out_channels") or (320, 640, 1280, 1280)
    kinds = fit.unet.get("down_block_types") or ()
    level = next((i for i, kind in enumerate(kinds) if "CrossAttn" in str(kind)), 0)
    width, height = order.width or fit.size[0], order.height or fit.size[1]
    cells = (int(width) // fit.scale >> level) * (int(height) // fit.scale >> level)
    return 2 * int(widths[min(level + 1, len(widths) - 1)]) * cells * size
