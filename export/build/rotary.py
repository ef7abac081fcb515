"""Frequencies of rotary embeddings, by what a configuration says: as transformers has them.

Methods: RoPE (arXiv:2104.09864), linear interpolation (arXiv:2306.15595), YaRN (arXiv:2309.00071),
LongRoPE (arXiv:2402.13753), and the smoothed scaling of Llama 3.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastgen.errors import UnsupportedModel
from fastgen.export.build.decoder import Rotary

ANGLES = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
# What each type reads besides.
KNOWN: dict[str, set[str]] = {
    "default": {"factor"},
    "linear": {"factor"},
    "dynamic": {"factor", "original_max_position_embeddings"},
    "ntk_alpha": {"alpha", "factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"},
    "llama3": {
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    },
    "yarn": {
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow",
        "mscale", "mscale_all_dim", "truncate",
    },
    "longrope": {
        "factor", "original_max_position_embeddings", "attention_factor", "short_factor",
        "long_factor", "short_mscale", "long_mscale",
    },
}  # fmt: skip


@dataclass(frozen=True)
class Turning:
    """A rotation of queries and keys, and the length above which it would be another."""

    rotary: Rotary
    limit: int | None = None


def turning(
    parameters: dict[str, Any], head_dim: int, positions: int, interleaved: bool = False
) -> Turning:
    """The rotation that `rope_parameters` say.

    Args:
        parameters: with "rope_type" and "rope_theta".
        positions: `max_position_embeddings`.

    Raises:
        UnsupportedModel: a type, or a setting of one, that is not known here.
    """
    kind = str(parameters["rope_type"])
    if kind not in KNOWN:
        raise UnsupportedModel(f"its rotations are of the type {kind!r}")
    unknown = (
        {name for name, value in parameters.items() if value is not None} - KNOWN[kind] - ANGLES
    )
    if unknown:
        raise UnsupportedModel(f"its rotations of the type {kind!r} have {sorted(unknown)}")
    partial = parameters.get("partial_rotary_factor")
    turned = int(head_dim * (1.0 if partial is None else partial))
    if turned < 2 or turned % 2:
        raise UnsupportedModel(f"its rotations turn {turned} of {head_dim} numbers of a head")
    scaling = SCALINGS.get(kind, _plain)
    inverse, scale, limit = scaling(parameters, turned, positions)
    return Turning(Rotary(inverse.astype(np.float32), float(scale), interleaved), limit)


Scaled = tuple[NDArray[np.float32], float, int | None]


def _powers(base: float, turned: int) -> NDArray[np.float32]:
    """base ** (2 i / turned)."""
    exponents = np.arange(0, turned, 2, dtype=np.float32) / np.float32(turned)
    return (float(base) ** exponents.astype(np.float64)).astype(np.float32)


def _inverse(base: float, turned: int) -> NDArray[np.float32]:
    return np.float32(1) / _powers(base, turned)


def _plain(parameters: dict[str, Any], turned: int, positions: int) -> Scaled:
    return _inverse(parameters["rope_theta"], turned), 1.0, None


def _linear(parameters: dict[str, Any], turned: int, positions: int) -> Scaled:
    return _inverse(parameters["rope_theta"], turned) / np.float32(parameters["factor"]), 1.0, None


def _dynamic(parameters: dict[str, Any], turned: int, positions: int) -> Scaled:
    """Up to the length that it was trained for it is like any other (see `rope`)."""
    return _inverse(parameters["rope_theta"], turned), 1.0, positions


def _alpha(parameters: dict[str, Any], turned: int, positions: int) -> Scaled:
    base = parameters["rope_theta"] * parameters["alpha"] ** (turned / (turned - 2))
    return _inverse(base, turned), 1.0, None


def _llama3(parameters: dict[str, Any], turned: int, positions: int) -> Scaled:
    inverse = _inverse(parameters["rope_theta"], turned)
    factor, low, high = (
        float(parameters[name]) for name in ("factor", "low_freq_factor", "high_freq_factor")
    )
    trained = parameters["original_max_position_embeddings"]
    length = (2 * math.pi / inverse).astype(np.float32)
    smooth = (np.float32(trained) / length - np.float32(low)) / np.float32(high - low)
    smoothed = (1 - smooth) * (inverse / np.float32(factor)) + smooth * inverse
    scaled = np.where(length > trained / low, inverse / np.float32(factor), inverse)
    between = ~(length < trained / high) & ~(length > trained / low)
    return np.where(between, smoothed, scaled), 1.0, None


def _yarn(parameters: dict[str, Any], turned: int, positions: int) -> Scaled:
    base, trained = parameters["rope_theta"], parameters["original_max_position_embeddings"]
    factor = parameters.get("factor")
    factor = positions / trained if factor is None else factor
    scale = parameters.get("attention_factor")
    if scale is None:
        mscale, mscale_all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
        scale = _mscale(factor)
        if mscale and mscale_all_dim:
            scale = _mscale(factor, mscale) / _mscale(factor, mscale_all_dim)

    def dimension(rotations: float) -> float:
        return turned * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = dimension(parameters.get("beta_fast") or 32)
    high = dimension(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, turned - 1)
    high += 0.001 if low == high else 0
    dimensions = np.arange(turned // 2, dtype=np.float32)
    kept = 1 - np.clip((dimensions - np.float32(low)) / np.float32(high - low), 0, 1)
    powers = _powers(base, turned)
    stretched = np.float32(1) / (np.float32(factor) * powers)
    return stretched * (1 - kept) + (np.float32(1) / powers) * kept, scale, None


def _mscale(factor: float, times: float = 1) -> float:
    return 1.0 if factor <= 1 else 0.1 * times * math.log(factor) + 1.0


def _longrope(parameters: dict[str, Any], turned: int, positions: int) -> Scaled:
    """Up to the first length, where short and long factors are not the same (see `rope`)."""
    trained = parameters["original_max_position_embeddings"]
    scale = parameters.get("attention_factor")
    factor = parameters.get("factor")
    factor = positions / trained if factor is None else factor
    if scale is None:
        scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(trained))
    factors = np.array(parameters["short_factor"], np.float32)
    if factors.shape != (turned // 2,):
        raise UnsupportedModel(f"its rotations have {len(factors)} factors for {turned} numbers")
    differs = any(
        parameters.get(f"short_{name}") != parameters.get(f"long_{name}")
        for name in ("factor", "mscale")
    )
    inverse = np.float32(1) / (factors * _powers(parameters["rope_theta"], turned))
    return inverse, scale, int(trained if differs else positions)


SCALINGS = {
    "linear": _linear, "dynamic": _dynamic, "ntk_alpha": _alpha, "llama3": _llama3, "yarn": _yarn,
    "longrope": _longrope,
}  # fmt: skip
