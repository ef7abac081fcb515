"""Several tokens a step: they are guessed, the model reads them all at once, and keeps a prefix.

A guess comes from the text itself (prompt lookup, github.com/apoorvumang/prompt-lookup-decoding)
or from a smaller model (Leviathan et al. 2022, arXiv 2211.17192). Here a guessed token is kept if
it is the one that the model itself picks at that place, by the same rule and, when sampling, with
the same random numbers as without guesses. So the result is that of plain generation, token for
token and seed for seed, for any number of rows. (transformers accepts by ratios of probabilities:
the same distribution, but other tokens from the same seed. An assistant that samples here draws
with the model's own random numbers, which makes it agree often: Daliri et al. 2024,
arXiv 2408.07978.)

Reading several tokens costs more than reading one, so a guess that does not hold is time lost.
`SpeculationBudget` keeps the account: guesses from the text shrink and stop where they do not pay.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from fastgen.engine.alike import Alike
from fastgen.engine.batch import Batch
from fastgen.engine.model import Model
from fastgen.engine.prefill import WHOLE, Chunks
from fastgen.engine.request import Row
from fastgen.engine.step import Event
from fastgen.sampling import sampler

# The rows that run, how many tokens each may get, and how many a model of its own may read in a
# call -> int64 [guessed] of each.
Draft = Callable[[Sequence[Row], Sequence[int], int], list[NDArray[np.int64]]]


class SpeculationBudget:
    """The length of guesses, by the clock: guessing loses no more than SHARE of a call.

    The account starts at nothing. A step that reads guesses is charged its seconds and credited
    those of the plain steps that it made unnecessary; looking for guesses is charged too. A guess
    gets longer while guesses hold, and is never longer than what the account can bear to lose.

    Attributes:
        width: tokens of the next guess, if the account allows.
        plain: seconds of a step without guesses; 0 as long as there was none.
        lost: seconds lost so far; negative if guessing has paid.
        spent: seconds of all steps.
    """

    SHARE = 0.01  # of the call's time that may be lost
    CREDIT = 8  # plain steps that can be gained at most: when guesses stop holding, it must show
    MEMORY = 0.8  # of a moving average, from step to step

    def __init__(self) -> None:
        self.width = 1
        self.plain = self.lost = self.spent = 0.0
        self._more = 0.0  # what a guessed token adds to a step, in plain steps; 0 for not known

    def allowed(self, remaining: int) -> int:
        """Tokens that a guess may have, with `remaining` steps to go."""
        if not self.plain:
            return 0  # a step has to be measured first
        bearable = self.SHARE * (self.spent + remaining * self.plain) - self.lost
        return max(0, min(self.width, int(bearable / ((self._more or 0.3) * self.plain))))

    def stepped(self, seconds: float) -> None:
        """A step without guesses took so long."""
        self.plain = self._moved(self.plain, seconds) if self.plain else seconds
        self.spent += seconds

    def searched(self, seconds: float) -> None:
        """Guesses were looked for."""
        self.lost += seconds
        self.spent += seconds

    def verified(self, seconds: float, guessed: int, kept: float) -> None:
        """A step read guesses of up to `guessed` tokens, and rows advanced by `kept` on average."""
        more = max(0.01, (seconds / self.plain - 1) / guessed)
        self._more = self._moved(self._more, more) if self._more else more
        self.spent += seconds
        self.lost = max(self.lost + seconds - kept * self.plain, -self.CREDIT * self.plain)
        if kept > guessed:
            self.width = max(self.width, 2 * guessed)
        elif kept <= 1:
            self.width = max(1, self.width // 2)

    def _moved(self, average: float, value: float) -> float:
        return self.MEMORY * average + (1 - self.MEMORY) * value


class Speculation(Batch):
    """The loop, with guesses: rows advance by one token or more a step.

    Args:
        model: reads the guesses.
        draft: makes them.
        budget: limits guesses to those that pay; None for as many as `draft` makes.
        chunks: see `Batch`.
    """

    def __init__(
        self,
        model: Model,
        draft: Draft,
        budget: SpeculationBudget | None = None,
        chunks: Chunks = WHOLE,
    ) -> None:
        super().__init__(model, chunks)
        self.draft = draft
        self.budget = budget

    def step(self) -> list[Event]:
        """Advance every row by the tokens of its guess that hold, and one more."""
        if any(row.logits is not None for row in self.rows):
            return super().step()
        start = time.perf_counter()
        guesses = self._guess()
        searched = time.perf_counter()
        longest = max(map(len, guesses))
        events = self._read(guesses) if longest else super().step()
        kept = len(events) / len(guesses)
        if longest:
            events += self._end_step()
        if self.budget is not None:
            seconds = time.perf_counter() - searched
            self.budget.searched(searched - start)
            if longest:
                self.budget.verified(seconds, longest, kept)
            else:
                self.budget.stepped(seconds)
        return events

    def _guess(self) -> list[NDArray[np.int64]]:
        """int64 [guessed] for each row; empty where nothing is guessed."""
        held = self.cache.lengths
        width = self.chunks.step // len(self.rows)  # what a row may read
        room = [
            min(row.request.max_length - row.length - 1, width - len(row.unread(held[slot])))
            for slot, row in enumerate(self.rows)
        ]
        if self.budget is not None:
            steps = max(row.request.max_length - row.length for row in self.rows)
            allowed = self.budget.allowed(steps)
            room = [min(allowed, most) for most in room]
        room = [max(0, most) for most in room]
        if not any(room):
            return [np.empty(0, np.int64)] * len(room)
        guesses = self.draft(self.rows, room, self.chunks.step)
        return [guess[:most] for guess, most in zip(guesses, room, strict=True)]

    def _read(self, guesses: Sequence[NDArray[np.int64]]) -> list[Event]:
        """Read the guesses, and keep what holds."""
        before = [self.cache.state(slot) for slot in range(len(guesses))]
        known = [row.unread(held) for row, (held, _) in zip(self.rows, before, strict=True)]
        new = [np.append(*pair) for pair in zip(known, guesses, strict=True)]
        logits = self._verify(known, new)
        events: list[Event] = []
        for alike, indices, places in self.parts:
            events += _accept(alike.rows, [guesses[i] for i in indices], logits[places])
        kept = [
            len(ids) - 1 + sum(event.row is row for event in events)
            for row, ids in zip(self.rows, known, strict=True)
        ]
        self._roll_back(new, kept, before)
        return events

    def _roll_back(
        self,
        new: Sequence[NDArray[np.int64]],
        kept: Sequence[int],
        before: Sequence[tuple[int, list[NDArray[np.float32]]]],
    ) -> None:
        """Let the cache hold `kept` of the tokens that were read, and no more.

        Keys and values are forgotten; states become those of before, and read what was kept again.
        """
        if not self.model.info.states:
            for slot, (held, _) in enumerate(before):
                self.cache.trim(slot, held + kept[slot])
            return
        again = [
            tokens[:count] if count < len(tokens) else tokens[:0]
            for tokens, count in zip(new, kept, strict=True)
        ]
        for slot, tokens in enumerate(again):
            if len(tokens):
                self.cache.restore(slot, before[slot])
        if any(map(len, again)):
            self.model.forward(again, self.cache, 0, np.zeros((len(again), 0), np.int64))

    def _verify(
        self, known: Sequence[NDArray[np.int64]], new: Sequence[NDArray[np.int64]]
    ) -> NDArray[np.float32]:
        """float32 [rows, longest guess + 1, vocab]: logits after the last known token and more."""
        starts = np.array([[len(ids) - 1] for ids in known])
        ends = np.array([[len(ids) - 1] for ids in new])
        positions = np.minimum(starts + np.arange((ends - starts).max() + 1), ends)
        return self.model.forward(new, self.cache, logits_positions=positions)


def _accept(
    rows: Sequence[Row],
    guesses: Sequence[NDArray[np.int64]],
    logits: NDArray[np.float32],
) -> list[Event]:
    """Take token after token as plain generation would, as long as the guess names the same ones.

    A place that a row does not reach is never looked at: what cannot be answered there, by the
    scores or by a caller's function, is nobody's error.

    Args:
        rows: alike: they share their processors.
        logits: float32 [rows, longest + 1, vocab], after the last token and each guessed one.
    """
    events: list[Event] = []
    going, alone = list(range(len(rows))), [Alike([row]) for row in rows]
    for position in range(logits.shape[1]):
        raw = logits[going, position]
        scores, tokens = Alike([rows[i] for i in going]).choose(raw)
        for at, i in enumerate(going):
            one = slice(at, at + 1)
            events += alone[i].append(raw[one], scores[one], tokens[one])
        picked = dict(zip(going, tokens.tolist(), strict=True))
        going = [
            i
            for i in going
            if position < len(guesses[i])
            and guesses[i][position] == picked[i]
            and not rows[i].finish_reason
        ]
        if not going:
            break
    return events


def prompt_lookup(num_tokens: int, max_ngram: int) -> Draft:
    """Guess what followed the last time that the text's last few tokens occurred.

    Args:
        num_tokens: tokens that are guessed, at most.
        max_ngram: tokens that must match, at most; shorter matches are tried after longer ones.
    """

    def draft(rows: Sequence[Row], room: Sequence[int], most: int) -> list[NDArray[np.int64]]:
        return [
            continuation(row.history, min(num_tokens, free), max_ngram, row.request.eos)
            for row, free in zip(rows, room, strict=True)
        ]

    return draft


def continuation(
    ids: NDArray[np.int64], num_tokens: int, max_ngram: int, eos: frozenset[int]
) -> NDArray[np.int64]:
    """int64 [<= num_tokens]: what followed the leftmost match of the longest n-gram at the end."""
    if num_tokens < 1:
        return ids[:0]
    for size in range(min(max_ngram, len(ids) - 1), 0, -1):
        windows = np.lib.stride_tricks.sliding_window_view(ids, size)[:-1]
        for start in np.flatnonzero((windows == ids[-size:]).all(axis=1)).tolist():
            guess = ids[start + size : start + size + num_tokens]
            ends = np.flatnonzero(np.isin(guess, list(eos)))
            guess = guess[: ends[0]] if len(ends) else guess
            if len(guess):
                return guess
    return ids[:0]


class Assistant:
    """Guesses by a smaller model that shares the vocabulary.

    It reads the rows into a cache of its own and picks as the model would: by the same processors
    and the same random numbers. A row's guess ends where the assistant is unsure. While it has much
    to read, a prompt for one, it reads a chunk a step and guesses nothing.

    Args:
        model: the smaller model.
        num_tokens: tokens that are guessed, at most, at first.
        confidence: a guess ends at a token less likely than this.
        heuristic: two more tokens after a guess that held whole, one less after another
            (transformers' `num_assistant_tokens_schedule="heuristic"`, but that it begins anew
            with each call, which there is "heuristic_transient").
    """

    def __init__(self, model: Model, num_tokens: int, confidence: float, heuristic: bool) -> None:
        self.model = model
        self.num_tokens = num_tokens
        self.confidence = confidence
        self.heuristic = heuristic
        info = model.info
        self._limit = info.max_length if info.hard_limit and info.max_length else sys.maxsize
        self._cache = model.new_cache(0, 0)
        self._slots: list[Row] = []
        self._read_ids: dict[int, NDArray[np.int64]] = {}  # row -> what the cache has of it
        self._guessed: dict[int, tuple[int, int]] = {}  # row -> its length then, tokens guessed

    def __call__(
        self, rows: Sequence[Row], room: Sequence[int], most: int
    ) -> list[NDArray[np.int64]]:
        """int64 [guessed] for each row (see `Draft`)."""
        nothing = [np.empty(0, np.int64)] * len(rows)
        reach = [self._limit - len(row.seen) for row in rows]
        if min(reach) < 1:  # a text is longer than the assistant can read
            return nothing
        self._settle(rows)
        if self._catch_up(rows, max(1, most // len(rows))):
            return nothing
        self._adapt(rows)
        free = [min(self.num_tokens, *left) for left in zip(room, reach, strict=True)]
        guesses: list[list[int]] = [[] for _ in rows]
        going = [free[i] > 0 for i in range(len(rows))]
        while any(going):
            ahead = [row.after(guess) for row, guess in zip(rows, guesses, strict=True)]
            logits = self._read(ahead)
            try:
                scores, tokens = Alike(ahead).choose(logits)
            except Exception:  # of a caller's function too: it may not know a text that never comes
                break  # and if the text does come, the model asks again and its error counts
            sure = np.exp(sampler.logprob_of(scores, tokens)) >= self.confidence
            for i, token in enumerate(tokens.tolist()):
                if not going[i]:
                    continue
                if not sure[i] or token in rows[i].request.eos:
                    going[i] = False
                    continue
                guesses[i].append(token)
                going[i] = len(guesses[i]) < free[i]
        self._guessed = {
            id(row): (row.length, len(guess)) for row, guess in zip(rows, guesses, strict=True)
        }
        return [np.array(guess, np.int64) for guess in guesses]

    def _settle(self, rows: Sequence[Row]) -> None:
        """Follow rows that joined or left, and forget what was read and did not hold."""
        known = {id(row): slot for slot, row in enumerate(self._slots)}
        # No guess goes beyond max_length; a shorter row is padded to the longest that is read.
        longest = max(len(row.prompt) + row.request.max_length for row in rows)
        self._cache.reserve(len(rows), 2 * longest)
        self._cache.take([known.get(id(row), slot) for slot, row in enumerate(rows)])
        for slot, row in enumerate(rows):
            read, true = self._read_ids.get(id(row), row.seen[:0]), row.seen
            common = min(len(read), len(true) - 1)
            parted = np.flatnonzero(read[:common] != true[:common])
            self._cache.lengths[slot] = parted[0] if len(parted) else common
        self._slots = list(rows)

    def _catch_up(self, rows: Sequence[Row], width: int) -> bool:
        """Read up to `width` tokens of each row, if there is more to read of one than that."""
        held = self._cache.lengths[: len(rows)].tolist()
        new = [row.seen[at : at + width] for row, at in zip(rows, held, strict=True)]
        behind = [len(row.seen) - at for row, at in zip(rows, held, strict=True)]
        if max(behind) <= width:
            return False
        # What a row has read whole stays but for its last token, which is asked about.
        new = [ids[: left - 1] for ids, left in zip(new, behind, strict=True)]
        self._guessed = {}
        self._read_ids = {
            id(row): row.seen[: at + len(ids)] for row, at, ids in zip(rows, held, new, strict=True)
        }
        self.model.forward(new, self._cache, 0, np.zeros((len(new), 0), np.int64))
        return True

    def _adapt(self, rows: Sequence[Row]) -> None:
        if not self.heuristic or not self._guessed:
            return
        held = [
            row.length - length > guessed
            for row in rows
            for length, guessed in [self._guessed.get(id(row), (row.length, 0))]
        ]
        self.num_tokens = self.num_tokens + 2 if all(held) else max(1, self.num_tokens - 1)

    def _read(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        """float32 [rows, vocab]: logits after all of each row's tokens."""
        lengths = self._cache.lengths[: len(rows)].tolist()
        new = [row.seen[length:] for row, length in zip(rows, lengths, strict=True)]
        self._read_ids = {id(row): ahead.seen for row, ahead in zip(self._slots, rows, strict=True)}
        return self.model.forward(new, self._cache)[:, 0].copy()
