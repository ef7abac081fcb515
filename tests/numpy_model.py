"""Models that `pytest -m core` runs: the engine's contract in numpy, without a graph or an export.

A row is computed alone, a token at a time, so that what is said of it cannot depend on what runs
beside it: every difference between two ways to generate is the engine's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tiny import VOCAB

import fastgen
from fastgen.engine.cache import Cache
from fastgen.engine.model import Model
from fastgen.generator import Settings
from fastgen.store.graph_io import GRAIN
from fastgen.store.model_info import ModelInfo
from fastgen.store.tuning import Tuning

LAYERS = ((2, 4), (1, 4))  # kv_heads, head_dim
WINDOW = 8
STATE = 6

Array = NDArray[np.float32]


def info(windows: bool, states: bool, vocab: int, max_length: int) -> ModelInfo:
    return ModelInfo(
        precision="fp32",
        model_type="numpy",
        vocab_size=vocab,
        max_length=max_length,
        hard_limit=False,
        layers=LAYERS,
        files={},
        states=((STATE,),) if states else (),
        windows=(WINDOW, None) if windows else (),
    )


class NumpyModel(Model):
    """Attention over all tokens or the last `WINDOW`, and a recurrence, with random weights.

    Args:
        windows: whether the first layer sees a window.
        states: whether the model keeps a state besides keys and values.
        seed: of the weights.
    """

    def __init__(
        self,
        windows: bool = False,
        states: bool = False,
        vocab: int = VOCAB,
        seed: int = 0,
        max_length: int = 1024,
    ) -> None:
        self.directory = Path("numpy")
        self.info = info(windows, states, vocab, max_length)
        self.tuning = Tuning()
        self.many_from = self.codes = None
        self.grain = GRAIN
        self._spare: dict[str, Cache] = {}
        self.fingerprint = f"{windows} {states} {vocab} {seed}"
        random = np.random.default_rng(seed)
        self.width = width = sum(heads * dim for heads, dim in LAYERS) + STATE * states

        def weights(*shape: int) -> Array:
            return random.standard_normal(shape).astype(np.float32)

        self.embedding = weights(vocab, width)
        turns = np.arange(max_length)[:, None] / 5 * np.arange(1, width + 1)
        self.turns = (np.sin(turns) / 2).astype(np.float32)
        self.projections = [
            [weights(width, heads * dim) / 3 for _ in "qkv"] for heads, dim in LAYERS
        ]
        self.recurrence = weights(STATE, STATE) / 3, weights(width, STATE) / 3
        self.head = weights(width, vocab) / 2

    def forward(
        self,
        new: Sequence[NDArray[np.int64]],
        cache: Cache,
        first: int = 0,
        logits_positions: NDArray[np.int64] | None = None,
        many: bool | None = None,
    ) -> Array:
        """As `Model.forward`."""
        if logits_positions is None:
            logits_positions = np.array([[max(len(ids) - 1, 0)] for ids in new])
        logits = np.zeros((*logits_positions.shape, self.info.vocab_size), np.float32)
        for row, ids in enumerate(new):
            if not len(ids):
                continue
            if cache.lengths[first + row] == 0:
                cache.begin(first + row)
            hidden = self._hidden(ids.tolist(), cache, first + row)
            for place, position in enumerate(logits_positions[row].tolist()):
                logits[row, place] = hidden[position] @ self.head
        return logits

    def _hidden(self, ids: Sequence[int], cache: Cache, slot: int) -> list[Array]:
        """Append tokens to a slot: float32 [width] of each, what the head makes logits of."""
        kept = [view[0] for view in cache.slots(slot, 1)]
        layers = list(zip(LAYERS, self.projections, kept[::2], kept[1::2], strict=True))
        states = [state[0] for state in cache.states(slot, 1)]
        start = int(cache.lengths[slot])
        out = []
        for position, token in enumerate(ids, start):
            embedded, parts = self.embedded(token, position), []
            for layer, ((heads, dim), weights, keys, values) in enumerate(layers):
                query, key, value = ((embedded @ one).reshape(heads, dim) for one in weights)
                keys[:, position], values[:, position] = key, value
                seen = slice(self.first_seen(layer, position), position + 1)
                for head in range(heads):
                    shares = np.exp(keys[head, seen] @ query[head])
                    parts.append(shares @ values[head, seen] / shares.sum())
            for state in states:
                state[:] = self.next_state(state, embedded)
                parts.append(state.copy())
            out.append(np.concatenate(parts))
        cache.lengths[slot] += len(ids)
        return out

    def embedded(self, token: int, position: int) -> Array:
        """float32 [width]: a token, and where it stands."""
        return self.embedding[token] + self.turns[position]

    def first_seen(self, layer: int, position: int) -> int:
        window = self.info.windows[layer] if self.info.windows else None
        return 0 if window is None else max(0, position + 1 - window)

    def next_state(self, state: Array, embedded: Array) -> Array:
        across, along = self.recurrence
        return np.tanh(state @ across + embedded @ along)

    def logits_of(self, ids: Sequence[int]) -> NDArray[np.float64]:
        """float64 [length, vocab]: the logits after each token, with no cache: the reference."""
        inputs = np.array([self.embedded(token, at) for at, token in enumerate(ids)], float)
        position = np.arange(len(ids))
        out = []
        for layer, (heads, dim) in enumerate(LAYERS):
            first = np.array([self.first_seen(layer, at) for at in position])
            hidden = (position > position[:, None]) | (position < first[:, None])
            q, k, v = (
                (inputs @ weights).reshape(len(ids), heads, dim).swapaxes(0, 1)
                for weights in self.projections[layer]
            )
            scores = np.where(hidden, -np.inf, q @ k.swapaxes(1, 2))
            shares = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
            out.append((shares @ v).swapaxes(0, 1).reshape(len(ids), heads * dim))
        if self.info.states:
            state, states = np.zeros(STATE, np.float32), []
            for embedded in inputs:
                state = self.next_state(state, embedded)
                states.append(state)
            out.append(np.array(states))
        return np.concatenate(out, axis=1) @ self.head

    def logprobs_of(self, ids: Sequence[int]) -> NDArray[np.float64]:
        """float64 [length, vocab]: the log-probabilities after each token."""
        logits = self.logits_of(ids)
        logits -= logits.max(axis=1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


class NumpyLM(fastgen.CausalLM):
    """A `CausalLM` of a `NumpyModel`; it takes ids only."""

    def __init__(self, **changes: Any) -> None:
        self.model: NumpyModel = NumpyModel(**changes)
        self.directory, self.name_or_path = self.model.directory, "numpy"
        self.config = Settings({})
        self.generation_config = Settings({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
        self.has_tokenizer = False


KINDS = {
    "numpy": {},
    "numpy, windows": {"windows": True},
    "numpy, states": {"states": True},
}
