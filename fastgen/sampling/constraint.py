"""Text of a given form: JSON of a schema, what a regular expression matches, a grammar's text.

llguidance (extra `structured`; github.com/guidance-ai/llguidance) says which tokens may follow a
text: it reads the grammar with Earley's parser and the bytes of all tokens as a trie. Here this is
a processor that rules out the others. Where bytes are certain, such as the name of a property that
has to come, it leaves one token only: the one that the tokenizer itself would write.

What may follow depends on what was generated and on nothing else, so a row may be asked at any
length, in any order: for beams that fork, guesses that do not hold, rows that leave.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import threading
import weakref
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastgen.inputs.params import FORMS
from fastgen.sampling.trial import Exceeded, Limits, Trial
from fastgen.sampling.trial_process import Spellings
from fastgen.system import extras
from fastgen.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from fastgen.inputs.params import Params
    from fastgen.sampling.processors import Context

# JSON in one line, as Python's json.dumps writes it: what models have read most, and all that has
# to come is certain. A schema may say otherwise: {"x-guidance": {"whitespace_flexible": true}}.
JSON = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

# llguidance follows a rule that is another rule by recursion: with a few thousand of them in a row
# the process would run out of stack. And its time grows with the square of a schema's properties.
MOST_RULES, MOST_REFERENCES, MOST_CHARACTERS = 1000, 500, 2**18

# What a step of llguidance's may take, and the automaton that grows along a text.
# A state of that takes about a kilobyte.
LIMITS = {"verbose_errors": False, "max_lexer_states": 100_000}

TRIAL = Trial()

REASON = 300  # characters of an error of llguidance that are shown
SPARE = 16  # states that are kept besides a few for each row
MASKS = 16  # different sets of tokens that are kept: within a text many are the same


def asked(params: Params) -> tuple[str, str] | None:
    """The knob that asks for a form and its value, if one does."""
    forms = [(name, getattr(params, name)) for name in FORMS]
    return next(((name, text) for name, text in forms if text is not None), None)


class Allowed:
    """The tokens that may come next.

    Attributes:
        count: how many there are.
        only: the one that there is; None where there are others.
        complete: whether the text is whole and nothing but an end of text may follow.
    """

    def __init__(self, allowed: NDArray[np.bool_], complete: bool) -> None:
        self.count, self.complete = int(np.count_nonzero(allowed)), complete
        self._few = 2 * self.count <= len(allowed)  # what is handled is the fewer: these or others
        self._tokens = np.flatnonzero(allowed if self._few else ~allowed)
        self.only = int(self._tokens[0]) if self.count == 1 else None

    @classmethod
    def one(cls, token: int, vocab_size: int) -> Allowed:
        """A token that must come, and is not the end."""
        allowed = np.zeros(vocab_size, np.bool_)
        allowed[token] = True
        return cls(allowed, complete=False)

    def apply(self, scores: NDArray[np.float32]) -> None:
        """Set the scores [vocab] of all others to -inf."""
        if self._few:
            kept = scores[self._tokens]
            scores.fill(-np.inf)
            scores[self._tokens] = kept
        else:
            scores[self._tokens] = -np.inf


@dataclass(frozen=True)
class State:
    """A text so far.

    Attributes:
        matcher: llguidance's, after it.
        allowed: what may follow.
        ahead: the tokens that must follow, as far as they are known; none where there is a choice.
            Whoever follows them need not ask llguidance again, which looks at all that has to come.
    """

    matcher: Any
    allowed: Allowed
    ahead: tuple[int, ...] = ()


_NOTHING = Allowed(np.zeros(0, np.bool_), complete=False)


class Constraint:
    """The form of the generated text of each row of a call, as a processor with states of texts.

    Args:
        name: the knob.
        compiled: the grammar.
        vocab_size: the width of the logits.
        eos: the tokens that end a text.
        rows: rows or beams of the call: a few states are kept for each.

    Attributes:
        name: as above.
        notes: what of the grammar a text is not held to.
        ends: whether there is a token that says that the text ends.

    Raises:
        ValueError: the tokens that there are cannot write such a text.
    """

    def __init__(
        self, name: str, compiled: Compiled, vocab_size: int, eos: Collection[int], rows: int
    ) -> None:
        self.name, self.notes = name, compiled.notes
        self._compiled, self._vocab_size = compiled, vocab_size
        self._eos = np.array([token for token in eos if 0 <= token < vocab_size], np.int64)
        self.ends = len(self._eos) > 0
        self._most = 4 * rows + SPARE
        self._states: OrderedDict[bytes, State | None] = OrderedDict()
        self._masks: OrderedDict[bytes, Allowed] = OrderedDict()
        try:
            first = self._state(np.empty(0, np.int64))
        except ValueError as error:
            raise ValueError(f"no text of this {name} can be written: {error}") from error
        if first is None or not first.allowed.count:
            raise ValueError(f"no text of this {name} can be written with the model's tokens")

    def __call__(self, context: Context, scores: NDArray[np.float32]) -> NDArray[np.float32]:
        """Rule out, in scores [rows, vocab], the tokens that may not follow.

        Of a row that is no such text, or has ended, nothing is left. Only beams can be like that:
        those that fill a search that has fewer texts to look at than beams.
        """
        for row, generated in enumerate(context.generated):
            state = self._state(generated)
            if state is None:
                scores[row] = -np.inf
            else:
                state.allowed.apply(scores[row])
        return scores

    def complete(self, generated: NDArray[np.int64]) -> bool:
        """True where nothing but an end of text may follow these tokens [new]."""
        state = self._state(generated)
        return state is not None and state.allowed.complete

    def certain(self, generated: NDArray[np.int64], most: int) -> list[int]:
        """The tokens, `most` at most, that must follow these [new], one after the other."""
        tokens: list[int] = []
        while len(tokens) < most:
            state = self._state(np.append(generated, tokens).astype(np.int64))
            if state is None or not state.ahead:
                break
            tokens += state.ahead[: most - len(tokens)]
            if tokens[-1] in self._eos:
                break
        return tokens

    def _state(self, generated: NDArray[np.int64]) -> State | None:
        """The state after a text, int64 [new]; None for one that is not of this form."""
        key = np.ascontiguousarray(generated, np.int64).tobytes()
        if key in self._states:
            self._states.move_to_end(key)
            return self._states[key]
        state = self._states[key] = self._advanced(key)
        if len(self._states) > self._most:
            self._states.popitem(last=False)
        return state

    def _advanced(self, key: bytes) -> State | None:
        """The state of a text, from that of the longest known beginning of it."""
        before = max(filter(key.startswith, self._states), key=len, default=None)
        known = State(self._compiled.start, _NOTHING) if before is None else self._states[before]
        if known is None:
            return None
        matcher = known.matcher.deep_copy()
        rest = tuple(np.frombuffer(key[len(before or b"") :], np.int64).tolist())
        taken = matcher.try_consume_tokens(list(rest))
        self._check(matcher)
        if taken < len(rest):
            return None
        ahead = known.ahead[len(rest) :]
        if ahead and known.ahead[: len(rest)] == rest:
            return State(matcher, Allowed.one(ahead[0], self._vocab_size), ahead)
        mask = matcher.compute_bitmask()
        self._check(matcher)
        allowed = self._allowed(mask)
        return State(matcher, allowed, self._ahead(matcher, allowed))

    def _ahead(self, matcher: Any, allowed: Allowed) -> tuple[int, ...]:
        """The tokens that must follow, if one must."""
        if allowed.only is None:
            return ()
        tokens = itertools.takewhile(self._may_come, matcher.compute_ff_tokens())
        self._check(matcher)
        ahead = tuple(tokens)
        return ahead if ahead[:1] == (allowed.only,) else (allowed.only,)

    def _may_come(self, token: int) -> bool:
        """True for a token that the model has and that ends no text."""
        return token < self._vocab_size and token not in self._eos

    def _allowed(self, mask: bytes) -> Allowed:
        """The tokens that llguidance allows, a bit each, and the ends of text if it allows one."""
        if mask in self._masks:
            self._masks.move_to_end(mask)
            return self._masks[mask]
        bits = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")
        allowed = bits[: self._vocab_size].view(np.bool_)
        may_end = bool(bits[self._vocab_size])
        allowed[self._eos] = False
        complete = may_end and not allowed.any()
        allowed[self._eos] = may_end
        result = self._masks[mask] = Allowed(allowed, complete)
        if len(self._masks) > MASKS:
            self._masks.popitem(last=False)
        return result

    def _check(self, matcher: Any) -> None:
        if matcher.is_error():
            self._compiled.spent = True
            raise ValueError(f"{self.name} cannot be followed: {_reason(matcher.get_error())}")


class GuidanceTokenizer(Spellings):
    """A tokenizer as llguidance wants one: the bytes of all tokens, and a call that writes a text.

    A token's bytes are those that it adds to a text. Ids without a token stand for none. One more
    id, behind them all, is the end of text, whatever a call's `eos_token_id` are. And ids behind
    that stand for the bytes that no token has, so that llguidance can write what has to come: a
    model cannot take them.

    Args:
        tokenizer: what writes.
        vocab_size: ids that there are; of a model, the width of its logits.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        special = {i for i in tokenizer.special_ids() if i < vocab_size}
        tokens = [
            (tokenizer.token(i) or "").encode() if i in special else tokenizer.spelling(i) or b""
            for i in range(vocab_size)
        ]
        texts = {one for i, one in enumerate(tokens) if i not in special}
        tokens.append(b"end of text")
        tokens += [bytes([b]) for b in range(256) if bytes([b]) not in texts]
        super().__init__(tokens, [*sorted(special), vocab_size])
        self._encode, self._special = tokenizer.backend.encode, special

    def written(self, wanted: bytes) -> list[int]:
        """The tokens that the tokenizer writes for a text within another.

        What it cannot write without a space or the like in front is written with the longest token
        first.
        """
        for before in ("", "\n", "a"):
            ids = self._encode(before + wanted.decode(), add_special_tokens=False).ids
            if self._special.isdisjoint(ids) and max(ids, default=0) < self.eos_token_id:
                tail = self._tail(ids, wanted)
                if tail is not None:
                    return tail
        return super().written(wanted)

    def _tail(self, ids: list[int], wanted: bytes) -> list[int] | None:
        """The last of these tokens that write `wanted`, if some do."""
        at, length = len(ids), 0
        while at and length < len(wanted):
            at -= 1
            length += len(self.tokens[ids[at]])
        return ids[at:] if b"".join(self.tokens[i] for i in ids[at:]) == wanted else None


