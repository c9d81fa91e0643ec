"""What turns one of diffusers' pipeline classes into one that composes LoRAs."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from cmlora.pipelines.ensemble import Ensemble


class Composed:
    """Mix in before a diffusers pipeline class.

    A plain class on purpose: diffusers' ``custom_pipeline=`` loader wants to see exactly one
    pipeline class in a file.
    """

    @cached_property
    def ensemble(self) -> Ensemble:
        """The LoRAs loaded so far."""
        return Ensemble(self)

    def load_lora_weights(
        self, path: str | Path, adapter_name: str | None = None, **options: Any
    ) -> str:
        """Put a LoRA into the pipeline; see `cmlora.pipelines.ensemble.Ensemble.load`."""
        return self.ensemble.load(path, adapter_name, **options)

    def unload_lora_weights(self, *args: Any, **kwargs: Any) -> None:
        """Take all LoRAs out."""
        super().unload_lora_weights(*args, **kwargs)  # type: ignore[misc]
        self.ensemble.loras.clear()

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Take some LoRAs out; their names are free again."""
        names = self.ensemble.named(adapter_names)
        super().delete_adapters(names)  # type: ignore[misc]
        self.ensemble.forget(names)

    def __call__(self, prompt: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Make pictures; see `cmlora.pipelines.ensemble.Ensemble.run`."""
        return self.ensemble.run(super().__call__, prompt, *args, **kwargs)  # type: ignore[misc]
