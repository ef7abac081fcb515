"""Kimi K2's sections of calls, and K3's tags."""

from __future__ import annotations

import html
import re
from functools import partial

from fastgen.serve.tools import form, json_text
from fastgen.serve.tools.form import AnswerOptions, GrammarRules, parameters_of
from fastgen.serve.tools.format import KEY, TOOL, Format
from fastgen.serve.tools.reader import THINK, AnswerReader, Marks, Steps
from fastgen.serve.tools.typed import EVERY, Parameters, closed

ALL, END_ALL = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
ONE, ARGUMENTS, END_ONE = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
ID = re.compile(r"[^<\s]+")


class KimiSections(AnswerReader):
    """Reads sections of calls, each with an id that names its tool, such as `functions.f:0`."""

    begins = (ALL,)

    def calls(self, mark: str) -> Steps[None]:
        text = self.text
        called = False
        while True:
            between: list[str] = []
            next_mark = yield from text.until([ONE, END_ALL], between.append)
            if next_mark is None or (
                next_mark == END_ALL and "".join(between).strip() and not called
            ):
                return self.broken()
            if next_mark == END_ALL:
                text.recorded()
                return None
            called = True
            yield from text.space()
            name = self._tool((yield from text.run(ID)))
            yield from text.space()
            if name is None or not (yield from text.accept(ARGUMENTS)):
                return self.broken()
            yield from text.space()
            if not (yield from json_text.object_of(self, name)):
                return self.broken()
            yield from text.space()
            if not (yield from text.accept(END_ONE)):
                return self.broken()
            self.ended()
            text.record()

    def _tool(self, call: str) -> str | None:
        name = re.sub(r":\d+$", "", call)
        for one in (name, name.removeprefix("functions."), name.rpartition(".")[2]):
            if one in self.asked.tools:
                return one
        return None


class Kimi(Format):
    """K2."""

    name = "kimi"
    reader = KimiSections
    mark, marks = ALL, (ALL, END_ALL, ONE, ARGUMENTS, END_ONE)
    repeats = False
    reasoning = THINK

    def shown(self, call: str) -> bool:
        return (
            re.search(
                rf"<\|tool_call_begin\|>.*<\|tool_call_argument_begin\|>\s*\{{\s*\"{KEY}",
                call,
                re.DOTALL,
            )
            is not None
        )

    def told(self, tools: str) -> bool:
        return "tool_declare<|im_middle|>" in tools

    def body(self, made: GrammarRules, wanted: AnswerOptions) -> str:
        number = made.rule("/[0-9]{1,3}/", "NUMBER")
        parts = [
            f"{made.literal(f'{ONE}functions.{name}:')} {number} {made.literal(ARGUMENTS)} "
            f"{made.json(parameters_of(schema))} {made.literal(END_ONE)}"
            for name, schema in wanted.tools.items()
        ]
        one = made.rule(made.choice(parts), "call")
        again = f"{one}*" if wanted.several else ""
        return f"{one} {again} {made.literal(END_ALL)}"


QUOTE = '"'
OPEN, CLOSE, SEPARATOR = "<|open|>", "<|close|>", "<|sep|>"
TAG = re.compile(r"[^<]+")
ATTRIBUTE = re.compile(r'(\w+)="([^"]*)"')
KINDS = {"string": frozenset({"string"})}
THINK3 = Marks(f"{OPEN}think{SEPARATOR}", f"{CLOSE}think{SEPARATOR}")


