"""The model of a testbed with its LoRAs, loaded when needed and kept while there is room."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from cmlora.container import sha256
from cmlora.cost import PassCost
from cmlora.errors import CmloraError
from cmlora.eval.manifest import Manifest
from cmlora.eval.testbeds import check_weights, weights_of
from cmlora.frequency.card import Profile, card_path, read_card
from cmlora.frequency.profile import base_id
from cmlora.pipelines.cmlora_pipeline import CMLoRAPipeline
from cmlora.pipelines.models import resolve
from cmlora.pipelines.render import Rendered, Wish, pass_cost, render, write_recipe
from cmlora.plan import Member
from cmlora.recipe import Ingredient, Recipe
from cmlora.source import config_of

ROOM = 32
"""How many LoRAs stay loaded unless told otherwise."""


@dataclass(frozen=True)
class Weights:
    """A LoRA's file, before it is loaded, and what beside it decides its strength."""

    path: Path
    sha256: str
    profile: Profile | None
    config: str = ""


class Studio:
    """Makes the pictures of a testbed.

    Args:
        manifest: the testbed.
        folder: of the LoRA files; the embedded ones need none.
        model: replaces the manifest's.
        device: where to compute; the CPU if not given.
        dtype: of the weights; float32 if not given.
        room: how many LoRAs stay loaded; the one that was not used for longest goes.
        execution: how the passes of a step run, see `cmlora.compose.compose`.

    Raises:
        CmloraError: if the model or a LoRA is missing, broken, or another than the testbed's.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        folder: str | Path | None = None,
        model: str | Path | None = None,
        device: str | None = None,
        dtype: str | None = None,
        room: int = ROOM,
        execution: str = "sequential",
    ) -> None:
        self.manifest = manifest if model is None else replace(manifest, model=str(model))
        self.room = room
        self.execution = execution
        files = {c.id: weights_of(c, self.manifest, folder) for c in manifest.loras}
        for concept in manifest.loras:
            check_weights(concept, files[concept.id])
        self.pipe = _assembled(self.manifest, dtype, device)
        self.files = {id_: self._weights(path) for id_, path in files.items()}
        self._speech = _Speech(self.pipe.pipe)
        self._used: OrderedDict[str, None] = OrderedDict()

    @cached_property
    def model_hash(self) -> str:
        """Of the model's files, the autoencoder's included if another one is used."""
        own = self.pipe.ensemble.fingerprint
        return own if not self.manifest.vae else f"{own}+{_component_hash(self.manifest.vae)}"

    @cached_property
    def adapters(self) -> dict[str, str]:
        """What the pipeline calls each LoRA.

        Wherever the order of LoRAs matters, recipes have it by name. So the names begin with the
        place in the testbed, and methods that take turns go through its categories in order.
        """
        ordered = self.manifest.ordered([c.id for c in self.manifest.loras])
        digits = len(str(len(ordered) - 1))
        return {id_: f"{place:0{digits}}_{id_}" for place, id_ in enumerate(ordered)}

    def base_recipe(self) -> Recipe:
        """What all recipes of the testbed share; method, LoRAs, prompt and seed are missing."""
        manifest = self.manifest
        native = None not in (manifest.width, manifest.height)
        wish = Wish(
            prompt="-",
            method="naive",
            cache="none",
            negative_prompt=manifest.negative_prompt,
            steps=manifest.steps,
            guidance_scale=manifest.guidance_scale,
            size=(manifest.width or 0, manifest.height or 0) if native else None,
            execution=self.execution,
        )
        with self._only(()):
            return write_recipe(self.pipe, wish)

    def settled(self, ids: Sequence[str], recipe: Recipe) -> Recipe:
        """A planned recipe with what only the loaded LoRAs can tell, such as their relevance.

        Args:
            ids: the set.
            recipe: as planned, from `base_recipe`.
        """
        self.load(ids)
        wish = Wish(
            prompt=recipe.prompt,
            method=recipe.method,
            options=recipe.options,
            cache=recipe.cache,
            negative_prompt=recipe.negative_prompt,
            steps=recipe.steps,
            guidance_scale=recipe.guidance_scale,
            size=(recipe.width, recipe.height),
            seed=recipe.seed,
            execution=recipe.execution,
        )
        with self._only(ids):
            return replace(write_recipe(self.pipe, wish), index=recipe.index)

    def ingredients(self, ids: Sequence[str]) -> tuple[Ingredient, ...]:
        """A set's LoRAs as recipes have them; nothing is loaded for it."""
        found = []
        for id_ in ids:
            concept, file = self.manifest.by_id[id_], self.files[id_]
            found.append(
                Ingredient(
                    name=self.adapters[id_],
                    file=file.path.name,
                    sha256=file.sha256,
                    weight=concept.weight,
                    role=concept.role,
                    category=concept.category,
                    frequency=None if file.profile is None else _finite(file.profile.frequency),
                    window=None if file.profile is None else file.profile.window,
                    config=file.config,
                )
            )
        return tuple(found)

    def members(self, ids: Sequence[str]) -> tuple[Member, ...]:
        """A set's LoRAs as strategies see them, in the order in which recipes have them."""
        by_adapter = {self.adapters[id_]: self.manifest.by_id[id_] for id_ in ids}
        return tuple(
            Member(
                lora.name,
                lora.weight,
                role=lora.role,
                frequency=lora.frequency,
                window=lora.window,
                category=lora.category,
                triggers=by_adapter[lora.name].triggers,
            )
            for lora in sorted(self.ingredients(ids), key=lambda lora: lora.name)
        )

    def cost(self, recipe: Recipe) -> PassCost | None:
        """Of one pass at the recipe's size; ``None`` if the denoiser cannot be counted."""
        return pass_cost(self.pipe, recipe)

    def load(self, ids: Sequence[str]) -> None:
        """Put a set's LoRAs into the pipeline, and others out if there is no room."""
        for id_ in ids:
            if self.adapters[id_] not in self.pipe.loras:
                self._make_room(keep=ids)
                self._load(id_)
            self._used[id_] = None
            self._used.move_to_end(id_)

    def render(
        self, ids: Sequence[str], recipe: Recipe, on_step: Callable[[], None] = lambda: None
    ) -> Rendered:
        """Make one picture; its bits depend on the recipe alone."""
        self.load(ids)
        with self._speech:
            return render(self.pipe, recipe, on_step=on_step)

    @contextmanager
    def _only(self, ids: Sequence[str]) -> Iterator[None]:
        """A block in which the pipeline's other LoRAs are out of sight."""
        ensemble = self.pipe.ensemble
        loaded = ensemble.loras
        ensemble.loras = {name: loaded[name] for name in map(self.adapters.__getitem__, ids)}
        try:
            yield
        finally:
            ensemble.loras = loaded

    def _weights(self, path: Path) -> Weights:
        profile = read_card(path, base_id(self.pipe.pipe)) if card_path(path).exists() else None
        return Weights(path, sha256(path), profile, config_of(path))

    def _load(self, id_: str) -> None:
        concept, name = self.manifest.by_id[id_], self.adapters[id_]
        self.pipe.load_lora_weights(
            self.files[id_].path, name, weight=concept.weight, role=concept.role
        )
        loaded = self.pipe.ensemble.loras[name]
        applied = replace(
            loaded.applied, category=concept.category, triggers=concept.triggers or ()
        )
        self.pipe.ensemble.loras[name] = replace(
            loaded, applied=applied, profile=self.files[id_].profile
        )
        self._speech.forget()

    def _make_room(self, keep: Sequence[str]) -> None:
        for id_ in list(self._used):
            if len(self.pipe.loras) < max(self.room, len(keep)):
                return
            if id_ not in keep:
                del self._used[id_]
                self.pipe.ensemble.loras.pop(self.adapters[id_])
                self.pipe.pipe.delete_adapters([self.adapters[id_]])
                self._speech.forget()


