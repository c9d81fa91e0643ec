"""What plain diffusers makes of a LoRA file: found out with the diffusers that is installed.

Every tensor of the file is replaced by one of the same name and shape that is filled with a number
of its own, and diffusers' own conversion is run on them. Numbers that do not come out again belong
to keys that diffusers drops. The file's tensors are not read and no model is loaded.
"""

from __future__ import annotations

import os
import warnings
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from cmlora import container, forms, keys

PathLike = str | os.PathLike[str]

_PIPELINES = {
    "AuraFlow": "AuraFlowPipeline",
    "Chroma": "ChromaPipeline",
    "CogVideoX": "CogVideoXPipeline",
    "FLUX.1": "FluxPipeline",
    "FLUX.2": "Flux2Pipeline",
    "HiDream": "HiDreamImagePipeline",
    "HunyuanVideo": "HunyuanVideoPipeline",
    "LTX-2": "LTX2Pipeline",
    "LTX-Video": "LTXPipeline",
    "Lumina 2": "Lumina2Pipeline",
    "Mochi": "MochiPipeline",
    "PixArt": "PixArtSigmaPipeline",
    "Qwen-Image": "QwenImagePipeline",
    "Sana": "SanaPipeline",
    "Stable Diffusion 3": "StableDiffusion3Pipeline",
    "Stable Diffusion XL": "StableDiffusionXLPipeline",
    "Wan": "WanPipeline",
    "Z-Image": "ZImagePipeline",
}
_LOADED = ("lora_A", "lora_B", "lora.up", "lora.down", "_lora.", "lora_linear_layer", "lokr_")


def dropped(path: PathLike, family: str) -> dict[str, Any]:
    """What ``load_lora_weights`` of diffusers would leave out of a file, as JSON types.

    Keys: pipeline (whose loader was asked; ``None`` if it is not known which), loads, error (what
    it says if it refuses), dropped (keys that have no effect).

    Args:
        path: of the file.
        family: of base models, as `cmlora.describe.describe` calls it.

    Raises:
        CmloraError: if the file's header cannot be read.
    """
    shapes = container.header(path).shapes
    layout = keys.layout(shapes, 2, shapes)
    found = _PIPELINES.get(family)
    if found is None and any(name.startswith("unet.") for name in layout.modules):
        found = "StableDiffusionPipeline"
    if found is None:
        return {"pipeline": None, "loads": None, "error": None, "dropped": []}
    tags = {key: float(number + 2) for number, key in enumerate(sorted(shapes))}
    filled = {key: _filled(shape, tags[key]) for key, shape in shapes.items()}
    for roles in layout.modules.values():
        rank = forms.rank({role: shapes[key] for role, key in roles.items()})
        if "alpha" in roles:  # a strength of one, which changes no number
            tags.pop(roles["alpha"], None)
            filled[roles["alpha"]] = torch.tensor(float(rank or 1))
    try:
        state = _converted(found, filled)
    except Exception as error:  # whatever the loader of this version raises
        line = next((part for part in str(error).splitlines() if part.strip()), "")
        text = f"{type(error).__name__}: {line}"[:300]
        return {"pipeline": found, "loads": False, "error": text, "dropped": []}
    if not all("lora" in key for key in state) and not all("lokr" in key for key in state):
        odd = next(key for key in state if "lora" not in key)
        text = f"ValueError: Invalid LoRA checkpoint, {odd}"
        return {"pipeline": found, "loads": False, "error": text, "dropped": []}
    seen: set[float] = set()
    for key, tensor in state.items():
        if isinstance(tensor, Tensor) and any(mark in key for mark in _LOADED):
            seen |= _values(tensor)
    lost = sorted(key for key, tag in tags.items() if tag not in seen)
    return {"pipeline": found, "loads": True, "error": None, "dropped": lost}


def _converted(pipeline: str, filled: dict[str, Tensor]) -> dict[str, Any]:
    """The state dictionary that diffusers would hand to its models."""
    import diffusers

    loader: Any = getattr(diffusers, pipeline)
    level = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            options = {}
            if pipeline.startswith("StableDiffusion") and "3" not in pipeline:
                options["unet_config"] = SimpleNamespace(layers_per_block=2)
            made = loader.lora_state_dict(dict(filled), **options)
    finally:
        diffusers.utils.logging.set_verbosity(level)
    state: dict[str, Any] = made[0] if isinstance(made, tuple) else made
    return state


def _filled(shape: tuple[int, ...], value: float) -> Tensor:
    """A tensor of one number, whatever its size."""
    return torch.full((1,) * len(shape), value).expand(shape)


def _values(tensor: Tensor) -> set[float]:
    """The numbers in a tensor."""
    if not tensor.numel():
        return set()
    if not any(tensor.stride()):
        return {float(tensor[(0,) * tensor.ndim])}
    values: list[float] = tensor.unique().tolist()  # type: ignore[no-untyped-call]
    return set(values)
