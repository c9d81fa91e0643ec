"""`cmlora replay`: the picture in a file, made again from what the file says."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from cmlora import pictures
from cmlora.cli import options
from cmlora.cli.console import emit, err, out, progress, quiet_libraries, status
from cmlora.cli.destination import check_destination
from cmlora.errors import CmloraError

_GONE = "other programs took that out"
_PACKED = re.compile(rb"zTXt(cmlora|parameters)\0|iTXt(cmlora|parameters)\0\x01")
_READ = 2**26  # bytes of a picture that are looked through for texts


def replay(
    picture: Annotated[Path, typer.Argument(help="A .png, .webp or .jpg.")],
    destination: Annotated[
        Path | None,
        typer.Option("--out", help="The picture to write; NAME-again beside it if not given."),
    ] = None,
    model: Annotated[
        str,
        typer.Option(help="Where the model is now, if it moved; needed for others' pictures."),
    ] = "",
    config: options.Config = None,
    lora_dir: Annotated[
        str | None, typer.Option(help="A folder; its LoRAs are found by hash, also further below.")
    ] = None,
    device: options.Device = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what the file holds; nothing is loaded.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Make a picture again from the recipe inside of it.

    A picture of ours comes out the same, byte for byte on the same machine and libraries. One of
    another program that left its text gets the same prompt, seed, sampler and LoRAs (found by
    their hashes, at the strengths and curves of their tags), which is not the same pixels; what of
    its text is not carried out is said.

    Example: [bold]cmlora replay picture.png --lora-dir loras --out again.png[/bold]
    """
    record, foreign = _read(picture)
    if dry_run:
        _say(picture, record, foreign, as_json)
        return
    suffix = picture.suffix if picture.suffix.lower() in pictures.SUFFIXES else ".png"
    target = destination or picture.with_name(f"{picture.stem}-again{suffix}")
    check_destination(target, picture)
    if foreign is not None:
        foreign.check()
    quiet_libraries()
    from cmlora.pipelines.render import render, restore
    from cmlora.pipelines.retell import retell

    left: list[str] = []
    with status("loading"):
        if record is not None:
            where = model or None
            pipe = restore(record, model=where, folder=lora_dir, device=device, config=config)
        else:
            if not model:
                raise CmloraError(f"{picture} is another program's; name a model with --model")
            told = retell(foreign, model, folder=lora_dir, device=device, config=config)
            pipe, record, left = told
            record = replace(record, schedule=foreign.schedule(list(pipe.loras)))
            for note in left:
                err.print(note, soft_wrap=True)
    with progress(record.method, record.steps) as bar:
        made = render(pipe, record, on_step=lambda: bar.advance(bar.task_ids[0]))
    pictures.save(made.image, target, record)
    same = target.read_bytes() == picture.read_bytes()
    changed = _changed(record) if foreign is None else {}
    if as_json:
        emit({"file": str(target), "identical": same, "libraries": changed, "left_out": left})
        return
    out.print(str(target), soft_wrap=True, markup=False)
    if same:
        err.print("the same file, byte for byte")
    elif left:
        err.print("not all of its ingredients, see above; the pixels are our own")
    elif foreign is not None:
        err.print("the same ingredients; the pixels are our own")
    else:
        err.print(f"not the same bytes{_because(changed)}")


def _read(picture: Path) -> tuple[Any, Any]:
    """Our own recipe in a file, or else another program's text."""
    from cmlora import imagetext
    from cmlora.infotext import parse

    texts = imagetext.texts(picture)
    if "cmlora" in texts:
        return pictures.read(picture), None
    if texts.get("parameters", "").strip():
        return None, parse(texts["parameters"])
    why = "its texts are compressed, which are not read" if _packed(picture) else _GONE
    raise CmloraError(f"{picture} does not say how it was made: {why}")


def _packed(picture: Path) -> bool:
    """Whether a PNG has the texts that are looked for in a compressed form."""
    with picture.open("rb") as file:
        return _PACKED.search(file.read(_READ)) is not None


def _say(picture: Path, record: Any, foreign: Any, as_json: bool) -> None:
    """What a file holds, without carrying it out."""
    import json
    from dataclasses import asdict

    if record is not None:
        facts = {"file": str(picture), "program": "cmlora", "recipe": json.loads(record.to_json())}
    else:
        facts = {"file": str(picture), "program": "another", "infotext": asdict(foreign)}
    if as_json:
        emit(facts)
        return
    found = facts["recipe" if record is not None else "infotext"]
    for key, value in found.items():
        if value not in ("", None, [], {}, ()):
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            out.print(f"{key}: {text}", soft_wrap=True, markup=False)


def _changed(record: Any) -> dict[str, list[str]]:
    """Libraries that are other versions now: then and now."""
    from cmlora.recipe import current_versions

    now = current_versions()
    return {
        name: [version, now.get(name, "not installed")]
        for name, version in record.versions.items()
        if now.get(name) != version
    }


def _because(changed: dict[str, list[str]]) -> str:
    pairs = ", ".join(f"{name} {then} is {now}" for name, (then, now) in changed.items())
    return f": {pairs}" if pairs else "; another machine, or the file was changed"
