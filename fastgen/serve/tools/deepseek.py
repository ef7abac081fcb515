"""DeepSeek V3 and R1, V3.1, and the tags of V3.2 and later (DSML)."""

from __future__ import annotations

import json
import re
from functools import partial

from fastgen.serve.tools import form, json_text
from fastgen.serve.tools.form import AnswerOptions, GrammarRules, parameters_of
from fastgen.serve.tools.format import KEY, TOOL, Format
from fastgen.serve.tools.hermes import LINE
from fastgen.serve.tools.reader import NAME, THINK, AnswerReader, Steps
from fastgen.serve.tools.typed import EVERY, Parameters, closed

ALL, END_ALL = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
ONE, SEPARATOR, END_ONE = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
FENCE, END_FENCE = "```json", "```"
DSML = "｜DSML｜"
TEXT, OTHER = '"true">', '"false">'
QUOTED = re.compile(r'[^"<>\n]+')


class Sections(AnswerReader):
    """Reads a section of calls, with a fence around their arguments or without."""

    begins = (ALL,)

    def calls(self, mark: str) -> Steps[None]:
        text = self.text
        while True:
            yield from text.space()
            if (yield from text.accept(END_ALL)):
                return None
            if not (yield from text.accept(ONE)):
                return self.broken()
            name = yield from text.run(NAME)
            if not (yield from text.accept(SEPARATOR)):
                return self.broken()
            yield from text.space()
            if name == "function" and (yield from text.peek()) != "{":
                name = yield from text.run(NAME)
                yield from text.space()
            fenced = yield from text.accept(FENCE)
            yield from text.space()
            if not (yield from json_text.object_of(self, name)):
                return self.broken()
            yield from text.space()
            if fenced:
                yield from text.accept(END_FENCE)
                yield from text.space()
            if not (yield from text.accept(END_ONE)):
                return self.broken()
            self.ended()
            text.record()


class DeepSeek(Format):
    """V3.1."""

    name = "deepseek31"
    reader = Sections
    mark, marks = ALL, (ALL, END_ALL, ONE, SEPARATOR, END_ONE)
    repeats = False
    reasoning = THINK

    def shown(self, call: str) -> bool:
        return re.search(rf"{ONE}{TOOL}{SEPARATOR}\s*\{{\s*\"{KEY}", call) is not None

    def body(self, made: GrammarRules, wanted: AnswerOptions) -> str:
        parts = [
            f"{made.literal(self._head(name))} {made.json(parameters_of(schema))}"
            for name, schema in wanted.tools.items()
        ]
        one = made.rule(f"{made.choice(parts)} {made.literal(self._tail)}", "call")
        again = f"{one}*" if wanted.several else ""
        return f"{one} {again} {made.literal(END_ALL)}"

    _tail = END_ONE

    def _head(self, name: str) -> str:
        return f"{ONE}{name}{SEPARATOR}"


class DeepSeek3(DeepSeek):
    """V3 and R1."""

    name = "deepseek"
    _tail = f"\n{END_FENCE}{END_ONE}"

    def shown(self, call: str) -> bool:
        return (
            re.search(rf"{ONE}function{SEPARATOR}{TOOL}\s*{FENCE}\s*\{{\s*\"{KEY}", call)
            is not None
        )

    def _head(self, name: str) -> str:
        return f"{ONE}function{SEPARATOR}{name}\n{FENCE}\n"


class Tags(AnswerReader):
    """Reads functions and their parameters between tags, which say of each whether it is a text.

    A space after the tags' first word in a section's is in all of its tags.
    """

    begins = tuple(f"<{DSML}{one}>" for one in ("function_calls", "tool_calls", " calls", "calls"))
    _space = ""

    def _tag(self, word: str) -> str:
        return f"{DSML}{self._space}{word}"

    def calls(self, mark: str) -> Steps[None]:
        self._space = " " if mark.startswith(f"<{DSML} ") else ""
        text, end = self.text, f"</{mark[1:]}"
        while True:
            yield from text.space()
            if (yield from text.accept(end)):
                return None
            if not (yield from text.accept(f'<{self._tag("invoke")} name="')):
                return self.broken()
            name = yield from text.run(QUOTED)
            if name not in self.asked.tools or not (yield from text.accept('"')):
                return self.broken()
            yield from text.space()
            alone = yield from text.accept("/")
            if not (yield from text.accept(">")):
                return self.broken()
            self.call(name)
            if alone:
                self.arguments("{}")
            elif not (yield from self._parameters(name)):
                return self.broken()
            self.ended()
            text.record()

    def _parameters(self, name: str) -> Steps[bool]:
        text, parameters = self.text, Parameters(self, self.asked.tools[name])
        end, begin = f"</{self._tag('invoke')}>", f"<{self._tag('parameter')}"
        close = f"</{self._tag('parameter')}>"
        while True:
            yield from text.space()
            if (yield from text.accept(end)):
                parameters.end()
                return True
            if not (yield from text.accept(f'{begin} name="')):
                return False
            key = yield from text.run(QUOTED)
            if not (yield from text.accept('"')):
                return False
            yield from text.space()
            kind = None
            if (yield from text.accept('string="')):
                is_text = (yield from text.run(NAME)) == "true"
                kind = frozenset({"string"}) if is_text else EVERY - {"string"}
                yield from text.accept('"')
            if not (yield from text.accept(">")):
                return False
            if not (
                yield from parameters.read(
                    key, partial(closed, text, close, [end, begin], False, {}), kind
                )
            ):
                return False


class Dsml(Format):
    """V3.2; others have another word for the section, and a space behind the mark."""

    name = "deepseek32"
    reader = Tags
    marks = (DSML,)
    repeats = False
    reasoning = THINK
    outer, space = "function_calls", ""
    mark = f"<{DSML}function_calls>"

    def shown(self, call: str) -> bool:
        head = f'<{DSML}{self.outer}>\\s*<{DSML}{self.space}invoke name="{TOOL}">'
        return re.search(head, call) is not None

    def told(self, tools: str) -> bool:
        return f"<{DSML}{self.outer}>" in tools

    def body(self, made: GrammarRules, wanted: AnswerOptions) -> str:
        word, calls = f"{DSML}{self.space}", []
        for name, schema in wanted.tools.items():
            parts = self._parameters(made, parameters_of(schema), word)
            head, tail = f'<{word}invoke name="{name}">\n', f"</{word}invoke>\n"
            calls.append(f"{made.literal(head)} {parts} {made.literal(tail)}")
        one = made.rule(made.choice(calls), "call")
        again = f"{one}*" if wanted.several else ""
        end = made.literal(f"</{DSML}{self.outer}>")
        return f"{made.literal(LINE)} {one} {again} {end}"

    def _parameters(self, made: GrammarRules, root: object, word: str) -> str:
        parts, close = [], f"</{word}parameter>"
        for name, schema, needed in form.members(root, root):
            head = f"<{word}parameter name={json.dumps(name, ensure_ascii=False)} string="
            each = form.by_kind(made, schema, root, close)
            options = [
                f"{made.literal(head + (TEXT if kind == 'string' else OTHER))} {value}"
                for kind, value in each
            ]
            one = made.rule(f"{made.choice(options)} {made.literal(LINE)}", "pair")
            parts.append(one + ("" if needed else "?"))
        return " ".join(parts)


class Dsml4(Dsml):
    """V4."""

    name = "deepseek4"
    outer = "tool_calls"
    mark = f"<{DSML}tool_calls>"


class Dsml41(Dsml):
    """V4.1."""

    name = "deepseek41"
    outer, space = " calls", " "
    mark = f"<{DSML} calls>"
