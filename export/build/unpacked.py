"""Tensors of a quantised checkpoint: the numbers that transformers makes of them in float32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastgen.errors import ModelError, UnsupportedModel
from fastgen.export.build import weights
from fastgen.export.build.weights import Mapped, Tensor
from fastgen.export.source import quantised

USUAL = (128, 128)  # a block of FP8, where the configuration does not say
BLOCKS, SCALES, INVERSE = "_blocks", "_scales", "_scale_inv"


def _small(codes: NDArray[np.int32], bits: int, bias: int) -> NDArray[np.float32]:
    """Floats of a sign, an exponent and `bits` of a mantissa."""
    exponent, mantissa = codes >> bits, codes % (1 << bits)
    whole = (mantissa + (exponent > 0) * (1 << bits)).astype(np.float32)
    values: NDArray[np.float32] = np.ldexp(whole, np.maximum(exponent, 1) - bias - bits)
    return values


def _signed(positive: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.concatenate([positive, -positive])


# The numbers of each byte: two of e2m1, the lower half first, as one of 64 bits (which is found six
# times faster than a row of two); a power of two (e8m0); one of e4m3.
_FOURS = _signed(_small(np.arange(8, dtype=np.int32), 1, 1))
PAIRS = np.stack(np.meshgrid(_FOURS, _FOURS), axis=-1).view(np.uint64).reshape(256)
POWERS = np.append(np.ldexp(np.float32(1), np.arange(255) - 127), np.float32(np.nan))
EIGHTS = _signed(np.append(_small(np.arange(127, dtype=np.int32), 3, 7), np.float32(np.nan)))


def _of_eights(held: NDArray[np.uint8]) -> NDArray[np.float32]:
    return EIGHTS[held]


# Types of safetensors that a method has besides those of `weights`.
TYPES: dict[str, weights.Types] = {
    quantised.MXFP4: {"U8": ("|u1", weights.as_it_is)},
    quantised.FP8: {"F8_E4M3": ("|u1", _of_eights)},
}


def of_directory(directory: Path, said: Mapping[str, Any] | None) -> dict[str, Tensor]:
    """All tensors of a directory's safetensors files, under transformers' names.

    Args:
        said: the `quantization_config` of its config.json.

    Raises:
        UnsupportedModel, ModelError: see `weights.of_safetensors` and `quantised.method`; and
            what is quantised contradicts itself.
    """
    method = quantised.method(said)
    found = weights.of_safetensors(directory, TYPES.get(method or "", {}))
    if method == quantised.MXFP4:
        return _of_pairs(found)
    if method == quantised.FP8 and said is not None:
        return _of_scaled(found, said.get("weight_block_size", USUAL))
    return dict(found)


@dataclass(frozen=True)
class Mxfp4:
    """Matrices [experts, in, out] whose columns lie in blocks. See `Tensor`.

    Attributes:
        blocks: two numbers a byte, [experts, out, in / 32, 16].
        scales: a power of two for each block.
    """

    blocks: NDArray[np.uint8]
    scales: NDArray[np.uint8]

    @property
    def shape(self) -> tuple[int, ...]:
        experts, out, blocks, size = self.blocks.shape
        return experts, blocks * size * 2, out

    def read(self, rows: slice) -> NDArray[np.float32]:
        values = PAIRS[self.blocks[rows]].view(np.float32)  # [experts, out, in / 32, 32]
        values *= POWERS[self.scales[rows]][..., None]
        return values.reshape(*values.shape[:2], -1).swapaxes(1, 2)


@dataclass(frozen=True)
class Scaled:
    """A matrix with a scale for each of its blocks. See `Tensor`.

    Attributes:
        scales: [rows / block[0], columns / block[1]]; the last blocks may be smaller.
    """

    inner: Tensor
    scales: NDArray[np.float32]
    block: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    def read(self, rows: slice) -> NDArray[np.float32]:
        height, width = self.block
        down = np.arange(*rows.indices(self.shape[0])) // height
        scales = np.repeat(self.scales, width, axis=1)[:, : self.shape[1]]
        return self.inner.read(rows) * scales[down]


def _of_pairs(found: Mapping[str, Mapped]) -> dict[str, Tensor]:
    """The tensors, those in blocks under the name of the matrix that they are."""
    floats: dict[str, Tensor] = {
        name: one for name, one in found.items() if one.held.dtype != np.uint8
    }
    packed = {name: one.held for name, one in found.items() if name not in floats}
    for name in [name for name in packed if name.endswith(BLOCKS)]:
        matrix = name.removesuffix(BLOCKS)
        blocks, scales = packed[name], packed.get(matrix + SCALES)
        if scales is None:
            raise ModelError(f"it is not whole: it lacks {matrix}{SCALES}")
        if blocks.ndim != 4 or scales.shape != blocks.shape[:-1]:
            raise _contradicting(matrix + SCALES, scales.shape, name, blocks.shape)
        floats[matrix] = Mxfp4(blocks, scales)
    return floats


def _of_scaled(found: Mapping[str, Mapped], size: Any) -> dict[str, Tensor]:
    """The tensors, those of 8 bits with their scales.

    Args:
        size: of a block; None where a matrix has one scale.
    """
    out: dict[str, Tensor] = dict(found)
    for name in [name for name, one in found.items() if one.convert is _of_eights]:
        scales, shape = found.get(name + INVERSE), found[name].shape
        if scales is None:
            raise ModelError(f"it is not whole: it lacks {name}{INVERSE}")
        if len(shape) != 2:
            raise UnsupportedModel(f"{name} is quantised in {len(shape)} dimensions")
        block = _block(size) or shape
        grid = -(-shape[0] // block[0]), -(-shape[1] // block[1])
        if scales.shape not in ((grid,) if _block(size) else ((), (1,), grid)):
            raise _contradicting(name + INVERSE, scales.shape, name, shape)
        del out[name + INVERSE]
        values = np.reshape(scales.convert(scales.held), grid)
        out[name] = Scaled(found[name], values, (block[0], block[1]))
    return out


def _block(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    if not (isinstance(size, list | tuple) and len(size) == 2):
        raise UnsupportedModel(f"its config.json has weight_block_size = {size!r}")
    if not all(type(one) is int and one > 0 for one in size):
        raise UnsupportedModel(f"its config.json has weight_block_size = {size!r}")
    return size[0], size[1]


def _contradicting(
    scales: str, has: tuple[int, ...], matrix: str, shape: tuple[int, ...]
) -> ModelError:
    return ModelError(
        f"it contradicts itself: {scales} is {list(has)} where {matrix} is {list(shape)}"
    )
