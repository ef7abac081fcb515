"""Text that a model writes itself: it fits every model, also one that has ids only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fastgen.export.prove.reader import ROW, Document, Reader, Row
from fastgen.generator import CausalLM

SIDES = ("calibration", "evaluation")
AT_ONCE = 32  # rows that the model writes together, at most
TRIES = 4  # times the rows that full ones would take, where it ends its texts early


class Writer:
    """The rows that the model writes itself, made when they are asked for."""

    def __init__(
        self,
        own: CausalLM | Callable[[], CausalLM],
        reader: Reader,
        halves: Mapping[str, Mapping[str, Sequence[Document]]],
        length: int = ROW,
    ) -> None:
        """
        Args:
            halves: what comes with fastgen, by kind and side: its own begin as those do.
            length: tokens of a row, at most.
        """
        self._own, self._reader, self._halves = own, reader, halves
        self._length = min(length, reader.length)
        self._made: dict[str, tuple[int, list[Row]]] = {}  # by side: asked tokens, and what came

    def rows(self, side: str, tokens: int) -> list[Row]:
        """About `tokens` of them; where fewer were asked than a row has, one that is so short."""
        self.write({side: tokens})
        return self._made[side][1]

    def write(self, tokens: Mapping[str, int]) -> None:
        """Make rows of several sides together: each step reads the whole model, for all of them."""
        asked = {side: n for side, n in tokens.items() if self._made.get(side, (0,))[0] < n}
        if not asked:
            return
        model = self._own if isinstance(self._own, CausalLM) else self._own()
        seeds = {side: (1 + SIDES.index(side)) << 20 for side in asked}
        wishes = [Wish(n, seeds[side], self._starts(side)) for side, n in asked.items()]
        length = min(self._length, max(asked.values()))
        written = own_texts(model, wishes, length, self._reader.eos)
        for (side, n), rows in zip(asked.items(), written, strict=True):
            missing = n - sum(map(len, rows))
            if missing > n // 2:  # it ends its texts at once: they go on past the end
                rows += own_texts(model, [Wish(missing, seeds[side] + (1 << 19))], length)[0]
            others = [those for name, (_, those) in self._made.items() if name != side]
            seen = {row.tobytes() for those in others for row in those}
            self._made[side] = n, [row for row in rows if row.tobytes() not in seen]

    def _starts(self, side: str) -> list[list[int]] | None:
        """Ids to go on from: questions, or beginnings of its texts; None if neither is known."""
        reader = self._reader
        if reader.template is not None:
            asked = [reader.question(chat) for chat in self._halves["chat"][side]]  # type: ignore[arg-type]
            short = [row.tolist() for row in asked if row is not None]
            short = [row for row in short if len(row) <= reader.length // 2]
            if short:
                return short
        if reader.tokenizer is not None and reader.prefix:
            return [reader.prefix]
        if reader.bos is not None:
            return [[reader.bos]]
        if reader.tokenizer is None:
            return None
        texts = [
            document
            for name in ("prose", "code", "languages")
            for document in self._halves[name][side]
        ]
        words = [reader.encoded(document)[:2] for document in texts if isinstance(document, str)]
        return [row for row in words if row] or None


@dataclass(frozen=True)
class Wish:
    """Rows that a model is to write.

    Attributes:
        tokens: in all, about.
        seed: of the first row; each has one of its own, and is the same whatever is beside it, but
            for its end.
        starts: ids that rows go on from, in turn; None for a random id each.
    """

    tokens: int
    seed: int
    starts: Sequence[Sequence[int]] | None = None

    def begun(self, index: int, length: int, vocab: int) -> list[int]:
        """The ids that a row begins with, fewer than `length`."""
        if self.starts is None:
            return [int(np.random.default_rng((self.seed, index)).integers(0, vocab))]
        return list(self.starts[index % len(self.starts)])[: length - 1]


def own_texts(
    model: CausalLM, wishes: Sequence[Wish], length: int = ROW, eos: Sequence[int] = ()
) -> list[list[Row]]:
    """Rows that a model writes: sampled at temperature 1, from all tokens.

    Args:
        length: tokens of a row at most, its start counted.
        eos: ids that end a row, which may be shorter then.

    Returns:
        For each wish its rows.
    """
    vocab = model.model.info.vocab_size
    made: list[list[Row]] = [[] for _ in wishes]
    tries = [TRIES * -(-wish.tokens // length) for wish in wishes]
    while True:
        begun: list[tuple[int, int]] = []  # wish and row
        for at, (wish, rows) in enumerate(zip(wishes, made, strict=True)):
            # Rows of a model that ends its texts are half as long, about.
            missing = (2 if eos else 1) * (wish.tokens - sum(map(len, rows)))
            more = min(-(-missing // length), tries[at] - len(rows), AT_ONCE - len(begun))
            begun += [(at, index) for index in range(len(rows), len(rows) + more)]
        if not begun:
            break
        starts = [wishes[at].begun(index, length, vocab) for at, index in begun]
        seeds = [wishes[at].seed + index for at, index in begun]
        for (at, _), row in zip(begun, _sampled(model, starts, seeds, length, eos), strict=True):
            made[at].append(row)
    for wish, rows in zip(wishes, made, strict=True):
        wanted = int(np.searchsorted(np.cumsum([len(row) for row in rows]), wish.tokens)) + 1
        rows[:] = [row for row in rows[:wanted] if len(row) > 1]
    return made


def _sampled(
    model: CausalLM, begun: list[list[int]], seeds: list[int], length: int, eos: Sequence[int]
) -> list[Row]:
    """`begun`, gone on with to `length` or to an end.

    What the model's own defaults say of sampling is not its text.
    """
    longest = max(map(len, begun))
    sequences = model.without_defaults().generate(
        begun,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        seed=tuple(seeds),
        max_new_tokens=length - longest,
        eos_token_id=list(eos) or None,
        pad_token_id=0,
    )
    rows = []
    for start, ids in zip(begun, sequences, strict=True):
        row = np.array(ids[longest - len(start) :], np.int64)
        ends = np.flatnonzero(np.isin(row[len(start) :], list(eos)))
        rows.append(row[: len(start) + int(ends[0]) + 1] if len(ends) else row)
    return rows
