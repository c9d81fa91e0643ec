"""A run's report: Markdown, LaTeX, CSV and HTML, the plots, and a form for people's scores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cmlora.atomic import replacing
from cmlora.errors import CmloraError
from cmlora.eval.judge.tally import Verdicts, judged, strength_rows, verdict_tables
from cmlora.eval.manifest import set_id
from cmlora.eval.metrics import Metric, metric_of
from cmlora.eval.report import plots
from cmlora.eval.report.gallery import Shelf, shelves
from cmlora.eval.report.page import page
from cmlora.eval.report.selection import Selection
from cmlora.eval.report.summary import (
    EVERYTHING,
    Summary,
    baseline_of,
    findings,
    focus_of,
    summarise,
)
from cmlora.eval.report.tables import (
    Table,
    difference_table,
    long_csv,
    metric_table,
    overview_table,
    survival_table,
    wins_table,
)
from cmlora.eval.study import Study

Section = tuple[str, list[str | Table]]
MARKS = ("instance", "class", "clip")
OVERVIEW = 4
"""So many metrics, the first ones, are columns of the overview."""

_MAIN = ("instances", "clip_concepts", "clip_score")


def write_report(
    study: Study,
    destination: Path | None = None,
    *,
    baseline: str | None = None,
    focus: str | None = None,
    metrics: Sequence[str] = (),
    selection: Selection = EVERYTHING,
    per_size: int = 4,
) -> list[Path]:
    """Write a run's report.

    Args:
        study: the run.
        destination: folder for it; ``report`` in the run's folder if ``None``.
        baseline: the method that tables compare with; merge if it is there.
        focus: the method that the findings are about; cmlora if it is there.
        metrics: what to show; everything that was scored if empty.
        selection: which of its pictures.
        per_size: sets per N in the gallery.

    Returns:
        The files.

    Raises:
        CmloraError: if there is nothing to report, a method or metric is not there, or a file
            cannot be written.
    """
    summary = summarise(study, selection)
    against, about = baseline_of(summary, baseline), focus_of(summary, focus)
    chosen = _chosen(summary, metrics)
    sections = report_sections(study, summary, against, about, chosen)
    folder = destination or study.folder / "report"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CmloraError(f"cannot make the folder {folder}: {error.strerror}") from None
    title = f"Composition methods on {study.manifest.name}"
    shown: list[Shelf] = shelves(summary, per_size) if per_size else []
    drawn = {name: svg for name, svg in _plots(study, summary, chosen).items() if svg}
    files = {
        "report.md": markdown(title, sections, drawn),
        "report.tex": latex(sections),
        "report.csv": long_csv(summary, against),
        "scores.json": json.dumps(score_file(study, summary), indent=1, ensure_ascii=False),
        "report.html": page(title, _with_plots(sections, drawn), study, summary, shown),
        **{f"{name}.svg": svg for name, svg in drawn.items()},
    }
    for name, text in files.items():
        with replacing(folder / name) as file:
            file.write(text.encode())
    return [folder / name for name in files]


def report_sections(
    study: Study, summary: Summary, baseline: str, focus: str, metrics: Sequence[Metric]
) -> list[Section]:
    """Headings and what is below them, without plots and pictures.

    Args:
        study: the run.
        summary: its numbers.
        baseline: the method that tables compare with.
        focus: the method that the findings are about.
        metrics: what to show.
    """
    found: list[Section] = [("What was compared", [*_setting(study, summary)])]
    quality = [m for m in metrics if m.better != "neither" and not _is_cost(m)]
    rest = [m for m in metrics if m not in quality]
    said: list[str | Table] = [*findings(summary, focus)]
    if quality:
        said.append(overview_table(summary, quality[:OVERVIEW], baseline))
    if said:
        found.append(("What it shows", said))
    main = _main(summary, metrics)
    if quality:
        tables = [metric_table(summary, m, baseline) for m in quality]
        apart = None if main is None else difference_table(summary, main, baseline)
        found.append(("Quality", [*tables, *([apart] if apart else [])]))
    survived = [t for mark in MARKS if (t := survival_table(summary, mark)) is not None]
    if survived:
        found.append(("Which concepts come through", [*survived]))
    verdicts = judged(study)
    if verdicts:
        found.append(("Judge", _judged(summary, verdicts)))
    if main is not None:
        table = wins_table(
            f"Win matrix by {main.title}", summary.labels, summary.wins(main.name), "Same noise."
        )
        found.append(("Picture against picture", [table] if table else []))
    if rest:
        found.append(
            ("Cost and sanity", [metric_table(summary, metric, baseline) for metric in rest])
        )
    return found


def score_file(study: Study, summary: Summary) -> dict[str, Any]:
    """Every picture with its metrics, in the form that `cmlora evaluate correlate` reads.

    ``human`` is empty: that is where people's scores go. A judge's mean marks are metrics, too.

    Args:
        study: the run.
        summary: its numbers.
    """
    values: dict[tuple[str, str, int], dict[str, float]] = {}
    for metric, by_label in summary.values.items():
        for label, by_size in by_label.items():
            for places in by_size.values():
                for (ids, seed), value in places.items():
                    values.setdefault((label, ids, seed), {})[metric] = value
    marks: dict[str, dict[str, float]] = {}
    for verdicts in judged(study):
        for dimension in verdicts.dimensions:
            for key, mark in verdicts.picture_marks(dimension).items():
                name = f"{verdicts.judge}, {verdicts.protocol}, {dimension}"
                marks.setdefault(key, {})[name] = mark
    items = [
        {
            "id": record.image,
            "method": record.label,
            "set": set_id(record.ids),
            "human": {},
            "metrics": {
                **values.get((record.label, set_id(record.ids), record.seed), {}),
                **marks.get(record.key, {}),
            },
        }
        for record in summary.records
    ]
    return {"cmlora_scores": 1, "items": items}


def markdown(title: str, sections: Sequence[Section], drawn: dict[str, str]) -> str:
    """The report as Markdown; plots are files beside it.

    Args:
        title: of the report.
        sections: see `report_sections`.
        drawn: SVG by file stem.
    """
    parts = [f"# {title}"]
    for heading, inside in sections:
        parts.append(f"## {heading}")
        for part in inside:
            parts.append(part.markdown() if isinstance(part, Table) else part)
    if drawn:
        parts.append("## Plots")
        parts += [f"![{name.replace('_', ' ')}]({name}.svg)" for name in drawn]
    return "\n\n".join(parts) + "\n"


def latex(sections: Sequence[Section]) -> str:
    """The tables of a report for LaTeX.

    Args:
        sections: see `report_sections`.
    """
    tables = [part.latex() for _, inside in sections for part in inside if isinstance(part, Table)]
    return "\n\n".join([r"% \usepackage{booktabs,amssymb}", *tables]) + "\n"


def _plots(study: Study, summary: Summary, metrics: Sequence[Metric]) -> dict[str, str]:
    """SVG by file stem; empty where there is nothing to draw."""
    found = {}
    main = _main(summary, metrics)
    if main is not None:
        for cost in ("gmacs", "seconds"):
            found[f"{main.name}_by_{cost}"] = plots.quality_against_cost(summary, main, cost)
        found[f"{main.name}_by_n"] = plots.quality_by_size(summary, main)
    for verdicts in judged(study):
        for dimension in verdicts.dimensions:
            title = f"{verdicts.judge}: {dimension}"
            found[f"judge_{verdicts.slug}_{dimension}"] = plots.strengths(
                title, strength_rows(verdicts, dimension)
            )
    ratio, norm = plots.frequency_curves(study.settings()["loras"])
    return found | {"frequency_share": ratio, "frequency_size": norm}


def _with_plots(sections: Sequence[Section], drawn: dict[str, str]) -> list[Section]:
    return [*sections, ("Plots", [*drawn.values()])] if drawn else list(sections)


def _setting(study: Study, summary: Summary) -> list[str]:
    """Testbed, model, settings and versions in a few sentences."""
    manifest, settings = study.manifest, study.settings()
    seeds = sorted({record.seed for record in summary.records})
    sets = [len({r.ids for r in summary.records if r.n == n}) for n in summary.sizes]
    counted = ", ".join(
        f"{count} set{'s' if count > 1 else ''} of {n}"
        for n, count in zip(summary.sizes, sets, strict=True)
    )
    size = f"{manifest.width}x{manifest.height}" if manifest.width else "the model's size"
    said = [
        f"Testbed `{manifest.name}`, model `{Path(manifest.model).name}` "
        f"({settings['model_hash'][:12]}), {manifest.steps} steps, guidance "
        f"{manifest.guidance_scale:g}, {size}, {settings['dtype']}, "
        f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}; "
        f"{counted} LoRAs; {len(summary.labels)} methods, {len(summary.records)} "
        "pictures. All methods of a set and seed start from the same noise."
    ]
    if settings["options"]:
        options = ", ".join(f"`{k}={v}`" for k, v in settings["options"].items())
        said.append(f"Options: {options}.")
    if summary.versions:
        judges = "; ".join(f"{name}: {version}" for name, version in summary.versions.items())
        said.append(f"Scorers: {judges}.")
    if "clip_score" in summary.values:
        said.append(
            "CLIPScore on trigger words says little about identity and nothing about how well "
            "things fit together; read it beside the other numbers."
        )
    failed = len(study.failures())
    if failed:
        said.append(f"**{failed} jobs failed** and are missing here.")
    said += [f"Note: {line}." for line in summary.missing()]
    profiled = [lora["id"] for lora in settings["loras"] if "ratio" in lora]
    if not profiled:
        said.append(
            "The LoRAs have no frequency profiles (`cmlora profile` makes them); methods that go "
            "by frequency went by category."
        )
    return said


def _judged(summary: Summary, verdicts: Sequence[Verdicts]) -> list[str | Table]:
    parts: list[str | Table] = []
    for one in verdicts:
        parts += verdict_tables(one, summary.labels)
    return parts


def _chosen(summary: Summary, wanted: Sequence[str]) -> list[Metric]:
    for name in wanted:
        if name not in summary.values:
            known = ", ".join(m.name for m in summary.metrics)
            raise CmloraError(f"the run has no metric {name!r}; it has {known}")
    return [metric_of(name) for name in wanted] or list(summary.metrics)


def _main(summary: Summary, metrics: Sequence[Metric]) -> Metric | None:
    """The metric that plots are drawn of."""
    names = [metric.name for metric in metrics]
    first = [name for name in _MAIN if name in names]
    rest = [m.name for m in metrics if m in summary.quality]
    return metric_of((first or rest)[0]) if first or rest else None


def _is_cost(metric: Metric) -> bool:
    return metric.name in ("gmacs", "seconds", "passes")
