"""JSON files of a model directory: they come from strangers, so what is read is checked."""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastgen.errors import ModelError

AGAIN = "copy or export the model again"  # what to do about a damaged file
POINTER = b"version https://git-lfs"  # how a file begins that only says where another one is
SHOWN = 3  # names in an error, at most
DEEPEST = 64  # objects and lists within each other; transformers' own files have about ten


def read(path: Path, advice: str = AGAIN) -> dict[str, Any]:
    """The object that a file holds; {} if there is no such file.

    Args:
        advice: what to do about a damaged one.

    Raises:
        ModelError: it is a pointer (see `check_fetched`), not Unicode, not JSON, not an object, or
            nested deeper than `DEEPEST`.
    """
    if not path.is_file():
        return {}
    check_fetched(path)
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        if re.search(r"\\u[dD]", text):  # half a character, which nothing can print or encode?
            json.dumps(content, ensure_ascii=False).encode()
    except ValueError as error:
        raise damaged(path, str(error), advice) from error
    except RecursionError as error:
        raise damaged(path, "it is nested too deep", advice) from error
    if not isinstance(content, dict):
        raise damaged(path, f"expected an object, got {reprlib.repr(content)}", advice)
    level: list[Any] = [content]
    for _ in range(DEEPEST):
        level = [inner for one in level for inner in _inside(one)]
    if level:
        raise damaged(path, f"it is nested deeper than {DEEPEST} levels", advice)
    return content


def check_fetched(*paths: Path) -> None:
    """Raise a ModelError if there are Git-LFS pointers among files, as a clone without it has.

    Each place that reads a file of strangers asks: what is not there, or no file, is none.
    """
    pointers = sorted({path for path in paths if path.is_file() and is_pointer(path)})
    if not pointers:
        return
    names = some([path.name for path in pointers])
    are = "is a Git-LFS pointer" if len(pointers) == 1 else "are Git-LFS pointers"
    raise ModelError(
        f"{names} in {pointers[0].parent} {are}, not the content itself: run `git lfs pull` there, "
        "or download it again"
    )


def some(names: Sequence[str]) -> str:
    """Names as an error tells them: the first few."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def is_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(POINTER)) == POINTER


def _inside(value: dict[str, Any] | list[Any]) -> list[Any]:
    """The objects and lists that an object or a list holds."""
    values = value.values() if isinstance(value, dict) else value
    return [inner for inner in values if isinstance(inner, dict | list)]


def take(
    content: Mapping[str, Any],
    path: Path,
    name: str,
    right: Callable[[Any], bool],
    expected: str,
    advice: str = AGAIN,
) -> Any:
    """A field of an object, if it is as `right` wants it.

    Args:
        content: the object, of the file `path` or within it.
        expected: what `right` is true of, in words.

    Raises:
        ModelError: it is not, or there is no such field.
    """
    if wrong := fault(content, name, right, expected):
        raise damaged(path, wrong, advice)
    return content[name]


def fault(
    content: Mapping[str, Any], name: str, right: Callable[[Any], bool], expected: str
) -> str | None:
    """The error in a field of an object (see `take`); None where there is none."""
    if name not in content:
        return f"it lacks {name}, expected {expected}"
    if not right(content[name]):
        return f"{name} must be {expected}, got {reprlib.repr(content[name])}"
    return None


def damaged(path: Path, what: str, advice: str = AGAIN) -> ModelError:
    """The error for a file that cannot be used: which one, what is wrong, what to do."""
    return ModelError(f"{path} is damaged ({what}): {advice}")


def is_object(value: Any) -> bool:
    return isinstance(value, dict)


def is_text(value: Any) -> bool:
    """True for a string that can be printed on a line."""
    return isinstance(value, str) and value.isprintable()


def is_count(value: Any, most: int, least: int = 1) -> bool:
    """True for an integer (True is none) from `least` to `most`."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_number(value: Any) -> bool:
    """True for a number that a float can hold: finite, and no True."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e300 and not math.isnan(value)


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write an object, indented, as UTF-8."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def parsed(line: str) -> dict[str, Any]:
    """The object that a line of JSON is.

    Raises:
        ValueError: it is none, has a name twice, a number that is none, or half a character.
    """
    try:
        value = json.loads(line, object_pairs_hook=_once, parse_constant=_no_number)
    except RecursionError as error:
        raise ValueError("not JSON: it is nested too deep") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"must be a JSON object, got {type(value).__name__}")
    if "\\u" in line:  # half a surrogate pair, which no file can hold?
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("holds half a character (a surrogate alone)") from error
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"has {twice!r} twice")
    return fields


def _no_number(name: str) -> Any:
    raise ValueError(f"not JSON: {name} is no number of JSON")


def finite(value: Any) -> Any:
    """A value for JSON, with None in place of every number that is not finite."""
    if isinstance(value, Mapping):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
