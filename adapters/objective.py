"""What learned methods are after: a number that says how far a LoRA is from doing its work.

An objective has two faces. Its loss is a tensor through which gradients may flow, for methods that
follow them; its value is the same as a plain number, for methods that search. Inputs and noise are
fixed when it is made, so that equal LoRAs have equal losses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cmlora.adapters.applied import applied
from cmlora.errors import CmloraError
from cmlora.lora import LoRA


class Objective(Protocol):
    """What every objective is."""

    @property
    def component(self) -> str:
        """The part of the pipeline that is learnt."""

    @property
    def differentiable(self) -> bool:
        """Whether gradients flow through the loss."""

    def loss(self, lora: LoRA) -> Tensor:
        """Of a LoRA; smaller is better."""

    def value(self, lora: LoRA | None) -> float:
        """The loss as a number; with ``None`` of the model alone."""


@dataclass(frozen=True)
class Question:
    """One call of a denoiser and the answer that is wanted.

    Args:
        arguments: of the call, by name.
        wanted: (B, C, H, W), or whatever the denoiser puts out.
        size: mean square that the error is divided by.
        asks: the LoRA whose own answer is wanted; empty if it is nobody's.
    """

    arguments: Mapping[str, Any]
    wanted: Tensor
    size: float = 1.0
    asks: str = ""


@dataclass(frozen=True)
class Answers:
    """Mean squared error over questions to a denoiser.

    Args:
        model: the denoiser, without active LoRAs.
        component: its name in the pipeline; other parts of a LoRA have no influence.
        questions: one or more.
        differentiable: gradients flow through the denoiser.
    """

    model: nn.Module
    component: str
    questions: Sequence[Question]
    differentiable: bool = True

    def loss(self, lora: LoRA | None) -> Tensor:
        """The mean over the questions; with ``None`` of the model alone.

        Raises:
            CmloraError: if there is no question, or the LoRA does not fit the model.
        """
        if not self.questions:
            raise CmloraError("an objective needs a question")
        updates = {} if lora is None else lora.parts.get(self.component, {})
        losses = []
        with applied(self.model, updates):
            for question in self.questions:
                found = answer(self.model, question.arguments)
                gap = (found - question.wanted).square().mean()
                losses.append(gap / question.size)
        return torch.stack(losses).mean()

    def value(self, lora: LoRA | None) -> float:
        """The loss as a number."""
        with torch.no_grad():
            return float(self.loss(lora))


def answer(model: nn.Module, arguments: Mapping[str, Any]) -> Tensor:
    """The raw output of a denoiser, in single precision."""
    # UNets pop residuals from the lists they are given, so every call gets its own.
    own = {name: list(v) if isinstance(v, list) else v for name, v in arguments.items()}
    output = model(**own)
    first = output[0] if isinstance(output, tuple) else output.sample
    assert isinstance(first, Tensor)
    return first.float()
