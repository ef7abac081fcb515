"""The text that an export is calibrated and judged on: rows of ids, as the model itself reads them.

Text of several kinds comes with fastgen (`texts/`): prose, documentation, code, many languages and
conversations. The model's own text is sampled from it once its graph is proved, which fits every
model, also one of proteins or music that has ids only. What a user brings takes the place of all.

Rows begin as the model's own texts do: with what its tokenizer puts before a text (bos, for many),
conversations in its chat template. Each document goes to one side, calibration or evaluation: no
row and no paragraph is in both.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastgen.generator import CausalLM
from fastgen.store import jsonfile
from fastgen.store.jsonfile import parsed
from fastgen.store.model_info import CONFIG, GENERATION_CONFIG, TOKENIZER_CONFIG, ModelInfo
from fastgen.text import chat_template

if TYPE_CHECKING:
    import tokenizers

    from fastgen.export.source.origin import Origin

Row = NDArray[np.int64]
Message = Mapping[str, Any]
Document = str | list[Message] | list[int]  # a text, a conversation, or ids

TEXTS = Path(__file__).parents[1] / "texts"
KINDS = ("prose", "documentation", "code", "languages", "chat")
OWN = "own"  # the kind that the model writes itself
WHOLE = (OWN, "chat")  # kinds whose rows are not cut: how they begin says little of them
SIDES = ("calibration", "evaluation")
BREAK = "\n\f\n"  # between the documents of a shipped file
LINES = {".jsonl", ".ndjson", ".json"}  # endings of files with a JSON object a line
FIELDS = ("text", "ids", "messages")

ROW = 256  # tokens of a row, at most
SHORT = 64  # and of those of a small request, at least, so that each kind has two
LEAST = 16  # tokens of a row that a longer text ends with: fewer say little
PASSAGE = 1000  # characters of a user's paragraphs that stay together, about
OWN_SHARE = 4  # one token in so many is the model's own, at most, where there is other text
MOST_OWN = 3072  # tokens of its own where there is no other text: each takes a step
AT_ONCE, TOGETHER = 32, 12  # rows that the model writes together, at most and at least
TRIES = 4  # times the rows that full ones would take, where it ends its texts early


class Corpus:
    """Text for a model, in two halves that share nothing.

    Attributes:
        kinds: tokens that were used, by kind and then "calibration" or "evaluation".
        notes: what is not as one would expect.
    """

    def __init__(
        self,
        shelves: Mapping[str, Mapping[str, Iterable[Row]]],
        writer: Writer | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        """
        Args:
            shelves: rows by kind and side, in the order in which they are taken.
            writer: makes the model's own, where there is to be any.
        """
        self._shelves, self._writer = shelves, writer
        names = [*shelves, *([OWN] if writer is not None else [])]
        self.kinds = {name: dict.fromkeys(SIDES, 0) for name in names}
        self.notes = list(notes)

    def only(self, kinds: Sequence[str]) -> Corpus:
        """The same text, some kinds of it."""
        unknown = [name for name in kinds if name not in self.kinds]
        if unknown or not kinds:
            known = ", ".join(self.kinds)
            raise ValueError(f"kinds must be some of {known}, got {list(kinds)}")
        shelves = {name: shelf for name, shelf in self._shelves.items() if name in kinds}
        return Corpus(shelves, self._writer if OWN in kinds else None, self.notes)

    def calibration(self, tokens: int) -> list[Row]:
        """Rows to calibrate on, about so many tokens, of all kinds alike; fewer if it has fewer.

        The same rows each time; fewer tokens are the first rows of each kind, and may be their
        beginnings, so that each kind is there.
        """
        return self._take("calibration", tokens)

    def evaluation(self, tokens: int) -> list[Row]:
        """Rows to judge on, likewise, that share nothing with those of `calibration`."""
        return self._take("evaluation", tokens)

    def summary(self) -> str:
        """What was used, side by side."""
        told = []
        for side, done in zip(SIDES, ("calibrated", "judged"), strict=True):
            used = {name: count[side] for name, count in self.kinds.items() if count[side]}
            if used:
                parts = ", ".join(f"{name} {count:,}" for name, count in used.items())
                told.append(f"{done} on {sum(used.values()):,} tokens ({parts})")
        return "; ".join([*told, *self.notes])

    def _take(self, side: str, tokens: int) -> list[Row]:
        length = max(SHORT, min(ROW, tokens // (2 * max(1, len(self.kinds)))))
        rows = {
            name: _cut(shelf[side], ROW if name in WHOLE else length)
            for name, shelf in self._shelves.items()
        }
        most = dict.fromkeys(rows, tokens)
        if self._writer is not None:
            share = min(tokens, MOST_OWN)
            if rows:
                share = min(-(-tokens // len(self.kinds)), tokens // OWN_SHARE)
            most[OWN] = max(2, share)
            rows[OWN] = iter(self._writer.rows(side, most[OWN]))
        used = dict.fromkeys(rows, 0)
        taken: list[Row] = []
        while rows and sum(used.values()) < tokens:
            name = min(rows, key=lambda one: used[one])
            row = next(rows[name], None) if used[name] < most[name] else None
            if row is None:
                del rows[name]
                continue
            taken.append(row)
            used[name] += len(row)
        for name, count in used.items():
            self.kinds[name][side] = count
        return taken


def of(
    origin: Origin,
    info: ModelInfo,
    files: Sequence[Path] = (),
    own: CausalLM | Callable[[], CausalLM] | None = None,
) -> Corpus:
    """The corpus of a model.

    Args:
        origin: of the model, for its tokenizer and its chat template.
        info: the content of `fastgen.json`.
        files: a user's text (see `read`), which takes the place of all other; half of it is
            calibrated on, and half judged. None for what comes with fastgen.
        own: the model that writes text of its own, or what loads it once it has to.

    Raises:
        ValueError: the user's text is not for this model, or too short.
    """
    reader = Reader.of(origin, info)
    if files:
        return Corpus(_brought(reader, files), notes=reader.notes)
    halves = {name: _shipped(name) for name in KINDS if reader.tokenizer is not None}
    shelves = {
        name: {side: Shelf(reader, half) for side, half in sides.items()}
        for name, sides in halves.items()
    }
    writer = None if own is None else Writer(own, reader, halves)
    return Corpus(shelves, writer, reader.notes)


# ---------------------------------------------------------------------------------- documents


def read(path: Path) -> list[Document]:
    """The documents of a user's file: plain text, or JSON lines by its ending.

    A line's object has one of `text`, `ids` (the model's token ids) and `messages` (a
    conversation). Paragraphs of plain text stay together to about 1,000 characters.

    Raises:
        ValueError: it cannot be read so; the message says where.
    """
    if not path.is_file():
        raise ValueError(f"text must be a file, {path} is none")
    jsonfile.check_fetched(path)
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"text must be UTF-8, {path} is not: {error}") from error
    if path.suffix.lower() in LINES:
        lines = enumerate(content.split("\n"), 1)
        found = [_of_line(f"{path}, line {n}", line) for n, line in lines if line.strip()]
    else:
        found = list(_passages(content))
    if not found:
        raise ValueError(f"text must be a file with text, {path} has none")
    return found


def _of_line(place: str, line: str) -> Document:
    try:
        fields = parsed(line)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    names = [name for name in FIELDS if name in fields]
    if len(names) != 1:
        raise ValueError(f"{place}: needs one of {', '.join(FIELDS)}, has {list(fields)}")
    (name,) = names
    value = fields[name]
    if not _RIGHT[name](value):
        raise ValueError(f"{place}: {name} must be {_MEANT[name]}, got {str(value)[:80]!r}")
    return value  # type: ignore[no-any-return]


_MEANT = {
    "text": "a text that is not empty",
    "ids": "a list of two or more token ids",
    "messages": "a list of objects with role and content",
}
_RIGHT: dict[str, Callable[[Any], bool]] = {
    "text": lambda value: isinstance(value, str) and bool(value.strip()),
    "ids": lambda value: (
        isinstance(value, list)
        and len(value) > 1
        and all(type(one) is int and one >= 0 for one in value)
    ),
    "messages": lambda value: (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(one, dict) and {"role", "content"} <= one.keys() for one in value)
    ),
}


def _passages(content: str) -> Iterator[str]:
    """Paragraphs, each once, joined to PASSAGE characters or more; a long one stands alone."""
    paragraphs = (part.strip("\n") for part in re.split(r"\n\s*\n", content))
    now = ""
    for paragraph in dict.fromkeys(part for part in paragraphs if part.strip()):
        now = f"{now}\n\n{paragraph}" if now else paragraph
        if len(now) >= PASSAGE:
            yield now
            now = ""
    if now:
        yield now


def _shipped(kind: str) -> dict[str, list[Document]]:
    """The two sides of a kind that comes with fastgen, the files' documents mixed evenly."""
    sides: dict[str, list[tuple[float, Document]]] = {side: [] for side in SIDES}
    for path in sorted(TEXTS.glob(f"{kind}.*.*")):
        for place, half in enumerate(_in_turn(_documents(path))):
            spread = [((at + 0.5) / len(half), one) for at, one in enumerate(half)]
            sides[SIDES[place]] += spread
    return {
        side: [document for _, document in sorted(found, key=lambda one: one[0])]
        for side, found in sides.items()
    }


