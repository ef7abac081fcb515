"""Text to ids and back, and text that grows token by token without half a character."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastgen import jsonfile

FILE = "tokenizer.json"
CONFIG = "tokenizer_config.json"
REPLACEMENT = "\ufffd"  # what bytes that are no character (yet) decode to
LONGEST_PARTIAL = 3  # bytes of a UTF-8 character that can be there without it being complete


class Tokenizer:
    """A `tokenizer.json` and what `tokenizer_config.json` says of it.

    Raises:
        ModelError: one of them is damaged, or there is no `tokenizer.json`.
    """

    def __init__(self, directory: Path) -> None:
        import tokenizers

        path = directory / FILE
        if not path.is_file():
            raise jsonfile.ModelError(
                f"{directory} has no {FILE}: the model was exported for ids only; pass token ids"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception
            raise jsonfile.damaged(path, str(error)) from error
        self._use(backend, jsonfile.read(directory / CONFIG))

    @classmethod
    def of(cls, tokenizer: Any) -> Tokenizer:
        """One of ours, of tokenizers or of transformers (a fast one), as one of ours."""
        if isinstance(tokenizer, cls):
            return tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        if not hasattr(backend, "id_to_token"):
            raise ValueError(f"tokenizer must be a fast tokenizer, got {type(tokenizer).__name__}")
        made = cls.__new__(cls)
        made._use(type(backend).from_str(backend.to_str()), {})
        return made

    def _use(self, backend: Any, config: dict[str, Any]) -> None:
        backend.no_padding()
        backend.no_truncation()
        self.backend, self.config = backend, config
        self._spellings: dict[int, bytes | None] = {}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, with the special tokens that the model's template adds."""
        ids = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        return [int(i) for i in ids]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`; bytes that are no character become U+FFFD."""
        text = self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)
        return str(text)

    def token(self, index: int) -> str | None:
        """The vocabulary's own spelling of a token; None for an id that it does not have."""
        spelling = self.backend.id_to_token(int(index))
        return None if spelling is None else str(spelling)

    def index(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it."""
        place = self.backend.token_to_id(token)
        return None if place is None else int(place)

    def extensions(self, index: int) -> list[int]:
        """All tokens whose spelling in the vocabulary begins with that of `index`, itself too."""
        start = self.token(index)
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        return [] if start is None else [i for t, i in vocabulary.items() if t.startswith(start)]

    def special_ids(self) -> list[int]:
        """The special tokens: those that a text is decoded without."""
        added = self.backend.get_added_tokens_decoder()
        return sorted(int(i) for i, token in added.items() if token.special)

    def spelling(self, index: int) -> bytes | None:
        """The bytes that a token stands for inside a text; None for an id without a token.

        As transformers' StopStringCriteria spells it: byte-level and `<0xNN>` tokens are their
        bytes, others what they add to the decoding of a text before them.
        """
        if index not in self._spellings:
            token = self.token(index)
            self._spellings[index] = None if token is None else self._spell(token)
        return self._spellings[index]

    def _spell(self, token: str) -> bytes:
        if self.bytes_are == "ByteLevel" and all(char in _byte_level() for char in token):
            return bytes(_byte_level()[char] for char in token)
        if self.bytes_are == "ByteFallback" and re.fullmatch(r"<0x[0-9a-fA-F]{2}>", token):
            return bytes([int(token[3:5], 16)])
        prefix = "abcdef"
        tokens = [*self._encoded_prefix, token]
        decoder = self.backend.decoder
        text = " ".join(tokens) if decoder is None else decoder.decode(tokens)
        return str(text[text.index(prefix) + len(prefix) :]).encode()

    @functools.cached_property
    def _encoded_prefix(self) -> list[str]:
        return list(self.backend.encode("abcdef", add_special_tokens=False).tokens)

    @functools.cached_property
    def bytes_are(self) -> str | None:
        """How the decoder writes bytes: "ByteFallback", "ByteLevel" or not at all (None)."""
        decoder = json.dumps(json.loads(self.backend.to_str())["decoder"])
        for kind in ("ByteFallback", "ByteLevel"):
            if f'"type": "{kind}"' in decoder:
                return kind
        return None

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self.backend.get_vocab_size(with_added_tokens=True))


@functools.cache
def _byte_level() -> dict[str, int]:
    """The byte behind each character of a byte-level token (GPT-2's table).

    Bytes that print stand for themselves, the others for the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + place): byte for place, byte in enumerate(others)}


class TextStream:
    """Turns a row's tokens into text as they come.

    A character whose bytes are spread over tokens is held back until it is complete. The joined
    pieces are the decoded text of the new tokens in the context of the prompt, so a word that
    starts with a space keeps it.
    """

    CONTEXT = 6  # tokens of the prompt that are decoded along

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids = [int(i) for i in prompt_ids[-self.CONTEXT :]] if len(prompt_ids) else []
        self._read = len(self._ids)  # tokens whose text has been given out whole
        self._shown = len(self._text())  # characters of the window that have been given out

    def push(self, token: int) -> str:
        """The text that `token` completes; "" while a character is incomplete."""
        self._ids.append(int(token))
        text = self._text()
        held = min(len(text) - len(text.rstrip(REPLACEMENT)), LONGEST_PARTIAL)
        piece = text[self._shown : len(text) - held]
        self._shown = max(self._shown, len(text) - held)
        if not held and piece:
            self._slide()
        return piece

    def end(self) -> str:
        """What was held back."""
        return self._text()[self._shown :]

    def _text(self) -> str:
        return self._tokenizer.decode(self._ids, self._skip)

    def _slide(self) -> None:
        """Keep only the tokens since the last whole piece, as context for the next."""
        del self._ids[: self._read]
        self._read = len(self._ids)
        self._shown = len(self._text())
