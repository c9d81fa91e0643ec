"""`cmlora evaluate score` and `judge`: judge the pictures of a run; nothing is made again."""

from pathlib import Path
from typing import Annotated, Any

import typer

from cmlora.cli import arguments, options
from cmlora.cli.console import emit, err, out, progress, quiet_libraries, status
from cmlora.cli.evaluate_run import Run, ShardText
from cmlora.errors import CmloraError


def score(
    run: Run,
    scorers: Annotated[
        str, typer.Option(help="Names, separated by commas; what needs no further model if empty.")
    ] = "",
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="SCORER.KEY=VALUE; may be repeated.")
    ] = None,
    listing: Annotated[bool, typer.Option("--list", help="Only list the scorers.")] = False,
    shard: ShardText = "",
    device: options.Device = None,
    as_json: options.AsJson = False,
) -> None:
    """Score the pictures of a run; scores that are there are kept.

    Example: [bold]cmlora evaluate score run --scorers clip_score,sanity[/bold]
    """
    from cmlora.eval.scorers import SCORERS
    from cmlora.eval.scoring import listed, usual
    from cmlora.eval.scoring import score as mark
    from cmlora.eval.shard import device_of, launched, read_shard
    from cmlora.eval.study import Study

    if listing:
        rows = [
            {"name": e.name, "sentence": e.sentence, "paper": e.paper} for e in SCORERS.values()
        ]
        if as_json:
            emit(rows)
        else:
            for row in rows:
                out.print(f"{row['name']:14} {row['sentence']}", soft_wrap=True)
        return
    study = Study(run)
    wanted = listed(arguments.listed(scorers)) or usual(study.manifest)
    given = _settings(setting or (), wanted)
    part = read_shard(shard) if shard else launched()
    quiet_libraries()
    done = {}
    count = len(part.share(list(study.records())))
    for name in wanted:
        with progress(name, count) as bar:
            done[name] = mark(
                study,
                name,
                device=device_of(part, device),
                shard=part,
                options=given.get(name, {}),
                on_picture=lambda made, bar=bar: bar.advance(bar.task_ids[0], made),  # type: ignore[misc]
            )
    if as_json:
        emit({"run": str(run), "scored": done})
    else:
        for name, made in done.items():
            err.print(f"{name}: {made} pictures scored, {max(count - made, 0)} were")


