"""One call of `generate`: everything that was passed, checked, and made what the searches run."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastgen.engine import beam, memory_estimate, prefix_cache, speculative
from fastgen.engine.batch import Batch, Event
from fastgen.engine.guidance import Unconditional
from fastgen.engine.model import Model
from fastgen.engine.output import GenerateOutput, Token
from fastgen.engine.request import Request, Row
from fastgen.inputs import prompt, tensors, validators
from fastgen.inputs.params import Params, resolve
from fastgen.inputs.prompt import Prompts
from fastgen.sampling import constraint, processors, stop
from fastgen.text import token_healing
from fastgen.text.tokenizer import TextStream, Tokenizer


@dataclass(frozen=True, kw_only=True)
class Objects:
    """The arguments of `generate` that are no knobs; `CausalLM.generate` describes them."""

    attention_mask: Any = None
    generation_config: Any = None
    logits_processor: Any = None
    stopping_criteria: Any = None
    prefix_allowed_tokens_fn: Any = None
    negative_prompt_ids: Any = None
    negative_prompt_attention_mask: Any = None
    assistant_model: Any = None
    tokenizer: Any = None
    prefix_cache: Any = None

    @property
    def among_tensors(self) -> bool:
        """Whether the caller works with torch's tensors, as far as these arguments show."""
        return any(
            tensors.is_tensor(value) or tensors.of_transformers(value)
            for value in vars(self).values()
        )


