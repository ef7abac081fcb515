"""Text of a given form: JSON of a schema, what a regular expression matches, a grammar's text.

llguidance (extra `structured`; github.com/guidance-ai/llguidance) says which tokens may follow a
text: it reads the grammar with Earley's parser and the bytes of all tokens as a trie. Here this is
a processor that rules out the others. Where bytes are certain, such as the name of a property that
has to come, it leaves one token only: the one that the tokenizer itself would write.

What may follow depends on what was generated and on nothing else, so a row may be asked at any
length, in any order: for beams that fork, guesses that do not hold, rows that leave.
"""

from __future__ import annotations

import json
import weakref
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastgen import extras
from fastgen.tokenizer import Tokenizer

if TYPE_CHECKING:
    from fastgen.params import Params
    from fastgen.processors import Context

KNOBS = ("json_schema", "regex", "grammar")

# JSON in one line, as Python's json.dumps writes it: what models have read most, and all that has
# to come is certain. A schema may say otherwise: {"x-guidance": {"whitespace_flexible": true}}.
JSON = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

# llguidance follows a rule that is another rule by recursion: with a few thousand of them in a row
# the process would run out of stack. And its time grows with the square of a schema's properties.
MOST_RULES, MOST_REFERENCES, MOST_CHARACTERS = 1000, 500, 2**18

REASON = 300  # characters of an error of llguidance that are shown
SPARE = 16  # states that are kept besides a few for each row
MASKS = 16  # different sets of tokens that are kept: within a text many are the same


def asked(params: Params) -> tuple[str, str] | None:
    """The knob that asks for a form and its value, if one does."""
    found = [(name, getattr(params, name)) for name in KNOBS]
    return next(((name, text) for name, text in found if text is not None), None)


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
    """A text so far: llguidance's matcher after it, and what may follow."""

    matcher: Any
    allowed: Allowed


class Constraint:
    """What the generated text of each row of a call has to be: a processor, and what it knows.

    Args:
        name: the knob.
        start: llguidance's matcher of no text yet; it is only copied.
        vocab_size: the width of the logits.
        eos: the tokens that end a text.
        rows: rows or beams of the call: a few states are kept for each.

    Attributes:
        name: as above.
        ends: whether there is a token that says that the text ends.

    Raises:
        ValueError: the tokens that there are cannot write such a text.
    """

    def __init__(
        self, name: str, start: Any, vocab_size: int, eos: Collection[int], rows: int
    ) -> None:
        self.name = name
        self._start, self._vocab_size = start, vocab_size
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
        """Whether nothing but an end of text may follow these tokens [new]."""
        state = self._state(generated)
        return state is not None and state.allowed.complete

    def certain(self, generated: NDArray[np.int64], most: int) -> list[int]:
        """The tokens, `most` at most, that must follow these [new], one after the other."""
        tokens: list[int] = []
        while len(tokens) < most:
            state = self._state(np.append(generated, tokens).astype(np.int64))
            if state is None or state.allowed.only is None:
                break
            tokens.append(state.allowed.only)
            if tokens[-1] in self._eos:
                break
        return tokens

    def _state(self, generated: NDArray[np.int64]) -> State | None:
        """What is known of a text, int64 [new]; None if it is none of this form."""
        key = np.ascontiguousarray(generated, np.int64).tobytes()
        if key in self._states:
            self._states.move_to_end(key)
            return self._states[key]
        state = self._states[key] = self._found(key)
        if len(self._states) > self._most:
            self._states.popitem(last=False)
        return state

    def _found(self, key: bytes) -> State | None:
        """The state of a text, from that of the longest known beginning of it."""
        matcher, at = self._start, 0
        for end in range(len(key) - 8, 0, -8):
            if key[:end] in self._states:
                known = self._states[key[:end]]
                if known is None:
                    return None
                matcher, at = known.matcher, end
                break
        matcher = matcher.deep_copy()
        rest = np.frombuffer(key[at:], np.int64).tolist()
        taken = matcher.try_consume_tokens(rest)
        self._check(matcher)
        if taken < len(rest):
            return None
        mask = matcher.compute_bitmask()
        self._check(matcher)
        return State(matcher, self._allowed(mask))

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
        found = self._masks[mask] = Allowed(allowed, complete)
        if len(self._masks) > MASKS:
            self._masks.popitem(last=False)
        return found

    def _check(self, matcher: Any) -> None:
        if matcher.is_error():
            raise ValueError(f"{self.name} cannot be followed: {_reason(matcher.get_error())}")


