"""The command behind `cmlora ui` and `python -m cmlora.ui`."""

import os
import signal
import threading
import webbrowser
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cmlora.errors import CmloraError


def ui(
    model: Annotated[
        list[Path] | None,
        typer.Option(help="A diffusers folder, a .safetensors file, or a folder of such; again."),
    ] = None,
    loras: Annotated[
        list[Path] | None, typer.Option(help="A folder of LoRA files; may be repeated.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where pictures go; nothing else is written.")] = Path(
        "cmlora-pictures"
    ),
    hub: Annotated[
        bool, typer.Option("--hub", help="Let the page load models from the hub by name.")
    ] = False,
    config: Annotated[
        Path | None,
        typer.Option(help="For .safetensors models: a diffusers folder of their family."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or mps; cpu if empty.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16.")] = None,
    port: Annotated[int | None, typer.Option(help="The first free one from 7860 if empty.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    share: Annotated[
        bool, typer.Option("--share", help="Make a public link through gradio's servers.")
    ] = False,
    auth: Annotated[str, typer.Option(help="NAME:PASSWORD that visitors need.")] = "",
    browser: Annotated[
        bool, typer.Option("--browser/--no-browser", help="Open the page in a browser.")
    ] = True,
) -> None:
    """Compose, compare, understand and judge in the browser.

    Example: [bold]cmlora ui --loras ~/loras --model ~/models/sd15[/bold]
    """
    # before torch is loaded: the browser shares the processors, waiting threads must not spin
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if port is not None and not 0 < port < 65536:
        raise CmloraError(f"--port {port}: expected 1 to 65535")
    starting = Console(stderr=True).status("starting the page")
    with starting:
        from cmlora.ui.launch import absolute, serving
        from cmlora.ui.settings import Settings, read_auth

    settings = Settings(
        models=absolute(model or []),
        loras=absolute(loras or []),
        out=out.expanduser().absolute(),
        hub=hub,
        host=host,
        port=port,
        share=share,
        auth=read_auth(auth),
        device=device,
        dtype=dtype,
        config=config,
    )
    if settings.warning():
        typer.echo(f"warning: {settings.warning()}", err=True)
    with ExitStack() as until_the_end:
        with starting:
            server = until_the_end.enter_context(serving(settings))
        for address in filter(None, (server.url, server.share_url)):
            typer.echo(address)
        typer.echo(f"pictures go to {settings.out}; Ctrl-C ends the server", err=True)
        if browser:
            webbrowser.open(server.url)
        # a service manager's way to end it cleans up as Ctrl-C does
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            typer.echo("", err=True)
        finally:
            signal.signal(signal.SIGTERM, before)
