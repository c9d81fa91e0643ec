"""`cmlora compress`: smaller LoRA files, with the loss stated before it is accepted."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from cmlora.cli.console import emit, out, status
from cmlora.cli.options import AsJson, LoRAFolder
from cmlora.errors import CmloraError


def compress(
    lora: Annotated[str, typer.Argument(help="A LoRA file, or the id of an embedded LoRA.")],
    out_file: Annotated[Path, typer.Option("--out", help="The smaller .safetensors file.")],
    method: Annotated[str, typer.Option(help="energy, budget, fixed, welore or clip.")] = "energy",
    keep: Annotated[
        float | None,
        typer.Option(help="Share that is kept; a rank for fixed, a multiple for clip."),
    ] = None,
    half: Annotated[bool, typer.Option("--half", help="Store in half precision.")] = False,
    lora_dir: LoRAFolder = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make a LoRA file smaller, and say what it costs.

    Example: [bold]cmlora compress ink.safetensors --keep 0.95 --out small.safetensors[/bold]
    """
    import torch

    from cmlora.adapters.compression import RULES
    from cmlora.adapters.compression.resize import resize
    from cmlora.files import read, write
    from cmlora.pipelines.library import find
    from cmlora.pipelines.models import EMBEDDED

    rule = RULES[method].object
    path = find(lora, model=EMBEDDED, folder=lora_dir)
    if out_file.exists() and out_file.samefile(path):
        raise CmloraError(f"--out {out_file} is the LoRA itself; name another file")
    if out_file.exists() and not force:
        raise CmloraError(f"{out_file} exists; --force replaces it")
    with status("compressing"):
        resized = resize(read(path), rule, keep, torch.half if half else None)
        write(resized.lora, out_file)
    ranks = [change.after for change in resized.changes.values()]
    result = {
        "file": str(out_file),
        "method": method,
        "error": resized.error,
        "bytes_before": path.stat().st_size,
        "bytes_after": out_file.stat().st_size,
        "weights_before": resized.before,
        "weights_after": resized.after,
        "rank": [min(ranks), max(ranks)],
        "modules": {module: change._asdict() for module, change in resized.changes.items()},
    }
    if as_json:
        emit(result)
        return
    table = Table("module", "rank", "now", "error", title=f"{path.name} to {out_file.name}")
    worst = sorted(resized.changes.items(), key=lambda row: -row[1].error)
    for module, change in worst[:10]:
        table.add_row(module, str(change.before), str(change.after), f"{change.error:.2%}")
    out.print(table)
    share = out_file.stat().st_size / path.stat().st_size
    out.print(f"{share:.0%} of the bytes, {resized.error:.2%} of the update's norm lost")
