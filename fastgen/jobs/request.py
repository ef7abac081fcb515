"""The request of a row: its prompt as ids, its knobs, and the fields that its output has too."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fastgen.engine.call import Call
from fastgen.engine.output import Token
from fastgen.engine.writer import Writer
from fastgen.generator import CausalLM
from fastgen.inputs import params, validators
from fastgen.inputs.lengths import LENGTHS, NEW_TOKENS, default_length
from fastgen.jobs.row import InputRow, KeptFields, Outcome, seed_of

PROMPTS = ("prompt", "messages", "input_ids", "prompt_ids")
OF_CHAT = ("tools", "template_variables")
OBJECTS = ("negative_prompt_ids",)  # arguments of `generate` that JSON can hold
OUTPUT = frozenset({
    "file", "row", "text", "ids", "finish_reason", "top_logprobs", "prompt_tokens", "new_tokens",
    "error", "warnings",
})  # fmt: skip
KNOBS = frozenset({*params.KNOWN, *OBJECTS, "generation_config"})
KNOWN = KNOBS | {*PROMPTS, *OF_CHAT}


class RowRequest(Protocol):
    """The request of a row."""

    @property
    def length(self) -> int:
        """Tokens that it may come to, prompt included."""

    def calls(self) -> Sequence[tuple[Call, Writer]]:
        """Its calls, each with the writer of its tokens; an error if it cannot be."""

    def answer(self, tokens: Sequence[Sequence[Token]], notes: Sequence[str]) -> Outcome:
        """Its outcome, of the tokens of each call and the warnings."""

    def refused(self, error: Exception) -> Outcome:
        """Its outcome where it comes to nothing; raises an error that is not the row's fault."""


@dataclass(frozen=True)
class PromptRequest:
    """A row of a prompt and knobs, ready to become a call.

    Attributes:
        ids: the prompt.
        knobs: of `generate`.
        kept: the row's place and own fields, for its output.
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
        return longest if isinstance(longest, int) else len(self.ids) + NEW_TOKENS["text"]

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
        sequences = [rows[index] for index in sorted(rows)]
        said: dict[str, list[Any]] = {}
        if self.model.has_tokenizer:
            said["text"] = ["".join(token.text for token in row) for row in sequences]
        if self.shows_ids or not self.model.has_tokenizer:
            said["ids"] = [[token.id for token in row] for row in sequences]
        said["finish_reason"] = [row[-1].finish_reason for row in sequences]
        if sequences[0][0].top_logprobs is not None:
            said["top_logprobs"] = [[token.top_logprobs for token in row] for row in sequences]
        count = len(tokens[0])
        output = {
            **self.kept,
            **{name: value[0] if len(sequences) == 1 else value for name, value in said.items()},
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
    """True for a line of OpenAI's batch API."""
    return "body" in fields and "url" in fields


class RowReader:
    """Makes requests of the rows of a job.

    Args:
        knobs: the job's own, for rows that say nothing else.
        keep: fields to give back (see `KeptFields`).
        seed: the job's. A row without a seed of its own has one made of it.
        ids: whether the tokens are given out too.
        created: when the job was begun (Unix seconds), for answers that say it; None for now.

    Attributes:
        kept: the fields of a row that its output has too.

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
        self.created = created
        self.kept = KeptFields(keep, KNOWN, OUTPUT)

    def __call__(self, row: InputRow, fields: Mapping[str, Any]) -> PromptRequest:
        """Make the request of a row.

        Raises:
            ValueError: it has no prompt or several, or a field that nobody knows.
        """
        self.check(fields)
        (kind, *others) = [name for name in PROMPTS if fields.get(name) is not None] or [""]
        if not kind or others:
            named = " and ".join([kind, *others]) if others else "none"
            raise ValueError(f"needs one of {', '.join(PROMPTS)}; got {named}")
        if kind != "messages" and (odd := [name for name in OF_CHAT if name in fields]):
            raise ValueError(f"{odd[0]} needs messages")
        ids = self._ids(kind, fields)
        knobs = {"seed": seed_of(self.seed, row.name)}
        knobs |= {name: value for name, value in fields.items() if name in KNOBS}
        kept = self.kept.of(row, fields)
        return PromptRequest(self.model, ids, self._jobs(kind, knobs) | knobs, kept, self.ids)

    def check(self, names: Collection[str]) -> None:
        """Raise a ValueError for a name that is no keyword and that nobody asked to keep."""
        for name in names:
            if name in KNOWN or name in self.kept:
                continue
            try:
                params.resolve({}, None, {name: None})
            except ValueError as error:
                raise ValueError(f"{error} (fields of your own: --keep {name})") from error

    def _ids(self, kind: str, fields: Mapping[str, Any]) -> list[int]:
        value = fields[kind]
        if kind == "messages":
            return self._of_chat(value, fields.get("tools"), fields.get("template_variables"))
        if kind == "prompt" and not (isinstance(value, list) and value):
            return self.model.tokenizer.encode(validators.text("prompt", value))
        if not isinstance(value, list):
            raise validators.wrong(kind, "a list of token ids", value)
        return [validators.integer(kind, item) for item in value]

    def _of_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any] | None,
    ) -> list[int]:
        if not isinstance(messages, list):
            raise validators.wrong("messages", "a list of objects", messages)
        if not isinstance(variables or {}, Mapping):
            raise validators.wrong("template_variables", "an object", variables)
        return self.model.chat_ids(messages, tools, variables)

    def _jobs(self, kind: str, own: Mapping[str, Any]) -> dict[str, Any]:
        """The job's knobs for a row with these of its own. Whoever sets a length sets it alone."""
        if any(own.get(name) for name in LENGTHS):
            return {name: value for name, value in self.knobs.items() if name not in LENGTHS}
        defaults = self.model.generation_config.to_dict()
        text = "reply" if kind == "messages" else "text"
        new = default_length(text, self.knobs, defaults)
        return self.knobs if new is None else self.knobs | {"max_new_tokens": new}
