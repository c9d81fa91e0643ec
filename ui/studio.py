"""The models and LoRAs of a server, and the one pipeline that is loaded at a time.

This and whatever the page is built from leaves diffusers alone until a model is loaded: the page
stands while the libraries are still on their way.
"""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from cmlora.container import sha256
from cmlora.errors import CmloraError
from cmlora.frequency.card import Profile, StaleCard, card_path, read_card
from cmlora.frequency.profile import base_id
from cmlora.pipelines import library
from cmlora.pipelines.models import EMBEDDED
from cmlora.ui import libraries
from cmlora.ui.jobs import Tickets
from cmlora.ui.order import SAMPLERS
from cmlora.ui.settings import Settings, embedded_available
from cmlora.ui.shelf import Shelf, is_model, is_safetensors, unknown

if TYPE_CHECKING:
    from cmlora.cost import PassCost
    from cmlora.pipelines.cmlora_pipeline import CMLoRAPipeline
    from cmlora.plan import Scope
    from cmlora.recipe import Recipe

_HUB = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_LEVELS = 10_000  # noise levels that a recipe's scheduler may have


class Studio:
    """Everything that the requests of a server share.

    Args:
        settings: of the server.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.tickets = Tickets()
        self.uploads = settings.out / "loras"
        self._models = Shelf("model", settings.models, is_model)
        self._loras = Shelf("LoRA", (*settings.loras, self.uploads), is_safetensors)
        self._busy = threading.RLock()
        self._pipe: CMLoRAPipeline | None = None
        self._name = ""
        self._own: Any = None
        self._base = ""
        self._held: dict[str, tuple[str, tuple[int, int]]] = {}
        self._hashes: dict[tuple[Path, tuple[int, int]], str] = {}
        self.paces: dict[str, float] = {}
        self._costs: dict[tuple[Any, ...], PassCost | None] = {}
        self._profiles: dict[tuple[str, str], Profile] = {}

    def model_names(self) -> list[str]:
        """The models there are; the one to begin with comes first."""
        embedded = [EMBEDDED] if embedded_available() else []
        return list(dict.fromkeys([*embedded, *self._models.listing()]))

    def default_model(self) -> str:
        """The model to begin with; empty if there is none."""
        named = list(self._models.listing())
        names = [*named, *self.model_names()] if self.settings.models else self.model_names()
        return names[0] if names else ""

    def model_place(self, name: str) -> str | Path:
        """Where a model is: a path, ``emoji``, or the id of a model on the hub.

        Raises:
            CmloraError: if there is none of that name, or the hub is not to be used.
        """
        if name == EMBEDDED and embedded_available():
            return EMBEDDED
        known = self._models.listing()
        if name in known:
            return known[name]
        # a local folder may look like a hub id, and what is not in the listing cannot be named
        if _HUB.fullmatch(name) and ".." not in name and not Path(name).exists():
            if self.settings.hub:
                return name
            raise CmloraError(f"model {name!r}: loading from the hub is off; start with --hub")
        if not known and not embedded_available():
            raise CmloraError("there is no model: start with --model FOLDER, or with --hub")
        raise CmloraError(unknown("model", name, self.model_names()))

    def lora_paths(self, model: str) -> dict[str, Path]:
        """The LoRAs there are for a model, by name."""
        embedded: dict[str, Path] = {}
        if model == EMBEDDED and embedded_available():
            from cmlora.emoji import weights

            embedded = {name: weights.lora_path(name) for name in weights.LORAS}
        return {**embedded, **{k: v for k, v in self._loras.listing().items() if k not in embedded}}

    def lora_path(self, name: str, model: str) -> Path:
        """The file of a LoRA.

        Raises:
            CmloraError: if the model has no LoRA of that name.
        """
        known = self.lora_paths(model)
        if name in known:
            return known[name]
        raise CmloraError(unknown("LoRA", name, known))

    def preload(self, name: str) -> None:
        """Load a model before anybody asks for it.

        Raises:
            CmloraError: if it cannot be loaded.
        """
        with self._busy:
            self._open(name)

    def loaded(self, name: str) -> CMLoRAPipeline | None:
        """The pipeline, if it is the one of this model and nothing has to be loaded for it."""
        return self._pipe if self._pipe is not None and self._name == name else None

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While nothing else loads or uses a model."""
        with self._busy:
            yield

    @contextmanager
    def pipeline(
        self,
        model: str,
        loras: Mapping[str, float],
        sampler: str = "model's own",
        scopes: Mapping[str, Scope] = MappingProxyType({}),
    ) -> Iterator[CMLoRAPipeline]:
        """The model with exactly these LoRAs, for one request at a time.

        Args:
            model: its name.
            loras: strengths by name.
            sampler: a key of `SAMPLERS`.
            scopes: the visitor's labels, by name.

        Raises:
            CmloraError: if anything is missing or does not fit; the next request is not harmed.
        """
        files = {name: (self.lora_path(name, model), loras[name]) for name in sorted(loras)}
        adapters: dict[str, tuple[Path, float]] = {}
        labels: dict[str, Scope | None] = {}
        for name, (path, weight) in files.items():
            adapter = library.adapter_name(path, adapters)
            adapters[adapter], labels[adapter] = (path, weight), scopes.get(name)
        with self._busy:
            pipe = self._open(model)
            pipe.pipe.scheduler = _scheduler(self._own, SAMPLERS[sampler])
            self._fit(pipe, adapters)
            for adapter, scope in labels.items():
                held = pipe.ensemble.loras
                held[adapter] = replace(held[adapter], scope=scope)
            yield pipe

    @contextmanager
    def replaying(self, recipe: Recipe, model: str) -> Iterator[CMLoRAPipeline]:
        """The model and LoRAs of a recipe, found by their hashes among those of the server.

        The recipe comes from a file of a visitor: its names open nothing.

        Args:
            recipe: what is to be made again.
            model: the model that is selected on the page.

        Raises:
            CmloraError: if something is not here or is another version.
        """
        with self._busy:
            for name in self._candidates(recipe, model):
                pipe = self._open(name)
                if pipe.ensemble.fingerprint == recipe.model_hash:
                    break
            else:
                raise CmloraError(
                    f"this picture was made with another model ({Path(recipe.model).name}, hash "
                    f"{recipe.model_hash[:10]}); select that model first"
                )
            dtype = str(pipe.dtype).removeprefix("torch.")
            if recipe.dtype != dtype:
                raise CmloraError(
                    f"this picture was made in {recipe.dtype} and this server computes in {dtype}; "
                    f"start it with --dtype {recipe.dtype}"
                )
            paths = self._by_hash(recipe, self._name)
            self._fit(pipe, {lora.name: (paths[lora.name], lora.weight) for lora in recipe.loras})
            pipe.pipe.scheduler = _recipe_scheduler(recipe)
            yield pipe

    def shelf_names(self, recipe: Recipe, model: str) -> dict[str, str]:
        """What the list of LoRAs calls those of a recipe, by their names in the recipe.

        Raises:
            CmloraError: if one of them is not here.
        """
        listed = {path: name for name, path in self.lora_paths(model).items()}
        return {name: listed[path] for name, path in self._by_hash(recipe, model).items()}

    def remember(self, sha: str, profile: Profile) -> None:
        """Keep a measured profile until the server ends; later pictures are ordered by it.

        Args:
            sha: of the LoRA's file.
            profile: measured on the model that is loaded.
        """
        self._profiles[sha, profile.base] = profile

    def profile(self, path: Path) -> Profile | None:
        """What is known about a LoRA's frequencies: measured here, or on the card beside it."""
        if card_path(path).exists() or self._profiles:
            digest = self.hash_of(path)
            for (sha, base), profile in self._profiles.items():
                if sha == digest and base == (self._base or base):
                    return profile
        if not card_path(path).exists():
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", StaleCard)
            return read_card(path, self._base or None)

    def pass_cost(self, pipe: CMLoRAPipeline, recipe: Recipe) -> PassCost | None:
        """Cost of a pass, counted once per model and size; ``None`` if it cannot be counted."""
        from cmlora.pipelines.render import pass_cost

        size = (recipe.width, recipe.height, recipe.guidance_scale > 1, recipe.cut)
        key = (recipe.model_hash, *size)
        if key not in self._costs:
            self._costs[key] = None
            with suppress(CmloraError):
                self._costs[key] = pass_cost(pipe, recipe)
        return self._costs[key]

    def hash_of(self, path: Path) -> str:
        """SHA-256 of a file, read again only if it changed."""
        key = (path, _stamp(path))
        if key not in self._hashes:
            self._hashes[key] = sha256(path)
        return self._hashes[key]

    def _open(self, name: str) -> CMLoRAPipeline:
        """The pipeline of a model, loaded if it is not the present one."""
        if self._pipe is not None and self._name == name:
            return self._pipe
        libraries.ready()
        from cmlora.pipelines.render import assemble

        place = self.model_place(name)
        self._pipe, self._name, self._held = None, "", {}  # the old one's memory first
        settings = self.settings
        single = isinstance(place, Path) and place.is_file()
        pipe = assemble(
            place,
            (),
            dtype=settings.dtype,
            device=settings.device,
            config=settings.config if single else None,
        )
        pipe.ensemble.fingerprint  # noqa: B018  read while the source is still a place
        pipe.ensemble.source = name  # pictures carry the name, not a path of this machine
        self._pipe, self._name, self._own = pipe, name, pipe.pipe.scheduler
        self._base = base_id(pipe.pipe)
        return pipe

    def _fit(self, pipe: CMLoRAPipeline, wanted: Mapping[str, tuple[Path, float]]) -> None:
        """Load what is missing; what is too much makes everything be loaded afresh."""
        stamps = {name: (str(path), _stamp(path)) for name, (path, _) in wanted.items()}
        if any(stamps.get(name) != stamp for name, stamp in self._held.items()):
            self._held = {}
            pipe.unload_lora_weights()
        for name, (path, weight) in wanted.items():
            if name not in self._held:
                try:
                    pipe.load_lora_weights(path, name)
                except BaseException as error:
                    self._held = {}
                    pipe.unload_lora_weights()
                    if isinstance(error, CmloraError):
                        raise CmloraError(without_path(str(error), path)) from None
                    raise
                self._held[name] = stamps[name]
            lora = replace(pipe.ensemble.loras[name], weight=weight)
            measured = self._profiles.get((lora.applied.sha256, self._base))
            pipe.ensemble.loras[name] = replace(lora, profile=measured or lora.profile)

    def _candidates(self, recipe: Recipe, model: str) -> list[str]:
        """Models that may be the recipe's: the selected one, and one of its name."""
        known = self.model_names()
        named = [name for name in known if name in (recipe.model, Path(recipe.model).name)]
        chosen = [model] if model in known or self.loaded(model) is not None else []
        return list(dict.fromkeys([*named, *chosen]))

    def _by_hash(self, recipe: Recipe, model: str) -> dict[str, Path]:
        """The files of a recipe's LoRAs by adapter name; files of the same name are tried first."""
        paths = list(self.lora_paths(model).values())
        found = {}
        for lora in recipe.loras:
            ranked = sorted(paths, key=lambda path: path.name != lora.file)
            match = next((path for path in ranked if self.hash_of(path) == lora.sha256), None)
            if match is None:
                raise CmloraError(
                    f"LoRA {lora.file or lora.name} (sha256 {lora.sha256[:12]}) is not in the "
                    "LoRA folders of this server"
                )
            found[lora.name] = match
        return found


