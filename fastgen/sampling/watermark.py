"""The two watermarks that transformers writes into generated text.

Their pseudo-random choices are those of torch's CPU generator (MT19937), so that transformers'
own detectors find the marks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, partial
from typing import Any

import numpy as np

from fastgen.inputs import validators

# (ids of each row, prompt_lengths [rows], logits [rows, vocab]) -> logits
Mark = Callable[[Sequence[np.ndarray], np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class GreenList:
    """The settings of transformers' `WatermarkingConfig`."""

    greenlist_ratio: float = 0.25
    bias: float = 2.0
    hashing_key: int = 15485863
    seeding_scheme: str = "lefthash"
    context_width: int = 1

    def __post_init__(self) -> None:
        _of_kind(self, validators.number, "greenlist_ratio", "bias")
        _of_kind(self, validators.integer, "hashing_key", "context_width")
        _check("greenlist_ratio", self.greenlist_ratio, "between 0 and 1", lambda x: 0 < x < 1)
        schemes = ("lefthash", "selfhash")
        _check("seeding_scheme", self.seeding_scheme, f"one of {schemes}", lambda x: x in schemes)
        _check("context_width", self.context_width, "1 or more", lambda x: x >= 1)

    @cached_property
    def hash_table(self) -> np.ndarray:
        """A permutation of 0..1,000,002 (int64): the hash of a token id in selfhash."""
        return randperm(1_000_003, 1_000_003, self.hashing_key)


@dataclass(frozen=True, kw_only=True)
class SynthID:
    """The settings of transformers' `SynthIDTextWatermarkingConfig`."""

    ngram_len: int
    keys: Sequence[int]
    context_history_size: int = 1024
    sampling_table_seed: int = 0
    sampling_table_size: int = 2**16
    skip_first_ngram_calls: bool = False
    debug_mode: bool = False

    def __post_init__(self) -> None:
        sizes = ("ngram_len", "context_history_size", "sampling_table_seed", "sampling_table_size")
        _of_kind(self, validators.integer, *sizes)
        _of_kind(self, validators.integers, "keys")
        _of_kind(self, validators.flag, "skip_first_ngram_calls", "debug_mode")
        # Each id of an n-gram, and each key, is a round of work for every token.
        _check("ngram_len", self.ngram_len, "between 1 and 1000", lambda x: 1 <= x <= 1000)
        _check("keys", self.keys, "1 to 1000 integers", lambda x: 1 <= len(x) <= 1000)
        _check("context_history_size", self.context_history_size, "1 or more", lambda x: x >= 1)
        size_holds = ("sampling_table_size", self.sampling_table_size, "between 1 and 2**24")
        _check(*size_holds, lambda x: 1 <= x <= 2**24)

    @cached_property
    def table(self) -> np.ndarray:
        """int64 [sampling_table_size] of 0 and 1, as torch.randint(0, 2) draws them."""
        return random_u32(self.sampling_table_size, self.sampling_table_seed) % 2


def from_config(config: Any, vocab_size: int) -> Mark:
    """The watermark that a `watermarking_config` asks for: a dict, or an object with to_dict().

    Raises:
        ValueError: a setting that neither watermark has, or a bad value.
    """
    if not isinstance(config, Mapping) and not hasattr(config, "to_dict"):
        raise ValueError(
            f"watermarking_config must be a dict or have to_dict(), got {validators.shown(config)}"
        )
    settings = config if isinstance(config, Mapping) else config.to_dict()
    kind: type[GreenList | SynthID] = GreenList
    if "keys" in settings or "ngram_len" in settings:
        kind = SynthID
    known = {setting.name for setting in fields(kind)}
    settings = {str(name): value for name, value in settings.items()}
    needed = {"ngram_len", "keys"} if kind is SynthID else set()
    if not needed <= set(settings) <= known:
        raise ValueError(
            f"watermarking_config must have its settings among {sorted(known)}"
            + (f" with {sorted(needed)}" if needed else "")
            + f", got {validators.shown(sorted(settings))}"
        )
    made = kind(**settings)
    if isinstance(made, SynthID):
        return partial(synthid, made)
    return partial(green_list, made, vocab_size)


def _of_kind(mark: Any, kind: Callable[[str, Any], Any], *names: str) -> None:
    """Check some settings by their kind of value, and make them plain Python."""
    for name in names:
        value = validators.plain(getattr(mark, name))
        object.__setattr__(mark, name, kind(f"watermarking_config: {name}", value))


def _check(name: str, value: Any, rule: str, holds: Callable[[Any], bool]) -> None:
    if not holds(value):
        raise ValueError(
            f"watermarking_config: {name} must be {rule}, got {validators.shown(value)}"
        )


# -- torch's generator --------------------------------------------------------------------------


def random_u32(count: int, seed: int) -> np.ndarray:
    """The first numbers (as int64) of a torch.Generator after manual_seed(seed)."""
    generator = np.random.MT19937()
    generator._legacy_seeding(seed & 0xFFFFFFFF)
    return np.asarray(generator.random_raw(count)).astype(np.int64)


def randperm(n: int, count: int, seed: int) -> np.ndarray:
    """The first `count` entries of torch.randperm(n), int64, for a generator with that seed.

    torch swaps entry i with entry i + random % (n - i), for i = 0, 1, ... Here all swaps are
    done at once. Entry i of the result is what lay at place `target[i]` before swap i: what the
    last earlier swap with that target put there, or else the number of the place itself. What
    swap s puts there is what lay at place s before it, which an earlier swap may have put.
    """
    places = np.arange(count)
    target = places + random_u32(count, seed) % (n - places)
    swapped = np.flatnonzero(target != places)
    into = np.arange(n)  # for a place: the last swap that put something there, else itself
    into[target[swapped]] = swapped
    origin = into[:count]
    while not np.array_equal(origin, further := origin[origin]):
        origin = further
    order = np.argsort(target, kind="stable")
    again = np.flatnonzero(target[order][1:] == target[order][:-1])
    result = target.copy()
    result[order[again + 1]] = origin[order[again]]
    return result


