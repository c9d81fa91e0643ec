"""Any server that speaks the chat-completions protocol: OpenAI's, vLLM's, llama.cpp's, ..."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from cmlora.errors import CmloraError
from cmlora.eval.judge.backend import Answer, Turn

RETRIED = (408, 409, 425, 429, 500, 502, 503, 504, 529)
LONGEST = 120.0
"""Never wait longer than this between two attempts, in seconds."""


@dataclass(frozen=True)
class Limits:
    """How a server is treated.

    Args:
        attempts: tries per question.
        timeout: seconds to wait for an answer.
        backoff: seconds after the first failure; doubled after each further one.
        per_minute: questions at most; 0 for no limit.
        max_tokens: of an answer.
        budget: stop when this much has been spent; 0 for no limit.
    """

    attempts: int = 6
    timeout: float = 120.0
    backoff: float = 1.0
    per_minute: float = 0.0
    max_tokens: int = 512
    budget: float = 0.0


@dataclass
class Spent:
    """What a judge has used so far.

    Args:
        requests: that were sent, failed ones included.
        retries: of them, those after a failure.
        tokens_in: tokens read.
        tokens_out: tokens written.
        cost: by the prices given.
    """

    requests: int = 0
    retries: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float = 0.0


@dataclass
class HttpJudge:
    """A model behind an OpenAI-compatible endpoint.

    Args:
        base_url: up to and without ``/chat/completions``.
        model: as the server calls it.
        key: of the account; empty sends none.
        prices: of a million tokens read and written.
        limits: retries, rate and budget.
        extra: further fields of the request.
        clock: seconds that only grow; for tests.
        sleep: waits; for tests.

    Raises:
        CmloraError: if the address is not one of http.
    """

    base_url: str
    model: str
    key: str = field(default="", repr=False)
    prices: tuple[float, float] = (0.0, 0.0)
    limits: Limits = field(default_factory=Limits)
    extra: Mapping[str, Any] = field(default_factory=dict)
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    spent: Spent = field(default_factory=Spent)

    def __post_init__(self) -> None:
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise CmloraError(f"--base-url {self.base_url!r}: expected http(s)://host[:port]/v1")
        self._last = -1e9
        self._open = urllib.request.build_opener(_NoRedirect).open

    @property
    def name(self) -> str:
        """The model and the server's host."""
        return f"{self.model} at {urlsplit(self.base_url).hostname}"

    def ask(self, turns: Sequence[Turn]) -> Answer:
        """The model's next turn; failures of server and network are waited out.

        Raises:
            CmloraError: if the server refuses, does not answer in time at any attempt, or the
                budget is used up.
        """
        if self.limits.budget and self.spent.cost >= self.limits.budget:
            raise CmloraError(
                f"judge: the budget of {self.limits.budget:g} is used up "
                f"({self.spent.cost:.2f} spent); what was judged is kept"
            )
        body = json.dumps(
            {
                "model": self.model,
                "messages": [_message(turn) for turn in turns],
                "temperature": 0,
                "max_tokens": self.limits.max_tokens,
                **self.extra,
            }
        ).encode()
        reason = ""
        for attempt in range(self.limits.attempts):
            if attempt:
                self.spent.retries += 1
            self._wait_for_rate()
            try:
                return self._read(self._post(body))
            except _Passing as failure:
                reason = str(failure)
                if attempt + 1 < self.limits.attempts:
                    growing = self.limits.backoff * 2**attempt
                    self.sleep(min(LONGEST, growing if failure.wait is None else failure.wait))
        raise CmloraError(
            f"judge: {self.name} gave no answer in {self.limits.attempts} attempts ({reason})"
        )

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        address = f"{self.base_url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(address, body, headers, method="POST")
        self.spent.requests += 1
        try:
            with self._open(request, timeout=self.limits.timeout) as response:
                data: bytes = response.read()
                return data
        except urllib.error.HTTPError as error:
            said = error.read(2000).decode(errors="replace")
            if error.code in RETRIED:
                raise _Passing(f"HTTP {error.code}", _seconds(error.headers)) from None
            hint = {401: "; is the key right?", 404: "; is the address right?"}.get(error.code, "")
            said = " ".join(said.replace(self.key or "\0", "***").split())[:200]
            raise CmloraError(f"judge: {address} says HTTP {error.code}{hint} {said}") from None
        except (OSError, http.client.HTTPException) as error:
            raise _Passing(f"{type(error).__name__}: {getattr(error, 'reason', error)}") from None

    def _read(self, data: bytes) -> Answer:
        try:
            table = json.loads(data)
            message = table["choices"][0]["message"]
            content = message.get("content")
            if isinstance(content, list):
                content = "".join(part.get("text", "") for part in content)
            text = content or message.get("refusal") or ""
            usage = table.get("usage") or {}
            read, wrote = usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise _Passing("what came back is not of the protocol") from None
        cost = (read * self.prices[0] + wrote * self.prices[1]) / 1e6
        self.spent.tokens_in += read
        self.spent.tokens_out += wrote
        self.spent.cost += cost
        return Answer(str(text), read, wrote, cost)

    def _wait_for_rate(self) -> None:
        if self.limits.per_minute:
            pause = self._last + 60 / self.limits.per_minute - self.clock()
            if pause > 0:
                self.sleep(pause)
            self._last = self.clock()


def key_from(variable: str) -> str:
    """The account's key from the environment; empty if the variable is not set."""
    return os.environ.get(variable, "")


class _Passing(Exception):
    """A failure that another attempt may not have."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The key goes to the address that was named and nowhere else."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        """Refuses; the caller sees the status."""


def _seconds(headers: Any) -> float | None:
    """What the server asks to wait, if it says so in seconds."""
    try:
        return max(0.0, float(headers.get("Retry-After", "")))
    except (ValueError, TypeError):
        return None


def _message(turn: Turn) -> dict[str, Any]:
    if not turn.images:
        return {"role": turn.role, "content": turn.text}
    shown = [{"type": "image_url", "image_url": {"url": _uri(image)}} for image in turn.images]
    return {"role": turn.role, "content": [*shown, {"type": "text", "text": turn.text}]}


def _uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
