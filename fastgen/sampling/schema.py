"""JSON schemas as llguidance can hold a text to them: exactly, or with an error that says why not.

llguidance reads every number as a float and leaves out no keyword that it does not know. So numbers
that a float has not are refused where they are to be written, and are moved inwards where they are
a bound; keywords that rule nothing out are taken away. A text of what is left is a text of the
schema that was given.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from typing import Any, TypeGuard
from urllib.parse import unquote

EXACT = 2**53  # up to here a float has every integer
LARGEST = 2**63 - 1024  # the largest float below 2**63, where llguidance's integers end
DIGITS = 15  # of a decimal that is the same again after it was a float
PLACES = 22  # powers of ten up to this one are floats, so what is read with them is read exactly
ALONE = 10**18  # llguidance cannot write "from here on" beyond it
MOST_MULTIPLE = 2**32  # its `multipleOf` are 32 bits wide, and overflow in silence when joined

# What llguidance holds a text to. Others (JSON Schema: "annotations") are told about, and left out.
FORMATS = frozenset({
    "date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "unknown", "uri",
    "uuid",
})  # fmt: skip

SCHEMA = (
    "additionalItems", "additionalProperties", "contains", "contentSchema", "else", "if", "items",
    "not", "propertyNames", "then", "unevaluatedItems", "unevaluatedProperties",
)  # fmt: skip
SCHEMAS = ("allOf", "anyOf", "items", "oneOf", "prefixItems")
NAMED = ("dependencies", "dependentSchemas", "patternProperties", "properties")
ELSEWHERE = ("$defs", "definitions")  # schemas that hold only where something refers to them

# Keywords that rule nothing out when they have one of these values.
IDLE: dict[str, tuple[Any, ...]] = {
    "uniqueItems": (False,),
    "minContains": (0,),
    "minProperties": (0,),
    "not": (False,),
    "propertyNames": (True, {}),
    "unevaluatedItems": (True, {}),
    "unevaluatedProperties": (True, {}),
    "dependencies": ({},),
    "dependentRequired": ({},),
    "dependentSchemas": ({},),
}

# Below and above: (the bound, the one that excludes it, which way is inwards).
SIDES = (("minimum", "exclusiveMinimum", 1), ("maximum", "exclusiveMaximum", -1))


def prepared(text: str) -> tuple[str, list[str]]:
    """A schema that says the same to llguidance, and what had to be left out of it.

    Args:
        text: a JSON schema.

    Raises:
        ValueError: it says something that no text could be held to.
    """
    root = json.loads(text)
    _refuse_wrapper(root)
    notes: list[str] = []
    nodes = [*_subschemas(root)]
    for node in nodes:
        _check_values(node)
        _leave_out(node, notes)
        _bounds(node, notes)
    _check_multiples(nodes)
    _check_ends(root, nodes)
    return json.dumps(root, ensure_ascii=False), [*dict.fromkeys(notes)]


def within(grammar: str) -> tuple[str, list[str]]:
    """A Lark grammar whose `%json` schemas are prepared."""
    notes: list[str] = []
    parts, at = [], 0
    for start, end, schema in embedded(grammar):
        written, more = prepared(json.dumps(schema, allow_nan=False))
        parts += [grammar[at:start], written]
        notes, at = notes + more, end
    return "".join([*parts, grammar[at:]]), [*dict.fromkeys(notes)]


def embedded(grammar: str) -> Iterator[tuple[int, int, Any]]:
    """The `%json` schemas of a Lark grammar: where each begins and ends, and what it is."""
    at = 0
    for match in re.finditer(r"%json\s*(?=\{)", grammar):
        if match.start() < at:
            continue
        try:
            schema, at = json.JSONDecoder().raw_decode(grammar, match.end())
        except ValueError:  # within a text, or no JSON: llguidance says what is wrong
            continue
        yield match.end(), at, schema


def strict(schema: Any) -> Any:
    """A schema as OpenAI's `strict: true` reads it: objects have the properties that it names, all
    of them, and no others.

    Raises:
        ValueError: it asks for what `strict` excludes, as with OpenAI.
    """
    root = json.loads(json.dumps(schema))
    says = {"$ref", "allOf", "anyOf", "const", "enum", "oneOf", "properties", "type"}
    for node in _subschemas(root):
        if not says & node.keys():
            raise ValueError("strict: every schema must have a type; {} is anything")
        if len(node.get("allOf", ())) > 1 or ("allOf" in node and "properties" in node):
            raise ValueError("strict: allOf joins objects of which each has to be closed")
        kinds = node.get("type", "object" if "properties" in node else None)
        if kinds != "object" and not (isinstance(kinds, list) and "object" in kinds):
            continue
        for name in ("additionalProperties", "patternProperties"):
            if node.get(name):
                raise ValueError(f"strict: {name} must be left out: no others may be there")
        node |= {"additionalProperties": False, "required": [*node.get("properties", {})]}
    return root


# -- The schemas within a schema ------------------------------------------------------------------


def _parts(node: dict[str, Any], elsewhere: bool = True) -> Iterator[Any]:
    """The schemas that stand in one."""
    for name in SCHEMA:
        yield node.get(name)
    for name in SCHEMAS:
        yield from node[name] if isinstance(node.get(name), list) else ()
    for name in (*NAMED, *(ELSEWHERE if elsewhere else ())):
        yield from node[name].values() if isinstance(node.get(name), dict) else ()


def _subschemas(root: Any, elsewhere: bool = True) -> Iterator[dict[str, Any]]:
    """All schemas within one, itself too, and what they refer to; each once."""
    seen, rest = set(), [root]
    while rest:
        node = rest.pop()
        if not isinstance(node, dict) or id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        rest += [*_parts(node, elsewhere), _target(root, node)]


def _target(root: Any, node: dict[str, Any]) -> Any:
    """The target of a schema's `$ref` within the root; None where there is none."""
    reference = node.get("$ref")
    if not isinstance(reference, str) or "#" not in reference:
        return None
    _, _, pointer = reference.partition("#")
    target = root
    for part in unquote(pointer).split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        if isinstance(target, list) and part.isdigit() and int(part) < len(target):
            target = target[int(part)]
        elif isinstance(target, dict):
            target = target.get(part)
        else:
            return None
    return target if pointer == "" or pointer.startswith("/") else None


