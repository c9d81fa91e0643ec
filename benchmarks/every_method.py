"""From pages of composition.py about the same pictures to one table of all methods.

    python benchmarks/every_method.py later.csv others.csv --times timed

reads the numbers that composition.py wrote for groups of methods, each beside the same baseline on
the same sets and seeds, and writes every_method.md. That the groups compare is not taken for
granted: the baseline's numbers must be the same in all of them but for a thousandth, since another
processor rounds otherwise. `--times RUN` adds the seconds of a run that had the machine for itself.
Nothing is typed by hand.
"""

import argparse
import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from cmlora.atomic import replacing
from cmlora.errors import CmloraError
from cmlora.eval.metrics import Metric, metric_of
from cmlora.eval.report.summary import Summary, summarise
from cmlora.eval.report.tables import BETTER, WORSE, Table, interval_text
from cmlora.eval.statistics import Interval
from cmlora.eval.study import Study
from cmlora.strategies import METHODS

HERE = Path(__file__).parent
SHOWN = ("instances", "classes", "fidelity", "clip_score")
COST = "gmacs"
ALPHA = 0.05
ROUNDING = 1e-3

Row = Mapping[str, str]
Rows = dict[tuple[str, str, str], Row]
"""By metric, method and number of LoRAs, as composition.py writes them."""


def joined(files: Sequence[Path]) -> tuple[Rows, str]:
    """The rows of several files, and the baseline they share.

    Raises:
        CmloraError: if a file cannot be read, the baselines differ, or two files do not agree on
            a row that both have.
    """
    rows: Rows = {}
    baselines = set()
    for file in files:
        try:
            with file.open(encoding="utf-8", newline="") as opened:
                found = list(csv.DictReader(opened))
            own = {(row["metric"], row["method"], row["n"]): row for row in found}
            named = {row["baseline"] for row in found} - {""}
            values = {p: (float(row["value"]), row["sets"]) for p, row in own.items()}
        except (OSError, KeyError, ValueError) as error:
            raise CmloraError(f"{file} is no table of composition.py: {error}") from None
        baselines |= named
        if len(baselines) != 1:
            raise CmloraError(f"the files have several baselines: {', '.join(sorted(baselines))}")
        for place, value in values.items():
            known = rows.get(place)
            if known is None:
                continue
            near = math.isclose(value[0], float(known["value"]), rel_tol=ROUNDING, abs_tol=1e-6)
            if not near or known["sets"] != value[1]:
                raise CmloraError(
                    f"{file}: {' '.join(place)} is {value[0]:g} of {value[1]} sets, elsewhere "
                    f"{known['value']} of {known['sets']}: these are not the same pictures"
                )
        (baseline,) = baselines
        if not any(method == baseline for _, method, _ in own):
            raise CmloraError(f"{file} has no numbers of the baseline {baseline}")
        rows = own | rows
    return rows, baselines.pop()


def ranked(labels: Iterable[str]) -> list[str]:
    """Methods in the order of the registry."""
    order = {name: place for place, name in enumerate(METHODS)}
    return sorted(set(labels), key=lambda label: (order[label.partition("@")[0]], label))


def cell(row: Row | None, metric: Metric) -> str:
    """A number with its interval, and whether it differs from the baseline's by more than chance.

    >>> row = {"value": "0.5", "low": "0.4", "high": "0.6", "sets": "9",
    ...     "difference": "-0.1", "p_sign_flip_holm": "0.01"}
    >>> cell(row, metric_of("instances"))
    '0.500 [0.400, 0.600] ▼'
    """
    if row is None:
        return "-"
    value, low, high = (float(row[key] or math.nan) for key in ("value", "low", "high"))
    text = interval_text(Interval(value, low, high, int(row["sets"])), metric.digits)
    if not row["difference"] or float(row["p_sign_flip_holm"]) >= ALPHA:
        return text
    more = float(row["difference"]) > 0
    return f"{text} {BETTER if more == (metric.better == 'more') else WORSE}"


def tables(rows: Rows, baseline: str) -> list[Table]:
    """The means of the main numbers with what they cost, and concepts found by number of LoRAs."""
    labels = ranked(method for _, method, _ in rows)
    sizes = sorted({n for _, _, n in rows} - {"mean"}, key=int)
    price = float(rows[COST, baseline, "mean"]["value"])
    overview, by_size = [], []
    for label in labels:
        macs = float(rows[COST, label, "mean"]["value"])
        marks = [cell(rows.get((name, label, "mean")), metric_of(name)) for name in SHOWN]
        overview.append([f"`{label}`", *marks, f"{macs:.1f}", f"{macs / price:.2f}"])
        metric = metric_of(SHOWN[0])
        found = [cell(rows.get((metric.name, label, n)), metric) for n in (*sizes, "mean")]
        by_size.append([f"`{label}`", *found])
    sets = ", ".join(rows[SHOWN[0], baseline, n]["sets"] for n in sizes)
    note = (
        f"95 % bootstrap intervals over sets ({sets} sets for N = {', '.join(sizes)}; the mean "
        f"counts every N the same). {BETTER} better and {WORSE} worse than `{baseline}`, sign-flip "
        "test, p < 0.05 by Holm within the group that a method was drawn with. "
    )
    titles = [metric_of(name).title for name in SHOWN]
    head = ["method", *titles, "GMACs", f"of `{baseline}`"]
    sides = ", ".join(f"{metric_of(name).title}: {metric_of(name).better}" for name in SHOWN)
    return [
        Table("Means", head, overview, f"{note}Better is {sides}. Costs are per picture."),
        Table(
            metric_of(SHOWN[0]).title,
            ["method", *(f"N = {n}" for n in sizes), "mean"],
            by_size,
            note.strip(),
        ),
    ]


def seconds(summary: Summary, labels: Sequence[str]) -> Table:
    """Seconds per picture by number of LoRAs.

    Raises:
        CmloraError: if a method was not timed.
    """
    rows = []
    for label in labels:
        cells = [summary.cell("seconds", label, n) for n in summary.sizes]
        if not all(each.count for each in cells):
            raise CmloraError(f"the timed run lacks pictures of {label}")
        rows.append([f"`{label}`", *(f"{each.value:.2f}" for each in cells)])
    count = len(summary.records)
    return Table(
        "seconds per picture",
        ["method", *(f"N = {n}" for n in summary.sizes)],
        rows,
        f"Of {count} pictures drawn one after the other with nothing beside them.",
    )


def main() -> None:
    """Write every_method.md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="+", help="tables of composition.py")
    parser.add_argument("--times", type=Path, help="run to take the seconds from")
    parser.add_argument("--out", type=Path, default=HERE / "every_method.md", help="where to")
    options = parser.parse_args()
    try:
        rows, baseline = joined(options.files)
        shown = tables(rows, baseline)
        labels = ranked(method for _, method, _ in rows)
        if options.times is not None:
            shown.append(seconds(summarise(Study(options.times)), labels))
    except CmloraError as error:
        parser.error(str(error))
    pages = ", ".join(f"[{f.stem}.md]({f.stem}.md)" for f in options.files)
    parts = [
        "# Every method on the same sets",
        f"All methods of {pages} in one table; what the pictures are is said there. `{baseline}` "
        "was drawn with every group, with the same numbers but for rounding. Made by `python "
        "benchmarks/every_method.py`; see [README.md](README.md). A ranking here is no proof of "
        "the same ranking on other models.",
        *(table.markdown() for table in shown),
    ]
    with replacing(options.out) as place:
        place.write(("\n\n".join(parts) + "\n").encode())


if __name__ == "__main__":
    main()
