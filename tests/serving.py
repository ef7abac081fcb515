"""The service in a thread of the tests, at a port of its own."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn

import fastgen
from fastgen.serve import app


@contextlib.contextmanager
def served(model: fastgen.CausalLM, **settings: Any) -> Iterator[str]:
    """The address, such as "http://127.0.0.1:43210", of a service of `model`."""
    made = app(model, **settings)
    place = socket.socket()
    place.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(made, log_level="warning", timeout_graceful_shutdown=2))
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