class _Speech:
    """Stands in for a pipeline's ``encode_prompt``: what was said before comes back as a copy.

    A prompt is known by its words and by which LoRAs act in the text encoders, how strongly.

    Args:
        pipe: whose prompts are encoded; put back on leaving.
    """

    room = 8

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._known: dict[Any, Any] = {}

    def forget(self) -> None:
        """Begin anew, because the text encoders have changed."""
        self._known.clear()

    def __enter__(self) -> None:
        encode = getattr(self._pipe, "encode_prompt", None)
        if encode is None:
            return

        def remembered(*args: Any, **kwargs: Any) -> Any:
            try:
                key = (_active(self._pipe), _frozen(args), _frozen(kwargs))
            except TypeError:  # embeddings were handed in; there is nothing to encode
                return encode(*args, **kwargs)
            if key not in self._known:
                while len(self._known) >= self.room:
                    del self._known[next(iter(self._known))]
                self._known[key] = _copied(encode(*args, **kwargs))
            return _copied(self._known[key])

        self._pipe.encode_prompt = remembered

    def __exit__(self, *_: object) -> None:
        vars(self._pipe).pop("encode_prompt", None)


def _active(pipe: Any) -> tuple[Any, ...]:
    """Which LoRAs act in the text encoders, and how strongly."""
    found = []
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        model = getattr(pipe, name, None)
        for layer in model.modules() if isinstance(model, torch.nn.Module) else ():
            if isinstance(layer, BaseTunerLayer):
                used = tuple(layer.active_adapters)
                scales = tuple(float(layer.scaling.get(adapter, 0)) for adapter in used)
                found.append((used, scales, layer.disable_adapters))
    return tuple(found)


