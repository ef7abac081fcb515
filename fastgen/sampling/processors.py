"""The processors: all that happens to logits between the model and the choice of a token.

Every processor and warper of transformers 5.24 (`generation/logits_process.py`), and OpenAI's
penalties: functions from `logits [rows, vocab] float32` to such logits. A processor may write
into what it is given and return it: a copy of all logits costs more than most of them do. `build`
chains the active ones in the order of transformers' `_get_logits_processor`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from fastgen.inputs.validators import shown
from fastgen.sampling import watermark
from fastgen.sampling.softmax import log_softmax, softmax

if TYPE_CHECKING:
    from fastgen.inputs.params import Params


@dataclass(frozen=True)
class Context:
    """The rows, for processors that look beyond logits: one entry a row, of any length each."""

    ids: Sequence[np.ndarray]  # int64 [length of the row]: prompt with its padding, then new tokens
    prompt_lengths: np.ndarray  # int64 [rows], padding included
    max_lengths: np.ndarray  # int64 [rows]: where the row ends at the latest, prompt included
    pads: np.ndarray  # int64 [rows]: leading ids that repetition_penalty leaves out
    batch_ids: np.ndarray  # int64 [rows]: the prompt of the row, for prefix_allowed_tokens_fn
    beams: np.ndarray | None = None  # int64 [rows]: which row of the call, or beam; else its prompt

    @property
    def rows(self) -> np.ndarray:
        """int64 [rows]: which row of the call (with beams: which beam) each of them is."""
        return self.batch_ids if self.beams is None else self.beams

    @cached_property
    def lengths(self) -> np.ndarray:
        return np.array([len(ids) for ids in self.ids], dtype=np.int64)

    @cached_property
    def prompts(self) -> list[np.ndarray]:
        return [ids[:n] for ids, n in zip(self.ids, self.prompt_lengths, strict=True)]

    @cached_property
    def generated(self) -> list[np.ndarray]:
        return [ids[n:] for ids, n in zip(self.ids, self.prompt_lengths, strict=True)]


Processor = Callable[[Context, np.ndarray], np.ndarray]
PrefixAllowedTokens = Callable[[int, np.ndarray], Sequence[int]]
UserProcessor = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Effect(Enum):
    """The effect of a processor on the choice of a token."""

    RESCALES = "changes scores, and leaves a token that was allowed"
    BANS = "forbids tokens, and leaves the scores of all others alone"
    BANS_AND_RESCALES = "forbids tokens, and may change the scores of others"
    UNKNOWN = "a caller's own: it may do anything, and remember what it was asked"


@dataclass(frozen=True, slots=True)
class ProcessorStep:
    """A processor in its place in a chain.

    Attributes:
        name: the knob that asks for it.
        effect: forced tokens, fast beams and errors rely on it.
    """

    name: str
    effect: Effect
    processor: Processor


@dataclass(frozen=True)
class Chain:
    """Processors, applied one after the other. False when there are none."""

    steps: tuple[ProcessorStep, ...] = ()

    def __call__(self, context: Context, logits: np.ndarray, spare: bool = False) -> np.ndarray:
        """Apply them all.

        Args:
            logits: float32 [rows, vocab].
            spare: the logits are not needed afterwards, and may be overwritten.
        """
        if self.steps and not spare:
            logits = logits.copy()
        for step in self.steps:
            logits = step.processor(context, logits)
        return logits

    def __bool__(self) -> bool:
        return bool(self.steps)

    @property
    def only_bans(self) -> bool:
        """True where the scores of tokens that are not forbidden stay as they are."""
        return all(step.effect is Effect.BANS for step in self.steps)

    def may_ban(self, but: Processor | None = None) -> bool:
        """True where a processor other than `but` may forbid tokens."""
        return any(
            step.effect is not Effect.RESCALES for step in self.steps if step.processor is not but
        )

    def ruling_out(self, context: Context, vocab_size: int) -> list[str]:
        """The processors that rule out a token for one of these rows, by what the caller set.

        A caller's own may remember what they are asked, so they are named without asking them.
        """
        names = []
        for step in self.steps:
            if step.effect is Effect.UNKNOWN:
                names.append(step.name)
            elif step.effect is not Effect.RESCALES:
                zeros = np.zeros((len(context.ids), vocab_size), np.float32)
                names += [step.name] if (step.processor(context, zeros) == -np.inf).any() else []
        return names


def build(
    params: Params,
    vocab_size: int,
    *,
    prefix_allowed_tokens_fn: PrefixAllowedTokens | None = None,
    logits_processor: Sequence[UserProcessor] = (),
    unconditional: Callable[[Context], np.ndarray] | None = None,
    constraint: tuple[str, Processor] | None = None,
) -> Chain:
    """The processors that `params` asks for, in transformers' order.

    A chain keeps no state: it may serve any rows of any step that share these knobs.

    Args:
        params: the knobs; a neutral one adds nothing to the chain.
        vocab_size: the width of the logits.
        prefix_allowed_tokens_fn: (batch id, ids [length]) -> the tokens allowed next.
        logits_processor: callables (ids [rows, length] int64, scores [rows, vocab]) -> scores.
        unconditional: gives the unconditional logits [rows, vocab] that guidance_scale needs.
        constraint: the knob that says what the text has to be, and what rules out all else. It
            comes last of what forbids tokens, so that nothing allows them again.

    Raises:
        ValueError: a knob names tokens outside the vocabulary, or lacks what it needs.
    """
    steps = (
        *_guidance(params, unconditional),
        *_penalties(params, vocab_size),
        *_bans(params, vocab_size, prefix_allowed_tokens_fn),
        *(
            (f"{CALLERS} {_name(fn)}", UNKNOWN, _with(user_processor, fn))
            for fn in logits_processor
        ),
        *(((constraint[0], BANS_AND_RESCALES, constraint[1]),) if constraint else ()),
        *(_warpers(params) if params.do_sample else ()),
        *_finish(params, vocab_size),
    )
    return Chain(tuple(ProcessorStep(*step) for step in steps))


Steps = list[tuple[str, Effect, Processor]]
RESCALES, BANS, UNKNOWN = Effect.RESCALES, Effect.BANS, Effect.UNKNOWN
BANS_AND_RESCALES = Effect.BANS_AND_RESCALES

CALLERS = "logits_processor"  # the names of callers' own processors begin with it


def _guidance(p: Params, unconditional: Callable[[Context], np.ndarray] | None) -> Steps:
    scale = p.guidance_scale
    if scale is None or scale == 1:
        return []
    if unconditional is None:
        raise ValueError(f"guidance_scale={scale!r} needs the unconditional logits of the model")
    logits_of = unconditional
    return [
        ("guidance_scale", RESCALES, lambda c, x: classifier_free_guidance(x, logits_of(c), scale))
    ]


def _penalties(p: Params, vocab: int) -> Steps:
    steps: Steps = []
    if p.sequence_bias is not None:
        groups = by_prefix_length("sequence_bias", dict(p.sequence_bias), vocab)
        steps += [("sequence_bias", BANS_AND_RESCALES, _with(sequence_bias, groups))]
    if p.encoder_repetition_penalty != 1:
        penalize_prompt = _with(encoder_repetition_penalty, p.encoder_repetition_penalty)
        steps += [("encoder_repetition_penalty", RESCALES, penalize_prompt)]
    if p.repetition_penalty != 1:
        steps += [("repetition_penalty", RESCALES, _with(repetition_penalty, p.repetition_penalty))]
    # OpenAI's stand with the other penalties, before anything is banned: what follows may
    # rely on -inf, and remove_invalid_values sees (and repairs) an infinite bias too.
    if p.frequency_penalty or p.presence_penalty:
        penalties = p.frequency_penalty, p.presence_penalty
        steps += [("frequency_penalty", RESCALES, _with(frequency_penalty, *penalties))]
    if p.logit_bias:
        biases = dict(p.logit_bias)
        tokens = _check_tokens("logit_bias", list(biases), vocab)
        values = np.array(list(biases.values()), dtype=np.float32)
        steps += [("logit_bias", BANS_AND_RESCALES, _alone(logit_bias, tokens, values))]
    return steps


def _bans(p: Params, vocab: int, allowed: PrefixAllowedTokens | None) -> Steps:
    steps: Steps = []
    eos = _inside(p.eos_token_id or (), vocab)
    if p.no_repeat_ngram_size:
        steps += [("no_repeat_ngram_size", BANS, _with(no_repeat_ngram, p.no_repeat_ngram_size))]
    if p.encoder_no_repeat_ngram_size:
        size = p.encoder_no_repeat_ngram_size
        steps += [("encoder_no_repeat_ngram_size", BANS, _with(encoder_no_repeat_ngram, size))]
    if p.bad_words_ids is not None:
        ends = {(token,) for token in p.eos_token_id or ()}
        words = {word: -np.inf for word in p.bad_words_ids if word not in ends}
        groups = by_prefix_length("bad_words_ids", words, vocab)
        steps += [("bad_words_ids", BANS, _with(sequence_bias, groups))]
    # min_new_tokens overrides min_length in transformers, which sets both to the same bound.
    if p.min_new_tokens is not None:
        if p.min_new_tokens and len(eos):
            steps += [("min_new_tokens", BANS, _with(min_new_tokens, p.min_new_tokens, eos))]
    elif p.min_length and len(eos):
        steps += [("min_length", BANS, _with(min_length, p.min_length, eos))]
    if allowed is not None:
        steps += [
            ("prefix_allowed_tokens_fn", BANS_AND_RESCALES, _with(prefix_allowed_tokens, allowed))
        ]
    if p.forced_bos_token_id is not None:
        bos = _check_tokens("forced_bos_token_id", [p.forced_bos_token_id], vocab)
        steps += [("forced_bos_token_id", BANS_AND_RESCALES, _with(forced_bos, bos))]
    if p.forced_eos_token_id is not None:
        last = _check_tokens("forced_eos_token_id", p.forced_eos_token_id, vocab)
        steps += [("forced_eos_token_id", BANS_AND_RESCALES, _with(forced_eos, last))]
    if p.remove_invalid_values:
        steps += [("remove_invalid_values", RESCALES, _alone(remove_invalid_values))]
    if p.exponential_decay_length_penalty is not None:
        if p.eos_token_id is None:
            raise ValueError("exponential_decay_length_penalty needs an eos_token_id, got None")
        decay = _with(exponential_decay_length_penalty, *p.exponential_decay_length_penalty, eos)
        steps += [("exponential_decay_length_penalty", RESCALES, decay)]
    if p.suppress_tokens is not None:
        tokens = _inside(p.suppress_tokens, vocab)
        steps += [("suppress_tokens", BANS, _with(suppress_tokens, tokens))]
    if p.begin_suppress_tokens is not None:
        tokens = _inside(p.begin_suppress_tokens, vocab)
        after_bos = p.forced_bos_token_id is not None
        steps += [("begin_suppress_tokens", BANS, _with(begin_suppress_tokens, tokens, after_bos))]
    return steps


def _warpers(p: Params) -> Steps:
    # A beam needs a token to go on with beside every one that ends the text.
    keep = 1 if p.num_beams == 1 else 1 + len(p.eos_token_id or (0,))
    steps: Steps = []
    if p.temperature != 1:
        steps += [("temperature", RESCALES, _alone(temperature, p.temperature))]
    if p.top_h is not None:
        steps += [("top_h", RESCALES, _alone(top_h, p.top_h))]
    if p.top_k:
        steps += [("top_k", RESCALES, _alone(top_k, max(p.top_k, keep)))]
    if p.top_p < 1:
        steps += [("top_p", RESCALES, _alone(top_p, p.top_p, keep))]
    if p.min_p is not None:
        steps += [("min_p", RESCALES, _alone(min_p, p.min_p, keep))]
    if p.typical_p < 1:
        steps += [("typical_p", RESCALES, _alone(typical_p, p.typical_p, keep))]
    if p.epsilon_cutoff:
        steps += [("epsilon_cutoff", RESCALES, _alone(epsilon_cutoff, p.epsilon_cutoff, keep))]
    if p.eta_cutoff:
        steps += [("eta_cutoff", RESCALES, _alone(eta_cutoff, p.eta_cutoff, keep))]
    return steps


def _finish(p: Params, vocab: int) -> Steps:
    steps: Steps = []
    if p.watermarking_config is not None:
        mark = watermark.from_config(p.watermarking_config, vocab)
        steps += [("watermarking_config", RESCALES, lambda c, x: mark(c.ids, c.prompt_lengths, x))]
    if p.renormalize_logits:
        steps += [("renormalize_logits", RESCALES, _alone(log_softmax))]
    return steps


def _with(function: Callable[..., np.ndarray], *knobs: Any) -> Processor:
    """A processor from a function of (context, logits, *knobs)."""
    return lambda context, logits: function(context, logits, *knobs)


def _alone(function: Callable[..., np.ndarray], *knobs: Any) -> Processor:
    """A processor from a function of (logits, *knobs)."""
    return lambda context, logits: function(logits, *knobs)


def _name(function: Any) -> str:
    return str(getattr(function, "__name__", type(function).__name__))


def _check_tokens(name: str, tokens: Any, vocab_size: int) -> np.ndarray:
    """A sequence of tokens as int64 [n], all of them in the vocabulary."""
    ids = np.asarray(tokens, dtype=np.int64).reshape(-1)
    bad = ids[(ids < 0) | (ids >= vocab_size)]
    if len(bad):
        raise ValueError(f"{name} must hold tokens of 0 to {vocab_size - 1}, got {bad.tolist()}")
    return ids


def _inside(tokens: Collection[int], vocab_size: int) -> np.ndarray:
    """The tokens that exist: the others cannot be generated, so suppressing them is no error."""
    return np.array([token for token in tokens if 0 <= token < vocab_size], dtype=np.int64)


# -- Arithmetic. -inf and nan are ordinary values here, as they are in torch. ------------------

_quiet = np.errstate(over="ignore", invalid="ignore", divide="ignore")


def _count(mask: np.ndarray) -> int:
    return int(np.count_nonzero(mask))


def _cumulative(values: np.ndarray) -> np.ndarray:
    """cumsum as torch does it on a CPU: summed in float64, each sum rounded to float32."""
    return np.cumsum(values, dtype=np.float64).astype(np.float32)


def _kth_largest(values: np.ndarray, k: int) -> Any:
    """The k-th largest of `values [n]`; nan counts as the largest.

    Most of a vocabulary is ruled out before the partition: of its n // classes strided slices
    the element-wise maximum has `classes` values, and k of these are a k-th largest at least.
    That is several times faster than np.partition of it all.
    """
    classes = 16 * k
    if 4 * classes <= len(values):
        peaks = values[: len(values) // classes * classes].reshape(-1, classes).max(axis=0)
        values = values[~(values < np.partition(peaks, classes - k)[classes - k])]
    return np.partition(values, len(values) - k)[len(values) - k]


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """A mask of the `count` largest of `values [n]`; of equal ones the first, as argmax has it."""
    bound = _kth_largest(values, count)
    mask = np.asarray(values > bound)
    equal = np.flatnonzero(values == bound)
    mask[equal[: count - _count(mask)]] = True
    return mask


def _crossing(
    keys: np.ndarray, weights: np.ndarray, passes: Callable[..., Any], bound: float
) -> tuple[Any, int]:
    """Find where the sum of the weights, in ascending order of their keys, passes a bound.

    Only a small part is sorted: numbers that are not negative have the order of their bits, so
    the leading ones (exponent and a little more) make a histogram, and the sum over its bars
    tells in which bar the bound is passed.

    Args:
        keys: float32 [n], none negative. weights: float32 [n].
        passes: np.greater or np.greater_equal, of (sum, bound).

    Returns:
        The key whose weight makes the sum pass, and how many weights come before it; the
        largest key if the sum of all does not pass.
    """
    limit = np.float32(bound)
    bars = keys.view(np.int32) >> 20
    sums = np.cumsum(np.bincount(bars, weights=weights))
    short = _count(~passes(sums.astype(np.float32), limit))
    bar = min(short, int(bars.max()))
    inside = np.flatnonzero(bars == bar)
    inside = inside[np.argsort(keys[inside], kind="stable")]
    start = sums[bar - 1 : bar] if bar else np.zeros(1)
    steps = _cumulative(np.concatenate((start, weights[inside])))[1:]
    before = min(_count(~passes(steps, limit)), len(inside) - 1)
    return keys[inside[before]], _count(bars < bar) + before


# -- Guidance, biases and penalties ------------------------------------------------------------


@_quiet
def classifier_free_guidance(
    logits: np.ndarray, unconditional_logits: np.ndarray, scale: float
) -> np.ndarray:
    """Away from what would come without the prompt (Sanchez et al. 2023, arXiv 2306.17806)."""
    unconditional = log_softmax(unconditional_logits)
    return np.asarray(scale * (log_softmax(logits) - unconditional) + unconditional)


@dataclass(frozen=True)
class Biases:
    """Biases of n sequences that are equally long."""

    prefixes: np.ndarray  # int64 [n, length - 1]
    last: np.ndarray  # int64 [n]
    values: np.ndarray  # float32 [n]


def by_prefix_length(
    name: str, biases: dict[tuple[int, ...], float], vocab_size: int
) -> list[Biases]:
    """The biases of knob `name` in groups of equal length: a group is matched all at once."""
    groups = []
    for length in sorted({len(sequence) for sequence in biases}):
        chosen = [sequence for sequence in biases if len(sequence) == length]
        ids = _check_tokens(name, sum(chosen, ()), vocab_size).reshape(-1, length)
        values = np.array([biases[sequence] for sequence in chosen], dtype=np.float32)
        groups.append(Biases(ids[:, :-1], ids[:, -1], values))
    return groups


@_quiet
def sequence_bias(context: Context, logits: np.ndarray, groups: list[Biases]) -> np.ndarray:
    """Add each sequence's bias to its last token where the ids end with the tokens before it."""
    bias = np.zeros_like(logits)
    for row, ids in enumerate(context.ids):
        for group in groups:
            length = group.prefixes.shape[1]
            if length <= len(ids):
                match = (group.prefixes == ids[len(ids) - length :]).all(axis=1)
                # Of equal prefix and different as a whole: no token occurs twice here.
                bias[row, group.last[match]] += group.values[match]
    return np.asarray(logits + bias)


