"""JSON as it comes: what is passed on is the beginning of a legal text, or is none at all."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from typing import Any

from fastgen.serve.tools.reader import AnswerReader, Out, Steps, TextBuffer

DEEP = 200  # levels; what is deeper is no arguments of anybody's
PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
CONTROL = re.compile(r"[\x00-\x1f]+")
WORD = re.compile(r"[-+.\w]+")
NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?", re.ASCII)
BLANK = re.compile(r"[ \t\n\r]+")
WORDS = {"true": "true", "false": "false", "null": "null", "True": "true", "False": "false",
         "None": "null"}  # fmt: skip
ARGUMENTS = ("arguments", "parameters")


def value(text: TextBuffer, out: Out) -> Steps[bool]:
    """Pass on the value that comes next; False where it is none, and then the rest is not taken.

    What models write instead of JSON and can mean one thing only becomes it: Python's words, and
    control characters within texts.
    """
    closes: list[str] = []
    while True:
        yield from text.run(BLANK, out)
        first = yield from text.peek()
        empty = False
        if first and first in "{[" and len(closes) < DEEP:
            out(text.take(1))
            closes.append("}" if first == "{" else "]")
            yield from text.run(BLANK, out)
            empty = (yield from text.peek()) == closes[-1]
            if not empty and first == "{" and not (yield from _key(text, out)):
                return False
            if not empty:
                continue
        elif not (yield from _scalar(text, out)):
            return False
        if not (yield from _closed(text, out, closes)):
            return False
        if not closes:
            return True


def _closed(text: TextBuffer, out: Out, closes: list[str]) -> Steps[bool]:
    """Pass on what closes, up to where the next value begins; False where something else comes."""
    while closes:
        yield from text.run(BLANK, out)
        after = yield from text.peek()
        if after == closes[-1]:
            out(text.take(1))
            closes.pop()
        elif after == ",":
            out(text.take(1))
            return closes[-1] == "]" or (yield from _key(text, out))
        else:
            return False
    return True


def _key(text: TextBuffer, out: Out) -> Steps[bool]:
    yield from text.run(BLANK, out)
    if not (yield from string(text, out)):
        return False
    yield from text.run(BLANK, out)
    if (yield from text.peek()) != ":":
        return False
    out(text.take(1))
    return True


def string(text: TextBuffer, out: Out) -> Steps[bool]:
    """Pass on a text in quotes."""
    if (yield from text.peek()) != '"':
        return False
    out(text.take(1))
    while True:
        yield from text.run(PLAIN, out)
        after = yield from text.peek()
        if not after:
            return False
        if after == '"':
            out(text.take(1))
            return True
        if after != "\\":
            out(json.dumps((yield from text.run(CONTROL)))[1:-1])
        elif not (yield from _escape(text, out)):
            return False


def _escape(text: TextBuffer, out: Out) -> Steps[bool]:
    there = yield from text.peek(2)
    if len(there) == 2 and there[1] in '"\\/bfnrt':
        out(text.take(2))
        return True
    if there == "\\u":
        there = yield from text.peek(6)
        if re.fullmatch(r"\\u[0-9a-fA-F]{4}", there):
            out(text.take(6))
            return True
    if there == "\\'":  # of Python's
        out(text.take(2)[1])
        return True
    return False


def _scalar(text: TextBuffer, out: Out) -> Steps[bool]:
    if (yield from text.peek()) == '"':
        return (yield from string(text, out))
    word = yield from text.run(WORD)
    if word in WORDS or NUMBER.fullmatch(word):
        out(WORDS.get(word, word))
        return True
    return False


def is_object(raw: str) -> bool:
    """True for a text that is a legal object, as strict readers want it."""

    def refuse(name: str) -> Any:
        raise ValueError(name)

    try:
        return isinstance(json.loads(raw, parse_constant=refuse), dict)
    except (ValueError, RecursionError):
        return False


def object_of(reader: AnswerReader, name: str | None) -> Steps[bool]:
    """Read the arguments of a call of `name`, an object that comes next; False where it is none."""
    if name not in reader.asked.tools or (yield from reader.text.peek()) != "{":
        return False
    assert name is not None
    reader.call(name)
    return (yield from value(reader.text, reader.arguments))


class JsonCall:
    """Reads `{"name": "f", "arguments": {...}}`, its members in any order, into events.

    Args:
        reader: whose events they are.
        names, arguments: what the members may be called.
        lacking: whether arguments may be missing, null or a text that is an object.
        known: what the name has to be.
    """

    def __init__(
        self,
        reader: AnswerReader,
        names: Collection[str] = ("name",),
        arguments: Collection[str] = ARGUMENTS,
        lacking: bool = True,
        known: Callable[[str], str | None] | None = None,
    ) -> None:
        self._reader, self._text = reader, reader.text
        self._names, self._arguments, self._lacking = names, arguments, lacking
        self._known = known or (lambda name: name if name in reader.asked.tools else None)
        self._name: str | None = None
        self._begun = False
        self._held: list[str] | None = None  # arguments that came before the name

    def read(self) -> Steps[bool]:
        """Read it; False where it is no call."""
        if not (yield from self._text.accept("{")):
            return False
        while True:
            yield from self._text.space()
            key: list[str] = []
            if not (yield from string(self._text, key.append)):
                return False
            yield from self._text.space()
            if not (yield from self._text.accept(":")):
                return False
            yield from self._text.space()
            if not (yield from self._member(json.loads("".join(key)))):
                return False
            yield from self._text.space()
            if (yield from self._text.accept("}")):
                return self._done()
            if not (yield from self._text.accept(",")):
                return False

    def _member(self, key: str) -> Steps[bool]:
        if key in self._names and self._name is None:
            return (yield from self._named())
        if key in self._arguments and not self._begun and self._held is None:
            return (yield from self._argued())
        return (yield from value(self._text, lambda _: None))

    def _named(self) -> Steps[bool]:
        raw: list[str] = []
        if not (yield from string(self._text, raw.append)):
            return False
        self._name = self._known(json.loads("".join(raw)))
        return self._name is not None

    def _argued(self) -> Steps[bool]:
        first = yield from self._text.peek()
        if first == "{" and self._name is not None:
            self._begin()
            return (yield from value(self._text, self._reader.arguments))
        held: list[str] = []
        if not (yield from value(self._text, held.append)):
            return False
        raw = "".join(held)
        if self._lacking and first == '"':
            raw = json.loads(raw).strip() or "{}"
        self._held = ["{}"] if self._lacking and raw == "null" else [raw]
        return is_object(self._held[0])

    def _begin(self) -> None:
        assert self._name is not None
        self._begun = True
        self._reader.call(self._name)

    def _done(self) -> bool:
        if self._begun:
            return True
        if self._name is None or (self._held is None and not self._lacking):
            return False
        self._begin()
        self._reader.arguments("".join(self._held or ["{}"]))
        return True
