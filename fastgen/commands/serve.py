"""fastgen serve: one model behind a port."""

from __future__ import annotations

import asyncio
import math
import socket
from typing import Any

import click

from fastgen import extras
from fastgen.commands.models import load, run_options
from fastgen.commands.say import clear_errors, say

MEMORY = "a quarter of the machine's memory"


@click.command()
@click.argument("model", required=False)
@click.option("--host", default="127.0.0.1", show_default=True, help="address to listen at")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535),
              help="port to listen at; 0 for any that is free")  # fmt: skip
@click.option("--api-key", envvar="FASTGEN_API_KEY", help="that clients must send [env: "
              "FASTGEN_API_KEY]")  # fmt: skip
@run_options
@click.option("--name", help="what clients see the model called [default: its own name]")
@click.option(
    "--rows", type=click.IntRange(1), help="rows that run together, at most [default: 64]"
)
@click.option("--memory", type=float, help=f"GB that calls may come to hold [default: {MEMORY}]")
@click.option("--queue", type=click.IntRange(1),
              help="requests that may wait; more are told 429 [default: 256]")  # fmt: skip
@click.option("--grace", default=30.0, show_default=True,
              help="seconds that what runs has to finish, once told to stop")  # fmt: skip
@click.option("--cors", help="an origin whose pages may call from a browser, * for all")
def serve(
    model: str | None, host: str, port: int, api_key: str | None, threads: int | None,
    prompts: str | None,
    name: str | None, rows: int | None, memory: float | None, queue: int | None, grace: float,
    cors: str | None,
) -> None:  # fmt: skip
    """Serve MODEL, a directory or a hub id (default: the embedded demo model), over HTTP.

    The API is OpenAI's: /v1/completions, /v1/chat/completions, /v1/models; every knob is a field
    besides. At / there is a page to try it, at /docs the API, at /metrics what Prometheus reads.

    SIGTERM and Ctrl-C let what runs finish; a second one ends at once.
    """
    with clear_errors():
        try:
            from fastgen.serve.server import Server
        except ImportError as error:
            raise ValueError(
                f"serving needs FastAPI and others: {extras.install('serve')} ({error})"
            ) from error
        from fastgen.serve import app

        if not 0 <= grace < math.inf:
            raise ValueError(f"--grace must be a number of seconds, got {grace}")
        if memory is not None and not 0 < memory < math.inf:
            raise ValueError(f"--memory must be a positive number of GB, got {memory}")
        if api_key is not None and not (api_key.strip() and api_key.isascii()):
            raise ValueError("--api-key must be a text of ASCII characters")
        settings: dict[str, Any] = {"max_rows": rows, "queue": queue}
        settings["max_bytes"] = None if memory is None else int(memory * 1e9)
        given = {key: value for key, value in settings.items() if value is not None}
        with _listening(host, port) as place:
            loaded = load(model, threads, prompts, "MODEL")
            made = app(loaded, name=name, api_key=api_key, cors=cors, grace=grace, **given)
            server = Server(made, grace, ready=lambda: say(f"fastgen: serving at {_url(place)}"))
            with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
                runner.run(server.serve(sockets=[place]))


def _listening(host: str, port: int) -> socket.socket:
    """A socket at an address; a ValueError if it cannot be had."""
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        place = socket.socket(family, kind, protocol)
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        place.bind(address)
        return place
    except (OSError, UnicodeError) as error:
        raise ValueError(f"cannot listen at {host}:{port}: {error}") from error


def _url(place: socket.socket) -> str:
    host, port = place.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
