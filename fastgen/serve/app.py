"""The HTTP application: OpenAI's routes, health, metrics, and a page."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from importlib import resources
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import fastgen
from fastgen.generator import CausalLM
from fastgen.serve import chats, completions
from fastgen.serve.knobs import described
from fastgen.serve.service import Service, failure
from fastgen.serve.wire import (
    ChatCompletion,
    Completion,
    Detokenize,
    Refused,
    Tokenize,
)

MOST_BYTES = 8 << 20  # of a request's body
MOST_DISCARDED = 64 << 20  # of a longer one, before its connection is cut
GRACE = 30.0  # seconds that running calls have once the service is to stop
MOST_HELD = 64  # events that are sent in one piece
PAGE = {"page.html": "text/html", "page.css": "text/css", "page.js": "text/javascript"}
POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
STREAM = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies pass events on at once


def app(
    model: CausalLM,
    *,
    name: str | None = None,
    api_key: str | None = None,
    cors: str | None = None,
    grace: float = GRACE,
    **engine: Any,
) -> FastAPI:
    """An ASGI application that serves one model.

    Its lifespan starts the engine and, at the end, lets what runs finish within `grace` seconds.

    Args:
        name: what clients see the model called; None for its own name.
        api_key: that clients must send (`Authorization: Bearer`); None for none. `/`, `/health`
            and the documentation of the API are open to all.
        cors: an origin whose pages may call this service from a browser; "*" for all.
        engine: `queue`, `max_bytes`, `max_rows`, `chunk` (see `serve.engine.Engine`).

    Raises:
        ValueError: a setting that cannot be.
    """
    service = Service(model, name, **engine)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        yield
        await service.engine.drain(grace)

    made = FastAPI(
        title="fastgen",
        version=fastgen.__version__,
        summary="OpenAI's API for one small language model on a CPU",
        lifespan=lifespan,
    )
    made.state.service = service
    _errors(made)
    _routes(made, service, [Depends(_guard(api_key))])
    if cors is not None:
        made.add_middleware(
            CORSMiddleware, allow_origins=[cors], allow_methods=["*"], allow_headers=["*"]
        )
    made.add_middleware(Door, service=service)
    return made


def _guard(api_key: str | None) -> Callable[[Request], Awaitable[None]]:
    """What lets in whoever has the key."""

    async def check(request: Request) -> None:
        if api_key is None:
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(given.strip().encode(), api_key.encode())
        if kind.lower() != "bearer" or not same:
            raise Refused(
                401, "this service asks for its API key: Authorization: Bearer KEY",
                code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip

    return check


class Door:
    """What every request passes: its body is not read beyond MOST_BYTES, and its answer counts."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        size = 0

        async def limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > MOST_BYTES:
                # Who is still sending would not see the answer: it is read on, and forgotten.
                while message.get("more_body") and size < MOST_DISCARDED:
                    message = await receive()
                    size += len(message.get("body", b""))
                raise HTTPException(413, f"the body has more than {MOST_BYTES:,} bytes")
            return message

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "other")
                self.service.metrics.requests.labels(route, str(message["status"])).inc()
            await send(message)

        await self.app(scope, limited, counted)


def _errors(made: FastAPI) -> None:
    """Let every error have OpenAI's shape."""

    @made.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        return Json(error.body, error.status, error.headers)

    @made.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return await refused(request, _invalid(error))

    @made.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        text = f"{request.method} {request.url.path}: {error.detail}"
        headers = dict(error.headers or {})
        return await refused(request, Refused(error.status_code, text, headers=headers))

    @made.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return await refused(request, failure(error))


def _invalid(error: RequestValidationError) -> Refused:
    """The first thing that is wrong with a request."""
    first = error.errors()[0]
    where = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return Refused(400, f"the body is no JSON: {first.get('ctx', {}).get('error', '')}")
    if first["type"] == "extra_forbidden":
        return Refused(400, f"{'.'.join(where)} is no field of this request", param=where[0])
    name = where[0] if where else None
    return Refused(400, f"{name or 'the body'}: {first['msg']}", param=name)


