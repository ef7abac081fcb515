"""Scores in, tokens out: the likeliest, or a draw that repeats torch's.

A draw is an exponential race: with q_i exponential, argmax(p_i / q_i) is i with probability
p_i (Yellott 1977; "Gumbel-max" in logarithms). torch's CPU `multinomial` does just that with
MT19937 and 53-bit doubles, so the same seed gives the same tokens here.

Scores that hold nan say nothing: whatever would choose among them raises instead. Looking costs
nothing, since an argmax and a maximum meet every value, and keep to nan once they have met one.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastgen.sampling.softmax import log_softmax, normalisers

Scores = NDArray[np.float32]
Words = NDArray[np.uint64]


class NothingLeft(ValueError):
    """Nothing can be drawn: every token is ruled out. Whoever knows by what says so."""

    def __init__(self, by: Sequence[str] = ()) -> None:
        names = f" by {', '.join(by)}" if by else ""
        super().__init__(f"no token can be drawn: every one is ruled out{names}")


class Stream:
    """torch's CPU generator for the rows of one call: one block of `rows * vocab` draws a step.

    The block of a step is drawn for finished rows too, as torch does, so what a row draws does
    not depend on when its neighbours stop. A row with a seed of its own is a stream of one row.

    Args:
        seed: what `torch.manual_seed` would take; None for fresh entropy.
        rows: rows that share the stream.
    """

    def __init__(self, seed: int | None = None, rows: int = 1) -> None:
        bits: np.random.BitGenerator = np.random.SFC64()  # fresh entropy, a third of the time
        if seed is not None:
            bits = np.random.MT19937()
            bits._legacy_seeding(seed & 0xFFFFFFFF)
        self._draw = np.random.Generator(bits)
        self.rows = rows
        self._next = 0  # the step whose block comes next
        self._blocks: dict[int, Words] = {}

    @property
    def kept(self) -> int:
        """The steps whose blocks are kept."""
        return len(self._blocks)

    def row(self, step: int, row: int, size: int) -> Words:
        """The random words [size] of `row` at `step`, counted from 0.

        Steps that are skipped are drawn too; blocks are kept until they are forgotten.
        """
        while self._next <= step:
            self._blocks[self._next] = self._words(self.rows * size).reshape(self.rows, size)
            self._next += 1
        block = self._blocks[step]
        return np.asarray(block[row], np.uint64)

    def forget(self, step: int) -> None:
        """Drop the blocks before `step`: no row will ask for them again."""
        for old in [known for known in self._blocks if known < step]:
            del self._blocks[old]

    def _words(self, count: int) -> Words:
        """[count] words of 64 bits: two of MT19937's, the first one high."""
        last = np.iinfo(np.uint64).max
        return np.asarray(self._draw.integers(0, last, count, np.uint64, endpoint=True), np.uint64)


class TorchStream(Stream):
    """torch's default generator itself, as `torch.manual_seed` left it: what is drawn advances it.

    Its state is read before a block is drawn and written back after, so that callbacks, and calls
    that follow, find it where transformers would have left it.

    Args:
        torch: the module, which the caller has imported.
        rows: rows that share the stream.
    """

    LOCK = threading.Lock()
    # Where it keeps what, in bytes: how many words are left, which comes next, and the words.
    LEFT, NEXT, STATE = slice(8, 12), slice(16, 24), slice(24, 24 + 8 * 624)

    def __init__(self, torch: Any, rows: int = 1) -> None:
        super().__init__(0, rows)
        self._torch = torch

    def _words(self, count: int) -> Words:
        with self.LOCK:
            state = self._torch.get_rng_state().numpy()
            mt = self._draw.bit_generator.state
            mt["state"]["key"] = state[self.STATE].view(np.uint64).astype(np.uint32)
            mt["state"]["pos"] = 625 - int(state[self.LEFT].view(np.int32)[0])
            self._draw.bit_generator.state = mt
            words = super()._words(count)
            mt = self._draw.bit_generator.state["state"]
            state[self.STATE].view(np.uint64)[:] = mt["key"]
            state[self.LEFT].view(np.int32)[:] = 625 - mt["pos"]
            state[self.NEXT].view(np.uint64)[:] = mt["pos"]
            self._torch.set_rng_state(self._torch.from_numpy(state))
        return words


