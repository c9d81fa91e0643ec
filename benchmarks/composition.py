"""From a run of the composition study to the tables and plots beside this file.

README.md in this folder has the commands that make the run. Then

    python benchmarks/composition.py RUN

writes composition.md, composition.csv, composition.png and the plots; nothing is typed by hand.
With `--name` and `--title` another run gets files of its own.
"""

import argparse
from pathlib import Path

from cmlora.atomic import replacing
from cmlora.cli.arguments import variants
from cmlora.eval.metrics import metric_of
from cmlora.eval.report.gallery import contact_sheet, shelves
from cmlora.eval.report.plots import quality_against_cost, quality_by_size
from cmlora.eval.report.summary import (
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

HERE = Path(__file__).parent
TABLES = ("instances", "classes", "fidelity", "clip_score", "gmacs", "seconds")
PLOTTED = "instances"


def verdict(summary: Summary, focus: str, metric: str = PLOTTED) -> str:
    """One sentence: where the method stands, what is ahead of it, and at which price."""
    value = {label: summary.cell(metric, label, None).value for label in summary.labels}
    price = {label: summary.cell("gmacs", label, None).value for label in summary.labels}
    sign = -1 if metric_of(metric).better == "less" else 1
    better = [k for k in summary.labels if sign * (value[k] - value[focus]) > 1e-9]
    ahead = sorted(better, key=lambda label: -sign * value[label])
    place = (
        f"`{focus}` is number {len(ahead) + 1} of {len(summary.labels)} by "
        f"{metric_of(metric).title}"
    )
    parts = [f"{place} ({value[focus]:.3f}, at {price[focus]:.3g} GMACs per picture)"]
    if ahead:
        listed = ", ".join(
            f"`{label}` ({value[label]:.3f}, {price[label] / price[focus]:.2f} times its cost)"
            for label in ahead
        )
        parts.append(f"ahead of it are {listed}")
    losing = [
        n
        for n in summary.sizes
        if any(d.better for d in summary.differences(metric, focus, n).values())
    ]
    if losing:
        parts.append(
            "it is behind some method by more than chance for N = " + ", ".join(map(str, losing))
        )
    return "; ".join(parts) + "."


def document(
    study: Study,
    summary: Summary,
    named: argparse.Namespace,
    baseline: str,
    focus: str,
    plots: list[str],
) -> str:
    """The page about a run.

    Args:
        study: the run.
        summary: its numbers.
        named: the title, the name of the files, and whether times are left out.
        baseline: method that tables compare with.
        focus: method that the text is about.
        plots: names of their files.
    """
    timed = not named.untimed
    manifest = study.manifest
    seeds = sorted({record.seed for record in summary.records})
    sets = {n: len({r.ids for r in summary.records if r.n == n}) for n in summary.sizes}
    counted = ", ".join(f"{count} sets of {n} LoRAs" for n, count in sets.items())
    parts = [
        f"# {named.title}",
        f"Testbed `{manifest.name}`. "
        f"{len(summary.records)} pictures: {len(summary.labels)} methods, {counted}; "
        f"seeds {', '.join(map(str, seeds))}, {manifest.steps} steps, guidance "
        f"{manifest.guidance_scale:g}. All methods of a set and seed start from the same noise. "
        f"Made by `python benchmarks/composition.py`; see [README.md](README.md). A ranking here "
        "is no proof of the same ranking on other models.",
        "## What it shows",
        verdict(summary, focus),
        *findings(summary, focus),
        *(f"Note: {line}." for line in summary.missing()),
        "## Tables",
    ]
    if not timed:
        parts.insert(2, "No times: the machine had other work.")
    shown = [name for name in TABLES if timed or name != "seconds"]
    known = [metric_of(name) for name in shown if name in summary.values]
    quality = [metric for metric in known if metric.name not in ("gmacs", "seconds")]
    tables: list[Table | None] = [overview_table(summary, quality, baseline, timed=timed)]
    tables += [metric_table(summary, metric, baseline) for metric in known]
    tables.append(difference_table(summary, metric_of(PLOTTED), baseline))
    tables += [survival_table(summary, mark) for mark in ("instance", "class")]
    title = f"Picture against picture, by {metric_of(PLOTTED).title}"
    tables.append(wins_table(title, summary.labels, summary.wins(PLOTTED)))
    parts += [table.markdown() for table in tables if table is not None]
    parts += ["## Plots", *(f"![{name}]({name})" for name in plots)]
    parts += [f"![one set per row]({named.name}.png)"]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Write everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Raw)
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--out", type=Path, default=HERE, help="where to (default: beside this)")
    parser.add_argument("--baseline", help="method that tables compare with (default: merge)")
    parser.add_argument("--focus", help="method that the text is about (default: cmlora)")
    parser.add_argument(
        "--untimed", action="store_true", help="leave times out, if the machine had other work"
    )
    parser.add_argument(
        "--methods", default="", help="which, comma-separated (default: all that were run)"
    )
    parser.add_argument("--name", default="composition", help="of the files (default: composition)")
    parser.add_argument("--title", default="Composition methods on the embedded world")
    options = parser.parse_args()
    name = options.name
    study = Study(options.run)
    summary = summarise(study, variants(options.methods))
    if PLOTTED not in summary.values:
        parser.error(f"the run has no {PLOTTED}: cmlora evaluate score {options.run}")
    main_metric = metric_of(PLOTTED)
    drawn = {
        f"{name}_cost.svg": quality_against_cost(summary, main_metric, "gmacs"),
        f"{name}_time.svg": quality_against_cost(summary, main_metric, "seconds"),
        f"{name}_n.svg": quality_by_size(summary, main_metric),
    }
    timed = not options.untimed
    drawn = {file: svg for file, svg in drawn.items() if svg and (timed or "_time" not in file)}
    focus, baseline = focus_of(summary, options.focus), baseline_of(summary, options.baseline)
    text = document(study, summary, options, baseline, focus, list(drawn))
    options.out.mkdir(parents=True, exist_ok=True)
    for written, content in {
        f"{name}.md": text,
        f"{name}.csv": _lines(long_csv(summary, baseline), timed),
        **drawn,
    }.items():
        with replacing(options.out / written) as file:
            file.write(content.encode())
    sheet = contact_sheet(study.folder, shelves(summary, 2), tile=144)
    if sheet is not None:
        with replacing(options.out / f"{name}.png") as file:
            sheet.quantize(128).save(file, "PNG", optimize=True)
    print(verdict(summary, focus))


def _lines(table: str, timed: bool) -> str:
    """A CSV with or without its lines about times."""
    kept = (line for line in table.splitlines(keepends=True) if timed or "seconds" not in line)
    return "".join(kept)


class _Raw(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the text above."""


if __name__ == "__main__":
    main()
