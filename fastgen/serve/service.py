"""A request from its prompts to its tokens: calls are made, run by the engine, and cancelled."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, TypeVar

from fastgen.engine import score
from fastgen.engine.call import Call
from fastgen.engine.output import Token
from fastgen.engine.schedule import Job
from fastgen.engine.writer import Writer
from fastgen.generator import CausalLM
from fastgen.inputs.params import NAMES, Params
from fastgen.sampling import constraint, trial
from fastgen.serve.answers import Text, usage
from fastgen.serve.dialects import Noted
from fastgen.serve.engine import Engine, Full, News, Stopping, Stream
from fastgen.serve.limits import Limits
from fastgen.serve.metrics import Metrics
from fastgen.serve.reasoning import FORMATS
from fastgen.serve.refused import Refused
from fastgen.serve.tools import shown
from fastgen.serve.tools.format import Format
from fastgen.serve.tools.plain import Plain, told
from fastgen.serve.tools.reader import Asked, Marks, Reader
from fastgen.serve.tools.shown import Shown
from fastgen.serve.wire import StreamOptions, Wish
from fastgen.text import chat_template
from fastgen.text.tokenizer import pieces

MOST_GRAMMARS = 16  # new ones that wait to be compiled
RETRY = 1  # seconds after which a client may try again where the queue is full
LONG = 1 << 14  # bytes of a text that waits until others of its kind have been cut into tokens
LARGE = 1 << 12  # tokens and alternatives of an answer that is put together beside the event loop


Made = TypeVar("Made")


async def put_together(size: int, work: Callable[[], Made]) -> Made:
    """What `work` makes of an answer of so many tokens: beside the event loop if they are many."""
    return await asyncio.to_thread(work) if size > LARGE else work()


@dataclass
class Run:
    """The calls of one request while they run.

    Attributes:
        texts: of each row of each call, in order.
        prompt_tokens: of all prompts, each counted once.
        notes: what of the form that was asked for its texts are not held to; in order, each once.
        same: whether the texts of a call are copies of its only row.
        behind: whether there are more tokens at hand than the one that `tokens` gave last.
    """

    engine: Engine
    streams: list[Stream]
    inbox: asyncio.Queue[News]
    texts: list[Text] = field(default_factory=list)
    copies: int = 1
    prompt_tokens: int = 0
    notes: dict[str, None] = field(default_factory=dict, init=False)
    same: bool = field(default=False, kw_only=True)
    behind: bool = field(default=False, init=False)

    @property
    def new_tokens(self) -> int:
        return sum(text.count for text in self.texts)

    def warnings(self) -> dict[str, list[str]]:
        """The notes as a field of an answer; of a stream in its first piece only."""
        notes, self.notes = [*self.notes], {}
        return {"warnings": notes} if notes else {}

    def places(self, call: int, token: Token) -> Sequence[int]:
        """The texts that a token of a call belongs to."""
        first = call * self.copies
        return range(first, first + self.copies) if self.same else (first + token.row,)

    async def tokens(self) -> AsyncIterator[tuple[int, Token]]:
        """Each new token, and which text it belongs to.

        Raises:
            Refused: no token can be chosen; the service is stopped.
        """
        left = len(self.streams)
        while left:
            stream, tokens, done = await self.inbox.get()
            for left_here, token in zip(range(len(tokens) - 1, -1, -1), tokens, strict=True):
                self.behind = left_here > 0 or not self.inbox.empty()
                for place in self.places(stream.place, token):
                    yield place, token
            left -= done
            if stream.error is not None:
                raise refusal(stream.error)

    def cancel(self) -> None:
        """Let what is not over leave."""
        for stream in self.streams:
            self.engine.cancel(stream)


def so_far(run: Run, options: StreamOptions) -> dict[str, Any]:
    """What a chunk of a stream says of the tokens it took: nothing yet, unless each is to."""
    if not options.include_usage:
        return {}
    told = usage(run.prompt_tokens, run.new_tokens) if options.continuous_usage_stats else None
    return {"usage": told}


def refusal(error: Exception) -> Refused:
    """An error of a call as its client gets to see it."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, Stopping):
        return Refused(503, "the service is being stopped", code="stopping")
    if isinstance(error, Full):
        return Refused(
            429,
            "as many requests wait as may: try again later",
            code="queue_full",
            headers={"Retry-After": str(RETRY)},
        )
    if isinstance(error, ValueError):
        return _wrong(str(error), {})
    return failure(error)