def uniform(words: Words) -> NDArray[np.float64]:
    """The 53 low bits of each word as a double in [0, 1), as torch takes them."""
    return np.asarray((words & np.uint64((1 << 53) - 1)) * 2.0**-53, np.float64)


def exponential(draws: NDArray[np.float64]) -> NDArray[np.float32]:
    """torch's transform of uniform doubles to exponential float32."""
    return (-np.log1p(-draws)).astype(np.float32)


def greedy(scores: Scores) -> NDArray[np.int64]:
    """The likeliest token of each row [rows]; the first of equals.

    Raises:
        ValueError: a row holds nan.
    """
    tokens = np.asarray(scores.argmax(axis=1), np.int64)
    refuse_nan(scores[np.arange(len(tokens)), tokens])
    return tokens


def refuse_nan(values: NDArray[Any]) -> None:
    """Raise a ValueError if there is one among the values [any shape] that were chosen."""
    if np.isnan(values.max(initial=-np.inf)):  # which is nan if any is
        raise ValueError(
            "the scores hold nan, which says nothing of any token: the model's weights, a "
            "logits_processor or a knob made it; remove_invalid_values=True takes nan for 0"
        )


def sample(scores: Scores, words: Sequence[Words]) -> NDArray[np.int64]:
    """One token of each row, drawn from softmax(scores): what torch's multinomial gives.

    Args:
        scores: float32 [rows, vocab]; -inf for what may not come.
        words: [vocab] for each row (see `Stream.row`).
    """
    draws = zip(scores, words, strict=True)
    return np.array([sample_several(row, drawn, 1)[0] for row, drawn in draws], np.int64)


def sample_several(scores: Scores, words: Words, count: int) -> NDArray[np.int64]:
    """Places [count] drawn from softmax(scores) without replacement, in the order of the draw.

    The largest p / -log1p(-u), computed only where they can be: -log1p(-u) >= u, so p / u bounds
    a place's result from above. The places whose bound reaches the worst result of the `count`
    best bounds are few; no other can win, ties included. The slack covers the rounding to
    float32 of p, of the exponential and of their ratio. Where fewer than `count` are possible,
    impossible ones follow, as in torch.

    Args:
        scores: float32 [places]; -inf for what may not come.
        words: [places] random words; those of possible places become doubles u in [0, 1).

    Raises:
        NothingLeft: no score is above -inf.
        ValueError: the scores hold nan, or an infinity.
    """
    top = scores.max()
    refuse_nan(top)
    if top == -np.inf:
        raise NothingLeft()
    if top == np.inf:
        raise ValueError(
            "no token can be drawn: the largest score is infinite; remove_invalid_values=True "
            "makes scores finite"
        )
    # exp(-104) is 0 in float32, denormals included. Of huge scores only the largest are left.
    alive = np.flatnonzero(scores >= top - 104.0)
    probabilities = np.exp(scores[alive] - top)  # but for a factor that all places share
    draws = uniform(words[alive])
    with np.errstate(divide="ignore"):
        bound = probabilities / draws
        leaders = largest(bound, min(count, len(alive)))
        reached = (probabilities[leaders] / exponential(draws[leaders])).min()
        rivals = np.flatnonzero(bound >= reached * (1 - 1e-5))
        results = probabilities[rivals] / exponential(draws[rivals])
    drawn = alive[rivals[np.argsort(-results, kind="stable")[:count]]]
    if len(drawn) < count:
        drawn = np.concatenate((drawn, np.delete(np.arange(len(scores)), drawn)))
    return np.asarray(drawn[:count], np.int64)


