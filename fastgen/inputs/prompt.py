"""The ids of a call, whatever they came as: left-padded rows, and which of their tokens count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastgen.inputs import tensors, validators

PADDED_ON_THE_RIGHT = (
    "a row is padded on the right: it continues after its last token (transformers would continue "
    "after the padding); pad on the left"
)


@dataclass(frozen=True)
class Prompts:
    """The rows of one call.

    Attributes:
        ids: int64 [rows, width], as given; a ragged list is padded on the left.
        mask: bool [rows, width], False for padding. What is masked is as if it were not there:
            for left padding that is what transformers computes too.
        kind: of what came in and goes out: "list", "numpy" or "torch".
        cautions: what the caller is to be warned of.
    """

    ids: NDArray[np.int64]
    mask: NDArray[np.bool_]
    kind: str
    cautions: tuple[str, ...] = ()

    @property
    def rows(self) -> list[NDArray[np.int64]]:
        """The tokens of each row without its padding."""
        return [row[kept] for row, kept in zip(self.ids, self.mask, strict=True)]

    @property
    def pads(self) -> NDArray[np.int64]:
        """Leading padding of each row [rows]."""
        return np.asarray(self.mask.argmax(axis=1), np.int64)

    def give_back(self, sequences: NDArray[np.int64]) -> Any:
        """`sequences` in the kind that came in."""
        return sequences.tolist() if self.kind == "list" else self.array(sequences)

    def array(self, array: NDArray[Any]) -> Any:
        """An array as a torch tensor if one came in, else as it is."""
        return tensors.tensor(array) if self.kind == "torch" else array


def read(
    ids: Any,
    attention_mask: Any = None,
    *,
    vocab_size: int,
    pad_token_id: int | None,
    eos_token_id: Sequence[int] | None,
) -> Prompts:
    """Check and align the ids of a call.

    Without a mask, one is inferred as transformers does: padding is where `pad_token_id` stands,
    if it occurs and is not also an end-of-text token. (A list of rows that differ in length is
    padded here, so its mask is known.) Unlike there, a row that is padded on the right continues
    after its last real token; `cautions` says so.

    Args:
        ids: a list of ints, a (ragged) list of lists, an integer array of one or two
            dimensions, or a torch tensor.
        attention_mask: like `ids`, 1 for tokens and 0 for padding.

    Raises:
        ValueError: an empty prompt, an id outside the vocabulary, another shape or dtype.
    """
    array, kind, lengths = _matrix(ids, _padding(pad_token_id, eos_token_id))
    if attention_mask is not None:
        mask = _mask(attention_mask, array.shape)
    elif lengths is not None:
        mask = np.arange(array.shape[1]) >= array.shape[1] - lengths[:, None]
    else:
        mask = np.ones(array.shape, np.bool_)
        if pad_token_id is not None and pad_token_id not in (eos_token_id or ()):
            inferred = array != pad_token_id
            mask = inferred if not inferred.all() else mask
    empty = np.flatnonzero(~mask.any(axis=1))
    if len(empty):
        raise ValueError(f"row {empty[0]} of the prompt is empty: every row needs a token")
    bad = (array < 0) | (array >= vocab_size)
    bad &= mask
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise ValueError(
            f"token id {array[row, column]} (row {row}, position {column}) is outside the "
            f"vocabulary of {vocab_size}"
        )
    return Prompts(array, mask, kind, () if mask[:, -1].all() else (PADDED_ON_THE_RIGHT,))


def _padding(pad_token_id: int | None, eos_token_id: Sequence[int] | None) -> int:
    if pad_token_id is not None:
        return pad_token_id
    return eos_token_id[0] if eos_token_id else 0


def _matrix(ids: Any, padding: int) -> tuple[NDArray[np.int64], str, NDArray[np.int64] | None]:
    """`ids` as int64 [rows, width], its kind, and the lengths of listed rows that differ in it."""
    if tensors.is_tensor(ids):
        return _checked(tensors.array(ids)), "torch", None
    if isinstance(ids, np.ndarray):
        return _checked(ids), "numpy", None
    if not _is_list(ids):
        raise ValueError(
            f"ids must be a list, an array or a tensor of token ids, got {type(ids).__name__}"
        )
    if not len(ids):
        raise ValueError("the prompt is empty: it needs at least one token")
    if not _is_list(ids[0]) and np.ndim(tensors.array(ids[0])) == 0:
        return _checked(np.array([_integers(ids, "ids")])), "list", None
    rows = [_integers(row, f"row {i}") for i, row in enumerate(ids)]
    lengths = np.array([len(row) for row in rows])
    if not lengths.all():
        raise ValueError(f"row {lengths.argmin()} of the prompt is empty: every row needs a token")
    array = np.full((len(rows), lengths.max()), padding, np.int64)
    for out, row in zip(array, rows, strict=True):
        out[len(out) - len(row) :] = row
    return array, "list", None if (lengths == lengths[0]).all() else lengths


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)


def _integers(row: Any, what: str) -> list[int]:
    """A row of ids of any kind, a list, an array or a tensor, as Python's integers."""
    row = tensors.array(row)
    if isinstance(row, np.ndarray):
        if row.ndim != 1:
            raise ValueError(f"{what} must be a list of token ids, got shape {row.shape}")
        return list(_checked(row, what)[0].tolist()) if row.size else []
    if not _is_list(row):
        raise ValueError(f"{what} must be a list of token ids, got {validators.shown(row)}")
    ids = list(row) if set(map(type, row)) <= {int} else [_index(item, what) for item in row]
    if ids and not (min(ids) >= -(2**63) and max(ids) < 2**63):
        raise ValueError(f"{what} must hold integers of 64 bits, got {validators.shown(row)}")
    return ids


