"""The service in a thread of the tests, at a port of its own; the demo model, which it serves."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

import fastgen
from fastgen import chat, hub
from fastgen.serve import app
from fastgen.serve.server import config


@contextlib.contextmanager
def served(model: fastgen.CausalLM, **settings: Any) -> Iterator[str]:
    """The address, such as "http://127.0.0.1:43210", of a service of `model`."""
    made = app(model, **settings)
    place = socket.socket()
    place.bind(("127.0.0.1", 0))
    server = uvicorn.Server(config(made))
    thread = threading.Thread(
        target=lambda: asyncio.run(server.serve(sockets=[place])), daemon=True
    )
    thread.start()
    try:
        until = time.monotonic() + 20
        while not server.started:
            assert thread.is_alive() and time.monotonic() < until
            time.sleep(0.01)
        yield f"http://127.0.0.1:{place.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        place.close()


@pytest.fixture(scope="module")
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> fastgen.CausalLM:
    """The demo model (float32), with the chat template of the module's tests: its TEMPLATE."""
    place = tmp_path_factory.mktemp("served") / "model"
    shutil.copytree(hub.DEMO, place)
    (place / chat.FILE).write_text(request.module.TEMPLATE)
    return fastgen.load(place)


@pytest.fixture(scope="module")
def address(model: fastgen.CausalLM) -> Iterator[str]:
    """That of a service of `model`, called docs."""
    with served(model, name="docs") as found:
        yield found
