"""Bodies of requests: OpenAI's fields, and every knob of `Params`, made from the one list.

OpenAI's fields are checked here; knobs are checked where they always are, by `generate`'s door.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    WithJsonSchema,
    create_model,
)
from pydantic_core import PydanticCustomError

from fastgen.inputs.params import Params
from fastgen.serve import dialects
from fastgen.serve.dialects import Sent
from fastgen.serve.limits import RequestLimits
from fastgen.serve.refused import Refused


class StreamOptions(Sent):
    """Options of a stream."""

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False  # so far, with each chunk
    include_obfuscation: bool | None = False


class Common(Sent):
    """Fields of both kinds of requests."""

    model: str | None = Field(None, description="of /v1/models; any where there is one")
    n: int | None = Field(1, ge=1, description="answers to each prompt")
    max_tokens: int | None = Field(None, ge=0, description="new tokens, at most")
    stop: str | list[str] | None = Field(None, description="texts that end it; left out")
    # Knobs that the service looks at before `generate` does.
    max_new_tokens: int | None = Field(None, ge=0, description="as max_tokens")
    num_return_sequences: int | None = Field(None, ge=1, description="as n")
    stop_strings: str | list[str] | None = Field(None, description="as stop")
    top_logprobs: int | None = Field(None, ge=0, description="alternatives a token")
    stream: bool | None = Field(False, description="server-sent events, as tokens come")
    stream_options: StreamOptions | None = None


def with_knobs(
    name: str, base: type[Sent], accepted: Mapping[str, Any], without: Collection[str] = ()
) -> type[Any]:
    """`base` with a field for each knob that it lacks, and for what others call theirs.

    Args:
        accepted: the one value of each field that has one.
        without: knobs and others' fields that it is not to have.
    """
    knobs: dict[str, Any] = {
        knob.name: (Any, Field(None, description=knob.metadata["help"])) for knob in fields(Params)
    }
    others = knobs | dialects.shared() | dialects.only(accepted)
    left_out = {*base.model_fields, *without}
    more = {field: of for field, of in others.items() if field not in left_out}
    made: type[Any] = create_model(name, __base__=base, **more)
    return made


def invalid(error: ValidationError) -> Refused:
    """The first thing that is wrong with a request."""
    first = error.errors(include_url=False, include_context=False)[0]
    where = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        return Refused(400, f"{'.'.join(where)} is no field of this request", param=where[0])
    name = where[0] if where else None
    return Refused(400, f"{name or 'the body'}: {first['msg']}", param=name)


_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_TEXTS = {"type": "array", "items": {"type": "string"}, "minItems": 1}
PROMPT: list[dict[str, Any]] = [
    {"type": "string"}, _TEXTS, _IDS, {"type": "array", "items": _IDS, "minItems": 1},
]  # fmt: skip


def _prompt(given: Any) -> Any:
    """A prompt of one of the four kinds; a thousand times faster than pydantic says what it isn't.

    Raises:
        PydanticCustomError: it is none of them.
    """
    if isinstance(given, str):
        return given
    if isinstance(given, list):
        kinds = set(map(type, given))
        if len(kinds) < 2 and kinds <= {str, int, list}:
            deep = set().union(*(map(type, one) for one in given)) if list in kinds else set()
            if deep <= {int}:
                return given
    raise PydanticCustomError(
        "prompt", "Input should be a text, a list of texts, a list of token ids, or lists of these"
    )


class _Completion(Common):
    """`POST /v1/completions`."""

    prompt: Annotated[
        Any, PlainValidator(_prompt), WithJsonSchema({"anyOf": PROMPT}, mode="validation")
    ] = Field(description="a text or several, or token ids")
    best_of: int | None = Field(None, ge=1, description="of which the n best come")
    echo: bool | None = Field(False, description="begin with the prompt")
    logprobs: int | None = Field(None, ge=0, description="alternatives a token")
    suffix: Any = Field(None, description="not supported")


class Part(Sent):
    """A part of a message."""

    model_config = ConfigDict(extra="allow")
    type: str
    text: str | None = None


class Message(Sent):
    """One message of a conversation; what else it has goes to the chat template."""

    model_config = ConfigDict(extra="allow")
    role: str
    content: str | list[Part] | None = None


class ResponseFormat(Sent):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = None


class _ChatCompletion(Common):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1, description="oldest first")
    max_completion_tokens: int | None = Field(None, ge=0, description="as max_tokens")
    logprobs: bool | None = Field(None, description="whether tokens come with theirs")
    tools: list[dict[str, Any]] | None = Field(None, description="functions that may be called")
    tool_choice: Any = Field(None, description="none, auto, required, a function, or allowed_tools")
    parallel_tool_calls: bool | None = Field(None, description="whether several calls may come")
    max_reasoning_tokens: int | None = Field(
        None, ge=0, description="of reasoning, which then has to end"
    )
    response_format: ResponseFormat | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="for the template")
    reasoning_effort: str | None = Field(
        None, description="for templates that name it, or can switch reasoning off: none"
    )
    verbosity: str | None = Field(None, description="for templates that name it")


if TYPE_CHECKING:
    Completion = _Completion
    ChatCompletion = _ChatCompletion
else:
    Completion = with_knobs("Completion", _Completion, dialects.ONLY_COMPLETIONS)
    ChatCompletion = with_knobs("ChatCompletion", _ChatCompletion, dialects.ONLY_CHATS)


class Choose(Sent):
    """`POST /v1/choose`."""

    model: str | None = Field(None, description="of /v1/models; any where there is one")
    prompt: Annotated[
        Any, PlainValidator(_prompt), WithJsonSchema({"anyOf": PROMPT}, mode="validation")
    ] = Field(None, description="a text or several, or token ids: a decision for each")
    messages: list[Message] | None = Field(
        None, min_length=1, description="a conversation in place of a prompt"
    )
    options: list[str] | list[list[int]] = Field(
        min_length=2, description="what may follow: texts or token ids"
    )
    temperature: float | None = Field(None, description="that the scores are divided by")
    per_token: bool | None = Field(False, description="compare the mean of their tokens")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="for the template")


class Tokenize(Sent):
    """`POST /tokenize`."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool | None = True


