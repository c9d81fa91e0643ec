"""`cmlora compress`: smaller LoRA files and denoisers, with the loss stated."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from cmlora.cli import options
from cmlora.cli.console import emit, err, out, quiet_libraries, status
from cmlora.errors import CmloraError


def compress(
    what: Annotated[
        str, typer.Argument(help="A LoRA file, an embedded LoRA's id, or a diffusers folder.")
    ],
    out_file: Annotated[Path, typer.Option("--out", help="The smaller .safetensors file.")],
    method: Annotated[
        str,
        typer.Option(
            help="LoRA: energy, budget, fixed, welore, clip. Denoiser: svd, lord, rocket, cospadi, "
            "mxfp4. If empty: energy, or svd."
        ),
    ] = "",
    keep: Annotated[
        float | None,
        typer.Option(help="Share that is kept; a rank for fixed, a multiple for clip."),
    ] = None,
    half: Annotated[bool, typer.Option("--half", help="Store a LoRA in half precision.")] = False,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Measure a denoiser's inputs with this prompt; may be repeated."),
    ] = None,
    spread: Annotated[
        str, typer.Option(help="Spread the share over a denoiser's layers: welore or budget.")
    ] = "",
    lora_dir: options.LoRAFolder = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Make a LoRA file or a model's denoiser smaller, and say what it costs.

    Example: [bold]cmlora compress ink.safetensors --keep 0.95 --out small.safetensors[/bold]
    """
    source, model = Path(what).expanduser(), (Path(what).expanduser() / "model_index.json")
    if out_file.suffix != ".safetensors":
        raise CmloraError(f"--out {out_file} should end in .safetensors")
    if out_file.exists() and source.is_file() and out_file.samefile(source):
        raise CmloraError(f"--out {out_file} is the LoRA itself; name another file")
    if out_file.exists() and not force:
        raise CmloraError(f"{out_file} exists; --force replaces it")
    if not out_file.absolute().parent.is_dir():
        raise CmloraError(f"cannot write {out_file}: there is no such folder")
    if model.is_file():
        if half:
            raise CmloraError("--half is for LoRA files")
        result = _denoiser(source, out_file, method or "svd", keep, prompt or (), spread)
    else:
        if prompt or spread:
            raise CmloraError("--prompt and --spread are for a model's folder")
        result = _lora(what, lora_dir, out_file, method or "energy", keep, half)
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


def _lora(
    name: str, folder: str | None, target: Path, method: str, keep: float | None, half: bool
) -> dict[str, Any]:
    import torch

    from cmlora.adapters.compression import RULES
    from cmlora.adapters.compression.resize import resize
    from cmlora.files import read, write
    from cmlora.pipelines.library import find
    from cmlora.pipelines.models import EMBEDDED

    rule = RULES[method].object
    path = find(name, model=EMBEDDED, folder=folder)
    if target.exists() and target.samefile(path):
        raise CmloraError(f"--out {target} is the LoRA itself; name another file")
    before = path.stat().st_size
    with status("compressing"):
        resized = resize(read(path), rule, keep, torch.half if half else None)
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


def _denoiser(
    folder: Path,
    target: Path,
    method: str,
    keep: float | None,
    prompts: Sequence[str],
    spread: str,
) -> dict[str, Any]:
    import torch

    from cmlora.adapters.compression import COMPRESSIONS, RULES
    from cmlora.adapters.compression.calibration import grams
    from cmlora.adapters.compression.model import compress as shrink
    from cmlora.adapters.compression.model import save
    from cmlora.pipelines.models import open_pipeline

    shrinking = COMPRESSIONS[method].object
    if spread not in ("", "welore", "budget"):
        raise CmloraError(f"--spread {spread}: expected welore or budget")
    rule = RULES[spread].object if spread else None
    quiet_libraries()
    with status("loading"):
        pipe = open_pipeline(folder)
    pipe.set_progress_bar_config(disable=True)
    denoiser = getattr(pipe, "unet", None) or pipe.transformer

    def draw() -> None:
        for seed, text in enumerate(prompts):
            noise = torch.Generator().manual_seed(seed)
            pipe(text, num_inference_steps=4, generator=noise, output_type="latent")

    with status("measuring inputs"):
        moments = grams(denoiser, draw) if prompts else {}
    with status("compressing"):
        done = shrink(denoiser, shrinking, 0.5 if keep is None else keep, moments, rule=rule)
        save(denoiser, target)
    err.print(f"use it with cmlora.adapters.compression.model.load(denoiser, {str(target)!r})")
    return {
        "file": str(target),
        "method": method,
        "error": None,
        "bytes_before": done.before,
        "bytes_after": done.after,
        "kept": list(done.kept),
        "modules": {name: saved._asdict() for name, saved in done.layers.items()},
    }
