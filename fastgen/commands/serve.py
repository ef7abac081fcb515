"""fastgen serve: a model, or several, behind a port."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import math
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from fastgen.commands.models import run_options
from fastgen.commands.say import clear_errors, say
from fastgen.sampling import trial
from fastgen.serve.limits import RequestLimits
from fastgen.system import extras

FORMATS = ("auto", "none")  # of reasoning: those of `fastgen.serve.reasoning`
LOGS = ("text", "json", "none")

MEMORY = "a quarter of the machine's memory"


def limit_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """A flag for each limit of a request."""
    for limit in reversed(fields(RequestLimits)):
        flag = click.option(
            f"--max-{limit.name.replace('_', '-')}",
            type=click.IntRange(1),
            help=f"{limit.metadata['help']}, at most [default: {limit.default:,}]",
        )
        command = flag(command)
    return command


@click.command()
@click.argument("models", metavar="[MODEL]...", nargs=-1)
@click.option("--host", default="127.0.0.1", show_default=True, help="address to listen at")
@click.option(
    "--port",
    default=8000,
    show_default=True,
    type=click.IntRange(0, 65535),
    help="port to listen at; 0 for any that is free",
)
@click.option(
    "--api-key", envvar="FASTGEN_API_KEY", help="that clients must send [env: FASTGEN_API_KEY]"
)
@run_options
@click.option("--name", help="what clients see the only model called [default: its own name]")
@click.option(
    "--default", help="the model that is meant where a request names none [default: the first]"
)
@click.option(
    "--unload-after",
    type=float,
    metavar="MINUTES",
    help="unload a model that nobody has asked for so long [default: never]",
)
@click.option(
    "--rows", type=click.IntRange(1), help="rows of a model that run together [default: 64]"
)
@click.option(
    "--memory",
    type=float,
    help="GB that calls may come to hold, an equal share for each model; the 256 MB for prompts "
    f"that are kept are divided alike [default: {MEMORY}]",
)
@click.option(
    "--queue",
    type=click.IntRange(1),
    help="calls of a model that may wait; more are told 429 [default: 256]",
)
@click.option(
    "--grace",
    default=30.0,
    show_default=True,
    help="seconds that what runs has to finish, once told to stop",
)
@click.option(
    "--grammar-seconds",
    default=trial.SECONDS,
    show_default=True,
    type=float,
    help="of the processor, that a new schema or grammar may take",
)
@click.option(
    "--grammar-memory",
    default=trial.MEGABYTES,
    show_default=True,
    type=click.IntRange(1),
    help="MB that it may take",
)
@click.option(
    "--reasoning-format",
    "reasoning",
    default="auto",
    show_default=True,
    type=click.Choice(FORMATS),
    help="auto: reasoning is reasoning_content; none: it stays in the content, with its marks",
)
@click.option(
    "--plain-tools",
    is_flag=True,
    help="tell a model whose template knows no tools of them in words",
)
@click.option(
    "--free-calls",
    is_flag=True,
    help="do not hold calls that nothing forces to their tools' schemas",
)
@click.option(
    "--log-format",
    default="text",
    show_default=True,
    type=click.Choice(LOGS),
    help="of the line on stderr for each request that a model answers, or that is refused",
)
@click.option("--cors", help="an origin whose pages may call from a browser, * for all")
@click.option(
    "--allowed-host",
    "allowed_hosts",
    multiple=True,
    help="a name, without a port, that the service may be asked by besides (several "
    "times). Without a key and at a loopback address only localhost, 127.0.0.1, [::1] "
    "and --host are; with one of these, nothing else anywhere",
)
@limit_options
def serve(
    models: tuple[str, ...],
    host: str,
    port: int,
    api_key: str | None,
    threads: int | None,
    prefill_precision: str | None,
    packed: bool,
    name: str | None,
    default: str | None,
    unload_after: float | None,
    rows: int | None,
    memory: float | None,
    queue: int | None,
    grace: float,
    grammar_seconds: float,
    grammar_memory: int,
    reasoning: str,
    plain_tools: bool,
    free_calls: bool,
    log_format: str,
    cors: str | None,
    allowed_hosts: tuple[str, ...],
    **most: int | None,
) -> None:
    """Serve a MODEL, a directory or a hub id (default: the embedded demo model), over HTTP.

    Of several, requests say which one is to answer: by the name of its directory, by its hub id, or
    by the NAME of NAME=MODEL. The default is loaded at once, each of the others when it is first
    asked for; all are fetched, and exported if need be, before the service begins.

    The API is OpenAI's: /v1/completions, /v1/chat/completions, /v1/responses, /v1/models; and
    Anthropic's: /v1/messages. Every knob is a field
    besides. At / there is a page to try it, at /docs the API, at /metrics what Prometheus reads.
    The page samples as the model's own generation config says, or at temperature 0.7 and top_p 0.9
    if it says nothing of it; the API has OpenAI's defaults.

    A text is what it would be alone, whoever else is served: to the token in fp32, up to rounding
    in int8, int4 and with int8 keys.

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
        from fastgen.serve.record import Log

        if not 0 <= grace < math.inf:
            raise ValueError(f"--grace must be a number of seconds, got {grace}")
        if memory is not None and not 0 < memory < math.inf:
            raise ValueError(f"--memory must be a positive number of GB, got {memory}")
        if api_key is not None and not (api_key.strip() and api_key.isascii()):
            raise ValueError("--api-key must be a text of ASCII characters")
        settings: dict[str, Any] = {"max_rows": rows, "queue": queue, "reasoning": reasoning}
        settings |= {"plain_tools": plain_tools, "free_calls": free_calls}
        settings["max_bytes"] = None if memory is None else int(memory * 1e9)
        settings |= {"default": default, "unload_after": unload_after}
        if unload_after is not None and not 0 < unload_after < math.inf:
            raise ValueError(f"--unload-after must be a number of minutes, got {unload_after}")
        given = {key: value for key, value in settings.items() if value is not None}
        limits = RequestLimits(
            **{n.removeprefix("max_"): v for n, v in most.items() if v is not None}
        )
        given["grammars"] = trial.Limits(grammar_seconds, grammar_memory << 20)
        with _listening(host, port) as listener, contextlib.ExitStack() as log_open:
            hosts = _hosts(listener, host, allowed_hosts, api_key is not None)
            sources, name = _sources(models, name)
            log = None if log_format == "none" else Log(log_format, sys.stderr)
            if log is not None:
                log_open.callback(log.close)
            application = app(
                sources,
                name=name,
                api_key=api_key,
                cors=cors,
                grace=grace,
                hosts=hosts,
                limits=limits,
                log=log,
                threads=threads,
                prefill_precision=prefill_precision,
                packed=packed,
                **given,
            )
            server = Server(
                application, grace, ready=lambda: say(f"fastgen: serving at {_url(listener)}")
            )
            with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
                runner.run(server.serve(sockets=[listener]))