class Detokenize(Sent):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: list[int]
    skip_special_tokens: bool | None = False


@dataclass(frozen=True)
class GenerationRequest:
    """A request as it is for each of its prompts.

    Attributes:
        knobs: keywords of `generate`, without the length.
        new: tokens at most; None where nobody says.
        copies: sequences of each prompt; `n` of them are given out.
        alternatives: of each token; None where no log-probabilities are asked for.
        stop: texts that end it, looked for in what is new.
        same: whether all copies are one sequence: the likeliest token is always taken.
        names: the client's own names of knobs that it gave under another.
    """

    knobs: dict[str, Any]
    new: int | None
    n: int
    copies: int
    alternatives: int | None
    stop: tuple[str, ...]
    same: bool
    names: dict[str, str]

    @property
    def stops(self) -> tuple[str, ...]:
        """All texts that end it, `stop_strings` too, which may begin in the prompt."""
        strings = self.knobs.get("stop_strings")
        strings = strings if isinstance(strings, list | tuple) else [strings]
        return self.stop + tuple(one for one in strings if isinstance(one, str))


def generation_request(
    body: Any, defaults: Mapping[str, Any], limits: RequestLimits
) -> GenerationRequest:
    """Translate a request.

    Sampling follows OpenAI: tokens are drawn at temperature 1 from the whole vocabulary, but where
    the request or the model's own generation_config.json (`defaults`) says otherwise; with
    `temperature: 0`, `do_sample: false` or `num_beams` the likeliest is taken.

    Raises:
        Refused: fields that do not go together.
    """
    sent = body.model_dump(exclude_unset=True)
    _check_others(body, sent)
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
    try:
        knobs |= dialects.knobs(sent, defaults)
    except ValueError as error:
        raise Refused(400, str(error), param=str(error).partition(" ")[0]) from error
    _sampling(knobs, defaults)
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    for one, value in (("stop", body.stop), ("stop_strings", body.stop_strings)):
        texts = (value,) if isinstance(value, str) else tuple(value or ())
        limits.check("stops", len(texts), one)
        limits.check("stop_text", max(map(len, texts), default=0), one)
    n = knobs.pop("num_return_sequences", None) or body.n
    limits.check("copies", n, _given(body, "n", "num_return_sequences"))
    limits.check("copies", getattr(body, "best_of", None) or 1, "best_of")
    copies = max(n, getattr(body, "best_of", None) or 1)
    if copies > n and body.stream:
        raise Refused(
            400, "best_of cannot be streamed: the best is known at the end", param="best_of"
        )
    if getattr(body, "best_of", None) is not None and body.best_of < n:
        raise Refused(400, f"best_of={body.best_of} is less than n={n}", param="best_of")
    return GenerationRequest(
        knobs=knobs,
        new=next(iter(lengths.values()), None),
        n=n,
        copies=copies,
        alternatives=_alternatives(body, limits),
        stop=stop,
        same=copies > 1 and not knobs.get("do_sample") and _beams(knobs, defaults) in (None, 1),
        names=_names(sent, lengths),
    )


