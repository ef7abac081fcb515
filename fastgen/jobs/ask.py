"""What a row asks for: its prompt as ids, its knobs, and what of it is given back."""

from __future__ import annotations

import functools
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from fastgen.engine.call import Call, Writer
from fastgen.engine.output import Token
from fastgen.generator import CausalLM
from fastgen.inputs import params, validators
from fastgen.jobs.row import LENGTHS, Outcome, Row, seed_of
from fastgen.store.model_info import CHAT_TEMPLATE
from fastgen.system import extras
from fastgen.text import chat_template
from fastgen.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from fastgen.jobs.openai import Line, Offline

PROMPTS = ("prompt", "messages", "input_ids", "prompt_ids")
OF_CHAT = ("tools", "template_variables")
OBJECTS = ("negative_prompt_ids",)  # arguments of `generate` that JSON can hold
ALWAYS = ("id", "custom_id", "metadata")  # fields that are given back without being asked for
# What an output calls its own.
OURS = frozenset({
    "file", "row", "text", "ids", "finish_reason", "top_logprobs", "prompt_tokens", "new_tokens",
    "error", "warnings",
})  # fmt: skip
ALL = "*"  # of `keep`: every field that is neither a prompt nor a knob
# Where nobody sets a length: as in `fastgen generate`, and as in `CausalLM.chat`.
NEW_TOKENS, OF_REPLY = 64, chat_template.MAX_NEW_TOKENS
KNOBS = frozenset({*params.KNOWN, *OBJECTS, "generation_config"})


class Wanted(Protocol):
    """What a row asks for."""

    @property
    def length(self) -> int:
        """Tokens that it may come to, prompt included."""

    def calls(self) -> Sequence[tuple[Call, Writer]]:
        """Its calls, and what makes their tokens; an error if it cannot be."""

    def answer(self, tokens: Sequence[Sequence[Token]], notes: Sequence[str]) -> Outcome:
        """What it becomes, of the tokens of each call and what was warned of."""

    def refused(self, error: Exception) -> Outcome:
        """What it becomes where it comes to nothing; raises what is no fault of the row's."""


@dataclass(frozen=True)
class Ask:
    """One row, ready to become a call.

    Attributes:
        ids: the prompt.
        knobs: of `generate`.
        kept: the row's own fields, and where it was, for its output.
        shows_ids: whether the tokens are given out too; they always are without a tokenizer.
    """

    model: CausalLM
    ids: list[int]
    knobs: Mapping[str, Any]
    kept: Mapping[str, Any]
    shows_ids: bool

    @property
    def length(self) -> int:
        """Tokens that it may come to, prompt included, as far as the knobs say."""
        new, longest = self.knobs.get("max_new_tokens"), self.knobs.get("max_length")
        if isinstance(new, int):
            return len(self.ids) + new
        return longest if isinstance(longest, int) else len(self.ids) + NEW_TOKENS

    def calls(self) -> Sequence[tuple[Call, Writer]]:
        """The only one.

        Raises:
            ValueError: it cannot be run.
        """
        call = self.model.call([self.ids], **self.knobs)
        return [(call, self.model.writer(call))]

    def answer(self, tokens: Sequence[Sequence[Token]], notes: Sequence[str]) -> Outcome:
        """The output of a row: lists where it asks for several sequences."""
        rows: dict[int, list[Token]] = {}
        for token in tokens[0]:
            rows.setdefault(token.row, []).append(token)
        found = [rows[place] for place in sorted(rows)]
        said: dict[str, list[Any]] = {}
        if self.model.has_tokenizer:
            said["text"] = ["".join(token.text for token in row) for row in found]
        if self.shows_ids or not self.model.has_tokenizer:
            said["ids"] = [[token.id for token in row] for row in found]
        said["finish_reason"] = [row[-1].finish_reason for row in found]
        if found[0][0].top_logprobs is not None:
            said["top_logprobs"] = [[token.top_logprobs for token in row] for row in found]
        count = len(tokens[0])
        output = {
            **self.kept,
            **{name: value[0] if len(found) == 1 else value for name, value in said.items()},
            "prompt_tokens": len(self.ids),
            "new_tokens": count,
            **({"warnings": list(notes)} if notes else {}),
        }
        return Outcome(output, count)

    def refused(self, error: Exception) -> Outcome:
        """An error in its place."""
        if not isinstance(error, ValueError):
            raise error
        return Outcome.failed(error, self.kept)


def is_openai(fields: Mapping[str, Any]) -> bool:
    """Whether a row is a line of OpenAI's batch API."""
    return "body" in fields and "url" in fields


