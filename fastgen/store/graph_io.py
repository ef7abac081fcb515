"""The graph's contract: its inputs and outputs, which the export writes and the engine binds.

| input | type | |
|---|---|---|
| `input_ids`, `position_ids` | int64 [rows, new] | new tokens, right-padded |
| `query_seqlens` | int32 [rows] | how many of them are real |
| `seqlens_k` | int32 [rows] | tokens in the cache after this step, less 1 |
| `total_sequence_length` | int32 [] | the largest of those, plus 1 |
| `logits_positions` | int64 [rows, keep] | the new positions that want logits |
| `past_key_values.{i}.key/value` | float32 or int8 [rows, kv_heads, capacity, head_dim] | buffers |
| `past_state.{i}` | float32 [rows, ...] | kept by convolutions and recurrences |
| `window_start.{W}` | int32 [] | the token that layers with a window of W are shown first |
| `reads_prompt` | bool [] | with int8 keys: attend to the float32 ones below |
| `many_tokens` | bool [] | of a graph with two forms of its matrices: take the second |
| `prompt_key_values.{i}.key/value` | float32, as the past | with int8 keys: for prompts |

Outputs: `logits` float32 [rows, keep, vocab], and `present.{i}.key/value`, `present_state.{i}` and
`prompt_present.{i}.key/value`, which the engine binds to the memory of the inputs.

A graph says the same of its inputs and outputs as `GraphIO` does, in any order: names, types and
sizes, where a name stands for a size that changes from call to call.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from fastgen.errors import ModelError

GRAIN = 256  # tokens by which the engine moves what a layer with a window is shown first

PAST, PRESENT = "past_key_values", "present"
PROMPT_PAST, PROMPT_PRESENT = "prompt_key_values", "prompt_present"
HALVES = ("key", "value")
# numpy's names of the types, and ONNX's.
TYPES = {
    "float32": "tensor(float)",
    "int8": "tensor(int8)",
    "int32": "tensor(int32)",
    "int64": "tensor(int64)",
    "bool": "tensor(bool)",
}

Size = int | str  # of a dimension; a name where calls differ in it
Declared = tuple[str, str, Sequence[Any]]  # name, ONNX's type and shape, as a graph declares it


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of the graph.

    Attributes:
        dtype: numpy's name.
        shape: numbers, and names of sizes that change.
    """

    name: str
    dtype: str
    shape: tuple[Size, ...] = ()

    @property
    def type(self) -> str:
        """ONNX's name of the type, such as "tensor(float)"."""
        return TYPES[self.dtype]

    @classmethod
    def declared(cls, name: str, kind: str, shape: Sequence[Any]) -> TensorSpec:
        """An input or output as a graph declares it, of ONNX's type `kind`."""
        (dtype,) = (dtype for dtype, known in TYPES.items() if known == kind)
        return cls(name, dtype, tuple(shape))

    def zeros(self, **sizes: int) -> NDArray[Any]:
        """Zeros of this shape, with a number for each name."""
        shape = [size if isinstance(size, int) else sizes[size] for size in self.shape]
        return np.zeros(shape, self.dtype)


TOKENS = (
    TensorSpec("input_ids", "int64", ("rows", "new")),
    TensorSpec("position_ids", "int64", ("rows", "new")),
    TensorSpec("query_seqlens", "int32", ("rows",)),
    TensorSpec("seqlens_k", "int32", ("rows",)),
    TensorSpec("total_sequence_length", "int32"),
    TensorSpec("logits_positions", "int64", ("rows", "keep")),
)
READS_PROMPT = TensorSpec("reads_prompt", "bool")
MANY_TOKENS = TensorSpec("many_tokens", "bool")


class Pair(NamedTuple):
    """A buffer that the graph reads and writes: an input, and the output it becomes.

    Attributes:
        window: tokens that a query of the layer sees, itself included; None for all, and for what
            is no key or value.
    """

    past: TensorSpec
    present: TensorSpec
    window: int | None = None


def beside(spec: TensorSpec) -> TensorSpec:
    """The float32 keys or values, before or after a step, that stand beside those in int8."""
    kind, _, rest = spec.name.partition(".")
    name = {PAST: PROMPT_PAST, PRESENT: PROMPT_PRESENT}[kind]
    shape = (size if isinstance(size, int) else f"prompt_{size}" for size in spec.shape)
    return TensorSpec(f"{name}.{rest}", "float32", tuple(shape))


