"""uvicorn, with an end to headers, and how it stops: what runs may finish, new requests are told
so, then it ends."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from fastgen.serve.refused import Refused
from fastgen.serve.rendered import as_json

CLOSING = 2  # seconds that connections have to take in what was written to them


class Http(HttpToolsProtocol):
    """uvicorn's protocol, which by itself collects a header of any size.

    A head of more than `most` bytes is answered 431; so is whatever else comes between two pieces
    of a body, such as trailers. What still comes for a while is read and forgotten: who is sending
    would not see the answer.
    """

    most: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._gathered = 0  # bytes that the parser has, and has given us nothing of
        self._refused = False

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._gathered += len(data)
        super().data_received(data)
        if self._gathered > self.most:
            self._refuse()

    def on_headers_complete(self) -> None:
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > self.most:
            self._refuse()
        if not self._refused:
            self._gathered = 0
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self._refused:
            self._gathered = 0
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._refused:
            self._gathered = 0
            super().on_message_complete()

    def _refuse(self) -> None:
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        body = as_json(Refused(431, f"the headers have more than {self.most:,} bytes").body)
        head = (
            "HTTP/1.1 431 Request Header Fields Too Large\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.loop.call_later(CLOSING, self.transport.close)


def config(app: FastAPI) -> uvicorn.Config:
    """The configuration of uvicorn for an application of `serve.routes`."""
    http = type("Limited", (Http,), {"most": app.state.models.limits.head})
    return uvicorn.Config(
        app, http=http, log_level="warning", access_log=False, timeout_graceful_shutdown=CLOSING
    )


class Server(uvicorn.Server):
    """Serves an application of `serve.routes` until a signal comes.

    Args:
        grace: seconds that what runs has after the first signal; a second one ends it at once.
        ready: called when connections are accepted.
    """

    def __init__(self, app: FastAPI, grace: float, ready: Callable[[], None]) -> None:
        super().__init__(config(app))
        self._models, self._grace, self._ready = app.state.models, grace, ready
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
        await self._models.drain(self._grace)
        self.should_exit = True
