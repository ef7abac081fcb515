"""Text to ids and back, and text that grows token by token without half a character."""

from __future__ import annotations

import codecs
import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from fastgen.errors import ModelError
from fastgen.store import jsonfile
from fastgen.store.model_info import TOKENIZER, TOKENIZER_CONFIG

BYTE = re.compile(r"<0x[0-9a-fA-F]{2}>")  # a token that falls back to bytes
REPLACEMENT = "\ufffd"  # what bytes that are no character (yet) decode to
LONG = 1 << 12  # characters of a text for which no other thread is to wait
LONGEST_PARTIAL = 3  # bytes of a UTF-8 character that can be there without it being complete


class Tokenizer:
    """A `tokenizer.json` and what `tokenizer_config.json` says of it.

    Raises:
        ModelError: one of them is damaged, or there is no `tokenizer.json`.
    """

    def __init__(self, directory: Path) -> None:
        import tokenizers

        path = directory / TOKENIZER
        if not path.is_file():
            raise ModelError(
                f"{directory} has no {TOKENIZER}: the model was exported for ids only; "
                "pass token ids"
            )
        jsonfile.check_fetched(path)
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception
            raise jsonfile.damaged(path, str(error)) from error
        self._use(backend, jsonfile.read(directory / TOKENIZER_CONFIG))

    @classmethod
    def of(cls, tokenizer: Any) -> Tokenizer:
        """One of ours, of tokenizers or of transformers (a fast one), as one of ours."""
        if isinstance(tokenizer, cls):
            return tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        if not hasattr(backend, "id_to_token"):
            raise ValueError(f"tokenizer must be a fast tokenizer, got {type(tokenizer).__name__}")
        made = cls.__new__(cls)
        splits = {"split_special_tokens": bool(backend.encode_special_tokens)}  # not in its JSON
        made._use(type(backend).from_str(backend.to_str()), splits)
        return made

    def _use(self, backend: Any, config: dict[str, Any]) -> None:
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = bool(config.get("split_special_tokens"))
        self.backend, self.config = backend, config
        self._spellings: dict[int, bytes | None] = {}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, with the special tokens that the model's template adds."""
        if len(text) > LONG:  # of several texts it lets go of Python's lock meanwhile
            (cut,) = self.backend.encode_batch([text], add_special_tokens=add_special_tokens)
        else:
            cut = self.backend.encode(text, add_special_tokens=add_special_tokens)
        return [int(i) for i in cut.ids]

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
        token_id = self.backend.token_to_id(token)
        return None if token_id is None else int(token_id)

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
        if self.is_byte_level and any(char not in _byte_level() for char in token):
            return token.encode()
        if self.bytes_are == "ByteLevel" and all(char in _byte_level() for char in token):
            return bytes(_byte_level()[char] for char in token)
        if self.bytes_are == "ByteFallback" and BYTE.fullmatch(token):
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
        """The decoder's way to write bytes: "ByteFallback", "ByteLevel" or none (None)."""
        decoders = self._decoders
        return next((kind for kind in ("ByteFallback", "ByteLevel") if kind in decoders), None)

    @functools.cached_property
    def is_byte_level(self) -> bool:
        """True where the text of tokens is their bytes joined, and nothing else."""
        return [kind for kind in self._decoders if kind != "Fuse"] == ["ByteLevel"]

    @functools.cached_property
    def _decoders(self) -> list[str]:
        """The kinds of the decoder's parts, in order."""
        return _kinds(json.loads(self.backend.to_str())["decoder"])

    @functools.cached_property
    def silent(self) -> frozenset[int]:
        """The special tokens: those that a text is decoded without."""
        return frozenset(self.special_ids())

    def is_byte(self, index: int) -> bool:
        """True for a byte of a tokenizer that falls back to bytes."""
        return index in self._byte_tokens

    @functools.cached_property
    def _byte_tokens(self) -> frozenset[int]:
        if self.bytes_are != "ByteFallback":
            return frozenset()
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        return frozenset(i for token, i in vocabulary.items() if BYTE.fullmatch(token))

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self.backend.get_vocab_size(with_added_tokens=True))


def _kinds(decoder: dict[str, Any] | None) -> list[str]:
    """The kinds of a decoder's parts, in order."""
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [kind for part in decoder["decoders"] for kind in _kinds(part)]
    return [decoder["type"]]


