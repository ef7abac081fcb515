"""`<|START_ACTION|>[{"tool_name": "f", "parameters": {}}]<|END_ACTION|>`: Command R7B and later."""

from __future__ import annotations

import json
import re

from fastgen.serve.tools import json_text
from fastgen.serve.tools.form import AnswerOptions, GrammarRules, parameters_of
from fastgen.serve.tools.format import TOOL, Format
from fastgen.serve.tools.reader import AnswerReader, Marks, Steps

BEGIN, END = "<|START_ACTION|>", "<|END_ACTION|>"
THINK = Marks("<|START_THINKING|>", "<|END_THINKING|>")
ID, QUOTE = '{"tool_call_id": "', '"'
RESPONSE = ("<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_TEXT|>", "<|END_TEXT|>")


class Actions(AnswerReader):
    """Reads thoughts, actions and the response, each between its marks."""

    def _answer(self) -> Steps[None]:
        yield from self.reasoning()
        text = self.text
        marks = [*RESPONSE, *([BEGIN] if self.asked.tools else [])]
        while mark := (yield from text.until(marks, self.content)):
            if mark == BEGIN:
                yield from self._actions()

    def _actions(self) -> Steps[None]:
        text = self.text
        text.record(BEGIN)
        yield from text.space()
        yield from text.accept("[")
        while True:
            yield from text.space()
            call = json_text.JsonCall(self, names=("tool_name", "name"))
            if not (yield from call.read()):
                return self.broken()
            yield from text.space()
            if (yield from text.accept(",")):
                self.ended()
                text.record()
                continue
            yield from text.accept("]")
            yield from text.space()
            if not (yield from text.accept(END)) and text.cut:
                return self.broken()
            return self.ended()


class CommandR(Format):
    name = "command_r"
    reader = Actions
    mark, marks = BEGIN, (BEGIN, END, *RESPONSE, THINK.begin, THINK.end)
    repeats = False
    reasoning = THINK
    channels = True

    def shown(self, call: str) -> bool:
        return re.search(rf'"tool_name"\s*:\s*"{TOOL}"', call) is not None and BEGIN in call

    def told(self, tools: str) -> bool:
        return BEGIN in tools and '"tool_name"' in tools

    def body(self, made: GrammarRules, wanted: AnswerOptions) -> str:
        number = made.rule("/[0-9]{1,3}/", "NUMBER")
        parts = [
            f"{made.literal(', ' + json.dumps('tool_name') + ': ' + json.dumps(name))} "
            f"{made.literal(', ' + json.dumps('parameters') + ': ')} "
            f'{made.json(parameters_of(schema))} "}}"'
            for name, schema in wanted.tools.items()
        ]
        head = f"{made.literal(ID)} {number} {made.literal(QUOTE)}"
        one = made.rule(f"{head} {made.choice(parts)}", "action")
        again = f'(",\\n    " {one})*' if wanted.several else ""
        return f'"[\\n    " {one} {again} "\\n]" {made.literal(END)}'
