"""Several methods on the same LoRAs, prompt and initial latents: pictures, costs, scores."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from PIL import Image

from cmlora.atomic import replacing
from cmlora.errors import CmloraError
from cmlora.eval.grid import Row, grid
from cmlora.eval.variants import Variant
from cmlora.pipelines.cmlora_pipeline import CMLoRAPipeline
from cmlora.pipelines.coefficients import Score, coefficients
from cmlora.pipelines.render import Wish, pass_cost, render, write_recipe
from cmlora.recipe import save_png
from cmlora.strategies import METHODS
from cmlora.strategies.options import defaults

Judge = Callable[[Sequence[Image.Image], str, Sequence[str]], Mapping[str, Any]]
"""(pictures, prompt, LoRA names) to named scores, in JSON types."""


@dataclass(frozen=True)
class Shot:
    """One picture of a comparison.

    Args:
        seed: of its initial latents, the same for every method.
        file: its name in the folder; the recipe is inside.
        seconds: from the first denoiser call to the last.
    """

    seed: int
    file: str
    seconds: float


@dataclass(frozen=True)
class Line:
    """What one method did.

    Args:
        variant: the method with its own options and cache policy.
        shots: its pictures, in the order of the seeds.
        full: full passes per picture.
        light: passes per picture that reused features.
        macs_per_step: multiply-accumulates per denoising step; ``None`` if they cannot be counted.
        options: of the method, as carried out.
        scores: what the judge says about its pictures.
    """

    variant: Variant
    shots: tuple[Shot, ...]
    full: float
    light: float
    macs_per_step: float | None
    options: Mapping[str, Any]
    scores: Mapping[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Median over its pictures."""
        return median(shot.seconds for shot in self.shots)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types."""
        return {
            "label": self.variant.label,
            **asdict(self.variant),
            "options": dict(self.options),
            "seconds": self.seconds,
            "macs_per_step": self.macs_per_step,
            "full_passes": self.full,
            "light_passes": self.light,
            "scores": dict(self.scores),
            "images": [asdict(shot) for shot in self.shots],
        }


class Comparison:
    """A table of methods by seeds, filled picture by picture.

    Args:
        pipe: the model, with the LoRAs loaded.
        wish: prompt, steps, size and so on; its method, cache and seed are set per picture.
        variants: the rows.
        seeds: the columns.
        folder: where pictures and results go; made if it is not there.
        judge: scores the pictures of a row when the row is complete.
        score: guides the search of methods that look for coefficients.
    """

    def __init__(
        self,
        pipe: CMLoRAPipeline,
        wish: Wish,
        variants: Sequence[Variant],
        seeds: Sequence[int],
        folder: Path,
        *,
        judge: Judge | None = None,
        score: Score | None = None,
    ) -> None:
        self.pipe, self.wish = pipe, wish
        self.variants, self.seeds, self.folder = tuple(variants), tuple(seeds), folder
        self.judge, self.score = judge, score
        self._check_options()
        self.base = write_recipe(pipe, replace(wish, method="naive", options={}))
        self.cost = pass_cost(pipe, self.base)
        self._lines: dict[Variant, Line] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as failure:
            raise CmloraError(f"cannot make the folder {folder}: {failure.strerror}") from None

    @property
    def lines(self) -> tuple[Line, ...]:
        """The rows that have pictures, in the order of the variants."""
        return tuple(self._lines[v] for v in self.variants if v in self._lines)

    def wishes(
        self, on_evaluation: Callable[[], None] = lambda: None
    ) -> Iterator[tuple[Variant, Wish]]:
        """One wish per picture, seed by seed so that the machine's moods hit all methods alike."""
        found: dict[Variant, Mapping[str, Any]] = {}
        for seed in self.seeds:
            for variant in self.variants:
                if variant not in found:
                    found[variant] = self._options(variant, on_evaluation)
                wish = replace(
                    self.wish,
                    method=variant.method,
                    cache=variant.cache,
                    options=found[variant],
                    seed=seed,
                )
                yield variant, wish

    def add(self, variant: Variant, wish: Wish, on_step: Callable[[], None] = lambda: None) -> Shot:
        """Render one picture, save it with its recipe, and rewrite the results."""
        recipe = write_recipe(self.pipe, wish)
        made = render(self.pipe, recipe, on_step=on_step)
        file = f"{variant.slug}_{wish.seed}.png"
        save_png(made.image, self.folder / file, recipe)
        shot = Shot(wish.seed, file, made.report.seconds)
        before = self._lines.get(variant)
        full, light = made.report.full, made.report.light
        self._lines[variant] = Line(
            variant,
            (*(before.shots if before else ()), shot),
            sum(full.values()),
            sum(light.values()),
            None if self.cost is None else self.cost.of(full, light) / recipe.steps,
            recipe.options,
        )
        self.save()
        return shot

    def score_lines(self) -> None:
        """Ask the judge about every row."""
        if self.judge is None:
            return
        for variant, line in self._lines.items():
            pictures = [self._picture(shot) for shot in line.shots]
            scores = self.judge(pictures, self.wish.prompt, sorted(self.pipe.loras))
            self._lines[variant] = replace(line, scores=scores)
        self.save()

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types; ``complete`` is false while pictures are missing."""
        wanted = len(self.variants) * len(self.seeds)
        return {
            "model": self.base.model,
            "prompt": self.base.prompt,
            "loras": [asdict(lora) for lora in self.base.loras],
            "steps": self.base.steps,
            "guidance_scale": self.base.guidance_scale,
            "size": [self.base.width, self.base.height],
            "seeds": list(self.seeds),
            "pass_macs": None if self.cost is None else asdict(self.cost),
            "complete": sum(len(line.shots) for line in self.lines) == wanted,
            "methods": [line.to_dict() for line in self.lines],
        }

    def save(self) -> None:
        """Write results.json, whole or not at all."""
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False)
        with replacing(self.folder / "results.json") as file:
            file.write(text.encode())

    def draw(self) -> Path:
        """Write grid.png: a row per method, a column per seed."""
        rows = []
        for line in self.lines:
            by_seed = {shot.seed: self._picture(shot) for shot in line.shots}
            rows.append(Row(line.variant.label, [by_seed.get(s) for s in self.seeds], notes(line)))
        longest = max(self.base.width, self.base.height)
        tile = 3 * longest if longest <= 128 else min(longest, 320)
        sheet = grid(rows, [f"seed {s}" for s in self.seeds], title=self.base.prompt, tile=tile)
        path = self.folder / "grid.png"
        with replacing(path) as file:
            sheet.save(file, "PNG")
        return path

    def _check_options(self) -> None:
        """Every option of the wish belongs to at least one of the methods."""
        known = sorted({o for v in self.variants for o in defaults(METHODS[v.method].object)})
        for option in self.wish.options or {}:
            if option not in known:
                listed = ", ".join(known) or "none"
                raise CmloraError(f"none of the methods has option {option!r}; known: {listed}")

    def _options(self, variant: Variant, on_evaluation: Callable[[], None]) -> Mapping[str, Any]:
        """The wish's options that the method has, and what it has to look for."""
        options = variant.options_with(self.wish.options or {})
        if variant.method == "lorahub" and "coefficients" not in options:
            options["coefficients"] = coefficients(
                self.pipe.ensemble,
                self.base.prompt,
                self.pipe.ensemble.weights(),
                score=self.score,
                on_evaluation=on_evaluation,
                guidance_scale=self.base.guidance_scale,
                width=self.base.width,
                height=self.base.height,
                execution=self.base.execution,
            )
        return options

    def _picture(self, shot: Shot) -> Image.Image:
        with Image.open(self.folder / shot.file) as file:
            return file.convert("RGB")


def notes(line: Line) -> tuple[str, ...]:
    """A method's cost and scores in a few words, for a grid."""
    said = []
    if line.macs_per_step is not None:
        said.append(f"{line.macs_per_step / 1e9:.3g} GMACs per step")
    said.append(f"{line.seconds:.2f} s a picture")
    concepts = line.scores.get("concepts")
    if concepts:
        share = fmean(found["instance"] for found in concepts.values())
        said.append(f"{share:.0%} of concepts")
    return tuple(said)