class Described(Protocol):
    """The model that a graph is made for, as `ModelInfo` describes it."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def layers(self) -> tuple[tuple[int, int], ...]: ...
    @property
    def states(self) -> tuple[tuple[int, ...], ...]: ...
    @property
    def windows(self) -> tuple[int | None, ...]: ...
    @property
    def cache_dtype(self) -> str: ...


@dataclass(frozen=True)
class GraphIO:
    """The inputs and outputs of one model's graph, by groups.

    Attributes:
        vocab_size: width of the logits.
        layers: (kv_heads, head_dim) of each layer with keys and values.
        states: shapes of what else is kept of a row, float32.
        windows: of each layer, the tokens that a query sees; None for all. Empty if all see all.
        cache_dtype: of the stored keys and values, "float32" or "int8".
        two_forms: whether it has its matrices in a second form too, for many tokens.
    """

    vocab_size: int
    layers: tuple[tuple[int, int], ...]
    states: tuple[tuple[int, ...], ...] = ()
    windows: tuple[int | None, ...] = ()
    cache_dtype: str = "float32"
    two_forms: bool = False

    @classmethod
    def of(cls, info: Described, two_forms: bool = False) -> GraphIO:
        """The graph of a model directory, by its `ModelInfo`."""
        known = (info.vocab_size, info.layers, info.states, info.windows, info.cache_dtype)
        return cls(*known, two_forms)

    @property
    def logits(self) -> TensorSpec:
        """The output float32 [rows, keep, vocab]."""
        return TensorSpec("logits", "float32", ("rows", "keep", self.vocab_size))

    @cached_property
    def key_values(self) -> dict[str, list[Pair]]:
        """Keys and values that are attended to, by their dtype: layer by layer, keys first.

        Beside int8 ones there are float32 ones, in which prompts are read.
        """
        stored = self._stored()
        if self.cache_dtype == "float32":
            return {"float32": stored}
        prompts = [Pair(beside(past), beside(present), window) for past, present, window in stored]
        return {self.cache_dtype: stored, "float32": prompts}

    def _stored(self) -> list[Pair]:
        windows = self.windows or (None,) * len(self.layers)
        pairs = []
        for i, ((heads, dim), window) in enumerate(zip(self.layers, windows, strict=True)):
            for half in HALVES:
                past, present = (
                    TensorSpec(
                        f"{kind}.{i}.{half}", self.cache_dtype, ("rows", heads, "capacity", dim)
                    )
                    for kind in (PAST, PRESENT)
                )
                pairs.append(Pair(past, present, window))
        return pairs

    @cached_property
    def state_pairs(self) -> list[Pair]:
        """States of convolutions and recurrences, float32 [rows, ...]."""
        return [
            Pair(
                TensorSpec(f"past_state.{i}", "float32", ("rows", *shape)),
                TensorSpec(f"present_state.{i}", "float32", ("rows", *shape)),
            )
            for i, shape in enumerate(self.states)
        ]

    @cached_property
    def window_starts(self) -> dict[int, TensorSpec]:
        """By window, in ascending order, the input that says where its layers begin."""
        windows = sorted({window for window in self.windows if window is not None})
        return {window: window_start(window) for window in windows}

    @property
    def reads_prompt(self) -> TensorSpec | None:
        """The input that says which keys and values are attended to, where there are two kinds."""
        return READS_PROMPT if len(self.key_values) > 1 else None

    @cached_property
    def inputs(self) -> list[TensorSpec]:
        """All inputs, in the order that the export gives them."""
        stored, *prompts = self.key_values.values()
        choice = [] if self.reads_prompt is None else [self.reads_prompt]
        return [
            *TOKENS,
            *(pair.past for pair in (*stored, *self.state_pairs)),
            *self.window_starts.values(),
            *choice,
            *(pair.past for pairs in prompts for pair in pairs),
            *([MANY_TOKENS] if self.two_forms else []),
        ]

    @cached_property
    def outputs(self) -> list[TensorSpec]:
        """All outputs, in the order that the export gives them."""
        stored, *prompts = self.key_values.values()
        pairs = [*stored, *self.state_pairs, *(pair for pairs in prompts for pair in pairs)]
        return [self.logits, *(pair.present for pair in pairs)]

    def check(self, graph: object, inputs: Iterable[Declared], outputs: Iterable[Declared]) -> None:
        """Compare what a graph declares with this.

        A shape that it does not declare (an empty one) can be any, and so can a size by name.

        Args:
            graph: what it is called in errors, such as its path.

        Raises:
            ModelError: a name is missing or unknown, or a type or a shape is another.
        """
        inputs, outputs = list(inputs), list(outputs)
        _check_names(graph, "inputs", inputs, self.inputs)
        _check_names(graph, "outputs", outputs, self.outputs)
        specs = {spec.name: spec for spec in (*self.inputs, *self.outputs)}
        _check_cache(graph, inputs, [pair.past for pair in self.key_values[self.cache_dtype]])
        for name, kind, shape in (*inputs, *outputs):
            if kind != specs[name].type:
                raise ModelError(f"{graph} has {name} as {kind}, expected {specs[name].type}")
            sizes = tuple(size if isinstance(size, int) else None for size in specs[name].shape)
            if not _fits(shape, sizes):
                raise ModelError(
                    f"{graph} has {name} of shape {shape}, fastgen.json says {sizes}: "
                    "copy or export the model again"
                )


def _check_names(
    graph: object, kind: str, declared: list[Declared], expected: list[TensorSpec]
) -> None:
    names, wanted = [name for name, _, _ in declared], [spec.name for spec in expected]
    if sorted(names) != sorted(wanted):
        odd = sorted(set(names) ^ set(wanted))
        raise ModelError(
            f"{graph} has {len(names)} {kind}, expected {len(wanted)}; "
            f"the difference: {', '.join(odd[:6])}"
        )


def _check_cache(graph: object, inputs: list[Declared], pasts: list[TensorSpec]) -> None:
    """Tell the type of all stored keys and values at once, if it is not the expected one."""
    names, expected = {spec.name for spec in pasts}, {spec.type for spec in pasts}
    kinds = {kind for name, kind, _ in inputs if name in names}
    if kinds != expected:
        raise ModelError(
            f"{graph} takes keys and values as {', '.join(sorted(kinds))}, "
            f"expected {', '.join(expected)}"
        )


def _fits(declared: Sequence[Any], expected: tuple[int | None, ...]) -> bool:
    """Tell if a declared shape, some of it by name, can be one with some sizes unknown (None)."""
    if not declared:
        return True
    return len(declared) == len(expected) and all(
        size == other or not isinstance(size, int) or other is None
        for size, other in zip(declared, expected, strict=True)
    )


_KEY_OR_VALUE = re.compile(rf"(?:{PAST}|{PRESENT})\.(\d+)\.({'|'.join(HALVES)})")


def layer_and_half(name: object) -> tuple[int, str] | None:
    """Read the name of a past or present key or value; None for other names.

    Returns:
        The layer, and "key" or "value".
    """
    match = _KEY_OR_VALUE.fullmatch(str(name))
    return None if match is None else (int(match[1]), match[2])


def window_start(window: int) -> TensorSpec:
    """The input that says which token layers with that window are shown first."""
    return TensorSpec(f"window_start.{window}", "int32")


def fed_tokens(
    ids: NDArray[np.int64], logits_positions: NDArray[np.int64], held: int = 0
) -> dict[str, NDArray[Any]]:
    """The inputs `TOKENS` for rows without padding after `held` tokens each.

    Args:
        ids: int64 [rows, new].
        logits_positions: int64 [rows, keep].
    """
    rows, new = ids.shape
    values: tuple[NDArray[Any], ...] = (
        ids,
        np.broadcast_to(np.arange(held, held + new), (rows, new)).copy(),
        np.full(rows, new, np.int32),
        np.full(rows, held + new - 1, np.int32),
        np.array(held + new, np.int32),
        logits_positions,
    )
    return {spec.name: value for spec, value in zip(TOKENS, values, strict=True)}


def first_shown(held: int, window: int, grain: int = GRAIN) -> int:
    """The token with which rows of at least `held` tokens begin for a layer with a window.

    It is the same for all that a chunk may begin with, which so adds up its sums alike.
    """
    return max(0, held // grain * grain - -(-window // grain) * grain)
