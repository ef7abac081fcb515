"""torch's tensors, without importing torch: nobody has one who has not imported it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def module() -> Any:
    """torch, if the caller has imported it; else None."""
    return sys.modules.get("torch")


def is_tensor(value: Any) -> bool:
    torch = module()
    return torch is not None and isinstance(value, torch.Tensor)


def array(value: Any) -> Any:
    """A tensor as the array that shares its memory, where it can; anything else as it is.

    Raises:
        ValueError: it is sparse, or has a shape only ("meta").
    """
    if not is_tensor(value):
        return value
    torch = module()
    if value.layout is not torch.strided or value.device.type == "meta":
        kind = value.layout if value.layout is not torch.strided else "a meta tensor"
        raise ValueError(f"a tensor must be dense and hold its values, got {kind}")
    value = value.detach().cpu().resolve_conj().resolve_neg()
    # numpy has no bfloat16, nor torch's smaller floats.
    known = value.dtype in (torch.float16, torch.float32, torch.float64)
    return (value.float() if value.dtype.is_floating_point and not known else value).numpy()


def tensor(value: NDArray[Any]) -> Any:
    """An array as the tensor that shares its memory."""
    return module().from_numpy(np.ascontiguousarray(value))


def bridged(name: str, functions: Any, to_tensors: bool) -> list[Callable[..., Any]]:
    """A caller's functions, so that all take arrays and give none of torch's tensors back.

    transformers' own classes (its processors, stopping criteria and what is derived from them)
    always work on tensors; other functions do where the ids came as a tensor.

    Args:
        name: what the caller passed them as.
        functions: one, a sequence of them (such as a `LogitsProcessorList`), or None.
        to_tensors: whether the ids came as a tensor.

    Raises:
        ValueError: one of them cannot be called.
    """
    if functions is None:
        return []
    several = functions if isinstance(functions, Sequence) else [functions]
    for one in several:
        if not callable(one):
            raise ValueError(
                f"{name} must be callable, or a list of callables, got {type(one).__name__}"
            )
    return [_Bridge(one) if to_tensors or of_transformers(one) else one for one in several]


def of_transformers(value: Any) -> bool:
    """True for an object of a class of transformers, or of one that is derived from one."""
    return any(kind.__module__.partition(".")[0] == "transformers" for kind in type(value).__mro__)


def _tensors(value: Any) -> Any:
    """Arrays, also those in a tuple, as tensors."""
    if isinstance(value, tuple):
        return tuple(map(_tensors, value))
    return tensor(value) if isinstance(value, np.ndarray) else value


class _Bridge:
    """A function of tensors as a function of arrays; its attributes are the function's own."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.__name__ = str(getattr(function, "__name__", type(function).__name__))

    def __call__(self, *values: Any) -> Any:
        return array(self._function(*map(_tensors, values)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._function, name)

    def __repr__(self) -> str:
        return repr(self._function)
