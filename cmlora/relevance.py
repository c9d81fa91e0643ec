"""How much a prompt speaks of each LoRA, by the text encoder's own measure (arXiv 2606.03792)."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from cmlora.errors import CmloraError
from cmlora.plan import Member

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["like_prompt", "without_triggers"]

Embed = Callable[[Sequence[str]], "Tensor"]
"""Texts to one vector each, (n, d)."""

KINDS: Mapping[str, Kind] = {
    "w_switch": "without_triggers",
    "w_composite": "like_prompt",
    "select": "like_prompt",
}
"""The measure each method is used with."""


def like_prompt(
    prompt: str, triggers: Mapping[str, Sequence[str]], embed: Embed
) -> dict[str, float]:
    """How much each LoRA's trigger words are like the prompt: max(0, cos(E(triggers), E(prompt))).

    Args:
        prompt: the prompt.
        triggers: trigger words by LoRA; a LoRA without any is left out of the result.
        embed: the text encoder.
    """
    spoken = {name: ", ".join(words) for name, words in triggers.items() if words}
    if not spoken:
        return {}
    whole, *parts = embed([prompt, *spoken.values()]).double()
    return {name: max(0.0, _cosine(whole, part)) for name, part in zip(spoken, parts, strict=True)}


def without_triggers(
    prompt: str, triggers: Mapping[str, Sequence[str]], embed: Embed
) -> dict[str, float]:
    """How far the prompt moves without each LoRA's trigger words: 1 - cos(E(prompt), E(rest)).

    Args:
        prompt: the prompt.
        triggers: trigger words by LoRA; a LoRA without any is left out of the result, one none of
            whose words are in the prompt has 0.
        embed: the text encoder.
    """
    rests = {name: without(prompt, words) for name, words in triggers.items() if any(words)}
    said = {name: rest for name, rest in rests.items() if rest != prompt}
    if not said:
        return dict.fromkeys(rests, 0.0)
    whole, *parts = embed([prompt, *said.values()]).double()
    moved = {n: max(0.0, 1 - _cosine(whole, part)) for n, part in zip(said, parts, strict=True)}
    return {name: moved.get(name, 0.0) for name in rests}


def without(prompt: str, phrases: Sequence[str]) -> str:
    """A prompt without some phrases, whatever their case.

    >>> without("a Zorbo, brown bird, on grass", ["zorbo", "brown bird"])
    'a, on grass'
    """
    rest = prompt
    for phrase in sorted(filter(None, map(str.strip, phrases)), key=len, reverse=True):
        rest = re.sub(rf"(?<!\w){re.escape(phrase)}(?!\w)", "", rest, flags=re.IGNORECASE)
    if rest == prompt:
        return prompt
    parts = (" ".join(part.split()) for part in rest.split(","))
    return ", ".join(part for part in parts if part)


def relevances(
    kind: Kind, prompt: str, triggers: Mapping[str, Sequence[str]], embed: Embed
) -> dict[str, float]:
    """One of the two measures by its name."""
    measure = like_prompt if kind == "like_prompt" else without_triggers
    return measure(prompt, triggers, embed)


def weighs(method: str, options: Mapping[str, Any]) -> bool:
    """Whether a method, with these options, weighs LoRAs by the prompt."""
    return method in KINDS and (method != "select" or bool(options.get("prior")))


def warn_unless_weighed(method: str, options: Mapping[str, Any], members: Sequence[Member]) -> None:
    """Say so where a method that weighs LoRAs by the prompt has nothing to go by."""
    if weighs(method, options) and len(members) > 1 and all(m.relevance is None for m in members):
        warnings.warn(
            f"{method}: nothing says how much the prompt speaks of each LoRA, so all count alike; "
            "give prompt= and, unless the LoRAs' files name them, triggers=",
            stacklevel=3,
        )


def weighed(
    pipe: Any, method: str, options: Mapping[str, Any], prompt: str, members: Sequence[Member]
) -> tuple[Member, ...]:
    """The members with the relevance that a method asks for, where the user gave none.

    The text encoder is used without LoRAs.

    Args:
        pipe: a diffusers pipeline.
        method: name of a composition method.
        options: of the method; `cmlora.strategies.select` asks only if its prior is not 0.
        prompt: the prompt.
        members: the LoRAs; what is measured of them are their trigger words.

    Raises:
        CmloraError: if the pipeline has no text encoder to measure with.
    """
    open_ones = {m.name: m.triggers for m in members if m.relevance is None and m.triggers}
    if not open_ones or not weighs(method, options):
        return tuple(members)
    from cmlora.switching import AdapterSwitch

    embed = embedder(pipe)
    switch = AdapterSwitch(pipe.text_encoder)
    before = switch.snapshot()
    switch.activate({})
    try:
        found = relevances(KINDS[method], prompt, open_ones, embed)
    finally:
        switch.restore(before)
    return tuple(
        replace(m, relevance=found[m.name]) if m.name in found and m.relevance is None else m
        for m in members
    )


def embedder(pipe: Any) -> Embed:
    """A pipeline's first text encoder as a function of texts; LoRAs act in it as they are set.

    Args:
        pipe: a diffusers pipeline with a tokenizer and a text encoder.

    Raises:
        CmloraError: if it has none.
    """
    tokenizer, encoder = getattr(pipe, "tokenizer", None), getattr(pipe, "text_encoder", None)
    if tokenizer is None or encoder is None:
        raise CmloraError(
            f"{type(pipe).__name__} has no tokenizer and text encoder to weigh a prompt with; "
            "leave the prompt out"
        )

    def embed(texts: Sequence[str]) -> Tensor:
        import torch

        tokens = tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=min(tokenizer.model_max_length, 512),
            return_tensors="pt",
        )
        with torch.no_grad():
            output = encoder(tokens.input_ids.to(encoder.device))
        for name in ("text_embeds", "pooler_output"):
            pooled: Tensor | None = getattr(output, name, None)
            if pooled is not None:
                return pooled.float()
        mask = tokens.attention_mask.to(encoder.device)[..., None]
        states: Tensor = output.last_hidden_state.float()
        means: Tensor = (states * mask).sum(1) / mask.sum(1)
        return means

    return embed


def _cosine(one: Tensor, other: Tensor) -> float:
    lengths = float(one.norm() * other.norm())
    return float(one @ other) / lengths if lengths else 0.0