def _index(value: Any, what: str) -> int:
    """An integer of numpy's or torch's, of no dimension, as Python's."""
    value = tensors.array(value)
    if isinstance(value, bool | np.bool_) or not hasattr(value, "__index__") or np.ndim(value):
        raise ValueError(f"{what} must hold integers, got {validators.shown(value)}")
    if isinstance(value, np.ndarray) and value.dtype.kind not in "iu":
        raise ValueError(f"{what} must hold integers, got {value.dtype}")
    return int(value)


def _checked(array: NDArray[Any], what: str = "ids") -> NDArray[np.int64]:
    """An array of ids as int64 [rows, width]."""
    if isinstance(array, np.ma.MaskedArray):
        raise ValueError(f"{what} is a masked array: pass its data, and its mask as attention_mask")
    if array.dtype.kind not in "iu":
        raise ValueError(f"{what} must be integers, got {array.dtype}")
    if array.size == 0:
        raise ValueError(f"the prompt is empty (shape {array.shape}): it needs at least one token")
    if array.ndim not in (1, 2):
        raise ValueError(f"{what} must have 1 or 2 dimensions, got shape {array.shape}")
    if array.dtype.kind == "u" and array.max() >= 2**63:
        raise ValueError(f"{what} must hold integers of 64 bits, got {array.max()}")
    return np.atleast_2d(array).astype(np.int64)


def _mask(attention_mask: Any, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """bool of that shape from 0 and 1, or False and True."""
    try:
        mask = np.atleast_2d(np.asarray(tensors.array(attention_mask)))
    except (TypeError, ValueError) as error:
        raise ValueError(f"attention_mask must be rectangular: {error}") from error
    if isinstance(attention_mask, np.ma.MaskedArray) or mask.dtype.kind not in "biuf":
        kind = type(attention_mask).__name__
        raise ValueError(f"attention_mask must hold 0 and 1, got {kind} of {mask.dtype}")
    if mask.shape != shape:
        raise ValueError(f"attention_mask has shape {mask.shape}, the ids have {shape}")
    if not np.isin(mask, (0, 1)).all():
        raise ValueError("attention_mask must hold 0 and 1 only")
    return mask.astype(np.bool_)
