"""Where the shipped weights are, and where trainings keep their data and checkpoints."""

from __future__ import annotations

import os
from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"


def work_folder() -> Path:
    """Data and checkpoints: `$CMLORA_EMOJI_WORK`, else a folder in the user's cache."""
    chosen = os.environ.get("CMLORA_EMOJI_WORK")
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(chosen) if chosen else Path(cache) / "cmlora" / "emoji"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