def _frozen(value: Any) -> Any:
    """A hashable copy of plain values; TypeError for anything else."""
    if isinstance(value, dict):
        return tuple((key, _frozen(inner)) for key, inner in sorted(value.items()))
    if isinstance(value, (list, tuple)):
        return tuple(map(_frozen, value))
    if value is None or isinstance(value, (str, int, float, bool, torch.device)):
        return value
    raise TypeError(type(value))


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    return type(value)(map(_copied, value)) if isinstance(value, (list, tuple)) else value


def _assembled(manifest: Manifest, dtype: str | None, device: str | None) -> CMLoRAPipeline:
    """The model with the testbed's autoencoder and scheduler."""
    where = resolve(manifest.model)
    pipe = CMLoRAPipeline.from_pretrained(where, dtype=dtype, device=device)
    pipe.ensemble.source = manifest.model
    pipe.set_progress_bar_config(disable=True)
    if manifest.vae:
        pipe.pipe.vae = _autoencoder(manifest.vae, pipe.dtype).to(pipe.device)
    if manifest.scheduler or manifest.scheduler_config:
        pipe.pipe.scheduler = _scheduler(manifest, pipe.scheduler)
    return pipe


def _scheduler(manifest: Manifest, current: Any) -> Any:
    import diffusers

    name = manifest.scheduler or type(current).__name__
    kind: Any = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        raise CmloraError(f"testbed: diffusers has no scheduler {name!r}")
    made: Any = kind
    return made.from_config(current.config, **manifest.scheduler_config)


def _autoencoder(place: str, dtype: torch.dtype) -> Any:
    from diffusers import AutoencoderKL

    try:
        return AutoencoderKL.from_pretrained(place, use_safetensors=True, torch_dtype=dtype)
    except Exception as failure:  # diffusers, safetensors and the hub each have their own
        reason = next((line for line in str(failure).splitlines() if line.strip()), "")
        raise CmloraError(
            f"vae {place!r} is neither a folder here nor can it be fetched ({reason})"
        ) from None


def _component_hash(place: str) -> str:
    if Path(place).is_dir():
        files = sorted(p for p in Path(place).rglob("*") if p.suffix in (".json", ".safetensors"))
        return "".join(sha256(path)[:16] for path in files)
    return place


def _finite(value: float) -> float | None:
    return value if value == value else None
