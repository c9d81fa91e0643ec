"""What a pipeline gives its denoiser besides the noisy latents, learnt by watching it.

Every diffusers pipeline encodes prompts and arranges arguments in a way of its own. Instead of
doing that again for each of them, the pipeline is called and stopped at the door of its denoiser;
the arguments it came with are kept. Training then calls the denoiser with the same arguments and
its own latents and timesteps.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, pixel_unshuffle

from cmlora import denoisers
from cmlora.adapters.training.buckets import Size
from cmlora.adapters.training.trees import Path, Tree, layout, leaves, mapped
from cmlora.errors import CmloraError
from cmlora.lora import DENOISERS, TEXT_ENCODERS

SUPPORTED = (
    "UNet2DConditionModel",
    "SD3Transformer2DModel",
    "FluxTransformer2DModel",
    "Flux2Transformer2DModel",
    "QwenImageTransformer2DModel",
    "ZImageTransformer2DModel",
    "PixArtTransformer2DModel",
    "SanaTransformer2DModel",
    "WanTransformer3DModel",
)
"""Denoisers whose pipelines can be watched, and whose answer is the prediction itself."""

_REVERSED = frozenset(("ZImageTransformer2DModel",))
"""Their time is 1 - t / 1000, and they predict the negative velocity."""

_STEPS = 50
"""Of a run whose shift of noise levels is asked for; one family's depends on it a little."""

_TEXT, _MASK = "encoder_hidden_states", "encoder_hidden_states_mask"


def unwrapped(pipe: Any) -> Any:
    """The pipeline of diffusers inside of a wrapper, which is the wrapper's attribute ``pipe``."""
    return getattr(pipe, "pipe", pipe)


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


def boundary_of(pipe: Any) -> float | None:
    """The timestep from which on ``transformer`` denoises, and below ``transformer_2``.

    ``None`` for the many pipelines that have one denoiser.
    """
    ratio = (getattr(pipe, "config", None) or {}).get("boundary_ratio")
    if ratio is None or not isinstance(getattr(pipe, "transformer_2", None), nn.Module):
        return None
    return float(ratio) * float(pipe.scheduler.config.num_train_timesteps)


