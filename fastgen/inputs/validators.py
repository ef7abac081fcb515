"""Checks of what a caller passes as a number, a flag, a list of ids: one for each kind of value.

Each takes the name of what is checked and the value, and gives it back as plain Python or raises a
ValueError with the name, the rule and the value.
"""

from __future__ import annotations

import json
import math
import numbers
import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from fastgen.inputs import tensors

LARGEST = 3.4028234663852886e38  # that float32 holds


def shown(value: Any) -> str:
    """A value as an error quotes it: in one line, and not for long."""
    return " ".join(reprlib.repr(value).split())


def wrong(name: str, rule: str, value: Any) -> ValueError:
    return ValueError(f"{name} must be {rule}, got {shown(value)}")


def integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise wrong(name, "an integer", value)
    result = int(value.__index__())
    if not -(2**63) <= result < 2**63:
        raise wrong(name, "an integer of 64 bits", value)
    return result


def whole(name: str, value: Any) -> int:
    """An integer, or the float that is one: files of some models have 50.0."""
    is_whole = isinstance(value, float) and value.is_integer()
    return integer(name, int(value) if is_whole else value)


def number(name: str, value: Any) -> float:
    result = any_number(name, value)
    if not math.isfinite(result):
        raise wrong(name, "a finite number", value)
    return result


def any_number(name: str, value: Any) -> float:
    """A number that float32 holds; it may be infinite, but not nan."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise wrong(name, "a number", value)
    size: Any = abs(value)
    if value != value or LARGEST < size < math.inf:
        raise wrong(name, f"a number of at most {LARGEST:.2g}", value)
    return float(value)


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, numbers.Real) or value not in (0, 1):
        raise wrong(name, "True or False", value)
    return bool(value)


def text(name: str, value: Any) -> str:
    """A text that UTF-8 can write: without half a surrogate pair."""
    if not isinstance(value, str):
        raise wrong(name, "a text", value)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} holds {value[error.start]!r} at position {error.start}, which is no character "
            "of Unicode: decode the text with errors='replace'"
        ) from error
    return value


def _listed(name: str, rule: str, value: Any) -> Sequence[Any]:
    """A list, tuple or the like, of anything."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes | bytearray):
        raise wrong(name, rule, value)
    return value


def integers(name: str, value: Any) -> tuple[int, ...]:
    several = value if isinstance(value, list | tuple | range) else [value]
    return tuple(integer(name, item) for item in several)


def integer_lists(name: str, value: Any) -> tuple[tuple[int, ...], ...]:
    rule = "a list of non-empty lists of token ids"
    rows = [_listed(name, rule, plain(row)) for row in _listed(name, rule, value)]
    if not rows or not all(rows):
        raise wrong(name, rule, value)
    return tuple(tuple(integer(name, item) for item in row) for row in rows)


def strings(name: str, value: Any) -> tuple[str, ...]:
    rule = "a non-empty text or a list of them"
    several = (value,) if isinstance(value, str) else tuple(_listed(name, rule, value))
    if not several or not all(isinstance(one, str) and one for one in several):
        raise wrong(name, rule, value)
    return tuple(text(name, one) for one in several)


def seed(name: str, value: Any) -> int | tuple[int, ...]:
    if isinstance(value, list | tuple | range):
        return tuple(_one_seed(name, item) for item in value)
    return _one_seed(name, value)


def _one_seed(name: str, value: Any) -> int:
    """An integer that torch.manual_seed takes."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise wrong(name, "an integer, or a list of them", value)
    result = int(value.__index__())
    if not -(2**63) <= result < 2**64:
        raise wrong(name, "from -2**63 to 2**64 - 1", value)
    return result


def _pairs(name: str, rule: str, value: Any) -> list[Sequence[Any]]:
    """The pairs of a mapping, or of a list of pairs."""
    pairs = list(value.items()) if isinstance(value, Mapping) else _listed(name, rule, value)
    out = [_listed(name, rule, plain(pair)) for pair in pairs]
    if not all(len(pair) == 2 for pair in out):
        raise wrong(name, rule, value)
    return out


def biases(name: str, value: Any) -> tuple[tuple[tuple[int, ...], float], ...]:
    """{ids: bias} or [[ids, bias], ...], as SequenceBiasLogitsProcessor takes them."""
    rule = "{token ids: bias as a float} or a list of such pairs"
    pairs = _pairs(name, rule, value)
    if not pairs or not all(isinstance(bias, float) for _, bias in pairs):
        raise wrong(name, rule, value)
    return tuple((integer_lists(name, [ids])[0], any_number(name, bias)) for ids, bias in pairs)


def logit_bias(name: str, value: Any) -> tuple[tuple[int, float], ...]:
    """{token: bias}; JSON's text keys are taken as the ids that they spell."""
    pairs = _pairs(name, "{token id: bias} or a list of such pairs", value)
    return tuple((_spelt(name, token), any_number(name, bias)) for token, bias in pairs)


def _spelt(name: str, token: Any) -> int:
    spells = isinstance(token, str) and re.fullmatch(r"-?[0-9]{1,20}", token)
    return integer(name, int(token) if spells else token)


def decay(name: str, value: Any) -> tuple[int, float]:
    pair = _listed(name, "(start, factor)", value)
    if len(pair) != 2:
        raise wrong(name, "(start, factor)", value)
    return integer(name, pair[0]), number(name, pair[1])


def json_schema(name: str, value: Any) -> str:
    """A JSON schema, as an object, true (for anything) or the text of one; always as its text."""
    rule = "a JSON schema: an object, true, or the text of one"
    schema = _read(name, rule, text(name, value)) if isinstance(value, str) else value
    if schema is True:
        schema = {}
    if not isinstance(schema, Mapping):
        raise wrong(name, rule, value)
    try:
        written = json.dumps(schema, allow_nan=False, default=dict, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise wrong(name, rule, value) from error
    return text(name, written)


def _read(name: str, rule: str, value: str) -> Any:
    """The value of a JSON text."""
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        where = f"{error.msg} at line {error.lineno}, column {error.colno}"
        raise ValueError(f"{name} must be {rule}, got {shown(value)}: {where}") from error
    except (ValueError, RecursionError) as error:
        raise wrong(name, rule, value) from error


def early_stopping(name: str, value: Any) -> bool | str:
    if isinstance(value, str) and value == "never":
        return value
    if not isinstance(value, numbers.Real) or value not in (0, 1):
        raise wrong(name, "True, False or 'never'", value)
    return bool(value)


def plain(value: Any) -> Any:
    """Arrays and tensors as lists (of no dimension: as a number); everything else as it is."""
    return tensors.array(value).tolist() if hasattr(value, "tolist") else value