def _sources(models: Sequence[str], name: str | None) -> tuple[Any, str | None]:
    """The models to be served, and the name of the only one, as `fastgen.serve.app` takes them.

    Args:
        models: each a directory, a hub id, or NAME=MODEL with one of these; none for the demo.
        name: of the only one; None for its own.

    Raises:
        ValueError: two have one name, or one has two names, or an empty one.
    """
    if len(models) > 1 and name is not None:
        raise ValueError("--name is for one model: write NAME=MODEL for each of several")
    if not models:
        say("fastgen: no MODEL given, using the embedded demo model")
        return None, name
    given = [_apart(model) for model in models]
    if len(given) == 1:
        alias, model = given[0]
        if alias and name is not None:
            raise ValueError(f"--name {name} and {models[0]} both name the model: give one of them")
        return model, alias or name
    out: dict[str, str] = {}
    for alias, model in given:
        path = Path(model)
        called = alias or (path.resolve().name if path.exists() else model)
        if called in out:
            raise ValueError(
                f"{out[called]} and {model} are both called {called}: write NAME=MODEL for one"
            )
        out[called] = model
    return out, None


def _apart(given: str) -> tuple[str, str]:
    """NAME and MODEL of NAME=MODEL; of a MODEL alone, no name."""
    name, equals, model = given.partition("=")
    if not equals or Path(given).exists():
        return "", given
    if not name or not model:
        raise ValueError(f"{given!r} should be NAME=MODEL, and one of them is empty")
    return name, model


def _listening(host: str, port: int) -> socket.socket:
    """A socket at an address; a ValueError if it cannot be had."""
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        return listener
    except (OSError, UnicodeError) as error:
        raise ValueError(f"cannot listen at {host}:{port}: {error}") from error


def _hosts(
    listener: socket.socket, host: str, allowed: tuple[str, ...], has_key: bool
) -> set[str] | None:
    """The names that the service may be asked by; None for any."""
    local = ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback
    if not allowed and (has_key or not local):
        return None
    return {"localhost", "127.0.0.1", "[::1]", f"[{host}]" if ":" in host else host, *allowed}


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
