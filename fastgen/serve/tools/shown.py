"""A model's forms of calls and of reasoning, as its chat template shows them.

A template is a program, so it is run: on a conversation of words that stand in no template, in
which a tool is offered, an assistant thinks and calls it. How these words come out is the form.
"""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastgen.generator import CausalLM
from fastgen.serve.tools.command_r import CommandR
from fastgen.serve.tools.deepseek import DeepSeek, DeepSeek3, Dsml, Dsml4, Dsml41
from fastgen.serve.tools.format import ANSWER, KEY, THOUGHT, TOOL, VALUE, Format
from fastgen.serve.tools.gemma import FunctionGemma, Gemma
from fastgen.serve.tools.glm import Glm, Glm47
from fastgen.serve.tools.granite import Granite
from fastgen.serve.tools.harmony import Harmony
from fastgen.serve.tools.hermes import Hermes
from fastgen.serve.tools.kimi import Kimi, Kimi3
from fastgen.serve.tools.llama import Llama, Pythonic
from fastgen.serve.tools.mistral import Mistral, Mistral11
from fastgen.serve.tools.qwen_xml import QwenXml
from fastgen.serve.tools.reader import THINK, Marks
from fastgen.serve.tools.smollm3 import VARIABLE, SmolLM3
from fastgen.text import chat_template

# The first whose form is there counts: those with marks of their own, then those with few.
FORMATS: tuple[Format, ...] = (
    QwenXml(), Glm47(), Glm(), Harmony(), Kimi3(), Kimi(), DeepSeek3(), DeepSeek(), Dsml41(),
    Dsml4(), Dsml(), Gemma(), FunctionGemma(), CommandR(), Mistral11(), Mistral(), Granite(),
    SmolLM3(), Hermes(), Pythonic(), Llama(),
)  # fmt: skip

# Renders messages, with tools or without, and other variables; raises ValueError where it cannot.
Render = Callable[[Sequence[dict[str, Any]], Sequence[Any] | None, Mapping[str, Any]], str]

ASKED: dict[str, Any] = {"role": "user", "content": "Hi"}
OFFERED = {
    "type": "function",
    "function": {
        "name": TOOL,
        "description": "A tool.",
        "parameters": {
            "type": "object",
            "properties": {KEY: {"type": "string", "description": "A text."}},
            "required": [KEY],
        },
    },
}
CALLED = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "id": "abcdefgh1",
            "type": "function",
            "function": {"name": TOOL, "arguments": {KEY: VALUE}},
        }
    ],
}
RETURNED = {"role": "tool", "tool_call_id": "abcdefgh1", "name": TOOL, "content": "5"}
TALKS: tuple[list[dict[str, Any]], ...] = (
    [ASKED, CALLED, RETURNED],
    [ASKED, CALLED, RETURNED, {"role": "assistant", "content": "5"}, ASKED],
    [ASKED, {**CALLED, "content": "So."}, RETURNED],
    [ASKED, CALLED],
)
MARKS = (
    THINK,
    Marks("[THINK]", "[/THINK]"),
    Marks("<seed:think>", "</seed:think>"),
    *dict.fromkeys(one.reasoning for one in FORMATS if one.reasoning),
)


@dataclass(frozen=True)
class TemplateForms:
    """The forms that a template shows.

    Attributes:
        tools: whether it shows the tools that are offered.
        format: how calls are written; None where it shows none that we know.
        reasoning: what stands around thoughts; None where nothing is shown.
        variables: names of others' for the tools.
        switches: variables that switch thinking on and off.
    """

    tools: bool
    format: Format | None
    reasoning: Marks | None
    variables: tuple[str, ...] = ()
    switches: tuple[str, ...] = ()


NOTHING = TemplateForms(False, None, None)
SWITCHES = ("enable_thinking", "thinking")


