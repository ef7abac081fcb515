"""The sandbox of chat templates: jinja2's immutable one, with an end to time and memory.

jinja2's own sandbox keeps a template away from Python, but not from loops within loops or from
`'a' * 10**10`. Here every rendering has a `Meter`, and what a template does in loops, calls,
filters, operators and output is led past it: its syntax tree is rewritten so before it is compiled.
No value is ever larger than `LARGEST`, so that no single step of Python's takes long.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, generate_lorem_ipsum
from jinja2.visitor import NodeTransformer

MOST = 10**8  # characters that a rendering makes, all in all
LARGEST = 10**7  # of one value, what it holds included
ITEM = 8  # characters that a part of a value counts for besides
SOURCE = 10**5  # characters of a template
BITS = 10**5  # of an integer
WORDS = 10**4  # of lipsum
WIDEST = 10**4  # of a width, a depth or a precision
OF_JINJA = ("_loop_vars", "_block_vars")  # keywords that jinja2 itself adds to calls
METER = "the meter"  # in the context; no template can name it

# Methods and filters whose numbers are widths, and what of a text they widen: each of these.
WIDENING = {
    "batch": None, "center": None, "expandtabs": "\t", "indent": "\n", "ljust": None,
    "rjust": None, "round": None, "slice": None, "to_bytes": None, "zfill": None,
}  # fmt: skip
# Widths in formats that are too wide, or are computed.
WIDE_PERCENT = re.compile(r"%(\([^)]*\))?[^a-zA-Z%]*(\d{5}|\*)")
WIDE_BRACES = re.compile(r"\{[^{}]*:[^{}]*(\d{5}|\{)")


# jinja2 need not be there when types are checked.
in_context: Callable[[Callable[..., Any]], Callable[..., Any]] = pass_context


class TooCostly(TemplateError):  # type: ignore[misc,unused-ignore]
    """A template that does more than it may."""


class Meter:
    """The work of one rendering so far, and its limits.

    Args:
        seconds: that it may take.
    """

    def __init__(self, seconds: float) -> None:
        self.made, self.seconds, self.end = 0, seconds, time.monotonic() + seconds

    def charge(self, amount: int) -> None:
        """Count what is about to be made; raises `TooCostly` at the end of time or room."""
        self.made += 1 + max(amount, 0)
        if amount > LARGEST or self.made > MOST:
            raise TooCostly(f"it makes more than {min(MOST, LARGEST):,} characters")
        if time.monotonic() > self.end:
            raise TooCostly(f"it takes more than {self.seconds:g} seconds")

    def passed(self, value: Any) -> Any:
        """A value that was made, if it is not too large; an iterator counts its items."""
        if isinstance(value, Iterator):
            return self.counted(value)
        self.charge(len(value) if isinstance(value, str | bytes | list | tuple | dict) else 0)
        if size(value) > LARGEST:
            raise TooCostly(f"it makes a value of more than {LARGEST:,} characters")
        return value

    def counted(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.charge(0)
            yield item


def size(value: Any) -> int:
    """Of plain data, each part as often as it would be written out; not far beyond LARGEST."""
    total, left = 0, [value]
    while left and total <= LARGEST:
        one = left.pop()
        total += ITEM + len(one) if isinstance(one, str | bytes) else ITEM
        if isinstance(one, dict):
            left += [*one.keys(), *one.values()]
        elif isinstance(one, list | tuple | set | frozenset | ItemsView | KeysView | ValuesView):
            left.extend(one)
    return total


def grown(name: str, of: Any, given: list[Any]) -> int:
    """The most that a method or filter can make of a value; 0 for those that make no more than it.

    Args:
        name: of the method or filter.
        of: what it is called on.
        given: its arguments, those with a name too.
    """
    texts = [str(one) for one in given if isinstance(one, str | int)]
    if name in WIDENING:
        width = sum(abs(one) for one in given if isinstance(one, int))
        if width > WIDEST:
            raise TooCostly(f"{name} has a width of more than {WIDEST:,}")
        char = WIDENING[name]
        return (1 + str(of).count(char) if char else 1) * (width + sum(map(len, texts)))
    if name == "tojson":
        return size(of) * (1 + sum(min(abs(one), LARGEST) for one in given if isinstance(one, int)))
    if name == "replace" and len(texts) > 1:
        return str(of).count(texts[0]) * len(texts[1])
    if name in ("format", "format_map"):
        return formatted(str(of), given)
    if name in ("translate", "urlize", "wordwrap"):
        return size(of) * size(given)
    return 0


def formatted(text: str, given: Any) -> int:
    """The most that a format can make of its arguments."""
    if WIDE_PERCENT.search(text) or WIDE_BRACES.search(text):
        raise TooCostly(f"a format has a width of more than {WIDEST:,}, or a computed one")
    return (1 + text.count("{") + text.count("%")) * (WIDEST + size(given))


def binary(operator: str, left: Any, right: Any) -> int:
    """The most that an operator can make of two values."""
    if operator == "%" and isinstance(left, str | bytes):
        return formatted(left if isinstance(left, str) else left.decode("latin-1"), right)
    if isinstance(left, int) and isinstance(right, int):
        bits, more = max(left.bit_length(), 1), right.bit_length()
        if (bits * abs(right) if operator == "**" else bits + more) > BITS:
            raise TooCostly(f"it makes a number of more than {BITS:,} bits")
        return 0
    length = sum(len(one) for one in (left, right) if isinstance(one, str | bytes | list | tuple))
    times = sum(one for one in (left, right) if isinstance(one, int)) if operator == "*" else 1
    return length * times


class Rewritten(NodeTransformer):  # type: ignore[misc,unused-ignore]
    """Leads loops, output and containers past the meter, as filters with names of their own."""

    def visit_For(self, node: Any) -> Any:
        node = self.generic_visit(node)
        node.iter = _filtered(node.iter, "the loop")
        return node

    def visit_Output(self, node: Any) -> Any:
        node = self.generic_visit(node)
        node.nodes = [_filtered(one, "the output") for one in node.nodes]
        return node

    def visit_Concat(self, node: Any) -> Any:
        parts = nodes.List(self.generic_visit(node).nodes, lineno=node.lineno)
        return _filtered(parts, "the text")

    def visit_List(self, node: Any) -> Any:
        return _filtered(self.generic_visit(node), "the value")

    def visit_Dict(self, node: Any) -> Any:
        return _filtered(self.generic_visit(node), "the value")

    def visit_Tuple(self, node: Any) -> Any:
        node = self.generic_visit(node)
        return _filtered(node, "the value") if node.ctx == "load" else node


def _filtered(node: Any, name: str) -> Any:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _metered(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter of jinja2's that is measured before and after."""
    kind = getattr(getattr(function, "jinja_pass_arg", None), "name", "")

    @in_context
    def run(context: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        meter = context[METER]
        if name == "join":
            value = [*meter.counted(value)]
            separator = str((*args, *kwargs.values(), "")[0])
            meter.charge(size(value) + len(value) * len(separator))
        meter.charge(grown(name, value, [*args, *kwargs.values()]))
        own = {"context": context, "eval_context": context.eval_ctx,
               "environment": context.environment}  # fmt: skip
        given = (own[kind], value) if kind else (value,)
        return meter.passed(function(*given, *args, **kwargs))

    return run


@in_context
def _loop(context: Any, value: Any) -> Any:
    return context[METER].counted(value)


@in_context
def _value(context: Any, value: Any) -> Any:
    return context[METER].passed(value)


@in_context
def _text(context: Any, parts: list[Any]) -> str:
    context[METER].charge(size(parts))
    return "".join(map(str, parts))


@in_context
def _output(context: Any, value: Any) -> str:
    text = str(value)
    context[METER].charge(len(text))
    return text


class Generation(Extension):  # type: ignore[misc,unused-ignore]
    """`{% generation %}` marks the assistant's part for training; here it shows its content."""

    tags = frozenset({"generation"})

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def lipsum(n: int = 5, html: bool = True, min: int = 20, max: int = 100) -> str:
    """jinja2's own: `n` paragraphs of words that mean nothing, each of `min` to `max` of them."""
    if n * max > WORDS:
        raise TooCostly(f"lipsum makes more than {WORDS:,} words")
    return str(generate_lorem_ipsum(n, html, min, max))


class GuardedNamespace(Namespace):  # type: ignore[misc,unused-ignore]
    """A namespace without names that could lead into Python itself, and without a text."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` may be one of the names
        for name in dict(*args[1:], **kwargs):
            _refuse_underscore(name)
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:  # jinja2's writes out what it holds, however often
        return "<Namespace>"


def _refuse_underscore(name: str) -> None:
    if name.startswith("_"):
        raise SecurityError(f"a namespace cannot have the attribute {name!r}")


class Sandbox(ImmutableSandboxedEnvironment):  # type: ignore[misc,unused-ignore]
    """The environment of one template."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, functions: Mapping[str, Any], filters: Mapping[str, Any]) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
        )
        self.globals |= {**functions, "namespace": GuardedNamespace, "lipsum": lipsum}
        known: dict[str, Any] = {**self.filters, **filters}
        self.filters: dict[str, Any] = {
            name: _metered(name, function) for name, function in known.items()
        }
        self.filters |= {
            "the loop": _loop,
            "the value": _value,
            "the text": _text,
            "the output": _output,
        }

    def compiled(self, source: str) -> Any:
        """A template; `render` it with a `Meter` by the name of METER."""
        if len(source) > SOURCE:
            raise TooCostly(f"it has {len(source):,} characters, more than {SOURCE:,}")
        tree = Rewritten().visit(self.parse(source))
        return self.from_string(tree.set_environment(self))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        meter, method = __context[METER], getattr(__obj, "__wrapped__", __obj)
        of, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(of, str | bytes) and name == "join" and args:
            args = ([*meter.counted(args[0])],)
            meter.charge(size(args[0]) + len(args[0]) * len(of))
        if isinstance(of, str | bytes | int):
            named = [value for key, value in kwargs.items() if key not in OF_JINJA]
            meter.charge(grown(name, of, [*args, *named]))
        return meter.passed(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        context[METER].charge(binary(operator, left, right))
        return context[METER].passed(super().call_binop(context, operator, left, right))