def judge(
    run: Run,
    model: Annotated[
        str, typer.Option(help="A vision-language model: folder, hub id, or the server's name.")
    ],
    base_url: Annotated[
        str, typer.Option(help="Of an OpenAI-compatible server, up to /v1; local if empty.")
    ] = "",
    key_variable: Annotated[
        str, typer.Option(help="Environment variable that holds the server's key.")
    ] = "OPENAI_API_KEY",
    protocol: Annotated[str, typer.Option(help="four, two, or a text file.")] = "four",
    methods: Annotated[str, typer.Option(help="Labels to compare; all if empty.")] = "",
    against: Annotated[str, typer.Option(help="Only pairs with this method.")] = "",
    sample: Annotated[
        int | None, typer.Option(help="At most so many sets and seeds per N.")
    ] = None,
    examples: Annotated[
        Path | None, typer.Option(help="JSON file of judged pairs to show beforehand.")
    ] = None,
    shots: Annotated[int, typer.Option(help="How many of the examples to show.")] = 1,
    device: options.Device = None,
    dtype: Annotated[str, typer.Option(help="Of a local model.")] = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option(help="Let a local model bring code of its own, with all your rights.")
    ] = False,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for a server.")] = 120.0,
    attempts: Annotated[int, typer.Option(help="Tries per question to a server.")] = 6,
    per_minute: Annotated[float, typer.Option(help="Questions per minute; 0: no limit.")] = 0.0,
    prices: Annotated[
        str, typer.Option(help="IN,OUT per million tokens, for the cost counter.")
    ] = "0,0",
    budget: Annotated[float, typer.Option(help="Stop when so much is spent; 0: no limit.")] = 0.0,
    shard: ShardText = "",
    as_json: options.AsJson = False,
) -> None:
    """Have pairs of pictures compared by a vision-language model, in both orders.

    Example: [bold]cmlora evaluate judge run --model Qwen/Qwen2.5-VL-3B-Instruct[/bold]

    A server: [bold]cmlora evaluate judge run --model NAME --base-url http://127.0.0.1:8000/v1[/bold]
    """
    from cmlora.eval.judge.compare import judge as ask
    from cmlora.eval.judge.compare import pairs, read_examples
    from cmlora.eval.judge.protocol import find_protocol
    from cmlora.eval.judge.tally import judged
    from cmlora.eval.shard import device_of, launched, read_shard
    from cmlora.eval.study import Study
    from cmlora.eval.variants import canonical

    study, how = Study(run), find_protocol(protocol)
    part = read_shard(shard) if shard else launched()
    records = list(study.records().values())
    labels = [canonical(word) for word in arguments.variants(methods)]
    opponent = canonical(against) if against.strip() else ""
    wanted = pairs(records, labels=labels, against=opponent, most=sample)
    if not wanted:
        raise CmloraError(f"{run} has no two pictures of the same set and seed to compare")
    shown = read_examples(examples, how) if examples else []
    quiet_libraries()
    with status("loading"):
        if base_url:
            limits = {
                "timeout": timeout,
                "attempts": attempts,
                "per_minute": per_minute,
                "budget": budget,
            }
            backend = _server(base_url, model, key_variable, prices, limits)
        else:
            backend = _local(model, device_of(part, device), dtype, trust_remote_code)
    with progress("questions", 2 * len(part.share(wanted))) as bar:
        asked = ask(
            study,
            backend,
            how,
            wanted,
            examples=shown,
            shots=shots,
            shard=part,
            on_answer=lambda row: bar.advance(bar.task_ids[0]),
        )
    found = [v for v in judged(study) if (v.judge, v.protocol) == (backend.name, how.name)]
    if as_json:
        emit({"run": str(run), "asked": asked, "judges": [_facts(v) for v in found]})
        return
    err.print(f"{asked} questions asked, {2 * len(part.share(wanted)) - asked} were answered")
    for verdicts in found:
        bias = verdicts.bias()
        word = "biased by position" if bias.found else "no bias by position shown"
        err.print(
            f"{verdicts.unreadable} of {verdicts.asked} answers unreadable; {word} "
            f"({bias.pull.value:+.2f} marks for the first picture, p = {bias.p:.3g})"
        )


def _facts(verdicts: Any) -> dict[str, Any]:
    """A judge's record as JSON types."""
    import math

    def number(value: float) -> float | None:
        return None if math.isnan(value) else value

    bias = verdicts.bias()
    return {
        "judge": verdicts.judge,
        "protocol": verdicts.protocol,
        "asked": verdicts.asked,
        "unreadable": verdicts.unreadable,
        "repaired": verdicts.repaired,
        "pairs": len(verdicts.duels),
        "cost": verdicts.cost,
        "position_bias": {
            "marks": number(bias.pull.value),
            "p": bias.p,
            "found": bias.found,
            "agreement": number(bias.agreement),
        },
        "win_rates": {
            label: number(verdicts.win_rate(label, "overall").value) for label in verdicts.labels
        },
    }


def _local(model: str, device: str | None, dtype: str, trust: bool) -> Any:
    from cmlora.eval.judge.local import LocalJudge

    return LocalJudge(model, device=device, dtype=dtype, trust_remote_code=trust)


def _server(url: str, model: str, variable: str, prices: str, limits: dict[str, Any]) -> Any:
    from cmlora.eval.judge.http import HttpJudge, Limits, key_from

    try:
        read, wrote = (float(part) for part in prices.split(","))
    except ValueError:
        raise CmloraError(f"--prices {prices!r}: expected IN,OUT such as 0.5,1.5") from None
    if limits["attempts"] < 1 or limits["timeout"] <= 0:
        raise CmloraError("--attempts is at least 1 and --timeout more than 0")
    return HttpJudge(
        url, model, key=key_from(variable), prices=(read, wrote), limits=Limits(**limits)
    )


def _settings(texts: Any, wanted: tuple[str, ...]) -> dict[str, dict[str, str]]:
    """SCORER.KEY=VALUE texts by scorer."""
    found: dict[str, dict[str, str]] = {}
    for key, value in arguments.pairs("--set", texts).items():
        name, dot, option = key.partition(".")
        if not dot or name not in wanted:
            listed = ", ".join(wanted)
            raise CmloraError(f"--set {key}: expected SCORER.KEY=VALUE; the scorers are {listed}")
        found.setdefault(name, {})[option] = value
    return found
