"""What every LoRA of a set draws alone on the set's own prompt and noise, and what methods keep.

A LoRA that shows its concept on a prompt of its own may lose it on the long prompt of a whole set.
No way to combine LoRAs is asked for more than they can do: beside the share of concepts that a
method draws stands the share of those that the LoRAs draw alone, with everything else the same.

    python benchmarks/alone.py RUN --n 5

draws one picture per LoRA, set and seed of the composition study's run, and writes alone.md. A run
that was stopped goes on where it was; the pictures' contents are kept in RUN/alone.json.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from cmlora.atomic import replacing
from cmlora.cli.arguments import variants
from cmlora.emoji import probe
from cmlora.emoji.world import BY_CONCEPT
from cmlora.eval.jobs import noise_index
from cmlora.eval.manifest import set_id
from cmlora.eval.studio import Studio
from cmlora.eval.study import Record, Study

HERE = Path(__file__).parent
RESAMPLES = 5000

Found = dict[str, bool]
"""By LoRA of a set: whether its very concept is in the picture."""


def seen(detector: probe.Probe, image: Image.Image, ids: Iterable[str]) -> Found:
    """Which concepts of a set a picture shows."""
    (there,) = detector.detect([image])
    return {id_: there[BY_CONCEPT[id_].category] == BY_CONCEPT[id_].name for id_ in ids}


def alone(
    studio: Studio,
    detector: probe.Probe,
    jobs: Iterable[tuple[tuple[str, ...], int]],
    file: Path,
) -> dict[str, Found]:
    """What each LoRA draws alone, by set and seed; what is in the file is not drawn again."""
    known: dict[str, Found] = json.loads(file.read_text()) if file.exists() else {}
    for ids, seed in tqdm(list(jobs), desc="alone"):
        name = f"{set_id(ids)} {seed}"
        if name in known:
            continue
        found: Found = {}
        for id_ in ids:
            recipe = replace(
                studio.base_recipe(),
                method="merge",
                cache="none",
                options={},
                loras=studio.ingredients((id_,)),
                prompt=studio.manifest.prompt_of(ids),
                seed=seed,
                index=noise_index(ids),
            )
            found |= seen(detector, studio.render((id_,), recipe).image, (id_,))
        known[name] = found
        with replacing(file) as place:
            place.write(json.dumps(known, sort_keys=True, indent=1).encode())
    return known


@dataclass(frozen=True)
class Case:
    """One concept of one picture.

    Args:
        place: the set; sets are what the bootstrap draws.
        category: of the concept.
        drawn: by the method.
        alone: by its LoRA alone.
    """

    place: str
    category: str
    drawn: bool
    alone: bool


def itself(reference: Mapping[str, Found]) -> list[Case]:
    """What LoRAs draw alone, against what the same LoRAs draw alone from other noise.

    Of what is drawn once a LoRA does not draw all again, with nobody else in the picture.

    Args:
        reference: what `alone` found, by set and seed.
    """
    by_set: dict[str, list[Found]] = {}
    for name, found in reference.items():
        by_set.setdefault(name.rpartition(" ")[0], []).append(found)
    return [
        Case(place, BY_CONCEPT[id_].category, other[id_], one[id_])
        for place, seeds in by_set.items()
        for one, other in permutations(seeds, 2)
        for id_ in one
    ]


def share(cases: Iterable[Case], hit: Callable[[Case], bool]) -> str:
    """Share of cases for which something holds, with a 95 % bootstrap interval over sets."""
    by_set: dict[str, list[bool]] = {}
    for case in cases:
        by_set.setdefault(case.place, []).append(hit(case))
    if not by_set:
        return "-"
    sums = np.array([[sum(hits), len(hits)] for hits in by_set.values()])
    rng = np.random.default_rng(0)
    drawn = sums[rng.integers(len(sums), size=(RESAMPLES, len(sums)))].sum(1)
    low, high = np.quantile(drawn[:, 0] / drawn[:, 1], [0.025, 0.975])
    top, bottom = sums.sum(0)
    return f"{top / bottom:.3f} [{low:.3f}, {high:.3f}]"


def document(
    study: Study,
    n: int,
    seeds: Iterable[int],
    cases: Mapping[str, list[Case]],
    noise: Sequence[Case],
) -> str:
    """alone.md, from the cases of every method and, for comparison, of other noise."""
    anybody = next(iter(cases.values()))
    categories = study.manifest.categories
    ways: list[tuple[Callable[[Case], bool], Callable[[Case], bool]]] = [
        (lambda case: True, lambda case: case.drawn),
        (lambda case: case.alone, lambda case: case.drawn),
        (lambda case: not case.alone, lambda case: case.drawn),
    ]
    main = ["| method | drawn | kept of what is drawn alone | drawn of the rest |"]
    main.append("|---|---:|---:|---:|")
    parts = [f"| method | {' | '.join(categories)} |", "|---|" + "---:|" * len(categories)]
    row = [share((c for c in anybody if c.category == k), lambda c: c.alone) for k in categories]
    parts.append(f"| drawn alone | {' | '.join(row)} |")
    shown = {f"`{label}`": own for label, own in cases.items()}
    for label, own in {"alone, other noise": noise, **shown}.items():
        row = [share(filter(among, own), hit) for among, hit in ways]
        main.append(f"| {label} | {' | '.join(row)} |")
        kept = [case for case in own if case.alone]
        row = [share((c for c in kept if c.category == k), lambda c: c.drawn) for k in categories]
        parts.append(f"| {label} | {' | '.join(row)} |")
    paragraphs = [
        "# What LoRAs draw alone, and what methods keep of it",
        f"{len({case.place for case in anybody})} sets of {n} LoRAs of the embedded world, seeds "
        f'{", ".join(map(str, sorted(seeds)))}. "Alone" is one LoRA with the prompt of the whole '
        "set and the noise of the set's other pictures. Made by `python benchmarks/alone.py`; see "
        "[README.md](README.md).",
        f"Alone, the LoRAs draw {share(anybody, lambda case: case.alone)} of their concepts there; "
        "on prompts of their own they draw nearly all (`python -m cmlora.emoji.report`).",
        "\n".join(main),
        'Shares of concepts, 95 % bootstrap intervals over sets. "Other noise" is a LoRA alone '
        "with the same prompt and another seed: how much of what it draws once it draws again, "
        "with nobody else in the picture.",
        "## Kept of what is drawn alone, by category",
        "\n".join(parts),
        "Where nothing is drawn alone there is nothing to keep: -.",
    ]
    return "\n\n".join(paragraphs) + "\n"


def main() -> None:
    """Draw what is missing and write alone.md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of the composition study's run")
    parser.add_argument("--n", type=int, default=5, help="LoRAs of a set (default: 5)")
    parser.add_argument("--seeds", default="", help="comma-separated (default: all of the run)")
    parser.add_argument("--methods", default="", help="comma-separated (default: all of the run)")
    parser.add_argument("--out", type=Path, default=HERE / "alone.md", help="where to")
    options = parser.parse_args()
    study = Study(options.run)
    wanted = {int(seed) for seed in options.seeds.split(",") if seed}
    methods = variants(options.methods)
    records = [
        record
        for record in study.records().values()
        if record.n == options.n
        and (not wanted or record.seed in wanted)
        and (not methods or record.label in methods)
    ]
    if not records:
        parser.error(f"{options.run} has no pictures of {options.n} LoRAs")
    detector = probe.load()
    studio = Studio(study.manifest, execution="fused")
    labels = list(dict.fromkeys(record.label for record in records))
    by_job: dict[tuple[tuple[str, ...], int], dict[str, Record]] = {}
    for record in records:
        by_job.setdefault((record.ids, record.seed), {})[record.label] = record
    whole = {job: own for job, own in by_job.items() if len(own) == len(labels)}
    known = alone(studio, detector, whole, study.folder / "alone.json")
    names = {job: f"{set_id(job[0])} {job[1]}" for job in whole}
    reference = {name: known[name] for name in names.values()}
    cases: dict[str, list[Case]] = {label: [] for label in labels}
    for (ids, seed), own in whole.items():
        before = reference[names[ids, seed]]
        for label, record in own.items():
            with Image.open(study.folder / record.image) as image:
                found = seen(detector, image.convert("RGB"), ids)
            cases[label] += [
                Case(set_id(ids), BY_CONCEPT[id_].category, found[id_], before[id_]) for id_ in ids
            ]
    text = document(study, options.n, {seed for _, seed in whole}, cases, itself(reference))
    with replacing(options.out) as place:
        place.write(text.encode())
    print(text)


if __name__ == "__main__":
    main()
