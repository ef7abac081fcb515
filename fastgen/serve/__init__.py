"""The HTTP service: requests become rows of one batch (extra `serve`).

routes       the application, its errors         wire        what clients may send
models       the models, loaded when asked for   record      a request's id, and its line
dialects     others' names for fields            limits      the most that a request may hold
wire_responses, wire_messages: what clients may send to these two
door         hosts, the key, sizes
document     the OpenAPI document                rendered    answers as bytes
refused      errors as clients see them          server      uvicorn, and how it stops
completions  prompts -> texts                    chats       conversations -> OpenAI's choices
responses    items -> items (/v1/responses)      messages    Anthropic's (/v1/messages)
items        items -> a chat's messages          output_items, blocks  what is said -> items, blocks
kept         responses that are kept             talk        conversations -> what is said
response     what all answers share              run         the texts of one request
front        a request -> calls                  service     runs the calls in its engine
engine       the thread that runs the model      answers     tokens -> texts, log-probabilities
tools        calls of tools, a file a format     reasoning   where it begins, and its budget
decisions    which of some options follows
knobs        the one list, for the page          page_files  the page at /, in `page`
metrics      the counts at /metrics
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastgen.system import extras

if TYPE_CHECKING:
    import os

    from fastapi import FastAPI

    from fastgen.generator import CausalLM

    Source = CausalLM | str | os.PathLike[str]


def app(model: Source | Mapping[str, Source] | None = None, **settings: Any) -> FastAPI:
    """An ASGI application that serves a model, or several by their names.

    Args:
        model: a model or what names one, or several by the names that clients see.
        settings: see `serve.routes.application`.

    Raises:
        ValueError: the extra `serve` is not installed, or a setting cannot be.
    """
    try:
        from fastgen.serve.routes import application
    except ImportError as error:
        raise ValueError(
            f"serving needs FastAPI and others: {extras.install('serve')} ({error})"
        ) from error
    return application(model, **settings)
