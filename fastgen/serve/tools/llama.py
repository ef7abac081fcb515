"""`{"name": "f", "parameters": {}}` as the whole answer, or `[f(a=1)]`: Llama 3 and 4."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace

from fastgen.serve.tools import form, json_text
from fastgen.serve.tools.form import AnswerOptions, Dialect, GrammarRules, parameters_of, pattern
from fastgen.serve.tools.format import KEY, TOOL, VALUE, Format
from fastgen.serve.tools.hermes import OBJECT, objects
from fastgen.serve.tools.reader import NAME, AnswerReader, Out, Steps, TextBuffer

TAGS = ("<|python_tag|>", "<|python_start|>")
END_TAG = "<|python_end|>"
PYTHON = Dialect(("True", "False", "None"), None, True, ": ", ", ")


class Bare(AnswerReader):
    """Reads an answer that is calls and nothing else: objects, or a list of Python's calls."""

    def _answer(self) -> Steps[None]:
        yield from self.reasoning()
        while (yield from self.text.peek()):
            if self.asked.tools:
                yield from self._calls()
            tags = TAGS if self.asked.tools else ()
            mark = yield from self.text.until(tags, self.content)
            if mark is not None and not (yield from self._tagged()):
                self.content(mark)

    def _tagged(self) -> Steps[bool]:
        """True where calls follow a tag."""
        before = self._called
        self._called = False
        yield from self._calls()
        called, self._called = self._called, self._called or before
        return called

    def _calls(self) -> Steps[None]:
        """Read calls where the text, or what follows a tag, begins with them."""
        text = self.text
        while True:
            text.record()
            yield from text.space()
            for tag in TAGS:
                yield from text.accept(tag)
            yield from text.space()
            first = yield from text.peek()
            listed = first == "["
            if listed:
                text.take(1)
                yield from text.space()
                first = yield from text.peek()
            if first == "{" or not listed:
                whole = yield from self._object()
            else:
                whole = yield from self._pythonic()
            if not whole:
                return self.broken()
            yield from text.space()
            while (
                (yield from text.accept(";"))
                or (yield from text.accept("]"))
                or ((yield from text.accept(",")) or (yield from text.accept(END_TAG)))
            ):
                yield from text.space()
            self.ended()
            if (yield from text.peek()) not in ("{", "["):
                return None

    def _object(self) -> Steps[bool]:
        return json_text.JsonCall(self, names=("name", "function"), lacking=False).read()

    def _pythonic(self) -> Steps[bool]:
        """Calls with a comma between, up to the bracket; the last one is left open."""
        text = self.text
        while True:
            name = yield from text.run(NAME)
            if name not in self.asked.tools or not (yield from text.accept("(")):
                return False
            self.call(name)
            if not (yield from self._arguments()):
                return False
            yield from text.space()
            if (yield from text.peek()) == "]":
                return True
            if not (yield from text.accept(",")):
                return False
            self.ended()
            text.record()
            yield from text.space()

    def _arguments(self) -> Steps[bool]:
        text, said = self.text, set[str]()
        self.arguments("{")
        while True:
            yield from text.space()
            if (yield from text.accept(")")):
                self.arguments("}")
                return True
            key = yield from text.run(NAME)
            yield from text.space()
            if not key or key in said or not (yield from text.accept("=")):
                return False
            self.arguments(f"{', ' if said else ''}{json.dumps(key)}: ")
            said.add(key)
            if not (yield from literal(text, self.arguments)):
                return False
            yield from text.space()
            if not (yield from text.accept(",")) and (yield from text.peek()) != ")":
                return False


QUOTED = {quote: re.compile(rf"[^{quote}\\]+") for quote in "'\""}
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "0": "\0", "\n": ""}
CODES = {"x": 2, "u": 4, "U": 8}


def literal(text: TextBuffer, out: Out, deep: int = 0) -> Steps[bool]:
    """Pass on a literal of Python's as JSON; False where it is none, or too deep."""
    yield from text.space()
    first = yield from text.peek()
    if deep > json_text.DEEP or not first:
        return False
    if first in "'\"":
        return (yield from _string(text, out))
    if first in "[({":
        return (yield from _several(text, out, first, deep))
    return (yield from json_text.value(text, out))


def _several(text: TextBuffer, out: Out, first: str, deep: int) -> Steps[bool]:
    close, named, count = {"[": "]", "(": ")", "{": "}"}[first], first == "{", 0
    text.take(1)
    out("{" if named else "[")
    while True:
        yield from text.space()
        if (yield from text.accept(close)):
            out("}" if named else "]")
            return True
        out(", " if count else "")
        count += 1
        if named:
            if (yield from text.peek()) not in ("'", '"') or not (yield from _string(text, out)):
                return False
            yield from text.space()
            if not (yield from text.accept(":")):
                return False
            out(": ")
        if not (yield from literal(text, out, deep + 1)):
            return False
        yield from text.space()
        if not (yield from text.accept(",")) and (yield from text.peek()) != close:
            return False


