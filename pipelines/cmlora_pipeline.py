"""A wrapper that gives any diffusers pipeline several LoRAs and a choice of how to compose them."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch

from cmlora.engine import Report
from cmlora.insert import remove
from cmlora.pipelines.ensemble import Ensemble, Loaded
from cmlora.pipelines.models import EMBEDDED, open_pipeline, read_device, read_dtype


class CMLoRAPipeline:
    """Any diffusers pipeline, with LoRAs composed step by step.

    Everything that is not defined here (``scheduler``, ``enable_model_cpu_offload``, ...) is the
    wrapped pipeline's own, to read and to set.

    >>> pipe = CMLoRAPipeline.from_pretrained("emoji")  # doctest: +SKIP
    >>> pipe.load_lora_weights("character_1")  # doctest: +SKIP
    >>> pipe.load_lora_weights("background_1", weight=0.8)  # doctest: +SKIP
    >>> pipe("a prompt", composition="cmlora", seed=7).images[0]  # doctest: +SKIP

    Args:
        pipe: the pipeline to wrap; it is used, not copied.
        source: the name it was loaded by; lets the embedded LoRAs be found by id.
    """

    def __init__(self, pipe: Any, *, source: str | Path | None = None) -> None:
        self.pipe = pipe
        self.ensemble = Ensemble(pipe, source)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load a model.

        Args:
            name_or_path: ``emoji`` (the embedded model), a diffusers folder, one
                ``.safetensors`` file of the Stable Diffusion family, or a hub id.
            dtype: of the weights; float32 if not given.
            device: where to put it; the CPU if not given.
            **kwargs: for diffusers' ``from_pretrained`` or ``from_single_file``.

        Raises:
            CmloraError: if the model is missing, broken, not in safetensors, or out of reach; or if
                the dtype or device does not exist.
        """
        place, precision = read_device(device), read_dtype(dtype)
        # said for every part: left alone, transformers takes the file's precision and diffusers
        # does not, and a model saved in half precision comes up in two
        pipe = open_pipeline(name_or_path, dtype=precision or torch.float32, **kwargs)
        return cls(pipe if place is None else pipe.to(place), source=name_or_path)

    def __getattr__(self, name: str) -> Any:
        if name == "pipe":  # asked for before __init__ ran, by copy or pickle
            raise AttributeError(name)
        return getattr(self.pipe, name)

    def __setattr__(self, name: str, value: Any) -> None:
        ours = name in ("pipe", "ensemble") or hasattr(type(self), name)
        theirs = not ours and hasattr(self.pipe, name)
        if theirs:
            setattr(self.pipe, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def loras(self) -> Mapping[str, Loaded]:
        """What is loaded, by adapter name, in loading order."""
        return self.ensemble.loras

    @property
    def report(self) -> Report | None:
        """What the last call did; ``None`` before the first."""
        return self.ensemble.report

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move or cast the wrapped pipeline, as diffusers' ``to`` does."""
        self.pipe.to(*args, **kwargs)
        return self

    def load_lora_weights(
        self, path: str | Path, adapter_name: str | None = None, **options: Any
    ) -> str:
        """Put a LoRA into the pipeline; see `cmlora.pipelines.ensemble.Ensemble.load`."""
        return self.ensemble.load(path, adapter_name, **options)

    def unload_lora_weights(self) -> None:
        """Take all LoRAs out."""
        getattr(self.pipe, "unload_lora_weights", partial(remove, self.pipe))()
        self.ensemble.loras.clear()

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Take some LoRAs out; their names are free again."""
        names = self.ensemble.named(adapter_names)
        getattr(self.pipe, "delete_adapters", partial(remove, self.pipe))(names)
        self.ensemble.forget(names)

    def __call__(self, prompt: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Make pictures; see `cmlora.pipelines.ensemble.Ensemble.run`.

        Args:
            prompt: as the wrapped pipeline takes it.
            *args: further positional arguments of the wrapped pipeline.
            **kwargs: ``composition``, ``lora_weights``, ``cache``, ``cut``, ``text_encoder``,
                ``composition_options`` and ``seed``; anything else goes to the wrapped pipeline.
                The embedded model has its own default steps and guidance scale.

        Returns:
            The wrapped pipeline's output; an output object also has ``report``.
        """
        if str(self.ensemble.source) == EMBEDDED:
            from cmlora.emoji.weights import GUIDANCE, STEPS

            kwargs = {"guidance_scale": GUIDANCE, "num_inference_steps": STEPS, **kwargs}
        return self.ensemble.run(self.pipe, prompt, *args, **kwargs)
