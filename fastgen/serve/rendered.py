"""Answers as bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from fastapi.responses import JSONResponse

TOGETHER = 256  # items of a list that become bytes in one go: threads have their turn in between
DEEP = 4  # levels of an answer in which there are long lists: choices, a choice, its logprobs


class Json(JSONResponse):
    """JSON that a client's text cannot break: half a surrogate pair in it becomes a `?`."""

    def render(self, content: Any) -> bytes:
        return content if isinstance(content, bytes) else as_json(content)


def as_json(value: Any) -> bytes:
    return _text(value).encode("utf-8", "replace")


def event(value: Any, kind: str | None = None) -> bytes:
    """A server-sent event, of a kind if it has one."""
    named = b"" if kind is None else b"event: " + kind.encode() + b"\n"
    return named + b"data: " + as_json(value) + b"\n\n"


def in_parts(value: Any) -> bytes:
    """As `as_json`, for large answers: Python's lock is held for a part of it at a time."""
    return b"".join(part.encode("utf-8", "replace") for part in _parts(value, DEEP))


def _parts(value: Any, deep: int) -> Iterator[str]:
    if isinstance(value, dict) and deep:
        for index, (name, item) in enumerate(value.items()):
            yield f"{',' if index else '{'}{_text(name)}:"
            yield from _parts(item, deep - 1)
        yield "}" if value else "{}"
    elif isinstance(value, list) and len(value) > TOGETHER:
        for at in range(0, len(value), TOGETHER):
            yield f"{',' if at else '['}{_text(value[at : at + TOGETHER])[1:-1]}"
        yield "]"
    elif isinstance(value, list) and value and deep:
        for index, item in enumerate(value):
            yield "," if index else "["
            yield from _parts(item, deep - 1)
        yield "]"
    else:
        yield _text(value)


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
