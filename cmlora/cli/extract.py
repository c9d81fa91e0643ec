"""`cmlora extract`: what a training changed in a denoiser, as a LoRA."""

from pathlib import Path
from typing import Annotated, Any

import typer

from cmlora.cli.console import emit, err, headed, out
from cmlora.cli.options import AsJson, Model
from cmlora.errors import CmloraError


def extract(
    tuned: Annotated[
        str, typer.Argument(help="Folder of the trained denoiser, or of a whole model.")
    ],
    output: Annotated[
        Path, typer.Option("--out", "-o", help="The .safetensors file.", show_default=False)
    ],
    rank: Annotated[int, typer.Option(min=1, help="Largest rank of a layer.")] = 16,
    model: Model = "emoji",
    part: Annotated[
        str,
        typer.Option(help="Of the pipeline; transformer_2 is the second denoiser of Wan 2.2."),
    ] = "",
    trigger: Annotated[str, typer.Option(help="Word that calls the concept.")] = "",
    as_json: AsJson = False,
) -> None:
    """Write the difference between a trained denoiser and its base as a LoRA of chosen rank.

    What the rank cannot hold, and changes of norms and biases, are said as shares.

    Example: [bold]cmlora extract cat_full/denoiser --rank 16 -o cat.safetensors[/bold]
    """
    from dataclasses import replace

    from torch import float32

    from cmlora import files
    from cmlora.adapters.training.conditioning import denoisers_of
    from cmlora.adapters.training.extract import extract as difference
    from cmlora.pipelines.models import open_pipeline

    if output.suffix != ".safetensors":
        raise CmloraError(f"{output} should end in .safetensors, which is what is written")
    found_parts = denoisers_of(open_pipeline(model, dtype=float32))
    part = part or next(iter(found_parts))
    if part not in found_parts:
        raise CmloraError(f"--part {part}: {model} has {', '.join(found_parts)}")
    base = found_parts[part]
    # other programs know the second denoiser's layers under the names of the first one's
    known = part.removesuffix("_2")
    after = _opened(Path(tuned).expanduser(), part, base)
    found = difference(base, after, rank, known, output.stem)
    lora = replace(found.lora, triggers=(trigger,) if trigger else ())
    files.write(lora, output)
    if found.left:
        words = (
            f"{len(found.left)} other parameters differ, "
            f"{found.share:.1%} of the change: {found.left[0]}, ..."
        )
        err.print(headed("warning", words, "yellow"))
    facts: dict[str, Any] = {
        "file": str(output),
        "modules": len(lora.updates),
        "relative_error": found.error,
        "left": list(found.left),
        "left_share": found.share,
    }
    if as_json:
        emit(facts)
        return
    out.print(f"{output}: {len(lora.updates)} modules, relative error {found.error:.2e}")


def _opened(folder: Path, part: str, base: Any) -> Any:
    inner = folder / part if (folder / part).is_dir() else folder
    if not (inner / "config.json").is_file():
        raise CmloraError(f"{folder} is no folder of a denoiser: there is no config.json in it")
    try:
        return type(base).from_pretrained(inner, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise CmloraError(f"{folder} could not be loaded: {error}") from None
