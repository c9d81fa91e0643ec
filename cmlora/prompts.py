"""Prompts as every LoRA's own text encoders read them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from cmlora.errors import CmloraError
from cmlora.switching import AdapterSwitch

Names = tuple[str, ...]


class _Whole(NamedTuple):
    """An argument that is one of the embeddings as it is."""

    tensor: int


class _Row(NamedTuple):
    """A row of an argument that is a row of one of the embeddings."""

    tensor: int
    row: int


class _Encoded(NamedTuple):
    """A call of ``encode_prompt`` and the embeddings it gave, by the LoRAs that acted."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    known: dict[Names, list[torch.Tensor]]


_Matches = Sequence[_Whole | _Row | None]
_REMEMBERED = 8


class Prompts:
    """Encodes a pipeline's prompts once per set of LoRAs, and exchanges them per pass.

    The pipeline calls its own ``encode_prompt`` and gets the embeddings that all the LoRAs
    together make. It repeats, concatenates and casts them as it likes; in the denoiser's
    arguments they are found again row by row, and replaced by the same rows of the embeddings that
    the LoRAs of the pass alone make.

    Args:
        pipe: a pipeline with ``encode_prompt``.
        switches: of its text encoders.
        weights: strength of every LoRA in the text encoders.

    Raises:
        CmloraError: if the pipeline encodes its prompts in another way.
    """

    def __init__(
        self, pipe: Any, switches: Sequence[AdapterSwitch], weights: Mapping[str, float]
    ) -> None:
        if not callable(getattr(pipe, "encode_prompt", None)):
            raise CmloraError(
                f"text_encoder='per_lora': {type(pipe).__name__} has no encode_prompt; "
                "use 'all' or 'none'"
            )
        self._pipe = pipe
        self._switches = switches
        self._weights = weights
        self._spoken = {name for switch in switches for name in switch.names} & set(weights)
        self._original: Callable[..., Any] | None = None
        self.forget()

    def attach(self) -> None:
        """Listen to the pipeline's ``encode_prompt``."""
        self._original = self._pipe.encode_prompt
        self._own = "encode_prompt" in vars(self._pipe)
        vars(self._pipe)["encode_prompt"] = self._encode

    def detach(self) -> None:
        """Leave the pipeline as it was."""
        if self._original is not None:
            if self._own:
                vars(self._pipe)["encode_prompt"] = self._original
            else:
                vars(self._pipe).pop("encode_prompt", None)
            self._original = None
        self.forget()

    def forget(self) -> None:
        """Drop all embeddings."""
        self._calls: list[_Encoded] = []
        self._matches: dict[tuple[str, int], tuple[torch.Tensor, _Matches]] = {}
        self._used = False

    def arguments(self, names: Sequence[str], given: Mapping[str, Any]) -> dict[str, Any]:
        """The denoiser's arguments for a pass.

        Args:
            names: the LoRAs of the pass.
            given: what the pipeline calls the denoiser with.

        Raises:
            CmloraError: if the prompts' embeddings are not among them.
        """
        self._used = True
        key = self._key(names)
        if not self._calls or key == self._key(self._weights):
            return dict(given)
        self._found = False
        exchanged = {name: self._replace(name, value, key) for name, value in given.items()}
        if not self._found:
            raise CmloraError(
                f"text_encoder='per_lora': {type(self._pipe).__name__} changes its embeddings "
                "before the denoiser gets them; use 'all' or 'none'"
            )
        return exchanged

    def _key(self, names: Sequence[str] | Mapping[str, Any]) -> Names:
        """LoRAs without a part in the text encoders make no difference."""
        return tuple(sorted(self._spoken.intersection(names)))

    def _encode(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the pipeline's ``encode_prompt``."""
        assert self._original is not None
        # who gives embeddings that were made before still needs that call
        if self._used and next(_tensors([*args, *kwargs.values()]), None) is None:
            self.forget()
        everybody = self._key(self._weights)
        result = self._speak(everybody, args, kwargs)
        self._calls.append(_Encoded(args, kwargs, {everybody: list(_tensors(result))}))
        del self._calls[:-_REMEMBERED]
        self._matches.clear()
        return result

    def _embeddings(self, key: Names) -> list[torch.Tensor]:
        """What the text encoders make of the prompts with these LoRAs."""
        for call in self._calls:
            if key not in call.known:
                result = self._speak(key, call.args, call.kwargs)
                call.known[key] = list(_tensors(result))
        return [tensor for call in self._calls for tensor in call.known[key]]

    @torch.no_grad()
    def _speak(self, key: Names, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert self._original is not None
        everybody = self._key(self._weights)
        try:
            for switch in self._switches:
                switch.activate({name: self._weights[name] for name in key})
            return self._original(*args, **kwargs)
        finally:
            for switch in self._switches:
                switch.activate({name: self._weights[name] for name in everybody})

    def _replace(self, name: str, value: Any, key: Names) -> Any:
        if isinstance(value, dict):
            return {k: self._replace(f"{name}.{k}", v, key) for k, v in value.items()}
        if isinstance(value, list):
            return [self._replace(f"{name}.{i}", v, key) for i, v in enumerate(value)]
        if not isinstance(value, torch.Tensor) or value.ndim == 0:
            return value
        found = self._find(name, value)
        if not any(match is not None for match in found):
            return value
        self._found = True
        own = self._embeddings(key)
        if isinstance(found[0], _Whole):
            return own[found[0].tensor].to(value)
        parts = [
            own[match.tensor][match.row].to(row) if isinstance(match, _Row) else row
            for row, match in zip(value, found, strict=True)
        ]
        return torch.stack(parts)

    def _find(self, name: str, value: torch.Tensor) -> _Matches:
        """Which embedding an argument is, or each of its rows."""
        seen = self._matches.get((name, id(value)))
        if seen is not None:  # it is held, so that its id is nobody else's
            return seen[1]
        references = self._embeddings(self._key(self._weights))
        whole = [_Whole(i) for i, each in enumerate(references) if _same(value, each)]
        found: _Matches = whole[:1] or [_row(row, references) for row in value]
        if any(match is not None for match in found):
            self._matches[name, id(value)] = (value, found)
        return found


def _row(row: torch.Tensor, references: Sequence[torch.Tensor]) -> _Row | None:
    """Where a row is found first."""
    for number, tensor in enumerate(references):
        if tensor.shape[1:] == row.shape:
            for position, other in enumerate(tensor):
                if _same(row, other):
                    return _Row(number, position)
    return None


def _same(value: torch.Tensor, reference: torch.Tensor) -> bool:
    """Equal, after the cast that a pipeline makes."""
    return value.shape == reference.shape and torch.equal(value, reference.to(value))


def _tensors(result: Any) -> Iterator[torch.Tensor]:
    """The tensors in what ``encode_prompt`` returns, in order."""
    if isinstance(result, torch.Tensor):
        if result.ndim:
            yield result
    elif isinstance(result, list | tuple):
        for each in result:
            yield from _tensors(each)
