"""Messages to the text that a model was trained to answer: its own chat template, in a sandbox.

Templates come from strangers, so they run in jinja2's immutable sandbox on plain JSON data, with
the settings, functions and special tokens that transformers' `apply_chat_template` gives them.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastgen import extras

FILE = "chat_template.jinja"
OTHERS = "additional_chat_templates"  # templates with a name, a file each
FOR_TOOLS = "tool_use"  # the name of the one for calls with tools, where there is one

MAX_NEW_TOKENS = 256  # of a reply, where nobody sets a length: that of transformers' pipelines


def prompt(
    directory: Path,
    config: Mapping[str, Any],
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    **variables: Any,
) -> str:
    """The text of a conversation, up to where the model's answer begins.

    Args:
        directory: where the template may be in a file of its own.
        config: tokenizer_config.json, with the special tokens and perhaps the template.
        messages: such as `{"role": "user", "content": "Hi"}`, oldest first.
        tools: JSON schemas of functions, for templates that know of them.
        variables: what else the template sees.

    Raises:
        ValueError: there is no template, no jinja2, or the template refuses the messages.
    """
    if not messages or not all(isinstance(message, Mapping) for message in messages):
        raise ValueError(f"messages must be a non-empty list of dicts, got {messages!r}")
    said = [{k: v for k, v in message.items() if v is not None} for message in messages]
    given = {"messages": said, "tools": tools, "documents": None, "add_generation_prompt": True}
    template = _compiled(_source(directory, config, tools is not None))
    from jinja2 import TemplateError

    try:
        return str(template.render(_special_tokens(config) | _plain(given | variables)))
    except TemplateError as error:
        raise ValueError(f"the chat template refuses these messages: {error}") from error


def _source(directory: Path, config: Mapping[str, Any], with_tools: bool) -> str:
    """The template itself: its file, or what the configuration holds, by name if it has several."""
    found = config.get("chat_template") or {}
    if isinstance(found, str):
        found = {"default": found}
    elif not isinstance(found, Mapping):
        found = {one["name"]: one["template"] for one in found}
    files = {path.stem: path for path in (directory / OTHERS).glob("*.jinja")}
    if (directory / FILE).is_file():
        files["default"] = directory / FILE
    templates = {**found, **{k: path.read_text(encoding="utf-8") for k, path in files.items()}}
    name = FOR_TOOLS if with_tools and FOR_TOOLS in templates else "default"
    if name not in templates:
        raise ValueError(f"{directory} has no chat template: use complete() with a text")
    return str(templates[name])


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """{"bos_token": "<s>", ...}: texts, or descriptions that hold one."""
    named = {name: value for name, value in config.items() if name.endswith("_token")}
    texts = {k: v.get("content") if isinstance(v, Mapping) else v for k, v in named.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _plain(value: Any) -> Any:
    try:
        return json.loads(json.dumps(value))
    except TypeError as error:
        raise ValueError(f"messages, tools and variables must be plain data: {error}") from error


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> Any:
    try:
        from jinja2 import TemplateError, nodes
        from jinja2.exceptions import SecurityError
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
        from jinja2.utils import Namespace
    except ImportError as error:
        raise ValueError(f"chat needs jinja2: {extras.install('chat')}") from error

    class Generation(Extension):  # type: ignore[misc,unused-ignore]
        """`{% generation %}` marks the assistant's part for training; here it shows its content."""

        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    class GuardedNamespace(Namespace):  # type: ignore[misc,unused-ignore]
        """A namespace without names that could lead into Python itself."""

        def __init__(*args: Any, **kwargs: Any) -> None:  # `self` may be one of the names
            for name in dict(*args[1:], **kwargs):
                _refuse_underscore(name)
            Namespace.__init__(*args, **kwargs)

        def __setitem__(self, name: str, value: Any) -> None:
            _refuse_underscore(name)
            super().__setitem__(name, value)

    def _refuse_underscore(name: str) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace cannot have the attribute {name!r}")

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        "dict": lambda *args, **kwargs: dict(*args, **kwargs),
        "namespace": GuardedNamespace,
    }
    try:
        return environment.from_string(source)
    except TemplateError as error:
        raise ValueError(f"the chat template is damaged: {error}") from error


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escapes of jinja2's own filter."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