def repetition_penalty(context: Context, logits: np.ndarray, penalty: float) -> np.ndarray:
    """Tokens of prompt and text lose, once each (Keskar et al. 2019, arXiv 1909.05858)."""
    seen = [ids[pad:] for ids, pad in zip(context.ids, context.pads, strict=True)]
    return _penalize(logits, seen, penalty)


def encoder_repetition_penalty(context: Context, logits: np.ndarray, penalty: float) -> np.ndarray:
    """Tokens of the prompt become likelier (padding too, as in transformers)."""
    return _penalize(logits, context.prompts, 1 / penalty)


@_quiet
def _penalize(logits: np.ndarray, seen: Sequence[np.ndarray], penalty: float) -> np.ndarray:
    for row, tokens in enumerate(seen):
        tokens = tokens[tokens < logits.shape[1]]  # embeddings may outnumber the logits
        values = logits[row, tokens]
        logits[row, tokens] = np.where(values < 0, values * penalty, values / penalty)
    return logits


@_quiet
def frequency_penalty(
    context: Context, logits: np.ndarray, frequency: float, presence: float
) -> np.ndarray:
    """OpenAI's: `frequency` for each time a token was generated, `presence` if it was at all."""
    for row, generated in enumerate(context.generated):
        inside = generated[generated < logits.shape[1]]
        tokens, counts = np.unique(inside, return_counts=True)
        logits[row, tokens] -= (counts * frequency + presence).astype(np.float32)
    return logits


