"""Grammars of calls: what an answer has to be, in llguidance's Lark, so that its calls are legal.

A format says how one call is written and what stands around several; here they become the grammar
of an answer in which a call has to come, or may.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastgen.sampling import constraint
from fastgen.serve.tools.reader import Marks
from fastgen.serve.tools.typed import DEEP, KINDS, kinds, target

Tools = Mapping[str, Any]  # the schema of the parameters of each tool, by its name
NUMBERS = ("minimum", "maximum", "multipleof")
BOUNDS = {"pattern", "minLength", "maxLength", "format"}
ONLY_OF_JSON = (
    "not", "if", "uniqueItems", "contains", "patternProperties", "dependentRequired",
    "dependentSchemas", "propertyNames", "minProperties", "maxProperties", "prefixItems", "allOf",
    "anyOf", "oneOf",
)  # fmt: skip
NESTED = 3  # levels of values of which nothing is said
SAYS = {"type", "properties", "items", "prefixItems", "not", "if", "allOf"}


class GrammarRules:
    """Rules of a grammar, as they are needed.

    Args:
        special: the id of each special token by its spelling: no text can write those.
    """

    def __init__(self, special: Mapping[str, int]) -> None:
        self.special = {text: token for text, token in special.items() if text}
        self._rules: dict[str, str] = {}

    def rule(self, text: str, kind: str = "r", settings: str = "") -> str:
        """The name of a rule that says `text`; one that is there already is used again."""
        for name, known in self._rules.items():
            if known == f"{settings}: {text}" and name.startswith(kind):
                return name
        name = f"{kind}{len(self._rules)}"
        self._rules[name] = f"{settings}: {text}"
        return name

    def named(self, name: str, text: str) -> str:
        """A rule whose name is known before what it says, as it may refer to itself."""
        self._rules[name] = f": {text}"
        return name

    def literal(self, text: str) -> str:
        """A text that has to come; special tokens in it are tokens."""
        if not text:
            return ""
        marks = sorted((mark for mark in self.special if mark in text), key=len, reverse=True)
        if not marks:
            return json.dumps(text, ensure_ascii=False)
        before, mark, after = text.partition(marks[0])
        parts = (self.literal(before), f"<[{self.special[mark]}]>", self.literal(after))
        return " ".join(filter(None, parts))

    def anything(self) -> str:
        """Any text, the empty one too, in which no special token is."""
        return f"{self.rule('/(?s:.+)/', 'ANY')}?"

    def has_special(self, mark: str) -> bool:
        """True where a special token is in a mark."""
        return bool(self._split(mark)[1])

    def until(self, mark: str, but: str = "") -> str:
        """Any text, and `mark`, which is not in it.

        Args:
            but: see `no_thought`.
        """
        before, rest = self._split(mark)
        if but and not rest:
            return self.rule(f"/(?s:.*){pattern(mark)}/{but}", "u", "[lazy]")
        if but and not before:
            return f"{self.rule(f'/(?s:.+)/{but}', 'BUT')}? {self.literal(rest)}"
        if but:
            return f"{self.rule(f'/(?s:.*){pattern(before)}/{but}', 'BUT')} {self.literal(rest)}"
        if not rest:
            suffix = f"[suffix={json.dumps(mark, ensure_ascii=False)}]"
            return self.rule("/(?s:.*)/", "u", suffix)
        if not before:
            return f"{self.anything()} {self.literal(rest)}"
        return f"{self.rule(f'/(?s:.*){pattern(before)}/', 'BEFORE')} {self.literal(rest)}"

    def bounded(self, inner: str, mark: str) -> str:
        """A text that matches a regular expression, and `mark`, which is not in it."""
        before, rest = self._split(mark)
        if not rest:
            matching, alone = f"/({inner}){pattern(mark)}/", f"~/(?s:.*){pattern(mark)}(?s:.+)/"
            return self.rule(f"{matching} & {alone}", "TEXT")
        return f"{self.rule(f'/({inner}){pattern(before)}/', 'TEXT')} {self.literal(rest)}"

    def without(self, mark: str, but: str = "") -> str:
        """Any text in which `mark` is not."""
        if self.has_special(mark):
            return f"{self.rule(f'/(?s:.+)/{but}', 'BUT')}?" if but else self.anything()
        inside = f"/(?s:.*){pattern(mark)}(?s:.*)/"
        return f"{self.rule(f'/(?s:.+)/ & ~{inside}{but}', 'WITHOUT')}?"

    def _split(self, mark: str) -> tuple[str, str]:
        """Split a mark before the first special token in it."""
        first = min((mark.find(one) for one in self.special if one in mark), default=len(mark))
        return mark[:first], mark[first:]

    def json(self, schema: Any) -> str:
        """JSON of a schema, in one line."""
        schema = {} if schema is True or schema is None else schema
        if isinstance(schema, dict):
            schema = {**schema, "x-guidance": constraint.JSON}
        return f"%json {json.dumps(schema)}"

    def choice(self, parts: Sequence[str]) -> str:
        return f"({' | '.join(parts)})" if len(parts) != 1 else parts[0]

    def text(self, start: str) -> str:
        """The grammar."""
        rules = (f"{name}{text}" for name, text in self._rules.items())
        return "\n".join([f"start: {start}", *rules]) + "\n"


def pattern(text: str) -> str:
    """A regular expression that matches a text, in llguidance's slashes."""
    return re.sub(r"([\\.+*?()|\[\]{}^$/&~-])", r"\\\1", text).replace("\n", "\\n")