@dataclass
class Compiled:
    """A grammar that is ready.

    Attributes:
        start: llguidance's matcher of no text yet; it is only to be copied. Copies share one
            automaton, which grows along their texts.
        notes: what of the grammar a text is not held to.
        bytes: how much it took to compile it.
        spent: whether a text of it came to a limit: the automaton can be as large as it may get,
            so that the next call has to have another.
    """

    start: Any
    notes: tuple[str, ...]
    bytes: int
    spent: bool = False


class Vocabulary:
    """A tokenizer as llguidance knows it, and the grammars that were compiled for it.

    Args:
        tokenizer: whose tokens write the texts.
        vocab_size: the width of the logits.
        settings: of llguidance's `LLParserLimits`.
    """

    KEPT = 16  # compiled grammars
    KEPT_BYTES = 2**29  # that they took
    REFUSED = 1024  # grammars that came to a limit, which are not tried again

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, settings: Mapping[str, Any] = LIMITS
    ) -> None:
        llguidance = _llguidance()
        self._writer = GuidanceTokenizer(tokenizer, vocab_size)
        self._settings = settings
        TRIAL.ready(self._writer)
        self._seen = llguidance.LLTokenizer(self._writer)
        self._limits = llguidance.LLParserLimits(**settings)
        self._lock = threading.Lock()
        self._compiled: OrderedDict[tuple[str, str], Compiled] = OrderedDict()
        self._refused: OrderedDict[tuple[Limits, bytes], str] = OrderedDict()

    def has(self, name: str, text: str) -> bool:
        """True where this grammar has been compiled."""
        return self._cached(name, text) is not None

    def compiled(self, name: str, text: str, limits: Limits) -> Compiled:
        """A grammar, which is tried and compiled once.

        Args:
            limits: of the trial.

        Raises:
            ValueError: `text` is not what its knob `name` wants; or it says something that
                llguidance has no answer to; or it takes more than it may.
        """
        grammar = self._cached(name, text)
        if grammar is None:
            with self._lock:
                try:
                    grammar = self._cached(name, text) or self._new(name, text, limits)
                except ValueError as error:
                    raise ValueError(f"{name} cannot be used: {_reason(str(error))}") from error
                self._keep((name, text), grammar)
        return grammar

    def _cached(self, name: str, text: str) -> Compiled | None:
        grammar = self._compiled.get((name, text))
        return None if grammar is None or grammar.spent else grammar

    def _keep(self, key: tuple[str, str], grammar: Compiled) -> None:
        kept = self._compiled
        kept[key] = grammar
        while len(kept) > self.KEPT or sum(each.bytes for each in kept.values()) > self.KEPT_BYTES:
            if len(kept) == 1:
                break
            kept.popitem(last=False)

    def _new(self, name: str, text: str, limits: Limits) -> Compiled:
        """Try a grammar in another process, and compile it in this one."""
        written, notes = _written(name, text)
        key = limits, hashlib.sha256(written.encode()).digest()
        if key in self._refused:
            raise ValueError(self._refused[key])
        try:
            verdict = TRIAL.run(self._writer, written, limits, self._settings)
        except Exceeded as error:
            self._refused[key] = str(error)
            if len(self._refused) > self.REFUSED:
                self._refused.popitem(last=False)
            raise
        matcher = _llguidance().LLMatcher
        start = None
        wrong = verdict.get("error")
        if not wrong:
            start = matcher(self._seen, written, log_level=0, limits=self._limits)
            wrong = start.get_error()
        if wrong:
            raise ValueError(wrong)
        return Compiled(start, tuple(notes), max(verdict["grown"], 2**20))


