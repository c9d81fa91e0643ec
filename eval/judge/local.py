"""Any image-text-to-text model of transformers, on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cmlora.errors import CmloraError
from cmlora.eval.judge.backend import Answer, Turn
from cmlora.eval.scorers.scorer import missing


class LocalJudge:
    """A vision-language model that answers greedily, so that equal questions get equal answers.

    Args:
        model: folder or hub id, for example of a Qwen-VL, LLaVA or MiniCPM-V.
        device: where to compute; the CPU if not given.
        dtype: of the weights, by its name in torch; ``auto`` is the file's own.
        max_tokens: of an answer.
        trust_remote_code: let the model bring code of its own, which runs with all your rights;
            some models work only so.

    Raises:
        CmloraError: if the model is missing, or is of another kind.
    """

    def __init__(
        self,
        model: str,
        *,
        device: str | None = None,
        dtype: str = "auto",
        max_tokens: int = 512,
        trust_remote_code: bool = False,
    ) -> None:
        self._processor, self._model = _loaded(model, dtype, trust_remote_code)
        self._model.to(torch.device(device or "cpu")).eval()
        self._max_tokens = max_tokens
        commit = getattr(self._model.config, "_commit_hash", None) or ""
        self.name = f"{Path(model).name} {commit[:12]}".strip()

    @torch.no_grad()
    def ask(self, turns: Sequence[Turn]) -> Answer:
        """The model's next turn, without sampling."""
        inputs = self._processor.apply_chat_template(
            [_message(turn) for turn in turns],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self._model.device)
        floats = {k: v for k, v in inputs.items() if v.is_floating_point()}
        inputs.update({k: v.to(self._model.dtype) for k, v in floats.items()})
        # greedy, whatever the model's own settings for sampling are
        written = self._model.generate(
            **inputs, max_new_tokens=self._max_tokens, do_sample=False, num_beams=1
        )
        asked = inputs["input_ids"].shape[1]
        text = self._processor.batch_decode(written[:, asked:], skip_special_tokens=True)[0]
        return Answer(text, asked, written.shape[1] - asked)


def _message(turn: Turn) -> dict[str, Any]:
    content: list[dict[str, Any]] = [{"type": "image", "image": i} for i in turn.images]
    return {"role": turn.role, "content": [*content, {"type": "text", "text": turn.text}]}


def _loaded(model: str, dtype: str, trust: bool) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    precision = dtype if dtype == "auto" else getattr(torch, dtype, None)
    if not (precision == "auto" or isinstance(precision, torch.dtype)):
        raise CmloraError(f"judge: torch has no dtype {dtype!r}")
    try:
        processor = AutoProcessor.from_pretrained(model, trust_remote_code=trust)
        loaded = AutoModelForImageTextToText.from_pretrained(
            model, dtype=precision, use_safetensors=True, trust_remote_code=trust
        )
    except Exception as failure:  # transformers and the hub have many
        if "trust_remote_code" in str(failure):
            raise CmloraError(
                f"judge: {model} brings code of its own, which would run with all your rights; "
                "--trust-remote-code allows it"
            ) from failure
        raise missing("judge", model, failure, f"hf download {model}") from failure
    if getattr(processor, "chat_template", None) is None:
        raise CmloraError(f"judge: {model} has no chat template, so it cannot be asked")
    return processor, loaded
