"""A request up to its calls: prompts become ids, knobs and ids become calls.

Nothing here runs a model: `Service` runs the calls in its engine, a job in its own scheduler.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, TypeVar

from fastgen.engine import score
from fastgen.engine.call import Call
from fastgen.engine.output import Token
from fastgen.engine.schedule import Job
from fastgen.engine.writer import Writer
from fastgen.generator import CausalLM
from fastgen.inputs.params import FORMS, Params
from fastgen.sampling import constraint
from fastgen.serve.answers import GeneratedText
from fastgen.serve.dialects import FieldLog
from fastgen.serve.limits import RequestLimits
from fastgen.serve.reasoning import FORMATS
from fastgen.serve.refused import Full, Refused, refusal, wrong
from fastgen.serve.run import Run
from fastgen.serve.tools import shown
from fastgen.serve.tools.format import Format
from fastgen.serve.tools.plain import Plain, told
from fastgen.serve.tools.reader import AnswerReader, Marks, ReadingOptions
from fastgen.serve.tools.shown import TemplateForms
from fastgen.serve.wire import GenerationRequest
from fastgen.text import chat_template
from fastgen.text.tokenizer import pieces

MOST_GRAMMARS = 16  # new ones that wait to be compiled
LONG = 1 << 14  # bytes of a text that waits until others of its kind have been cut into tokens
LARGE = 1 << 12  # tokens and alternatives of an answer that is put together beside the event loop

Made = TypeVar("Made")


class Front:
    """One model, and the making of calls of requests.

    A subclass runs them: `run`, `through` and, where others must not wait, `aside`.

    Args:
        model: answers.
        name: that clients see; None for the model's own.
        limits: of a request.
        reasoning: "auto" to split it from the content, "none" to leave it there.
        plain_tools: whether a model whose template knows no tools is told of them in words.
        free_calls: whether calls that are not forced are left to the model: not held to their
            tools' schemas.

    Raises:
        ValueError: a setting that cannot be.
    """

    def __init__(
        self,
        model: CausalLM,
        name: str | None = None,
        limits: RequestLimits | None = None,
        *,
        reasoning: str = "auto",
        plain_tools: bool = False,
        free_calls: bool = False,
    ) -> None:
        if reasoning not in FORMATS:
            raise ValueError(f"reasoning must be {' or '.join(FORMATS)}, got {reasoning!r}")
        self.model, self.limits = model, limits or RequestLimits()
        self.raw, self.free_calls, self._plain_tools = reasoning == "none", free_calls, plain_tools
        self._new_grammars = 0
        self.noted = FieldLog()
        self.info = model.model.info
        self.name = name or self.info.name or model.directory.name
        self.defaults = model.generation_config.to_dict()
        self.has_template = model.has_tokenizer and chat_template.has_template(
            model.directory, model.tokenizer.config
        )
        self.template = (
            chat_template.source(model.directory, model.tokenizer.config, True)
            if self.has_template
            else ""
        )

    async def run(
        self,
        prompts: Sequence[list[int]],
        request: GenerationRequest,
        usual: int,
        kept: frozenset[int] = frozenset(),
    ) -> Run:
        """Let the calls of a request begin.

        Args:
            usual: new tokens where nobody says how many, and there is room for them.
            kept: special tokens that are part of the text.

        Raises:
            Refused: a call that cannot be, or cannot be now.
        """
        raise NotImplementedError

    async def through(self, jobs: Sequence[tuple[Job, Writer | None]]) -> list[tuple[int, Token]]:
        """Run jobs to their end.

        Returns:
            the new tokens, each with the index of its job.
        """
        raise NotImplementedError

    async def aside(self, work: Callable[[], Made], queue: str | None = None) -> Made:
        """Do work that takes its time, and return its result: here and now.

        Args:
            queue: "tokens" or "grammars": of these, one piece of work at a time.
        """
        return work()

    async def put_together(self, size: int, work: Callable[[], Made]) -> Made:
        """Do the work of an answer of `size` tokens, aside if they are many."""
        return await self.aside(work) if size > LARGE else work()

    # --- the model's own forms -------------------------------------------------------------------

    @cached_property
    def shown(self) -> TemplateForms:
        """The forms of calls and of reasoning that the chat template shows."""
        return shown.of(self.model)

    @cached_property
    def format(self) -> Format | None:
        """The format in which the model writes calls of tools; None where that is not known."""
        if self._plain_tools and not self.shown.tools:
            return Plain()
        return self.shown.format

    @cached_property
    def specials(self) -> dict[str, int]:
        """The special tokens by their spelling."""
        tokenizer, size = self.model.tokenizer, self.info.vocab_size
        spelt = ((tokenizer.token(token) or "", token) for token in tokenizer.special_ids())
        return {text: token for text, token in spelt if token < size}

    def kept(self, marks: Collection[str]) -> frozenset[int]:
        """The special tokens that marks are made of."""
        tokens = (
            token for text, token in self.specials.items() if any(text in mark for mark in marks)
        )
        return frozenset(tokens)

    @property
    def marks(self) -> Marks | None:
        """The marks around reasoning; None where the model is not known to think."""
        return self.shown.reasoning

    def kept_for(self, tools: bool) -> frozenset[int]:
        """The special tokens that have to be read.

        Args:
            tools: whether there are any.
        """
        marks = [*((self.marks.begin, self.marks.end) if self.marks else ())]
        if self.format is not None and (tools or self.format.channels):
            marks += self.format.marks
        return self.kept(marks)

    def reader(self, asked: ReadingOptions) -> AnswerReader | None:
        """The reader of an answer; None where there is nothing in it but content."""
        if self.format is not None and (asked.tools or self.format.channels):
            return self.format.read(asked)
        return AnswerReader(asked) if asked.reasoning is not None else None

    # --- prompts ---------------------------------------------------------------------------------

    async def prompts(self, given: Any, new: int | None = None) -> list[list[int]]:
        """The ids of the prompts of a completion.

        Args:
            new: tokens that are to follow each of them; the first that has no room ends it.

        Raises:
            Refused: a text without a tokenizer, ids that the model does not have, or too many.
        """
        if isinstance(given, str) or not given or isinstance(given[0], int):
            given = [given]
        self.limits.check("prompts", len(given), "prompt")
        out = []
        for index, prompt in enumerate(given):
            ids = await self.ids(prompt) if isinstance(prompt, str) else list(prompt)
            if not ids:
                raise Refused(400, f"prompt {index} is empty", param="prompt")
            self.known(ids, "prompt")
            self.room(len(ids), new, 1)
            out.append(ids)
        return out

    def known(self, ids: Sequence[int], name: str) -> None:
        """Refuse the field `name` where it has ids that are no tokens of the model's."""
        most = self.info.vocab_size - 1
        for one in (min(ids, default=0), max(ids, default=0)):
            if not 0 <= one <= most:
                raise Refused(400, f"{name} must hold ids of 0 to {most}, got {one}", param=name)

    async def ids(self, text: str, special: bool = True) -> list[int]:
        """The ids of a text, which is cut beside the event loop.

        Raises:
            Refused: the model has no tokenizer, or it is no text, or a longer one than may be.
        """
        if not self.model.has_tokenizer:
            raise Refused(400, "this model was exported for ids only: send token ids")
        try:
            size = len(text.encode())
        except UnicodeEncodeError as error:
            raise Refused(400, f"the text is no Unicode: {error.reason}") from error
        self.limits.check("text", size, "prompt")
        cut = partial(self.model.tokenizer.encode, text, add_special_tokens=special)
        return await self.aside(cut, "tokens" if size > LONG else None)

    async def conversation(
        self, messages: Sequence[dict[str, Any]], functions: Any, variables: dict[str, Any]
    ) -> tuple[list[int], str]:
        """The ids of a conversation, by the model's chat template, and its text.

        Raises:
            Refused: it has none, or that refuses the messages.
        """
        if not self.has_template:
            raise Refused(400, f"{self.name} has no chat template: use /v1/completions")
        if isinstance(self.format, Plain):
            messages, functions = told(messages, functions), None
        if functions:
            variables = dict.fromkeys(self.shown.variables, functions) | variables
        try:
            text = await self.aside(partial(self.model.chat_text, messages, functions, variables))
        except (ValueError, TypeError) as error:
            raise Refused(400, str(error), param="messages") from error
        return await self.ids(text, special=False), text

    # --- calls -----------------------------------------------------------------------------------

    def written(
        self,
        prompts: Sequence[list[int]],
        request: GenerationRequest,
        usual: int,
        kept: frozenset[int],
    ) -> list[tuple[Job, Writer | None]]:
        """The calls of a request, each with what writes its texts."""
        calls = self.calls(prompts, request, usual)
        if request.alternatives is not None:
            new = sum(_most_new(call) for call in calls)
            self._listed(new * (request.copies if request.same else 1), request.alternatives)
        return [(call, self.model.writer(call, skip_special_tokens=not kept)) for call in calls]

    def _listed(self, tokens: int, alternatives: int) -> None:
        """Refuse an answer of more log-probabilities than may be in one."""
        self.limits.check("logprobs", tokens * (1 + alternatives), "logprobs")

    async def compiled(self, knobs: Mapping[str, Any]) -> None:
        """Let a grammar that is new be compiled where it delays nothing but new grammars.

        Raises:
            Refused: it cannot be used, or too many wait.
        """
        asked = {name: knobs[name] for name in FORMS if knobs.get(name) is not None}
        if len(asked) != 1 or not self.model.has_tokenizer:
            return
        tokenizer, vocab_size = self.model.tokenizer, self.info.vocab_size
        try:
            form = await self.aside(partial(Params, **asked))
            if await self.aside(partial(constraint.is_known, form, tokenizer, vocab_size)):
                return
            if self._new_grammars >= MOST_GRAMMARS:
                raise refusal(Full())
            self._new_grammars += 1
            try:
                build = partial(constraint.build, form, tokenizer, vocab_size, 1)
                await self.aside(build, "grammars")
            finally:
                self._new_grammars -= 1
        except ValueError as error:
            raise refusal(error) from error

    async def healed(
        self, prompts: Sequence[list[int]], request: GenerationRequest
    ) -> tuple[Sequence[list[int]], GenerationRequest]:
        """Prompts with the last tokens that `token_healing` finds for them, and what is left to do.

        They are read by the engine, as all prompts, and not when the calls are made.

        Raises:
            Refused: it cannot be done, or cannot be now.
        """
        asked = request.knobs.get("token_healing", self.defaults.get("token_healing"))
        if asked is not True or not self.model.has_tokenizer:
            return prompts, request
        try:
            healed = [await self.aside(partial(self.model.healing, ids)) for ids in prompts]
        except ValueError as error:
            raise refusal(error) from error
        out = [ids for ids, _ in healed]
        calls = [(index, call) for index, (_, call) in enumerate(healed) if call is not None]
        for which, token in await self.through(
            [(call, self.model.writer(call)) for _, call in calls]
        ):
            index = calls[which][0]
            out[index] = [*out[index], token.id]
        return out, replace(request, knobs={**request.knobs, "token_healing": False})

    def texts(
        self, prompts: int, request: GenerationRequest, kept: frozenset[int] = frozenset()
    ) -> list[GeneratedText]:
        """The texts of the answers to that many prompts, still empty: one for each copy."""
        cuts = (request.stops or kept) and self.model.has_tokenizer
        hidden = {i: text for i, text in self._spelt.items() if i not in kept} if cuts else {}
        return [GeneratedText(request.stops, hidden) for _ in range(prompts * request.copies)]

    @cached_property
    def _spelt(self) -> dict[int, str]:
        """The special tokens with their spelling."""
        tokenizer = self.model.tokenizer
        spelt = ((token, tokenizer.spelling(token) or b"") for token in tokenizer.silent)
        return {token: text.decode(errors="replace") for token, text in spelt}

    def calls(
        self, prompts: Sequence[list[int]], request: GenerationRequest, usual: int
    ) -> list[Call]:
        knobs = dict(request.knobs)
        compared = request.alternatives is not None or request.copies > request.n
        by_length = request.new is None and knobs.get("max_length") is not None
        if request.alternatives:
            knobs["top_logprobs"] = request.alternatives
        try:
            return [
                self.model.call(
                    [ids],
                    attention_mask=[[1] * len(ids)],
                    logprobs="model" if compared else False,
                    stop=request.stop,
                    max_new_tokens=None if by_length else self.room(len(ids), request.new, usual),
                    num_return_sequences=1 if request.same else request.copies,
                    **knobs,
                )
                for ids in prompts
            ]
        except ValueError as error:
            raise wrong(str(error), request.names) from error

    def room(self, prompt: int, new: int | None, usual: int) -> int:
        """The number of new tokens after a prompt of `prompt` tokens.

        Raises:
            Refused: they do not fit into the model's context.
        """
        limit, least = self.info.max_length, 1 if new is None else new
        if limit is not None and prompt + least > limit:
            raise Refused(
                400,
                f"the context is {limit} tokens, this asks for {prompt + least}: "
                f"{prompt} of the prompt and {least} new ones",
                param="prompt",
                code="context_length_exceeded",
            )
        if new is None:
            return usual if limit is None else min(usual, limit - prompt)
        return new

    async def scored(self, prompts: Sequence[list[int]], count: int) -> list[list[Token]]:
        """The tokens of prompts as if they had been generated; the first has no probability.

        They are scored by the engine, between the steps of all that runs there.

        Args:
            count: alternatives of each.

        Raises:
            Refused: what cannot be, or cannot be now.
        """
        self._listed(sum(map(len, prompts)), count)
        texts = [score.Scoring(self.model.model, ids, count) for ids in prompts]
        await self.through([(one, None) for one in texts])
        return [await self.aside(partial(self._told, one)) for one in texts]

    def _told(self, scored: score.Scoring) -> list[Token]:
        """A text that has been scored as tokens."""
        ids = scored.ids.tolist()
        texts = pieces(self.model.tokenizer, ids, skip_special_tokens=False)
        made = zip(ids, texts, scored.logprobs, scored.tops, strict=True)
        return [Token(token, text, logprob, top, None) for token, text, logprob, top in made]


def _most_new(call: Call) -> int:
    """The new tokens that a call can come to, of all its rows."""
    return len(call.request.rows) * (call.request.max_length - call.request.prompt_length)
