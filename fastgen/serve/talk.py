"""A conversation to its answers, which are read as they come: the one way of every API of chats."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastgen.engine.output import Token
from fastgen.inputs.lengths import NEW_TOKENS
from fastgen.inputs.params import FORMS
from fastgen.sampling import schema
from fastgen.serve import dialects, reasoning
from fastgen.serve.answers import GeneratedText
from fastgen.serve.front import Front
from fastgen.serve.refused import Refused
from fastgen.serve.run import Run
from fastgen.serve.tools.choice import Choice, chosen
from fastgen.serve.tools.form import AnswerOptions, GrammarRules
from fastgen.serve.tools.reader import AnswerEvent, AnswerReader, Marks, ReadingOptions
from fastgen.serve.tools.whole import WholeAnswer
from fastgen.serve.wire import GenerationRequest, generation_request

# What a token is counted to, by the events that it brings.
KINDS = {"reasoning": "reasoning", "content": "content", "call": "call", "arguments": "call",
         "end": "call", "broken": "content"}  # fmt: skip


@dataclass
class ChatText:
    """One text of an answer, as it is read.

    Attributes:
        text: as it comes.
        reader: what reads it; None where there is nothing in it but content.
        whole: what it said so far.
        tokens: those whose text has come and that no chunk of a stream has had yet.
        kind: what was read last: "reasoning", "content" or "call"; None before anything was.
        thought: tokens of reasoning.
    """

    text: GeneratedText
    reader: AnswerReader | None
    whole: WholeAnswer = field(default_factory=WholeAnswer)
    tokens: list[Token] = field(default_factory=list)
    kind: str | None = None
    thought: int = 0
    _unread: int = 0  # tokens before anything was read

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
        self._count(events)
        return events

    def _count(self, events: Sequence[AnswerEvent]) -> None:
        """Count a token to what was read last, or else to what is read first."""
        kinds = [KINDS[event.kind] for event in events]
        if kinds:
            self.kind = "content" if "content" in kinds else kinds[-1]
        self._unread += 1
        if self.kind is not None:
            self.thought += self._unread if self.kind == "reasoning" else 0
            self._unread = 0


@dataclass
class Prompt:
    """A conversation as the model is going to read it.

    Attributes:
        ids: of `text`, by the chat template.
        choice: the tools that may be called.
        thinking: whether it ends within reasoning.
    """

    ids: list[int]
    text: str
    request: GenerationRequest
    choice: Choice
    thinking: bool


@dataclass
class Talk:
    """A conversation whose answers have begun.

    Attributes:
        run: makes the tokens.
        texts: of the answers.
        named: whether the request says which tool is to be called.
    """

    run: Run
    request: GenerationRequest
    texts: list[ChatText]
    named: bool


async def read(front: Front, body: Any) -> Prompt:
    """Make of the body of a chat what the model reads.

    Raises:
        Refused: what cannot be done.
    """
    request = generation_request(body, front.defaults, front.limits)
    if request.new == 0:
        raise Refused(400, "an answer has one token at least", param="max_tokens")
    choice = _choice(front, body)
    functions = list(body.tools) if body.tools and body.tool_choice != "none" else None
    messages = [one.model_dump(exclude_unset=True) for one in body.messages]
    ids, text = await front.conversation(messages, functions, _variables(front, body))
    return Prompt(ids, text, request, choice, reasoning.inside(text, front.marks))


async def begin(front: Front, body: Any, usual: int | None = None) -> Talk:
    """Begin the answers to the body of a chat.

    Args:
        usual: new tokens where the body does not say how many, and there is room for them; None
            for the model's own.

    Raises:
        Refused: what cannot be done.
    """
    prompt = await read(front, body)
    request, choice, marks = prompt.request, prompt.choice, front.marks
    notes = await _held_to(front, body, request, choice, prompt.thinking)
    if body.max_reasoning_tokens is not None:
        most = body.max_reasoning_tokens
        _limit(front, request, marks, most, len(prompt.ids), prompt.thinking)
    kept = front.kept_for(bool(choice.tools))
    usual = usual or front.defaults.get("max_new_tokens") or NEW_TOKENS["reply"]
    run = await front.run([prompt.ids], request, usual, kept)
    run.notes |= dict.fromkeys(notes)
    asked = ReadingOptions(choice.tools, marks, prompt.thinking, front.raw)
    texts = [ChatText(text, front.reader(asked)) for text in run.texts]
    return Talk(run, request, texts, choice.named)


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
