"""What clients may send: OpenAI's fields, and every knob of `Params`, made from the one list.

OpenAI's fields are checked here; knobs are checked where they always are, by `generate`'s door.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

from fastgen.params import Params

MOST_PROMPTS = 64  # of a request
MOST_COPIES = 64  # of a prompt
MOST_LOGPROBS = 20  # alternatives of a token, as with OpenAI
COMPLETION_TOKENS = 16  # where nobody says how many: OpenAI's own default

# Sent by OpenAI's clients for what happens elsewhere: they change nothing here.
INERT = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    "parallel_tool_calls",
)  # fmt: skip


class Refused(Exception):
    """A request that is not answered, with OpenAI's words for why."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, kind)
        self.body = {
            "error": {"message": message, "type": kind, "param": param, "code": code},
        }


class StreamOptions(BaseModel):
    """What a stream carries besides."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False
    include_obfuscation: bool = False


class Common(BaseModel):
    """What both kinds of requests have."""

    model_config = ConfigDict(extra="forbid")
    model: str | None = Field(None, description="any name: there is one model")
    n: int = Field(1, ge=1, le=MOST_COPIES, description="answers to each prompt")
    max_tokens: int | None = Field(None, ge=0, description="new tokens, at most")
    stop: str | list[str] | None = Field(None, description="texts that end it; left out")
    stream: bool = Field(False, description="server-sent events, as tokens come")
    stream_options: StreamOptions | None = None


def _with_knobs(name: str, base: type[BaseModel]) -> type[Any]:
    """`base` with a field for each knob that it lacks, and for those that change nothing."""
    knobs: dict[str, Any] = {
        knob.name: (Any, Field(None, description=knob.metadata["help"]))
        for knob in fields(Params)
        if knob.name not in base.model_fields
    }
    inert: dict[str, Any] = {
        name: (Any, Field(None, description="accepted, and nothing changes")) for name in INERT
    }
    made: type[Any] = create_model(name, __base__=base, **knobs, **inert)
    return made


class _Completion(Common):
    """`POST /v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]] = Field(
        description="a text or several, or token ids"
    )
    best_of: int | None = Field(None, ge=1, le=MOST_COPIES, description="of which the n best come")
    echo: bool = Field(False, description="begin with the prompt")
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS, description="alternatives a token")
    suffix: Any = Field(None, description="not supported")


class Part(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(extra="allow")
    type: str
    text: str | None = None


class Message(BaseModel):
    """One message of a conversation; what else it has goes to the chat template."""

    model_config = ConfigDict(extra="allow")
    role: str
    content: str | list[Part] | None = None


class ResponseFormat(BaseModel):
    """What an answer must be."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = None


class _ChatCompletion(Common):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1, description="oldest first")
    max_completion_tokens: int | None = Field(None, ge=0, description="as max_tokens")
    logprobs: bool | None = Field(None, description="whether tokens come with theirs")
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS, description="alternatives")
    tools: list[dict[str, Any]] | None = Field(None, description="functions, for the template")
    tool_choice: Any = Field(None, description="none or auto")
    response_format: ResponseFormat | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="for the template")


if TYPE_CHECKING:
    Completion = _Completion
    ChatCompletion = _ChatCompletion
else:
    Completion = _with_knobs("Completion", _Completion)
    ChatCompletion = _with_knobs("ChatCompletion", _ChatCompletion)


class Tokenize(BaseModel):
    """`POST /tokenize`."""

    model_config = ConfigDict(extra="forbid")
    prompt: str
    add_special_tokens: bool = True


class Detokenize(BaseModel):
    """`POST /detokenize`."""

    model_config = ConfigDict(extra="forbid")
    tokens: list[int]
    skip_special_tokens: bool = False


@dataclass(frozen=True)
class Wish:
    """What a request asks of each of its prompts.

    Attributes:
        knobs: keywords of `generate`, without the length.
        new: tokens at most; None where nobody says.
        copies: sequences of each prompt; `n` of them are given out.
        alternatives: of each token; None where no log-probabilities are asked for.
        stop: texts that end it.
        names: what the client calls a knob that it gave under another name.
    """

    knobs: dict[str, Any]
    new: int | None
    n: int
    copies: int
    alternatives: int | None
    stop: tuple[str, ...]
    names: dict[str, str]


def wish(body: Any, defaults: Mapping[str, Any]) -> Wish:
    """Translate a request.

    Sampling follows OpenAI: tokens are drawn at temperature 1 from the whole vocabulary, but where
    the request or the model's own generation_config.json (`defaults`) says otherwise; with
    `temperature: 0`, `do_sample: false` or `num_beams` the likeliest is taken.

    Raises:
        Refused: fields that do not go together.
    """
    sent = body.model_dump(exclude_unset=True)
    knobs = {
        knob.name: sent[knob.name]
        for knob in fields(Params)
        if knob.name in sent and knob.name != "top_logprobs"
    }
    lengths = {
        name: sent[name]
        for name in ("max_tokens", "max_completion_tokens", "max_new_tokens")
        if sent.get(name) is not None
    }
    knobs.pop("max_new_tokens", None)
    if len(set(map(str, lengths.values()))) > 1:
        raise Refused(
            400, f"{' and '.join(lengths)} say different lengths", param=next(iter(lengths))
        )
    for name, ours in (("n", "num_return_sequences"), ("stop", "stop_strings")):
        if ours in knobs and sent.get(name) is not None:
            raise Refused(400, f"{name} and {ours} are two names of one thing", param=name)
    _sampling(knobs, defaults)
    stop = knobs.pop("stop_strings", None) if body.stop is None else body.stop
    stop = (stop,) if isinstance(stop, str) else tuple(stop or ())
    n = knobs.pop("num_return_sequences", None) or body.n
    if not isinstance(n, int) or not 1 <= n <= MOST_COPIES:
        raise Refused(400, f"n must be from 1 to {MOST_COPIES}, got {n}", param="n")
    copies = max(n, getattr(body, "best_of", None) or 1)
    if copies > n and body.stream:
        raise Refused(
            400, "best_of cannot be streamed: the best is known at the end", param="best_of"
        )
    if getattr(body, "best_of", None) is not None and body.best_of < n:
        raise Refused(400, f"best_of={body.best_of} is less than n={n}", param="best_of")
    return Wish(
        knobs=knobs,
        new=next(iter(lengths.values()), None),
        n=n,
        copies=copies,
        alternatives=_alternatives(body, sent),
        stop=stop,
        names=_names(sent, lengths),
    )


def _names(sent: Mapping[str, Any], lengths: Iterable[str]) -> dict[str, str]:
    """Knobs that the client gave under OpenAI's names, with those."""
    known = {"stop_strings": "stop", "num_return_sequences": "n"}
    given = {ours: theirs for ours, theirs in known.items() if ours not in sent and theirs in sent}
    return given | dict.fromkeys(("max_new_tokens",), next(iter(lengths), "max_tokens"))


def _sampling(knobs: dict[str, Any], defaults: Mapping[str, Any]) -> None:
    """Make of a silent request one that samples, and of a temperature of 0 one that does not."""
    if knobs.get("temperature") == 0 and not isinstance(knobs["temperature"], bool):
        if knobs.get("do_sample"):
            raise Refused(400, "temperature=0 and do_sample=true exclude each other",
                          param="temperature")  # fmt: skip
        del knobs["temperature"]
        knobs["do_sample"] = False
    beams = knobs.get("num_beams", defaults.get("num_beams"))
    if "do_sample" not in knobs and beams in (None, 1):
        knobs["do_sample"] = True
    if "top_k" not in knobs and defaults.get("top_k") is None:
        knobs["top_k"] = 0


def _alternatives(body: Any, sent: Mapping[str, Any]) -> int | None:
    top = sent.get("top_logprobs")
    if not isinstance(body, _ChatCompletion):
        return body.logprobs if body.logprobs is not None else top
    if top and not body.logprobs:
        raise Refused(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    return (top or 0) if body.logprobs else None
