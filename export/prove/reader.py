"""Documents as rows of ids: with what the tokenizer puts before a text, or in a chat template."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from fastgen.store import jsonfile
from fastgen.store.model_info import CONFIG, GENERATION_CONFIG, TOKENIZER_CONFIG, ModelInfo
from fastgen.text import chat_template

if TYPE_CHECKING:
    import tokenizers

    from fastgen.export.source.origin import Origin

Row = NDArray[np.int64]
Message = Mapping[str, Any]
Document = str | list[Message] | list[int]  # a text, a conversation, or ids

TEXTS = Path(__file__).parents[1] / "texts"
ROW = 256  # tokens of a row, at most
LEAST = 16  # tokens of a row that a longer text ends with: fewer say little


@dataclass
class Reader:
    """A model's way to read a text: tokenizer, chat template, and first and last ids.

    Attributes:
        tokenizer: None for ids only.
        vocab: ids that it has.
        length: tokens of a row.
        template: renders a conversation, with or without a reply to come; None without template.
        bos, eos: the ids that its configuration says begin and end a text.
    """

    tokenizer: tokenizers.Tokenizer | None
    vocab: int
    length: int
    template: Template | None = None
    bos: int | None = None
    eos: tuple[int, ...] = ()
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, origin: Origin, info: ModelInfo) -> Reader:
        """Read it from the files that the origin writes into the model's directory."""
        limit = info.max_length
        reader = cls(origin.tokenizer, info.vocab_size, min(ROW, limit or ROW))
        with tempfile.TemporaryDirectory() as temporary:
            directory = Path(temporary)
            origin.write_configuration(directory)
            config = jsonfile.read(directory / CONFIG) | {
                name: value
                for name, value in jsonfile.read(directory / GENERATION_CONFIG).items()
                if value is not None
            }
            bos, eos = config.get("bos_token_id"), config.get("eos_token_id")
            reader.bos = bos if _is_id(bos, reader.vocab) else None
            ends = eos if isinstance(eos, list) else [eos]
            reader.eos = tuple(end for end in ends if _is_id(end, reader.vocab))
            settings = jsonfile.read(directory / TOKENIZER_CONFIG)
            if reader.tokenizer is not None and chat_template.has_template(directory, settings):
                reader._use(chat_template.source(directory, settings, with_tools=False), settings)
        return reader

    def _use(self, source: str, settings: Mapping[str, Any]) -> None:
        template = Template(source, settings)
        try:
            template.text([{"role": "user", "content": "Hi"}], reply=True)
        except ValueError as error:
            self.notes.append(f"conversations are plain text: {error}")
        else:
            self.template = template

    @cached_property
    def prefix(self) -> list[int]:
        """The ids that the tokenizer puts before a text."""
        assert self.tokenizer is not None
        text = "The first words."
        bare = self.tokenizer.encode(text, add_special_tokens=False).ids
        whole = self.tokenizer.encode(text, add_special_tokens=True).ids
        starts = (at for at in range(len(whole)) if whole[at : at + len(bare)] == bare)
        return [token for token in whole[: next(starts, 0)] if token < self.vocab]

    def rows(self, document: Document) -> list[Row]:
        """A shipped document, none of one in letters that the model does not know.

        Conversations are plain text where there is no template for them.
        """
        text = document if isinstance(document, str) else _plain(document)
        if not self._knows(text):
            return []
        if isinstance(document, str) or self.template is None:
            return self._of_text(text)
        ids = self._of_messages([message for message in document if isinstance(message, Mapping)])
        return self._of_text(text) if ids is None else [ids]

    def _knows(self, text: str) -> bool:
        """True if at least half of a text's letters are there when its ids are read back."""
        assert self.tokenizer is not None
        decoded = self.tokenizer.decode(self.encoded(text)).casefold()
        letters = {letter for letter in text.casefold() if letter.isalpha()}
        return 2 * len(letters & set(decoded)) >= len(letters)

    def asked(self, document: Document) -> list[Row]:
        """A user's document.

        Raises:
            ValueError: the model cannot read it.
        """
        if not isinstance(document, str) and isinstance(document[0], int):
            beyond = [token for token in document if not _is_id(token, self.vocab)]
            if beyond:
                raise ValueError(f"ids must be below {self.vocab}, got {beyond[0]}")
            return self._cut([], document)
        if self.tokenizer is None:
            raise ValueError("the model has no tokenizer: give ids, not texts or messages")
        if isinstance(document, str):
            return self._of_text(document)
        if self.template is None:
            why = f" ({self.notes[0]})" if self.notes else ""
            raise ValueError(f"the model has no chat template: give text, not messages{why}")
        text = self.template.text(document, reply=False)
        return self._cut([], self.encoded(text))[:1]

    def encoded(self, text: str) -> list[int]:
        """Ids of a text without those that the tokenizer puts before it."""
        assert self.tokenizer is not None
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return [token for token in ids if token < self.vocab]

    def _of_text(self, text: str) -> list[Row]:
        return self._cut(self.prefix, self.encoded(text))

    def _of_messages(self, messages: list[Message], reply: bool = False) -> Row | None:
        """The beginning of a conversation; None if the template refuses it in any form."""
        assert self.template is not None
        for turns in (messages, [message for message in messages if message["role"] != "system"]):
            try:
                text = self.template.text(turns, reply)
            except ValueError:
                continue
            return np.array(self.encoded(text)[: self.length], np.int64)
        return None

    def question(self, messages: list[Message]) -> Row | None:
        """A conversation up to where the first reply begins; None if the template refuses it."""
        ends = (at for at, message in enumerate(messages) if message["role"] == "user")
        return self._of_messages(messages[: next(ends, 0) + 1], reply=True)

    def _cut(self, prefix: list[int], ids: Sequence[Any]) -> list[Row]:
        """Rows that each begin with `prefix`; a short rest is left."""
        size = max(1, self.length - len(prefix))
        parts = [ids[at : at + size] for at in range(0, len(ids), size)]
        rows = [np.array([*prefix, *part], np.int64) for part in parts]
        return [row for at, row in enumerate(rows) if len(row) >= (LEAST if at else 2)]


class Template:
    """A model's chat template."""

    def __init__(self, source: str, settings: Mapping[str, Any]) -> None:
        self.settings = {**settings, "chat_template": source}

    def text(self, messages: Sequence[Message], reply: bool) -> str:
        """A conversation, up to where a reply begins if one is to come.

        Raises:
            ValueError: see `chat.prompt`.
        """
        # A day that stays: templates that tell the date would make other rows every day.
        return chat_template.prompt(
            TEXTS / "no files",
            self.settings,
            messages,
            add_generation_prompt=reply,
            date_string="26 Jul 2024",
        )


def _plain(document: Document) -> str:
    return "\n\n".join(
        f"{str(message['role']).capitalize()}: {message['content']}"
        for message in document
        if isinstance(message, Mapping)
    )


def _is_id(value: Any, vocab: int) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < vocab
