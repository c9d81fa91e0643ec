"""`cmlora compress`: smaller LoRA files and denoisers, with the loss stated."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from cmlora.cli import options
from cmlora.cli.console import emit, out, status
from cmlora.cli.denoiser import Training, denoiser
from cmlora.cli.pictures import draw_compression, drawable
from cmlora.cli.whole import is_model
from cmlora.errors import CmloraError

COMPLETE = "complete"
"""A method of its own: it fills updates instead of shrinking spectra."""


def compress(
    what: Annotated[
        str,
        typer.Argument(help="A LoRA file or an embedded LoRA's id; a diffusers folder or emoji."),
    ],
    out_file: Annotated[Path, typer.Option("--out", help="The smaller .safetensors file.")],
    method: Annotated[
        str,
        typer.Option(
            help="LoRA: energy, budget, fixed, welore, clip, or complete, which takes entries of "
            "zero for unknown. Denoiser: svd, lord, rocket, cospadi, trp, mxfp4. If empty: energy, "
            "or svd."
        ),
    ] = "",
    keep: Annotated[
        float | None,
        typer.Option(
            help="Share that is kept; a rank for fixed and complete, a multiple for clip."
        ),
    ] = None,
    half: Annotated[bool, typer.Option("--half", help="Store a LoRA in half precision.")] = False,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Measure a denoiser's inputs with this prompt; may be repeated."),
    ] = None,
    calib: Annotated[
        Path | None, typer.Option(help="A denoiser's inputs as cmlora calib --all measured them.")
    ] = None,
    spread: Annotated[
        str,
        typer.Option(help="Spread the share over a denoiser's layers: welore, budget, knapsack."),
    ] = "",
    prune: Annotated[
        int, typer.Option(help="Steps that pull a denoiser towards low rank before.")
    ] = 0,
    heal: Annotated[
        int, typer.Option(help="Steps that distil the denoiser into its smaller self after.")
    ] = 0,
    nest: Annotated[
        int, typer.Option(help="Steps that sort the factors, for --cut and for cutting later.")
    ] = 0,
    lasso: Annotated[
        float, typer.Option(help="What empties the last factors in --nest, such as 1e-4.")
    ] = 0.0,
    excess: Annotated[
        float, typer.Option(help="What limits the largest change of an entry in --heal.")
    ] = 0.0,
    cut: Annotated[
        float, typer.Option(help="Share of the factors' rank that is left in the end.")
    ] = 1.0,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw what is kept and lost, by block, into this .png or .svg."),
    ] = None,
    lora_dir: options.LoRAFolder = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Make a LoRA file or a model's denoiser smaller, and say what it costs.

    Example: [bold]cmlora compress ink.safetensors --keep 0.95 --out small.safetensors[/bold]
    """
    from cmlora.pipelines.models import EMBEDDED, locate

    source = Path(locate(what) if what == EMBEDDED else what).expanduser()
    if out_file.suffix != ".safetensors":
        raise CmloraError(f"--out {out_file} should end in .safetensors")
    if out_file.exists() and source.is_file() and out_file.samefile(source):
        raise CmloraError(f"--out {out_file} is the LoRA itself; name another file")
    if out_file.exists() and not force:
        raise CmloraError(f"{out_file} exists; --force replaces it")
    if not out_file.absolute().parent.is_dir():
        raise CmloraError(f"cannot write {out_file}: there is no such folder")
    drawable(plot, force)
    if is_model(str(source)):
        if half:
            raise CmloraError("--half is for LoRA files")
        result = denoiser(
            source,
            out_file,
            method or "svd",
            0.5 if keep is None else keep,
            prompts=prompt or (),
            calib=calib,
            spread=spread,
            training=Training(prune, heal, nest, lasso, excess, cut),
        )
    else:
        learning = prune or heal or nest or lasso or excess or cut != 1
        if prompt or spread or calib or learning:
            raise CmloraError(
                "--prompt, --calib, --spread, --prune, --heal, --excess, --nest, --lasso and --cut "
                "are for a model's folder"
            )
        result = _lora(what, lora_dir, out_file, method or "energy", keep, half)
    draw_compression(plot, f"{what} to {out_file.name}", result)
    if as_json:
        emit(result)
        return
    worst = sorted(result["modules"].items(), key=lambda row: -row[1]["error"])[:10]
    table = Table("worst modules", "before", "after", "error", title=f"{what} to {out_file.name}")
    for module, change in worst:
        row = str(change["before"]), str(change["after"]), f"{change['error']:.2%}"
        table.add_row(module, *row)
    out.print(table)
    share = result["bytes_after"] / result["bytes_before"]
    error = result["error"]
    lost = f", {error:.2%} of the update's norm lost" if error is not None else ""
    out.print(f"{share:.0%} of the bytes{lost}", soft_wrap=True)
    for stage, found in result.get("answers", {}).items():
        out.print(f"answers {stage}: {found:.2%} away from the original's", highlight=False)


def _lora(
    name: str, folder: str | None, target: Path, method: str, keep: float | None, half: bool
) -> dict[str, Any]:
    import torch

    from cmlora.adapters.compression import RULES
    from cmlora.adapters.compression.fill import fill_all
    from cmlora.adapters.compression.resize import resize
    from cmlora.files import read, write
    from cmlora.pipelines.library import find
    from cmlora.pipelines.models import EMBEDDED

    rule = None if method == COMPLETE else RULES[method].object
    if rule is None and keep is not None and not (keep >= 1 and keep % 1 == 0):
        raise CmloraError(f"complete keeps a rank of 1 or more, not {keep:g}")
    if rule is None and half:
        raise CmloraError("--half is for the rules; compress what complete writes once more")
    path = find(name, model=EMBEDDED, folder=folder)
    if target.exists() and target.samefile(path):
        raise CmloraError(f"--out {target} is the LoRA itself; name another file")
    before = path.stat().st_size
    with status("compressing"):
        dtype = torch.half if half else None
        if rule is None:
            resized = fill_all(read(path), None if keep is None else int(keep))
        else:
            resized = resize(read(path), rule, keep, dtype)
        write(resized.lora, target)
    ranks = [change.after for change in resized.changes.values()]
    return {
        "file": str(target),
        "method": method,
        "error": resized.error,
        "bytes_before": before,
        "bytes_after": target.stat().st_size,
        "weights_before": resized.before,
        "weights_after": resized.after,
        "rank": [min(ranks), max(ranks)],
        "modules": {module: change._asdict() for module, change in resized.changes.items()},
    }