# -- What rules nothing out -----------------------------------------------------------------------


def _leave_out(node: dict[str, Any], notes: list[str]) -> None:
    """Take away what does not bear on a text: annotations, and keywords that allow everything."""
    for name, idle in IDLE.items():
        if any(node.get(name) == one and type(node.get(name)) is type(one) for one in idle):
            del node[name]
    if "if" not in node or not {"then", "else"} & node.keys():
        for name in ("if", "then", "else"):
            node.pop(name, None)
    if "contains" not in node:
        for name in ("minContains", "maxContains"):
            node.pop(name, None)
    kinds = node.get("type", "string")
    named = node.get("format")
    if not isinstance(named, str) or named in FORMATS:
        return
    if kinds == "string" or (isinstance(kinds, list) and "string" in kinds):
        del node["format"]
        notes.append(f"format {_shown(named)} is an annotation: texts are not held to it")


# -- Numbers --------------------------------------------------------------------------------------


def _check_values(node: dict[str, Any]) -> None:
    """Raise a ValueError for a number to be written whose digits llguidance would change."""
    rest = [("const", node.get("const")), ("enum", node.get("enum"))]
    while rest:
        name, value = rest.pop()
        if isinstance(value, dict):
            rest += [(name, one) for one in value.values()]
        elif isinstance(value, list):
            rest += [(name, one) for one in value]
        elif _is_number(value) and not _is_exact(value):
            raise ValueError(
                f"{name} has the number {_shown(value)}, whose digits cannot all be written: "
                f"integers are exact up to {EXACT} (2**53), others to {DIGITS} digits; a text "
                f'("{_shown(value)}") is'
            )


def _is_exact(value: int | float) -> bool:
    """True where llguidance writes this number and no neighbour of it."""
    if isinstance(value, float) and repr(value).endswith(".0"):  # which is a digit too
        return _is_read_exactly(Decimal(repr(value)))
    if value == int(value):
        return abs(value) <= LARGEST and float(value) == int(value)
    return _is_read_exactly(Decimal(repr(value)))


def _is_read_exactly(value: Decimal) -> bool:
    """True where the simplest of readers takes a decimal for the float next to it."""
    _, digits, exponent = value.as_tuple()
    significand = int("".join(map(str, digits)))
    return significand < EXACT and isinstance(exponent, int) and abs(exponent) <= PLACES


def _bounds(node: dict[str, Any], notes: list[str]) -> None:
    """Move the bounds of a number inwards, to where llguidance can hold a text to them."""
    kinds = node.get("type")
    whole = kinds == "integer" or (
        isinstance(kinds, list) and "integer" in kinds and "number" not in kinds
    )
    for name, exclusive, inwards in SIDES:
        if node.get(exclusive) is True and _is_number(node.get(name)):  # as draft 4 writes it
            node[exclusive] = node.pop(name)
        for one in (name, exclusive):
            if _is_number(node.get(one)) and not _holds(node[one]):
                _move(node, name, one, inwards, whole, notes)
    for (name, exclusive, inwards), (other, excluded, _) in zip(SIDES, SIDES[::-1], strict=True):
        own = [node[one] for one in (name, exclusive) if _is_number(node.get(one))]
        if any(one * inwards >= ALONE for one in own) and not {other, excluded} & node.keys():
            node[other] = _inwards(inwards * LARGEST, -inwards, whole)


def _holds(bound: int | float) -> bool:
    return abs(bound) < EXACT and (bound == int(bound) or _is_read_exactly(Decimal(repr(bound))))