@dataclass(eq=False)
class Call:
    """One call, ready to run."""

    model: Model
    request: Request
    prompts: Prompts
    draft: speculative.Draft | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What of the form that was asked for the text is not held to."""
        return () if self.request.constraint is None else self.request.constraint.notes

    @property
    def searches(self) -> bool:
        """Whether it has a cache of its own: its rows are compared, or their tokens guessed."""
        params = self.request.params
        return params.num_beams > 1 or params.num_beam_groups > 1 or self.draft is not None

    @property
    def done(self) -> bool:
        """Whether all its rows have ended."""
        return self.request.done

    @property
    def error(self) -> Exception | None:
        """What ended it, if something went wrong."""
        return self.request.error

    def steps(self, chunk: int | None = None) -> Generator[list[Event]]:
        """Run it: the new tokens of each step, none of one that read a part of the prompt.

        Beams come all at once, when they are known.

        Args:
            chunk: tokens that a step may read, where somebody waits for its end (see `Batch`).

        Raises:
            Exception: what a caller's function raises, or a ValueError: no token can be chosen.
        """
        if self.draft is None and self.searches:
            yield from beam.search(self.model, self.request, chunk)
            return
        batch = Batch(self.model, chunk)
        if self.draft is not None:
            by_itself = isinstance(
                self.draft, speculative.Assistant
            )  # transformers' rules, as asked
            payoff = None if by_itself else speculative.Payoff()
            batch = speculative.Speculation(self.model, self.draft, payoff, chunk)
        with contextlib.closing(batch):
            joining = batch.begin([self.request])
            batch.read(joining)
            while joining in batch.joining:
                yield []
                batch.read(joining)
            while batch.rows:
                events = batch.step()
                if self.request.error is not None:
                    raise self.request.error
                yield events

    def tell(self, streamer: Any) -> None:
        """Run it, and give a streamer the prompt and then every step's tokens.

        They come as transformers puts them: the prompt's rows, then int64 [rows] a step, or
        int64 [1, new] where tokens are guessed; tensors if the ids came as one.
        """
        if not callable(getattr(streamer, "put", None)) or not callable(
            getattr(streamer, "end", None)
        ):
            raise ValueError(
                f"streamer must have put(ids) and end(), got {validators.shown(streamer)}"
            )
        if self.request.params.num_beams > 1:
            raise ValueError(
                f"streamer cannot be used with num_beams={self.request.params.num_beams}: beams "
                "change until the end"
            )
        rows = len(self.request.rows)
        if self.draft is not None and rows > 1:
            raise ValueError(
                f"streamer cannot follow {rows} rows that advance by different numbers of guessed "
                "tokens: use one row, or CausalLM.stream"
            )
        ids = self.prompts.ids
        self.request.forces = False  # a step is a token of each row
        streamer.put(self.prompts.array(np.repeat(ids, rows // len(ids), axis=0)))
        for events in filter(None, self.steps()):
            tokens = _column(self.request, events) if self.draft is None else _tokens(events)
            streamer.put(self.prompts.array(tokens))
        streamer.end()

    def result(self) -> Any:
        """What `generate` returns, once all steps are through."""
        request, array = self.request, self.prompts.array
        params = request.params
        sequences = self.prompts.give_back(request.sequences())
        if not params.return_dict_in_generate:
            return sequences
        beams = params.num_beams > 1
        scored = beams and params.output_scores
        # A row that went on after its end may have gone further than the longest.
        new = None if beams else request.width - request.prompt_length
        return GenerateOutput(
            sequences=sequences,
            scores=tuple(map(array, request.scores[:new])) if params.output_scores else None,
            logits=tuple(map(array, request.logits[:new])) if params.output_logits else None,
            sequences_scores=array(request.sequences_scores()) if scored else None,
            beam_indices=array(request.beam_indices()) if beams else None,
            finish_reasons=[row.finish_reason or "" for row in request.rows],
            top_logprobs=request.top_logprobs if params.top_logprobs else None,
        )


class Writer:
    """Makes tokens with their text of a call's events.

    Rows that go on after their end, until all have ended (see `Request.lingers`), are written as
    `generate` returns them: to the length of the longest, and only the last token says why.

    Args:
        texts: of each row; None where there is no tokenizer.
    """

    def __init__(self, texts: Sequence[TextStream] | None) -> None:
        self._texts = texts
        self._made: dict[int, int] = {}  # tokens of each row
        self._waiting: list[tuple[int, Event]] = []  # those that may not be in the result

    def take(self, events: Sequence[Event]) -> list[Token]:
        """The tokens of a step."""
        came, self._waiting = [*self._waiting, *map(self._counted, events)], []
        out = []
        for count, event in came:
            length = _length(event.row, self._made[event.row.index])
            if length is None and count >= _least(event.row):
                self._waiting.append((count, event))
            elif length is None or count <= length:
                out.append(self._token(event, count == length))
        return out

    def _counted(self, event: Event) -> tuple[int, Event]:
        """An event, and how many tokens its row has with it."""
        count = self._made[event.row.index] = self._made.get(event.row.index, 0) + 1
        return count, event

    def _token(self, event: Event, is_last: bool) -> Token:
        row, text = event.row, ""
        if self._texts is not None:
            text = self._texts[row.index].push(event.token)
            text += self._texts[row.index].end() if is_last else ""
        return Token(
            id=event.token,
            text=text,
            logprob=event.logprob,
            top_logprobs=event.top_logprobs,
            finish_reason=row.finish_reason if is_last else None,
            row=row.index,
        )


def _length(row: Row, made: int) -> int | None:
    """The tokens that a row comes to, of which `made` are there; None while nobody knows."""
    request = row.request
    if row.finish_reason is None:
        return None
    if not request.lingers or request.params.num_beams > 1:
        return made
    return request.width - request.prompt_length if request.done else None


def _least(row: Row) -> float:
    """The tokens that a row comes to at least: a row that has ended goes as far as the others."""
    if row.finish_reason is None:
        return float("inf")
    lengths = (one.width or one.length + 1 for one in row.request.rows)
    return max(lengths) - row.request.prompt_length


def _column(request: Request, events: Sequence[Event]) -> NDArray[np.int64]:
    """int64 [rows]: the new token of each row, padding for those that have ended."""
    out = np.full(len(request.rows), request.pad_token_id, np.int64)
    for event in events:
        out[event.row.index] = event.token
    return out


def _tokens(events: Sequence[Event]) -> NDArray[np.int64]:
    """int64 [1, new]: the new tokens of the only row."""
    return np.array([[event.token for event in events]], np.int64)


def prepare(
    model: Model,
    defaults: Mapping[str, Any],
    own_tokenizer: Callable[[], Tokenizer],
    ids: Any,
    objects: Objects,
    knobs: Mapping[str, Any],
    logprobs: bool | str = False,
    stop_texts: Sequence[str] = (),
) -> Call:
    """Check everything that was passed and make of it what the searches run.

    Args:
        defaults: the model's generation_config.json.
        own_tokenizer: gives the model's tokenizer, or says that it has none.
        ids: as `prompt.read` takes them; None for the bos token.
        logprobs: whether tokens carry their log-probability, and of which scores (see
            `CausalLM.call`).
        stop_texts: as `stop_strings`, looked for among the new tokens alone.

    Raises:
        ValueError: whatever cannot be done; the message names it.
    """
    if logprobs not in (False, True, "model"):
        raise validators.wrong("logprobs", 'True, False or "model"', logprobs)
    config = _mapping(objects.generation_config)
    params = _with_padding(resolve(defaults, config, knobs), model, {**(config or {}), **knobs})
    prefix_cache.check(objects.prefix_cache)
    prompts = read(model, params, ids, objects.attention_mask)
    if ids is None and objects.among_tensors:
        prompts = replace(prompts, kind="torch")
    new_stops = resolve({}, None, {"stop_strings": list(stop_texts) or None}).stop_strings
    tokenizer = _tokenizer(params, new_stops, objects.tokenizer, own_tokenizer)
    if params.token_healing:
        assert tokenizer is not None
        last = partial(last_token, model, defaults, own_tokenizer, objects.prefix_cache)
        rows = [
            _healed(token_healing.reopen(row.tolist(), tokenizer), last) for row in prompts.rows
        ]
        prompts = replace(read(model, params, rows), kind=prompts.kind)
    width, longest = prompts.ids.shape[1], max(len(row) for row in prompts.rows)
    info = model.info
    max_length = stop.length_limit(params, width, longest, info.max_length, info.hard_limit)
    draft = _draft(model, params, objects.assistant_model)
    helper = draft.model.info if isinstance(draft, speculative.Assistant) else None
    memory_estimate.check(
        memory_estimate.of_call(info, params, len(prompts.rows), width, max_length, helper),
        "fewer rows, beams or sequences, or a lower max_new_tokens, need less",
    )
    negative = _negative(model, params, objects, max_length - width)
    as_tensors = prompts.kind == "torch"
    allowed = tensors.bridged(
        "prefix_allowed_tokens_fn", objects.prefix_allowed_tokens_fn, as_tensors
    )
    text_form = None
    if tokenizer is not None:
        copies = max(params.num_beams, params.num_return_sequences)
        text_form = constraint.build(params, tokenizer, info.vocab_size, len(prompts.rows) * copies)
    unconditional = _unconditional(model, params, prompts, negative, max_length)
    own: dict[str, Any] = {
        "prefix_allowed_tokens_fn": allowed[0] if allowed else None,
        "logits_processor": tensors.bridged(
            "logits_processor", objects.logits_processor, as_tensors
        ),
        "unconditional": unconditional,
        "constraint": (text_form.name, text_form) if text_form else None,
    }
    if any(own.values()) or params.watermarking_config is not None:  # which may be a dict
        chain = processors.build(params, info.vocab_size, **own)
    else:
        chain = _shared_chain(replace(params, **_OF_NO_CHAIN), info.vocab_size)
    request = Request(
        params=params,
        prompts=prompts.rows,
        padded=prompts.ids,
        pads=prompts.pads,
        max_length=max_length,
        chain=chain or None,
        criteria=tensors.bridged("stopping_criteria", objects.stopping_criteria, as_tensors),
        stop_text=_stop_text(tokenizer, (params.stop_strings, 0), (new_stops, width)),
        constraint=text_form,
        unconditional=unconditional,
        logprobs=bool(logprobs),
        of_model=logprobs == "model",
        prefix_cache=objects.prefix_cache,
        torch=tensors.module() if as_tensors else None,
    )
    if params.num_beams > 1 or params.num_beam_groups > 1:
        beam.check(request, info.vocab_size)
    request.forces = text_form is not None and _may_force(request)
    return Call(model, request, prompts, draft)


def _may_force(request: Request) -> bool:
    """Whether a token that is certain can be taken without a step, and nothing shows it.

    Not where somebody looks at every step, or draws along with it; nor where another processor may
    rule the token out, or keeps a cache of its own.
    """
    seen = request.keeps or request.of_model or request.criteria or request.params.num_beams > 1
    drawn = request.params.do_sample and request.torch is not None
    banned = request.chain is not None and request.chain.may_ban(but=request.constraint)
    return not (seen or drawn or banned or request.unconditional is not None)


# Knobs that no processor looks at, and that calls differ in.
_OF_NO_CHAIN: dict[str, Any] = dict.fromkeys(
    ("max_length", "max_new_tokens", "max_time", "stop_strings", "seed")
)


@functools.lru_cache(maxsize=64)
def _shared_chain(params: Params, vocab_size: int) -> processors.Chain:
    """The processors of all calls with these knobs: their rows go through them together."""
    return processors.build(params, vocab_size)


def _mapping(config: Any) -> Mapping[str, Any] | None:
    if config is None:
        return None
    if not isinstance(config, Mapping) and not hasattr(config, "to_dict"):
        raise ValueError(
            f"generation_config must be a dict or have to_dict(), got {validators.shown(config)}"
        )
    found = dict(config if isinstance(config, Mapping) else config.to_dict())
    odd = [name for name in found if not isinstance(name, str) or not name]
    if odd:
        raise ValueError(
            f"generation_config must have names of knobs as its keys, got {validators.shown(odd)}"
        )
    return found


def _with_padding(params: Params, model: Model, given: Mapping[str, Any]) -> Params:
    """The knobs with a pad token that exists, or none.

    Some models come with a pad_token_id of another token than they have: that is as if they had
    none, and so is one below 0, whoever gives it. (transformers fills rows with it, which no
    tokenizer can decode.) Where the end of text would be the padding and does not exist, the first
    one that does takes its place.
    """
    vocab, pad, eos = model.info.vocab_size, params.pad_token_id, params.eos_token_id or ()
    if pad is not None and not 0 <= pad < vocab:
        if pad >= 0 and given.get("pad_token_id") is not None:
            raise ValueError(f"pad_token_id must be a token of 0 to {vocab - 1}, got {pad}")
        pad = None
    if pad is None and eos and not 0 <= eos[0] < vocab:
        pad = next((token for token in eos if 0 <= token < vocab), 0)
    return params if pad == params.pad_token_id else replace(params, pad_token_id=pad)


def _negative(model: Model, params: Params, objects: Objects, new: int) -> Prompts | None:
    """What guidance steers away from, with room for `new` tokens."""
    ids, mask = objects.negative_prompt_ids, objects.negative_prompt_attention_mask
    if ids is None:
        if mask is not None:
            raise ValueError("negative_prompt_attention_mask needs negative_prompt_ids")
        return None
    if params.guidance_scale is None:
        raise ValueError("negative_prompt_ids needs a guidance_scale: without one it does nothing")
    negative = read(model, params, ids, mask)
    longest, limit = max(len(row) for row in negative.rows), model.info.max_length
    if model.info.hard_limit and limit is not None and longest + new > limit:
        raise ValueError(
            f"negative_prompt_ids has {longest} tokens, which with {new} new ones exceed the "
            f"{limit} positions that the model was made for"
        )
    return negative


def read(model: Model, params: Params, ids: Any, attention_mask: Any = None) -> Prompts:
    """The rows that a caller's ids are (see `prompt.read`); None starts from the bos token."""
    if ids is None:
        if params.bos_token_id is None:
            raise ValueError("no input_ids were given and the model has no bos_token_id")
        ids = [[params.bos_token_id]]
    return prompt.read(
        ids,
        attention_mask,
        vocab_size=model.info.vocab_size,
        pad_token_id=params.pad_token_id,
        eos_token_id=params.eos_token_id,
    )


