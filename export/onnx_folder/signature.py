"""The inputs and outputs of a graph that others exported, and values to feed it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from fastgen.errors import UnsupportedModel

IDS = "input_ids"
MASK = "attention_mask"
POSITIONS = "position_ids"
BRANCH = "use_cache_branch"  # of merged decoders: whether there is a past
LOGITS = "logits"
# How many positions want logits; 0 for all, where the tool says so.
KEEP = ("num_logits_to_keep", "logits_to_keep")

PICTURES = (
    "pixel_values",
    "inputs_embeds",
    "image_features",
    "audio_features",
    "input_features",
    "pixel_attention_mask",
    "image_attention_mask",
)
ENCODED = ("encoder_hidden_states", "encoder_attention_mask", "decoder_input_ids")
STATES = re.compile(r"(conv|ssm|recurrent|state)", re.IGNORECASE)
PAST = re.compile(r"^past(?:_key_values)?[._](\d+)[._](?:self[._])?(key|value|k|v)$")
JOINED = re.compile(r"^past.*key_value$")
PRESENT = re.compile(r"^present(?:_key_values)?[._](\d+)[._](?:self[._])?(key|value|k|v)$")


@dataclass(frozen=True)
class Signature:
    """The inputs and outputs of a graph by what they mean.

    Attributes:
        past: names of the inputs for the past: a layer's key, its value, the next layer's.
        present: of the outputs, likewise.
        shapes: of the inputs for the past; None where a dimension has a name.
        dtypes: numpy's, of all inputs.
        inputs: the names of the others.
    """

    past: list[str]
    present: list[str]
    shapes: list[tuple[int | None, ...]]
    dtypes: dict[str, np.dtype[Any]]
    inputs: list[str] = field(default_factory=list)

    @property
    def layers(self) -> int:
        return len(self.past) // 2

    def feeds(
        self,
        ids: NDArray[np.int64],
        past: list[NDArray[Any]],
        keep: int | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Inputs for new tokens `ids` [rows, new] after `past`, without padding."""
        rows, new = ids.shape
        held = past[0].shape[2]
        known: dict[str, NDArray[Any]] = {
            IDS: ids,
            MASK: np.ones((rows, held + new), np.int64),
            POSITIONS: np.broadcast_to(np.arange(held, held + new), (rows, new)).copy(),
            BRANCH: np.array([held > 0]),
            **dict.fromkeys(KEEP, np.array(new if keep is None else keep)),
        }
        fed = {name: known[name].astype(self.dtypes[name]) for name in self.inputs}
        return fed | dict(zip(self.past, past, strict=True))

    def single(self) -> Signature:
        """That of the same graph in single precision."""
        wide = {
            name: np.dtype(np.float32) if kind.itemsize == 2 and kind.kind not in "iu" else kind
            for name, kind in self.dtypes.items()
        }
        inputs = [name for name in self.inputs if name != BRANCH]
        return replace(self, dtypes=wide, inputs=inputs)

    def heads(self) -> tuple[tuple[int, int], ...]:
        """(kv_heads, head_dim) of each layer."""
        keys = ((shape[1], shape[3]) for shape in self.shapes[::2])
        return tuple((heads or 0, size or 0) for heads, size in keys)

    def nothing(self, rows: int, length: int = 0) -> list[NDArray[Any]]:
        """A past of `length` tokens of zeros."""
        return [
            np.zeros((rows, shape[1] or 0, length, shape[3] or 0), self.dtypes[name])
            for name, shape in zip(self.past, self.shapes, strict=True)
        ]


def read(graph: ir.Graph, heads: tuple[int, int] | None = None) -> Signature:
    """The signature of a graph.

    Args:
        graph: of a decoder with a past.
        heads: key heads and their size as the folder's configuration has them, for graphs whose
            inputs do not say.

    Raises:
        UnsupportedModel: it is of another kind; the message says of which.
    """
    names = [str(value.name) for value in graph.inputs]
    _refuse(names)
    past = _numbered(names, PAST)
    present = _numbered([str(value.name) for value in graph.outputs], PRESENT)
    if joined := [name for name in names if JOINED.search(name)]:
        raise UnsupportedModel(f"it keeps keys and values in one ({joined[0]})")
    if not past:
        raise UnsupportedModel(
            f"its graph keeps no keys and values: it takes {', '.join(names)}. A graph with a past "
            "is needed (optimum calls its task text-generation-with-past)"
        )
    if list(past) != list(present):
        odd = sorted(set(past) ^ set(present))
        raise UnsupportedModel(f"keys and values that come do not go, or not as they came: {odd}")
    if LOGITS not in [value.name for value in graph.outputs]:
        raise UnsupportedModel("its graph has no output 'logits'")
    inputs = [name for name in names if name not in past.values()]
    unknown = [n for n in inputs if n not in (IDS, MASK, POSITIONS, BRANCH, *KEEP)]
    if unknown or IDS not in inputs:
        raise UnsupportedModel(f"its graph takes {', '.join(unknown) or 'no input_ids'}")
    by_name = {str(value.name): value for value in graph.inputs}
    shapes = [_shape(by_name[name], heads) for name in past.values()]
    return Signature(
        list(past.values()),
        list(present.values()),
        shapes,
        {name: value.dtype.numpy() for name, value in by_name.items() if value.dtype is not None},
        inputs,
    )


def _refuse(names: list[str]) -> None:
    """Refuse what is no decoder of texts, by the names of its inputs."""
    if matching := [name for name in names if name in PICTURES]:
        raise UnsupportedModel(
            f"it takes {matching[0]}: it is a part of a model of pictures or sounds, and its text "
            "part alone is not whole"
        )
    if matching := [name for name in names if name in ENCODED or ".encoder." in name]:
        raise UnsupportedModel(f"it takes {matching[0]}: it is a part of an encoder-decoder")
    if matching := [name for name in names if name.startswith("past") and STATES.search(name)]:
        raise UnsupportedModel(
            f"it keeps states besides keys and values ({matching[0]}): folders of hybrids are not "
            "opened; export the transformers model"
        )


def _numbered(names: list[str], pattern: re.Pattern[str]) -> dict[tuple[int, str], str]:
    """Names by layer and kind, layer by layer, keys first."""
    numbered = {}
    for name in names:
        if match := pattern.match(name):
            numbered[int(match[1]), "key" if match[2].startswith("k") else "value"] = name
    return dict(sorted(numbered.items()))


def _shape(value: ir.Value, heads: tuple[int, int] | None) -> tuple[int | None, ...]:
    """[None, heads, None, size] of a past."""
    if value.shape is None or len(value.shape) != 4:
        raise UnsupportedModel(
            f"{value.name} has the shape {value.shape}, expected [rows, heads, past, size]"
        )
    known = [dim if isinstance(dim, int) else None for dim in value.shape]
    for axis, given in zip((1, 3), heads or (None, None), strict=True):
        known[axis] = known[axis] or given
    if known[1] is None or known[3] is None:
        raise UnsupportedModel(
            f"{value.name} has the shape {value.shape}, and no config.json says how many heads"
        )
    return None, known[1], None, known[3]
