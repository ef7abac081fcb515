"""A conversation: what was said, the model that answers, and what it has read of it so far.

A turn reads what is new. Prompts' keys and values stay in a `PrefixCache`; that keeps what was
read, and a reply was generated (see `prefix` for why that is not the same). So the last reply is
read once more, at the next turn or, by `read_ahead`, while the user thinks.

Where the messages outgrow the model's positions, the oldest turns are no longer read. Some more of
them go than need to: what is left begins alike for a few turns, and so need not be read again.
"""

from __future__ import annotations

import contextlib
import json
import time
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastgen.engine.call import Call
from fastgen.engine.prefill import CHUNK, prefill
from fastgen.engine.prefix_cache import BLOCK, MAX_BYTES, PrefixCache
from fastgen.generator import CausalLM
from fastgen.inputs import validators
from fastgen.inputs.lengths import default_length
from fastgen.inputs.params import NAMES, Params, drawn, resolve, sampling
from fastgen.store import files, jsonfile
from fastgen.store.model_info import CHAT_TEMPLATE, ModelInfo
from fastgen.system.cpu import memory_bytes
from fastgen.text import chat_template

Message = dict[str, str]  # {"role": "user", "content": "Hi"}
Pieces = Generator[str, None, None]  # of a text, as it comes

LEAST_ROOM = 1 / 4  # of the positions: what an answer finds, if it may become as long
KEPT = 3 / 4  # of the positions: what prompt and answer take after old turns were dropped
ADVICE = "load a file that was saved here, or one of the same form"


@dataclass(frozen=True)
class Took:
    """The work and the time that an answer took.

    Attributes:
        prompt: tokens of the prompt.
        read: how many of them were read; the others were known.
        new: tokens of the answer.
        first: seconds until the first of them.
        seconds: in all.
        steady: whether they came one after another, and not all at the end as those of beams do.
        finish_reason: of the answer (see `Token`); None if it was stopped.
    """

    prompt: int
    read: int
    new: int
    first: float
    seconds: float
    steady: bool
    finish_reason: str | None

    @property
    def rate(self) -> float:
        """Tokens a second: of those after the first; of all where they come at the end."""
        if self.steady and self.new > 1:
            return (self.new - 1) / max(self.seconds - self.first, 1e-9)
        return self.new / max(self.seconds, 1e-9)


