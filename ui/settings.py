"""What a server was told on its command line, and the bounds that hold for every request."""

from dataclasses import dataclass, field
from pathlib import Path

from cmlora.errors import CmloraError

LOCAL = "127.0.0.1"
"""The only address that is listened on unless another one is asked for."""


@dataclass(frozen=True)
class Limits:
    """The most that one request may ask for; checked on the server, whoever asks.

    Args:
        side: pixels of a picture's longer side.
        steps: denoising steps.
        pictures: of one batch.
        cells: pictures of one comparison.
        loras: in one picture.
        prompt: letters of a prompt.
        strength: largest absolute strength of a LoRA.
        guidance: largest guidance scale.
        threads: of the processor that a recipe may ask for.
        png: bytes of a picture that is dropped to be made again.
        upload: bytes of any file that is sent.
        waiting: requests in the queue.
    """

    side: int = 1536
    steps: int = 150
    pictures: int = 8
    cells: int = 64
    loras: int = 24
    prompt: int = 4000
    strength: float = 10.0
    guidance: float = 50.0
    threads: int = 64
    png: int = 32 * 2**20
    upload: int = 1024 * 2**20
    waiting: int = 64


@dataclass(frozen=True)
class Settings:
    """How a server runs.

    Args:
        models: diffusers folders, ``.safetensors`` files, or folders that hold some; the first
            one is preselected. The embedded model is always among them if it is installed.
        loras: folders that LoRAs are picked from.
        out: the one folder that is written to.
        hub: let the page load models from the hub by name.
        host: address to listen on.
        port: to listen on; ``None`` is the first free one from 7860.
        share: make a public link.
        auth: user name and password that a visitor needs.
        device: where to compute.
        dtype: of a model's weights.
        config: for models in a single file, a diffusers folder of their family.
        limits: bounds of a request.
    """

    models: tuple[Path, ...] = ()
    loras: tuple[Path, ...] = ()
    out: Path = Path("cmlora-pictures")
    hub: bool = False
    host: str = LOCAL
    port: int | None = None
    share: bool = False
    auth: tuple[str, str] | None = None
    device: str | None = None
    dtype: str | None = None
    config: Path | None = None
    limits: Limits = field(default_factory=Limits)

    @property
    def open_to_others(self) -> bool:
        """Whether anybody but this machine's users may reach the page."""
        return self.share or self.host not in (LOCAL, "localhost", "::1")

    def warning(self) -> str:
        """What to say before a page that others reach without a password; empty if all is well."""
        if not self.open_to_others or self.auth is not None:
            return ""
        door = "a public link" if self.share else f"everybody who reaches {self.host}"
        return (
            f"{door} can use this machine, its models and its LoRAs without a password; "
            "protect it with --auth NAME:PASSWORD"
        )


def read_auth(text: str) -> tuple[str, str] | None:
    """User name and password from ``NAME:PASSWORD``.

    Raises:
        CmloraError: if one of them is missing; the text itself is not repeated.

    >>> read_auth("me:secret:with:colons")
    ('me', 'secret:with:colons')
    """
    if not text:
        return None
    name, sign, password = text.partition(":")
    if not (name and sign and password):
        raise CmloraError("--auth: expected NAME:PASSWORD")
    return name, password


def embedded_available() -> bool:
    """Whether the embedded model's weights are in this installation."""
    from cmlora.emoji import weights

    return weights.available()
