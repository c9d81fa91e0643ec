"""The LoRAs of a pipeline, and a call of it with them composed."""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from cmlora import denoisers
from cmlora.batching import Execution
from cmlora.branches import Uncond
from cmlora.caching.dit import Live
from cmlora.caching.unet import Cut
from cmlora.compose import TextEncoder, compose
from cmlora.engine import Report
from cmlora.errors import CmloraError
from cmlora.files import Applied, load
from cmlora.frequency.card import Profile, card_path, read_card
from cmlora.frequency.profile import base_id
from cmlora.pipelines import library
from cmlora.pipelines.models import fingerprint
from cmlora.plan import Member, Policy, Role, Scope, Strategy
from cmlora.recipe import image_seed
from cmlora.relevance import weighs
from cmlora.schedules.parse import parse_schedule
from cmlora.schedules.schedule import Schedule, Track

TURNS = ("character", "clothing", "style", "background", "object")
"""The order of the LoRAs of a picture, and so of their turns in `switch`; unknown ones follow."""


@dataclass(frozen=True)
class Loaded:
    """A LoRA in a pipeline.

    Args:
        path: its file.
        applied: what of the file went where.
        weight: its strength unless a call says otherwise.
        role: the user's label of its frequency class.
        profile: its measured frequency profile, if there is a card beside the file.
        into: the denoisers the file went into, if that was said.
        further: its files for other denoisers; their weights are relative to its own.
        scope: the user's label of whether it changes the whole picture.
    """

    path: Path
    applied: Applied
    weight: float = 1.0
    role: Role | None = None
    profile: Profile | None = None
    into: tuple[str, ...] = ()
    further: tuple["Loaded", ...] = ()
    scope: Scope | None = None

    @property
    def identity(self) -> tuple[str, ...]:
        """What it is, wherever its files are: their hashes, and what was said of their places."""
        said = "+".join(self.into)
        more = (f"{'+'.join(x.into)}:{x.applied.sha256}:{x.weight}" for x in self.further)
        config = [f"config:{self.applied.config}"] if self.applied.config else []
        return (self.applied.sha256, *config, *([said] if said else []), *more)


