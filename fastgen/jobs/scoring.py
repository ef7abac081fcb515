"""Rows to numbers: how likely their texts are, read together by length and by what is before."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastgen.engine.prefix_cache import PrefixCache
from fastgen.generator import CausalLM
from fastgen.inputs import validators
from fastgen.jobs.row import Done, InputRow, KeptFields, Outcome
from fastgen.jobs.window import Window

TEXTS = ("text", "prompt", "ids", "input_ids")  # a line of text comes as a prompt
FIELDS = frozenset({*TEXTS, "prefix", "options"})
OF_DECISION = ("choice", "choice_index", "probabilities", "option_logprobs")
OUTPUT = frozenset(
    {"file", "row", "logprob", "tokens", "perplexity", "logprobs", "error", *OF_DECISION}
)
WINDOW = Window(tokens=2**16, rows=1024)
TOGETHER = 16  # rows between two that are written down


@dataclass(frozen=True)
class ScoreRequest:
    """A row to be scored: its ids, those before it, if any, and the fields that are kept.

    Attributes:
        options: of which one may follow the ids, as they were given, and as ids; None where it is
            the ids that are scored.
    """

    row: InputRow
    kept: Mapping[str, Any]
    ids: list[int]
    prefix: tuple[int, ...] | None
    options: tuple[list[Any], list[list[int]]] | None = None


class ScoringWork:
    """The work of `fastgen score`.

    Args:
        keep: fields to give back (see `KeptFields`).
        each: whether every token's log-probability is given too.

    Raises:
        ValueError: a field to keep has the name of one of the output's.
    """

    def __init__(self, model: CausalLM, keep: Collection[str] = (), each: bool = False) -> None:
        self.model, self.each = model, each
        self._kept = KeptFields(keep, FIELDS, OUTPUT)
        self.cache = PrefixCache()

    def run(self, rows: Iterable[InputRow]) -> Iterator[Done]:
        """The numbers of each row, window by window: those with one prefix together, by length."""
        left = iter(rows)
        while True:
            bad, good = WINDOW.read(left, self._read, lambda request: len(request.ids))
            if not bad and not good:
                return
            yield from bad
            for _, request in good:
                if request.options is not None:
                    yield Done(request.row, self._decided(request, *request.options))
            given = [request for _, request in good if request.options is None]
            given.sort(
                key=lambda request: (
                    request.prefix or (),
                    request.prefix is None,
                    -len(request.ids),
                )
            )
            while given:
                some = [
                    request for request in given[:TOGETHER] if request.prefix == given[0].prefix
                ]
                del given[: len(some)]
                yield from self._scored(some)

    def check(self, names: Collection[str]) -> None:
        """Raise a ValueError for a name that means nothing and that nobody asked to keep."""
        for name in names:
            if name not in FIELDS and not self.is_kept(name):
                known = ", ".join(sorted(FIELDS))
                raise ValueError(f"{name} is none of {known} (fields of your own: --keep {name})")

    def is_kept(self, name: str) -> bool:
        """True where the output has this field of the input."""
        return name in self._kept

    def _read(self, row: InputRow) -> ScoreRequest | Outcome:
        kept: Mapping[str, Any] = row.location
        try:
            fields = row.fields()
            kept = self._kept.of(row, fields)
            return self._request(row, fields, kept)
        except ValueError as error:
            return Outcome.failed(error, kept)

    def _request(
        self, row: InputRow, fields: Mapping[str, Any], kept: Mapping[str, Any]
    ) -> ScoreRequest:
        self.check(fields)
        named = [name for name in TEXTS if fields.get(name) is not None]
        if len(named) != 1:
            given = " and ".join(named) or "none"
            raise ValueError(f"needs one of {', '.join(TEXTS)}; got {given}")
        prefix = fields.get("prefix")
        before = None if prefix is None else tuple(self._ids("prefix", prefix, True))
        ids = self._ids(named[0], fields[named[0]], prefix is None)
        options = fields.get("options")
        if options is None:
            return ScoreRequest(row, kept, ids, before)
        if prefix is not None:
            raise ValueError("options follow the text: a prefix before it is part of the text")
        if not isinstance(options, list):
            raise ValueError(f"options must be a list, got {options!r}")
        rows = [self._ids("an option", one, False) for one in options]
        return ScoreRequest(row, kept, ids, None, (options, self.model.options(rows)))

    def _ids(self, name: str, value: Any, special: bool) -> list[int]:
        """A text or a list as ids, as `CausalLM.score` would read it."""
        if isinstance(value, list):
            ids = [validators.integer(name, item) for item in value]
        else:
            text = validators.text(name, value)
            ids = self.model.tokenizer.encode(text, add_special_tokens=special)
        if not ids:
            raise ValueError(f"{name} is empty: it needs at least one token")
        return ids

    def _decided(self, request: ScoreRequest, options: list[Any], rows: list[list[int]]) -> Outcome:
        """The option that follows a row."""
        try:
            found = self.model.choose(request.ids, rows, prefix_cache=self.cache)
        except ValueError as error:
            return Outcome.failed(error, request.kept)
        values = (options[found.index], found.index, found.probabilities, found.logprobs)
        made = {**request.kept, **dict(zip(OF_DECISION, values, strict=True))}
        return Outcome(made, len(request.ids) + sum(map(len, rows)))

    def _scored(self, some: list[ScoreRequest]) -> Iterator[Done]:
        """Rows with one prefix. One that cannot be is bad, and the others are not."""
        prefix, cache = some[0].prefix, None if some[0].prefix is None else self.cache
        rows, before = [request.ids for request in some], None if prefix is None else [list(prefix)]
        try:
            scores = self.model.score(rows, prefix=before, prefix_cache=cache)
        except ValueError as error:
            if len(some) > 1:
                for request in some:
                    yield from self._scored([request])
            else:
                yield Done(some[0].row, Outcome.failed(error, some[0].kept))
            return
        for request, logprobs in zip(some, scores, strict=True):
            yield Done(request.row, Outcome(self._written(request, logprobs), len(request.ids)))

    def _written(self, request: ScoreRequest, logprobs: NDArray[np.float32]) -> dict[str, Any]:
        known = logprobs[~np.isnan(logprobs)].astype(np.float64)
        return {
            **request.kept,
            "logprob": float(known.sum()),
            "tokens": len(request.ids),
            "perplexity": float(np.exp(-known.mean())) if len(known) else None,
            **({"logprobs": [float(value) for value in logprobs]} if self.each else {}),
        }
