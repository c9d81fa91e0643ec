"""`cmlora env`: what is installed, for bug reports."""

import os
import platform
import sys
from importlib import metadata
from typing import Any

from rich.table import Table

from cmlora import __version__
from cmlora.cli.console import emit, out
from cmlora.cli.options import AsJson

LIBRARIES = (
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "numpy",
    "pillow",
    "nevergrad",
    "open-clip-torch",
    "gradio",
    "xformers",
)


def env(
    as_json: AsJson = False,
) -> None:
    """Show versions, devices and whether the embedded model is there.

    Example: [bold]cmlora env --json[/bold]
    """
    facts = environment()
    if as_json:
        emit(facts)
        return
    table = Table("what", "found")
    for key, value in facts.items():
        rows = value.items() if isinstance(value, dict) else [("", value)]
        for name, found in rows:
            table.add_row(f"{key} {name}".strip(), "-" if found is None else str(found))
    out.print(table)


def environment() -> dict[str, Any]:
    """Versions (``None`` if absent), devices, and the embedded model's presence."""
    import torch

    from cmlora.emoji import weights

    devices = ["cpu"]
    if torch.cuda.is_available():
        devices += [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append("mps")
    return {
        "cmlora": __version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "devices": ", ".join(devices),
        "embedded model": "available" if weights.available() else "missing",
        "library": {name: _version(name) for name in LIBRARIES},
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