class Elements(AnswerReader):
    """Reads elements: think, response, tools; what stands outside of them is content."""

    def _answer(self) -> Steps[None]:
        text = self.text
        ahead = f"{OPEN}response"
        if (yield from text.peek(len(ahead))) != ahead:  # the prompt may have begun to think
            yield from self.reasoning()
        while mark := (yield from text.until([OPEN, CLOSE], self.content)):
            text.record(mark)
            tag = yield from text.run(TAG)
            if not (yield from text.accept(SEPARATOR)):
                self.broken()
            elif mark == OPEN and tag == "think" and self.asked.reasoning:
                text.recorded()
                yield from text.until([THINK3.end], self.think)
            elif mark == OPEN and tag.startswith("call ") and self.asked.tools:
                yield from self._call(dict(ATTRIBUTE.findall(tag)).get("tool", ""))
            elif tag in ("response", "tools", "message", "call", "argument", "think"):
                text.recorded()
            else:
                self.broken()

    def _call(self, name: str) -> Steps[None]:
        text = self.text
        if name not in self.asked.tools:
            return self.broken()
        self.call(name)
        parameters = Parameters(self, self.asked.tools[name])
        close = f"{CLOSE}argument{SEPARATOR}"
        ends = [f"{OPEN}argument", f"{CLOSE}call"]
        while True:
            yield from text.space()
            if (yield from text.accept(f"{CLOSE}call{SEPARATOR}")):
                parameters.end()
                return self.ended()
            if not (yield from text.accept(OPEN)):
                return self.broken()
            tag = yield from text.run(TAG)
            told = {key: html.unescape(one) for key, one in ATTRIBUTE.findall(tag)}
            if not tag.startswith("argument ") or not (yield from text.accept(SEPARATOR)):
                return self.broken()
            kind = KINDS.get(told["type"], EVERY - {"string"}) if "type" in told else None
            whole = yield from parameters.read(
                told.get("key", ""), partial(closed, text, close, ends, False, {}), kind
            )
            if not whole:
                return self.broken()


class Kimi3(Format):
    """K3."""

    name = "kimi3"
    reader = Elements
    mark = f"{OPEN}tools{SEPARATOR}"
    marks = (OPEN, CLOSE, SEPARATOR)
    repeats = False
    reasoning = THINK3
    channels = True

    def shown(self, call: str) -> bool:
        return f'{OPEN}call tool="{TOOL}"' in call

    def body(self, made: GrammarRules, wanted: AnswerOptions) -> str:
        calls = []
        number = made.rule("/[0-9]{1,3}/", "NUMBER")
        for name, schema in wanted.tools.items():
            root = parameters_of(schema)
            parts = [self._argument(made, root, *one) for one in form.members(root, root)]
            head = made.literal(f'{OPEN}call tool="{name}" index="')
            head += f" {number} {made.literal(QUOTE + SEPARATOR)}"
            calls.append(" ".join([head, *parts, made.literal(f"{CLOSE}call{SEPARATOR}")]))
        one = made.rule(made.choice(calls), "call")
        again = f"{one}*" if wanted.several else ""
        return f"{one} {again} {made.literal(f'{CLOSE}tools{SEPARATOR}')}"

    def _argument(
        self, made: GrammarRules, root: object, name: str, schema: object, needed: bool
    ) -> str:
        close, options = f"{CLOSE}argument{SEPARATOR}", []
        head = f'{OPEN}argument key="{name}" type="'
        for kind, value in form.by_kind(made, schema, root, close):
            told = "number" if kind == "integer" else kind
            options.append(f"{made.literal(head + told + QUOTE + SEPARATOR)} {value}")
        return made.rule(made.choice(options), "argument") + ("" if needed else "?")

    def grammar(self, made: GrammarRules, wanted: AnswerOptions) -> str:
        """The elements in their order: a response, which may be empty, then the calls."""
        thought = form.thought(made, wanted)
        response = f"{OPEN}response{SEPARATOR}"
        end = f"{CLOSE}response{SEPARATOR}"
        body = made.rule(self.body(made, wanted), "calls")
        over = f"({made.literal(f'{CLOSE}message{SEPARATOR}')})?"
        opened = f"({made.literal(response)})?"
        calls = f"{made.literal(self.mark)} {body} {over}"
        if wanted.forced:
            return made.text(f"{thought} {opened} {made.literal(end)} {calls}")
        text = f"{wanted.content} {made.literal(end)}" if wanted.content else made.until(end)
        return made.text(f"{thought} {opened} {text} ({calls} | {over})")
