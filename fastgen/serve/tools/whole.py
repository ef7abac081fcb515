"""The events of an answer put together, for who wants it whole."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fastgen.serve.tools.reader import AnswerEvent


@dataclass
class ToolCall:
    """A call of a tool.

    Attributes:
        arguments: JSON.
    """

    name: str
    arguments: str = ""


class WholeAnswer:
    """An answer: what a call that never became whole was, is content.

    Attributes:
        calls: those that are whole, or may become it.
        begun: how many calls began.
    """

    def __init__(self) -> None:
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._open: list[str] = []
        self.calls: list[ToolCall] = []
        self.begun = 0

    def take(self, events: Iterable[AnswerEvent]) -> None:
        for event in events:
            if event.kind == "content":
                self._content.append(event.text)
            elif event.kind == "reasoning":
                self._reasoning.append(event.text)
            elif event.kind == "call":
                self.calls.append(ToolCall(event.text))
                self.begun += 1
                self._open = []
            elif event.kind == "arguments":
                self._open.append(event.text)
            elif event.kind == "end":
                self.calls[-1].arguments = "".join(self._open)
            else:
                self.calls.pop()
                self._content.append(event.text)

    @property
    def content(self) -> str:
        return "".join(self._content)

    @property
    def reasoning(self) -> str:
        return "".join(self._reasoning)
