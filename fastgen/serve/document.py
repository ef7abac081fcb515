"""The OpenAPI document: what every route takes, and everything that it may send."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

SCHEMAS = "#/components/schemas/"
ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
MESSAGES_ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
        },
    },
}
WHY = {
    400: "the request cannot be answered as it is",
    401: "the service asks for its API key",
    403: "the service is not called so, or another page calls it (see --allowed-host)",
    404: "there is no such thing",
    413: "the body is too long",
    415: "the body is no JSON",
    429: "as many requests wait as may",
    500: "the model cannot be loaded, or something broke",
    503: "the service is being stopped",
}
OF_READING = (400, 401, 403, 404, 413, 415, 500, 503)
OF_RUNNING = (*OF_READING, 429)


def errors(*statuses: int, shape: str = "Error") -> dict[int | str, dict[str, Any]]:
    """These errors, as a route declares them."""
    of_json = {"application/json": {"schema": {"$ref": SCHEMAS + shape}}}
    return {status: {"description": WHY[status], "content": of_json} for status in statuses}


def takes(kind: type[BaseModel]) -> dict[str, Any]:
    """That a route reads a body of this kind by itself."""
    of_json = {"application/json": {"schema": {"$ref": SCHEMAS + kind.__name__}}}
    return {"requestBody": {"required": True, "content": of_json}}


def document(app: FastAPI, kinds: list[type[BaseModel]]) -> dict[str, Any]:
    """The document of `app`, whose routes read bodies of these kinds."""
    openapi = get_openapi(
        title=app.title, version=app.version, summary=app.summary, routes=app.routes
    )
    schemas = openapi.setdefault("components", {}).setdefault("schemas", {})
    schemas |= {"Error": ERROR, "MessagesError": MESSAGES_ERROR}
    for kind in kinds:
        schema = kind.model_json_schema(ref_template=SCHEMAS + "{model}")
        schemas |= schema.pop("$defs", {})
        schemas[kind.__name__] = schema
    for route in openapi["paths"].values():
        for operation in route.values():
            operation["responses"].pop("422", None)  # FastAPI's own: such are 400 here
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    return openapi
