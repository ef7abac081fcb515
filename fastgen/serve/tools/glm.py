"""`<tool_call>f<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>`: GLM 4.5 and later."""

from __future__ import annotations

import re
from functools import partial

from fastgen.serve.tools import form
from fastgen.serve.tools.form import AnswerOptions, GrammarRules, parameters_of
from fastgen.serve.tools.format import KEY, TOOL, Format
from fastgen.serve.tools.hermes import BEGIN, END
from fastgen.serve.tools.reader import NAME, THINK, AnswerReader, Steps
from fastgen.serve.tools.typed import Parameters, closed

LOST = ("", BEGIN)  # what follows the end of a call
KEYS, VALUES = ("<arg_key>", "</arg_key>"), ("<arg_value>", "</arg_value>")


class Pairs(AnswerReader):
    """Reads a name, then keys and values between tags."""

    begins = (BEGIN,)

    def calls(self, mark: str) -> Steps[None]:
        text = self.text
        yield from text.space()
        name = yield from text.run(NAME)
        yield from text.space()
        there = yield from text.peek()
        if name not in self.asked.tools or there != "<":
            return self.broken()
        parameters = Parameters(self, self.asked.tools[name])
        begun = False
        while True:
            yield from text.space()
            if (yield from text.accept(END)):
                if not begun:
                    self.call(name)
                parameters.end()
                return self.ended()
            if not (yield from text.accept(KEYS[0])):
                return self.broken()
            if not begun:
                self.call(name)
                begun = True
            key: list[str] = []
            if (yield from text.until([KEYS[1]], key.append)) is None:
                return self.broken()
            yield from text.space()
            if not (yield from text.accept(VALUES[0])):
                return self.broken()
            ends = [END, KEYS[0]]
            whole = yield from parameters.read(
                "".join(key).strip(),
                partial(closed, text, VALUES[1], ends, False, {END: LOST}),
            )
            if not whole:
                return self.broken()


class Glm(Format):
    """With line breaks between (4.5, 4.6)."""

    name = "glm"
    reader = Pairs
    mark, marks = BEGIN, (BEGIN, END, *KEYS, *VALUES)
    between = line = "\n"
    reasoning = THINK

    def shown(self, call: str) -> bool:
        return re.search(rf"{BEGIN}\s*{TOOL}\n\s*<arg_key>\s*{KEY}", call) is not None

    def body(self, made: GrammarRules, wanted: AnswerOptions) -> str:
        return made.choice(
            [
                f"{made.literal(name + self.line)} {self._parameters(made, parameters_of(schema))} "
                f"{made.literal(END)}"
                for name, schema in wanted.tools.items()
            ]
        )

    def _parameters(self, made: GrammarRules, root: object) -> str:
        parts = []
        for name, schema, needed in form.members(root, root):
            head = made.literal(f"{KEYS[0]}{name}{KEYS[1]}{self.line}{VALUES[0]}")
            tail = made.literal(self.line)
            value = f"({form.plain(made, schema, root, VALUES[1])})"
            parts.append((f"{head} {value} {tail}", needed))
        return " ".join(made.rule(one, "pair") + ("" if needed else "?") for one, needed in parts)


class Glm47(Glm):
    """Without (4.7 and later)."""

    name = "glm47"
    between = line = ""

    def shown(self, call: str) -> bool:
        return re.search(rf"{BEGIN}{TOOL}<arg_key>{KEY}", call) is not None