class Writer:
    """A tokenizer as llguidance wants one: the bytes of all tokens, and a call that writes a text.

    A token's bytes are those that it adds to a text. Ids without a token stand for none. One more
    id, behind them all, is the end of text, whatever a call's `eos_token_id` are. And ids behind
    that stand for the bytes that no token has, so that llguidance can write what has to come: a
    model cannot take them.

    Args:
        tokenizer: what writes.
        vocab_size: ids that there are; of a model, the width of its logits.
    """

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        special = {i for i in tokenizer.special_ids() if i < vocab_size}
        self.eos_token_id = vocab_size
        self.special_token_ids = [*sorted(special), vocab_size]
        self.tokens = [
            (tokenizer.token(i) or "").encode() if i in special else tokenizer.spelling(i) or b""
            for i in range(vocab_size)
        ]
        texts = {one for i, one in enumerate(self.tokens) if i not in special}
        self.tokens.append(b"end of text")
        self.tokens += [bytes([b]) for b in range(256) if bytes([b]) not in texts]
        self._encode, self._special = tokenizer.backend.encode, special
        self._by_bytes: dict[bytes, int] = {}

    def __call__(self, text: str | bytes) -> list[int]:
        """The tokens that the tokenizer writes for a text within another.

        What it cannot write without a space or the like in front is written with the longest token
        first. It may not raise: llguidance asks.
        """
        wanted = text.encode() if isinstance(text, str) else text
        for before in ("", "\n", "a"):
            ids = self._encode(before + wanted.decode(), add_special_tokens=False).ids
            if self._special.isdisjoint(ids) and max(ids, default=0) < self.eos_token_id:
                tail = self._tail(ids, wanted)
                if tail is not None:
                    return tail
        return self._longest_first(wanted)

    def _tail(self, ids: list[int], wanted: bytes) -> list[int] | None:
        """The last of these tokens that write `wanted`, if some do."""
        written = b""
        for at in range(len(ids), -1, -1):
            if written == wanted:
                return ids[at:]
            if at:
                written = self.tokens[ids[at - 1]] + written
        return None

    def _longest_first(self, wanted: bytes) -> list[int]:
        if not self._by_bytes:
            special = set(self.special_token_ids)
            self._by_bytes = {b: i for i, b in enumerate(self.tokens) if b and i not in special}
        longest = max(map(len, self._by_bytes), default=0)
        found, at = [], 0
        while at < len(wanted):
            ends = range(min(len(wanted), at + longest), at, -1)
            end = next(end for end in ends if wanted[at:end] in self._by_bytes)
            found.append(self._by_bytes[wanted[at:end]])
            at = end
        return found


class Vocabulary:
    """What llguidance knows of a tokenizer, and the grammars that were compiled for it."""

    KEPT = 32  # compiled grammars

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        llguidance = _llguidance()
        self._seen = llguidance.LLTokenizer(Writer(tokenizer, vocab_size))
        self._limits = llguidance.LLParserLimits(verbose_errors=False)
        self._compiled: OrderedDict[tuple[str, str], Any] = OrderedDict()

    def start(self, name: str, text: str) -> Any:
        """The matcher of no text yet, compiled once for each grammar; it is only to be copied.

        Raises:
            ValueError: `text` is not what its knob `name` wants; or it says something that
                llguidance has no answer to.
        """
        key = name, text
        found = self._compiled.get(key)
        if found is None:
            found = self._compiled[key] = self._compile(name, text)
            while len(self._compiled) > self.KEPT:
                self._compiled.popitem(last=False)
        return found

    def _compile(self, name: str, text: str) -> Any:
        _check_size(name, text)
        matcher = _llguidance().LLMatcher
        written = {
            "json_schema": lambda: matcher.grammar_from_json_schema(text, defaults=JSON),
            "regex": lambda: matcher.grammar_from_regex(text),
            "grammar": lambda: matcher.grammar_from_lark(text),
        }
        try:
            start = matcher(self._seen, written[name](), log_level=0, limits=self._limits)
            wrong = start.get_error()
        except ValueError as error:
            wrong = str(error)
        if wrong:
            raise ValueError(f"{name} cannot be used: {_reason(wrong)}")
        return start


_VOCABULARIES: weakref.WeakKeyDictionary[Tokenizer, dict[int, Vocabulary]] = (
    weakref.WeakKeyDictionary()
)


def build(params: Params, tokenizer: Tokenizer, vocab_size: int, rows: int) -> Constraint | None:
    """What `params` asks the text to be, if anything.

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
    known = _VOCABULARIES.setdefault(tokenizer, {})
    if vocab_size not in known:
        known[vocab_size] = Vocabulary(tokenizer, vocab_size)
    start = known[vocab_size].start(name, text)
    made = Constraint(name, start, vocab_size, params.eos_token_id or (), rows)
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
    if name == "grammar" and text.count(":") > MOST_RULES:
        raise ValueError(
            f"grammar must have at most {MOST_RULES:,} rules (colons), got {text.count(':'):,}"
        )
    if name == "json_schema" and _references(json.loads(text)) > MOST_REFERENCES:
        raise ValueError(f"json_schema must have at most {MOST_REFERENCES:,} references ($ref)")


def _references(schema: Any) -> int:
    """How many `$ref` and the like there are in a schema."""
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
    line = " ".join(text.replace("<non-verbose/>", "").split())
    return line if len(line) <= REASON else line[:REASON] + "..."


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise ValueError(
            f"{', '.join(KNOBS)} need llguidance: {extras.install('structured')}"
        ) from error
    return llguidance