@functools.cache
def _byte_level() -> dict[str, int]:
    """The byte behind each character of a byte-level token (GPT-2's table).

    Bytes that print stand for themselves, the others for the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + index): byte for index, byte in enumerate(others)}


class TextStream:
    """Turns a row's tokens into text as they come.

    The pieces and `end()`, joined, are what `decode(prompt + new)` says after `decode(prompt)`: for
    every tokenizer, whatever the ids. (Where the prompt ends within a character that the new tokens
    finish, the two part before the end of `decode(prompt)`: what follows from there is new.) A
    piece is given out once no later token can change it, so none is ever taken back: bytes of a
    character that is not complete are held, and with a tokenizer that falls back to bytes all of a
    run of byte tokens, which is text or, with one wrong byte, U+FFFD throughout. The work grows
    with the number of tokens, and not with its square.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        prompt = [token for token in map(int, prompt_ids) if not self._is_silent(token)]
        kind = _Bytes if tokenizer.is_byte_level else _Window
        self._reader: _Reader = kind(tokenizer, prompt)
        self._told = self._reader.rest()  # of the prompt's end, which may turn out otherwise

    def push(self, token: int) -> str:
        """The text that `token` completes; "" while a character is incomplete."""
        return "" if self._is_silent(token) else self._new(self._reader.push(int(token)))

    def end(self) -> str:
        """The rest of the text, which was held back."""
        return self._new(self._reader.rest())

    def _is_silent(self, token: int) -> bool:
        """True for a token that decoding leaves out, as if it were not there."""
        skipped = self._skip and token in self._tokenizer.silent
        return skipped or self._tokenizer.token(token) is None

    def _new(self, text: str) -> str:
        """The part of `text` that the prompt did not say."""
        if not self._told or not text:
            return text
        pairs = enumerate(zip(self._told, text, strict=False))
        shorter = min(len(self._told), len(text))
        same = next((index for index, (one, other) in pairs if one != other), shorter)
        self._told = self._told[same:] if same == len(text) else ""
        return text[same:]


def pieces(tokenizer: Tokenizer, ids: Sequence[int], skip_special_tokens: bool = True) -> list[str]:
    """The text that each of `ids` completes: joined, what they decode to."""
    stream = TextStream(tokenizer, (), skip_special_tokens)
    out = [stream.push(token) for token in ids]
    if out:
        out[-1] += stream.end()
    return out


class _Reader(Protocol):
    """Tokens to text, without those that leave none."""

    def push(self, token: int) -> str:
        """The text that is certain with one more token, and was not before."""

    def rest(self) -> str:
        """The text that follows if no token does."""


class _Bytes:
    """Of a tokenizer whose tokens are bytes: UTF-8, read as it comes."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._spelling = tokenizer.spelling
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        end = b""
        for token in reversed(prompt):  # a character begins within that many bytes
            if len(end) >= LONGEST_PARTIAL:
                break
            end = (self._spelling(token) or b"") + end
        self._decoder.decode(end)

    def push(self, token: int) -> str:
        return self._decoder.decode(self._spelling(token) or b"")

    def rest(self) -> str:
        return self._decoder.getstate()[0].decode(errors="replace")


class _Window:
    """Of any tokenizer: the last tokens are decoded again, and what is new of their text is given.

    Those before the last whole piece are forgotten but for one or two that have a text: what is new
    is never the first of a text, where decoders take off a space, and no run of bytes is cut.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        start = len(prompt)
        while start and tokenizer.is_byte(prompt[start - 1]):
            start -= 1
        size, text = 1, ""
        while start and not (text := self._decode(prompt[max(0, start - size) : start])):
            if size >= start:
                break
            size *= 2
        self._ids = list(prompt[max(0, start - size) :])
        self._given = len(text)  # characters of what the window decodes to

    def push(self, token: int) -> str:
        self._ids.append(token)
        if self._tokenizer.is_byte(token):
            return ""
        text = self._decode(self._ids)
        whole = text.rstrip(REPLACEMENT) if self._tokenizer.bytes_are == "ByteLevel" else text
        piece = text[self._given : len(whole)]
        self._given = max(self._given, len(whole))
        if whole == text:
            self._forget()
        return piece

    def rest(self) -> str:
        return self._decode(self._ids)[self._given :]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def _forget(self) -> None:
        for size in range(1, min(len(self._ids), 3)):
            if text := self._decode(self._ids[-size:]):
                self._ids, self._given = self._ids[-size:], len(text)
                return
