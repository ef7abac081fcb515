"""fastgen chat: a conversation in the terminal, or of lines that come in."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastgen.commands.knobs import given, json_or_text, knob_flags
from fastgen.commands.models import load, run_options
from fastgen.commands.say import clear_errors, one_line, say
from fastgen.conversation import Conversation, Took
from fastgen.system.interrupt import noted

if TYPE_CHECKING:
    from fastgen.serve.tools.reader import AnswerEvent, AnswerReader

QUOTES = '"""'  # around several lines
PROMPT, MORE = ">>> ", "... "


@click.command()
@click.argument("model", required=False)
@click.option("--system", help="the system message")
@run_options
@knob_flags
def chat(
    model: str | None,
    system: str | None,
    threads: int | None,
    prefill_precision: str | None,
    packed: bool,
    **knobs: Any,
) -> None:
    """Talk with a model: MODEL is a directory or a hub id (default: the demo model).

    A line that ends with a backslash goes on in the next one, and so does everything between
    two \"\"\". Ctrl-C stops an answer. /help lists what else can be typed: settings, files.

    Answers go to standard output, everything else to standard error. On a terminal thoughts are
    dimmed, where the model's template shows how it thinks. Where standard input is no
    terminal, each line (or block) of it is answered, and the first error ends the program.

    Tokens are drawn as the model's own generation config says, or at temperature 0.7 and top_p 0.9
    if it says nothing of it (a terminal is told); --no-do-sample takes the likeliest.

    A model without a chat template was not trained to answer: it continues the text so far, by 64
    tokens at most. An answer has 256. --max-new-tokens or --max-length change that.
    """
    with clear_errors():
        loaded = load(model, threads, prefill_precision, packed, "MODEL")
        conversation = Conversation(loaded, given(knobs), system)
        info = loaded.model.info
        name = info.name or loaded.directory.name
        if not conversation.has_template:
            say(
                f"fastgen: {name} has no chat template, so it does not answer: it continues the "
                "text so far, your lines and its own"
            )
        with contextlib.closing(conversation):
            if sys.stdin.isatty():
                limit = "" if info.max_length is None else f", {info.max_length:,} positions"
                say(
                    f"{name}, {info.precision}{limit}; {_how(conversation)}. "
                    "/help: what can be typed; Ctrl-D leaves."
                )
                _talk(conversation)
            else:
                _answer_all(conversation)


# --- where messages come from --------------------------------------------------------------------


class MessageReader:
    """Messages and commands, each of a line or of several.

    Args:
        line: gives the next line, for a prompt to show; raises EOFError where there is none.

    Attributes:
        begun: whether a line has come of what is being read.
    """

    def __init__(self, line: Callable[[str], str]) -> None:
        self._line = line
        self.begun = False

    def read(self) -> tuple[str, bool]:
        """The next one, and whether it was quoted: then it is a message, whatever it begins with.

        Raises:
            EOFError: there are no more.
            ValueError: it has no end.
        """
        self.begun = False
        text = self._line(PROMPT)
        self.begun = True
        try:
            if text.lstrip().startswith(QUOTES):
                text = text.lstrip().removeprefix(QUOTES)
                while not text.rstrip().endswith(QUOTES):
                    text += "\n" + self._line(MORE)
                text = text.rstrip().removesuffix(QUOTES)
                return text.removeprefix("\n").removesuffix("\n"), True
            while text.endswith("\\"):
                text = text[:-1] + "\n" + self._line(MORE)
        except EOFError as error:
            raise ValueError(
                f"a message has no end: the line after a backslash, or {QUOTES}, is missing"
            ) from error
        return text, False


class InputLines:
    """Standard input as lines of UTF-8, counted."""

    def __init__(self) -> None:
        self.number = 0

    def __call__(self, _: str) -> str:
        line = sys.stdin.buffer.readline()
        if not line:
            raise EOFError
        self.number += 1
        try:
            return line.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"it is not UTF-8: {error.reason} at byte {error.start}") from error


