"""A row of a job: as it was found, and what it became."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from decimal import Decimal
from hashlib import blake2b
from typing import Any, Self

from fastgen.store import jsonfile

ALWAYS = ("id", "custom_id", "metadata")  # fields that are given back without being asked for
ALL = "*"  # of `keep`: every field that means nothing here


@dataclass(frozen=True)
class InputRow:
    """One row as it was found.

    Attributes:
        number: its line, counted from 0.
        content: the line, without what ends it; of a table the row as JSON.
        text: whether the line itself is the prompt, and no JSON.
        file: which one it is of, where there are several.
        is_numbered: whether it has a place; in a table on a cluster it has none.
    """

    number: int
    content: bytes
    text: bool = False
    file: str | None = None
    is_numbered: bool = True

    @property
    def location(self) -> dict[str, Any]:
        """The fields of its output that say where it was."""
        if not self.is_numbered:
            return {}
        return (
            {"row": self.number} if self.file is None else {"file": self.file, "row": self.number}
        )

    @property
    def name(self) -> str:
        """The text that its chance depends on: its place, or else its digest."""
        return " ".join(map(str, self.location.values())) or self.digest

    @property
    def digest(self) -> str:
        """Tells this row from another: 16 hexadecimal digits."""
        return blake2b(self.content, digest_size=8).hexdigest()

    def fields(self) -> dict[str, Any]:
        """Its fields by name.

        Raises:
            ValueError: it is not UTF-8, no JSON, or no object.
        """
        try:
            line = self.content.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8: {error.reason} at byte {error.start}") from error
        return {"prompt": line} if self.text else jsonfile.parsed(line)


class KeptFields:
    """The fields of a row that its output has too.

    Args:
        keep: fields to give back besides `ALWAYS`; `ALL` for all that are not `known`.
        known: fields that mean something here.
        output: names of the output's own fields.

    Raises:
        ValueError: a field to keep has the name of one of the output's.
    """

    def __init__(
        self, keep: Collection[str], known: Collection[str], output: Collection[str]
    ) -> None:
        self._names, self._all = {*ALWAYS, *keep}, ALL in keep
        self._not_of_all = frozenset([*known, *output])
        if odd := sorted(self._names & frozenset(output)):
            raise ValueError(f"{odd[0]} cannot be kept: the output has a field of that name")

    def __contains__(self, name: str) -> bool:
        return name in self._names or (self._all and name not in self._not_of_all)

    def of(self, row: InputRow, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The row's place in its file and the fields that are kept."""
        return row.location | {name: value for name, value in fields.items() if name in self}


@dataclass(frozen=True)
class Outcome:
    """The result of a row.

    Attributes:
        output: an object for JSON.
        tokens: how many were generated, or scored.
        bad: why it came to nothing; None if it did not.
    """

    output: Mapping[str, Any]
    tokens: int = 0
    bad: str | None = None

    @classmethod
    def failed(cls, why: object, kept: Mapping[str, Any]) -> Self:
        """A row that is no good: an error in its place, with the fields that are kept."""
        line = " ".join(str(why).split())
        return cls({**kept, "error": {"message": line}}, bad=line)


@dataclass(frozen=True)
class Done:
    """A row and what it became."""

    row: InputRow
    outcome: Outcome

    @property
    def output(self) -> Mapping[str, Any]:
        return self.outcome.output

    @property
    def tokens(self) -> int:
        return self.outcome.tokens

    @property
    def bad(self) -> str | None:
        return self.outcome.bad

    @property
    def line(self) -> bytes:
        """The output as a line of JSON, which has null for what is not finite."""
        try:
            text = json.dumps(self.output, ensure_ascii=False, allow_nan=False)
        except ValueError:
            text = json.dumps(jsonfile.finite(self.output), ensure_ascii=False)
        return text.encode()


def as_json(fields: Mapping[str, Any]) -> str:
    """A row of a table as JSON. A null or a nan says that the row has no such field.

    Raises:
        ValueError: JSON has nothing for a value, such as bytes.
    """
    given = {k: v for k, v in fields.items() if v is not None and not _is_nan(v)}
    return json.dumps(given, ensure_ascii=False, default=_said)


def _is_nan(value: Any) -> bool:
    """nan, or what pandas has for what is missing."""
    missing = type(value).__name__ in ("NAType", "NaTType")
    return missing or (isinstance(value, float) and math.isnan(value))


def _said(value: Any) -> Any:
    """Times and exact numbers as text."""
    if hasattr(value, "isoformat"):
        return value.isoformat()
    if hasattr(value, "tolist"):  # of numpy
        return value.tolist()
    if isinstance(value, Decimal):
        return str(value)
    raise ValueError(f"a column holds {type(value).__name__}, which JSON has not: leave it out")


def seed_of(seed: int, name: str) -> int:
    """The seed of a row, by the job's seed and what tells the row from others: 0 to 2**63 - 1."""
    digest = blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