def _documents(path: Path) -> list[Document]:
    if path.suffix in LINES:
        return read(path)
    return [one.strip("\n") for one in path.read_text(encoding="utf-8").split(BREAK)]


def _in_turn(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """One to calibrate on, one to judge: both sides see the whole file."""
    return list(documents[0::2]), list(documents[1::2])


def _brought(reader: Reader, files: Sequence[Path]) -> dict[str, dict[str, list[Row]]]:
    """A user's rows, each file a kind of its own, so that all count alike."""
    shelves: dict[str, dict[str, list[Row]]] = {}
    for path in files:
        halves = _in_turn(_two(path, read(path)))
        name = path.name if path.name not in shelves else str(path)
        try:
            rows = [[row for one in half for row in reader.asked(one)] for half in halves]
        except ValueError as error:
            raise ValueError(f"text: {path}: {error}") from error
        shelves[name] = dict(zip(SIDES, rows, strict=True))
    _no_row_twice(shelves)
    for side in SIDES:
        if not any(shelf[side] for shelf in shelves.values()):
            names = ", ".join(map(str, files))
            raise ValueError(f"text: {names} has too little to calibrate on and to judge on")
    return shelves


def _two(path: Path, documents: list[Document]) -> list[Document]:
    """Two or more: a single one is cut in the middle."""
    if len(documents) > 1:
        return documents
    (one,) = documents
    middle = len(one) // 2
    if isinstance(one, str):
        ends = [match.end() for match in re.finditer(r"\n|(?<=[.!?])\s+|\s+", one)]
        middle = min(ends, key=lambda end: abs(end - middle), default=middle)
        return [one[:middle], one[middle:]]
    if isinstance(one[0], int):
        return [one[:middle], one[middle:]]
    raise ValueError(f"text: {path} has one conversation: half is for judging, so give two")


def _no_row_twice(shelves: Mapping[str, dict[str, list[Row]]]) -> None:
    """Rows to judge on that are also calibrated on, in any kind, go."""
    seen = {row.tobytes() for shelf in shelves.values() for row in shelf["calibration"]}
    for shelf in shelves.values():
        shelf["evaluation"] = [row for row in shelf["evaluation"] if row.tobytes() not in seen]


def _cut(rows: Iterable[Row], length: int) -> Iterator[Row]:
    return (row[:length] for row in rows)


# ------------------------------------------------------------------------------ rows of a model


class Shelf:
    """The rows of shipped documents, read when they are asked for and kept."""

    def __init__(self, reader: Reader, documents: Sequence[Document]) -> None:
        self._reader, self._documents = reader, documents
        self._read: list[list[Row]] = []

    def __iter__(self) -> Iterator[Row]:
        for place, document in enumerate(self._documents):
            if place == len(self._read):
                self._read.append(self._reader.rows(document))
            yield from self._read[place]


@dataclass
class Reader:
    """How a model reads a text.

    Attributes:
        tokenizer: None for ids only.
        vocab: ids that it has.
        length: tokens of a row.
        template: renders a conversation, with or without a reply to come; None without template.
        bos, eos: the ids that its configuration says begin and end a text.
    """

    tokenizer: tokenizers.Tokenizer | None
    vocab: int
    length: int
    template: Template | None = None
    bos: int | None = None
    eos: tuple[int, ...] = ()
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, origin: Origin, info: ModelInfo) -> Reader:
        """From what its directory will hold."""
        limit = info.max_length
        reader = cls(origin.tokenizer, info.vocab_size, min(ROW, limit or ROW))
        with tempfile.TemporaryDirectory() as temporary:
            place = Path(temporary)
            origin.write_configuration(place)
            said = jsonfile.read(place / CONFIG) | {
                name: value
                for name, value in jsonfile.read(place / GENERATION_CONFIG).items()
                if value is not None
            }
            bos, eos = said.get("bos_token_id"), said.get("eos_token_id")
            reader.bos = bos if _is_id(bos, reader.vocab) else None
            ends = eos if isinstance(eos, list) else [eos]
            reader.eos = tuple(one for one in ends if _is_id(one, reader.vocab))
            settings = jsonfile.read(place / TOKENIZER_CONFIG)
            if reader.tokenizer is not None and chat_template.has_template(place, settings):
                reader._use(chat_template.source(place, settings, with_tools=False), settings)
        return reader

    def _use(self, source: str, settings: Mapping[str, Any]) -> None:
        template = Template(source, settings)
        try:
            template.text([{"role": "user", "content": "Hi"}], reply=True)
        except ValueError as error:
            self.notes.append(f"conversations are plain text: {error}")
        else:
            self.template = template

    @cached_property
    def prefix(self) -> list[int]:
        """What its tokenizer puts before a text."""
        assert self.tokenizer is not None
        text = "The first words."
        bare = self.tokenizer.encode(text, add_special_tokens=False).ids
        whole = self.tokenizer.encode(text, add_special_tokens=True).ids
        starts = (at for at in range(len(whole)) if whole[at : at + len(bare)] == bare)
        return [one for one in whole[: next(starts, 0)] if one < self.vocab]

    def rows(self, document: Document) -> list[Row]:
        """A shipped document, none of one in letters that the model does not know.

        Conversations are plain text where there is no template for them.
        """
        text = document if isinstance(document, str) else _plain(document)
        if not self._knows(text):
            return []
        if isinstance(document, str) or self.template is None:
            return self._of_text(text)
        ids = self._of_messages(document)
        return self._of_text(text) if ids is None else [ids]

    def _knows(self, text: str) -> bool:
        """Whether at least half of a text's letters are there when its ids are read back."""
        assert self.tokenizer is not None
        said = self.tokenizer.decode(self.encoded(text)).casefold()
        letters = {one for one in text.casefold() if one.isalpha()}
        return 2 * len(letters & set(said)) >= len(letters)

    def asked(self, document: Document) -> list[Row]:
        """A user's document.

        Raises:
            ValueError: the model cannot read it.
        """
        if not isinstance(document, str) and isinstance(document[0], int):
            beyond = [one for one in document if not _is_id(one, self.vocab)]
            if beyond:
                raise ValueError(f"ids must be below {self.vocab}, got {beyond[0]}")
            return self._cut([], document)
        if self.tokenizer is None:
            raise ValueError("the model has no tokenizer: give ids, not texts or messages")
        if isinstance(document, str):
            return self._of_text(document)
        if self.template is None:
            why = f" ({self.notes[0]})" if self.notes else ""
            raise ValueError(f"the model has no chat template: give text, not messages{why}")
        text = self.template.text(document, reply=False)
        return self._cut([], self.encoded(text))[:1]

    def encoded(self, text: str) -> list[int]:
        """Without what the tokenizer puts before a text."""
        assert self.tokenizer is not None
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return [one for one in ids if one < self.vocab]

    def _of_text(self, text: str) -> list[Row]:
        return self._cut(self.prefix, self.encoded(text))

    def _of_messages(self, messages: list[Message], reply: bool = False) -> Row | None:
        """The beginning of a conversation; None if the template refuses it in any form."""
        assert self.template is not None
        for said in (messages, [one for one in messages if one["role"] != "system"]):
            try:
                text = self.template.text(said, reply)
            except ValueError:
                continue
            return np.array(self.encoded(text)[: self.length], np.int64)
        return None

    def question(self, messages: list[Message]) -> Row | None:
        """A conversation up to where the first reply begins; None if the template refuses it."""
        ends = (at for at, one in enumerate(messages) if one["role"] == "user")
        return self._of_messages(messages[: next(ends, 0) + 1], reply=True)

    def _cut(self, prefix: list[int], ids: Sequence[Any]) -> list[Row]:
        """Rows that each begin with `prefix`; a short rest is left."""
        size = max(1, self.length - len(prefix))
        parts = [ids[at : at + size] for at in range(0, len(ids), size)]
        rows = [np.array([*prefix, *part], np.int64) for part in parts]
        return [row for at, row in enumerate(rows) if len(row) >= (LEAST if at else 2)]


