"""From a run of the composition study to the tables and plots beside this file.

README.md in this folder has the commands that make the run. Then

    python benchmarks/composition.py RUN

writes composition.md, composition.csv, composition.png and the plots; nothing is typed by hand.
With `--name` and `--title` another run, or a part of one, gets files of its own: `--methods`,
`--n`, `--seeds`, and `--common` for the sets that every method has drawn. `--merged FILE` adds what
merged files reach, from the merged.json that merged.py writes; without a run, to the page that is
there.
"""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from cmlora.atomic import replacing
from cmlora.cli import arguments
from cmlora.errors import CmloraError
from cmlora.eval.metrics import metric_of
from cmlora.eval.report.gallery import contact_sheet, shelves
from cmlora.eval.report.plots import quality_against_cost, quality_by_size
from cmlora.eval.report.selection import Selection
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
from cmlora.eval.variants import canonical

HERE = Path(__file__).parent
TABLES = ("instances", "classes", "fidelity", "clip_score", "gmacs", "seconds")
PLOTTED = "instances"
MERGED = "## Merged files"


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


def merged_rows(path: Path) -> list[dict[str, Any]]:
    """What merged.py measured, one row per method and set.

    Raises:
        CmloraError: if the file is not of that form.
    """
    try:
        rows = [
            {
                "method": str(row["method"]),
                "names": tuple(map(str, row["names"])),
                "seeds": int(row["seeds"]),
                "learn": float(row["learn"]),
                "each": [float(value) for value in row["each"]],
                "size": row["bytes"] / row["sources"] if "bytes" in row else None,
            }
            for row in json.loads(path.read_text(encoding="utf-8"))
        ]
    except OSError as error:
        raise CmloraError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, ZeroDivisionError):
        raise CmloraError(f"{path} is not what merged.py writes") from None
    if not rows:
        raise CmloraError(f"{path} holds no rows yet")
    return rows


def with_merged(page: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """A page with merging methods as composition methods in a section before its plots.

    Args:
        page: see `document`; a section that it has already is replaced.
        rows: see `merged_rows`.
    """
    sets: dict[int, set[tuple[str, ...]]] = {}
    for row in rows:
        sets.setdefault(len(row["names"]), set()).add(row["names"])
    compared = {int(n): count for count, n in re.findall(r"(\d+) sets of (\d+) LoRAs", page)}
    counted = ", ".join(
        f"{len(sets[n])} of {n} LoRAs (above: {compared.get(n, 0)})" for n in sorted(sets)
    )
    pictures = " or ".join(str(count) for count in sorted({row["seeds"] for row in rows}))
    learn = sorted({row["learn"] for row in rows} - {1.0})
    text = (
        "Merging methods as composition methods: every set is merged into one file and drawn from "
        f"that file alone. These are fewer sets than above, {counted}, with {pictures} pictures of "
        "each: compare the numbers with the live rows of this table, not with the tables above. "
    )
    if learn:
        shares = " or ".join(f"{share:.0%}" for share in learn)
        text += f"Learned methods had {shares} of their usual steps. "
    text += (
        "Concepts found; size of the file in units of the LoRAs it was made of, all of which live "
        "compositions need. Made by `python benchmarks/merged.py`."
    )
    lines = [MERGED, "", text, ""]
    lines += ["| method |" + "".join(f" N = {n} |" for n in sorted(sets)) + " file |"]
    lines += ["|---|" + "---:|" * (len(sets) + 1)]
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        cells = [f"`{method}`"]
        for n in sorted(sets):
            each = [value for row in own if len(row["names"]) == n for value in row["each"]]
            cells.append(f"{fmean(each):.3f}" if each else "")
        share = [row["size"] for row in own if row["size"] is not None]
        cells.append(f"{fmean(share):.2f}" if share else "1.00")
        lines.append(f"| {' | '.join(cells)} |")
    before, plots, after = page.partition("## Plots\n")
    kept = before.partition(MERGED)[0].rstrip()
    return "\n".join([kept, "", *lines, "", plots + after]).rstrip() + "\n"


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
    parser.add_argument("run", type=Path, nargs="?", help="folder of the run")
    parser.add_argument("--out", type=Path, default=HERE, help="where to (default: beside this)")
    parser.add_argument("--baseline", help="method that tables compare with (default: merge)")
    parser.add_argument("--focus", help="method that the text is about (default: cmlora)")
    parser.add_argument(
        "--untimed", action="store_true", help="leave times out, if the machine had other work"
    )
    parser.add_argument(
        "--methods", default="", help="which, comma-separated (default: all that were run)"
    )
    parser.add_argument("--n", default="", help="only sets of so many LoRAs, such as 5 or 2-4")
    parser.add_argument("--seeds", default="", help="only these, such as 0-3")
    parser.add_argument(
        "--common", action="store_true", help="only sets and seeds that every method has drawn"
    )
    parser.add_argument("--name", default="composition", help="of the files (default: composition)")
    parser.add_argument("--title", default="Composition methods on the embedded world")
    parser.add_argument(
        "--merged", type=Path, help="merged.json of merged.py: merging methods in a table besides"
    )
    options = parser.parse_args()
    name = options.name
    try:
        rows = [] if options.merged is None else merged_rows(options.merged)
    except CmloraError as error:
        parser.error(str(error))
    written = options.out / f"{name}.md"
    if options.run is None:
        if not rows or not written.is_file():
            parser.error(f"name a run; or --merged, for a page that is there ({written})")
        page = with_merged(written.read_text(encoding="utf-8"), rows)
        with replacing(written) as file:
            file.write(page.encode())
        return
    study = Study(options.run)
    try:
        summary = summarise(study, _selection(options))
    except CmloraError as error:
        parser.error(str(error))
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
    text = with_merged(text, rows) if rows else text
    options.out.mkdir(parents=True, exist_ok=True)
    for place, content in {
        f"{name}.md": text,
        f"{name}.csv": _lines(long_csv(summary, baseline), timed),
        **drawn,
    }.items():
        with replacing(options.out / place) as file:
            file.write(content.encode())
    sheet = contact_sheet(study.folder, shelves(summary, 2), tile=144)
    if sheet is not None:
        with replacing(options.out / f"{name}.png") as file:
            sheet.quantize(128).save(file, "PNG", optimize=True)
    print(verdict(summary, focus))


def _selection(options: argparse.Namespace) -> Selection:
    return Selection(
        labels=[canonical(word) for word in arguments.variants(options.methods)],
        sizes=arguments.sizes(options.n) if options.n else (),
        seeds=arguments.seeds(options.seeds) if options.seeds else (),
        common=options.common,
    )


def _lines(table: str, timed: bool) -> str:
    """A CSV with or without its lines about times."""
    kept = (line for line in table.splitlines(keepends=True) if timed or "seconds" not in line)
    return "".join(kept)


class _Raw(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the text above."""


if __name__ == "__main__":
    main()
