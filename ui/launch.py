"""From settings to a running server, and what has to be cleaned up behind it."""

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmlora.errors import CmloraError
from cmlora.ui.libraries import uncollected, unstubbed
from cmlora.ui.look import ASSETS, head, theme
from cmlora.ui.settings import Settings
from cmlora.ui.studio import Studio

_TEMPORARY = ".temporary"
_SMALL = 128  # pixels up to which a model is tried before anybody asks


@dataclass(frozen=True)
class Server:
    """A running server.

    Args:
        url: where the page is.
        share_url: the public link; empty if there is none.
        studio: its models and LoRAs.
        page: the gradio blocks.
    """

    url: str
    share_url: str
    studio: Studio
    page: Any


@contextmanager
def serving(settings: Settings, *, preload: bool = True) -> Iterator[Server]:
    """A server for the time of the block; its temporary files are gone afterwards.

    Args:
        settings: see `cmlora.ui.settings.Settings`.
        preload: load the first model while nobody has asked for it yet.

    Raises:
        CmloraError: if gradio is missing, a folder is not there, or the port is taken.
    """
    _check_folders(settings)
    temporary = settings.out.absolute() / _TEMPORARY
    shutil.rmtree(temporary, ignore_errors=True)  # of a server that was killed
    try:
        temporary.mkdir(parents=True)
    except OSError as failure:
        raise CmloraError(f"cannot write to {settings.out}: {failure.strerror}") from None
    wanted = {
        "GRADIO_TEMP_DIR": str(temporary),
        "GRADIO_ANALYTICS_ENABLED": "False",
        # gradio sums all of its events up after each of them, which took a fifth of the server's
        # time
        "GRADIO_ANALYTICS_CACHE_FREQUENCY": str(10**9),
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        page, studio = _page(settings)
        _, url, share_url = _launch(page, settings)
        if preload:
            threading.Thread(target=_preload, args=(studio,), daemon=True).start()
        try:
            yield Server(url, share_url or "", studio, page)
        finally:
            studio.tickets.stop_all()
            page.close(verbose=False)
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        shutil.rmtree(temporary, ignore_errors=True)


def _check_folders(settings: Settings) -> None:
    for kind, folders in (("--model", settings.models), ("--loras", settings.loras)):
        for folder in folders:
            if not folder.expanduser().exists():
                raise CmloraError(f"{kind} {folder}: there is no such file or folder")
    if settings.out.exists() and not settings.out.is_dir():
        raise CmloraError(f"--out {settings.out} is a file; name a folder")


def _page(settings: Settings) -> tuple[Any, Studio]:
    try:
        with uncollected(), unstubbed():
            import gradio  # noqa: F401
    except ImportError:
        raise CmloraError("the page needs gradio: pip install 'cmlora[ui]'") from None
    with uncollected():
        from cmlora.ui.app import build

    studio = Studio(settings)
    return build(studio), studio


def _launch(page: Any, settings: Settings) -> tuple[Any, str, str | None]:
    page.queue(default_concurrency_limit=1, max_size=settings.limits.waiting)
    try:
        launched: tuple[Any, str, str | None] = page.launch(
            server_name=settings.host,
            server_port=settings.port,
            share=settings.share,
            auth=settings.auth,
            prevent_thread_lock=True,
            quiet=True,
            show_error=True,
            max_file_size=settings.limits.upload,
            allowed_paths=[str(settings.out.absolute())],
            blocked_paths=[],
            strict_cors=True,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            run_history=False,
            footer_links=["api"],
            theme=theme(),
            css_paths=[ASSETS / "page.css"],
            head=head(),
        )
    except OSError as failure:
        raise CmloraError(f"cannot listen on {settings.host}: {failure}") from None
    return launched


def _preload(studio: Studio) -> None:
    """Have the first model ready; whoever asks for a picture hears of problems."""
    name = studio.default_model()
    try:
        if name:
            studio.preload(name)
            if not studio.tickets.held:
                _warm_up(studio, name)
    except Exception:  # said again, with its reason, by the first request
        return


def _warm_up(studio: Studio, name: str) -> None:
    """Two steps of a small model: what is set up once is, and the machine's pace is known."""
    from cmlora.ui.actions import complete, paint, recipe_of
    from cmlora.ui.jobs import Clock, Ticket
    from cmlora.ui.natives import natives
    from cmlora.ui.order import Order

    size = natives(studio, name).size
    if size is None or max(size) > _SMALL:
        return
    order = complete(studio, Order(name, prompt="a", method="naive", steps=2))
    with studio.pipeline(name, {}) as pipe:
        folder = studio.settings.out / _TEMPORARY
        recipe = recipe_of(pipe, order, Ticket(), _ignore, folder)
        paint(studio, pipe, recipe, Ticket(), _ignore, Clock(2), folder=folder)


def _ignore(_: object) -> None:
    """Nobody is told."""


def absolute(paths: list[Path]) -> tuple[Path, ...]:
    """The paths independent of the working folder."""
    return tuple(path.expanduser().absolute() for path in paths)
