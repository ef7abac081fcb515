"""A decoder as data: a family describes it (`families`), and `graph` writes it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fastgen.errors import UnsupportedModel


@dataclass(frozen=True)
class Part:
    """A tensor of the checkpoint, or some of its outputs.

    Attributes:
        name: the tensor's.
        rows: (first, last + 1, of): in each `of` outputs those from `first` on; None for all.
        flat: whether it is stored [in, out], as GPT-2 has it; most are [out, in].
    """

    name: str
    rows: tuple[int, int, int] | None = None
    flat: bool = False


@dataclass(frozen=True)
class Linear:
    """A matrix to `width` outputs, and a vector that is added."""

    weight: Part
    width: int
    bias: Part | None = None


@dataclass(frozen=True)
class Norm:
    """A norm over the last dimension.

    Attributes:
        weight: of RMS norms 1 is added to it where `plus_one` says so.
        kind: RMSNorm, LayerNorm, or RMSNorm of what was centred (a LayerNorm without a bias).
    """

    weight: str
    eps: float
    kind: Literal["rms", "layer", "centred"] = "rms"
    bias: str | None = None
    plus_one: bool = False


@dataclass(frozen=True)
class Rotary:
    """Angles by position.

    Attributes:
        inverse: frequencies, float32 [turned / 2]; fewer than half a head turn a part of it.
        scale: of cosines and sines.
        interleaved: whether neighbours turn together, and not the halves.

    Raises:
        UnsupportedModel: a frequency or the scale is not finite.
    """

    inverse: NDArray[np.float32]
    scale: float = 1.0
    interleaved: bool = False

    def __post_init__(self) -> None:
        if not (np.isfinite(self.inverse).all() and np.isfinite(self.scale)):
            raise UnsupportedModel("its rotations turn by angles that are not finite")

    @property
    def key(self) -> tuple[bytes, float]:
        return self.inverse.tobytes(), self.scale


# Where queries and keys are normed: over all heads together; as [rows, new, heads, size]; as
# [rows, heads, new, size]; so after they were turned.
NormPlace = Literal["together", "split", "heads", "turned"]


@dataclass(frozen=True)
class Attention:
    """See `attention.Layer`; `rotary` is None where positions are not told.

    Attributes:
        clip: of queries, keys and values: none is larger.
        sinks: the tensor of a logit for each head, to which nothing belongs.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    query: Linear
    key: Linear
    value: Linear
    out: Linear
    rotary: Rotary | None = None
    window: int | None = None
    softcap: float = 0.0
    query_norm: Norm | None = None
    key_norm: Norm | None = None
    norm_place: NormPlace = "split"
    clip: float | None = None
    sinks: str | None = None


@dataclass(frozen=True)
class FeedForward:
    """down(act(up(x))), or down(act(gate(x)) * up(x))."""

    up: Linear
    down: Linear
    activation: str
    gate: Linear | None = None


@dataclass(frozen=True)
class Stack:
    """A matrix of each expert.

    Attributes:
        names: of the tensor [out, in] of each, or of the one [experts, out, in] of all.
        together: whether it is one.
        flat: whether that one is [experts, in, out].
    """

    names: tuple[str, ...]
    together: bool = False
    flat: bool = False


@dataclass(frozen=True)
class Experts:
    """Experts, of which a router gives each token to some: down(gate(first(x))) of each.

    Attributes:
        router: to a score for each expert.
        chosen: experts that a token goes to.
        width: of what is inside an expert.
        gate, up: the first matrix in two halves; `up` is None where `gate` has the rows of both.
        in_turns: whether these rows are in turns; else those of the gate come first.
        biases: of the first matrix, in one tensor (in turns) or in two, and of `down`.
        weighs: "all": weights are a softmax over all scores; "chosen": over those of the chosen.
        softmax_axis: the last of two, as the family's code names it.
        sums_to_one: whether the weights of the chosen are divided by their sum.
        alpha, beta, limit: of the gate, see `rewrite.mixture.Gate`.
        shared: what every token goes to besides.
        shared_gate: to one number a token, whose sigmoid the shared part is multiplied by.
    """

    router: Linear
    chosen: int
    width: int
    gate: Stack
    up: Stack | None
    down: Stack
    in_turns: bool = False
    biases: tuple[tuple[str, ...], str] | None = None
    weighs: Literal["all", "chosen"] = "all"
    softmax_axis: int = -1
    sums_to_one: bool = False
    alpha: float = 1.0
    beta: float = 0.0
    limit: float | None = None
    shared: FeedForward | None = None
    shared_gate: Linear | None = None


@dataclass(frozen=True)
class Layer:
    """Attention and a feed-forward part, which may be a mixture of experts.

    Attributes:
        before_attention, before_feed: norms of what goes in. Where the residual is parallel and
            `before_feed` is None, both parts get the same.
        after_attention, after_feed: norms of what comes out, or of the stream (`norms_stream`).
        parallel: "" for one after the other. Both parts read the stream and are added to it, in the
            order of these words.
        times: of what is added to the stream.
        norms_stream: whether the norms afterwards are of the stream itself.
    """

    attention: Attention
    feed: FeedForward | Experts
    before_attention: Norm | None = None
    after_attention: Norm | None = None
    before_feed: Norm | None = None
    after_feed: Norm | None = None
    parallel: Literal["", "stream attention feed", "attention feed stream"] = ""
    times: float = 1.0
    norms_stream: bool = False


@dataclass(frozen=True)
class Embedding:
    """Tokens to vectors of `width`.

    Attributes:
        times: of the vectors.
        positions: a learned table, from whose row `offset` on positions are counted.
        project: to the width of the layers, where that is another one.
    """

    table: str
    width: int
    times: float | None = None
    positions: str | None = None
    offset: int = 0
    project: Linear | None = None


@dataclass(frozen=True)
class Head:
    """Vectors to logits.

    Attributes:
        weight: a table [vocabulary, width]; None for the embedding's.
        project: to the width of the table, where that is another one.
        times, divide, cap: of the logits.
    """

    weight: str | None
    bias: str | None = None
    project: Linear | None = None
    times: float | None = None
    divide: float | None = None
    cap: float | None = None


@dataclass(frozen=True)
class Decoder:
    """A model.

    Attributes:
        vocabulary: ids that it reads and says.
        width: of the stream.
        limit: positions; None for any number.
        hard: whether it can compute none beyond.
        base: what the names of all tensors but the head's begin with, where a checkpoint is of
            the whole model.
        ignored: patterns of tensors that are in some checkpoints and mean nothing.
        also: what some checkpoints call a tensor.
    """

    vocabulary: int
    width: int
    embedding: Embedding
    layers: list[Layer]
    norm: Norm | None
    head: Head
    limit: int | None
    hard: bool = False
    base: str = "model."
    ignored: tuple[str, ...] = field(default=(r".*rotary_emb\.inv_freq",))
    also: dict[str, str] = field(default_factory=dict)