def parameters_of(schema: Any) -> dict[str, Any]:
    """The schema of a tool's parameters, an object; of no properties where there is none.

    Raises:
        ValueError: it is no object.
    """
    if not isinstance(schema, dict) or not schema:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    if schema.get("type", "object") != "object":
        raise ValueError(f"parameters must be an object, got type {schema['type']!r}")
    closed: dict[str, Any] = _closed({"type": "object", **schema})
    return closed


OPEN = {
    "additionalProperties", "patternProperties", "unevaluatedProperties", "allOf", "anyOf", "oneOf",
    "$ref", "if", "not", "minProperties", "propertyNames", "dependentSchemas",
}  # fmt: skip


def _closed(schema: Any) -> Any:
    """A schema whose objects have the properties that they name and no others.

    A text of it is one of the schema that was given. Small models that may write any property do.
    """
    if not isinstance(schema, dict):
        return schema
    made = dict(schema)
    if isinstance(schema.get("items"), dict):
        made["items"] = _closed(schema["items"])
    properties = schema.get("properties")
    if isinstance(properties, dict) and not schema.keys() & OPEN:
        made["properties"] = {name: _closed(one) for name, one in properties.items()}
        required = schema.get("required")
        named = required if isinstance(required, list) else []
        made["additionalProperties"] = False
        made["properties"] |= {name: True for name in named if name not in properties}
    return made


def with_definitions(schema: Any, root: Any) -> Any:
    """A schema within another, with the definitions that it may refer to."""
    if not isinstance(schema, dict) or not isinstance(root, dict):
        return schema
    return {**{n: root[n] for n in ("$defs", "definitions") if n in root}, **schema}


# --- values that stand in no JSON ----------------------------------------------------------------


def members(root: Any, schema: Any) -> list[tuple[str, Any, bool]]:
    """The properties of an object: name, schema, and whether it has to be there.

    Raises:
        ValueError: it is held to more than its properties.
    """
    if isinstance(schema, dict) and isinstance(schema.get("$ref"), str):
        schema = target(schema["$ref"], root)
    if not isinstance(schema, dict):
        return []
    _check(schema)
    required = schema.get("required") or ()
    properties = dict(schema.get("properties") or {})
    for name in required:
        properties.setdefault(name, True)
    return [(name, one, name in required) for name, one in properties.items()]


def _check(schema: Mapping[str, Any]) -> None:
    """Raise a ValueError for a keyword that only JSON can be held to."""
    keyword = next((name for name in ONLY_OF_JSON if schema.get(name)), None)
    if keyword is not None:
        raise ValueError(f"{keyword} cannot be forced in this model's form of calls")


