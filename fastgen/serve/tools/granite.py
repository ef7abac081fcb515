"""`<|tool_call|>[{"name": "f", "arguments": {}}]`: Granite 3; 4 writes Hermes' form."""

from __future__ import annotations

import re

from fastgen.serve.tools.form import AnswerOptions, GrammarRules
from fastgen.serve.tools.format import Format
from fastgen.serve.tools.hermes import OBJECT, objects
from fastgen.serve.tools.mistral import Listed
from fastgen.serve.tools.reader import Steps

BEGINS = ("<|tool_call|>", "<tool_call>")


class Lists(Listed):
    """Reads a list of objects behind a mark; a text after it is content."""

    begins = BEGINS

    def calls(self, mark: str) -> Steps[None]:
        yield from self.text.space()
        if (yield from self.text.peek()) not in ("[", "{"):
            return self.broken()
        return (yield from self._list())


class Granite(Format):
    name = "granite"
    reader = Lists
    mark, marks = BEGINS[0], BEGINS
    repeats = False

    def shown(self, call: str) -> bool:
        return re.search(r"<\|tool_call\|>\s*\[\s*" + OBJECT, call) is not None

    def told(self, tools: str) -> bool:
        return self.mark in tools

    def body(self, made: GrammarRules, wanted: AnswerOptions) -> str:
        one = objects(made, wanted)
        again = f'(", " {one})*' if wanted.several else ""
        return f'"[" {one} {again} "]"'