def largest(values: NDArray[Any], count: int) -> NDArray[np.int64]:
    """Places [count] of the largest of `values [n]`, in descending order; of equal ones the first.

    Most of them are ruled out before anything is sorted: of n // classes strided slices the
    element-wise maximum has `classes` values, and the `count` largest of these are a lower bound
    of what is sought (200,000 values, 8 sought: 0.1 ms; np.argpartition takes 1.5).

    Raises:
        ValueError: the values hold nan.
    """
    classes, bound = 16 * count, np.float32(-np.inf)
    if 4 * classes <= len(values):
        whole = len(values) // classes * classes
        peaks = values[:whole].reshape(-1, classes).max(axis=0)
        refuse_nan(peaks)
        refuse_nan(values[whole:])
        bound = np.partition(peaks, classes - count)[classes - count]
    else:
        refuse_nan(values)
    above = np.flatnonzero(values > bound)
    above = above[np.argsort(-values[above], kind="stable")[:count]]
    if len(above) < count:
        equal = np.flatnonzero(values == bound)[: count - len(above)]
        above = np.concatenate((above, equal))
    return np.asarray(above, np.int64)


def continuations(
    logits: Scores, top: Scores, norm: Scores, slots: NDArray[np.int64], before: Scores, count: int
) -> tuple[Scores, NDArray[np.int64], NDArray[np.int64], Scores]:
    """The best continuations of a prompt's beams, without the scores of all the others.

    What `largest` finds in `log_softmax(logits)[slots] + before[:, None]`, to the bit. A bound
    from the maxima of stretches of the vocabulary, lowered by more than rounding can move a sum,
    leaves a few stretches to look at.

    Args:
        logits: float32 [rows, vocab], finite or -inf.
        top, norm: float32 [rows], see `softmax.normalisers`.
        slots: int64 [beams]: the row of each beam.
        before: float32 [beams]: log-probabilities of the beams so far.
        count: how many are sought.

    Returns:
        [count] each, best first: the sums, the beams, the tokens, and the tokens' own
        log-probabilities.
    """
    vocab = logits.shape[1]
    width = max(1, vocab // (16 * count))
    starts = np.arange(0, vocab, width)
    peaks = np.stack([np.maximum.reduceat(logits[slot], starts) for slot in slots])
    shift = before - top[slots] - norm[slots]
    sums = (peaks + shift[:, None]).ravel()
    bound = np.partition(sums, len(sums) - count)[len(sums) - count]
    size = np.abs(before) + np.abs(top[slots]) + np.abs(norm[slots]) + np.abs(bound)
    least = bound - shift - size * np.float32(2.0**-20)  # of a logit, for each beam
    parents, tokens = [], []
    for beam, slot in enumerate(slots.tolist()):
        reach = starts[peaks[beam] >= least[beam]]
        near = (reach[:, None] + np.arange(width)).ravel()
        near = near[near < vocab]
        near = near[logits[slot, near] >= least[beam]]
        parents.append(np.full(len(near), beam))
        tokens.append(near)
    parent, token = np.concatenate(parents), np.concatenate(tokens)
    rows = slots[parent]
    logprobs = (logits[rows, token] - top[rows]) - norm[rows]
    totals = logprobs + before[parent]
    order = np.argsort(-totals, kind="stable")[:count]
    return totals[order], parent[order], token[order], logprobs[order]


def top_logprobs(scores: Scores, count: int) -> list[list[tuple[int, float]]]:
    """The `count` likeliest tokens of each row with their log-probabilities, best first."""
    return best(log_softmax(scores), count)


def best(logprobs: Scores, count: int) -> list[list[tuple[int, float]]]:
    """The `count` largest of each row of `logprobs [rows, vocab]` with their places."""
    count = min(count, logprobs.shape[1])
    out = []
    for row in logprobs:
        ids = np.argpartition(-row, count - 1)[:count]
        ids = ids[np.argsort(-row[ids], kind="stable")]
        out.append([(int(i), float(row[i])) for i in ids])
    return out


@np.errstate(invalid="ignore")
def logprob_of(scores: Scores, tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """Log-probability [rows] of one token of each row; nan where the largest score is infinite."""
    top, norm = normalisers(scores)  # so that it is the number that `top_logprobs` has of it
    chosen = scores[np.arange(len(tokens)), tokens]
    return np.asarray((chosen - top) - norm, np.float64)