@_quiet
def logit_bias(logits: np.ndarray, tokens: np.ndarray, biases: np.ndarray) -> np.ndarray:
    """OpenAI's: biases [n] added to the logits of tokens [n], which are distinct."""
    logits[:, tokens] += biases
    return logits


# -- Bans and forced tokens ------------------------------------------------------------------


def no_repeat_ngram(context: Context, logits: np.ndarray, size: int) -> np.ndarray:
    """Ban what would complete an n-gram that is already there (Paulus et al. 2017, fairseq)."""
    return _ban_followers(logits, context.ids, context.ids, size)


def encoder_no_repeat_ngram(context: Context, logits: np.ndarray, size: int) -> np.ndarray:
    """Ban what would complete an n-gram of the prompt."""
    return _ban_followers(logits, context.prompts, context.ids, size)


def _ban_followers(
    logits: np.ndarray, texts: Sequence[np.ndarray], ids: Sequence[np.ndarray], size: int
) -> np.ndarray:
    """Ban the tokens that followed the last `size` - 1 ids wherever those occur in the text."""
    for row, text in enumerate(texts):
        starts = len(text) - size + 1
        if starts <= 0:
            continue
        matches = np.ones(starts, dtype=bool)
        for back in range(1, size):
            matches &= text[size - 1 - back : size - 1 - back + starts] == ids[row][-back]
        banned = text[size - 1 :][matches]
        logits[row, banned[banned < logits.shape[1]]] = -np.inf
    return logits