def _typed(prompt: str) -> str:
    """A line that is typed; what is pasted may be several."""
    if sys.stdout.isatty():
        return input(prompt)
    click.echo(prompt, nl=False, err=True)  # standard output is for answers
    return input()


# --- what is done with them ----------------------------------------------------------------------


def _answer_all(conversation: Conversation) -> None:
    """Answer all of standard input; the first error ends it, and names its line."""
    stream = InputLines()
    reader = MessageReader(stream)
    while True:
        try:
            with clear_errors():
                text, quoted = reader.read()
                if (text or quoted) and not _act(conversation, text, quoted):
                    return
        except EOFError:
            return
        except click.UsageError as error:
            raise click.UsageError(f"line {stream.number}: {error.message}") from error


def _talk(conversation: Conversation) -> None:
    """Answer what is typed until the user leaves."""
    edited = _line_editor()
    reader = MessageReader(_typed)
    warned = False  # that another Ctrl-C leaves
    conversation.read_ahead()
    while True:
        try:
            with clear_errors():
                text, quoted = reader.read()
                warned = False
                if (text or quoted) and not _act(conversation, text, quoted):
                    return
                conversation.read_ahead()
        except EOFError:
            click.echo(err=True)
            return
        except click.UsageError as error:
            say(f"fastgen: {one_line(error.message)}")
        except KeyboardInterrupt:
            click.echo(err=True)
            typed = reader.begun or bool(edited())
            if warned and not typed:
                return
            warned = not typed
            if warned:
                say("Ctrl-C once more, Ctrl-D or /exit leaves; /help says what else there is.")


def _line_editor() -> Callable[[], str]:
    """Let lines be edited, and called up again, where Python has readline; gives what is typed."""
    try:
        import readline
    except ImportError:  # as on Windows, whose console edits lines itself
        return str
    return readline.get_line_buffer


def _act(conversation: Conversation, text: str, quoted: bool) -> bool:
    """Answer a message or follow a command; whether the conversation goes on."""
    if quoted or not text.startswith("/"):
        _answer(conversation, text)
        return True
    name, _, rest = text.partition(" ")
    if name not in COMMANDS:
        raise ValueError(
            f"there is no command {name}: /help lists them; a message that begins with / stands "
            f"between two {QUOTES}"
        )
    command, rest = COMMANDS[name], rest.strip()
    if rest and not command.takes:
        raise ValueError(f"{name} takes nothing, got {rest!r}")
    if not rest and command.takes and not command.alone:
        raise ValueError(f"{name} needs {command.takes}: {command.help}")
    said = command.run(conversation, rest)
    if said:
        say(said)
    return name != "/exit"


def _answer(conversation: Conversation, text: str) -> None:
    """Write the answer as it comes, and to a terminal what it took."""
    there = contextlib.nullcontext(lambda: False) if not sys.stdin.isatty() else noted()
    known = conversation.dropped
    with there as stopped, contextlib.closing(conversation.answer(text, stopped)) as pieces:
        if conversation.dropped > known:
            say(
                f"The conversation has outgrown the model's positions: its first "
                f"{conversation.dropped} messages are no longer read."
            )
        as_shown = _dimmed(conversation, text, pieces) if sys.stdout.isatty() else pieces
        for piece in as_shown:
            click.echo(piece, nl=False)
    click.echo()
    if conversation.took is None or not conversation.took.new:
        say("Stopped before the answer began: the message is taken back.")
    elif sys.stderr.isatty():
        click.echo(click.style(_shown(conversation.took), dim=True), err=True)


def _dimmed(conversation: Conversation, text: str, pieces: Iterator[str]) -> Iterator[str]:
    """An answer's pieces for a terminal: thoughts are dimmed, and their marks left out."""
    from fastgen.serve import reasoning  # no other command needs it and all the forms of calls
    from fastgen.serve.tools import shown

    model = conversation.model
    marks = shown.of(model).reasoning if conversation.has_template else None
    messages = [*conversation.messages, {"role": "user", "content": text}]
    reader = reasoning.reader(model, marks, messages)
    thought = False
    for piece in pieces if reader is None else _events(reader, pieces):
        if isinstance(piece, str):
            yield _harmless(piece)
        elif piece.kind == "reasoning":
            thought = True
            yield click.style(_harmless(piece.text), dim=True)
        else:
            yield ("\n\n" if thought else "") + _harmless(piece.text)
            thought = False