def denoisers_of(pipe: Any) -> dict[str, nn.Module]:
    """The denoisers that a pipeline uses by name: one, or one for each part of the noise levels.

    Raises:
        CmloraError: if there is none.
    """
    part, model = denoiser_of(pipe)
    return {
        part: model,
        **({} if boundary_of(pipe) is None else {"transformer_2": pipe.transformer_2}),
    }


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
        self.denoisers, self.boundary = denoisers_of(pipe), boundary_of(pipe)
        known = denoisers.kind(self.denoiser)
        parameters = list(inspect.signature(self.denoiser.forward).parameters)
        self.sample_name = parameters[0]
        self._time_name = "timestep" if "timestep" in parameters else "t"
        self._form, self._ragged = known.latent, _MASK in parameters
        self._listed = tuple(name for name in known.listed if name != self.sample_name)
        self._reversed = bool(set(kinds) & _REVERSED)
        self._accepted = set(inspect.signature(type(pipe).__call__).parameters)
        embeds = bool(getattr(self.denoiser.config, "guidance_embeds", False))
        # Without embedded guidance 1 is no classifier-free guidance, hence one copy of the batch.
        self._guidance = guidance if embeds else 0.0 if self._reversed else 1.0
        if not embeds and "true_cfg_scale" in self._accepted:
            self._accepted.discard("guidance_scale")
        self._layouts: dict[Size, dict[Path, bool]] = {}
        self._time_scale = 1.0
        self._shifts: dict[Size, float] = {}

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
            one, two = ({k: v for k, v in t.items() if k not in self._listed} for t in (one, two))
            self._layouts[size] = layout(one, two)
        return self._watched(list(texts), size, gradients)

    def cut(self, arguments: Tree, size: Size) -> list[Tree]:
        """The arguments of a batch as those of each of its pictures, without padding."""
        shape = self._layouts[size]
        plain = {key: value for key, value in arguments.items() if key not in self._listed}
        counts = [len(leaf) for path, leaf in leaves(plain) if shape.get(path)]
        counts += [len(arguments[key]) for key in self._listed if key in arguments]

        def row(index: int) -> Callable[[Path, Any], Any]:
            # A mask is missing in the layout where the probes needed none.
            return lambda p, leaf: leaf[index : index + 1].clone() if shape.get(p, True) else leaf

        rows = []
        for index in range(counts[0]):
            found = mapped(plain, row(index))
            found |= {key: [arguments[key][index]] for key in self._listed if key in arguments}
            mask = found.pop(_MASK, None) if self._ragged else None
            if mask is not None:
                found[_TEXT] = found[_TEXT][:, : int(mask.sum())]
            rows.append(found)
        return rows

    def join(self, rows: Sequence[Tree], size: Size) -> Tree:
        """The inverse of `cut`; captions of different lengths are padded, and a mask says so."""
        shape = self._layouts[size]
        lengths = [row[_TEXT].shape[1] for row in rows] if self._ragged else []
        if len(set(lengths)) > 1:
            most = max(lengths)
            rows = [
                {**row, _TEXT: pad(row[_TEXT], (0, 0, 0, most - n))}
                for row, n in zip(rows, lengths, strict=True)
            ]
        found = [dict(leaves(row)) for row in rows]
        joined: Tree = mapped(
            {key: value for key, value in rows[0].items() if key not in self._listed},
            lambda path, leaf: torch.cat([r[path] for r in found]) if shape[path] else leaf,
        )
        for key in self._listed:
            if key in rows[0]:
                joined[key] = [item for row in rows for item in row[key]]
        if len(set(lengths)) > 1:
            places = torch.arange(max(lengths), device=joined[_TEXT].device)
            joined[_MASK] = torch.stack([places < n for n in lengths]).long()
        return joined

    def shift(self, size: Size) -> float:
        """What the pipeline shifts its noise levels by: ``s`` becomes ``k s / (1 + (k - 1) s)``.

        Most pipelines of flow models choose it by the size of the picture.
        """
        config, kept = self.pipe.scheduler.config, self._shifts
        if not config.get("use_dynamic_shifting"):
            return float(config.get("shift") or config.get("flow_shift") or 1.0)
        if size not in kept:
            original, seen = self.pipe.scheduler.set_timesteps, {}

            @wraps(original)
            def listening(*positional: Any, **named: Any) -> Any:
                seen.update(named)
                return original(*positional, **named)

            self.pipe.scheduler.set_timesteps = listening
            try:
                with torch.random.fork_rng():
                    self._watched(["a"], size, False, _STEPS)
            finally:
                del self.pipe.scheduler.set_timesteps
            exponential = config.get("time_shift_type", "exponential") == "exponential"
            kept[size] = math.exp(seen["mu"]) if exponential else float(seen["mu"])
        return kept[size]

    def prepared(self, latents: Tensor) -> Tensor:
        """Latents (B, C, H, W) in the denoiser's form.

        That is the same, tokens (B, H/2 * W/2, 4 C), or videos of one frame (B, C, 1, H, W).
        """
        if self._form == "tokens":
            return pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)
        return latents[:, :, None] if self._form == "frames" else latents

    def predict(self, noisy: Tensor, timesteps: Tensor, arguments: Tree) -> Tensor:
        """What the denoiser says to noisy latents (B, C, H, W), in the form of `prepared`.

        Args:
            noisy: latents.
            timesteps: (B,), 0 to 1000; with two denoisers they decide which one is asked.
            arguments: of the whole batch.
        """
        inputs = self.prepared(noisy)
        if self.boundary is None:
            return self._answer(self.denoiser, inputs, timesteps, arguments)
        early, batch = timesteps >= self.boundary, len(noisy)
        order, answers = [], []
        for model, chosen in zip(self.denoisers.values(), (early, ~early), strict=True):
            rows = chosen.nonzero().flatten()
            if len(rows):
                own = mapped(arguments, partial(_of_rows, rows, batch))
                answers.append(self._answer(model, inputs[rows], timesteps[rows], own))
                order.append(rows)
        return torch.cat(answers)[torch.cat(order).argsort()]

    def _answer(self, model: nn.Module, inputs: Tensor, timesteps: Tensor, more: Tree) -> Tensor:
        times = timesteps if self._time_scale == 1.0 else timesteps * self._time_scale
        if self._reversed:
            times = 1 - timesteps / 1000
        # A family whose pictures are a list takes each as a video of its own.
        sample = list(inputs) if self._reversed else inputs
        found = model(
            **{self.sample_name: sample, self._time_name: times}, **more, return_dict=False
        )[0]
        if self._reversed:
            return -torch.stack(list(found))
        if found.ndim == 4 and found.shape[1] == 2 * inputs.shape[1]:
            found = found.chunk(2, 1)[0]  # the other half is a learnt variance
        result: Tensor = found
        return result

    def _watched(self, texts: list[str], size: Size, gradients: bool, steps: int = 2) -> Tree:
        options: dict[str, Any] = {
            "prompt": texts,
            "width": size[0],
            "height": size[1],
            "num_frames": 1,
            "num_inference_steps": steps,
            "guidance_scale": self._guidance,
            "true_cfg_scale": 1.0,
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
        given = float(arguments.pop(self._time_name).flatten()[0])
        own = self.pipe.scheduler.timesteps
        if float(own[0]) > 0 and not self._reversed:
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


def _of_rows(rows: Tensor, batch: int, _: Path, leaf: Tensor) -> Tensor:
    """Some pictures' part of an argument that has one of each picture."""
    return leaf[rows] if len(leaf) == batch else leaf
