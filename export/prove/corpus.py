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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgen.export.prove.own_text import SIDES, Writer
from fastgen.export.prove.reader import ROW, TEXTS, Document, Reader, Row
from fastgen.generator import CausalLM
from fastgen.store import jsonfile
from fastgen.store.jsonfile import parsed
from fastgen.store.model_info import ModelInfo

if TYPE_CHECKING:
    from fastgen.export.source.origin import Origin

KINDS = ("prose", "documentation", "code", "languages", "chat")
OWN = "own"  # the kind that the model writes itself
WHOLE = (OWN, "chat")  # kinds whose rows are not cut: how they begin says little of them
BREAK = "\n\f\n"  # between the documents of a shipped file
LINES = {".jsonl", ".ndjson", ".json"}  # endings of files with a JSON object a line
FIELDS = ("text", "ids", "messages")

SHORT = 64  # tokens of a row of a small request, at least, so that each kind has two
PASSAGE = 1000  # characters of a user's paragraphs that stay together, about
OWN_SHARE = 4  # one token in so many is the model's own, at most, where there is other text
MOST_OWN = 3072  # tokens of its own where there is no other text: each takes a step
OWN_ROW = 128  # tokens of a row of its own where there is other text: a step each


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

    def write(self, calibration: int, evaluation: int) -> None:
        """Have the model write its own text for both sides at once, which takes half the time."""
        if self._writer is not None:
            asked = zip(SIDES, (calibration, evaluation), strict=True)
            self._writer.write({side: self._own_share(n) for side, n in asked if n})

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
        """The amount of text used for each side, as one line."""
        lines = []
        for side, done in zip(SIDES, ("calibrated", "judged"), strict=True):
            used = {name: count[side] for name, count in self.kinds.items() if count[side]}
            if used:
                parts = ", ".join(f"{name} {count:,}" for name, count in used.items())
                lines.append(f"{done} on {sum(used.values()):,} tokens ({parts})")
        return "; ".join([*lines, *self.notes])

    def _own_share(self, tokens: int) -> int:
        """Tokens of the model's own text among so many."""
        if not self._shelves:
            return max(2, min(tokens, MOST_OWN))
        return max(2, min(-(-tokens // len(self.kinds)), tokens // OWN_SHARE))

    def _take(self, side: str, tokens: int) -> list[Row]:
        length = max(SHORT, min(ROW, tokens // (2 * max(1, len(self.kinds)))))
        rows = {
            name: _cut(shelf[side], ROW if name in WHOLE else length)
            for name, shelf in self._shelves.items()
        }
        most = dict.fromkeys(rows, tokens)
        if self._writer is not None:
            most[OWN] = self._own_share(tokens)
            rows[OWN] = iter(self._writer.rows(side, most[OWN]))
        used = dict.fromkeys(rows, 0)
        taken: list[Row] = []
        while rows and sum(used.values()) < tokens:
            name = min(rows, key=lambda kind: used[kind])
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
    length = OWN_ROW if shelves else ROW
    writer = None if own is None else Writer(own, reader, halves, length)
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
        documents = [_of_line(f"{path}, line {n}", line) for n, line in lines if line.strip()]
    else:
        documents = list(_passages(content))
    if not documents:
        raise ValueError(f"text must be a file with text, {path} has none")
    return documents


def _of_line(source: str, line: str) -> Document:
    try:
        fields = parsed(line)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    names = [name for name in FIELDS if name in fields]
    if len(names) != 1:
        raise ValueError(f"{source}: needs one of {', '.join(FIELDS)}, has {list(fields)}")
    (name,) = names
    value = fields[name]
    if not _RIGHT[name](value):
        raise ValueError(f"{source}: {name} must be {_MEANT[name]}, got {str(value)[:80]!r}")
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
        for index, half in enumerate(_in_turn(_documents(path))):
            spread = [((at + 0.5) / len(half), document) for at, document in enumerate(half)]
            sides[SIDES[index]] += spread
    return {
        side: [document for _, document in sorted(documents, key=lambda pair: pair[0])]
        for side, documents in sides.items()
    }


def _documents(path: Path) -> list[Document]:
    if path.suffix in LINES:
        return read(path)
    return [text.strip("\n") for text in path.read_text(encoding="utf-8").split(BREAK)]


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
            rows = [[row for document in half for row in reader.asked(document)] for half in halves]
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
    (document,) = documents
    middle = len(document) // 2
    if isinstance(document, str):
        ends = [match.end() for match in re.finditer(r"\n|(?<=[.!?])\s+|\s+", document)]
        middle = min(ends, key=lambda end: abs(end - middle), default=middle)
        return [document[:middle], document[middle:]]
    if isinstance(document[0], int):
        return [document[:middle], document[middle:]]
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
        for index, document in enumerate(self._documents):
            if index == len(self._read):
                self._read.append(self._reader.rows(document))
            yield from self._read[index]
