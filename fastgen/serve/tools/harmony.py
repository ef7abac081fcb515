"""gpt-oss's messages with a channel each (harmony): analysis, commentary, final."""

from __future__ import annotations

import re

from fastgen.serve.tools import json_text
from fastgen.serve.tools.form import AnswerOptions, GrammarRules, parameters_of
from fastgen.serve.tools.format import TOOL, Format
from fastgen.serve.tools.reader import AnswerReader, Marks, Steps

START, CHANNEL, CONSTRAIN, MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"
OVER = (END, CALL, RETURN, START)
TO = re.compile(r"to=([\w.:/-]+)")
FUNCTIONS = "functions."
ANALYSIS = f"{CHANNEL}analysis{MESSAGE}"


class Messages(AnswerReader):
    """Reads messages: a header that says whose turn it is and to whom it speaks, and a body."""

    def _answer(self) -> Steps[None]:
        text = self.text
        first = not self.asked.inside  # a text may begin without a header
        if self.asked.inside:
            yield from text.until(OVER, self._thinks)
        while True:
            text.record()
            header: list[str] = []
            mark = yield from text.until([MESSAGE, *OVER], header.append)
            head = "".join(header)
            if mark == MESSAGE:
                yield from self._message(head)
            elif mark is None and first and CHANNEL not in head:
                text.recorded()
                return self.content(head)
            elif mark is None:
                return self.broken()
            elif head.strip() and CHANNEL not in head and head.strip() != "assistant":
                text.recorded()
                self.content(head)
            first = False

    def _message(self, header: str) -> Steps[None]:
        before, _, channel = header.rpartition(CHANNEL)
        to = TO.search(header)
        name = to[1].removeprefix(FUNCTIONS) if to else ""
        channel = channel.partition(CONSTRAIN)[0].strip().partition(" ")[0]
        if name in self.asked.tools and channel != "final":
            return (yield from self._call(name))
        self.text.recorded()
        said = before.strip()
        if said and CHANNEL not in said and not said.startswith(("assistant", START, "to=")):
            self.content(before)
        thinks = channel == "analysis"
        if self._said and not thinks and self._content_ended:
            self._content.rest()
            self.content("\n")
        mark = yield from self.text.until(OVER, self._thinks if thinks else self.content)
        self._content_ended = not thinks and mark is not None
        return None

    _content_ended = False

    def _thinks(self, piece: str) -> None:
        self.think(piece)

    def _call(self, name: str) -> Steps[None]:
        text = self.text
        yield from text.space()
        first = yield from text.peek()
        if first != "{" and not (first == "<" and not text.cut):
            return self.broken()
        self.call(name)
        if first == "<":
            self.arguments("{}")
        elif not (yield from json_text.value(text, self.arguments)):
            return self.broken()
        yield from text.space()
        if not (yield from text.peek()) and text.cut:
            return self.broken()
        rest: list[str] = []
        yield from text.until(OVER, rest.append)
        return self.ended()


class Harmony(Format):
    name = "harmony"
    reader = Messages
    mark = f"{CHANNEL}commentary to=functions."
    marks = (START, CHANNEL, CONSTRAIN, MESSAGE, END, CALL, RETURN)
    repeats = False
    reasoning = Marks(ANALYSIS, END)
    channels = True

    def shown(self, call: str) -> bool:
        return re.search(rf"to=functions\.{TOOL}.*{re.escape(MESSAGE)}", call) is not None

    def told(self, tools: str) -> bool:
        return f"{START}assistant" in tools and CHANNEL in tools

    def body(self, made: GrammarRules, wanted: AnswerOptions) -> str:
        head = f" {CONSTRAIN}json{MESSAGE}"
        return made.choice(
            [
                f"{made.literal(name + head)} {made.json(parameters_of(schema))}"
                for name, schema in wanted.tools.items()
            ]
        )

    def grammar(self, made: GrammarRules, wanted: AnswerOptions) -> str:
        """Channels in their order: thoughts and preambles, then a call or a text."""
        again = made.literal(f"{START}assistant")
        body = made.rule(self.body(made, wanted), "calls")
        thought = f"{made.literal(ANALYSIS)} {made.until(END)} {again}"
        preamble = f"{made.literal(f'{CHANNEL}commentary{MESSAGE}')} {made.until(END)} {again}"
        call = f"{made.literal(self.mark)} {body}"
        begun = f"{made.until(END)} {again}" if wanted.inside else ""
        if wanted.forced:
            return made.text(f"{begun or f'({thought})?'} {call}")
        text = wanted.content or made.without(END)
        final = f"{made.literal(f'{CHANNEL}final{MESSAGE}')} {text}"
        first = made.rule(f"{thought} | {preamble}", "first")
        return made.text(f"{begun} {first}* ({call} | {final})")
