"""Rows that are read ahead, to be sorted and run together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from fastgen.jobs.row import Done, InputRow, Outcome

Read = TypeVar("Read")


@dataclass(frozen=True)
class Window:
    """The most that is read ahead: tokens, and rows."""

    tokens: int
    rows: int

    def read(
        self,
        rows: Iterator[InputRow],
        read: Callable[[InputRow], Read | Outcome],
        length: Callable[[Read], int],
    ) -> tuple[list[Done], list[tuple[InputRow, Read]]]:
        """Read the next rows.

        Args:
            read: a row -> what it asks for, or why it comes to nothing.
            length: of it, in tokens.

        Returns:
            the rows that come to nothing, and the others; both empty where there are no more.
        """
        bad: list[Done] = []
        good: list[tuple[InputRow, Read]] = []
        tokens = 0
        for row in rows:
            result = read(row)
            if isinstance(result, Outcome):
                bad.append(Done(row, result))
            else:
                good.append((row, result))
                tokens += length(result)
            if tokens >= self.tokens or len(good) + len(bad) >= self.rows:
                break
        return bad, good
