"""What a training leaves: an adapter file that says how it was made, or a denoiser."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from cmlora.adapters.training.parts import Parts
from cmlora.adapters.training.pictures import Example
from cmlora.adapters.training.settings import FREE, Settings
from cmlora.adapters.tuners import store
from cmlora.errors import CmloraError

_ARCHITECTURES = {
    768: "stable-diffusion-v1",
    1024: "stable-diffusion-v2",
    2048: "stable-diffusion-xl-v1-base",
}
_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}


def write(pipe: Any, parts: Parts, settings: Settings, examples: Sequence[Example]) -> Path:
    """Writes the adapter as one file, or the denoiser as a folder of diffusers.

    Of two denoisers the second one's adapter or folder is one of its own, whose name ends in
    ``-2``: other programs know no file that holds both, and would take the first half for the
    whole.

    Raises:
        CmloraError: if it cannot be written.
    """
    folder = Path(settings.output)
    if settings.full:
        place = folder / "denoiser"
        for model in list(parts.denoisers.values())[1:]:
            _write_denoiser(model, second_of(place))
        return _write_denoiser(parts.denoiser, place)
    path = folder / f"{settings.name}.safetensors"
    dtype = getattr(torch, settings.dtype)
    told = metadata(pipe, settings, examples)
    if len(parts.denoisers) == 1:
        store.save(pipe, settings.name, path, told, dtype)
        return path
    others = {part: model for part, model in parts.models.items() if part not in parts.denoisers}
    first, second = (SimpleNamespace(transformer=model) for model in parts.denoisers.values())
    vars(first).update(others)
    store.save(second, settings.name, second_of(path), told, dtype)
    store.save(first, settings.name, path, told, dtype)
    return path


def second_of(path: Path) -> Path:
    """Where what was trained of a pipeline's second denoiser is, beside that of the first."""
    return path.with_name(f"{path.stem}-2{path.suffix}")


def metadata(pipe: Any, settings: Settings, examples: Sequence[Example]) -> dict[str, str]:
    """The header: kohya's ``ss_*``, Stability's ``modelspec.*``, and ours.

    There is no date in it, and no folder: the same training makes the same file anywhere.
    """
    base = settings.base or Path(settings.model).name
    told = {key: value for key, value in settings.to_dict().items() if key not in FREE}
    captions = [e.caption for e in examples if isinstance(e.caption, str)]
    tags = Counter(tag.strip() for text in captions for tag in text.split(",") if tag.strip())
    triggers = [settings.trigger] if settings.trigger else []
    config = pipe.scheduler.config
    flow = "FlowMatch" in type(pipe.scheduler).__name__
    prediction = config.get("prediction_type", "epsilon")
    found: dict[str, Any] = {
        "ss_network_module": f"cmlora.{settings.tuner}",
        "ss_network_dim": settings.rank,
        "ss_network_alpha": settings.alpha,
        "ss_network_args": json.dumps(dict(settings.options), sort_keys=True),
        "ss_output_name": settings.name,
        "ss_sd_model_name": base,
        "ss_base_model_version": _architecture(pipe),
        "ss_learning_rate": settings.rate,
        "ss_unet_lr": settings.rate,
        "ss_text_encoder_lr": settings.text_rate if settings.text_targets else None,
        "ss_optimizer": settings.optim,
        "ss_lr_scheduler": settings.schedule,
        "ss_lr_warmup_steps": settings.warmup,
        "ss_max_train_steps": settings.steps,
        "ss_steps": settings.steps,
        "ss_batch_size_per_device": settings.batch,
        "ss_gradient_accumulation_steps": settings.accumulate,
        "ss_gradient_checkpointing": settings.checkpointing,
        "ss_mixed_precision": settings.precision,
        "ss_max_grad_norm": settings.clip,
        "ss_caption_dropout_rate": settings.caption_dropout,
        "ss_noise_offset": settings.noise_offset or None,
        "ss_min_snr_gamma": settings.min_snr or None,
        "ss_prior_loss_weight": settings.prior_weight if settings.prior_data else None,
        "ss_resolution": f"({settings.resolution}, {settings.resolution})",
        "ss_enable_bucket": settings.buckets,
        "ss_seed": settings.seed,
        "ss_num_train_images": len(examples),
        "ss_tag_frequency": json.dumps({settings.name: dict(sorted(tags.items()))}),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{_architecture(pipe)}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": settings.name,
        "modelspec.resolution": f"{settings.resolution}x{settings.resolution}",
        "modelspec.prediction_type": "flow" if flow else _PREDICTIONS.get(prediction, prediction),
        "modelspec.trigger_phrase": settings.trigger or None,
        "cmlora.triggers": json.dumps(triggers),
        "cmlora.category": settings.category or None,
        "cmlora.base": base,
        "cmlora.training": json.dumps(told, sort_keys=True),
    }
    return {k: str(v) for k, v in found.items() if v is not None} | dict(settings.header)


def _architecture(pipe: Any) -> str:
    unet = getattr(pipe, "unet", None)
    if unet is None:
        return type(getattr(pipe, "transformer", pipe)).__name__
    width = unet.config.cross_attention_dim
    width = width if isinstance(width, int) else next(iter(width))
    return _ARCHITECTURES.get(width, f"{type(unet).__name__}-{width}")


def _write_denoiser(model: Any, folder: Path) -> Path:
    """A folder of diffusers; it takes its name when it is whole."""
    try:
        new = Path(tempfile.mkdtemp(prefix=".denoiser.", dir=folder.parent))
        try:
            model.save_pretrained(new, safe_serialization=True)
            if folder.exists():
                shutil.rmtree(folder)
            new.replace(folder)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    except OSError as error:
        raise CmloraError(f"cannot write {folder}: {error.strerror or error}") from None
    return folder
