"""Messages to the text that a model was trained to answer: its own chat template, in a sandbox.

Templates come from strangers, so they run in a sandbox (`sandbox`) on plain JSON data, with the
settings, functions and special tokens that transformers' `apply_chat_template` gives them.
"""

from __future__ import annotations

import datetime
import functools
import json
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastgen.store import jsonfile
from fastgen.store.model_info import CHAT_TEMPLATE, TOKENIZER_CONFIG
from fastgen.system import extras
from fastgen.text import message_forms

OTHERS = "additional_chat_templates"  # templates with a name, a file each
FOR_TOOLS = "tool_use"  # the name of the one for calls with tools, where there is one

# What a message's reasoning may be called, in transformers' order.
REASONING = ("reasoning_content", "thinking", "reasoning")
SECONDS = 5.0  # that a rendering may take


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
        messages: such as `{"role": "user", "content": "Hi"}`, oldest first. A content is a text
            or a list of parts, arguments of calls are objects or JSON: the template is given the
            form that it reads.
        tools: JSON schemas of functions, for templates that know of them.
        variables: what else the template sees.

    Raises:
        ValueError: there is no template, no jinja2, or the template is damaged, refuses the
            messages, fails, or does more than it may (see `sandbox`); it shows in no form what
            the user said, or a content is no text (see `forms`).
    """
    if not messages or not all(isinstance(message, Mapping) for message in messages):
        raise ValueError(f"messages must be a non-empty list of dicts, got {messages!r}")
    said = [_reasoned({k: v for k, v in one.items() if v is not None}) for one in messages]
    given = {"messages": said, "tools": tools, "documents": None, "add_generation_prompt": True}
    plain = _plain(given | variables)
    template = source(directory, config, tools is not None)
    return message_forms.shown(
        plain["messages"],
        lambda said: rendered(template, config, plain | {"messages": said}),
        _compiled(template).forms,
        {**plain, "messages": None, "special tokens": _special_tokens(config)},
    )


def _reasoned(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose reasoning, if it has one, is there by both names that templates read."""
    reasoning = next((message[name] for name in REASONING if name in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def rendered(
    source: str, config: Mapping[str, Any], given: Mapping[str, Any], seconds: float = SECONDS
) -> str:
    """Render a template with variables, which are plain data.

    Args:
        seconds: that it may take.

    Raises:
        ValueError: see `prompt`.
    """
    template = _compiled(source)
    from jinja2 import TemplateError

    from fastgen.text import sandbox

    try:
        text = template.text(_special_tokens(config) | dict(given), seconds)
        text.encode()  # a surrogate alone, in the template or in a message, is no text
        return text
    except sandbox.TooCostly as error:
        raise message_forms.NoFormHelps(
            f"the chat template refuses these messages: {error}"
        ) from error
    except TemplateError as error:
        raise ValueError(f"the chat template refuses these messages: {error}") from error
    except Exception as error:  # a template computes, so it can fail in any of Python's ways
        raise ValueError(
            f"the chat template fails with these messages: {type(error).__name__}: {error}"
        ) from error


def has_template(directory: Path, config: Mapping[str, Any]) -> bool:
    """True where a model comes with a template for conversations.

    Raises:
        ModelError: what it comes with is damaged.
    """
    return "default" in _templates(directory, config)


def source(directory: Path, config: Mapping[str, Any], with_tools: bool) -> str:
    """The template itself: the one for calls with tools, if there is one and it is wanted."""
    templates = _templates(directory, config)
    name = FOR_TOOLS if with_tools and FOR_TOOLS in templates else "default"
    if name not in templates:
        raise ValueError(f"{directory} has no chat template: use complete() with a text")
    return str(templates[name])


def _templates(directory: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """All templates by name: those of the configuration, and of files, which come before them."""
    templates = config.get("chat_template") or {}
    if isinstance(templates, str):
        templates = {"default": templates}
    elif isinstance(templates, list) and all(isinstance(entry, Mapping) for entry in templates):
        templates = {str(entry.get("name")): entry.get("template") for entry in templates}
    if not isinstance(templates, Mapping) or not all(
        isinstance(text, str) for text in templates.values()
    ):
        raise jsonfile.damaged(
            directory / TOKENIZER_CONFIG,
            f"chat_template must be a text, or several with names, got {reprlib.repr(templates)}",
        )
    files = {path.stem: path for path in (directory / OTHERS).glob("*.jinja")}
    if (directory / CHAT_TEMPLATE).is_file():
        files["default"] = directory / CHAT_TEMPLATE
    return {**templates, **{name: _text(path) for name, path in files.items()}}


def _text(path: Path) -> str:
    jsonfile.check_fetched(path)
    try:
        return path.read_text(encoding="utf-8")
    except ValueError as error:
        raise jsonfile.damaged(path, str(error)) from error


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """{"bos_token": "<s>", ...}: texts, or descriptions that hold one."""
    named = {name: value for name, value in config.items() if name.endswith("_token")}
    texts = {k: v.get("content") if isinstance(v, Mapping) else v for k, v in named.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _plain(value: Any) -> Any:
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"messages, tools and variables must be plain data: {error}") from error


@dataclass
class Template:
    """A template that has been compiled.

    Attributes:
        text: what it makes of variables in so many seconds; jinja2's own variables, which each
            rendering has for itself, are added.
        forms: the forms of messages that it was found to read.
    """

    text: Callable[[dict[str, Any], float], str]
    forms: message_forms.KnownForms = field(default_factory=message_forms.KnownForms)


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> Template:
    try:
        from fastgen.text import sandbox
    except ImportError as error:
        raise ValueError(f"chat needs jinja2: {extras.install('chat')}") from error
    functions = {
        "raise_exception": _raise,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        "dict": lambda *args, **kwargs: dict(*args, **kwargs),
    }
    try:
        made = sandbox.Sandbox(functions, {"tojson": _to_json}).compiled(source)
    except Exception as error:  # of jinja2's, or whatever Python says of what it compiles
        raise ValueError(f"the chat template is damaged: {error}") from error
    return Template(
        lambda given, seconds: str(made.render(given | {sandbox.METER: sandbox.Meter(seconds)}))
    )


def _raise(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


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