def _written(name: str, text: str) -> tuple[str, list[str]]:
    """A grammar as llguidance takes it, and what had to be left out of it.

    Raises:
        ValueError: it is none, or asks for what no text can be held to.
    """
    from fastgen.sampling import schema  # late: a process starts sooner without

    _check_size(name, text)
    matcher = _llguidance().LLMatcher
    if name == "regex":
        return matcher.grammar_from_regex(text), []
    if name == "grammar":
        prepared, notes = schema.within(text)
        return matcher.grammar_from_lark(prepared), notes
    prepared, notes = schema.prepared(text)
    return matcher.grammar_from_json_schema(prepared, defaults=JSON), notes


class Vocabularies:
    """Of one tokenizer, by the width of the logits, and what its new grammars may take."""

    def __init__(self) -> None:
        self.limits = Limits()
        self._lock = threading.Lock()
        self._made: dict[int, Vocabulary] = {}

    def of(self, tokenizer: Tokenizer, vocab_size: int) -> Vocabulary:
        with self._lock:
            if vocab_size not in self._made:
                self._made[vocab_size] = Vocabulary(tokenizer, vocab_size)
            return self._made[vocab_size]


_KNOWN: weakref.WeakKeyDictionary[Tokenizer, Vocabularies] = weakref.WeakKeyDictionary()