def _tokenizer(
    params: Params,
    stop_texts: Sequence[str] | None,
    given: Any,
    own_tokenizer: Callable[[], Tokenizer],
) -> Tokenizer | None:
    form = constraint.asked(params) is not None
    stops = params.stop_strings or stop_texts
    if not stops and not params.token_healing and not form:
        return None
    return own_tokenizer() if given is None else Tokenizer.of(given)


def _healed(
    prompt: token_healing.Reopened, last: Callable[[token_healing.Reopened], Call]
) -> list[int]:
    """A prompt with the last token that it gets, which is found here and now.

    In the thread that makes the call, and not when its turn comes: a call has its prompt from the
    beginning. Who must not keep others waiting so long, as the service, lets a scheduler run
    `CausalLM.healing` first.
    """
    if not prompt.biases:
        return prompt.ids
    return [*prompt.ids, next(filter(None, last(prompt).steps()))[0].token]


def last_token(
    model: Model,
    defaults: Mapping[str, Any],
    own_tokenizer: Callable[[], Tokenizer],
    prefix_cache: Any,
    prompt: token_healing.Reopened,
) -> Call:
    """The call whose only token is the last of a prompt, by the biases and the model's defaults."""
    tokens = list(prompt.biases)
    objects = Objects(prefix_cache=prefix_cache, prefix_allowed_tokens_fn=lambda *_: tokens)
    knobs = {
        "max_new_tokens": 1,
        "sequence_bias": {(token,): bias for token, bias in prompt.biases.items()},
        "do_sample": False,
        "num_beams": 1,
        "num_return_sequences": 1,
        "token_healing": False,
    }
    return prepare(model, defaults, own_tokenizer, [prompt.ids], objects, knobs)