def options(schema: Any, root: Any, deep: int = 0) -> list[dict[str, Any]]:
    """The schemas of which a value fits one, each of one type where it says so.

    Raises:
        ValueError: a schema refers to itself without an end.
    """
    if deep > DEEP:
        raise ValueError("a schema refers to itself without an end")
    if not isinstance(schema, dict):
        return [{}]
    whole = schema.get("allOf")
    if isinstance(schema.get("$ref"), str):
        return options(target(schema["$ref"], root), root, deep + 1)
    if isinstance(whole, list) and len(whole) == 1:
        return options(whole[0], root, deep + 1)
    for name in ("anyOf", "oneOf"):
        if isinstance(schema.get(name), list):
            return [option for part in schema[name] for option in options(part, root, deep + 1)]
    if isinstance(schema.get("type"), list):
        return [{**schema, "type": kind} for kind in schema["type"]]
    return [schema]


def plain(form: GrammarRules, schema: Any, root: Any, close: str) -> str:
    """A value that is written as it is, if it is a text, or else in JSON; and the mark behind it.

    Raises:
        ValueError: what the text has to be cannot be said.
    """
    each = options(schema, root)
    if any(_is_any_text(one) for one in each):
        return form.until(close)
    return form.choice([_plain(form, one, root, close) for one in each])


def _plain(form: GrammarRules, schema: Mapping[str, Any], root: Any, close: str) -> str:
    end = form.literal(close)
    fixed = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(fixed, list):
        return form.choice([form.literal(_shown(one) + close) for one in fixed])
    if schema.get("type") == "string":
        return form.bounded(_pattern(schema), close)
    return f"{form.json(with_definitions(schema, root))} {end}"


def _is_any_text(schema: Mapping[str, Any]) -> bool:
    """True where every text is a value of a schema that is no alternative."""
    if "const" in schema or "enum" in schema:
        return False
    return not schema.keys() & SAYS or (
        schema.get("type") == "string" and not schema.keys() & BOUNDS
    )


def _pattern(schema: Mapping[str, Any]) -> str:
    """The regular expression of a text within bounds."""
    if "format" in schema and "pattern" not in schema:
        raise ValueError(
            f"a text of the format {schema['format']!r} cannot be forced in this model's form of "
            "calls: use a pattern"
        )
    if "pattern" in schema:
        inner = schema["pattern"]
        before = "" if inner.startswith("^") else "(?s:.*)"
        after = "" if inner.endswith("$") else "(?s:.*)"
        body = inner.removeprefix("^").removesuffix("$").replace("/", "\\/")
        return f"{before}({body}){after}"
    return f"(?s:.{{{schema.get('minLength', 0)},{schema.get('maxLength', '')}}})"


