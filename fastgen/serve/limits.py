"""Limits of one request: each of them once, with its default and its line of help.

The flags of `fastgen serve` are made from the fields of `RequestLimits`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from fastgen.serve.refused import Refused


def limit(default: int, help: str) -> Any:
    """A field of `RequestLimits`."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class RequestLimits:
    """The most that one request may hold of each thing, however the request spells it.

    Raises:
        ValueError: a limit that is no positive integer.
    """

    body: int = limit(2 << 20, "bytes of a request's body")
    head: int = limit(64 << 10, "bytes of a request's first line and headers")
    values: int = limit(1 << 14, "values in a request's JSON, those of its prompt left out")
    text: int = limit(1 << 20, "bytes of a text that is to be cut into tokens")
    prompts: int = limit(64, "prompts of a completion")
    copies: int = limit(64, "answers to a prompt: n, best_of, num_return_sequences")
    options: int = limit(256, "options of a decision")
    stops: int = limit(32, "stop texts")
    stop_text: int = limit(1024, "characters of a stop text")
    alternatives: int = limit(20, "alternatives of a token: logprobs, top_logprobs")
    logprobs: int = limit(1 << 20, "log-probabilities in an answer, alternatives included")

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if type(value) is not int or value < 1:
                raise ValueError(f"the limit {one.name} must be a positive integer, got {value!r}")

    def check(self, name: str, value: int, of: str) -> None:
        """Refuse a request whose field `of` has more than the limit `name` lets it have."""
        most = getattr(self, name)
        if value > most:
            what = _HELP[name].partition(":")[0]
            raise Refused(400, f"{of} has {value:,}, at most {most:,} may be: {what}", param=of)

    def check_values(self, body: Any) -> None:
        """Refuse a body of more values than may be; it is not looked at beyond them."""
        fields = body if isinstance(body, Mapping) else {"the body": body}
        left = [value for name, value in fields.items() if name != "prompt"]
        seen = 0  # and looked into
        while left:
            if seen + len(left) > self.values:
                raise Refused(
                    400, f"the request has more than {self.values:,} values besides its prompt"
                )
            seen, one = seen + 1, left.pop()
            if isinstance(one, dict):
                left += one.values()
            elif isinstance(one, list):
                left += one


_HELP = {one.name: str(one.metadata["help"]) for one in fields(RequestLimits)}