def of(tokenizer: Tokenizer) -> Vocabularies:
    """The vocabularies of a tokenizer."""
    return _KNOWN.setdefault(tokenizer, Vocabularies())


def is_known(params: Params, tokenizer: Tokenizer, vocab_size: int) -> bool:
    """True where the form that `params` asks for has been compiled, or none is asked for."""
    wanted = asked(params)
    return wanted is None or of(tokenizer).of(tokenizer, vocab_size).has(*wanted)


def build(params: Params, tokenizer: Tokenizer, vocab_size: int, rows: int) -> Constraint | None:
    """The constraint that `params` asks for, if any.

    Args:
        tokenizer: what writes the text.
        vocab_size: the width of the logits.
        rows: rows or beams of the call.

    Raises:
        ValueError: llguidance is not installed, or cannot do what is asked.
    """
    wanted = asked(params)
    if wanted is None:
        return None
    name, text = wanted
    known = of(tokenizer)
    compiled = known.of(tokenizer, vocab_size).compiled(name, text, known.limits)
    made = Constraint(name, compiled, vocab_size, params.eos_token_id or (), rows)
    if params.num_beam_groups > 1 and not made.ends:
        raise ValueError(
            f"{name} with num_beam_groups={params.num_beam_groups} needs an eos_token_id: groups "
            "know no other end"
        )
    return made


def _check_size(name: str, text: str) -> None:
    """Raise a ValueError for what llguidance would break at, or not come to an end with."""
    if len(text) > MOST_CHARACTERS:
        raise ValueError(
            f"{name} must have at most {MOST_CHARACTERS:,} characters, got {len(text):,}"
        )
    schemas = [json.loads(text)] if name == "json_schema" else []
    if name == "grammar":
        from fastgen.sampling import schema

        inside = [*schema.embedded(text)]
        schemas = [one for _, _, one in inside]
        rules = text.count(":") - sum(text.count(":", start, end) for start, end, _ in inside)
        if rules > MOST_RULES:
            raise ValueError(
                f"grammar must have at most {MOST_RULES:,} rules (colons), got {rules:,}"
            )
    if sum(map(_references, schemas)) > MOST_REFERENCES:
        raise ValueError(f"{name} must have at most {MOST_REFERENCES:,} references ($ref)")


def _references(schema: Any) -> int:
    """Count the `$ref` and the like in a schema."""
    count, rest = 0, [schema]
    while rest:
        one = rest.pop()
        if isinstance(one, dict):
            count += sum(key in ("$ref", "$dynamicRef") for key in one)
            rest += one.values()
        elif isinstance(one, list):
            rest += one
    return count


def _reason(text: str) -> str:
    """An error of llguidance in one line, without the picture of where it is."""
    if "oneOf constraints are not supported" in text:
        return (
            "options of oneOf overlap, or may: let each require a property with a const of its "
            "own, or write anyOf"
        )
    line = " ".join(text.replace("<non-verbose/>", "").split())
    return line if len(line) <= REASON else line[:REASON] + "..."


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise ValueError(
            f"{', '.join(FORMS)} need llguidance: {extras.install('structured')}"
        ) from error
    return llguidance
