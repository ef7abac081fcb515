"""Compare the exported model with the original: logits, and a greedy continuation.

The original runs row by row without padding. The export runs as it will run: ragged rows in one
batch, a prefill and then token by token, through fastgen's own engine.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fastgen.engine.model import Model
from fastgen.engine.output import GenerateOutput
from fastgen.export.prove.quality import Quality
from fastgen.export.quantize.divergence import beside
from fastgen.export.quantize.parts import CHUNK, chunks
from fastgen.export.source.origin import NOTHING, Tolerance
from fastgen.generator import CausalLM

if TYPE_CHECKING:  # a folder is compared without torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from fastgen.export.trace.attention import Layer

GRAIN = 8  # of what layers with windows are shown, so that a row just longer tells (see `Model`)
DECODED = 8  # tokens that are fed one at a time, after each probe or at its end
AT_ONCE = 128 << 20  # bytes of a prefill's logits that are asked at once
NEW_TOKENS = 24  # of the greedy continuation
OWN_TOKENS = 8  # of it, where the graph itself says what is right: only the loop is compared
FIRST = 3  # of these, which the original's own `generate` writes of one row in any case
TIE = 1e-4  # two best logits nearer than this times the largest are a tie: either may win

TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "In the beginning there was a language model, and it was slow. People waited for every word, "
    "and while they waited they wrote benchmarks.\n\n1. Measure before you believe.\n",
    'def generate(ids, max_new_tokens=20):\n    """Return the ids and what follows them."""\n'
    "    for _ in range(max_new_tokens):\n        ids = ids + [pick(model(ids))]\n    return ids\n"
    "\nUnicode: na\u00efve caf\u00e9, \u4f60\u597d, \U0001f642. Numbers: 3.14159, 2,718, 1e-5.",
)


# A row's number, a part of it, and its logits [part, vocab].
Part = tuple[int, slice, NDArray[np.float32]]


class Mismatch(ValueError):
    """The export disagrees with the original beyond the tolerance."""


@dataclass(frozen=True)
class Agreement:
    """Differences of two sets of logits. `max_difference` is a share of the largest logit."""

    positions: int
    max_difference: float
    mean_difference: float
    kl: float
    top1: float
    ties: int

    def summary(self) -> str:
        return (
            f"max {self.max_difference:.1e}, mean {self.mean_difference:.1e} of the largest "
            f"logit, KL {self.kl:.1e}, top-1 {self.top1:.2%}"
        )


@dataclass(frozen=True)
class Continuation:
    """Agreement of two greedy continuations."""

    tokens: int
    same: int
    ties: int

    def summary(self) -> str:
        tie = f" ({self.ties} rows part at a tie)" if self.ties else ""
        return f"{self.same} of {self.tokens} greedy tokens the same{tie}"


@dataclass(frozen=True)
class Reference:
    """Rows of ids, and what the original answers, once it was asked (see `ask`).

    Attributes:
        then: the tokens after each row with which it was asked.
        logits: float32 [length, vocab] of each row and of these but the last.
        continuation: of each row, greedily.
    """

    rows: Sequence[NDArray[np.int64]]
    then: list[NDArray[np.int64]] = field(default_factory=list)
    logits: list[NDArray[np.float32]] = field(default_factory=list)
    continuation: list[NDArray[np.int64]] = field(default_factory=list)

    @property
    def is_known(self) -> bool:
        return bool(self.logits)

    def shorter(self) -> Reference:
        """All rows but the longest, if there are others: what takes less time tells as well, where
        attention is what it was.
        """
        order = sorted(range(len(self.rows)), key=lambda index: len(self.rows[index]))
        some = order[:-1] or order
        return Reference(
            rows=[self.rows[index] for index in some],
            then=[self.then[index] for index in some],
            logits=[self.logits[index] for index in some],
        )


def probes(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast | None, layers: Sequence[Layer]
) -> list[NDArray[np.int64]]:
    """Ragged rows of ids: real text where there is a tokenizer, one row longer than a window."""
    config = model.config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None) or 1 << 20
    # Ids that it both reads and says: some read more (of images), some say more (padding).
    vocab = min(
        table().weight.shape[0]
        for table in (model.get_input_embeddings, model.get_output_embeddings)
    )
    texts = [] if tokenizer is None else [tokenizer(text)["input_ids"] for text in TEXTS]
    windows = [layer.window for layer in layers if layer.window is not None]
    return ragged(texts, vocab, limit, windows)


def ragged(
    texts: Sequence[Sequence[int]], vocab: int, limit: int, windows: Sequence[int]
) -> list[NDArray[np.int64]]:
    """Rows of ids of some texts, or random ones; one longer than the shortest window."""
    rows = [np.array(ids, np.int64) for ids in texts]
    rows = [row[row < vocab] for row in rows]
    if not any(len(row) > 1 for row in rows):
        random = np.random.default_rng(0)
        rows = [random.integers(0, vocab, length) for length in (11, 37, 90)]
    if windows and min(windows) <= 512:  # a longer one costs more than it tells
        row = np.resize(rows[-1], max(len(rows[-1]), min(windows) + 40))
        rows[-1] = row
    room = limit - NEW_TOKENS
    if room < 2:
        raise ValueError(f"the model takes only {limit} positions: too few to be checked")
    return [row[: max(2, min(len(row), room))] for row in rows if len(row) > 1]


def reference_logits(
    model: PreTrainedModel, rows: Sequence[NDArray[np.int64]]
) -> list[NDArray[np.float32]]:
    """The original's logits, float32 [length, vocab] of each row, without padding or cache.

    Positions are those that its `generate` gives it: a model that is asked without any may count
    from another number (RoBERTa's kind), and so say something else than it does as it generates.
    """
    import torch

    counted = "position_ids" in inspect.signature(model.forward).parameters
    out = []
    with torch.no_grad():
        for row in rows:
            ids = torch.from_numpy(row)[None]
            given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            if counted:
                given["position_ids"] = torch.arange(len(row))[None]
            logits = model(**given).logits
            out.append(logits[0].float().numpy())
    return out


def reference_continuation(
    model: PreTrainedModel, rows: Sequence[NDArray[np.int64]], count: int = NEW_TOKENS
) -> list[NDArray[np.int64]]:
    """The tokens that the original's own `generate` adds to each row, greedily, to full length."""
    import torch
    from transformers import GenerationConfig

    greedy = GenerationConfig(max_new_tokens=count, min_new_tokens=count, do_sample=False)
    greedy.pad_token_id = 0
    kept, model.generation_config = model.generation_config, greedy
    try:
        out = []
        for row in rows:
            ids = torch.from_numpy(row)[None]
            ids = model.generate(ids, attention_mask=torch.ones_like(ids))
            out.append(ids[0, len(row) :].numpy())
        return out
    finally:
        model.generation_config = kept


class Asked:
    """The part of an origin that asks a transformers model, a row at a time. See `Origin`."""

    model: PreTrainedModel

    def logits(
        self, row: NDArray[np.int64], then: NDArray[np.int64] = NOTHING
    ) -> NDArray[np.float32]:
        (logits,) = reference_logits(self.model, [np.concatenate([row, then])])
        return logits

    def continuation(self, row: NDArray[np.int64], count: int) -> NDArray[np.int64]:
        (tokens,) = reference_continuation(self.model, [row], count)
        return tokens


def exported_logits(
    model: Model, rows: Sequence[NDArray[np.int64]], at_once: int = AT_ONCE
) -> list[NDArray[np.float32]]:
    """The export's logits [length, vocab] of rows, as `exported_parts` gives them."""
    result = [np.empty((len(row), model.info.vocab_size), np.float32) for row in rows]
    for i, part, logits in exported_parts(model, rows, at_once):
        result[i][part] = logits
    return result


def exported_parts(
    model: Model,
    rows: Sequence[NDArray[np.int64]],
    at_once: int = AT_ONCE,
    decoded: int = DECODED,
) -> Iterator[Part]:
    """Logits of an export for rows together: a ragged prefill, then token by token.

    Where logits of all positions would take much memory, the prefill goes by parts.

    Args:
        at_once: bytes of its logits that are asked for at once.
        decoded: the last tokens of each row, so many, are fed one at a time.

    Yields:
        The parts, whose logits the next ones overwrite.
    """
    asked = max(CHUNK, at_once // (4 * model.info.vocab_size * len(rows)))
    parts = [_parts(len(row), asked, decoded) for row in rows]
    cache = model.new_cache(len(rows), 2 * max(len(row) for row in rows))
    for step in range(max(map(len, parts))):
        left = [i for i, some in enumerate(parts) if step < len(some)]
        # A row that is through between others repeats its last token: they must not notice.
        now = {
            i: parts[i][step] if step < len(parts[i]) else slice(len(rows[i]) - 1, len(rows[i]))
            for i in range(left[0], left[-1] + 1)
        }
        new = [rows[i][part] for i, part in now.items()]
        last = np.array([[len(ids) - 1] for ids in new])
        positions = np.minimum(np.arange(int(last.max()) + 1), last)
        logits = model.forward(new, cache, left[0], positions)
        for i in left:
            yield i, now[i], logits[i - left[0], : len(new[i - left[0]])]


def _parts(length: int, most: int, decoded: int) -> list[slice]:
    """Split a row: a prefill of `most` tokens at a time, and its last tokens one at a time."""
    head = max(1, length - decoded)
    ends = [*range(most, head, most), *range(head, length + 1)]
    return [slice(start, end) for start, end in pairwise([0, *ends])]


def compare(
    reference: Sequence[NDArray[np.float32]], exported: Sequence[NDArray[np.float32]]
) -> Agreement:
    """Compare logits [length, vocab] of the same rows."""
    pairs = zip(reference, exported, strict=True)
    return compared(reference, ((i, slice(None), row) for i, (_, row) in enumerate(pairs)))


def compare_export(
    reference: Reference, model: Model, written: GenerateOutput | None = None
) -> Agreement:
    """Compare what an export says of rows with the original's logits, a part at a time.

    Args:
        written: what `continued` gave of these rows: its steps are compared as far as the original
            was asked for the same tokens, and the rows are read at once. None to feed the last
            tokens of the rows one at a time.
    """
    if written is None:
        return compared(reference.logits, exported_parts(model, reference.rows))
    read = exported_parts(model, reference.rows, decoded=0)
    return compared(reference.logits, chain(read, _steps(reference, written)))


def _steps(reference: Reference, written: GenerateOutput) -> Iterator[Part]:
    """The logits of some steps after the first, which a prefill gives."""
    assert written.logits is not None
    count = len(written.logits)
    every = zip(reference.rows, reference.then, guessed(written, count), strict=True)
    for i, (row, then, tokens) in enumerate(every):
        same = tokens == then
        for step in range(1, min(count, DECODED + 1)):
            if not same[:step].all():
                break
            at = len(row) + step - 1
            yield i, slice(at, at + 1), written.logits[step][i : i + 1]


def compared(reference: Sequence[NDArray[np.float32]], parts: Iterable[Part]) -> Agreement:
    """Compare logits [length, vocab] of rows with those of parts of them."""
    peaks = (float(np.abs(part).max()) for row in reference for part in chunks(row))
    scale = max(peaks, default=0.0) or 1.0
    positions = parted = ties = 0
    largest = mean = lost = 0.0
    for i, part, logits in parts:
        expected = reference[i][part]
        found = beside(expected, logits)
        largest = max(largest, float(found.largest.max()))
        mean, lost = mean + float(found.mean.sum()), lost + float(found.kl.sum())
        apart = np.flatnonzero(~found.same)
        best, other = expected[apart].argmax(1), logits[apart].argmax(1)
        tie = expected[apart, best] - expected[apart, other] <= TIE * scale
        positions += len(expected)
        parted += int((~tie).sum())
        ties += int(tie.sum())
    return Agreement(
        positions=positions,
        max_difference=largest / scale,
        mean_difference=mean / positions / scale,
        kl=max(0.0, lost / positions),
        top1=1 - parted / positions,
        ties=ties,
    )


def continued(
    model: CausalLM, rows: Sequence[NDArray[np.int64]], count: int = NEW_TOKENS
) -> GenerateOutput:
    """Continue `rows` by `count` tokens in one ragged batch through `CausalLM.generate`, greedily.

    The model's own defaults do not count, and what is not finite ends nothing here: it is told when
    logits are asked and compared.
    """
    output: GenerateOutput = model.without_defaults().generate(
        [row.tolist() for row in rows],
        max_new_tokens=count,
        remove_invalid_values=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return output


def guessed(out: GenerateOutput, count: int) -> list[NDArray[np.int64]]:
    """The last tokens, so many, of each row that `continued` gave."""
    return [np.array(ids[-count:], np.int64) for ids in out.sequences]


def ask(
    reference: Reference,
    logits: Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float32]],
    generate: Callable[[NDArray[np.int64], int], NDArray[np.int64]],
    guesses: Sequence[NDArray[np.int64]],
) -> None:
    """Have the original answer, in one pass of a row where the guess is right.

    Tokens of which each is the likeliest after those before it are the greedy continuation: the
    pass tells. The first few of the shortest row are also asked of the original's own `generate`,
    which goes another way; where anything differs it is asked for all.

    Args:
        logits: what the original says of a row and tokens after it, float32 [length, vocab].
        generate: the tokens, a number of them, that the original adds to a row.
        guesses: of each row's continuation.
    """
    rows = reference.rows
    reference.then.extend(guesses)
    reference.logits.extend(map(logits, rows, [guess[:-1] for guess in guesses]))
    shortest = min(range(len(rows)), key=lambda index: len(rows[index]))
    first = generate(rows[shortest], FIRST)
    alike = np.array_equal(first, guesses[shortest][:FIRST])
    for row, guess, said in zip(rows, guesses, reference.logits, strict=True):
        right = alike and np.array_equal(said[len(row) - 1 :].argmax(1), guess)
        reference.continuation.append(guess if right else generate(row, len(guess)))


def compare_continuation(
    out: GenerateOutput, expected: Sequence[NDArray[np.int64]]
) -> Continuation:
    """Compare what `continued` gave with the original's continuation."""
    assert out.logits is not None
    same = ties = 0
    for i, tokens in enumerate(expected):
        generated = np.array(out.sequences[i][-len(tokens) :])
        parted = np.flatnonzero(generated != tokens)
        if not len(parted):
            same += len(tokens)
            continue
        step = int(parted[0])
        logits = out.logits[step][i]
        tie = logits[generated[step]] - logits[tokens[step]] <= TIE * np.abs(logits).max()
        ties += int(tie)
        same += len(tokens) if tie else step
    return Continuation(tokens=sum(map(len, expected)), same=same, ties=ties)


def judge(
    logits: Agreement | Quality, tolerance: Tolerance, greedy: Continuation | None = None
) -> list[str]:
    """Differences beyond the tolerance, one line each; empty if all is well."""
    wrong = []
    most, least = tolerance.max_difference, tolerance.top1
    if most is not None and not logits.max_difference <= most:
        wrong.append(
            f"a logit differs by {logits.max_difference:.2e} of the largest, {most:.0e} is allowed"
        )
    if not logits.kl <= tolerance.kl:
        wrong.append(f"KL divergence is {logits.kl:.2e}, {tolerance.kl:.0e} is allowed")
    if least is not None and not logits.top1 >= least:
        wrong.append(f"top-1 agreement is {logits.top1:.2%}, {least:.2%} is asked")
    if tolerance.greedy and greedy is not None and greedy.same != greedy.tokens:
        wrong.append(f"only {greedy.same} of {greedy.tokens} greedy tokens are the same")
    return wrong
