"""From a model's name or path to a diffusers pipeline, with an answer when it is not there."""

import hashlib
from pathlib import Path
from typing import Any

import torch

from cmlora.container import header, sha256
from cmlora.errors import CmloraError
from cmlora.pipelines.wider import opened

EMBEDDED = "emoji"
"""The name of the model that comes with the package."""


def locate(name_or_path: str | Path) -> Path | str:
    """The folder or file of a model; a hub id comes back as it is.

    Args:
        name_or_path: ``emoji``, a diffusers folder, a single ``.safetensors`` file, or a hub id.

    Raises:
        CmloraError: if it is none of them.
    """
    if str(name_or_path) == EMBEDDED:
        return _embedded()
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        if (path / "model_index.json").is_file():
            return path
        raise CmloraError(f"{path} is no diffusers model: there is no model_index.json in it")
    if path.is_file():
        if path.suffix == ".safetensors":
            return path
        raise CmloraError(
            f"{path.name}: a model is a diffusers folder or one .safetensors file; "
            "pickles (.ckpt, .bin, .pt) can run code and are not read"
        )
    name = str(name_or_path)
    parts = name.split("/")
    if len(parts) == 2 and all(parts) and not name.startswith((".", "~")) and "\\" not in name:
        return name
    raise CmloraError(
        f"no model {name!r}: give {EMBEDDED!r}, a diffusers folder, a .safetensors file, "
        "or a hub id like owner/name"
    )


def open_pipeline(name_or_path: str | Path, **kwargs: Any) -> Any:
    """Load a diffusers pipeline from anything `locate` knows.

    Args:
        name_or_path: see `locate`; a compressed denoiser, as `cmlora compress` writes it, too.
        **kwargs: for diffusers' ``from_pretrained`` or ``from_single_file``; a single file may need
            ``config=`` (a diffusers folder of its family) where there is no network, and a
            compressed denoiser needs the folder of its model.

    Raises:
        CmloraError: if the model is missing, incomplete, not in safetensors, or out of reach.
    """
    from diffusers import DiffusionPipeline

    where = locate(name_or_path)
    try:
        if isinstance(where, Path) and where.is_file():
            return _open_single_file(where, **kwargs)
        if isinstance(where, Path):
            kwargs = opened(where, kwargs.get("dtype")) | kwargs
        return DiffusionPipeline.from_pretrained(where, use_safetensors=True, **kwargs)
    except CmloraError:
        raise
    except Exception as failure:  # diffusers, safetensors and the hub each have their own
        raise CmloraError(_explain(where, failure)) from failure


def resolve(name_or_path: str | Path) -> Path:
    """The folder or file of a model, fetched from the hub first if it is a hub id.

    Raises:
        CmloraError: see `open_pipeline`.
    """
    from diffusers import DiffusionPipeline

    where = locate(name_or_path)
    if isinstance(where, Path):
        return where
    try:
        return Path(DiffusionPipeline.download(where, use_safetensors=True))
    except Exception as failure:  # the hub has many
        raise CmloraError(_explain(where, failure)) from failure


def fingerprint(name_or_path: str | Path) -> str:
    """SHA-256 over a model's weights, configurations and vocabularies.

    Raises:
        CmloraError: see `resolve`.
    """
    where = resolve(name_or_path)
    if where.is_file():
        return sha256(where)
    parts = sorted(p for p in where.rglob("*") if p.suffix in (".json", ".safetensors", ".txt"))
    listing = "\n".join(f"{sha256(path)} {path.relative_to(where).as_posix()}" for path in parts)
    return hashlib.sha256(listing.encode()).hexdigest()


def read_dtype(name: str | torch.dtype | None) -> torch.dtype | None:
    """A floating-point dtype by its name in torch.

    Raises:
        CmloraError: if there is none of that name.
    """
    if name is None or isinstance(name, torch.dtype):
        return name
    found = getattr(torch, name.removeprefix("torch."), None)
    if not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise CmloraError(f"dtype {name!r}: expected float32, float16 or bfloat16")
    return found


def read_device(name: str | torch.device | None) -> torch.device | None:
    """A device that is here, by its name in torch.

    Raises:
        CmloraError: if torch does not know it, or this machine does not have it.
    """
    if name is None:
        return None
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as failure:
        reason = str(failure).splitlines()[0]
        raise CmloraError(f"device {str(name)!r} cannot be used here ({reason})") from None
    return device


def _embedded() -> Path:
    from cmlora.emoji import weights

    if not weights.available():
        raise CmloraError(
            "the embedded model is not in this installation; reinstall cmlora from a full "
            "checkout or wheel, or name another model"
        )
    return weights.model_path()


def _open_single_file(path: Path, **kwargs: Any) -> Any:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    found = header(path)
    if "cmlora.compact" in found.metadata:
        return _open_compressed(path, **kwargs)
    keys = found.shapes
    if not any(key.startswith("model.diffusion_model.") for key in keys):
        raise CmloraError(
            f"{path.name} is no Stable Diffusion checkpoint: none of its {len(keys)} keys starts "
            "with model.diffusion_model.; if it is a LoRA, load it with load_lora_weights or --lora"
        )
    is_xl = any(key.startswith("conditioner.embedders.1.") for key in keys)
    family = StableDiffusionXLPipeline if is_xl else StableDiffusionPipeline
    config = kwargs.get("config")
    if config is not None:
        kwargs["config"] = str(config)
    return family.from_single_file(str(path), **kwargs)


def _open_compressed(path: Path, **kwargs: Any) -> Any:
    """The model of a folder with the compressed denoiser of a file in the place of its own."""
    from diffusers import DiffusionPipeline

    from cmlora.adapters.compression.model import load

    folder = kwargs.pop("config", None)
    if folder is None or not (Path(folder).expanduser() / "model_index.json").is_file():
        raise CmloraError(
            f"{path.name} is a compressed denoiser; "
            "give the diffusers folder of its model as config"
        )
    where = Path(folder).expanduser()
    kwargs = opened(where, kwargs.get("dtype")) | kwargs
    pipe = DiffusionPipeline.from_pretrained(where, use_safetensors=True, **kwargs)
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    load(denoiser, path)
    denoiser.to(kwargs.get("dtype") or torch.float32)
    return pipe


def _explain(where: Path | str, failure: Exception) -> str:
    """One sentence about a model that could not be loaded."""
    reason = next((line for line in str(failure).splitlines() if line.strip()), "")
    reason = f"{type(failure).__name__}: {reason}"
    if isinstance(where, str):
        return (
            f"model {where!r} is not a folder here and could not be fetched from the hub "
            f"({reason}); check the name, the network, or give a local folder"
        )
    if where.is_file():
        return (
            f"{where.name} could not be loaded ({reason}); without a network also give the folder "
            "of a diffusers model of the same family as config"
        )
    return f"{where} could not be loaded as a diffusers model ({reason})"