class Conversation:
    """Messages and the model that answers them. One thread at a time may use it.

    With a chat template, messages become what the model was trained to answer. Without one the
    text of all messages is continued: each of the user's begins a line, and each answer goes on
    where that ended.

    Args:
        model: what answers.
        knobs: keywords of `generate`. Where no length is set, here or in the model's defaults, an
            answer has the length of a reply (see `lengths.NEW_TOKENS`), or without a template,
            and so mostly without an end, that of a text. Knobs of sampling that are not set are
            those of `params.sampling`.
        system: the system message; None for none.

    Attributes:
        has_template: whether the model has a chat template.
        turns: all messages but the system's, oldest first.
        system: the system message.
        knobs: what is set.
        cache: keeps what was read.
        took: of the last answer.
        dropped: messages of `turns` that are no longer read, since all do not fit.

    Raises:
        ValueError: a knob; the model has no tokenizer, or its template is damaged or refuses the
            system message.
    """

    def __init__(
        self, model: CausalLM, knobs: Mapping[str, Any] | None = None, system: str | None = None
    ) -> None:
        self.model = model
        model.model.info.check(model.directory, CHAT_TEMPLATE)
        self.has_template = chat_template.has_template(model.directory, model.tokenizer.config)
        self.cache = PrefixCache(_bytes_of_all(model.model.info))
        self.turns: list[Message] = []
        self.dropped = 0
        self.took: Took | None = None
        self.knobs: dict[str, Any] = {}
        self.system: str | None = None
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="fastgen-reads-ahead")
        self._ahead: Future[None] | None = None
        self._leaving = False
        self._set({**(knobs or {})})
        self.tell(system)

    @property
    def messages(self) -> list[Message]:
        """All of them, the system's first."""
        return [*self._system(self.system), *self.turns]

    @property
    def sampling(self) -> dict[str, Any] | None:
        """The knobs by which tokens are drawn, as they are now; None where none are."""
        return drawn(self._params(self.knobs))

    def close(self) -> None:
        """Stop reading ahead."""
        self._leaving = True
        self._reader.shutdown()

    # --- what may be changed ---------------------------------------------------------------------

    def set(self, name: str, value: Any) -> None:
        """Set a knob for the answers that follow; None switches it off.

        Raises:
            ValueError: there is no such knob, or it cannot have this value here.
        """
        self._set({**self.knobs, name: value})

    def unset(self, name: str) -> None:
        """Let a knob have the model's own default again.

        Raises:
            ValueError: it is not set, or the others need it.
        """
        if name not in self.knobs:
            raise ValueError(f"{name} is not set; set are: {', '.join(self.knobs) or 'none'}")
        self._set({key: value for key, value in self.knobs.items() if key != name})

    def _set(self, knobs: dict[str, Any]) -> None:
        """Take over `knobs` if a short call could be made with them."""
        params = self._params(knobs)
        for name in knobs:
            if name not in NAMES:
                raise ValueError(f"{name} changes nothing here")
        if params.num_return_sequences > 1:
            raise ValueError(
                "num_return_sequences must be 1, a turn has one answer, got "
                f"{params.num_return_sequences}"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about lengths, which are fitted to each prompt
            self.model.call([[0]], attention_mask=[[1]], **self._with_sampling(knobs))
        self.knobs = knobs

    def tell(self, system: str | None) -> None:
        """Change the system message; what was said stays.

        Raises:
            ValueError: the template refuses it.
        """
        system = validators.text("the system message", system) if system else None
        self._ids([*self._system(system), *self.turns[self.dropped :], _message("user", "Hi")])
        self.system = system

    def reset(self) -> None:
        """Forget what was said; the system message and the knobs stay."""
        self.turns, self.dropped = [], 0

    # --- files -----------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write the messages as JSON: {"messages": [{"role": "user", "content": "Hi"}, ...]}.

        Raises:
            ValueError: it cannot be written there.
        """
        text = json.dumps({"messages": self.messages}, ensure_ascii=False, indent=2)
        with files.atomic_file("the conversation's file", path) as file:
            file.write_text(text + "\n", encoding="utf-8")

    def load(self, path: Path) -> None:
        """Go on with the messages that `save` wrote, its system message included.

        Raises:
            OSError: there is no such file.
            ValueError: it holds no conversation, or the template refuses it.
        """
        path.open("rb").close()
        messages = jsonfile.take(
            jsonfile.read(path, ADVICE),
            path,
            "messages",
            _is_conversation,
            "a list of messages, each a role (system: the first one only, user or assistant) and a "
            "content, a text",
            ADVICE,
        )
        system = [message["content"] for message in messages if message["role"] == "system"]
        self._ids([*messages, _message("user", "Hi")])
        self.system = system[0] if system else None
        self.turns, self.dropped = messages[len(system) :], 0

    # --- a turn ----------------------------------------------------------------------------------

    def answer(self, text: str, stopped: Callable[[], bool] = lambda: False) -> Pieces:
        """Say something; the answer comes piece by piece, and `took` says what it took.

        Message and answer become part of the conversation as far as the answer came, and not at
        all if it was stopped before its first token.

        Args:
            text: the user's message.
            stopped: asked after each step, and each chunk of a prompt: whether that is enough.

        Raises:
            ValueError: the message is empty or too long, or no token can be chosen.
        """
        if not validators.text("the message", text):
            raise ValueError("the message is empty")
        self._wait()
        turns = [*self.turns, _message("user", text)]
        ids, new, self.dropped = self._fitted(turns)
        knobs = self._with_sampling({**self.knobs, "max_new_tokens": new})
        call = self.model.call(
            [ids], attention_mask=[[1] * len(ids)], prefix_cache=self.cache, **knobs
        )
        return self._answer(call, turns, stopped)

    def _answer(self, call: Call, turns: list[Message], stopped: Callable[[], bool]) -> Pieces:
        start, known = time.perf_counter(), self.cache.tokens_reused
        params, prompt = call.request.params, call.request.prompt_length
        writer, tokens, first = self.model.writer(call), [], 0.0
        try:
            with contextlib.closing(call.steps()) as steps:
                for step in steps:
                    for token in writer.take(step.events):
                        first = first or time.perf_counter() - start
                        tokens.append(token)
                        yield token.text
                    if stopped():
                        break
        finally:
            if tokens:
                reply = "".join(token.text for token in tokens)
                self.turns = [*turns, _message("assistant", reply)]
            self.took = Took(
                prompt=prompt,
                read=prompt - (self.cache.tokens_reused - known),
                new=len(tokens),
                first=first,
                seconds=time.perf_counter() - start,
                steady=params.num_beams == params.num_beam_groups == 1,
                finish_reason=tokens[-1].finish_reason if tokens else None,
            )

    def read_ahead(self) -> None:
        """Begin to read, in a thread, what the next prompt begins with whatever the user says.

        The next answer waits for that: it would have to read the same.
        """
        self._wait()
        now = [*self._system(self.system), *self.turns[self.dropped :]]
        one, other = (self._ids([*now, _message("user", text)]) for text in ("a", "b"))
        same = next(
            (i for i, pair in enumerate(zip(one, other, strict=False)) if len({*pair}) > 1),
            min(len(one), len(other)),
        )
        limit = self.model.model.info.max_length
        if same >= BLOCK and (limit is None or same <= limit):
            self._ahead = self._reader.submit(self._read, one[:same])

    def _read(self, ids: list[int]) -> None:
        model = self.model.model
        cache = model.borrow_cache(1, len(ids) + CHUNK)
        try:
            prompts = [np.array(ids, np.int64)]
            prefill(model, cache, prompts, 0, self.cache, lambda: self._leaving)
        finally:
            model.give_back(cache)

    def _wait(self) -> None:
        """Until what is read ahead has been read."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.result()

    # --- prompts ---------------------------------------------------------------------------------

    def _fitted(self, turns: list[Message]) -> tuple[list[int], int, int]:
        """The prompt, the new tokens that it leaves room for, and how many turns it leaves out."""
        params = self._params(self.knobs)
        usual = default_length("reply" if self.has_template else "text", vars(params))
        limits = [self.model.model.info.max_length]
        if params.max_new_tokens is None:
            limits.append(params.max_length)
        new = params.max_new_tokens or usual or params.max_length or 1
        limit = min((one for one in limits if one is not None), default=None)
        ids, dropped = self._prompt(turns, self.dropped), self.dropped
        if limit is None:
            return ids, new, dropped
        room = max(1, min(new, int(LEAST_ROOM * limit)))
        if len(ids) + room > limit:
            for first in range(dropped + 1, len(turns)):
                if turns[first]["role"] == "user":
                    ids, dropped = self._prompt(turns, first), first
                    if len(ids) + room <= KEPT * limit:
                        break
        if len(ids) >= limit:
            whose = "message takes" if self.system is None else "system message and this one take"
            asked = "" if limit == limits[0] else ", or set max_new_tokens in place of max_length"
            raise ValueError(
                f"the {whose} {len(ids)} tokens, and prompt and answer have {limit} together: "
                f"say it in fewer words{asked}"
            )
        return ids, min(new, limit - len(ids)), dropped

    def _prompt(self, turns: Sequence[Message], first: int) -> list[int]:
        return self._ids([*self._system(self.system), *turns[first:]])

    def _ids(self, messages: list[Message]) -> list[int]:
        """The tokens of messages, up to where the answer begins."""
        if self.has_template:
            return self.model.chat_ids(messages)
        return self.model.tokenizer.encode(continued(messages))

    @staticmethod
    def _system(system: str | None) -> list[Message]:
        return [] if system is None else [_message("system", system)]

    def _params(self, knobs: Mapping[str, Any]) -> Params:
        own = self.model.generation_config.to_dict()
        return resolve(own, None, self._with_sampling(knobs))

    def _with_sampling(self, knobs: Mapping[str, Any]) -> dict[str, Any]:
        """With what the model's own defaults leave open; those stay its own, as errors say."""
        own = self.model.generation_config.to_dict()
        first = sampling(own, knobs)
        return {**{n: v for n, v in first.items() if own.get(n) != v}, **knobs}


def continued(messages: Sequence[Message]) -> str:
    """The text of messages for a model without a template: an answer goes on where they end."""
    text = ""
    for message in messages:
        begins = text and message["role"] != "assistant"
        text += ("\n" if begins else "") + message["content"]
    return text


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _is_conversation(value: Any) -> bool:
    roles = {"user", "assistant"}
    return isinstance(value, list) and all(
        isinstance(message, dict)
        and message.keys() == {"role", "content"}
        and isinstance(message["content"], str)
        and message["role"] in (roles if index else {*roles, "system"})
        for index, message in enumerate(value)
    )


def _bytes_of_all(info: ModelInfo) -> int:
    """The bytes of keys, values and states of a whole context, within an eighth of the memory."""
    if info.max_length is None:
        return MAX_BYTES
    whole = info.max_length * info.cache_bytes + (info.max_length // CHUNK + 1) * info.state_bytes
    there = memory_bytes()
    return max(1, whole if there is None else min(whole, there // 8))