def _string(text: TextBuffer, out: Out) -> Steps[bool]:
    quote = text.take(1)

    def write(piece: str) -> None:
        out(json.dumps(piece, ensure_ascii=False)[1:-1])

    out('"')
    while True:
        yield from text.run(QUOTED[quote], write)
        if (yield from text.accept(quote)):
            out('"')
            return True
        if not (yield from _escaped(text, write)):
            return False


def _escaped(text: TextBuffer, write: Callable[[str], None]) -> Steps[bool]:
    there = yield from text.peek(2)
    if len(there) < 2:
        return False
    text.take(2)
    if there[1] not in CODES:
        write(ESCAPES.get(there[1], there[1] if there[1] in "\\'\"" else there))
        return True
    digits = yield from text.peek(CODES[there[1]])
    if not re.fullmatch("[0-9a-fA-F]+", digits) or int(digits, 16) > 0x10FFFF:
        return False
    code = int(text.take(len(digits)), 16)
    write(chr(code) if not 0xD800 <= code < 0xE000 else "�")
    return True


class Llama(Format):
    name = "llama"
    reader = Bare
    mark, marks = "{", (*TAGS, END_TAG)
    between = "; "

    def shown(self, call: str) -> bool:
        return re.match(r"\s*(<\|python_\w+\|>\s*)*" + OBJECT, call) is not None

    def body(self, made: GrammarRules, wanted: AnswerOptions) -> str:
        return objects(made, wanted, "parameters")

    def grammar(self, made: GrammarRules, wanted: AnswerOptions) -> str:
        return whole(made, wanted, self.body(made, wanted), "; ", pattern('{"name": "'))


class Pythonic(Format):
    name = "pythonic"
    reader = Bare
    mark, marks = "[", (*TAGS, END_TAG)
    repeats = False

    def shown(self, call: str) -> bool:
        pattern = rf"\[\s*{TOOL}\(\s*{KEY}\s*=\s*[\"']{VALUE}[\"']\s*\)\s*\]"
        return re.match(r"\s*(<\|python_\w+\|>\s*)*" + pattern, call) is not None

    def told(self, tools: str) -> bool:
        return re.search(r"\[\w+\(\w+=\w+", tools) is not None

    def body(self, made: GrammarRules, wanted: AnswerOptions) -> str:
        calls = [self._call(made, name, schema) for name, schema in wanted.tools.items()]
        one = made.rule(made.choice(calls), "call")
        again = f'(", " {one})*' if wanted.several else ""
        return f'"[" {one} {again} "]"'

    def _call(self, made: GrammarRules, name: str, schema: object) -> str:
        root = parameters_of(schema)
        pairs = [
            (f"{made.literal(key + '=')} {PYTHON.value(made, one, root)}", needed)
            for key, one, needed in form.members(root, root)
        ]
        inner = form.separated(made, pairs, '", "')
        return f'{made.literal(name + "(")} {inner} ")"'

    def grammar(self, made: GrammarRules, wanted: AnswerOptions) -> str:
        names = "|".join(map(pattern, wanted.tools))
        return whole(made, wanted, self.body(made, wanted), "", rf"\[({names})\(")


def whole(made: GrammarRules, wanted: AnswerOptions, body: str, between: str, begins: str) -> str:
    """The grammar of an answer that is calls and nothing else, or no call at all.

    Args:
        begins: a regular expression of what makes of an answer a call.
    """
    thought = form.thought(made, wanted)
    one = made.rule(body, "calls")
    again = f"({made.literal(between)} {one})*" if wanted.several and between else ""
    if wanted.forced:
        return made.text(f"{thought} {one} {again}")
    call, text = f"{one} {again}", f"/(?s:.+)/ & ~/{begins}(?s:.*)/"
    other = wanted.content or f"{made.rule(text, 'OTHER')}?"
    but = form.no_thought(made, wanted)
    if not but or wanted.content or wanted.reasoning is None:
        return made.text(f"{thought} ({call} | {other})")
    forced = replace(wanted, forced=True, inside=True)
    begin = made.rule(f"/{form.SPACE}{pattern(wanted.reasoning.begin)}/", "BEGIN")
    end = form.thought(made, forced)
    alone = f"{made.rule(text + but, 'OTHER')}?"
    return made.text(f"{begin} {end} ({call} | {other}) | {call} | {alone}")
