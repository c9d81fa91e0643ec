"""`cmlora unpack`: LoRA files out of a pack."""

from pathlib import Path
from typing import Annotated

import typer

from cmlora.cli.console import emit, out, status
from cmlora.cli.merge import writable
from cmlora.cli.options import AsJson
from cmlora.errors import CmloraError


def unpack(
    file: Annotated[Path, typer.Argument(help="What `cmlora pack` wrote.")],
    name: Annotated[list[str] | None, typer.Option(help="Which LoRA; all if not given.")] = None,
    folder: Annotated[Path, typer.Option("--out", "-o", help="Folder for the files.")] = Path(),
    force: Annotated[bool, typer.Option("--force", help="Replace existing files.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write LoRAs that are in a pack as files of their own.

    Example: [bold]cmlora unpack styles.safetensors --name anime -o loras[/bold]
    """
    from cmlora.adapters.merging import rmm
    from cmlora.files import write

    packed = rmm.load(file)
    found = [rmm.rebuild(packed, wanted) for wanted in name or packed.names]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CmloraError(f"--out {folder}: cannot make the folder ({error.strerror})") from None
    targets = [folder / f"{lora.name}.safetensors" for lora in found]
    for target in targets:
        writable(target, force)
    with status("writing"):
        for lora, target in zip(found, targets, strict=True):
            write(lora, target)
    if as_json:
        emit([{"name": lora.name, "file": str(t)} for lora, t in zip(found, targets, strict=True)])
        return
    for target in targets:
        out.print(str(target), soft_wrap=True)
