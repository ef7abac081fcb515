"""`[TOOL_CALLS][{"name": "f", "arguments": {}}]`, since v11 `[TOOL_CALLS]f[ARGS]{}`: Mistral."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fastgen.serve.tools import json_text
from fastgen.serve.tools.form import AnswerOptions, GrammarRules, parameters_of
from fastgen.serve.tools.format import KEY, TOOL, Format
from fastgen.serve.tools.hermes import OBJECT, objects
from fastgen.serve.tools.reader import NAME, AnswerReader, Marks, Steps

BEGIN, ARGS, ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
THINK = Marks("[THINK]", "[/THINK]")


class Listed(AnswerReader):
    """Reads both: what follows the mark tells."""

    begins: Sequence[str] = (BEGIN,)

    def calls(self, mark: str) -> Steps[None]:
        text = self.text
        yield from text.space()
        if (yield from text.peek()) in ("[", "{"):
            return (yield from self._list())
        name = yield from text.run(NAME)
        yield from text.space()
        if (yield from text.accept(ID)):
            yield from text.run(NAME)
            yield from text.space()
        yield from text.accept(ARGS)
        yield from text.space()
        if not (yield from json_text.object_of(self, name)):
            return self.broken()
        return self.ended()

    def _list(self) -> Steps[None]:
        text = self.text
        listed = yield from text.accept("[")
        while True:
            yield from text.space()
            if not (yield from json_text.JsonCall(self).read()):
                return self.broken()
            yield from text.space()
            more = yield from text.accept(",")
            if not more and listed and not (yield from text.accept("]")) and text.cut:
                return self.broken()
            self.ended()
            if not more:
                return None
            text.record()


class Mistral(Format):
    """Before v11."""

    name = "mistral"
    reader = Listed
    mark, marks = BEGIN, (BEGIN, ARGS, ID)
    repeats = False
    reasoning = THINK

    def shown(self, call: str) -> bool:
        return re.search(r"\[TOOL_CALLS\]\s*\[\s*" + OBJECT, call) is not None

    def body(self, made: GrammarRules, wanted: AnswerOptions) -> str:
        one = objects(made, wanted)
        again = f'(", " {one})*' if wanted.several else ""
        return f'" "? "[" {one} {again} "]"'


class Mistral11(Mistral):
    """Since v11."""

    name = "mistral11"
    repeats = True

    def shown(self, call: str) -> bool:
        pattern = rf"\[TOOL_CALLS\]{TOOL}(\[CALL_ID\]\w+)?(\[ARGS\])?\s*\{{\s*\"{KEY}"
        return re.search(pattern, call) is not None

    def body(self, made: GrammarRules, wanted: AnswerOptions) -> str:
        return made.choice(
            [
                f"{made.literal(name + ARGS)} {made.json(parameters_of(schema))}"
                for name, schema in wanted.tools.items()
            ]
        )
