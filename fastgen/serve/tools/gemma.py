"""`<|tool_call>call:f{a:<|"|>text<|"|>}<tool_call|>`: Gemma 4, and FunctionGemma's like it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from fastgen.serve.tools import json_text
from fastgen.serve.tools.form import AnswerOptions, Dialect, GrammarRules, parameters_of
from fastgen.serve.tools.format import KEY, TOOL, Format
from fastgen.serve.tools.reader import NAME, AnswerReader, Marks, Out, Steps

BEGIN, END, QUOTE = "<|tool_call>", "<tool_call|>", '<|"|>'
THOUGHT = Marks("<|channel>thought", "<channel|>")
KEYS = re.compile(r"[^:{}\[\]<>,]+")
OLD = ("<start_function_call>", "<end_function_call>", "<escape>")
WORD = re.compile(r"[^,{}\[\]<]+")


class Braces(AnswerReader):
    """Reads calls whose arguments have keys without quotes and texts between marks."""

    begins: Sequence[str] = (BEGIN,)
    end_mark, quote = END, QUOTE

    def calls(self, mark: str) -> Steps[None]:
        text = self.text
        yield from text.space()
        yield from text.accept("call:")
        name = yield from text.run(NAME)
        yield from text.space()
        if name not in self.asked.tools or (yield from text.peek()) != "{":
            return self.broken()
        self.call(name)
        if not (yield from self._value(self.arguments)):
            return self.broken()
        yield from text.space()
        if not (yield from text.accept(self.end_mark)) and not (
            not (yield from text.peek()) and not text.cut
        ):
            return self.broken()
        return self.ended()

    def _value(self, out: Out, deep: int = 0) -> Steps[bool]:
        text = self.text
        yield from text.space()
        first = yield from text.peek()
        if deep > json_text.DEEP or not first:
            return False
        if first == "{" or first == "[":
            return (yield from self._several(out, first == "{", deep))
        if first == "<":
            return (yield from self._text(out))
        if first == '"':
            return (yield from json_text.string(text, out))
        word = (yield from text.run(WORD)).strip()
        if word in json_text.WORDS or json_text.NUMBER.fullmatch(word):
            out(json_text.WORDS.get(word, word))
        elif word:
            out(json.dumps(word, ensure_ascii=False))
        return bool(word)

    def _text(self, out: Out) -> Steps[bool]:
        if not (yield from self.text.accept(self.quote)):
            return False
        out('"')
        mark = yield from self.text.until(
            [self.quote], lambda piece: out(json.dumps(piece, ensure_ascii=False)[1:-1])
        )
        out('"')
        return mark is not None

    def _several(self, out: Out, named: bool, deep: int) -> Steps[bool]:
        text, said, count = self.text, set[str](), 0
        close = "}" if named else "]"
        text.take(1)
        out("{" if named else "[")
        while True:
            yield from text.space()
            if (yield from text.accept(close)):
                out(close)
                return True
            write: Out = out
            if named:
                key = yield from self._key()
                if not key:
                    return False
                if key in said:
                    write = _nowhere
                said.add(key)
                write(f"{', ' if count else ''}{json.dumps(key, ensure_ascii=False)}: ")
            elif count:
                write(", ")
            if not (yield from self._value(write, deep + 1)):
                return False
            count += 1
            yield from text.space()
            if not (yield from text.accept(",")) and (yield from text.peek()) != close:
                return False

    def _key(self) -> Steps[str]:
        text = self.text
        held: list[str] = []
        first = yield from text.peek()
        if first == "<":
            if not (yield from self._text(held.append)):
                return ""
            key = str(json.loads("".join(held)))
        elif first == '"':
            if not (yield from json_text.string(text, held.append)):
                return ""
            key = str(json.loads("".join(held)))
        else:
            key = (yield from text.run(KEYS)).strip()
        yield from text.space()
        return key if (yield from text.accept(":")) else ""


def _nowhere(_: str) -> None:
    """Takes what is said a second time."""


class Old(Braces):
    begins = OLD[:1]
    end_mark, quote = OLD[1:]


class Gemma(Format):
    name = "gemma"
    reader = Braces
    mark = BEGIN
    marks: Sequence[str] = (BEGIN, END, QUOTE, "<|channel>", "<channel|>")
    reasoning: Marks | None = THOUGHT
    end_mark, quote = END, QUOTE

    def shown(self, call: str) -> bool:
        return re.search(rf"{re.escape(self.mark)}\s*call:{TOOL}\{{\s*{KEY}:", call) is not None

    def body(self, made: GrammarRules, wanted: AnswerOptions) -> str:
        dialect = Dialect(("true", "false", "null"), self.quote, False, ":", ",")
        calls, end = [], made.literal("}" + self.end_mark)
        for name, schema in wanted.tools.items():
            root = parameters_of(schema)
            head = made.literal(f"call:{name}{{")
            calls.append(f"{head} {dialect.members(made, root, root)} {end}")
        return made.choice(calls)


class FunctionGemma(Gemma):
    name = "functiongemma"
    reader = Old
    mark, marks = OLD[0], OLD
    end_mark, quote = OLD[1:]
    reasoning = None
