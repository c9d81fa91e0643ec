"""What a pipeline gives its denoiser besides the noisy latents, learnt by watching it.

Every diffusers pipeline encodes prompts and arranges arguments in a way of its own. Instead of
doing that again for each of them, the pipeline is called and stopped at the door of its denoiser;
the arguments it came with are kept. Training then calls the denoiser with the same arguments and
its own latents and timesteps.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cmlora.adapters.training.buckets import Size
from cmlora.errors import CmloraError
from cmlora.lora import DENOISERS, TEXT_ENCODERS

Tree = Any
"""Tensors in nested mappings and sequences."""

SUPPORTED = (
    "UNet2DConditionModel",
    "SD3Transformer2DModel",
    "FluxTransformer2DModel",
    "PixArtTransformer2DModel",
    "SanaTransformer2DModel",
)
"""Denoisers whose pipelines can be watched, and whose answer is the prediction itself."""


def denoiser_of(pipe: Any) -> tuple[str, nn.Module]:
    """The part of a pipeline that is trained, and its name.

    Raises:
        CmloraError: if there is none.
    """
    for part in DENOISERS:
        model = getattr(pipe, part, None)
        if isinstance(model, nn.Module):
            return part, model
    raise CmloraError(f"{type(pipe).__name__} has no unet and no transformer to train")


def text_encoders_of(pipe: Any) -> dict[str, nn.Module]:
    """The text encoders of a pipeline by name."""
    found = {part: getattr(pipe, part, None) for part in TEXT_ENCODERS}
    return {part: model for part, model in found.items() if isinstance(model, nn.Module)}


class _Seen(Exception):
    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__("the denoiser was called")
        self.arguments = arguments


class Conditioning:
    """Calls the denoiser of a pipeline as the pipeline does.

    Args:
        pipe: a text-to-image pipeline.
        guidance: for models that take a guidance scale as an input.

    Raises:
        CmloraError: if the pipeline cannot be watched with a prompt alone.
    """

    def __init__(self, pipe: Any, guidance: float = 1.0) -> None:
        self.pipe = pipe
        self.part, self.denoiser = denoiser_of(pipe)
        kinds = [kind.__name__ for kind in type(self.denoiser).__mro__]
        if not set(kinds) & set(SUPPORTED):
            raise CmloraError(
                f"train: {kinds[0]} cannot be trained yet; known: {', '.join(SUPPORTED)}"
            )
        parameters = list(inspect.signature(self.denoiser.forward).parameters)
        self.sample_name = parameters[0]
        self._accepted = set(inspect.signature(type(pipe).__call__).parameters)
        embeds = bool(getattr(self.denoiser.config, "guidance_embeds", False))
        # Without embedded guidance 1 is no classifier-free guidance, hence one copy of the batch.
        self._guidance = guidance if embeds else 1.0
        self._layouts: dict[Size, dict[tuple[Any, ...], bool]] = {}
        self._time_scale = 1.0

    def encode(self, texts: Sequence[str], size: Size, gradients: bool = False) -> Tree:
        """The denoiser's further arguments for captions and a size of pictures.

        Args:
            texts: one per picture.
            size: of the pictures in pixels.
            gradients: keep those of the text encoders.
        """
        if size not in self._layouts:
            # Dropout must draw the same numbers whether or not the size has been seen before.
            with torch.random.fork_rng():
                one, two = (self._watched(probe, size, False) for probe in (["a"], ["a", "b"]))
            self._layouts[size] = _layout(one, two)
        return self._watched(list(texts), size, gradients)

    def cut(self, arguments: Tree, size: Size) -> list[Tree]:
        """The arguments of a batch as those of each of its pictures."""
        layout = self._layouts[size]
        count = next(len(leaf) for path, leaf in _leaves(arguments) if layout.get(path) is True)

        def row(index: int) -> Callable[[tuple[Any, ...], Any], Any]:
            return lambda path, leaf: leaf[index : index + 1].clone() if layout[path] else leaf

        return [_mapped(arguments, row(index)) for index in range(count)]

    def join(self, rows: Sequence[Tree], size: Size) -> Tree:
        """The inverse of `cut`."""
        layout = self._layouts[size]
        found = [dict(_leaves(row)) for row in rows]
        return _mapped(
            rows[0],
            lambda path, leaf: torch.cat([r[path] for r in found]) if layout[path] else leaf,
        )

    def prepared(self, latents: Tensor) -> Tensor:
        """Latents (B, C, H, W) in the form the denoiser takes: (B, L, D) for some transformers."""
        pack = getattr(self.pipe, "_pack_latents", None)
        if pack is None:
            return latents
        packed: Tensor = pack(latents, *latents.shape)
        return packed

    def predict(self, noisy: Tensor, timesteps: Tensor, arguments: Tree) -> Tensor:
        """What the denoiser says to noisy latents, in the form that `prepared` gives them."""
        inputs = self.prepared(noisy)
        times = timesteps if self._time_scale == 1.0 else timesteps * self._time_scale
        found = self.denoiser(
            **{self.sample_name: inputs, "timestep": times}, **arguments, return_dict=False
        )[0]
        if found.ndim == 4 and found.shape[1] == 2 * inputs.shape[1]:
            found = found.chunk(2, 1)[0]  # the other half is a learnt variance
        result: Tensor = found
        return result

    def _watched(self, texts: list[str], size: Size, gradients: bool) -> Tree:
        options: dict[str, Any] = {
            "prompt": texts,
            "width": size[0],
            "height": size[1],
            "num_inference_steps": 2,
            "guidance_scale": self._guidance,
            "output_type": "latent",
            "generator": torch.Generator().manual_seed(0),
            "use_resolution_binning": False,
            "clean_caption": False,
            "complex_human_instruction": None,
        }
        options = {key: value for key, value in options.items() if key in self._accepted}
        call: Any = type(self.pipe).__call__
        if gradients:
            call = getattr(call, "__wrapped__", None)
            if call is None:
                raise CmloraError(f"text encoders of {type(self.pipe).__name__} cannot be trained")
        try:
            with self._stopped(), torch.set_grad_enabled(gradients):
                call(self.pipe, **options)
        except _Seen as seen:
            arguments = seen.arguments
        except (TypeError, ValueError, AttributeError) as error:
            raise CmloraError(
                f"{type(self.pipe).__name__} cannot be trained: with a prompt, width {size[0]} and "
                f"height {size[1]} it says: {error}"
            ) from error
        else:
            raise CmloraError(f"{type(self.pipe).__name__} never calls its {self.part}")
        arguments.pop(self.sample_name)
        arguments.pop("return_dict", None)
        given, own = float(arguments.pop("timestep").flatten()[0]), self.pipe.scheduler.timesteps
        if float(own[0]) > 0:
            ratio = given / float(own[0])
            self._time_scale = 1.0 if abs(ratio - 1) < 1e-3 else ratio
        return arguments

    @contextmanager
    def _stopped(self) -> Iterator[None]:
        signature = inspect.signature(self.denoiser.forward)

        def stop(_: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
            bound = signature.bind(*positional, **named).arguments
            raise _Seen({k: v for k, v in bound.items() if v is not None})

        with ExitStack() as stack:
            bars = dict(getattr(self.pipe, "_progress_bar_config", {}))
            self.pipe.set_progress_bar_config(**{**bars, "disable": True})
            stack.callback(lambda: setattr(self.pipe, "_progress_bar_config", bars))
            handle = self.denoiser.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
            stack.callback(handle.remove)
            yield


def _layout(one: Tree, two: Tree) -> dict[tuple[Any, ...], bool]:
    """Which tensors have a row per picture, from calls with one picture and with two."""
    second = dict(_leaves(two))
    found = {}
    for path, leaf in _leaves(one):
        a, b = tuple(leaf.shape), tuple(second[path].shape)
        if a == b:
            found[path] = False
        elif a[1:] == b[1:] and b[0] == 2 * a[0] == 2:
            found[path] = True
        else:
            raise CmloraError(f"the denoiser's {'.'.join(map(str, path))} is {a}, then {b}")
    return found


def _leaves(tree: Tree, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    if isinstance(tree, Tensor):
        yield path, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, (*path, key))
    elif isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            yield from _leaves(value, (*path, index))


def _mapped(tree: Tree, change: Callable[[tuple[Any, ...], Any], Any], path: Any = ()) -> Tree:
    if isinstance(tree, Tensor):
        return change(path, tree)
    if isinstance(tree, dict):
        return {key: _mapped(value, change, (*path, key)) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_mapped(v, change, (*path, i)) for i, v in enumerate(tree))
    return tree
