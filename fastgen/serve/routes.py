"""The HTTP application: OpenAI's routes, health, metrics, and a page."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Mapping
from functools import partial
from typing import Annotated, Any, Literal, TypeVar

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse, StreamingResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Receive, Scope, Send

import fastgen
from fastgen import first_use
from fastgen.generator import CausalLM
from fastgen.serve import chats, completions, decisions, messages, page_files, record, responses
from fastgen.serve.document import OF_READING, OF_RUNNING, document, errors, takes
from fastgen.serve.door import Door, Guard, Hosts
from fastgen.serve.kept import KeptResponses
from fastgen.serve.knobs import described
from fastgen.serve.limits import RequestLimits
from fastgen.serve.models import Models, ServedModel, Source
from fastgen.serve.record import Recorded, RequestRecord
from fastgen.serve.refused import MESSAGES, Refused, Stopping, refusal, told
from fastgen.serve.rendered import Json, in_parts
from fastgen.serve.service import Service
from fastgen.serve.wire import ChatCompletion, Choose, Completion, Detokenize, Tokenize, invalid
from fastgen.serve.wire_messages import CountedMessages, CreateMessage
from fastgen.serve.wire_responses import CountedInput, CreateResponse
from fastgen.store.model_info import ModelInfo

GRACE = 30.0  # seconds that running calls have once the service is to stop
MOST_HELD = 64  # events that are sent in one piece
STREAM = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies pass events on at once
BODIES: list[type[BaseModel]] = [
    Completion, ChatCompletion, CreateResponse, CountedInput, CreateMessage, CountedMessages,
    Choose, Tokenize, Detokenize,
]  # fmt: skip
EVENTS: dict[str, Any] = {"schema": {"type": "string"}}  # server-sent

Kind = TypeVar("Kind", bound=BaseModel)


def application(
    model: Source | Mapping[str, Source] | None,
    *,
    name: str | None = None,
    api_key: str | None = None,
    cors: str | None = None,
    hosts: Collection[str] | None = None,
    grace: float = GRACE,
    log: Callable[[RequestRecord], None] | None = None,
    **settings: Any,
) -> FastAPI:
    """An ASGI application that serves a model, or several.

    Its lifespan starts the engine and, at the end, lets what runs finish within `grace` seconds.

    Args:
        model: a loaded model, or what names one (see `fastgen.load`); or several of these by the
            names that clients see, of which all but the default are loaded when they are first
            asked for.
        name: what clients see the only model called; None for its own name.
        api_key: that clients must send (`Authorization: Bearer`); None for none. `/`, `/health`
            and the documentation of the API are open to all.
        cors: an origin whose pages may call this service from a browser; "*" for all.
        hosts: names that it may be asked by (`Host`), without a port; None for any. Without a key
            they keep the pages of strangers out of a service on one's own machine.
        log: takes the record of each request that is over; None for no log.
        settings: `default`, `unload_after`, `threads`, `prefill_precision`, `packed`, `limits`,
            `grammars`, `max_bytes` (see `serve.models.Models`), `reasoning`, `plain_tools`,
            `free_calls` (see `serve.service.Service`), `queue`, `max_rows`, `chunk` (see
            `serve.engine.Engine`).

    Raises:
        ValueError: a setting that cannot be.
    """
    models = Models(_by_name(model, name), **settings)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await models.start()
        yield
        await models.drain(grace)

    made = FastAPI(
        title="fastgen",
        version=fastgen.__version__,
        summary="OpenAI's API for small language models on a CPU",
        lifespan=lifespan,
    )
    made.state.models = models
    _errors(made)
    _routes(made, models)
    written = document(made, BODIES)
    made.openapi = lambda: written  # type: ignore[method-assign]
    _heads(made)
    # The last one added is the first that a request passes.
    if api_key is not None:
        made.add_middleware(Guard, api_key=api_key)
    if cors is not None:
        made.add_middleware(
            CORSMiddleware,
            allow_origins=[cors],
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=[record.ID],
        )
    if hosts is not None:
        made.add_middleware(Hosts, names=hosts, cors=cors)
    made.add_middleware(Door, most=models.limits.body)
    made.add_middleware(Recorded, metrics=models.metrics, tell=log)
    return made


def _by_name(model: Source | Mapping[str, Source] | None, name: str | None) -> Mapping[str, Source]:
    """The models by the names that clients see."""
    if isinstance(model, Mapping):
        if name is not None:
            raise ValueError(f"name={name!r} is for one model: of several, the keys are the names")
        return model
    if isinstance(model, CausalLM):
        return {name or model.model.info.name or model.directory.name: model}
    directory = first_use.directory(model)
    return {name or ModelInfo.parse(directory).name or directory.name: directory}


def _errors(made: FastAPI) -> None:
    """Let every error have OpenAI's shape."""

    @made.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        record.of(request.scope).error = str(error)
        return Json(told(error, request.url.path), error.status, error.headers)

    @made.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        text = f"{request.method} {request.url.path}: {error.detail}"
        headers = dict(error.headers or {})
        return await refused(request, Refused(error.status_code, text, headers=headers))

    @made.exception_handler(RequestValidationError)
    async def invalid_query(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        name = str(first["loc"][-1])
        return await refused(request, Refused(400, f"{name}: {first['msg']}", param=name))


def _heads(made: FastAPI) -> None:
    """Let HEAD do what GET does; the server that runs the application leaves out the body."""
    for route in made.routes:
        if isinstance(route, APIRoute) and route.methods and "GET" in route.methods:
            route.methods.add("HEAD")


async def _read(request: Request, kind: type[Kind], limits: RequestLimits) -> Kind:
    """The body of a request.

    Raises:
        Refused: it is no JSON, holds more than may be, or is not of this kind.
    """
    said = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if said != "application/json" and not said.endswith("+json"):
        raise Refused(415, f"the body must be JSON (Content-Type: application/json), not {said!r}")
    raw = await request.body()
    try:
        given = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is no JSON: {error}") from error
    limits.check_values(given)
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise invalid(error) from error


def _routes(made: FastAPI, models: Models) -> None:
    limits, created = models.limits, time.time()
    answers: dict[int | str, dict[str, Any]] = {
        200: {"content": {"text/event-stream": EVENTS}},
        **errors(*OF_RUNNING),
    }
    reads, shows = errors(*OF_READING), errors(401, 403)
    kept = KeptResponses()

    @made.post("/v1/completions", responses=answers, openapi_extra=takes(Completion))
    async def complete(request: Request) -> Any:
        """Texts that follow prompts."""
        body = await _read(request, Completion, limits)
        return await _answer(request, models, body, completions.answer)

    @made.post("/v1/chat/completions", responses=answers, openapi_extra=takes(ChatCompletion))
    async def talk(request: Request) -> Any:
        """The answer to a conversation."""
        body = await _read(request, ChatCompletion, limits)
        return await _answer(request, models, body, chats.answer)

    @made.post("/v1/responses", responses=answers, openapi_extra=takes(CreateResponse))
    async def respond(request: Request) -> Any:
        """A response to items."""
        body = await _read(request, CreateResponse, limits)
        return await _answer(request, models, body, partial(responses.answer, kept=kept))

    @made.post(
        "/v1/responses/input_tokens",
        responses=reads,
        openapi_extra=takes(CountedInput),
    )
    async def count_input(request: Request) -> dict[str, Any]:
        """The tokens of a request."""
        body = await _read(request, CountedInput, limits)
        return await responses.count(await _service(request, models, body.model), body, kept)

    @made.get("/v1/responses/{name}", responses=errors(400, 401, 403, 404))
    async def one_response(name: str, stream: bool = False) -> dict[str, Any]:
        """A response that is kept."""
        if stream:
            raise Refused(400, "stream must be false: the response is there", param="stream")
        return kept.get(name).response

    @made.delete("/v1/responses/{name}", responses=errors(401, 403, 404))
    async def forget_response(name: str) -> dict[str, Any]:
        """Forget a response."""
        kept.delete(name)
        return {"id": name, "object": "response", "deleted": True}

    @made.get("/v1/responses/{name}/input_items", responses=errors(400, 401, 403, 404))
    async def input_items(
        name: str,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> dict[str, Any]:
        """The items that a kept response came of."""
        return responses.listed(kept, name, after, limit, order)

    @made.post(
        MESSAGES,
        responses={**answers, **errors(*OF_RUNNING, shape="MessagesError")},
        openapi_extra=takes(CreateMessage),
    )
    async def message(request: Request) -> Any:
        """The answer to a conversation, as Anthropic has it."""
        body = await _read(request, CreateMessage, limits)
        return await _answer(request, models, body, messages.answer)

    @made.post(
        f"{MESSAGES}/count_tokens",
        responses=errors(*OF_READING, shape="MessagesError"),
        openapi_extra=takes(CountedMessages),
    )
    async def count_messages(request: Request) -> dict[str, Any]:
        """The tokens of a conversation."""
        body = await _read(request, CountedMessages, limits)
        return await messages.count(await _service(request, models, body.model), body)

    @made.post("/v1/choose", responses=errors(*OF_RUNNING), openapi_extra=takes(Choose))
    async def choose(request: Request) -> Any:
        """The option that follows a prompt, with a probability for each."""
        body = await _read(request, Choose, limits)
        return await _answer(request, models, body, decisions.answer)

    @made.get("/v1/models", responses=shows)
    async def all_models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(served, created) for served in models]}

    @made.get("/v1/models/{name:path}", responses=errors(401, 403, 404))
    async def one_model(name: str) -> dict[str, Any]:
        return _model(models.named(name, exactly=True), created)

    @made.post("/tokenize", responses=reads, openapi_extra=takes(Tokenize))
    async def tokenize(request: Request) -> dict[str, Any]:
        body = await _read(request, Tokenize, limits)
        service = await _service(request, models, body.model)
        ids = await service.ids(body.prompt, bool(body.add_special_tokens))
        return {"tokens": ids, "count": len(ids), "max_model_len": service.info.max_length}

    @made.post("/detokenize", responses=reads, openapi_extra=takes(Detokenize))
    async def detokenize(request: Request) -> dict[str, Any]:
        body = await _read(request, Detokenize, limits)
        service = await _service(request, models, body.model)
        if not service.model.has_tokenizer:
            raise Refused(400, "this model was exported for ids only: it has no tokenizer")
        service.known(body.tokens, "tokens")
        decode = service.model.tokenizer.decode
        return {
            "prompt": await asyncio.to_thread(decode, body.tokens, bool(body.skip_special_tokens))
        }

    @made.get("/knobs", responses=shows)
    async def knobs(request: Request, model: str | None = None) -> dict[str, Any]:
        """The knobs for the page; of which model, `?model=` says."""
        return described(await _service(request, models, model))

    @made.get("/metrics", responses=shows, response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(models.metrics.text(), media_type="text/plain; version=0.0.4")

    @made.get("/health", responses=errors(403, 503))
    async def health() -> dict[str, Any]:
        """The state: which models are loaded; 503 where no requests are taken."""
        if models.stopping:
            raise refusal(Stopping())
        if not models.serving:
            raise Refused(503, "an engine has failed", code="engine_failed")
        loaded = {served.name: served.service is not None for served in models}
        return {"status": "ok", "model": models.default.name, "loaded": loaded}

    @made.get("/", include_in_schema=False)
    @made.get("/page/{name:path}", include_in_schema=False)
    async def page(name: str = page_files.FIRST) -> Response:
        found = page_files.FILES.get(name)
        if found is None:
            raise Refused(404, f"the page has no file {name!r}")
        file, kind = found
        return Response(file.read_bytes(), media_type=kind, headers=page_files.HEADERS)


def _model(served: ServedModel, created: float) -> dict[str, Any]:
    return {
        "id": served.name,
        "object": "model",
        "created": int(created),
        "owned_by": "fastgen",
        "max_model_len": served.info.max_length,
    }


async def _service(request: Request, models: Models, name: str | None) -> Service:
    """The service of a model; it stays loaded until the request is over."""
    mine = record.of(request.scope)
    mine.model = models.named(name).name
    return await models.use(name, mine.hold)


async def _answer(
    request: Request,
    models: Models,
    body: Any,
    begin: Callable[[Service, Any], Coroutine[Any, Any, Any]],
) -> Response:
    """Send the answer that `begin` begins, whole or as events; drop it if the client goes away.

    Args:
        begin: from the service of the model that `body` names, and `body`.
    """

    async def begun() -> Any:
        return await begin(await _service(request, models, body.model), body)

    mine = record.of(request.scope)
    made = await _unless_gone(begun(), request)
    if made is None:
        return Response(status_code=499)  # nobody reads it
    mine.run = made.run
    if made.events is not None:
        return Events(made, request)
    try:
        whole = await _unless_gone(made.whole(), request)
    finally:
        made.run.cancel()
    if whole is None:
        return Response(status_code=499)
    return Json(await made.front.put_together(made.size, lambda: in_parts(whole)))


async def _unless_gone(work: Coroutine[Any, Any, Any], request: Request) -> Any:
    """The result of `work`; None where the client has gone away before."""
    tasks = asyncio.create_task(work), asyncio.create_task(_disconnected(request.receive))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()
        record.of(request.scope).gone = True
        return None
    finally:
        for task in tasks:
            task.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Events(StreamingResponse):
    """Server-sent events, given up where the client goes away; an error is the last but one."""

    def __init__(self, made: Any, request: Request) -> None:
        super().__init__(self._events(), media_type="text/event-stream", headers=STREAM)
        self.made, self.request = made, request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await _unless_gone(self.stream_response(send), self.request)
        finally:
            self.made.run.cancel()

    async def _events(self) -> AsyncIterator[bytes]:
        """Events as they come; several in one piece where they come faster than they are sent."""
        held: list[bytes] = []
        try:
            async for chunk in self.made.events():
                if chunk is not None:
                    held.append(self.made.sent(chunk))
                full = len(held) >= MOST_HELD
                if held and (full or not self.made.run.behind):
                    yield b"".join(held)
                    held.clear()
                if full:
                    await asyncio.sleep(0)  # others have their turn
        except Refused as error:
            record.of(self.request.scope).error = str(error)
            held.append(self.made.sent(self.made.failed(error)))
        yield b"".join([*held, self.made.LAST])