def _events(reader: AnswerReader, pieces: Iterable[str]) -> Iterator[AnswerEvent]:
    for piece in pieces:
        yield from reader.push(piece)
    yield from reader.end()


def _harmless(text: str) -> str:
    """Without what a terminal takes for commands: a model may write anything."""
    return re.sub(r"[^\n\t\x20-\x7e\xa0-\U0010ffff]", lambda match: repr(match[0])[1:-1], text)


def _shown(took: Took) -> str:
    ends = {
        None: "; stopped",
        "length": "; cut at its length limit",
        "time": "; cut by max_time",
    }
    return (
        f"{took.new} tokens, {took.rate:,.1f} a second; the first after {took.first:.2f} s, "
        f"{took.read:,} of {took.prompt:,} tokens read{ends.get(took.finish_reason, '')}"
    )


# --- commands ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    """A command that can be typed besides messages.

    Attributes:
        run: does it with what stands behind its name, and gives what is to be said.
        help: what it does.
        takes: what may stand behind its name.
        alone: whether that may be left out.
    """

    run: Callable[[Conversation, str], str | None]
    help: str
    takes: str = ""
    alone: bool = False


def _set(conversation: Conversation, rest: str) -> str | None:
    if not rest:
        known = [f"{k} {json.dumps(v)}" for k, v in conversation.knobs.items()]
        return "\n".join([*(known or ["nothing is set"]), _how(conversation)])
    name, _, value = rest.partition(" ")
    if not value.strip():
        raise ValueError(f"/set needs a value for {name}; /unset {name} takes one back")
    conversation.set(_knob(name), json_or_text(value.strip()))
    return None


def _how(conversation: Conversation) -> str:
    """By what tokens are chosen."""
    sampling = conversation.sampling
    if sampling is None:
        return "not sampled"
    return "sampled at " + ", ".join(f"{name} {json.dumps(v)}" for name, v in sampling.items())


def _knob(name: str) -> str:
    """A knob's name, which may be typed as the flag is."""
    return name.removeprefix("--").replace("-", "_")


def _system(conversation: Conversation, rest: str) -> str | None:
    if not rest:
        return conversation.system or "there is no system message"
    conversation.tell(None if rest == '""' else rest)
    return None


def _path(rest: str) -> Path:
    return Path(rest).expanduser()


def _help(*_: Any) -> str:
    shown = {f"{name} {one.takes}".rstrip(): one.help for name, one in COMMANDS.items()}
    lines = [f"{name:<18} {text}" for name, text in shown.items()]
    return "\n".join(
        [
            *lines,
            "",
            "A line that ends with a backslash goes on in the next one; several stand between "
            f"{QUOTES} and {QUOTES}.",
            "Ctrl-C stops an answer. `fastgen generate --help` lists the knobs.",
        ]
    )


COMMANDS = {
    "/set": Command(_set, "set a knob, such as temperature 0.7; alone: what is set",
                    "KNOB VALUE", alone=True),
    "/unset": Command(lambda c, rest: c.unset(_knob(rest)), "take a knob back",
                      "KNOB"),
    "/system": Command(_system, 'the system message from now on ("" for none); alone: what it is',
                       "TEXT", alone=True),
    "/reset": Command(lambda c, _: c.reset(),
                      "forget what was said; system message and knobs stay"),
    "/save": Command(lambda c, rest: c.save(_path(rest)), "write the messages as JSON", "FILE"),
    "/load": Command(lambda c, rest: c.load(_path(rest)), "go on with messages of a file", "FILE"),
    "/help": Command(_help, "this"),
    "/exit": Command(lambda *_: None, "leave; so does Ctrl-D"),
}  # fmt: skip
