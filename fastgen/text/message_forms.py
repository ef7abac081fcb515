"""Messages in the form that a chat template reads, so that nothing of what was said gets lost.

Clients write a content as a text or as a list of parts, and the arguments of a call as JSON; some
templates read a text and some parts, nearly all read arguments as an object. A template that is
given the other form mostly does not fail: it writes a prompt without the words. So each form is
tried on marked messages, words that can be found again, and the first one is taken that shows all.
A template is asked once for all messages that differ in their words alone.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import reprlib
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
Render = Callable[[list[Message]], str]  # raises ValueError where the template fails

# Parts that are text, and where it stands in them.
TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
OF_SYSTEM = frozenset({"system", "developer"})
KNOWN = 256  # forms that are kept of a template
# Roles that a template may not know: that it leaves them out is a warning, and no error. What an
# assistant says besides its calls is left out by many.
MAY_LACK = OF_SYSTEM | {"assistant", "tool", "function"}


class NoFormHelps(ValueError):
    """A template that no other form of the messages would help."""


@dataclass(frozen=True)
class Form:
    """A way to write messages for a template.

    Attributes:
        parts: the roles whose content is a list of parts; that of all others is a text.
        filled: whether the content that an assistant's message lacks is an empty text.
        objects: whether arguments of calls that are a JSON object's text become that object.
        joined: whether several parts are one.
    """

    parts: frozenset[str]
    filled: bool = False
    objects: bool = True
    joined: bool = False


@dataclass(frozen=True)
class Mark:
    """A word in place of a text: of which message, whose, and what was said there."""

    word: str
    index: int
    role: str
    said: str

    @property
    def key(self) -> str:
        """A field of the part besides: where a prompt shows it, it shows the part as data."""
        return f"{self.word}key"


@dataclass(frozen=True)
class BestForm:
    """The form in which a template shows the most of messages.

    Attributes:
        form: None where it fails with each.
        lost: the words that it does not show.
    """

    form: Form | None
    lost: frozenset[str] = frozenset()


class KnownForms:
    """The forms that one template was found to read, by all that it was given but the words."""

    def __init__(self) -> None:
        self._found: OrderedDict[bytes, BestForm] = OrderedDict()

    def form(self, about: Any, find: Callable[[], BestForm]) -> BestForm:
        """The form that is known for `about`, plain data; else the one that `find` finds."""
        key = hashlib.sha256(json.dumps(about).encode()).digest()
        best = self._found.get(key) or find()
        self._found[key] = best
        while len(self._found) > KNOWN:
            self._found.popitem(last=False)
        return best


def shown(messages: Sequence[Message], render: Render, known: KnownForms, given: Any) -> str:
    """The template's text of messages, in the first form in which it shows all that was said.

    Where none does, it is the one that lacks the least (see `MAY_LACK`).

    Args:
        messages: plain data.
        render: what the template makes of them.
        known: the forms that this template reads.
        given: what else it is given, plain data.

    Raises:
        ValueError: the template fails; it shows in no form what the user says; a part of a
            content is no text.
    """
    marked, marks = _marked(messages)
    as_parts = [isinstance(message.get("content"), list) for message in messages]
    best = known.form(
        (given, as_parts, marked), lambda: _find(list(_forms(messages)), marked, marks, render)
    )
    if best.form is None:
        return _unmarked(messages, marks, render)
    _complain([mark for mark in marks if mark.word in best.lost])
    return render(written(messages, best.form))


def _find(
    forms: Sequence[Form], marked: Sequence[Message], marks: Sequence[Mark], render: Render
) -> BestForm:
    """The first of these forms that shows all marks, or lacks the least."""
    tried: list[tuple[tuple[int, int], BestForm]] = []
    for form in forms:
        try:
            lost = _lost(render(written(marked, form)), marks)
        except NoFormHelps:
            raise
        except ValueError:
            continue
        wrong = sum(mark.role not in MAY_LACK for mark in lost)
        tried.append(((wrong, len(lost)), BestForm(form, frozenset(mark.word for mark in lost))))
        if not lost:
            break
    return min(tried, key=lambda entry: entry[0], default=((0, 0), BestForm(None)))[1]


def written(messages: Sequence[Message], form: Form) -> list[Message]:
    """Messages in a form; what is neither text nor parts stays as it is."""
    return [_written(message, form) for message in messages]


def _written(message: Message, form: Form) -> Message:
    out = _decoded(message) if form.objects else dict(message)
    texts = _texts(message.get("content"))
    if texts is None:
        if form.filled and _lacks_content(message):
            texts = [""]
        else:
            return out
    if message.get("role") not in form.parts:
        return out | {"content": "".join(texts)}
    given = message.get("content")
    parts = given if isinstance(given, list) and not form.joined else [{}]
    texts = ["".join(texts)] if form.joined else texts
    return out | {
        "content": [
            {**part, "type": "text", "text": text} for part, text in zip(parts, texts, strict=True)
        ]
    }


def _forms(messages: Sequence[Message]) -> Iterator[Form]:
    """Forms that may be read, the likeliest first: parts where they were given."""
    roles = frozenset(str(message.get("role")) for message in messages)
    given = {str(m.get("role")) for m in messages if isinstance(m.get("content"), list)}
    none: frozenset[str] = frozenset()
    contents = (frozenset(given), none, roles, roles - OF_SYSTEM, roles & {"user"})
    filled = (False, True) if any(map(_lacks_content, messages)) else (False,)
    objects = (True, False) if any(one != _decoded(one) for one in messages) else (True,)
    joined = (False, True) if given else (False,)
    for join, parts, fill, decode in itertools.product(
        joined, dict.fromkeys(contents), filled, objects
    ):
        yield Form(parts, fill, decode, join)


def _lacks_content(message: Message) -> bool:
    return message.get("role") == "assistant" and message.get("content") is None


def _texts(content: Any) -> list[str] | None:
    """The texts of a content; None where it is neither a text nor a list of parts.

    Raises:
        ValueError: a part is no text.
    """
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list) or not all(
        isinstance(part, Mapping) and isinstance(part.get("type"), str) for part in content
    ):
        return None
    kinds = {part["type"] for part in content} - TEXTS.keys()
    if kinds:
        raise ValueError(f"content of type {', '.join(sorted(kinds))} is not supported: text alone")
    texts = [part.get(TEXTS[part["type"]]) for part in content]
    odd = [text for text in texts if not isinstance(text, str | None)]
    if odd:
        raise ValueError(f"the text of a content's part must be a text, got {odd[0]!r}")
    return [text or "" for text in texts]


# --- calls of tools ------------------------------------------------------------------------------


def _decoded(message: Message) -> Message:
    """A message with its calls' arguments as objects: in OpenAI's API they are JSON texts."""
    calls = message.get("tool_calls")
    out = dict(message)
    if isinstance(calls, list):
        out["tool_calls"] = [_call(one) for one in calls]
    if isinstance(message.get("function_call"), Mapping):
        out["function_call"] = _call(message["function_call"])
    return out


def _call(call: Any) -> Any:
    if not isinstance(call, Mapping):
        return call
    out = dict(call)
    if "arguments" in call:
        out["arguments"] = _object(call["arguments"])
    if isinstance(call.get("function"), Mapping):
        out["function"] = _call(call["function"])
    return out


def _object(text: Any) -> Any:
    """The object that a JSON text is; everything else as it is."""
    if not isinstance(text, str):
        return text
    try:
        value = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


# --- what was said, and what a prompt shows of it ------------------------------------------------


def _marked(messages: Sequence[Message]) -> tuple[list[Message], list[Mark]]:
    """Messages with a word in place of each text that says something.

    The words are letters and digits: whatever a template trims, escapes or writes as JSON, they
    can be found.
    """
    out, marks = [], []
    for index, message in enumerate(messages):
        texts = _texts(message.get("content"))
        if texts is None:
            out.append(message)
            continue
        content: list[dict[str, Any]] = []
        for part, text in enumerate(texts):
            mark = Mark(f"qx{index}y{part}z", index, str(message.get("role")), text)
            if text.strip():
                marks.append(mark)
                content.append({"type": "text", "text": mark.word, mark.key: True})
            else:
                content.append({"type": "text", "text": text})
        out.append({**message, "content": content})
    return out, marks


def _lost(text: str, marks: Sequence[Mark]) -> list[Mark]:
    """The marks that a prompt lacks. A part that is written as data is not read either."""
    text = text.casefold()
    return [mark for mark in marks if mark.word not in text or mark.key in text]


def _complain(lost: Sequence[Mark]) -> None:
    """Refuse, or warn of, what no form of the messages shows."""
    for mark in lost:
        if mark.role not in MAY_LACK:
            raise _unsaid(mark)
    for role in sorted({mark.role for mark in lost} - {"assistant"}):
        warnings.warn(
            f"the chat template shows no messages of role {role}: the model does not see them",
            stacklevel=4,
        )


def _unsaid(mark: Mark) -> ValueError:
    return ValueError(
        f"the chat template shows neither as a text nor as parts what the {mark.role[:40]} says in "
        f"message {mark.index}: {reprlib.repr(mark.said)}"
    )


def _unmarked(messages: Sequence[Message], marks: Sequence[Mark], render: Render) -> str:
    """The text of messages whose contents the template asks more of than that they are texts."""
    failed: ValueError | None = None
    for form in _forms(messages):
        try:
            text = render(written(messages, form))
        except ValueError as error:
            failed = failed or error
            continue
        lost = [mark for mark in marks if mark.said.strip() not in text]
        try:
            _complain(lost)
            return text
        except ValueError as error:
            failed = failed or error
    assert failed is not None  # there is one form at least
    raise failed