def _check_others(body: Any, sent: Mapping[str, Any]) -> None:
    """Refuse what others' fields ask for and is not done here."""
    of_kind = (
        dialects.ONLY_CHATS if isinstance(body, _ChatCompletion) else dialects.ONLY_COMPLETIONS
    )
    odd = dialects.odd(sent, dialects.ONLY | of_kind)
    if odd is not None:
        raise Refused(400, odd[1], param=odd[0])


def _names(sent: Mapping[str, Any], lengths: Iterable[str]) -> dict[str, str]:
    """Knobs that the client gave under the names of others, with those."""
    known = {
        "stop_strings": "stop", "num_return_sequences": "n", "min_new_tokens": "min_tokens",
        "eos_token_id": "stop_token_ids",
    }  # fmt: skip
    given = {ours: theirs for ours, theirs in known.items() if ours not in sent and theirs in sent}
    return given | dict.fromkeys(("max_new_tokens",), next(iter(lengths), "max_tokens"))


def _sampling(knobs: dict[str, Any], defaults: Mapping[str, Any]) -> None:
    """Make of a silent request one that samples, and of a temperature of 0 one that does not."""
    if knobs.get("temperature") == 0 and not isinstance(knobs["temperature"], bool):
        if knobs.get("do_sample"):
            raise Refused(
                400, "temperature=0 and do_sample=true exclude each other", param="temperature"
            )
        del knobs["temperature"]
        knobs["do_sample"] = False
    if "do_sample" not in knobs and _beams(knobs, defaults) in (None, 1):
        knobs["do_sample"] = True
    if "top_k" not in knobs and defaults.get("top_k") is None:
        knobs["top_k"] = 0


def _beams(knobs: Mapping[str, Any], defaults: Mapping[str, Any]) -> Any:
    return knobs.get("num_beams", defaults.get("num_beams"))


def _given(body: Any, *names: str) -> str:
    """The name that a request itself gives a thing of several names."""
    return next((name for name in names if name in body.model_fields_set), names[0])


def _alternatives(body: Any, limits: RequestLimits) -> int | None:
    """Alternatives of each token; None where no log-probabilities are asked for."""
    top: int | None = body.top_logprobs
    limits.check("alternatives", top or 0, "top_logprobs")
    if not isinstance(body, _ChatCompletion):
        limits.check("alternatives", body.logprobs or 0, "logprobs")
        return body.logprobs if body.logprobs is not None else top
    if top and not body.logprobs:
        raise Refused(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    return (top or 0) if body.logprobs else None