def _wrong(message: str, names: Mapping[str, str]) -> Refused:
    """What is wrong with a request, in the words that it used itself (see `Wish.names`)."""
    first = message.partition(" ")[0].partition("=")[0]
    for ours, theirs in names.items():
        message = re.sub(rf"\b{ours}\b", theirs, message)
    return Refused(400, message, param=names.get(first, first) if first in NAMES else None)


def failure(error: Exception) -> Refused:
    """An error that is none of the client's."""
    return Refused(500, f"{type(error).__name__}: {error}", code="internal_error")


class Service:
    """One model, its engine and its counts.

    Args:
        model: what answers.
        name: what clients see it called; None for its own name.
        limits: what a request may ask for.
        grammars: what a new grammar may take until it is compiled.
        reasoning: "auto" to split it from the content, "none" to leave it there.
        plain_tools: whether a model whose template knows no tools is told of them in words.
        free_calls: whether calls that nobody forces are left to the model: not held to their
            tools' schemas.
        settings: see `Engine`.

    Raises:
        ValueError: a setting that cannot be.
    """

    def __init__(
        self,
        model: CausalLM,
        name: str | None = None,
        limits: Limits | None = None,
        grammars: trial.Limits | None = None,
        *,
        reasoning: str = "auto",
        plain_tools: bool = False,
        free_calls: bool = False,
        **settings: Any,
    ) -> None:
        if reasoning not in FORMATS:
            raise ValueError(f"reasoning must be {' or '.join(FORMATS)}, got {reasoning!r}")
        self.model, self.limits = model, limits or Limits()
        self.raw, self.free_calls, self._plain_tools = reasoning == "none", free_calls, plain_tools
        self._cutter = ThreadPoolExecutor(1, "fastgen-tokens")  # one long text at a time
        self._grammars = ThreadPoolExecutor(1, "fastgen-grammars")
        self._new_grammars = 0
        if grammars is not None and model.has_tokenizer:
            constraint.of(model.tokenizer).limits = grammars
        self.metrics = Metrics()
        self.engine = Engine(model, watch=self.metrics.step, **settings)
        self.metrics.watch(self.engine)
        self.started = time.time()
        self.noted = Noted()
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

    @cached_property
    def shown(self) -> Shown:
        """What the chat template shows of calls and of reasoning."""
        return shown.of(self.model)

    @cached_property
    def format(self) -> Format | None:
        """How the model writes calls of tools; None where that is not known."""
        if self._plain_tools and not self.shown.tools:
            return Plain()
        return self.shown.format

    @cached_property
    def specials(self) -> dict[str, int]:
        """The special tokens by their spelling."""
        tokenizer, size = self.model.tokenizer, self.info.vocab_size
        spelt = ((tokenizer.token(one) or "", one) for one in tokenizer.special_ids())
        return {text: one for text, one in spelt if one < size}

    def kept(self, marks: Collection[str]) -> frozenset[int]:
        """The special tokens that marks are made of."""
        found = (one for text, one in self.specials.items() if any(text in mark for mark in marks))
        return frozenset(found)

    @property
    def marks(self) -> Marks | None:
        """What reasoning stands between; None where the model is not known to think."""
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

    def reader(self, asked: Asked) -> Reader | None:
        """What reads an answer; None where there is nothing in it but content."""
        if self.format is not None and (asked.tools or self.format.channels):
            return self.format.read(asked)
        return Reader(asked) if asked.reasoning is not None else None

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
        for place, one in enumerate(given):
            ids = await self.ids(one) if isinstance(one, str) else list(one)
            if not ids:
                raise Refused(400, f"prompt {place} is empty", param="prompt")
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
        where = self._cutter if size > LONG else None
        cut = partial(self.model.tokenizer.encode, text, add_special_tokens=special)
        return await asyncio.get_running_loop().run_in_executor(where, cut)

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
            text = await asyncio.to_thread(
                chat_template.prompt,
                self.model.directory,
                self.model.tokenizer.config,
                messages,
                functions,
                **variables,
            )
        except (ValueError, TypeError) as error:
            raise Refused(400, str(error), param="messages") from error
        return await self.ids(text, special=False), text

    # --- calls -----------------------------------------------------------------------------------

    async def run(
        self,
        prompts: Sequence[list[int]],
        wish: Wish,
        usual: int,
        kept: frozenset[int] = frozenset(),
    ) -> Run:
        """Let the calls of a request begin.

        Args:
            usual: new tokens where nobody says how many, and there is room for so many.
            kept: special tokens that are part of the text.

        Raises:
            Refused: a call that cannot be, or cannot be now.
        """
        await self.compiled(wish.knobs)
        prompts, wish = await self._healed(prompts, wish)
        made = await asyncio.to_thread(self._written, prompts, wish, usual, kept)
        inbox: asyncio.Queue[News] = asyncio.Queue()
        streams = self._submitted(made, inbox)
        texts = self.texts(len(made), wish, kept)
        run = Run(
            self.engine, streams, inbox, texts, wish.copies, sum(map(len, prompts)), same=wish.same
        )
        run.notes = dict.fromkeys(note for job, _ in made for note in getattr(job, "notes", ()))
        return run

    def _submitted(
        self, jobs: Sequence[tuple[Job, Writer | None]], inbox: asyncio.Queue[News]
    ) -> list[Stream]:
        """What runs for one request, all of it or nothing."""
        streams: list[Stream] = []
        try:
            for place, (job, writer) in enumerate(jobs):
                streams.append(self.engine.submit(job, writer, place, inbox))
        except Exception as error:
            for stream in streams:
                self.engine.cancel(stream)
            raise refusal(error) from error
        return streams

    def _written(
        self, prompts: Sequence[list[int]], wish: Wish, usual: int, kept: frozenset[int]
    ) -> list[tuple[Job, Writer | None]]:
        """The calls of a request, each with what writes its texts."""
        calls = self._calls(prompts, wish, usual)
        if wish.alternatives is not None:
            requests = [call.request for call in calls]
            new = sum(len(one.rows) * (one.max_length - one.prompt_length) for one in requests)
            self._listed(new * (wish.copies if wish.same else 1), wish.alternatives)
        return [(call, self.model.writer(call, skip_special_tokens=not kept)) for call in calls]

    def _listed(self, tokens: int, alternatives: int) -> None:
        """Refuse an answer of more log-probabilities than may be in one."""
        self.limits.check("logprobs", tokens * (1 + alternatives), "logprobs")

    async def compiled(self, knobs: Mapping[str, Any]) -> None:
        """Let a grammar that is new be compiled where it delays nothing but new grammars.

        Raises:
            Refused: it cannot be used, or too many wait.
        """
        asked = {name: knobs[name] for name in constraint.KNOBS if knobs.get(name) is not None}
        if len(asked) != 1 or not self.model.has_tokenizer:
            return
        vocab_size = self.info.vocab_size
        try:
            form = await asyncio.to_thread(Params, **asked)
            if await asyncio.to_thread(constraint.is_known, form, self.model.tokenizer, vocab_size):
                return
            if self._new_grammars >= MOST_GRAMMARS:
                raise refusal(Full())
            self._new_grammars += 1
            try:
                await asyncio.get_running_loop().run_in_executor(
                    self._grammars, constraint.build, form, self.model.tokenizer, vocab_size, 1
                )
            finally:
                self._new_grammars -= 1
        except ValueError as error:
            raise refusal(error) from error

    async def _healed(
        self, prompts: Sequence[list[int]], wish: Wish
    ) -> tuple[Sequence[list[int]], Wish]:
        """Prompts with the last tokens that `token_healing` finds for them, and what is left to do.

        They are read by the engine, as all prompts, and not when the calls are made.

        Raises:
            Refused: it cannot be done, or cannot be now.
        """
        asked = wish.knobs.get("token_healing", self.defaults.get("token_healing"))
        if asked is not True or not self.model.has_tokenizer:
            return prompts, wish
        try:
            made = [await asyncio.to_thread(self.model.healing, ids) for ids in prompts]
        except ValueError as error:
            raise refusal(error) from error
        out = [ids for ids, _ in made]
        calls = [(place, call) for place, (_, call) in enumerate(made) if call is not None]
        for which, token in await self._through(
            [(call, self.model.writer(call)) for _, call in calls]
        ):
            place = calls[which][0]
            out[place] = [*out[place], token.id]
        return out, replace(wish, knobs={**wish.knobs, "token_healing": False})

    def texts(self, prompts: int, wish: Wish, kept: frozenset[int] = frozenset()) -> list[Text]:
        """What becomes of so many prompts: a text for each copy."""
        cuts = (wish.stops or kept) and self.model.has_tokenizer
        hidden = {i: text for i, text in self._spelt.items() if i not in kept} if cuts else {}
        return [Text(wish.stops, hidden) for _ in range(prompts * wish.copies)]

    @cached_property
    def _spelt(self) -> dict[int, str]:
        """The special tokens with their spelling."""
        tokenizer = self.model.tokenizer
        spelt = ((token, tokenizer.spelling(token) or b"") for token in tokenizer.silent)
        return {token: text.decode(errors="replace") for token, text in spelt}

    def _calls(self, prompts: Sequence[list[int]], wish: Wish, usual: int) -> list[Call]:
        knobs = dict(wish.knobs)
        compared = wish.alternatives is not None or wish.copies > wish.n
        by_length = wish.new is None and knobs.get("max_length") is not None
        if wish.alternatives:
            knobs["top_logprobs"] = wish.alternatives
        try:
            return [
                self.model.call(
                    [ids],
                    attention_mask=[[1] * len(ids)],
                    logprobs="model" if compared else False,
                    stop=wish.stop,
                    max_new_tokens=None if by_length else self.room(len(ids), wish.new, usual),
                    num_return_sequences=1 if wish.same else wish.copies,
                    **knobs,
                )
                for ids in prompts
            ]
        except ValueError as error:
            raise _wrong(str(error), wish.names) from error

    def room(self, prompt: int, new: int | None, usual: int) -> int:
        """How many tokens follow a prompt of so many.

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
        await self._through([(one, None) for one in texts])
        return [await asyncio.to_thread(self._told, one) for one in texts]

    async def _through(self, jobs: Sequence[tuple[Job, Writer | None]]) -> list[tuple[int, Token]]:
        """What the engine makes of jobs; if whoever waits for them leaves, so do they.

        Returns:
            the new tokens, each with the place of its job.
        """
        inbox: asyncio.Queue[News] = asyncio.Queue()
        run = Run(self.engine, self._submitted(jobs, inbox), inbox)
        try:
            return [found async for found in run.tokens()]
        finally:
            run.cancel()

    def _told(self, scored: score.Scoring) -> list[Token]:
        """A text that has been scored as tokens."""
        ids = scored.ids.tolist()
        texts = pieces(self.model.tokenizer, ids, skip_special_tokens=False)
        made = zip(ids, texts, scored.logprobs, scored.tops, strict=True)
        return [Token(token, text, logprob, top, None) for token, text, logprob, top in made]