class Reader:
    """Makes rows of a job to asks.

    Args:
        knobs: the job's own, for rows that say nothing else.
        keep: fields to give back besides `ALWAYS`; `ALL` for all that mean nothing here.
        seed: the job's. A row without a seed of its own has one made of it.
        ids: whether the tokens are given out too.
        created: when the job was begun (Unix seconds), for answers that say it; None for now.

    Raises:
        ValueError: a field to keep has the name of one of the output's.
    """

    def __init__(
        self,
        model: CausalLM,
        knobs: Mapping[str, Any],
        keep: Collection[str] = (),
        seed: int = 0,
        ids: bool = False,
        created: int | None = None,
    ) -> None:
        self.model, self.knobs, self.seed, self.ids = model, dict(knobs), seed, ids
        self.created = int(time.time()) if created is None else created
        self.keep, self.keeps_all = {*ALWAYS, *keep}, ALL in keep
        if odd := sorted(OURS & self.keep):
            raise ValueError(f"{odd[0]} cannot be kept: the output has a field of that name")

    def __call__(self, row: Row, fields: Mapping[str, Any]) -> Ask:
        """What a row asks for.

        Raises:
            ValueError: it has no prompt or several, or a field that nobody knows.
        """
        self.check(fields)
        (kind, *others) = [one for one in PROMPTS if fields.get(one) is not None] or [""]
        if not kind or others:
            found = " and ".join([kind, *others]) if others else "none"
            raise ValueError(f"needs one of {', '.join(PROMPTS)}; got {found}")
        if kind != "messages" and (odd := [one for one in OF_CHAT if one in fields]):
            raise ValueError(f"{odd[0]} needs messages")
        ids = self._ids(kind, fields)
        knobs = {"seed": seed_of(self.seed, row.name)}
        knobs |= {one: value for one, value in fields.items() if one in KNOBS}
        kept = row.place | self.kept(fields)
        return Ask(self.model, ids, self._jobs(kind, knobs) | knobs, kept, self.ids)

    def line(self, row: Row, fields: Mapping[str, Any]) -> Line:
        """What a line of OpenAI's asks for; one that cannot be says so in its answer.

        Raises:
            ValueError: the extra `serve` is not installed.
        """
        return self._offline.line(fields, row.name)

    @functools.cached_property
    def _offline(self) -> Offline:
        try:
            from fastgen.jobs.openai import Offline
        except ImportError as error:
            raise ValueError(
                f"OpenAI's lines need the service: {extras.install('serve')} ({error})"
            ) from error
        return Offline(self.model, self.knobs, self.seed, self.created)

    def check(self, names: Collection[str]) -> None:
        """Raise a ValueError for a name that is no keyword and that nobody asked to keep."""
        for name in names:
            if name in KNOBS or name in PROMPTS or name in OF_CHAT or self.is_kept(name):
                continue
            try:
                params.resolve({}, None, {name: None})
            except ValueError as error:
                raise ValueError(f"{error} (fields of your own: --keep {name})") from error

    def kept(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The fields that are given back."""
        return {name: value for name, value in fields.items() if self.is_kept(name)}

    def is_kept(self, name: str) -> bool:
        """Whether the output has this field of the input."""
        known = name in KNOBS or name in PROMPTS or name in OF_CHAT
        return name in self.keep or (self.keeps_all and not known and name not in OURS)

    def _ids(self, kind: str, fields: Mapping[str, Any]) -> list[int]:
        value = fields[kind]
        if kind == "messages":
            return self._of_chat(value, fields.get("tools"), fields.get("template_variables"))
        if kind == "prompt" and not (isinstance(value, list) and value):
            return self.model.tokenizer.encode(validators.text("prompt", value))
        if not isinstance(value, list):
            raise validators.wrong(kind, "a list of token ids", value)
        return [validators.integer(kind, one) for one in value]

    @functools.cached_property
    def _of_templates(self) -> Tokenizer:
        """The tokenizer, once it is known that the template is as it was exported."""
        self.model.model.info.check(self.model.directory, CHAT_TEMPLATE)
        return self.model.tokenizer

    def _of_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any] | None,
    ) -> list[int]:
        tokenizer = self._of_templates
        if not isinstance(messages, list):
            raise validators.wrong("messages", "a list of objects", messages)
        if not isinstance(variables or {}, Mapping):
            raise validators.wrong("template_variables", "an object", variables)
        text = chat_template.prompt(
            self.model.directory, tokenizer.config, messages, tools, **(variables or {})
        )
        return tokenizer.encode(text, add_special_tokens=False)

    def _jobs(self, kind: str, own: Mapping[str, Any]) -> dict[str, Any]:
        """The job's knobs for a row with these of its own. Whoever sets a length sets it alone."""
        if any(own.get(name) for name in LENGTHS):
            return {name: value for name, value in self.knobs.items() if name not in LENGTHS}
        known = self.model.generation_config.to_dict() | self.knobs
        if any(known.get(name) for name in LENGTHS):
            return self.knobs
        return self.knobs | {"max_new_tokens": NEW_TOKENS if kind != "messages" else OF_REPLY}
