"""Puts what is trained into the models of a pipeline: adapters, or the denoiser's own weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

import torch
from peft import inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from cmlora.adapters.training.conditioning import denoisers_of, text_encoders_of
from cmlora.adapters.training.quartet import quartet
from cmlora.adapters.training.settings import Settings
from cmlora.adapters.tuners import TUNERS
from cmlora.adapters.tuners.pissa import PissaLayer
from cmlora.adapters.tuners.plugin import TunerConfig
from cmlora.adapters.tuners.store import remove
from cmlora.errors import CmloraError

RANKED = frozenset(
    (
        "lora",
        "rslora",
        "dora",
        "dylora",
        "maestro",
        "allora",
        "pissa",
        "lora_xs",
        "lora_sb",
        "block_lora",
        "hydra",
        "orthogonal",
        "sltrain",
        "lost",
        "nola",
    )
)
"""Tuners whose ``r`` is a rank, which no layer has more of than its smaller side."""


class Parts:
    """What is trained in a pipeline.

    Args:
        pipe: its models are changed: everything else in them is frozen.
        settings: of the training.

    Raises:
        CmloraError: if a target matches nothing, or a layer does not allow the rank or the tuner.
    """

    def __init__(self, pipe: Any, settings: Settings) -> None:
        self.settings, self.pipe = settings, pipe
        self.denoisers = denoisers_of(pipe)
        self.denoiser = next(iter(self.denoisers.values()))
        self.models: dict[str, nn.Module] = {}
        self.layers: dict[str, list[str]] = {}
        self.targets: dict[str, list[str]] = {}
        everything = {**self.denoisers, **text_encoders_of(pipe)}
        for model in everything.values():
            others = sorted(getattr(model, "peft_config", {}))
            if others:
                raise CmloraError(
                    f"train: the model has an adapter {others[0]!r} already; take it out first, "
                    "for example with pipe.unload_lora_weights()"
                )
        for name, model in everything.items():
            model.requires_grad_(False)
            own = name in self.denoisers
            wanted = settings.targets if own else settings.text_targets
            if settings.full and own:
                self.models[name], self.layers[name] = model, adaptable(model)
            elif wanted:
                self.models[name] = model
                self.layers[name] = matching(model, wanted, name)
                self.targets[name] = shortest(model, wanted, self.layers[name])
        if settings.text_targets and self.models.keys() <= self.denoisers.keys():
            raise CmloraError("train: text_targets are given, and there is no text encoder")
        if settings.base_format == "mxfp4" and settings.tuner == "lora_sb":
            raise CmloraError(
                "train: lora_sb needs gradients of the weights, which mxfp4 has none of"
            )
        for denoiser in self.denoisers.values():
            if settings.base_format == "mxfp4":
                _pack(denoiser)
            elif settings.base_format == "quartet":
                quartet(denoiser)
        self.alone = settings.full

    def insert(self) -> None:
        """Adds the adapters, or frees the denoiser's weights; what is trained is in float32."""
        settings = self.settings
        for name, model in self.models.items():
            if self.alone:
                model.requires_grad_(True)
                model.float()
            else:
                self._adapt(model, self.layers[name], name)
        if not any(True for _ in self.trained().values()):
            raise CmloraError(f"train: the tuner {settings.tuner} leaves nothing to train")

    def remove(self) -> None:
        """Takes the adapters out again; weights that were trained themselves stay as they are."""
        for model in () if self.alone else self.models.values():
            remove(model, self.settings.name)

    @contextmanager
    def or_removed(self) -> Iterator[None]:
        """Takes the adapters out if the body fails, so that the pipeline can be used again."""
        try:
            yield
        except BaseException:
            self.remove()
            raise

    def checkpoint_activations(self) -> None:
        """Computes activations again in the backward pass instead of keeping them.

        Raises:
            CmloraError: if a model cannot.
        """
        for part, model in self.models.items():
            # diffusers' word for it, then that of transformers.
            names = ("enable_gradient_checkpointing", "gradient_checkpointing_enable")
            enable: Any = next((getattr(model, n) for n in names if hasattr(model, n)), None)
            if enable is None:
                raise CmloraError(f"train: the {part} has no gradient checkpointing")
            enable()

    def trained(self) -> dict[str, nn.Parameter]:
        """The trained parameters, as ``part.name``."""
        return {
            f"{part}.{key}": parameter
            for part, model in self.models.items()
            for key, parameter in model.named_parameters()
            if parameter.requires_grad
        }

    def tensors(self) -> dict[str, Tensor]:
        """Everything that training changes or that belongs to the adapter, as ``part.name``."""
        found: dict[str, Tensor] = dict(self.trained())
        if self.alone:
            return found
        mark = f".{self.settings.name}"
        for part, model in self.models.items():
            for key, tensor in model.state_dict().items():
                if key.endswith(mark) or f"{mark}." in key:
                    found.setdefault(f"{part}.{key}", tensor)
        return found

    def tuners(self, kind: type[Any]) -> list[tuple[str, Any]]:
        """The layers of one kind of tuner that carry the adapter, as ``part.name`` and layer."""
        return [
            (f"{part}.{key}", layer)
            for part, model in self.models.items()
            for key, layer in model.named_modules()
            if isinstance(layer, kind) and self.settings.name in layer._get_available_adapters()
        ]

    def pairs(self) -> list[tuple[Tensor, Tensor, float]]:
        """Down, up and strength of every layer whose update is ``strength * up @ down``.

        Raises:
            CmloraError: if the tuner is not of that form.
        """
        name, found = self.settings.name, []
        for key, layer in self.tuners(BaseTunerLayer):
            if isinstance(layer, PissaLayer):
                down, up = layer.held(name, "down"), layer.held(name, "up")
            elif "lora_A" in layer._modules and name in layer.lora_A and not layer.use_dora[name]:
                down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
            else:
                raise CmloraError(f"train: {key} has no pair of factors; use tuner lora with it")
            found.append((down, up, float(layer.scaling[name])))
        return found

    def train(self, mode: bool) -> None:
        """Switches dropout on or off in the trained models."""
        for model in self.models.values():
            model.train(mode)

    def _adapt(self, model: nn.Module, layers: Sequence[str], part: str) -> None:
        settings = self.settings
        config = config_of(settings, self.targets[part])
        if settings.tuner in RANKED:
            check_rank(model, layers, config.r, part)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inject_adapter_in_model(config, model, settings.name)
        model._hf_peft_config_loaded = True  # type: ignore[assignment]
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()


