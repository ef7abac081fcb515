"""Checks that every request passes before a route sees it: its address, its key, and its size."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastgen.serve.refused import Refused, told
from fastgen.serve.rendered import Json

MOST_DISCARDED = 64 << 20  # bytes of a longer body, before its connection is cut
PATIENCE = 5.0  # seconds that whoever sends one has to read that it is refused
# What a browser asks for by itself, and what others look at before they have a key.
OPEN = frozenset({"/", "/health", "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json"})
PAGE = "/page/"  # and the files of the page


class Door:
    """Lets in no body of more than `most` bytes.

    A body that says that it is longer is refused before any of it is read.
    """

    def __init__(self, app: ASGIApp, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        said = Headers(scope=scope).get("content-length", "0")
        if said.isdecimal() and int(said[:20]) > self.most:
            await self._refuse(scope["path"], receive, send)
            return
        await self.app(scope, self._limited(receive), send)

    def _limited(self, receive: Receive) -> Receive:
        """`receive` of a body that does not say how long it is."""
        size = 0

        async def limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.most:
                # Who is still sending would not see the answer: it is read on, and forgotten.
                while message.get("more_body") and size < MOST_DISCARDED:
                    message = await receive()
                    size += len(message.get("body", b""))
                raise self._too_long()
            return message

        return limited

    async def _refuse(self, path: str, receive: Receive, send: Send) -> None:
        """Answer at once; but who is still sending has a while before the connection is cut."""
        error = self._too_long()
        made = Json(told(error, path), error.status)
        start = {"type": "http.response.start", "status": 413, "headers": made.raw_headers}
        await send(start)
        await send({"type": "http.response.body", "body": made.body, "more_body": True})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE):
                while (await receive()).get("more_body"):
                    pass
        await send({"type": "http.response.body", "body": b""})

    def _too_long(self) -> Refused:
        return Refused(413, f"the body has more than {self.most:,} bytes")


class Hosts:
    """Lets in who asks for one of these names, from no page but theirs.

    A page of anybody's can have a name that stands for this machine (DNS rebinding): its requests
    then carry that name as their `Host`, and a browser says whose page it is in `Origin`.

    Args:
        names: hosts without a port, an IPv6 address in brackets.
        cors: the origin whose pages may call besides; "*" for all.
    """

    def __init__(self, app: ASGIApp, names: Collection[str], cors: str | None) -> None:
        self.app, self.cors = app, cors
        self.names = frozenset(name.lower() for name in names)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (wrong := self._wrong(Headers(scope=scope))):
            await refuse(Refused(403, wrong), scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _wrong(self, headers: Headers) -> str | None:
        for host in headers.getlist("host"):
            if name_of(f"//{host}") not in self.names:
                return f"this service is not called {host!r} (--allowed-host lets a name in)"
        for origin in headers.getlist("origin"):
            if self.cors not in (origin, "*") and name_of(origin) not in self.names:
                return f"pages of {origin!r} may not call this service (--cors lets them in)"
        return None


def name_of(address: str) -> str | None:
    """The host in an address, as `Hosts` has it; None where there is none."""
    try:
        host = urlsplit(address).hostname
    except ValueError:
        return None
    return f"[{host}]" if host and ":" in host else host


class Guard:
    """Lets in whoever has the key; `OPEN` and the page are open to all. No body is read before."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self.app, self.api_key = app, api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        free = scope["type"] != "http" or path in OPEN or path.startswith(PAGE)
        if free or self._has_key(Headers(scope=scope)):
            await self.app(scope, receive, send)
            return
        error = Refused(
            401,
            "this service asks for its API key: Authorization: Bearer KEY, or x-api-key: KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await refuse(error, scope, receive, send)

    def _has_key(self, headers: Headers) -> bool:
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer":
            given = headers.get("x-api-key", "")
        return hmac.compare_digest(given.strip().encode(), self.api_key.encode())


async def refuse(error: Refused, scope: Scope, receive: Receive, send: Send) -> None:
    body = told(error, scope["path"])
    await Json(body, error.status, error.headers)(scope, receive, send)
