"""Options that several sub-commands share, so that they read the same everywhere."""

from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
Config = Annotated[
    str | None,
    typer.Option(help="For a .safetensors model: a diffusers folder of its family, as layout."),
]
Cut = Annotated[str, typer.Option(help="Where the cache cuts the UNet: LAYER,BLOCK.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, mps; the CPU if not given.")]
Guidance = Annotated[
    float | None, typer.Option(help="Guidance scale; 7.5, or 4 for emoji, if not given.")
]
LoRAFolder = Annotated[str | None, typer.Option(help="Where LoRA names are looked up.")]
Methods = Annotated[
    str,
    typer.Option(
        help="METHOD[KEY=VALUE,...]@CACHE, separated by commas, options and cache if wanted; "
        "the usual ones if empty."
    ),
]
Model = Annotated[
    str, typer.Option(help="emoji, a diffusers folder, a .safetensors file, or a hub id.")
]
NegativePrompt = Annotated[str, typer.Option(help="What to avoid.")]
Prompt = Annotated[str, typer.Option(help="What to draw; the LoRAs' trigger words if empty.")]
Schedule = Annotated[
    str,
    typer.Option(help="Strengths over the run, such as '<lora:ink:0@0,1@0.5>'; see the README."),
]
Settings = Annotated[list[str] | None, typer.Option(help="KEY=VALUE of a method; may be repeated.")]
Size = Annotated[str, typer.Option(help="Pixels, or WIDTHxHEIGHT; the model's if empty.")]
Steps = Annotated[int, typer.Option(help="Denoising steps.")]
Execution = Annotated[
    str, typer.Option(help="A step's passes: sequential, batched, auto as memory allows, or fused.")
]
Threads = Annotated[
    int, typer.Option(help="Of the processor; part of the recipe. 0 leaves them as they are.")
]
Uncond = Annotated[
    str, typer.Option(help="Unconditional predictions: per_lora, or shared for the base's own.")
]
