"""Text that a model writes itself: it fits every model, also one that has ids only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from fastgen.export.prove.reader import ROW, Document, Reader, Row
from fastgen.generator import CausalLM

SIDES = ("calibration", "evaluation")
AT_ONCE, TOGETHER = 32, 12  # rows that the model writes together, at most and at least
TRIES = 4  # times the rows that full ones would take, where it ends its texts early


class Writer:
    """The rows that the model writes itself, made when they are asked for."""

    def __init__(
        self,
        own: CausalLM | Callable[[], CausalLM],
        reader: Reader,
        halves: Mapping[str, Mapping[str, Sequence[Document]]],
    ) -> None:
        self._own, self._reader, self._halves = own, reader, halves
        self._made: dict[str, tuple[int, list[Row]]] = {}  # by side: asked tokens, and what came

    def rows(self, side: str, tokens: int) -> list[Row]:
        """About `tokens` of them; where fewer were asked than a row has, one that is so short."""
        asked, rows = self._made.get(side, (0, []))
        if asked < tokens:
            model = self._own if isinstance(self._own, CausalLM) else self._own()
            seed = (1 + SIDES.index(side)) << 20
            length = min(tokens, self._reader.length)
            rows = own_text(model, tokens, seed, self._starts(side), length, self._reader.eos)
            missing = tokens - sum(map(len, rows))
            if missing > tokens // 2:  # it ends its texts at once: they go on past the end
                rows += own_text(model, missing, seed + (1 << 19), None, length)
            others = [those for name, (_, those) in self._made.items() if name != side]
            seen = {row.tobytes() for those in others for row in those}
            rows = [row for row in rows if row.tobytes() not in seen]
            self._made[side] = tokens, rows
        return rows

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


def own_text(
    model: CausalLM,
    tokens: int,
    seed: int,
    starts: Sequence[Sequence[int]] | None = None,
    length: int = ROW,
    eos: Sequence[int] = (),
) -> list[Row]:
    """Rows that a model writes, about `tokens` in all: sampled at temperature 1, from all tokens.

    Each row has a seed of its own, so it is the same whatever is asked for beside it.

    Args:
        starts: ids that rows go on from, in turn; None for a random id each.
        length: tokens of a row at most, its start counted.
        eos: ids that end a row, which may be shorter then.
    """
    vocab, rows = model.model.info.vocab_size, list[Row]()
    starts = _random_starts(vocab, seed, tokens) if starts is None else starts
    full = -(-tokens // length)
    while sum(map(len, rows)) < tokens and len(rows) < TRIES * max(full, TOGETHER):
        missing = -(-(tokens - sum(map(len, rows))) // length)
        together = min(AT_ONCE, max(TOGETHER, missing))
        indices = range(len(rows), len(rows) + together)
        begun = [list(starts[index % len(starts)])[: length - 1] for index in indices]
        rows += _sampled(model, begun, [seed + index for index in indices], length, eos)
    wanted = np.searchsorted(np.cumsum([len(row) for row in rows]), tokens) + 1
    return [row for row in rows[:wanted] if len(row) > 1]


def _random_starts(vocab: int, seed: int, tokens: int) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [[int(token)] for token in random.integers(0, vocab, max(1, tokens))]


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
