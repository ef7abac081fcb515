"""Keys and values of every layer, written in place: slot r of the buffers belongs to row r.

Models with recurrence or convolution keep states besides, of a fixed size for each slot: these have
no past that could be cut off, so `trim` cannot take a token back; `restore` can, to what `state`
gave before.

Three verbs: `take` (reorder, drop, repeat), `trim` (roll back) and `reserve` (let rows join).
Two more carry tokens from one cache to another: `read` and `append`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastgen.store.graph_io import GRAIN, first_shown
from fastgen.system.memory import give_back, lazy_zeros

STEP = 256  # tokens: buffers grow by multiples, so that they do not grow at every call
AT_ONCE = 1 << 18  # bytes of all layers that are copied in one assignment


class Cache:
    """Buffers for `rows` sequences of up to `capacity` tokens.

    Layers whose keys have one shape share one array
    `[2 * layers, rows, kv_heads, capacity, head_dim]`, keys and values in turn, so that moving
    rows is one assignment. The memory is zeroed lazily by the operating system: what is not
    reached costs nothing.

    Attributes:
        dtype: of what is stored: float32, or int8 where the graph has a scale for each channel.
        windows: of each layer, the tokens that a query sees; None for all, empty if all see all.
        lengths: int64 [rows], the tokens that each slot holds.
        bindings: what the model bound to these buffers, by shape of call; dropped when they move.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        rows: int,
        capacity: int,
        dtype: str = "float32",
        states: Sequence[tuple[int, ...]] = (),
        windows: Sequence[int | None] = (),
    ) -> None:
        self.shapes = tuple(shapes)
        self.windows = tuple(windows)
        self.state_shapes = tuple(states)
        self.dtype = np.dtype(dtype)
        self.rows = rows
        self.capacity = capacity
        self.lengths = np.zeros(rows, np.int64)
        self.bindings: dict[Any, Any] = {}
        self._layers = {
            shape: [i for i, other in enumerate(self.shapes) if other == shape]
            for shape in dict.fromkeys(self.shapes)
        }
        self._reached = np.zeros(rows, np.int64)
        self._passed = np.zeros(rows, np.int64)  # of `forget`
        self._buffers = self._allocate()
        self._states = self._no_states()

    def _no_states(self) -> list[NDArray[np.float32]]:
        return [np.zeros((self.rows, *shape), np.float32) for shape in self.state_shapes]

    def _allocate(self) -> dict[tuple[int, int], NDArray[Any]]:
        return {
            (heads, dim): lazy_zeros(
                (2 * len(layers), self.rows, heads, self.capacity, dim), self.dtype
            )
            for (heads, dim), layers in self._layers.items()
        }

    def slots(self, first: int, rows: int) -> Iterator[NDArray[Any]]:
        """Views `[rows, kv_heads, capacity, head_dim]` of each layer's key and value, in order."""
        indices = {
            layer: (shape, 2 * index)
            for shape, layers in self._layers.items()
            for index, layer in enumerate(layers)
        }
        for layer in range(len(self.shapes)):
            shape, index = indices[layer]
            for half in (index, index + 1):
                yield self._buffers[shape][half, first : first + rows]

    def states(self, first: int, rows: int) -> Iterator[NDArray[np.float32]]:
        """Views `[rows, ...]` of each state besides keys and values, in order."""
        for states in self._states:
            yield states[first : first + rows]

    def begin(self, slot: int) -> None:
        """Let a row begin in `slot`: the states are those of an empty text."""
        self.lengths[slot] = self._passed[slot] = 0
        for states in self._states:
            states[slot] = 0

    def state(self, slot: int) -> tuple[int, list[NDArray[np.float32]]]:
        """The length of the row in `slot` and copies of its states, for `restore`."""
        return int(self.lengths[slot]), [states[slot].copy() for states in self._states]

    def restore(self, slot: int, state: tuple[int, list[NDArray[np.float32]]]) -> None:
        """Let the row in `slot` be so long, with these states; its keys and values are there."""
        self.lengths[slot], kept = state
        for states, one in zip(self._states, kept, strict=True):
            states[slot] = one

    def take(
        self, parents: Sequence[int] | NDArray[np.int64], start: int | NDArray[np.int64] = 0
    ) -> None:
        """Slot i becomes what slot `parents[i]` was; slots past the end of `parents` are emptied.

        Args:
            parents: one slot for each of the first `len(parents)` slots.
            start: tokens before it are known to be equal and stay where they are; one for all
                slots, or int64 [len(parents)].
        """
        parents = np.asarray(parents, np.int64)
        moved = np.flatnonzero(parents != np.arange(len(parents)))
        sources = parents[moved]
        lengths = self.lengths[parents]
        for states in self._states:
            states[moved] = states[sources]
        starts = np.broadcast_to(start, parents.shape)[moved]
        if (sources < moved).all() or set(sources.tolist()).isdisjoint(moved.tolist()):
            # From the last slot on, nothing is overwritten that is still to be read.
            for slot, source, first in zip(moved[::-1], sources[::-1], starts[::-1], strict=True):
                self._copy(source, slot, first, self.lengths[source])
        else:
            self._copy(sources, moved, starts.min(), self.lengths[sources].max())
        self.lengths[: len(parents)] = lengths
        self.lengths[len(parents) :] = 0

    def _copy(self, sources: Any, slots: Any, start: int, end: int) -> None:
        """Tokens `start` to `end` of one slot, or of several by way of a temporary copy."""
        self._passed[slots] = np.minimum(self._passed[slots], start // GRAIN)
        for buffer in self._buffers.values():
            # Of little, numpy's own copy against overlaps costs less than a call a layer.
            little = np.size(slots) * (end - start) * buffer[:, :1, :, :1].nbytes <= AT_ONCE
            for part in (buffer,) if little else np.split(buffer, len(buffer)):
                part[:, slots, :, start:end] = part[:, sources, :, start:end]

    def forget(self, first: int, rows: int) -> None:
        """Give back memory of `rows` slots: what layers with windows are not shown any more.

        For rows that are not trimmed to before what they hold now, and whose first tokens are not
        read any more. It looks again at a slot that has gone on by GRAIN tokens.
        """
        if not self.windows:
            return
        slots = slice(first, first + rows)
        passed = self.lengths[slots] // GRAIN
        for slot in (first + np.flatnonzero(passed != self._passed[slots])).tolist():
            for window, head in self._windowed(slot):
                give_back(head, 0, first_shown(int(self.lengths[slot]), window))
        self._passed[slots] = passed

    def _windowed(self, slot: int) -> Iterator[tuple[int, NDArray[Any]]]:
        """Each layer's window, and a head's keys or values [capacity, head_dim], if it has one."""
        for shape, layers in self._layers.items():
            for index, layer in enumerate(layers):
                if (window := self.windows[layer]) is not None:
                    for half in self._buffers[shape][2 * index : 2 * index + 2, slot]:
                        yield from ((window, head) for head in half)

    def trim(self, slot: int, length: int) -> None:
        """Forget what `slot` holds from `length` on."""
        if not 0 <= length <= self.lengths[slot]:
            raise ValueError(f"slot {slot} holds {self.lengths[slot]} tokens, not {length}")
        if self._states and length != self.lengths[slot]:
            raise ValueError("states of a recurrence cannot be trimmed: restore an earlier one")
        self.lengths[slot] = length

    def reserve(self, rows: int, capacity: int) -> None:
        """Make room for at least `rows` rows of `capacity` tokens; what is held stays."""
        if rows <= self.rows and capacity <= self.capacity:
            return
        self._move(max(rows, self.rows), max(capacity, self.capacity))

    def renew(self, rows: int, capacity: int) -> None:
        """Have room for just so much, in memory that nobody has reached; what is held stays."""
        if self.lengths[rows:].any() or self.lengths.max(initial=0) > capacity:
            raise ValueError(f"{rows} rows of {capacity} tokens are less than what is held")
        self._move(rows, capacity)

    def _move(self, rows: int, capacity: int) -> None:
        """Move what is held into new buffers."""
        old, old_lengths, old_states = self._buffers, self.lengths, self._states
        kept = min(rows, self.rows)
        self.rows, self.capacity = rows, -(-capacity // STEP) * STEP
        self._buffers, self._states = self._allocate(), self._no_states()
        for states, before in zip(self._states, old_states, strict=True):
            states[:kept] = before[:kept]
        self.bindings.clear()
        self.lengths = np.zeros(self.rows, np.int64)
        self.lengths[:kept] = old_lengths[:kept]
        self._reached = self.lengths.copy()
        self._passed = np.zeros(self.rows, np.int64)
        for shape, buffer in old.items():
            for row, used in enumerate(self.lengths[:kept].tolist()):
                self._buffers[shape][:, row, :, :used] = buffer[:, row, :, :used]

    def reached(self) -> int:
        """Tokens of all slots that rows have reached since the buffers were made.

        Asked after each step it is what the buffers take of the machine's memory.
        """
        np.maximum(self._reached, self.lengths, out=self._reached)
        return int(self._reached.sum())

    @property
    def size(self) -> int:
        """The bytes of the buffers, reached or not."""
        return sum(part.nbytes for part in (*self._buffers.values(), *self._states))

    @property
    def layout(self) -> str:
        """The form of what `read` gives for a token: caches of one layout understand each other."""
        kept = [(self.shapes, b.dtype.str) for b in self._buffers.values()]
        return f"{kept} {self.state_shapes}"

    def nbytes(self, tokens: int) -> int:
        """The bytes of so many tokens of one slot, and of its states."""
        states = sum(4 * math.prod(shape) for shape in self.state_shapes)
        return states + sum(
            tokens * b.dtype.itemsize * b[:, 0, :, 0].size for b in self._buffers.values()
        )

    def kind(self, tokens: int) -> list[tuple[Any, tuple[int, ...]]]:
        """dtype and shape of each part that `append` takes of so many tokens."""
        kept: list[tuple[Any, tuple[int, ...]]] = [
            (b.dtype, (b.shape[0], b.shape[2], tokens, b.shape[4])) for b in self._buffers.values()
        ]
        return kept + [(states.dtype, states.shape[1:]) for states in self._states]

    def read(self, slot: int, start: int, end: int) -> tuple[NDArray[Any], ...]:
        """A copy of tokens `start` to `end` of `slot`.

        Returns:
            For each shape of keys `[2 * layers, kv_heads, end - start, head_dim]`.
        """
        return tuple(part.copy() for part in self.parts(slot, start, end))

    def parts(self, slot: int, start: int, end: int) -> list[NDArray[Any]]:
        """As `read`, the memory itself."""
        return [buffer[:, slot, :, start:end] for buffer in self._buffers.values()]

    def append(self, slot: int, count: int, parts: Sequence[NDArray[Any]]) -> None:
        """Let `count` tokens follow what `slot` holds; there must be room.

        Args:
            parts: what `read` gave, and then the states after these tokens.
        """
        start = self.lengths[slot]
        end = start + count
        for mine, part in zip(self.parts(slot, start, end), parts, strict=False):
            mine[...] = part
        self.restore(slot, (end, list(parts[len(self._buffers) :])))
