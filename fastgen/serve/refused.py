"""Errors as the client of a service gets to see them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fastgen.inputs.params import NAMES

RETRY = 1  # seconds after which a client may try again where the queue is full


class Refused(Exception):
    """A request that is not answered, with OpenAI's words for why."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, kind)
        self.body = {
            "error": {"message": message, "type": kind, "param": param, "code": code},
        }


MESSAGES = "/v1/messages"  # what is below it speaks as Anthropic does
KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error",
         413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error"}  # fmt: skip


def told(error: Refused, path: str) -> dict[str, Any]:
    """The body of an error in the words of the API that a path belongs to."""
    if not path.startswith(MESSAGES):
        return error.body
    kind = "invalid_request_error" if error.status < 500 else "api_error"
    said: dict[str, Any] = {"type": KINDS.get(error.status, kind), "message": str(error)}
    if error.body["error"]["code"] is not None:
        said["details"] = {"error_code": error.body["error"]["code"]}
    return {"type": "error", "error": said}


class Full(Exception):
    """The queue of calls has no room."""


class Stopping(Exception):
    """New calls are not taken: the service is being stopped."""


def refusal(error: Exception) -> Refused:
    """The error of a call as its client gets to see it."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, Stopping):
        return Refused(503, "the service is being stopped", code="stopping")
    if isinstance(error, Full):
        return Refused(
            429,
            "as many requests wait as may: try again later",
            code="queue_full",
            headers={"Retry-After": str(RETRY)},
        )
    if isinstance(error, ValueError):
        return wrong(str(error))
    return failure(error)


def wrong(message: str, names: Mapping[str, str] | None = None) -> Refused:
    """Refuse a bad request in the words that it used itself.

    Args:
        names: the client's own name of a knob that it gave under another (see
            `wire.GenerationRequest`).
    """
    names = names or {}
    first = message.partition(" ")[0].partition("=")[0]
    for ours, theirs in names.items():
        message = re.sub(rf"\b{ours}\b", theirs, message)
    return Refused(400, message, param=names.get(first, first) if first in NAMES else None)


def failure(error: Exception) -> Refused:
    """An error that is not the client's."""
    return Refused(500, f"{type(error).__name__}: {error}", code="internal_error")


def renamed(error: Refused, names: Mapping[str, str]) -> Refused:
    """An error in the words of another API.

    Args:
        names: what fields are called there. Of one word they are only found where the message
            begins with them.
    """
    found = error.body["error"]
    message, param = str(found["message"]), found["param"]
    for ours, theirs in names.items():
        message = re.sub(rf"\b{ours}\b" if "_" in ours else rf"^{ours}\b", theirs, message)
    return Refused(
        error.status,
        message,
        param=names.get(param, param) if param else None,
        code=found["code"],
        headers=error.headers,
    )
