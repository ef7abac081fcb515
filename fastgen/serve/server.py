"""uvicorn, and how it stops: what runs may finish, new requests are told so, then it ends."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

CLOSING = 2  # seconds that connections have to take in what was written to them


class Server(uvicorn.Server):
    """Serves an application of `serve.app` until a signal comes.

    Args:
        grace: seconds that what runs has after the first signal; a second one ends it at once.
        ready: called when connections are accepted.
    """

    def __init__(self, app: FastAPI, grace: float, ready: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                app, log_level="warning", access_log=False, timeout_graceful_shutdown=CLOSING
            )
        )
        self._engine, self._grace, self._ready = app.state.service.engine, grace, ready
        self._stopping: asyncio.Task[None] | None = None
        self._told = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started:
            self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """On a signal: refuse what is new and wait for the rest; the second time do not wait."""
        if self._told:
            self.should_exit = self.force_exit = True
            return
        self._told = True
        self._loop.call_soon_threadsafe(self._stop)

    def _stop(self) -> None:
        self._stopping = self._loop.create_task(self._drain())

    async def _drain(self) -> None:
        await self._engine.drain(self._grace)
        self.should_exit = True
