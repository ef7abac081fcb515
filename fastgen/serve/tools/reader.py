"""Reads an answer's text as it comes: reasoning, content, and calls of tools.

A reader is a coroutine over a text that comes in pieces. It asks for more where it cannot tell yet
what it sees, so where the pieces are cut changes nothing; and it looks at each character a bounded
number of times.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

Found = TypeVar("Found")
Steps = Generator[None, None, Found]  # of a coroutine that waits for more text
Out = Callable[[str], None]  # takes the pieces of something

SPACE = re.compile(r"\s+")
NAME = re.compile(r"[\w.:/-]+")
ANYTHING = {"type": "object"}


@dataclass(frozen=True)
class AnswerEvent:
    """Something that an answer says.

    Attributes:
        kind: "reasoning", "content", "call" (one begins), "arguments" (of the last one; they grow),
            "end" (of it), or "broken" (it will never be whole).
        text: a piece; of a call its tool's name; of a broken one, all that was read of it.
    """

    kind: str
    text: str = ""


@dataclass(frozen=True)
class Marks:
    """The marks around reasoning."""

    begin: str
    end: str


THINK = Marks("<think>", "</think>")


@dataclass(frozen=True)
class ReadingOptions:
    """The parts of a request that a reader has to know.

    Attributes:
        tools: the schema of the parameters of each tool, by its name.
        reasoning: what reasoning stands between; None where it is left in the content.
        inside: whether the text begins in it, as the prompt ends in its mark.
        raw: whether it is left in the content all the same, with its marks.
    """

    tools: Mapping[str, Any] = field(default_factory=dict)
    reasoning: Marks | None = None
    inside: bool = False
    raw: bool = False


class TextBuffer:
    """A text that comes in pieces, and what was taken of it.

    Attributes:
        cut: whether it ended where it was not to end.
        starved: whether more of it was asked for than there is.
    """

    def __init__(self) -> None:
        self._held, self._at = "", 0
        self.ended = self.cut = self.starved = False
        self._record: list[str] | None = None

    def push(self, piece: str) -> None:
        self._held, self._at = self._held[self._at :] + piece, 0

    def end(self, cut: bool) -> None:
        self.ended, self.cut = True, cut

    def record(self, mark: str = "") -> None:
        """Keep what is taken from here on, and `mark`, which was taken before."""
        self._record = [mark]

    def recorded(self) -> str:
        """Give back the characters taken since, which are kept no longer."""
        taken, self._record = "".join(self._record or ()), None
        return taken

    @property
    def rest(self) -> str:
        """The characters that have not been taken."""
        return self._held[self._at :]

    def take(self, count: int) -> str:
        """The next characters, which must be there."""
        piece = self._held[self._at : self._at + count]
        self._at += count
        if self._record is not None:
            self._record.append(piece)
        return piece

    def put_back(self, taken: str) -> None:
        """Let what was taken last be there again."""
        start = self._at - len(taken)
        if start >= 0 and self._held.startswith(taken, start):
            self._at = start
        else:  # it came in an earlier piece
            self._held, self._at = taken + self._held[self._at :], 0
        left = len(taken) if self._record else 0
        while left and self._record:
            last = self._record.pop()
            if len(last) > left:
                self._record.append(last[:-left])
            left = max(0, left - len(last))

    def peek(self, count: int = 1) -> Steps[str]:
        """The next characters; fewer where the text ends before."""
        while len(self._held) - self._at < count and not self.ended:
            yield
        characters = self._held[self._at : self._at + count]
        self.starved = self.starved or len(characters) < count
        return characters

    def accept(self, wanted: str) -> Steps[bool]:
        """Take `wanted` if it comes next."""
        size = 1
        while size <= len(wanted):
            there = yield from self.peek(size)
            if there != wanted[:size]:
                return False
            size += 1
        self.take(len(wanted))
        return True

    def run(self, of: re.Pattern[str], out: Out | None = None) -> Steps[str]:
        """Take all that comes next of a class of characters; it is passed on, or returned."""
        pieces: list[str] = []
        while (yield from self.peek()):
            match = of.match(self._held, self._at)
            if match is None:
                break
            piece = self.take(match.end() - self._at)
            (out or pieces.append)(piece)
            if self._at < len(self._held):
                break
        return "".join(pieces)

    def space(self) -> Steps[str]:
        return self.run(SPACE)

    def until(self, marks: Sequence[str], out: Out) -> Steps[str | None]:
        """Pass on what comes before the first of `marks`, which is taken; None where none comes.

        Of two that begin alike at one place the first is found.
        """
        wanted = re.compile("|".join(map(re.escape, marks)) or "(?!)")
        beginnings = {mark[:size] for mark in marks for size in range(1, len(mark))}
        longest = max(map(len, marks), default=1) - 1
        while True:
            match = wanted.search(self._held, self._at)
            end = len(self._held) if match is None else match.start()
            if match is None and not self.ended:
                tail = self._held[max(self._at, end - longest) :]
                sizes = (n for n in range(len(tail), 0, -1) if tail[-n:] in beginnings)
                end -= next(sizes, 0)
            if end > self._at:
                out(self.take(end - self._at))
            if match is not None:
                return self.take(len(match[0]))
            if self.ended:
                self.starved = True
                return None
            yield


class Trim:
    """Pieces without the space around the whole: what may be at its end is held back.

    Attributes:
        begin: whether space at the beginning is left out.
    """

    def __init__(self, begin: bool) -> None:
        self.begin = begin
        self._held: list[str] = []

    def push(self, piece: str) -> str:
        if self.begin:
            piece = piece.lstrip()
        if not piece:
            return ""
        self.begin = False
        kept = piece.rstrip()
        if not kept:
            self._held.append(piece)
            return ""
        out = "".join([*self._held, kept])
        self._held = [piece[len(kept) :]]
        return out

    def rest(self) -> str:
        """The space at the end."""
        held, self._held = "".join(self._held), []
        return held


class AnswerReader:
    """Reads an answer of one format, which says how in `calls`, or in `_answer`.

    Args:
        asked: what the request has.

    Attributes:
        begins: the marks that calls begin with.
    """

    begins: Sequence[str] = ()

    def __init__(self, asked: ReadingOptions) -> None:
        self.asked, self.text = asked, TextBuffer()
        self._events: list[AnswerEvent] = []
        self._grows, self._pieces = "", list[str]()  # the kind of the event that grows
        self._content, self._thought = Trim(False), Trim(True)
        self._called = self._open = self._said = False
        self._steps = self._all()
        self._over = False
        self._go()

    def push(self, piece: str) -> list[AnswerEvent]:
        """Read one more piece."""
        self.text.push(piece)
        return self._go()

    def end(self, cut: bool = False) -> list[AnswerEvent]:
        """Read the end.

        Args:
            cut: whether the text was to go on: then a call that has not been closed is none.
        """
        self.text.end(cut)
        return self._go()

    def _go(self) -> list[AnswerEvent]:
        if not self._over:
            self._over = next(self._steps, self) is self
        self._settle()
        made, self._events = self._events, []
        return made

    def _all(self) -> Steps[None]:
        yield from self._answer()
        if self._open:
            self.broken()
        rest = self._content.rest()
        if rest and not self._called:
            self._event("content", rest)

    def _answer(self) -> Steps[None]:
        """Read all of the text: reasoning, if there is some, then content and calls."""
        yield from self.reasoning()
        while mark := (yield from self.text.until(self.openings(), self.content)):
            self.text.record(mark)
            yield from self.calls(mark)

    def openings(self) -> Sequence[str]:
        """The marks that calls begin with; none where there are no tools."""
        return self.begins if self.asked.tools else ()

    def calls(self, mark: str) -> Steps[None]:
        """Read what follows such a mark, which is recorded."""
        yield from ()

    # --- reasoning -------------------------------------------------------------------------------

    def reasoning(self) -> Steps[None]:
        """Read it, where the text begins with it."""
        marks = self.asked.reasoning
        if marks is None:
            return
        if not self.asked.inside:
            before = yield from self.text.space()
            begun = yield from self.text.accept(marks.begin)
            if not begun or self.asked.raw:
                self.content(before)
            if not begun:
                return
            self.marked(marks.begin)
        else:
            yield from self.text.space()
            yield from self.text.accept(marks.begin)  # some models say it again
        mark = yield from self.text.until([marks.end, *self.interruptions()], self.think)
        if mark is not None and mark != marks.end:
            self.text.put_back(mark)
        elif mark is not None:
            self.marked(mark)
        self._content.begin = not self.asked.raw

    def marked(self, mark: str) -> None:
        """A mark of reasoning, which is seen where that is left as it is."""
        if self.asked.raw:
            self.content(mark)

    def interruptions(self) -> Sequence[str]:
        """The marks that end reasoning besides its own: some models call without having said it."""
        return ()

    def think(self, piece: str) -> None:
        if self.asked.raw:
            self.content(piece)
        else:
            self._event("reasoning", self._thought.push(piece))

    # --- events ----------------------------------------------------------------------------------

    def content(self, piece: str) -> None:
        self._event("content", self._content.push(piece))

    def call(self, name: str) -> None:
        """A call begins."""
        self._called = self._open = True
        if not self._said:
            self._content.rest()
            self._content.begin = True
        self._add(AnswerEvent("call", name))

    def arguments(self, piece: str) -> None:
        self._event("arguments", piece)

    def ended(self) -> None:
        """The call is whole."""
        self.text.recorded()
        self._open = False
        self._add(AnswerEvent("end"))

    def broken(self) -> None:
        """Give back the characters taken since the recording began: they are no call after all.

        It is content, unless it is only the beginning of one that the end of the text cut off.
        """
        raw = self.text.recorded()
        if self.text.cut and self.text.starved:
            raw, _ = "", self.text.take(len(self.text.rest))
        if self.text.starved and raw.strip() in self.openings():
            raw = ""
        if self._open:
            self._open = False
            self._add(AnswerEvent("broken", raw))
        else:
            self.content(raw)

    def _event(self, kind: str, text: str) -> None:
        if not text:
            return
        self._said = self._said or kind == "content"
        if kind != self._grows:
            self._settle()
            self._grows = kind
        self._pieces.append(text)

    def _add(self, event: AnswerEvent) -> None:
        self._settle()
        self._events.append(event)

    def _settle(self) -> None:
        """Make one event of the pieces of a kind that have come together."""
        if self._pieces:
            self._events.append(AnswerEvent(self._grows, "".join(self._pieces)))
            self._pieces = []
