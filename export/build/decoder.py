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
    """See `attention.Layer`; `rotary` is None where positions are not told."""

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


@dataclass(frozen=True)
class FeedForward:
    """down(act(up(x))), or down(act(gate(x)) * up(x))."""

    up: Linear
    down: Linear
    activation: str
    gate: Linear | None = None


@dataclass(frozen=True)
class Layer:
    """Attention and a feed-forward part.

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
    feed: FeedForward
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
