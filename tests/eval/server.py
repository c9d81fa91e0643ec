"""A local server that speaks the chat-completions protocol and misbehaves on demand."""

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image

Opinion = Callable[[list[Image.Image]], dict[str, dict[str, float]] | str]


@dataclass
class Chat:
    """What the server does.

    Args:
        opinion: of the last two pictures of a conversation; a text is sent as it is.
        trouble: statuses, delays or texts to send first, one per request.
    """

    opinion: Opinion
    trouble: list[Any] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    url: str = ""


@contextmanager
def served(chat: Chat) -> Iterator[Chat]:
    """The server, on a free port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            chat.requests.append(body)
            chat.headers.append(dict(self.headers))
            trouble = chat.trouble.pop(0) if chat.trouble else None
            if isinstance(trouble, float):
                time.sleep(trouble)
            if isinstance(trouble, tuple):
                status, extra = trouble
                self._send(status, b'{"error": "no"}', extra)
                return
            if isinstance(trouble, bytes):
                self._send(200, trouble, {})
                return
            text = trouble if isinstance(trouble, str) else answer(chat.opinion, body)
            message = {"role": "assistant", "content": text}
            usage = {"prompt_tokens": 1000, "completion_tokens": 100}
            reply = {"choices": [{"message": message}], "usage": usage}
            self._send(200, json.dumps(reply).encode(), {})

        def _send(self, status: int, data: bytes, extra: dict[str, str]) -> None:
            try:
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **extra}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)
            except (BrokenPipeError, ConnectionResetError):
                return  # the client did not wait

        def log_message(self, *_: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    chat.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield chat
    finally:
        server.shutdown()
        server.server_close()


def answer(opinion: Opinion, body: dict[str, Any]) -> str:
    said = opinion(images(body))
    return said if isinstance(said, str) else json.dumps(said)


def images(body: dict[str, Any]) -> list[Image.Image]:
    """All pictures of a conversation, in order."""
    found = []
    for message in body["messages"]:
        if isinstance(message["content"], list):
            for part in message["content"]:
                if part["type"] == "image_url":
                    data = part["image_url"]["url"].split(",", 1)[1]
                    found.append(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))
    return found


def brightness(image: Image.Image) -> float:
    return float(np.asarray(image).mean()) / 25.5


def fair(pictures: list[Image.Image], dimensions: tuple[str, ...] = ()) -> Any:
    """Marks a picture by its brightness, wherever it stands."""
    names = dimensions or (
        "element_integration",
        "spatial_consistency",
        "semantic_accuracy",
        "aesthetic_quality",
    )
    marks = [round(brightness(picture), 3) for picture in pictures[-2:]]
    return {
        side: dict.fromkeys(names, mark)
        for side, mark in zip(("first", "second"), marks, strict=True)
    }


def partial(pictures: list[Image.Image], gift: float = 0.8) -> Any:
    """Fair, but for a gift to the picture that is shown first."""
    marks = fair(pictures)
    marks["first"] = {k: min(10.0, v + gift) for k, v in marks["first"].items()}
    return marks