class Template:
    """A model's chat template."""

    def __init__(self, source: str, settings: Mapping[str, Any]) -> None:
        self.settings = {**settings, "chat_template": source}

    def text(self, messages: Sequence[Message], reply: bool) -> str:
        """A conversation, up to where a reply begins if one is to come.

        Raises:
            ValueError: see `chat.prompt`.
        """
        # A day that stays: templates that tell the date would make other rows every day.
        variables = {"add_generation_prompt": reply, "date_string": "26 Jul 2024"}
        return chat_template.prompt(TEXTS / "no files", self.settings, messages, **variables)


def _plain(document: Document) -> str:
    return "\n\n".join(
        f"{str(one['role']).capitalize()}: {one['content']}"
        for one in document
        if isinstance(one, Mapping)
    )


def _is_id(value: Any, vocab: int) -> bool:
    return type(value) is int and 0 <= value < vocab


# -------------------------------------------------------------------------- the model's own text


class Writer:
    """What makes the model's own rows, when they are asked for."""

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
        """What it goes on from: questions, or what its texts begin with; None if nobody knows."""
        reader = self._reader
        if reader.template is not None:
            asked = [reader.question(one) for one in self._halves["chat"][side]]  # type: ignore[arg-type]
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
        texts = [one for name in ("prose", "code", "languages") for one in self._halves[name][side]]
        words = [reader.encoded(one)[:2] for one in texts if isinstance(one, str)]
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
    vocab, rows = model.model.info.vocab_size, []
    starts = _random_starts(vocab, seed, tokens) if starts is None else starts
    full = -(-tokens // length)
    while sum(map(len, rows)) < tokens and len(rows) < TRIES * max(full, TOGETHER):
        missing = -(-(tokens - sum(map(len, rows))) // length)
        together = min(AT_ONCE, max(TOGETHER, missing))
        places = range(len(rows), len(rows) + together)
        begun = [list(starts[place % len(starts)])[: length - 1] for place in places]
        rows += _sampled(model, begun, [seed + place for place in places], length, eos)
    wanted = np.searchsorted(np.cumsum([len(row) for row in rows]), tokens) + 1
    return [row for row in rows[:wanted] if len(row) > 1]


def _random_starts(vocab: int, seed: int, tokens: int) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [[int(one)] for one in random.integers(0, vocab, max(1, tokens))]


def _sampled(
    model: CausalLM, begun: list[list[int]], seeds: list[int], length: int, eos: Sequence[int]
) -> list[Row]:
    """`begun`, gone on with to `length` or to an end.

    What the model's own defaults say of sampling is not its text.
    """
    longest = max(map(len, begun))
    found = model.without_defaults().generate(
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
    for start, ids in zip(begun, found, strict=True):
        row = np.array(ids[longest - len(start) :], np.int64)
        ends = np.flatnonzero(np.isin(row[len(start) :], list(eos)))
        rows.append(row[: len(start) + int(ends[0]) + 1] if len(ends) else row)
    return rows