def of(model: CausalLM) -> TemplateForms:
    """The forms that the template of a model shows; nothing where it has none."""
    if not model.has_tokenizer or not chat_template.has_template(
        model.directory, model.tokenizer.config
    ):
        return NOTHING

    def render(messages: Any, tools: Any, variables: Mapping[str, Any]) -> str:
        return chat_template.prompt(
            model.directory, model.tokenizer.config, messages, tools, **variables
        )

    added = model.tokenizer.backend.get_added_tokens_decoder().values()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what the template leaves out
        return shown(render, {token.content for token in added})


def shown(render: Render, tokens: Collection[str] = ()) -> TemplateForms:
    """Probe a template.

    Args:
        tokens: the spellings of the tokens that stand for themselves: a model that has those of
            reasoning thinks, whether its template shows it or not.
    """
    bare = _rendered(render, [ASKED], None, {})
    offered = _rendered(render, [ASKED], [OFFERED], {})
    variables: tuple[str, ...] = ()
    if TOOL not in offered:
        other = _rendered(render, [ASKED], [OFFERED], {VARIABLE: [OFFERED]})
        if TOOL in other:
            offered, variables = other, (VARIABLE,)
    form = _format(render, offered, variables) if TOOL in offered else None
    switches = tuple(switch for switch in SWITCHES if _switches(render, switch))
    thoughts = _reasoning(render, bare, form, tokens)
    return TemplateForms(TOOL in offered, form, thoughts, variables, switches)


def _switches(render: Render, name: str) -> bool:
    on, off = (_rendered(render, [ASKED], None, {name: value}) for value in (True, False))
    return on != off


def _format(render: Render, offered: str, variables: Sequence[str]) -> Format | None:
    """The format of a template that shows tools."""
    more = {name: [OFFERED] for name in variables}
    for talk in TALKS:
        text = _rendered(render, talk, [OFFERED], more)
        call = text[_parting(text, offered) :]
        for form in FORMATS:
            if call and form.shown(call):
                return form
    return next((form for form in FORMATS if form.told(offered)), None)


def _reasoning(
    render: Render, bare: str, form: Format | None, tokens: Collection[str]
) -> Marks | None:
    """The marks that stand around a thought, or that an answer begins with."""
    thinks = {"role": "assistant", "reasoning_content": THOUGHT, "thinking": THOUGHT}
    for content, tools in itertools.product((ANSWER, "", None), (None, [OFFERED])):
        message: dict[str, Any] = {**thinks, "content": content}
        if tools:
            message["tool_calls"] = CALLED["tool_calls"]
        text = _rendered(render, [ASKED, message, *([RETURNED] if tools else [])], tools, {})
        for marks in MARKS:
            between = rf"{re.escape(marks.begin)}\s*{THOUGHT}\s*{re.escape(marks.end)}"
            if re.search(between, text):
                return marks
    on = _rendered(render, [ASKED], None, {"enable_thinking": True, "thinking": True})
    off = _rendered(render, [ASKED], None, {"enable_thinking": False, "thinking": False})
    for marks in MARKS:
        # An end alone tells only if it is one of thoughts: `<|end|>` ends messages of others.
        tells = [marks.begin, *([marks.end] if "think" in marks.end.lower() else [])]
        if any(mark in text for mark in tells for text in (bare, on, off)):
            return marks
    if form is not None and form.channels:
        return form.reasoning
    return next((marks for marks in MARKS if {marks.begin, marks.end} <= {*tokens}), None)


def _rendered(
    render: Render, messages: Sequence[dict[str, Any]], tools: Any, variables: Mapping[str, Any]
) -> str:
    try:
        return render(messages, tools, variables)
    except ValueError:
        return ""


def _parting(one: str, other: str) -> int:
    """The place where two texts part: before the tag, if it is within one (`<|` of two)."""
    pairs = enumerate(zip(one, other, strict=False))
    place = next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))
    begun = re.search(r"<[^<>\s]*$", one[:place])
    return begun.start() if begun else place
