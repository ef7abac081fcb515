"""torch's tensors, without importing torch: nobody has one who has not imported it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def array(value: Any) -> Any:
    """A tensor as the array that shares its memory; anything else as it is."""
    return value.detach().cpu().numpy() if is_tensor(value) else value


def tensor(value: NDArray[Any]) -> Any:
    """An array as the tensor that shares its memory."""
    return sys.modules["torch"].from_numpy(np.ascontiguousarray(value))


def bridged(functions: Any, to_tensors: bool) -> list[Callable[..., Any]]:
    """A caller's functions, so that all take arrays and give none of torch's tensors back.

    transformers' own classes (its processors, stopping criteria and what is derived from them)
    always work on tensors; other functions do where the ids came as a tensor.

    Args:
        functions: one, a sequence of them (such as a `LogitsProcessorList`), or None.
        to_tensors: whether the ids came as a tensor.
    """
    if functions is None:
        return []
    several = functions if isinstance(functions, Sequence) else [functions]
    return [_Bridge(one) if to_tensors or _of_transformers(one) else one for one in several]


def _of_transformers(value: Any) -> bool:
    return any(kind.__module__.partition(".")[0] == "transformers" for kind in type(value).__mro__)


class _Bridge:
    """A function of tensors as a function of arrays; its attributes are the function's own."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.__name__ = str(getattr(function, "__name__", type(function).__name__))

    def __call__(self, *values: Any) -> Any:
        given = [tensor(v) if isinstance(v, np.ndarray) else v for v in values]
        return array(self._function(*given))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._function, name)

    def __repr__(self) -> str:
        return repr(self._function)