def without_path(message: str, path: Path) -> str:
    """A message with the file's name in place of where it is on this machine."""
    return message.replace(str(path), path.name)


def _stamp(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError as failure:
        raise CmloraError(f"{path.name} cannot be read: {failure.strerror}") from None
    return found.st_mtime_ns, found.st_size


def _scheduler(own: Any, name: str) -> Any:
    """The model's scheduler, or another one with its noise levels."""
    if not name:
        return own
    import diffusers

    return getattr(diffusers, name).from_config(own.config)


def _recipe_scheduler(recipe: Recipe) -> Any:
    """The scheduler of a recipe, which may come from anybody."""
    import diffusers

    kind: Any = getattr(diffusers, recipe.scheduler, None)
    schedulers = isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)
    if not schedulers:
        raise CmloraError(f"diffusers has no scheduler {recipe.scheduler[:60]!r}")
    levels = recipe.scheduler_config.get("num_train_timesteps", 1000)
    if not isinstance(levels, int) or not 1 <= levels <= _LEVELS:
        raise CmloraError("the recipe's scheduler has an impossible number of noise levels")
    try:
        return kind.from_config(dict(recipe.scheduler_config))
    except Exception as failure:  # whatever a damaged configuration makes of it
        raise CmloraError(
            f"the recipe's {recipe.scheduler} cannot be set up ({type(failure).__name__})"
        ) from None