def _move(
    node: dict[str, Any], name: str, given: str, inwards: int, whole: bool, notes: list[str]
) -> None:
    """Put in place of the bound `given` one that includes its value and lies no further out."""
    bound = node.pop(given)
    if bound * inwards > LARGEST:
        raise ValueError(
            f"{given} {_shown(bound)} leaves no number that can be written: they go from "
            f"-{LARGEST} to {LARGEST}"
        )
    if abs(bound) > 2**63 and bound * inwards < 0:
        notes.append(f"{given} {_shown(bound)} is beyond 2**63: numbers end there")
    nearest = max(bound * inwards, -LARGEST) * inwards
    step = 1 if given != name and nearest == bound else 0
    if step and (whole or abs(bound) >= EXACT):  # what is excluded: from the next integer on
        nearest, step = (math.floor(nearest) if inwards > 0 else math.ceil(nearest)) + inwards, 0
    moved = _inwards(nearest, inwards, whole)
    known = node.get(name)
    kept = given if step else name
    if kept == name and _is_number(known):
        moved = max(moved * inwards, known * inwards) * inwards
    node[kept] = moved


def _inwards(bound: int | float, inwards: int, whole: bool) -> int | float:
    """The number at or inside a bound that is the same as a float, as an integer and in digits."""
    rounding = ROUND_CEILING if inwards > 0 else ROUND_FLOOR
    exact = Decimal(bound) if isinstance(bound, int) else Decimal(repr(bound))
    if whole:
        integer = int(exact.to_integral_value(rounding))
        while float(integer) != integer:
            integer = int(math.nextafter(integer, inwards * math.inf))
            integer = integer if (integer - exact) * inwards >= 0 else integer + inwards
        return integer
    for digits in range(DIGITS, 0, -1):
        near = Context(prec=digits, rounding=rounding).create_decimal(exact)
        if abs(near) < EXACT:
            places = Decimal(1).scaleb(-PLACES)
            fine = (
                near
                if _is_read_exactly(near)
                else near.quantize(places, rounding, Context(prec=99))
            )
            return float(fine)
        if float(near) == near and abs(near) <= LARGEST:
            return int(near)
    raise AssertionError(bound)  # one digit is exact


def _check_multiples(nodes: list[dict[str, Any]]) -> None:
    """Raise a ValueError where `multipleOf` that meet have too large a common multiple."""
    beside = ("$ref", "anyOf", "oneOf")
    meet = any(
        "allOf" in node or (len(node) > 1 and any(n in node for n in beside)) for node in nodes
    )
    multiples = {node["multipleOf"] for node in nodes if _is_number(node.get("multipleOf"))}
    if len(multiples) < 2 or not meet:
        return
    exact = [Decimal(repr(multiple)) for multiple in sorted(multiples)]
    scale = Decimal(10) ** max(0, *(-int(multiple.as_tuple().exponent) for multiple in exact))
    if math.prod(int(multiple * scale) for multiple in exact) >= MOST_MULTIPLE:
        raise ValueError(
            f"multipleOf: {', '.join(map(_shown, sorted(multiples)))} have too large a common "
            "multiple"
        )


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


# -- What cannot be -------------------------------------------------------------------------------


def _refuse_wrapper(root: dict[str, Any]) -> None:
    """Raise a ValueError for what OpenAI's clients put around a schema."""
    inner = root.get("json_schema", root) if root.get("type") == "json_schema" else root
    wraps = isinstance(inner, dict) and {"schema"} <= inner.keys() <= {
        "name",
        "description",
        "strict",
        "schema",
    }
    if wraps and isinstance(inner["schema"], dict):
        raise ValueError(
            "this is OpenAI's wrapper of a schema, which goes into response_format: pass what "
            'stands under "schema"'
        )


def _check_ends(root: Any, nodes: list[dict[str, Any]]) -> None:
    """Raise a ValueError for a reference that leads back to itself before anything is written."""
    ends: set[int] = set()

    def does(node: Any) -> bool:
        return not isinstance(node, dict) or id(node) in ends

    open_, before = nodes[::-1], -1
    while len(open_) != before:
        before = len(open_)
        for node in open_:
            if does(_target(root, node)) and _may_end(node, does):
                ends.add(id(node))
        open_ = [node for node in open_ if id(node) not in ends]
    for node in _subschemas(root, elsewhere=False):
        if id(node) not in ends and "$ref" in node:
            raise ValueError(
                f"$ref {_shown(node['$ref'])} leads back to itself: no text of it comes to an end"
            )


def _may_end(node: dict[str, Any], does: Callable[[Any], bool]) -> bool:
    """True where a value of the schema comes to an end, where that is known of its parts."""

    def listed(name: str) -> list[Any]:
        return node[name] if isinstance(node.get(name), list) else []

    needed = listed("allOf")
    if node.get("type") == "object" and isinstance(node.get("properties"), dict):
        needed = needed + [node["properties"].get(str(name)) for name in listed("required")]
    least = node.get("minItems")
    if node.get("type") == "array" and isinstance(least, int) and least > 0:
        first = listed("prefixItems")[:least]
        needed = needed + first + ([node.get("items")] if len(first) < least else [])
    options = [listed(name) for name in ("anyOf", "oneOf") if listed(name)]
    return all(map(does, needed)) and all(any(map(does, some)) for some in options)


def _shown(value: Any) -> str:
    """A value of a schema within an error, shortened."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
