"""`<tool_call>{"name": "f", "arguments": {}}</tool_call>`: Hermes, Qwen 2.5 and 3, and others."""

from __future__ import annotations

import json
import re

from fastgen.serve.tools import json_text
from fastgen.serve.tools.form import AnswerOptions, GrammarRules, parameters_of
from fastgen.serve.tools.format import KEY, TOOL, Format
from fastgen.serve.tools.reader import AnswerReader, Steps

BEGIN, END, LINE = "<tool_call>", "</tool_call>", "\n"
OBJECT = rf'\{{\s*"name"\s*:\s*"{TOOL}"\s*,\s*"(arguments|parameters)"\s*:\s*"?\{{\s*\\?"{KEY}'


def objects(made: GrammarRules, wanted: AnswerOptions, key: str = "arguments") -> str:
    """One call as an object, of any of the tools."""
    parts = []
    for name, schema in wanted.tools.items():
        head = f'{{"name": {json.dumps(name, ensure_ascii=False)}, "{key}": '
        parts.append(f'{made.literal(head)} {made.json(parameters_of(schema))} "}}"')
    return made.rule(made.choice(parts), "object")


class Tagged(AnswerReader):
    """Reads blocks of one or several objects between tags."""

    begins = (BEGIN,)

    def calls(self, mark: str) -> Steps[None]:
        text = self.text
        yield from text.space()
        yield from text.accept("[")
        while True:
            yield from text.space()
            if not (yield from json_text.JsonCall(self).read()):
                return self.broken()
            yield from text.space()
            while (yield from text.accept("]")) or (yield from text.accept(",")):
                yield from text.space()
            if (yield from text.accept(END)):
                return self.ended()
            there = yield from text.peek()
            if not there and text.cut:
                return self.broken()
            self.ended()
            if there != "{":
                return None  # nobody closed it
            text.record()


class Hermes(Format):
    name = "hermes"
    reader = Tagged
    mark, marks = BEGIN, (BEGIN, END)
    between = "\n"

    def shown(self, call: str) -> bool:
        return re.search(BEGIN + r"\s*" + OBJECT, call) is not None

    def told(self, tools: str) -> bool:
        return re.search(BEGIN + r'\s*\{\s*"name"', tools) is not None

    def body(self, made: GrammarRules, wanted: AnswerOptions) -> str:
        end = made.literal(f"\n{END}")
        return f"{made.literal(LINE)} {objects(made, wanted)} {end}"