def _ban(logits: np.ndarray, rows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    logits[np.ix_(rows, tokens)] = -np.inf
    return logits


def _force(logits: np.ndarray, rows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    logits[rows] = -np.inf
    logits[np.ix_(rows, tokens)] = 0
    return logits


def min_length(context: Context, logits: np.ndarray, length: int, eos: np.ndarray) -> np.ndarray:
    """No end of text before `length` ids, prompt and padding included."""
    return _ban(logits, context.lengths < length, eos)


def min_new_tokens(context: Context, logits: np.ndarray, new: int, eos: np.ndarray) -> np.ndarray:
    """No end of text before `new` ids were generated."""
    return _ban(logits, context.lengths < context.prompt_lengths + new, eos)


def prefix_allowed_tokens(
    context: Context, logits: np.ndarray, allowed: PrefixAllowedTokens
) -> np.ndarray:
    """Only what `allowed` names for each row (De Cao et al. 2020, arXiv 2010.00904).

    Where every row of a prompt has nothing left, the allowed tokens come back as equals.
    """
    mask = np.full_like(logits, -np.inf)
    for row, (batch_id, ids) in enumerate(zip(context.batch_ids, context.ids, strict=True)):
        answer = allowed(int(batch_id), ids.copy())  # the row itself is not to be written to
        tokens = _answered(answer, logits.shape[1])
        if not len(tokens):
            raise ValueError(f"prefix_allowed_tokens_fn returned no token for batch id {batch_id}")
        mask[row, tokens] = 0
    with np.errstate(invalid="ignore"):  # inf - inf
        out = logits + mask
    alive = context.batch_ids[out.max(axis=1) != -np.inf]
    dead = ~np.isin(context.batch_ids, alive)
    out[dead] = mask[dead]
    return np.asarray(out)


def _answered(answer: Any, vocab_size: int) -> np.ndarray:
    """Token ids [n] as prefix_allowed_tokens_fn may give them; a mask [vocab] marks them."""
    what = "what prefix_allowed_tokens_fn returns"
    try:
        tokens = np.asarray(answer)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} must be a list of token ids, got {shown(answer)}") from error
    if tokens.shape == (vocab_size,) and tokens.dtype == np.bool_:
        return np.flatnonzero(tokens)
    if tokens.size and tokens.dtype.kind not in "iu":
        raise ValueError(f"{what} must be integers, got {shown(answer)}")
    return _check_tokens(what, tokens, vocab_size)


def forced_bos(context: Context, logits: np.ndarray, bos: np.ndarray) -> np.ndarray:
    """`bos` [1] alone where there is one id so far."""
    return _force(logits, context.lengths == 1, bos)


def forced_eos(context: Context, logits: np.ndarray, eos: np.ndarray) -> np.ndarray:
    """`eos` alone where one id is left."""
    return _force(logits, context.lengths == context.max_lengths - 1, eos)


def remove_invalid_values(logits: np.ndarray) -> np.ndarray:
    """nan becomes 0, and infinities the largest and smallest finite numbers."""
    return np.asarray(np.nan_to_num(logits))


@_quiet
def exponential_decay_length_penalty(
    context: Context, logits: np.ndarray, start: int, factor: float, eos: np.ndarray
) -> np.ndarray:
    """End of text grows likelier by `factor` with every id after the first `start` new ones."""
    late = context.lengths - context.prompt_lengths - start
    rows = np.flatnonzero(late > 0)
    if not len(rows):
        return logits
    growth = np.float64(factor) ** late[rows] - 1
    # A factor beyond float32 would make inf of a logit, and nan of a logit of 0.
    growth = np.minimum(growth, np.finfo(np.float32).max).astype(np.float32)
    ends = logits[np.ix_(rows, eos)]
    bonus = np.where(np.isfinite(ends), np.abs(ends) * growth[:, None], 0)
    logits[np.ix_(rows, eos)] = ends + bonus
    return logits


def suppress_tokens(context: Context, logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Never these."""
    return _ban(logits, np.ones(len(logits), dtype=bool), tokens)


def begin_suppress_tokens(
    context: Context, logits: np.ndarray, tokens: np.ndarray, after_bos: bool
) -> np.ndarray:
    """Not these first; after a forced bos, the token behind that is the first."""
    begin = context.prompt_lengths + (after_bos & (context.prompt_lengths <= 1))
    return _ban(logits, context.lengths == begin, tokens)


def user_processor(context: Context, logits: np.ndarray, function: UserProcessor) -> np.ndarray:
    """A caller's own callable; it gets copies, which it may write to and keep.

    It takes ids [rows, length]: rows that differ in length, as they do where tokens are guessed,
    are asked one length at a time, shortest first.

    Raises:
        ValueError: no float array of the logits' shape comes back.
    """
    lengths = np.unique(context.lengths)
    if len(lengths) == 1:
        return _asked(function, np.stack(context.ids), logits.copy())
    out = np.empty_like(logits)
    for length in lengths:
        rows = np.flatnonzero(context.lengths == length)
        ids = np.stack([context.ids[row] for row in rows.tolist()])
        out[rows] = _asked(function, ids, logits[rows])
    return out


@_quiet
def _asked(function: UserProcessor, ids: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Ask a caller's callable for the scores of logits [rows, vocab] after ids [rows, length]."""
    name = f"{CALLERS} {_name(function)}"
    shape = logits.shape
    scores = function(ids, logits)
    if not isinstance(scores, np.ndarray) or not np.issubdtype(scores.dtype, np.floating):
        kind = getattr(scores, "dtype", type(scores).__name__)
        raise ValueError(f"{name} must return a float array, got {kind}")
    if scores.shape != shape:
        raise ValueError(f"{name} must return shape {shape}, got {scores.shape}")
    return scores.astype(np.float32, copy=False)


# -- Warpers: the distribution before a draw ---------------------------------------


@_quiet
def temperature(logits: np.ndarray, temperature: float) -> np.ndarray:
    """Below 1 sharpens the distribution, above 1 flattens it (Ackley et al. 1985)."""
    return np.asarray(logits / temperature)


def top_k(logits: np.ndarray, k: int) -> np.ndarray:
    """Keep the k largest and all that equal the last of them (Fan et al. 2018, 1805.04833)."""
    if k >= logits.shape[1]:
        return logits
    out = np.full_like(logits, -np.inf)
    for row, values in enumerate(logits):
        kept = np.flatnonzero(~(values < _kth_largest(values, k)))
        out[row, kept] = values[kept]
    return out


def _cut(logits: np.ndarray, keep: Callable[..., np.ndarray], *knobs: Any) -> np.ndarray:
    """-inf where `keep(values, *knobs)` is false; it sees the finite values of one row.

    Entries at -inf have no probability: the rules come out the same without them, and after
    top_k there are few others. A row without a finite maximum has no distribution (softmax is
    nan) and stays as it is, as every comparison with nan is false in transformers.
    """
    out = np.full_like(logits, -np.inf)
    for row, values in enumerate(logits):
        if not np.isfinite(values.max()):
            out[row] = values
            continue
        alive = np.flatnonzero(values > -np.inf)
        kept = alive[keep(values[alive], *knobs)]
        out[row, kept] = values[kept]
    return out


def top_h(logits: np.ndarray, share: float) -> np.ndarray:
    """Keep the likeliest up to a share of the entropy (Potraghloo et al. 2025, 2509.02510)."""
    return _cut(logits, _in_top_h, share)


@_quiet
def _in_top_h(values: np.ndarray, share: float) -> np.ndarray:
    top = np.flatnonzero(_largest(values, min(100, len(values))))  # 100: the paper's own cap
    top = top[np.argsort(-values[top], kind="stable")]
    log_probabilities = log_softmax(values[top])
    probabilities = softmax(log_probabilities)
    entropy = -np.nansum(log_probabilities * probabilities)
    # An underflowed probability makes its term nan, and with it all later sums: all are cut.
    terms = -probabilities * np.log(probabilities)
    inside = _cumulative(terms) <= np.float32(share) * entropy
    inside[0] = True
    mask = np.zeros(len(values), dtype=bool)
    mask[top[inside]] = True
    return mask


def top_p(logits: np.ndarray, mass: float, keep: int = 1) -> np.ndarray:
    """Nucleus sampling: the likeliest tokens of that mass (Holtzman et al. 2019, 1904.09751)."""
    return _cut(logits, _in_top_p, mass, keep)


def _in_top_p(values: np.ndarray, mass: float, keep: int) -> np.ndarray:
    """Drop the unlikeliest while their sum is at most 1 - mass."""
    probabilities = softmax(values)
    border, dropped = _crossing(probabilities, probabilities, np.greater, 1 - mass)
    if len(values) - dropped < keep:
        return _largest(values, min(keep, len(values)))
    mask = np.asarray(probabilities > border)
    equal = np.flatnonzero(probabilities == border)
    mask[equal[_largest(values[equal], len(values) - dropped - _count(mask))]] = True
    return mask


def min_p(logits: np.ndarray, share: float, keep: int = 1) -> np.ndarray:
    """Keep what has that share of the largest probability (Nguyen et al. 2024, 2407.01082)."""
    return _cut(logits, _in_min_p, share, keep)


def _in_min_p(values: np.ndarray, share: float, keep: int) -> np.ndarray:
    probabilities = softmax(values)
    mask = probabilities >= np.float32(share) * probabilities.max()
    if _count(mask) < keep:
        mask |= _largest(values, min(keep, len(values)))
    return np.asarray(mask)


def typical_p(logits: np.ndarray, mass: float, keep: int = 1) -> np.ndarray:
    """Keep the tokens whose surprise is nearest the entropy (Meister et al. 2022, 2202.00666)."""
    return _cut(logits, _in_typical_p, mass, keep)


@_quiet
def _in_typical_p(values: np.ndarray, mass: float, keep: int) -> np.ndarray:
    log_probabilities = log_softmax(values)
    probabilities = np.exp(log_probabilities)
    entropy = -np.nansum(log_probabilities * probabilities)
    distance = np.abs(-log_probabilities - entropy)
    border, _ = _crossing(distance, probabilities, np.greater_equal, mass)
    mask = np.asarray(distance <= border)
    if _count(mask) < keep:
        mask |= _largest(-distance, min(keep, len(values)))
    return mask


def epsilon_cutoff(logits: np.ndarray, epsilon: float, keep: int = 1) -> np.ndarray:
    """Drop tokens less likely than epsilon (Hewitt et al. 2022, arXiv 2210.15191)."""
    return _cut(logits, _at_least, epsilon, keep)


def _at_least(values: np.ndarray, bound: float, keep: int) -> np.ndarray:
    """Keep that probability and above, and the `keep` largest with all equal to their last."""
    mask = softmax(values) >= np.float32(bound)
    if _count(mask) < keep:
        mask |= values >= _kth_largest(values, min(keep, len(values)))
    return np.asarray(mask)


def eta_cutoff(logits: np.ndarray, epsilon: float, keep: int = 1) -> np.ndarray:
    """Drop tokens below min(epsilon, sqrt(epsilon) exp(-entropy)) (Hewitt et al. 2022)."""
    return _cut(logits, _in_eta, epsilon, keep)


@_quiet
def _in_eta(values: np.ndarray, epsilon: float, keep: int) -> np.ndarray:
    log_probabilities = log_softmax(values)
    entropy = -np.nansum(log_probabilities * np.exp(log_probabilities))
    eta = min(np.float32(epsilon), np.sqrt(np.float32(epsilon)) * np.exp(-entropy))
    return _at_least(values, float(eta), keep)