def config_of(settings: Settings, layers: Sequence[str]) -> Any:
    """The tuner's settings for a model.

    Raises:
        CmloraError: if the tuner has no such option or value.
    """
    tuner = TUNERS[settings.tuner].object
    options: dict[str, Any] = {"target_modules": list(layers), **settings.options}
    names = set(tuner.config.__dataclass_fields__)
    unknown = sorted(set(settings.options) - names)
    if unknown:
        near = get_close_matches(unknown[0], names, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise CmloraError(f"train: {settings.tuner} has no option {unknown[0]!r}{hint}")
    if settings.rank is not None:
        options["r"] = settings.rank
    alpha = next((a for a in ("alpha", "lora_alpha") if a in names), "")
    if settings.alpha is not None and not alpha:
        raise CmloraError(f"train: {settings.tuner} has no alpha")
    if settings.alpha is not None:
        options[alpha] = settings.alpha
    elif alpha and not issubclass(tuner.config, TunerConfig):  # PEFT's own default is 8 for any r
        default = tuner.config.__dataclass_fields__["r"].default
        options.setdefault(alpha, options.get("r", default))
    if "seed" in names:
        options.setdefault("seed", settings.seed)
    try:
        return tuner.settings(**options)
    except (TypeError, ValueError) as error:
        if isinstance(error, CmloraError):
            raise
        raise CmloraError(f"train: {settings.tuner} does not take these options: {error}") from None


def adaptable(model: nn.Module) -> list[str]:
    """Names of the linear layers and convolutions of a model."""
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]


def matching(model: nn.Module, targets: Sequence[str], part: str) -> list[str]:
    """The layers whose names end like the targets.

    Raises:
        CmloraError: for a target that matches nothing, with near names.
    """
    known = adaptable(model)
    found: dict[str, None] = {}
    for target in targets:
        hits = [name for name in known if name == target or name.endswith(f".{target}")]
        if not hits:
            near = get_close_matches(target, sorted(endings(known)), n=4, cutoff=0.4)
            hint = (
                f"near names: {', '.join(near)}" if near else f"it has {', '.join(known[:4])}, ..."
            )
            raise CmloraError(f"train: no layer of the {part} is called {target!r}; {hint}")
        found.update(dict.fromkeys(hits))
    return [name for name in known if name in found]


def shortest(model: nn.Module, targets: Sequence[str], layers: Sequence[str]) -> list[str]:
    """The targets themselves if PEFT finds the same layers by them, otherwise the layers' names."""
    ends = tuple(f".{target}" for target in targets)
    found = [n for n, _ in model.named_modules() if n in targets or n.endswith(ends)]
    return list(targets) if found == list(layers) else list(layers)


def endings(names: Sequence[str]) -> set[str]:
    """The last parts of names, numbers with what comes before them."""
    found = set()
    for name in names:
        parts = name.split(".")
        keep = 1
        while keep < len(parts) and parts[-keep].isdigit():
            keep += 1
        found.add(".".join(parts[-keep:]))
        if len(parts) > keep:
            found.add(".".join(parts[-keep - 1 :]))
    return found


def check_rank(model: nn.Module, layers: Sequence[str], rank: int, part: str) -> None:
    """Raises `CmloraError` if a layer has a side shorter than the rank."""
    for name in layers:
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        most = min(weight.shape[0], weight[0].numel())
        if rank > most:
            shape = "x".join(map(str, weight.shape))
            raise CmloraError(
                f"train: rank is {rank}, and {part}.{name} of {shape} allows {most} at most; "
                "lower the rank or leave the layer out of the targets"
            )


def _pack(model: nn.Module) -> None:
    """Keeps the weights of a model in 4 bits."""
    from cmlora.adapters.compression.model import compress
    from cmlora.adapters.compression.mxfp4 import mxfp4

    compress(model, mxfp4, 0.99)


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as they are now."""
    return {key: tensor.detach().clone() for key, tensor in tensors.items()}


@torch.no_grad()
def write_back(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor], where: str) -> None:
    """Sets tensors to saved values.

    Raises:
        CmloraError: if they are not those of the same model and settings.
    """
    if tensors.keys() != values.keys():
        other = sorted(tensors.keys() ^ values.keys())[0]
        raise CmloraError(f"{where} is of another model or other layers: {other} differs")
    for key, tensor in tensors.items():
        if tensor.shape != values[key].shape:
            raise CmloraError(
                f"{where}: {key} is {tuple(values[key].shape)}, not {tuple(tensor.shape)}"
            )
        tensor.copy_(values[key])
