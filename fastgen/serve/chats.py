"""`POST /v1/chat/completions`: a conversation to the model's answer, or to its calls of tools."""

from __future__ import annotations

import importlib.util
import secrets
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastgen.engine.output import Token
from fastgen.inputs.lengths import NEW_TOKENS
from fastgen.inputs.params import FORMS
from fastgen.sampling import schema
from fastgen.serve import dialects, reasoning
from fastgen.serve.answers import GeneratedText, chat_logprobs
from fastgen.serve.front import Front
from fastgen.serve.refused import Refused
from fastgen.serve.response import Answer
from fastgen.serve.tools.choice import Choice, chosen
from fastgen.serve.tools.form import AnswerOptions, GrammarRules
from fastgen.serve.tools.reader import AnswerEvent, AnswerReader, Marks, ReadingOptions
from fastgen.serve.tools.whole import ToolCall, WholeAnswer
from fastgen.serve.wire import GenerationRequest, StreamOptions, generation_request


@dataclass
class ChatText:
    """One text of an answer, as it is read.

    Attributes:
        text: as it comes.
        reader: what reads it; None where there is nothing in it but content.
        whole: what it said so far.
        tokens: those whose text has come and that no chunk of a stream has had yet.
    """

    text: GeneratedText
    reader: AnswerReader | None
    whole: WholeAnswer = field(default_factory=WholeAnswer)
    tokens: list[Token] = field(default_factory=list)

    def push(self, token: Token) -> list[AnswerEvent]:
        """Read one more token."""
        piece, tokens = self.text.push(token)
        self.tokens += tokens
        if self.reader is None:
            events = [AnswerEvent("content", piece)] if piece else []
        else:
            events = self.reader.push(piece) if piece else []
            if self.text.reason is not None and not self.reader.text.ended:
                events += self.reader.end(cut=self.text.reason == "length")
        self.whole.take(events)
        return events


