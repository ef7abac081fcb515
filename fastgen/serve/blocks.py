"""An answer as blocks of `/v1/messages`: they grow as it is read, and each change is an event."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Sequence
from typing import Any

from fastgen.serve.tools.reader import AnswerEvent

Block = dict[str, Any]
Event = dict[str, Any]

SIGNATURE = "fastgen"  # of thoughts: nothing looks at it


class Blocks:
    """The blocks of one answer: thoughts, texts and uses of tools, in the order of their beginning.

    Args:
        omitted: whether thoughts are left out, and only said to have been there.

    Attributes:
        blocks: those that are over, and the one that grows.
        whole: whether each of them is over as it should be, rather than cut off.
    """

    def __init__(self, omitted: bool = False) -> None:
        self.blocks: list[Block] = []
        self.whole: list[bool] = []
        self._omitted = omitted
        self._open: str | None = None  # the type of the block that grows
        self._pieces: list[str] = []

    def take(self, events: Sequence[AnswerEvent]) -> Iterator[Event]:
        """Read what a token says."""
        for event in events:
            if event.kind == "reasoning":
                yield from self._grow("thinking", "thinking_delta", "thinking", event.text)
            elif event.kind == "content":
                yield from self._grow("text", "text_delta", "text", event.text)
            elif event.kind == "call":
                yield from self._begin("tool_use", event.text)
            elif event.kind == "arguments":
                yield from self._grow("tool_use", "input_json_delta", "partial_json", event.text)
            elif event.kind == "end":
                yield from self.end()
            else:
                yield from self.end(whole=False)
                if event.text:
                    yield from self._grow("text", "text_delta", "text", event.text)

    def end(self, whole: bool = True) -> Iterator[Event]:
        """End the block that grows, if one does.

        Args:
            whole: whether it was not cut off.
        """
        if self._open is None:
            return
        text, block = "".join(self._pieces), self.blocks[-1]
        if self._open == "tool_use":
            block["input"] = json.loads(text or "{}") if whole else {}
        elif self._open == "thinking":
            block |= {"thinking": text, "signature": SIGNATURE}
            yield self._delta("signature_delta", "signature", SIGNATURE)
        else:
            block["text"] = text
        self.whole[-1] = whole
        self._open, self._pieces = None, []
        yield {"type": "content_block_stop", "index": len(self.blocks) - 1}

    def _begin(self, kind: str, name: str = "") -> Iterator[Event]:
        yield from self.end()
        of_kind: dict[str, Block] = {
            "text": {"text": ""},
            "thinking": {"thinking": "", "signature": ""},
            "tool_use": {"id": f"toolu_{secrets.token_hex(12)}", "name": name, "input": {}},
        }
        block = {"type": kind, **of_kind[kind]}
        self.blocks.append(block)
        self.whole.append(False)
        self._open = kind
        index = len(self.blocks) - 1
        yield {"type": "content_block_start", "index": index, "content_block": {**block}}

    def _grow(self, kind: str, delta: str, name: str, piece: str) -> Iterator[Event]:
        if self._open != kind:
            yield from self._begin(kind)
        if kind == "thinking" and self._omitted:
            return
        self._pieces.append(piece)
        yield self._delta(delta, name, piece)

    def _delta(self, kind: str, name: str, piece: str) -> Event:
        index = len(self.blocks) - 1
        return {"type": "content_block_delta", "index": index, "delta": {"type": kind, name: piece}}