def _unconditional(
    model: Model, params: Params, prompts: Prompts, negative: Prompts | None, max_length: int
) -> Unconditional | None:
    """What classifier-free guidance steers away from, if it does."""
    if params.guidance_scale in (None, 1.0):
        return None
    if params.prompt_lookup_num_tokens is not None:
        raise ValueError("guidance_scale cannot be used with prompt_lookup_num_tokens")
    rows = negative.rows if negative is not None else None
    if rows is not None and len(rows) not in (1, len(prompts.ids)):
        raise ValueError(
            f"negative_prompt_ids has {len(rows)} rows, expected 1 or {len(prompts.ids)}"
        )
    if rows is not None and len(rows) == 1:
        rows = rows * len(prompts.ids)
    copies = params.num_beams if params.num_beams > 1 else params.num_return_sequences
    return Unconditional(model, copies * len(prompts.ids), max_length, rows, copies)


def _stop_text(
    tokenizer: Tokenizer | None, *rules: tuple[Sequence[str] | None, int]
) -> stop.StopText | None:
    """What ends a row by its text: texts, and how many tokens at its beginning do not count."""
    if tokenizer is None or not any(texts for texts, _ in rules):
        return None
    in_bytes = tokenizer.bytes_are is not None
    each = [
        stop.StopStrings(tokenizer.spelling, texts, in_bytes, first)
        for texts, first in rules
        if texts
    ]
    return lambda ids: any(one(ids) for one in each)