# -- Green lists --------------------------------------------------------------------------------


def green_list(
    mark: GreenList,
    vocab_size: int,
    ids: Sequence[np.ndarray],
    prompt_lengths: np.ndarray,
    logits: np.ndarray,
) -> np.ndarray:
    """A bias for the tokens that a hash of the last ids calls green (Kirchenbauer et al. 2023,
    arXiv 2306.04634). A row with fewer ids than the hash needs is left alone.
    """
    green_of = _selfhash if mark.seeding_scheme == "selfhash" else _lefthash
    out = logits.copy()
    for row, history in enumerate(ids):
        if len(history) >= mark.context_width:
            green = green_of(mark, vocab_size, history, logits[row])
            out[row, green] += np.float32(mark.bias)
    return out


def _greens(mark: GreenList, vocab_size: int, seed: int) -> np.ndarray:
    return randperm(vocab_size, int(vocab_size * mark.greenlist_ratio), seed % (2**64 - 1))


def _lefthash(
    mark: GreenList, vocab_size: int, history: np.ndarray, logits: np.ndarray
) -> np.ndarray:
    """The last id alone decides (algorithm 2 of the paper)."""
    return _greens(mark, vocab_size, mark.hashing_key * int(history[-1]))


def _selfhash(
    mark: GreenList, vocab_size: int, history: np.ndarray, logits: np.ndarray
) -> np.ndarray:
    """Each candidate decides together with the last ids (algorithm 3): the 40 likeliest try."""
    candidates = np.argsort(-logits, kind="stable")[:40]
    table = mark.hash_table
    before = table[history[len(history) - (mark.context_width - 1) :] % len(table)] + 1
    own = table[candidates % len(table)] + 1
    hashes = np.concatenate((np.tile(before, (len(own), 1)), own[:, None]), axis=1)
    seeds = (np.int64(mark.hashing_key) * hashes * own[:, None]).min(axis=1)  # wraps, as in torch
    green = [
        token in _greens(mark, vocab_size, int(seed))
        for token, seed in zip(candidates, seeds, strict=True)
    ]
    return candidates[green]


# -- SynthID ------------------------------------------------------------------------------------


def synthid(
    mark: SynthID, ids: Sequence[np.ndarray], prompt_lengths: np.ndarray, logits: np.ndarray
) -> np.ndarray:
    """A tournament between tokens, its rounds decided by a hash of the last generated ids
    (Dathathri et al. 2024, Nature 634). Where these repeat, there is no mark.

    transformers keeps the contexts it has seen as state; they follow from the ids of the row,
    so nothing is kept here. The results are equal but for beams, where transformers mixes
    the states of rows that change places.
    """
    out = np.ones_like(logits) if mark.debug_mode else logits.copy()
    for row, (history, prompt) in enumerate(zip(ids, prompt_lengths, strict=True)):
        context = _fresh_context(mark, history[prompt:])
        if context is not None:
            out[row] = _tournament(mark, context, out[row])
    return out


def _fresh_context(mark: SynthID, generated: np.ndarray) -> np.ndarray | None:
    """The hash [1] int64 of the last ids; None if it is skipped or was seen before."""
    skipped = mark.ngram_len - 1 if mark.skip_first_ngram_calls else 0
    if len(generated) < skipped:
        return None
    width = mark.ngram_len - 1
    padded = np.concatenate((np.zeros(width, np.int64), generated.astype(np.int64)))
    first = max(len(generated) - mark.context_history_size, skipped)
    count = len(generated) + 1 - first
    hashes = np.ones(count, np.int64)
    for offset in range(first, first + width):
        hashes = _accumulate(hashes, padded[offset : offset + count])
    seen, last = hashes[:-1], hashes[-1:]
    # The history of transformers starts filled with zeros: a hash of 0 counts as seen.
    repeated = bool((seen == last).any()) or (last[0] == 0 and count <= mark.context_history_size)
    return None if repeated else last


def _accumulate(hashes: np.ndarray, data: Any) -> np.ndarray:
    """One step of a linear congruential generator (musl's numbers), wrapping in int64."""
    return np.asarray((hashes + data) * np.int64(6364136223846793005) + 1)


def _tournament(mark: SynthID, context: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """The marked log-probabilities of one row [vocab]; those of 0 become the smallest float."""
    lowest = np.finfo(np.float32).min
    out = np.full_like(logits, lowest)
    with np.errstate(over="ignore", invalid="ignore"):
        weights = np.exp(logits - logits.max())
        all_probabilities = weights / weights.sum()
    alive = np.flatnonzero(all_probabilities > 0)
    probabilities = all_probabilities[alive]
    hashes = _accumulate(context, alive)
    for key in mark.keys:
        g = mark.table[_accumulate(hashes, np.int64(key)) % mark.sampling_table_size]
        g = g.astype(np.float32)
        probabilities = probabilities * (1 + g - (g * probabilities).sum())
    with np.errstate(divide="ignore", invalid="ignore"):
        marked = np.log(probabilities)
    out[alive] = np.where(np.isfinite(marked), marked, lowest)
    return out
