"""An error as the client of a service gets to see it."""

from __future__ import annotations

from collections.abc import Mapping


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