@dataclass
class ChatAnswer(Answer):
    """An answer that has begun.

    Attributes:
        readers: of each text; None where there is nothing to be read but content.
        named: whether the request says which tool is to be called.
    """

    readers: Sequence[AnswerReader | None]
    named: bool

    ID = "chatcmpl"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._said = [
            ChatText(text, reader)
            for text, reader in zip(self.run.texts, self.readers, strict=True)
        ]

    @property
    def kind(self) -> str:
        return "chat.completion.chunk" if self.streamed else "chat.completion"

    async def whole(self) -> dict[str, Any]:
        async for index, token in self.run.tokens():
            self._said[index].push(token)
        return await self.front.put_together(self.size, self._made)

    def _made(self) -> dict[str, Any]:
        choices = []
        for index, chat_text in enumerate(self._said):
            whole = chat_text.whole
            message: dict[str, Any] = {
                "role": "assistant",
                "content": whole.content or None if whole.calls else whole.content,
                "refusal": None,
            }
            if whole.reasoning:
                message["reasoning_content"] = whole.reasoning
            if whole.calls:
                message["tool_calls"] = [_in_message(call) for call in whole.calls]
            choices.append(
                {
                    "index": index,
                    "message": message,
                    "logprobs": self._logprobs(chat_text.text.tokens),
                    "finish_reason": self._reason(chat_text),
                }
            )
        return self.with_choices(choices)

    def _reason(self, chat_text: ChatText) -> str | None:
        """The reason of its end, OpenAI's: "tool_calls" only where the model chose to call."""
        called = chat_text.text.reason == "stop" and chat_text.whole.calls and not self.named
        return "tool_calls" if called else chat_text.text.reason

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if self.request.alternatives is None:
            return None
        return chat_logprobs(tokens, self.front.model.tokenizer)

    async def chunks(self) -> AsyncIterator[dict[str, Any] | None]:
        """A chunk for each thing that a token says; None for a token that says nothing yet."""
        for index in range(len(self.run.texts)):
            yield self._delta(index, {"role": "assistant", "content": "", "refusal": None})
        async for index, token in self.run.tokens():
            chat_text = self._said[index]
            if chat_text.text.reason is not None:
                continue
            deltas = list(_deltas(chat_text.push(token), chat_text.whole))
            if not deltas and (chat_text.text.reason is None or not chat_text.tokens):
                yield None
            elif not deltas:
                deltas = [{"content": ""}]
            for delta in deltas:
                tokens, chat_text.tokens = chat_text.tokens, []
                yield self._delta(index, delta, self._logprobs(tokens))
            if chat_text.text.reason is not None:
                yield self._delta(index, {}, None, self._reason(chat_text))
        for chunk in self.last_chunks():
            yield chunk

    def _delta(
        self, index: int, delta: dict[str, Any], logprobs: Any = None, reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self.chunk(choice)


def _in_message(call: ToolCall) -> dict[str, Any]:
    """A call as an OpenAI message has it."""
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": _call_id(), "type": "function", "function": function}


def _call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def _deltas(events: Sequence[AnswerEvent], whole: WholeAnswer) -> Iterator[dict[str, Any]]:
    """Events as a stream's deltas.

    Args:
        whole: what was said, these events included.
    """
    begun = sum(event.kind == "call" for event in events)
    index = whole.begun - begun - 1
    for event in events:
        if event.kind == "content" or (event.kind == "broken" and event.text):
            yield {"content": event.text}
        elif event.kind == "reasoning":
            yield {"reasoning_content": event.text}
        elif event.kind == "call":
            index += 1
            function = {"name": event.text, "arguments": ""}
            call = {"index": index, "id": _call_id(), "type": "function", "function": function}
            yield {"tool_calls": [call]}
        elif event.kind == "arguments":
            yield {"tool_calls": [{"index": index, "function": {"arguments": event.text}}]}


async def answer(front: Front, body: Any) -> ChatAnswer:
    """Begin an answer.

    Raises:
        Refused: what cannot be done.
    """
    request = generation_request(body, front.defaults, front.limits)
    if request.new == 0:
        raise Refused(400, "an answer has one token at least", param="max_tokens")
    choice = _choice(front, body)
    functions = list(body.tools) if body.tools and body.tool_choice != "none" else None
    messages = [one.model_dump(exclude_unset=True) for one in body.messages]
    ids, prompt = await front.conversation(messages, functions, _variables(front, body))
    marks = front.marks
    begun = reasoning.inside(prompt, marks)
    notes = await _held_to(front, body, request, choice, begun)
    if body.max_reasoning_tokens is not None:
        _limit(front, request, marks, body.max_reasoning_tokens, len(ids), begun)
    kept = front.kept_for(bool(choice.tools))
    usual = front.defaults.get("max_new_tokens") or NEW_TOKENS["reply"]
    run = await front.run([ids], request, usual, kept)
    run.notes |= dict.fromkeys(notes)
    asked = ReadingOptions(choice.tools, marks, begun, front.raw)
    readers = [front.reader(asked) for _ in run.texts]
    options = body.stream_options or StreamOptions()
    return ChatAnswer(front, run, request, options, bool(body.stream), readers, choice.named)


def _limit(
    front: Front,
    request: GenerationRequest,
    marks: Marks | None,
    most: int,
    prompt: int,
    begun: bool,
) -> None:
    """End reasoning after `most` tokens."""
    if marks is None:
        raise Refused(
            400,
            "max_reasoning_tokens: the chat template shows no reasoning that could be ended",
            param="max_reasoning_tokens",
        )
    budget = reasoning.Budget(front.model.tokenizer, marks, most, prompt, begun)
    request.knobs["logits_processor"] = [budget]


def _variables(front: Front, body: Any) -> dict[str, Any]:
    """The template's other variables; the log is told of fields that nothing looks at."""
    sent, given = body.model_dump(exclude_unset=True), body.chat_template_kwargs or {}
    used = dialects.for_template(sent, front.template)
    effort = sent.get("reasoning_effort") if "reasoning_effort" not in used else None
    enabled = given.get("enable_thinking")
    switched = reasoning.switched(effort, front.shown.switches, enabled)
    front.noted(sent, {**used, **({"reasoning_effort": effort} if switched else {})})
    return switched | used | given


def _format(wanted: Any) -> dict[str, Any]:
    """The knobs that a `response_format` stands for."""
    if wanted.type == "text":
        return {}
    if wanted.type == "json_object":
        return {"json_schema": {"type": "object"}}
    given = wanted.json_schema or {}
    if not isinstance(given.get("schema"), dict):
        raise Refused(
            400,
            'response_format of json_schema needs {"json_schema": {"schema": {...}}}',
            param="response_format",
        )
    if not given.get("strict"):
        return {"json_schema": given["schema"]}
    try:
        return {"json_schema": schema.strict(given["schema"])}
    except ValueError as error:
        raise Refused(400, f"response_format: {error}", param="response_format") from error


def _choice(front: Front, body: Any) -> Choice:
    """The tools of a request and its choice among them."""
    several = body.parallel_tool_calls is not False
    try:
        choice = chosen(body.tools, body.tool_choice, several)
    except ValueError as error:
        param = "tool_choice" if str(error).startswith("tool_choice") else "tools"
        raise Refused(400, str(error), param=param) from error
    if choice.tools and front.has_template and front.format is None:
        why = (
            "does not show in a known form how the model calls them"
            if front.shown.tools
            else "knows no tools; fastgen serve --plain-tools tells the model of them in words"
        )
        raise Refused(400, f"tools: the chat template {why}", param="tools")
    return choice


async def _held_to(
    front: Front, body: Any, request: GenerationRequest, choice: Choice, begun: bool
) -> list[str]:
    """Let the knobs say what the answer has to be; returns what it is not held to, and why."""
    wanted = {} if body.response_format is None else _format(body.response_format)
    form = next((name for name in FORMS if request.knobs.get(name) is not None), None)
    if choice.forced and form is not None:
        raise Refused(400, f"tool_choice forces a call, and {form} another text", param=form)
    free = not choice.tools or (not choice.forced and (front.free_calls or form is not None))
    if free or (not choice.forced and importlib.util.find_spec("llguidance") is None):
        request.knobs.update(wanted)
        return []
    made = GrammarRules(front.specials)
    content = None if choice.forced or not wanted else made.json(wanted["json_schema"])
    try:
        asks = AnswerOptions(
            choice.tools, choice.forced, choice.several, front.marks, begun, content
        )
        assert front.format is not None
        grammar = front.format.grammar(made, asks)
        if not choice.forced:  # the service can do without
            await front.compiled({"grammar": grammar})
    except (ValueError, Refused) as error:
        if choice.forced or (isinstance(error, Refused) and error.status != 400):
            raise (
                error
                if isinstance(error, Refused)
                else Refused(400, f"tools: {error}", param="tools")
            ) from error
        request.knobs.update(wanted)
        return [f"calls are not held to the tools' schemas: {error}"]
    request.knobs["grammar"] = grammar
    return []
