"""Several passes of a denoiser as one call on a larger batch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from cmlora.denoisers import Kind
from cmlora.errors import CmloraError
from cmlora.plan import Pass
from cmlora.switching import AdapterSwitch

Execution = Literal["sequential", "batched", "auto", "fused"]

_BASE = "__base__"
_RESERVE = 0.8
_LIVE = 8


class Unbatchable(CmloraError):
    """Passes of this denoiser cannot share a call; the message says why."""


class MixedBatch:
    """Runs passes with one LoRA each as one batch, through PEFT's adapters per sample.

    Args:
        switch: of the denoiser.
        kind: of the denoiser; says which of its arguments are batches.
    """

    def __init__(self, switch: AdapterSwitch, kind: Kind) -> None:
        self._switch = switch
        self._kind = kind

    def check(self, names: Sequence[str]) -> None:
        """See that PEFT can mix these LoRAs.

        Raises:
            Unbatchable: if a layer of theirs is no LoRA, or one of another form (DoRA).
        """
        for layer in self._switch.layers:
            if type(layer).__module__.partition(".")[0] != "peft" or not isinstance(
                layer, LoraLayer
            ):
                raise Unbatchable(
                    f"LoRAs cannot be batched: {type(layer).__name__} takes no adapter per sample"
                )
            other = [name for name in names if name in layer.lora_variant]
            if other:
                raise Unbatchable(f"{other[0]} cannot be batched: it is no plain LoRA (DoRA)")

    def groups(self, passes: Sequence[Pass], light: Sequence[bool], most: int) -> list[list[int]]:
        """Which passes can go into one call: same depth, one LoRA or none, one strength per LoRA.

        Args:
            passes: of a plan.
            light: per pass, whether it reuses features.
            most: passes per call.

        Returns:
            Indices of the passes, every pass once, in ascending order of the first of a group.
        """
        result: list[list[int]] = []
        for index, single in enumerate(passes):
            fits = (
                group
                for group in result
                if len(group) < most
                and light[group[0]] == light[index]
                and passes[group[0]].branch == single.branch
                and _compatible([passes[i] for i in group], single)
            )
            group = next(fits, None) if len(single.weights) <= 1 else None
            if group is None:
                result.append([index])
            else:
                group.append(index)
        return result

    @contextmanager
    def names(self, passes: Sequence[Pass], batch: int) -> Iterator[None]:
        """Within the context sample i of every layer's input gets the LoRA of its pass.

        Args:
            passes: one per part of the batch.
            batch: B, samples per part.
        """
        self._switch.activate({name: w for single in passes for name, w in single.weights.items()})
        each = [next(iter(single.weights), _BASE) for single in passes]
        active = [
            name if _acts(single) else _BASE for name, single in zip(each, passes, strict=True)
        ]
        names = [name for name in active for _ in range(batch)]

        def tell(
            layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            rows = len(args[0] if args else kwargs["x"])
            if rows != len(names):
                raise Unbatchable(
                    f"passes cannot be batched: {type(layer).__name__} gets {rows} rows for "
                    f"{len(names)} samples, so this model mixes samples; use execution='sequential'"
                )
            acting = getattr(layer, "active_adapters", ())
            own = [name if name in acting else _BASE for name in names]
            return args, {**kwargs, "adapter_names": own}

        with ExitStack() as stack:
            for layer in self._switch.layers:
                handle = layer.register_forward_pre_hook(tell, with_kwargs=True)
                stack.callback(handle.remove)
            yield

    def repeat(self, name: str, value: Any, times: int, batch: int) -> Any:
        """An argument of the denoiser for `times` passes of B samples each."""
        if name in self._kind.unbatched:
            return value
        if isinstance(value, torch.Tensor):
            if value.ndim and len(value) == batch:
                return torch.cat([value] * times)
            return value
        if isinstance(value, list) and name in self._kind.listed and len(value) == batch:
            return value * times
        if isinstance(value, list | tuple):
            return type(value)(self.repeat("", each, times, batch) for each in value)
        if isinstance(value, dict):
            return {key: self.repeat(key, each, times, batch) for key, each in value.items()}
        return value


def split(output: torch.Tensor | list[torch.Tensor], parts: int) -> list[Any]:
    """The denoiser's tensor, or list of one per picture, cut into one per pass."""
    if isinstance(output, list):
        each = len(output) // parts
        return [output[i * each : (i + 1) * each] for i in range(parts)]
    return list(output.chunk(parts))


class Gauge:
    """Measures what one pass takes, to say how many fit into the free memory.

    Args:
        model: the denoiser.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._need = 0.0

    @property
    def known(self) -> bool:
        """Whether a pass was measured."""
        return self._need > 0

    def forget(self) -> None:
        """A run begins, perhaps with other sizes."""
        self._need = 0.0

    @contextmanager
    def measuring(self, device: torch.device, rows: int) -> Iterator[None]:
        """Around one pass: on an accelerator its peak, elsewhere an estimate from its tensors.

        Args:
            device: where it runs.
            rows: its samples.
        """
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            yield
            self._need = max(torch.cuda.max_memory_allocated(device) - before, 1) / rows
            return
        largest = 0

        def note(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            nonlocal largest
            tensors = [t for t in (*args, output) if isinstance(t, torch.Tensor)]
            largest = max(largest, sum(t.numel() * t.element_size() for t in tensors))

        with ExitStack() as stack:
            for module in self._model.modules():
                if not any(module.children()):
                    stack.callback(module.register_forward_hook(note).remove)
            yield
        self._need = max(_LIVE * largest, 1) / rows

    def most(self, device: torch.device, rows: int) -> int:
        """How many passes of so many samples fit into one call; 1 before anything was measured."""
        if not self.known:
            return 1
        return max(1, int(_RESERVE * free_memory(device) / (self._need * rows)))


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device; 0 if nobody knows."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return 0
    names: Mapping[str, int] = getattr(os, "sysconf_names", {})
    if "SC_AVPHYS_PAGES" not in names:
        return 0
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _compatible(group: Sequence[Pass], single: Pass) -> bool:
    if any(len(each.weights) > 1 for each in group):
        return False
    known = {name: weight for each in group for name, weight in each.weights.items()}
    return all(known.get(name, weight) == weight for name, weight in single.weights.items())


def _acts(single: Pass) -> bool:
    """Whether the pass's LoRA has a strength other than 0."""
    return any(weight != 0.0 for weight in single.weights.values())
