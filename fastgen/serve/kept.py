"""Responses that are kept in memory, so that the next request can go on from them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastgen.serve.refused import Refused
from fastgen.serve.rendered import as_json

MOST = 1000  # responses
MOST_BYTES = 64 << 20  # of their JSON and of their inputs'
POINTER = 8  # bytes of each item of the conversation before it

Item = dict[str, Any]


@dataclass(frozen=True)
class KeptResponse:
    """A response and what it came of.

    Attributes:
        response: as it was sent.
        input: the items of its request.
        before: those of the conversation that it goes on from.
        nbytes: that it takes.
    """

    response: dict[str, Any]
    input: Sequence[Item]
    before: Sequence[Item]
    nbytes: int

    @property
    def conversation(self) -> list[Item]:
        """All items up to its end; a call that was cut off is none."""
        output = self.response["output"]
        whole = [item for item in output if item["type"] != "function_call" or is_whole(item)]
        return [*self.before, *self.input, *whole]


def is_whole(item: Item) -> bool:
    """True for an item that was not cut off."""
    return item.get("status") != "incomplete"


class KeptResponses:
    """The latest responses; the oldest leave where there are too many."""

    def __init__(self, most: int = MOST, most_bytes: int = MOST_BYTES) -> None:
        self._most, self._most_bytes, self.nbytes = most, most_bytes, 0
        self._kept: OrderedDict[str, KeptResponse] = OrderedDict()
        self._items: dict[str, tuple[str, Item]] = {}  # each with the response it leaves with

    def __len__(self) -> int:
        return len(self._kept)

    def add(
        self,
        response: dict[str, Any],
        given: Sequence[Item],
        before: Sequence[Item],
        nbytes: int,
    ) -> None:
        """Keep a response of `nbytes`, if it is not larger than all may be together."""
        if nbytes > self._most_bytes:
            return
        name = response["id"]
        self._kept[name] = KeptResponse(response, given, before, nbytes)
        for item in (*given, *response["output"]):
            self._items.setdefault(item["id"], (name, item))
        self.nbytes += nbytes
        while len(self._kept) > self._most or self.nbytes > self._most_bytes:
            self._drop(next(iter(self._kept)))

    def get(self, name: str) -> KeptResponse:
        """The response of that id, which is then the last to leave.

        Raises:
            Refused: it is not here, or not any more.
        """
        if name not in self._kept:
            raise Refused(404, f"there is no response {name!r} here, or no longer")
        self._kept.move_to_end(name)
        return self._kept[name]

    def item(self, name: str) -> Item | None:
        """An item of a response or of its request; None where it is not here."""
        return self._items[name][1] if name in self._items else None

    def delete(self, name: str) -> None:
        """Forget a response.

        Raises:
            Refused: it is not here.
        """
        self.get(name)
        self._drop(name)

    def _drop(self, name: str) -> None:
        gone = self._kept.pop(name)
        self.nbytes -= gone.nbytes
        for item in (*gone.input, *gone.response["output"]):
            if self._items.get(item["id"], ("",))[0] == name:
                del self._items[item["id"]]


def size_of(response: dict[str, Any], given: Sequence[Item], before: Sequence[Item]) -> int:
    """The bytes that a response takes."""
    return len(as_json([response, given])) + POINTER * len(before)
