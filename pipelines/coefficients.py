"""LoraHub's coefficients for a prompt, found by rendering previews and kept on disk."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from PIL import Image

from cmlora.atomic import replacing
from cmlora.errors import CmloraError
from cmlora.pipelines.ensemble import Ensemble
from cmlora.pipelines.models import EMBEDDED
from cmlora.strategies.lorahub import search

Score = Callable[[Sequence[Image.Image], Sequence[str]], Sequence[float]]
"""Pictures and their prompts to one number per picture; more is better."""


@dataclass(frozen=True)
class Previews:
    """How coefficients are looked for.

    Args:
        steps: denoising steps of a preview.
        seeds: of the previews of one evaluation; their scores are averaged.
        budget: evaluations.
        bound: largest absolute coefficient.
        seed: of the search itself.
    """

    steps: int = 8
    seeds: tuple[int, ...] = (0, 1)
    budget: int = 40
    bound: float = 1.5
    seed: int = 0


def coefficients(
    ensemble: Ensemble,
    prompt: str,
    weights: Mapping[str, float],
    *,
    score: Score | None = None,
    previews: Previews | None = None,
    folder: Path | None = None,
    on_evaluation: Callable[[], None] = lambda: None,
    **arguments: Any,
) -> tuple[float, ...]:
    """The coefficients, one per LoRA sorted by name, whose previews score best.

    Minimises ``-mean(score) + 0.05 * mean(|c|)``. LoraHub (arXiv:2307.13269) minimises a
    few-shot language loss; the score of pictures in its place is our choice.

    Args:
        ensemble: the loaded LoRAs.
        prompt: what is to be drawn.
        weights: strengths of the LoRAs that take part.
        score: how pictures are judged; the embedded model brings its own.
        previews: how to look.
        folder: where results are kept; ``cmlora/lorahub`` in the user's cache by default.
        on_evaluation: called after each evaluation.
        **arguments: for the pipeline's call, such as ``guidance_scale`` and the size.

    Raises:
        CmloraError: if there is no score for this model.
    """
    how = previews or Previews()
    if len(weights) < 2:
        return (1.0,) * len(weights)
    key = {
        "model": str(ensemble.source),
        "loras": [(n, *ensemble.loras[n].identity, w) for n, w in sorted(weights.items())],
        "prompt": prompt,
        "previews": asdict(how),
        "arguments": {name: repr(value) for name, value in sorted(arguments.items())},
        "score": "embedded" if score is None else f"{score.__module__}.{score.__qualname__}",
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    file = (folder or user_cache() / "lorahub") / f"{digest}.json"
    known = _read(file, len(weights))
    if known is not None:
        return known
    judge = _embedded_score(ensemble) if score is None else score

    def objective(point: tuple[float, ...]) -> float:
        output = ensemble.run(
            ensemble.pipe,
            [prompt] * len(how.seeds),
            composition="lorahub",
            composition_options={"coefficients": point},
            lora_weights=weights,
            cache="none",
            seed=how.seeds,
            num_inference_steps=how.steps,
            **arguments,
        )
        marks = judge(output.images, [prompt] * len(how.seeds))
        on_evaluation()
        return -fmean(float(mark) for mark in marks)

    found = search(objective, len(weights), budget=how.budget, bound=how.bound, seed=how.seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as stream:
        stream.write(json.dumps({"coefficients": found, "for": key}, indent=1).encode())
    return found


def user_cache() -> Path:
    """Where results that took long are kept: ``$CMLORA_CACHE``, else the user's cache folder."""
    own = os.environ.get("CMLORA_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "cmlora"


def _embedded_score(ensemble: Ensemble) -> Score:
    if str(ensemble.source) != EMBEDDED:
        raise CmloraError(
            "lorahub looks for coefficients by scoring previews, and there is no score for this "
            "model: pass coefficients=... (one per LoRA sorted by name), or in Python a score"
        )
    from cmlora.emoji.clip import score

    return score


def _read(file: Path, count: int) -> tuple[float, ...] | None:
    """What an earlier search found; ``None`` if there was none or its file is damaged."""
    try:
        found = tuple(float(value) for value in json.loads(file.read_bytes())["coefficients"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if len(found) == count and all(map(math.isfinite, found)) else None