def _shown(value: Any) -> str:
    """A value as it is written where texts stand as they are."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _kinds_of(value: Any) -> set[str]:
    kind = KINDS[type(value)]
    return {kind, "number"} if kind == "integer" else {kind}


def by_kind(form: GrammarRules, schema: Any, root: Any, close: str) -> list[tuple[str, str]]:
    """The kinds of which a value may be, each with how it is written, and the mark behind it."""
    rules = []
    for option in options(schema, root):
        for kind in sorted(kinds(option, root)):
            if kind == "integer" and "number" in kinds(option, root):
                continue
            if {"const", "enum"} & option.keys():
                values = [option["const"]] if "const" in option else option["enum"]
                texts = [_shown(v) for v in values if kind in _kinds_of(v)]
                if not texts:
                    continue
                value = form.choice([form.literal(text + close) for text in texts])
            elif kind == "string":
                value = plain(form, {**option, "type": "string"}, root, close)
            else:
                whole = with_definitions({**option, "type": kind}, root)
                value = f"{form.json(whole)} {form.literal(close)}"
            rules.append((kind, f"({value})"))
    return rules


@dataclass(frozen=True)
class Dialect:
    """A notation of values that is nearly JSON.

    Attributes:
        words: for true, false and null.
        quote: what stands on both sides of a text, in which it cannot be; None for JSON's texts.
        quoted_keys: whether the names within objects stand in quotes.
        colon, comma: what stands between.
    """

    words: tuple[str, str, str]
    quote: str | None
    quoted_keys: bool
    colon: str
    comma: str

    def key(self, form: GrammarRules, name: str) -> str:
        if not self.quoted_keys:
            return form.literal(f"{name}{self.colon}")
        return form.literal(json.dumps(name, ensure_ascii=False) + self.colon)

    def string(self, form: GrammarRules, schema: Any) -> str:
        if self.quote is None:
            return form.json({**schema, "type": "string"} if isinstance(schema, dict) else schema)
        if isinstance(schema, dict) and schema.keys() & BOUNDS:
            return f"{form.literal(self.quote)} {form.bounded(_pattern(schema), self.quote)}"
        return f"{form.literal(self.quote)} {form.until(self.quote)}"

    def fixed(self, form: GrammarRules, value: Any) -> str:
        """A value that is given."""
        if isinstance(value, bool) or value is None:
            return form.literal(self.words[2 if value is None else 0 if value else 1])
        if isinstance(value, str):
            text = json.dumps(value, ensure_ascii=False)
            return form.literal(text if self.quote is None else f"{self.quote}{value}{self.quote}")
        if isinstance(value, list):
            inner = f" {form.literal(self.comma)} ".join(self.fixed(form, one) for one in value)
            return f'"[" {inner} "]"'
        if isinstance(value, dict):
            each = (f"{self.key(form, n)} {self.fixed(form, v)}" for n, v in value.items())
            inner = f" {form.literal(self.comma)} ".join(each)
            return f'"{{" {inner} "}}"'
        return form.literal(json.dumps(value))

    def value(self, form: GrammarRules, schema: Any, root: Any, deep: int = 0) -> str:
        """A value of a schema.

        Raises:
            ValueError: the schema is too deep to be written out.
        """
        if deep > 40:
            raise ValueError("a schema that refers to itself cannot be forced in this form")
        if not isinstance(schema, dict):
            schema = {}
        if isinstance(schema.get("$ref"), str):
            return self.value(form, target(schema["$ref"], root), root, deep + 1)
        whole = schema.get("allOf")
        if isinstance(whole, list) and len(whole) == 1:
            return self.value(form, whole[0], root, deep + 1)
        if "const" in schema or isinstance(schema.get("enum"), list):
            given = [schema["const"]] if "const" in schema else schema["enum"]
            return form.choice([self.fixed(form, one) for one in given])
        for name in ("anyOf", "oneOf"):
            if isinstance(schema.get(name), list):
                return form.choice([self.value(form, one, root, deep + 1) for one in schema[name]])
        parts = [self._of(form, kind, schema, root, deep) for kind in sorted(kinds(schema, root))]
        return form.choice([one for one in dict.fromkeys(parts) if one])

    def _of(self, form: GrammarRules, kind: str, schema: Any, root: Any, deep: int) -> str:
        if kind == "string":
            return self.string(form, schema)
        if kind == "boolean":
            return f"({form.literal(self.words[0])} | {form.literal(self.words[1])})"
        if kind == "null":
            return form.literal(self.words[2])
        if kind in ("integer", "number"):
            if kind == "integer" and "number" in kinds(schema, root):
                return ""
            bounds = {n: v for n, v in schema.items() if n.lower().endswith(NUMBERS)}
            return form.json({"type": kind, **bounds})
        if kind == "array":
            return self._array(form, schema, root, deep)
        if not schema.get("properties") and schema.get("additionalProperties", True):
            return self._free(form, schema.get("additionalProperties", True), root, deep)
        return f'"{{" {self.members(form, schema, root, deep)} "}}"'

    def _array(self, form: GrammarRules, schema: Any, root: Any, deep: int) -> str:
        _check(schema)
        low, high = schema.get("minItems", 0), schema.get("maxItems")
        if high == 0 or ("items" not in schema and deep > NESTED):
            return '"[]"'
        one = form.rule(self.value(form, schema.get("items", {}), root, deep + 1), "value")
        most = "" if high is None else high - 1
        items = f"{one} ({form.literal(self.comma)} {one}){{{max(low - 1, 0)},{most}}}"
        return f'"[" {items if low else f"({items})?"} "]"'

    def _free(self, form: GrammarRules, schema: Any, root: Any, deep: int) -> str:
        """An object of any names."""
        if deep > NESTED:
            return '"{}"'
        name = form.rule("/[A-Za-z_][A-Za-z0-9_]{0,40}/", "NAME")
        key = name if not self.quoted_keys else f'"\\"" {name} "\\""'
        value = self.value(form, schema, root, deep + 1)
        one = form.rule(f"{key} {form.literal(self.colon)} {value}", "pair")
        return f'"{{" ({one} ({form.literal(self.comma)} {one})*)? "}}"'

    def members(self, form: GrammarRules, schema: Any, root: Any, deep: int = 0) -> str:
        """The members of an object, those that have to be there and any of the others, in order."""
        pairs = [
            (f"{self.key(form, name)} {self.value(form, one, root, deep + 1)}", needed)
            for name, one, needed in members(root, schema)
        ]
        return separated(form, pairs, form.literal(self.comma))


def separated(form: GrammarRules, parts: Sequence[tuple[str, bool]], comma: str) -> str:
    """Parts in order with something between them, each with whether it has to be there."""
    tail, later = "", ""  # what may follow something, and what may begin
    for part, needed in reversed(parts):
        rule = form.rule(part, "member")
        after = f"{rule} {tail}".strip()
        begins = after if needed else f"({after} | {later})" if later else f"({after})?"
        follows = (
            f"{comma} {after}"
            if needed
            else f"({comma} {after} | {tail})"
            if tail
            else (f"({comma} {after})?")
        )
        tail, later = form.rule(follows, "tail"), form.rule(begins, "begin")
    return later


# --- answers -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AnswerOptions:
    """The parts that an answer may have, or must.

    Attributes:
        tools: those that may be called.
        forced: whether one has to be.
        several: whether several may be.
        reasoning: the marks of reasoning that may come first.
        inside: whether it has begun already.
        content: what an answer without calls has to be: an expression; None for any text.
    """

    tools: Tools
    forced: bool
    several: bool
    reasoning: Marks | None = None
    inside: bool = False
    content: str | None = None


SPACE = r"[ \n]{0,4}"  # what may stand before and after reasoning


def thought(form: GrammarRules, wanted: AnswerOptions) -> str:
    """The reasoning that may come, or has begun, up to its end."""
    marks = wanted.reasoning
    if marks is None:
        return ""
    space = form.rule(r"/[ \n]{1,4}/", "SPACE") + "?"
    end = f"{form.until(marks.end)} {space if wanted.forced else ''}"
    return end if wanted.inside else f"({space} {form.literal(marks.begin)} {end})?"


def no_thought(form: GrammarRules, wanted: AnswerOptions) -> str:
    """An addition to the regular expression of a text that may begin an answer.

    So that a text with the mark of reasoning is none but reasoning: within that, anything may be.
    """
    marks = wanted.reasoning
    if marks is None or wanted.inside or form.has_special(marks.begin):
        return ""
    return f" & ~/{SPACE}{pattern(marks.begin)}(?s:.*)/"


def answer(
    form: GrammarRules, wanted: AnswerOptions, mark: str, body: str, between: str, repeats: bool
) -> str:
    """The grammar of an answer.

    Args:
        mark: what calls begin with.
        body: what follows it: an expression.
        between: what stands between two of them, where they repeat the mark.
        repeats: whether they do.
    """
    first = thought(form, wanted)
    rest = form.rule(body, "calls")
    more = wanted.several and repeats
    again = f"({form.literal(between)} {form.literal(mark)} {rest})*" if more else ""
    call = f"{form.literal(mark)} {rest} {again}"
    if wanted.forced:
        return form.text(f"{first} {call}")
    if wanted.content is not None:
        return form.text(f"{first} ({wanted.content} | {call})")
    before, tail = form.until(mark), form.without(mark)
    free = f"({before} {rest})* {tail}" if more else f"({before} {rest} | {tail})"
    but = no_thought(form, wanted)
    if not but or wanted.reasoning is None:
        return form.text(f"{first} {free}")
    begin = form.rule(f"/{SPACE}{pattern(wanted.reasoning.begin)}/", "BEGIN")
    call = f"{form.until(mark, but)} {rest} {free if more else ''}"
    ends = form.without(mark, but)
    return form.text(f"{begin} {form.until(wanted.reasoning.end)} {free} | {call} | {ends}")