class Ensemble:
    """The LoRAs that were loaded into one pipeline.

    Args:
        pipe: a diffusers pipeline; it is used, not copied.
        source: the name it was loaded by; the ids of the embedded LoRAs are known for ``emoji``.
    """

    def __init__(self, pipe: Any, source: str | Path | None = None) -> None:
        self.pipe = pipe
        self.source = source
        self.loras: dict[str, Loaded] = {}
        self.report: Report | None = None

    @cached_property
    def _base_id(self) -> str:
        return base_id(self.pipe)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the model's files; see `cmlora.pipelines.models.fingerprint`."""
        if self.source is None:
            raise CmloraError("this pipeline was not loaded by name, so its files are not known")
        return fingerprint(self.source)

    def load(
        self,
        path: str | Path,
        adapter_name: str | None = None,
        *,
        weight: float = 1.0,
        role: Role | None = None,
        scope: Scope | None = None,
        strict: bool = True,
        into: str | Sequence[str] | None = None,
        load_into_transformer_2: bool = False,
    ) -> str:
        """Put a LoRA into the pipeline, or a further file of one that is in another denoiser.

        Args:
            path: a safetensors file of any trainer, or the id of an embedded LoRA.
            adapter_name: what to call it; by default the file's stem. The name of a LoRA that is
                loaded, with a denoiser that it is not in, makes this file a part of that LoRA.
            weight: its strength unless a call says otherwise; of a further file, its strength
                relative to the LoRA's.
            role: ``high`` or ``low`` frequency, if you know better than the measurement.
            scope: ``global`` for one that changes the whole picture, such as a style, or ``local``;
                by default what its file says of its category.
            strict: refuse a file that does not apply completely.
            into: the denoisers the file goes into, such as ``transformer_2``, or both of Wan 2.2;
                by default where its names say, which is the first one in nearly all files.
            load_into_transformer_2: diffusers' way to say ``into="transformer_2"``.

        Returns:
            The adapter's name.

        Raises:
            CmloraError: if the file is missing, broken, a pickle, or made for another base; or
                if the name is taken or the weight not a finite number.
        """
        file = library.find(path, model=self.source)
        name = adapter_name or library.adapter_name(file, self.loras)
        if load_into_transformer_2 and into is not None:
            raise CmloraError("give either into or load_into_transformer_2, not both")
        places = denoisers.chosen("transformer_2" if load_into_transformer_2 else into)
        loaded = self.loras.get(name)
        if loaded is not None and not places:
            raise CmloraError(
                f"adapter {name!r} is loaded already; choose another adapter_name, or say into "
                "which other denoiser this file of it goes"
            )
        for what, now in (("role", role), ("scope", scope)):
            before = getattr(loaded, what, None)
            if loaded is not None and now not in (None, before):
                raise CmloraError(f"adapter {name!r} is loaded already; its {what} is {before}")
        _check_weight(name, weight)
        if loaded is not None:
            applied = load(self.pipe, file, name, strict=strict, into=places, strength=weight)
            more = Loaded(file, applied, weight, into=places)
            self.loras[name] = replace(loaded, further=(*loaded.further, more))
            return name
        applied = load(self.pipe, file, name, strict=strict, into=places)
        profile = read_card(file, self._base_id) if card_path(file).exists() else None
        self.loras[name] = Loaded(file, applied, weight, role, profile, places, scope=scope)
        return name

    def turn(self, name: str) -> tuple[int, str]:
        """Where a LoRA stands, whatever the loading order: by category as in arXiv:2402.16843."""
        category = self.loras[name].applied.category
        return (TURNS.index(category) if category in TURNS else len(TURNS), name)

    def weights(
        self, lora_weights: Mapping[str, float] | Sequence[float] | None = None
    ) -> dict[str, float]:
        """The LoRAs of a call and their strengths.

        Args:
            lora_weights: strengths by name (others stay out), or one per loaded LoRA in loading
                order, or ``None`` for all with the strengths they were loaded with, in the order
                of their categories and names.

        Raises:
            CmloraError: for an unknown name, a wrong number of weights, or one that is no number.
        """
        if lora_weights is None:
            return {name: self.loras[name].weight for name in sorted(self.loras, key=self.turn)}
        if not isinstance(lora_weights, Mapping):
            if len(lora_weights) != len(self.loras):
                raise CmloraError(
                    f"{len(lora_weights)} lora_weights for {len(self.loras)} LoRAs "
                    f"({', '.join(self.loras) or 'none loaded'})"
                )
            lora_weights = dict(zip(self.loras, lora_weights, strict=True))
        self.check(lora_weights)
        for name, weight in lora_weights.items():
            _check_weight(name, weight)
        return dict(lora_weights)

    def check(self, names: Iterable[str]) -> None:
        """Raises `CmloraError` if a LoRA is not loaded."""
        for name in names:
            if name not in self.loras:
                known = ", ".join(self.loras) or "none"
                raise CmloraError(f"no LoRA {name!r} is loaded; loaded: {known}")

    def named(self, names: str | Iterable[str]) -> list[str]:
        """Loaded LoRAs by one name or several, each once.

        Raises:
            CmloraError: if one is not loaded.
        """
        found = [names] if isinstance(names, str) else list(dict.fromkeys(names))
        self.check(found)
        return found

    def forget(self, names: Iterable[str]) -> None:
        """LoRAs that were taken out of the pipeline."""
        for name in names:
            del self.loras[name]

    def members(self, weights: Mapping[str, float]) -> tuple[Member, ...]:
        """The LoRAs of a call as strategies see them, with what is known about their frequency."""
        found = []
        for name, weight in weights.items():
            lora = self.loras[name]
            member = Member(
                name,
                weight,
                role=lora.role,
                scope=lora.scope,
                category=lora.applied.category,
                triggers=lora.applied.triggers,
            )
            if lora.profile is not None and math.isfinite(lora.profile.frequency):
                member = replace(
                    member,
                    frequency=lora.profile.frequency,
                    window=lora.profile.window,
                    importance=lora.profile.importance,
                )
            found.append(member)
        return tuple(found)

    def schedule(self, said: str | Schedule) -> Schedule:
        """A schedule by the names that LoRAs have here; it may name their files instead.

        Args:
            said: as text, see `cmlora.schedules.parse`, or as an object.

        Raises:
            CmloraError: if the text cannot be read.
        """
        by_file: dict[str, list[str]] = {}
        for name, lora in self.loras.items():
            by_file.setdefault(lora.path.stem, []).append(name)
        tracks: list[Track] = []
        for track in (parse_schedule(said) if isinstance(said, str) else said).tracks:
            known = [track.lora]
            named = known if track.lora in self.loras else by_file.get(track.lora, known)
            tracks += [replace(track, lora=name) for name in named]
        return Schedule(tuple(tracks))

    def run(
        self,
        call: Callable[..., Any],
        prompt: Any = None,
        *args: Any,
        composition: str | Strategy = "cmlora",
        lora_weights: Mapping[str, float] | Sequence[float] | None = None,
        members: Sequence[Member] | None = None,
        cache: str | Policy | None = None,
        cut: Cut | Live | tuple[int, int] | None = None,
        text_encoder: TextEncoder = "all",
        text_weights: Mapping[str, float] | None = None,
        execution: Execution = "sequential",
        lora_scale: float | None = None,
        count_macs: bool = False,
        schedule: str | Schedule = "",
        uncond: Uncond = "per_lora",
        composition_options: Mapping[str, Any] | None = None,
        seed: int | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Make pictures with the pipeline's own `call` while the LoRAs are composed.

        Args:
            call: the pipeline's call.
            prompt: as the pipeline takes it.
            *args: further positional arguments of the pipeline.
            composition: a name from `cmlora.strategies.METHODS`, or a strategy of your own.
            lora_weights: see `weights`.
            members: the same LoRAs described otherwise than by `members`.
            cache: a cache policy such as ``none``, ``uniform:3``, ``nonuniform``; by default
                ``nonuniform`` for cmlora on a model whose features can be reused and ``none``
                otherwise.
            cut: what stays live when features are reused; the family's default if not given.
            text_encoder: how the LoRAs' text encoder parts are used: ``all``, ``none`` or
                ``per_lora``; see `cmlora.compose.compose`.
            text_weights: strengths in the text encoders, where they differ.
            execution: ``sequential``, ``batched``, ``auto`` or ``fused``.
            lora_scale: multiplies the strength of all LoRAs in the denoiser, of any family; in the
                text encoders they keep theirs.
            count_macs: fill ``report.macs``; see `cmlora.compose.compose`.
            schedule: curves that multiply the strengths, see `cmlora.compose.compose`.
            uncond: ``per_lora`` or ``shared``, see `cmlora.compose.compose`.
            composition_options: the method's own options.
            seed: of the call; picture i starts from `cmlora.recipe.image_seed(seed, i)`, the first
                one from the seed itself. Or one seed per picture. A picture depends on its own
                seed only.
            **kwargs: for the pipeline's call.

        Returns:
            The pipeline's output; an output object also has ``report``.

        Raises:
            CmloraError: for an unknown method or option, or LoRAs that are not loaded.
        """
        weights = self.weights(lora_weights)
        if lora_scale is not None:
            spoken = weights if members is None else {m.name: m.weight for m in members}
            text_weights = {**spoken, **(text_weights or {})}
            weights = {name: weight * lora_scale for name, weight in weights.items()}
            if members is not None:
                members = [replace(m, weight=m.weight * lora_scale) for m in members]
        if seed is not None:
            if kwargs.get("generator") is not None:
                raise CmloraError("give either seed or generator, not both")
            kwargs["generator"] = _generators(seed, _pictures(prompt, kwargs))
        with compose(
            self.pipe,
            weights,
            method=composition,
            cache=default_cache(composition, self.pipe, weights) if cache is None else cache,
            cut=cut,
            members=self.members(weights) if members is None else members,
            text_encoder=text_encoder,
            text_weights=text_weights,
            execution=execution,
            count_macs=count_macs,
            schedule=self.schedule(schedule),
            uncond=uncond,
            prompt=_one(prompt, composition, composition_options or {}),
            **composition_options or {},
        ) as active:
            # by name where it can be: the first argument of FLUX.2's pipeline is a picture
            if not args and "prompt" in inspect.signature(call).parameters:
                output = call(prompt=prompt, **kwargs)
            else:
                output = call(prompt, *args, **kwargs)
        self.report = active.report
        if hasattr(output, "to_tuple"):
            output.report = self.report
        return output


def _one(prompt: Any, method: str | Strategy, options: Mapping[str, Any]) -> str | None:
    """The prompt that LoRAs are weighed by, if there is one for all pictures of a call."""
    texts = set(prompt) if isinstance(prompt, list) else {prompt}
    if len(texts) > 1 and isinstance(method, str) and weighs(method, options):
        raise CmloraError(
            f"{method} weighs LoRAs by the prompt, and this call has {len(texts)}; make a call for "
            "each"
        )
    text = next(iter(texts), None)
    return text if isinstance(text, str) else None


def default_cache(method: str | Strategy, pipe: Any, loras: Iterable[str]) -> str:
    """The cache policy a method has with these LoRAs in a pipeline, unless told otherwise."""
    if method != "cmlora" or denoisers.few_steps(pipe, loras) is not None:
        return "none"
    cacheable = (
        type(model).__name__ == "UNet2DConditionModel" or denoisers.kind(model).stacks
        for model in denoisers.find(pipe).values()
    )
    return "nonuniform" if all(cacheable) else "none"


def _check_weight(name: str, weight: float) -> None:
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise CmloraError(f"weight {weight!r} of LoRA {name!r} is not a finite number")


def _pictures(prompt: Any, kwargs: Mapping[str, Any]) -> int:
    """How many pictures a call makes."""
    embeds = kwargs.get("prompt_embeds")
    prompts = len(prompt) if isinstance(prompt, list) else 1 if embeds is None else len(embeds)
    each = kwargs.get("num_images_per_prompt") or kwargs.get("num_videos_per_prompt") or 1
    return prompts * int(each)


def _generators(seed: int | Sequence[int], pictures: int) -> list[torch.Generator]:
    """One CPU generator per picture, so that a picture is the same alone and in a batch."""
    seeds = [image_seed(seed, i) for i in range(pictures)] if isinstance(seed, int) else list(seed)
    if len(seeds) != pictures:
        raise CmloraError(f"{len(seeds)} seeds for {pictures} pictures")
    return [torch.Generator("cpu").manual_seed(each) for each in seeds]