def _draft(model: Model, params: Params, assistant: Any) -> speculative.Draft | None:
    """What guesses tokens, if anything does."""
    if assistant is None and params.prompt_lookup_num_tokens is None:
        return None
    if params.num_beams > 1:
        raise ValueError("tokens cannot be guessed for beams: use num_beams=1")
    if params.guidance_scale not in (None, 1.0):
        raise ValueError("guidance_scale cannot be used with an assistant_model")
    if assistant is None:
        assert params.prompt_lookup_num_tokens is not None
        return speculative.prompt_lookup(
            params.prompt_lookup_num_tokens, params.max_matching_ngram_size or 2
        )
    helper = getattr(assistant, "model", None)
    if not isinstance(helper, Model):
        raise ValueError(f"assistant_model must be a fastgen model, got {type(assistant).__name__}")
    if helper.info.states:
        raise ValueError(
            "assistant_model keeps recurrent state, which cannot take back a guess: use another"
        )
    ours, theirs = model.info.vocab_size, helper.info.vocab_size
    if ours != theirs:
        raise ValueError(f"assistant_model has a vocabulary of {theirs}, the model of {ours}")
    return speculative.Assistant(
        helper,
        params.num_assistant_tokens,
        params.assistant_confidence_threshold,
        params.num_assistant_tokens_schedule != "constant",
    )
