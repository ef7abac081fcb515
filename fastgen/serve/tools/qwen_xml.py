"""`<tool_call><function=f><parameter=a>1</parameter></function></tool_call>`: Qwen3-Coder, 3.5."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

from fastgen.serve.tools import form
from fastgen.serve.tools.form import AnswerOptions, GrammarRules, parameters_of
from fastgen.serve.tools.format import KEY, TOOL, Format
from fastgen.serve.tools.hermes import BEGIN, END, LINE
from fastgen.serve.tools.reader import AnswerReader, Steps
from fastgen.serve.tools.typed import Parameters, closed

FUNCTION, PARAMETER = "<function=", "<parameter="
END_FUNCTION, END_PARAMETER = "</function>", "</parameter>"
NAMED = re.compile(r"[^<>\n]+")


class Functions(AnswerReader):
    """Reads functions and their parameters between tags; the outer tag may be missing."""

    begins = (BEGIN, FUNCTION)

    def interruptions(self) -> Sequence[str]:
        return [f"{BEGIN}\n{FUNCTION}{name}>" for name in self.asked.tools]

    def calls(self, mark: str) -> Steps[None]:
        text = self.text
        if mark == BEGIN:
            yield from text.space()
            if not (yield from text.accept(FUNCTION)):
                return self.broken()
        while True:
            name = (yield from text.run(NAMED)).strip()
            if name not in self.asked.tools or not (yield from text.accept(">")):
                return self.broken()
            self.call(name)
            if not (yield from self._parameters(name)):
                return self.broken()
            yield from text.space()
            if not (yield from text.accept(END)) and not (yield from text.peek()) and text.cut:
                return self.broken()
            self.ended()
            there = yield from text.peek(len(FUNCTION))
            if there != FUNCTION:
                return None
            text.record(text.take(len(FUNCTION)))

    def _parameters(self, name: str) -> Steps[bool]:
        text, parameters = self.text, Parameters(self, self.asked.tools[name])
        names = (one for one, _, _ in form.members(self.asked.tools[name], self.asked.tools[name]))
        lost: dict[str, Sequence[str]] = {f"\n{PARAMETER}{one}>\n": () for one in names}
        lost[f"\n{END_FUNCTION}"] = [END]
        while True:
            yield from text.space()
            if (yield from text.accept(END_FUNCTION)):
                parameters.end()
                return True
            if not (yield from text.accept(PARAMETER)):
                return False
            key = (yield from text.run(NAMED)).strip()
            if not key or not (yield from text.accept(">")):
                return False
            yield from text.accept("\n")
            ends = [PARAMETER, END_FUNCTION]
            if not (
                yield from parameters.read(
                    key, partial(closed, text, END_PARAMETER, ends, True, lost)
                )
            ):
                return False


class QwenXml(Format):
    name = "qwen_xml"
    reader = Functions
    mark, marks = BEGIN, (BEGIN, END, FUNCTION, END_FUNCTION, PARAMETER, END_PARAMETER)
    between = "\n"

    def shown(self, call: str) -> bool:
        return re.search(rf"<function={TOOL}>\s*<parameter={KEY}>", call) is not None

    def told(self, tools: str) -> bool:
        return re.search(r"<function=\w+>\s*<parameter=\w+>", tools) is not None

    def body(self, made: GrammarRules, wanted: AnswerOptions) -> str:
        calls = []
        for name, schema in wanted.tools.items():
            root = parameters_of(schema)
            parts = []
            for key, one, needed in form.members(root, root):
                value = form.plain(made, one, root, f"\n{END_PARAMETER}")
                whole = f"{made.literal(f'{PARAMETER}{key}>{LINE}')} ({value}) {made.literal(LINE)}"
                parts.append(made.rule(whole, "parameter") + ("" if needed else "?"))
            head = made.literal(f"\n{FUNCTION}{name}>\n")
            calls.append(" ".join([head, *parts, made.literal(f"{END_FUNCTION}\n{END}")]))
        return made.choice(calls)