def _routes(made: FastAPI, service: Service, guarded: list[Any]) -> None:
    model = service.model

    @made.post("/v1/completions", dependencies=guarded)
    async def complete(body: Annotated[Completion, "a prompt and knobs"], request: Request) -> Any:
        return await _answer(request, await completions.answer(service, body))

    @made.post("/v1/chat/completions", dependencies=guarded)
    async def talk(body: Annotated[ChatCompletion, "a conversation"], request: Request) -> Any:
        return await _answer(request, await chats.answer(service, body))

    @made.get("/v1/models", dependencies=guarded)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(service)]}

    @made.get("/v1/models/{name:path}", dependencies=guarded)
    async def one_model(name: str) -> dict[str, Any]:
        if name != service.name:
            raise Refused(404, f"there is no model {name!r}, only {service.name!r}", param="model",
                          code="model_not_found")  # fmt: skip
        return _model(service)

    @made.post("/tokenize", dependencies=guarded)
    async def tokenize(body: Tokenize) -> dict[str, Any]:
        ids = await asyncio.to_thread(service.ids, body.prompt, body.add_special_tokens)
        return {"tokens": ids, "count": len(ids), "max_model_len": service.info.max_length}

    @made.post("/detokenize", dependencies=guarded)
    async def detokenize(body: Detokenize) -> dict[str, Any]:
        size = service.info.vocab_size
        if not model.has_tokenizer:
            raise Refused(400, "this model was exported for ids only: it has no tokenizer")
        if not all(0 <= token < size for token in body.tokens):
            raise Refused(400, f"tokens must be from 0 to {size - 1}", param="tokens")
        return {"prompt": model.tokenizer.decode(body.tokens, body.skip_special_tokens)}

    @made.get("/knobs", dependencies=guarded)
    async def knobs() -> dict[str, Any]:
        return described(service)

    @made.get("/metrics", dependencies=guarded)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @made.get("/health")
    async def health() -> dict[str, Any]:
        if not service.engine.serving:
            raise Refused(503, "the service is being stopped", code="stopping")
        return {"status": "ok", "model": service.name}

    for file, kind in PAGE.items():
        path = "/" if file == "page.html" else f"/{file}"
        made.add_api_route(path, _file(file, kind), include_in_schema=False)


def _file(name: str, kind: str) -> Callable[[], Awaitable[Response]]:
    async def read() -> Response:
        content = resources.files("fastgen.serve").joinpath(name).read_bytes()
        safe = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"}
        return Response(content, media_type=f"{kind}; charset=utf-8", headers=safe)

    return read


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.name,
        "object": "model",
        "created": int(service.started),
        "owned_by": "fastgen",
        "max_model_len": service.info.max_length,
    }


async def _answer(request: Request, made: Any) -> Response:
    """What `answer` of a route made, whole or as events, given up where the client goes away."""
    if made.events is not None:
        return Events(made)
    try:
        whole = await _unless_gone(made.whole(), request.receive)
    finally:
        made.run.cancel()
    return Response(status_code=499) if whole is None else Json(whole)  # 499: nobody reads it


async def _unless_gone(work: Coroutine[Any, Any, Any], receive: Receive) -> Any:
    """What `work` returns; None where the client has gone away before."""
    tasks = asyncio.create_task(work), asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Json(JSONResponse):
    """JSON that a client's text cannot break: half a surrogate pair in it becomes a `?`."""

    def render(self, content: Any) -> bytes:
        return as_json(content)


class Events(StreamingResponse):
    """Server-sent events, given up where the client goes away; an error is the last but one."""

    def __init__(self, made: Any) -> None:
        super().__init__(self._events(), media_type="text/event-stream", headers=STREAM)
        self.made = made

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await _unless_gone(self.stream_response(send), receive)
        finally:
            self.made.run.cancel()

    async def _events(self) -> AsyncIterator[bytes]:
        """Events as they come; several in one piece where they come faster than they are sent."""
        held: list[bytes] = []
        try:
            async for chunk in self.made.events():
                if chunk is not None:
                    held.append(b"data: " + as_json(chunk) + b"\n\n")
                full = len(held) >= MOST_HELD
                if held and (full or not self.made.run.behind):
                    yield b"".join(held)
                    held.clear()
                if full:
                    await asyncio.sleep(0)  # others have their turn
        except Refused as error:
            held.append(b"data: " + as_json(error.body) + b"\n\n")
        yield b"".join([*held, b"data: [DONE]\n\n"])


def as_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
