"""The record of one HTTP request: its id, what it came to, and its line in the log."""

from __future__ import annotations

import json
import queue
import re
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TextIO

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastgen.serve.metrics import Metrics
from fastgen.serve.refused import failure, told
from fastgen.serve.rendered import Json
from fastgen.serve.run import Run

ID = "x-request-id"
LEGAL = re.compile(r"[!-~]{1,128}")  # an id that can stand in a header and in a line
MOST_LINES = 4096  # that wait to be written; more are left out, and counted
PATIENCE = 2.0  # seconds that the last lines have to be written


@dataclass(eq=False)
class RequestRecord:
    """One request, as it is handled.

    Attributes:
        id: the client's own (`x-request-id`), or one that is made.
        route: the path of its route, such as "/v1/models/{name}".
        model: the name of the model that was asked for.
        run: of its calls, once it has any.
        error: what it was refused with.
        gone: whether the client went away before the end.
        hold: keeps what the request needs until it is over.
    """

    id: str
    method: str
    begun: float = field(default_factory=time.perf_counter)
    route: str = "other"
    status: int = 0
    model: str | None = None
    run: Run | None = None
    error: str | None = None
    gone: bool = False
    seconds: float = 0.0
    hold: ExitStack = field(default_factory=ExitStack)

    @property
    def told(self) -> bool:
        """True if it gets a line: it asked for a model's work, or was refused."""
        return self.model is not None or self.status >= 400

    def fields(self) -> dict[str, Any]:
        """All of it by its name in a line; None for what there is not."""
        run = self.run
        first = None if run is None or run.first is None else run.first - self.begun
        new = 0 if run is None else run.new_tokens
        after = None if first is None else self.seconds - first
        texts = [] if run is None else run.texts
        return {
            "id": self.id,
            "method": self.method,
            "route": self.route,
            "status": self.status,
            "model": self.model,
            "prompt_tokens": None if run is None else run.prompt_tokens,
            "cached_tokens": None if run is None else run.cached_tokens,
            "completion_tokens": None if run is None else new,
            "first_token_seconds": first,
            "tokens_per_second": (new - len(texts)) / after if after and new > len(texts) else None,
            "seconds": self.seconds,
            "finish_reason": ",".join(sorted({text.reason for text in texts if text.reason}))
            or None,
            "error": self.error,
            "client_gone": self.gone,
        }


def of(scope: Scope) -> RequestRecord:
    """The record of a request that passes through `Recorded`."""
    record: RequestRecord = scope["fastgen.record"]
    return record


class Recorded:
    """Gives every request an id and a record, counts it, and tells of it when it is over.

    An error that nobody expected is answered here, so that it has an id as well.

    Args:
        tell: takes the records of requests that are over.
    """

    def __init__(
        self, app: ASGIApp, metrics: Metrics, tell: Callable[[RequestRecord], None] | None
    ) -> None:
        self.app, self.metrics, self.tell = app, metrics, tell

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        record = RequestRecord(_id_of(Headers(scope=scope)), scope["method"])
        scope["fastgen.record"] = record
        header = (ID.encode(), record.id.encode())

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), header]}
            await send(message)

        try:
            with record.hold:
                await self.app(scope, receive, noted)
        except Exception as error:
            if not record.status:
                refused = failure(error)
                body = told(refused, scope["path"])
                await Json(body, refused.status)(scope, receive, noted)
            record.error = repr(error)
            raise
        finally:
            record.seconds = time.perf_counter() - record.begun
            record.route = getattr(scope.get("route"), "path", record.route)
            status = str(record.status)
            self.metrics.requests.labels(record.route, record.method, status).inc()
            if self.tell is not None and record.told:
                self.tell(record)


def _id_of(headers: Headers) -> str:
    given = headers.get(ID, "")
    return given if LEGAL.fullmatch(given) else f"req_{secrets.token_hex(12)}"


# --- lines ---------------------------------------------------------------------------------------


def as_json(record: RequestRecord) -> str:
    """A line of JSON, with the time in UTC."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    fields = {
        name: round(value, 6) if isinstance(value, float) else value
        for name, value in record.fields().items()
    }
    return json.dumps({"time": now, **fields})


def as_text(record: RequestRecord) -> str:
    """A line for people."""
    found = record.fields()
    parts = [found["id"], found["method"], found["route"], str(found["status"])]
    if record.model is not None:
        parts.append(f"model={record.model}")
    if record.run is not None:
        parts.append(f"in={found['prompt_tokens']} cached={found['cached_tokens']}")
        parts.append(f"out={found['completion_tokens']}")
    if found["first_token_seconds"] is not None:
        parts.append(f"first={found['first_token_seconds']:.3f}s")
    if found["tokens_per_second"] is not None:
        parts.append(f"pace={found['tokens_per_second']:.1f}/s")
    parts.append(f"total={found['seconds']:.3f}s")
    if found["finish_reason"]:
        parts.append(f"finish={found['finish_reason']}")
    if record.error is not None:
        parts.append(f"error={json.dumps(record.error)}")
    if record.gone:
        parts.append("client gone")
    return datetime.now().astimezone().strftime("%H:%M:%S ") + " ".join(parts)


FORMATS: dict[str, Callable[[RequestRecord], str]] = {"text": as_text, "json": as_json}


class Log:
    """Writes a line for each record, in a thread of its own.

    Whoever reads the log may be slow, or stopped: the service never waits for them. Lines that
    find no room are left out, and the next one says how many.

    Args:
        form: "text" or "json".
    """

    def __init__(self, form: str, to: TextIO) -> None:
        self._form, self._to = FORMATS[form], to
        self._lines: queue.Queue[str | None] = queue.Queue(MOST_LINES)
        self._lost = 0
        self._thread = threading.Thread(target=self._write, name="fastgen-log", daemon=True)
        self._thread.start()

    def __call__(self, record: RequestRecord) -> None:
        """Let a record be written."""
        try:
            self._lines.put_nowait(self._form(record))
        except queue.Full:
            self._lost += 1

    def close(self) -> None:
        """Write what waits, if somebody reads it."""
        try:
            self._lines.put(None, timeout=PATIENCE)
        except queue.Full:
            return
        self._thread.join(PATIENCE)

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            lost, self._lost = self._lost, 0
            left_out = f"fastgen: {lost} lines were left out\n" if lost else ""
            try:
                self._to.write(f"{left_out}{line}\n")
                self._to.flush()
            except (OSError, ValueError):  # closed: nobody can be told any more
                return
