"""Measuring what the layers of a pipeline's models are fed, without LoRAs and with each of them."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from torch import nn

from cmlora.adapters.calibration import BASE, Calibration, Seen, base_layers, watching
from cmlora.errors import CmloraError
from cmlora.files import read
from cmlora.lora import DENOISERS, TEXT_ENCODERS
from cmlora.pipelines.cmlora_pipeline import CMLoRAPipeline

STEPS = 4
"""Few steps are enough: they visit the whole range of noise."""
_SAMPLED = ("to_q", "to_k", "to_v")


def calibrate(
    pipe: CMLoRAPipeline,
    prompts: Sequence[str] = (),
    *,
    steps: int = STEPS,
    seeds: Sequence[int] = (0,),
    everything: bool = False,
    advance: Callable[[], None] = lambda: None,
    **arguments: Any,
) -> Calibration:
    """Run the model alone and with each loaded LoRA, and keep what its layers see.

    Args:
        pipe: the model, with the LoRAs loaded.
        prompts: for all runs; without any, every LoRA is run with its first trigger word and the
            model with all of these.
        steps: of a run.
        seeds: every prompt is run once with each.
        everything: keep all layers, as compression of the model needs them, instead of those that
            the LoRAs change.
        advance: called after every run.
        arguments: for the pipeline's call, such as ``guidance_scale``.

    Raises:
        CmloraError: if there is nothing to draw, or no layer was called.
    """
    if steps < 1:
        raise CmloraError(f"calibration takes 1 step or more, not {steps}")
    own = {name: list(prompts or lora.applied.triggers[:1]) for name, lora in pipe.loras.items()}
    mute = [name for name, texts in own.items() if not texts]
    if mute:
        raise CmloraError(f"no prompt, and the file of {mute[0]} names no trigger words")
    texts = {BASE: list(prompts) or list(dict.fromkeys(t for row in own.values() for t in row))}
    if not texts[BASE]:
        raise CmloraError("no prompt and no LoRA: say what to draw while the model is watched")
    modules = None if everything or not pipe.loras else changed(pipe)
    seen: dict[str, dict[str, Seen]] = {}
    for name, lines in (texts | own).items():
        with ExitStack() as stack:
            watches = {
                part: stack.enter_context(_watch(model, part, modules, steps))
                for part, model in parts(pipe.pipe).items()
            }
            for text in lines:
                for seed in seeds:
                    pipe.ensemble.run(
                        pipe.pipe,
                        text,
                        composition="merge" if name else "naive",
                        lora_weights={name: 1.0} if name else {},
                        cache="none",
                        seed=seed,
                        num_inference_steps=steps,
                        output_type="latent",
                        **arguments,
                    )
                    advance()
        seen[name] = {
            named(part, module): row
            for part, watch in watches.items()
            for module, row in watch.seen().items()
        }
    if not any(seen.values()):
        raise CmloraError("no layer was called while the model was watched")
    about = {
        "model": str(pipe.ensemble.source),
        "model_hash": None if pipe.ensemble.source is None else pipe.ensemble.fingerprint,
        "prompts": texts | own,
        "steps": steps,
        "seeds": list(seeds),
        "heads": _heads(pipe.pipe),
    }
    return Calibration(seen, {n: x.applied.sha256 for n, x in pipe.loras.items()}, about)


def parts(pipe: Any) -> dict[str, nn.Module]:
    """The models of a pipeline that LoRAs change, by component."""
    every = {name: getattr(pipe, name, None) for name in (*DENOISERS, *TEXT_ENCODERS)}
    return {name: model for name, model in every.items() if isinstance(model, nn.Module)}


def changed(pipe: CMLoRAPipeline) -> frozenset[str]:
    """The modules that any of the loaded LoRAs changes."""
    return frozenset(module for x in pipe.loras.values() for module in read(x.path).updates)


def named(part: str, module: str) -> str:
    """What LoRA files call a module: CLIP's always carry ``text_model.``."""
    if part in TEXT_ENCODERS:
        module = f"text_model.{module.removeprefix('text_model.')}"
    return f"{part}.{module}"


def _watch(model: nn.Module, part: str, modules: frozenset[str] | None, steps: int) -> Any:
    every = [name for name, _ in base_layers(model)]
    only = None if modules is None else [n for n in every if named(part, n) in modules]
    sampled = [n for n in every if n.endswith(_SAMPLED) and part in DENOISERS]
    return watching(model, only, sampled, at=steps // 2 + 1)


def _heads(pipe: Any) -> dict[str, int]:
    """How many heads every attention module of the denoiser has."""
    return {
        f"{part}.{name}": int(module.heads)
        for part, model in parts(pipe).items()
        if part in DENOISERS
        for name, module in model.named_modules()
        if hasattr(module, "heads") and hasattr(module, "to_q")
    }
