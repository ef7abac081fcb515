"""A knob: all that is said of it stands in its field of `Params`.

Its kind says how a value is checked and how it is written on a command line and in JSON; its rule
says which values of that kind may be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import Field, dataclass, field
from typing import Any, Literal

from fastgen.inputs import validators

Notation = Literal["bool", "int", "float", "text", "json"]


@dataclass(frozen=True)
class Kind:
    """A kind of value.

    Attributes:
        check: (name, value) -> the value as plain Python; raises a ValueError.
        notation: of the value: as a flag of two names, a number, a text, or as JSON.
        repeats: whether its flag on a command line may be given several times, a text each.
    """

    check: Callable[[str, Any], Any]
    notation: Notation = "json"
    repeats: bool = False


INTEGER = Kind(validators.integer, "int")
NUMBER = Kind(validators.number, "float")
FLAG = Kind(validators.flag, "bool")
TEXT = Kind(validators.text, "text")
INTEGERS = Kind(validators.integers)
ANY = Kind(lambda name, value: value)


@dataclass(frozen=True)
class Rule:
    """The values that may be: in words for an error, and as a test."""

    words: str
    holds: Callable[[Any], bool]


POSITIVE = Rule("positive", lambda value: value > 0)
NOT_NEGATIVE = Rule("zero or more", lambda value: value >= 0)
FRACTION = Rule("between 0 and 1", lambda value: 0 <= value <= 1)
CUTOFF = Rule("at least 0, below 1", lambda value: 0 <= value < 1)


def knob(
    default: Any, help: str, *, kind: Kind, rule: Rule | None = None, like: str = "transformers"
) -> Any:
    """Make a field of `Params`.

    Args:
        help: the flag's line of help, and the row's of docs/knobs.md.
        like: whose meaning it has.
    """
    return field(default=default, metadata={"help": help, "kind": kind, "rule": rule, "like": like})


def kind_of(field: Field[Any]) -> Kind:
    """The kind of a knob, by its field."""
    kind: Kind = field.metadata["kind"]
    return kind


def checked(field: Field[Any], value: Any) -> Any:
    """The value of a knob as plain Python; None, which is "not set", as it is.

    Raises:
        ValueError: it is not of the knob's kind, or breaks its rule.
    """
    if value is None:
        return None
    value = kind_of(field).check(field.name, validators.plain(value))
    rule: Rule | None = field.metadata["rule"]
    if rule is not None and not rule.holds(value):
        raise validators.wrong(field.name, rule.words, value)
    return value
