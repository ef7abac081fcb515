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

from fastgen import (
    beam,
    bounds,
    constraint,
    healing,
    lookup,
    prefix,
    processors,
    prompt,
    stop,
    tensors,
    values,
)
from fastgen.batch import Batch, Event
from fastgen.guidance import Unconditional
from fastgen.model import Model
from fastgen.output import GenerateOutput, Token
from fastgen.params import Params, resolve
from fastgen.prompt import Prompts
from fastgen.request import Request
from fastgen.tokenizer import TextStream, Tokenizer


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
    draft: lookup.Draft | None = None

    @property
    def searches(self) -> bool:
        """Whether it has a cache of its own: its rows are compared, or their tokens guessed."""
        params = self.request.params
        return params.num_beams > 1 or params.num_beam_groups > 1 or self.draft is not None

    def steps(self) -> Generator[list[Event]]:
        """Run it: the new tokens of each step, none of one that read a part of the prompt.

        Beams come all at once, when they are known.

        Raises:
            Exception: what a caller's function raises, or a ValueError: no token can be chosen.
        """
        if self.draft is None and self.searches:
            yield from beam.search(self.model, self.request)
            return
        batch = Batch(self.model)
        if self.draft is not None:
            by_itself = isinstance(self.draft, lookup.Assistant)  # transformers' rules, as asked
            payoff = None if by_itself else lookup.Payoff()
            batch = lookup.Speculation(self.model, self.draft, payoff)
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
            raise ValueError(f"streamer must have put(ids) and end(), got {values.shown(streamer)}")
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

    Args:
        texts: of each row; None where there is no tokenizer.
    """

    def __init__(self, texts: Sequence[TextStream] | None) -> None:
        self._texts = texts

    def take(self, events: Sequence[Event]) -> list[Token]:
        """The tokens of a step."""
        last = {event.row.index: place for place, event in enumerate(events)}
        out = []
        for place, event in enumerate(events):
            row = event.row
            # A step may bring a row several tokens; its reason to end belongs to the last.
            reason = row.finish_reason if last[row.index] == place else None
            text = "" if self._texts is None else self._texts[row.index].push(event.token)
            if reason and self._texts is not None:
                text += self._texts[row.index].end()
            out.append(
                Token(
                    id=event.token,
                    text=text,
                    logprob=event.logprob,
                    top_logprobs=event.top_logprobs,
                    finish_reason=reason,
                    row=row.index,
                )
            )
        return out


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
    logprobs: bool = False,
) -> Call:
    """Check everything that was passed and make of it what the searches run.

    Args:
        defaults: the model's generation_config.json.
        own_tokenizer: gives the model's tokenizer, or says that it has none.
        ids: as `prompt.read` takes them; None for the bos token.
        logprobs: whether tokens carry their log-probability.

    Raises:
        ValueError: whatever cannot be done; the message names it.
    """
    config = _mapping(objects.generation_config)
    params = _with_padding(resolve(defaults, config, knobs), model, {**(config or {}), **knobs})
    prefix.check(objects.prefix_cache)
    prompts = read(model, params, ids, objects.attention_mask)
    if ids is None and objects.among_tensors:
        prompts = replace(prompts, kind="torch")
    tokenizer = _tokenizer(params, objects.tokenizer, own_tokenizer)
    if params.token_healing:
        assert tokenizer is not None
        others = Objects(prefix_cache=objects.prefix_cache)
        likeliest = partial(_likeliest, model, defaults, own_tokenizer, others)
        rows = [healing.heal(row.tolist(), tokenizer, likeliest) for row in prompts.rows]
        prompts = replace(read(model, params, rows), kind=prompts.kind)
    width, longest = prompts.ids.shape[1], max(len(row) for row in prompts.rows)
    info = model.info
    max_length = stop.length_limit(params, width, longest, info.max_length, info.hard_limit)
    draft = _draft(model, params, objects.assistant_model)
    helper = draft.model.info if isinstance(draft, lookup.Assistant) else None
    bounds.check(
        bounds.of_call(info, params, len(prompts.rows), width, max_length, helper),
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
    own: dict[str, Any] = {
        "prefix_allowed_tokens_fn": allowed[0] if allowed else None,
        "logits_processor": tensors.bridged(
            "logits_processor", objects.logits_processor, as_tensors
        ),
        "unconditional": _unconditional(model, params, prompts, negative, max_length),
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
        stop_text=_stop_text(params, tokenizer),
        constraint=text_form,
        logprobs=logprobs,
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
    names = [name for name, _ in request.chain.steps] if request.chain else []
    others = processors.RULE_OUT - set(constraint.KNOBS) | {"guidance_scale"}
    seen = request.keeps or request.criteria or request.params.num_beams > 1
    drawn = request.params.do_sample and request.torch is not None
    return not (
        seen or drawn or any(n in others or n.startswith(processors.CALLERS) for n in names)
    )


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
            f"generation_config must be a dict or have to_dict(), got {values.shown(config)}"
        )
    found = dict(config if isinstance(config, Mapping) else config.to_dict())
    odd = [name for name in found if not isinstance(name, str) or not name]
    if odd:
        raise ValueError(
            f"generation_config must have names of knobs as its keys, got {values.shown(odd)}"
        )
    return found


def _with_padding(params: Params, model: Model, given: Mapping[str, Any]) -> Params:
    """The knobs with a pad token that exists, or none.

    Some models come with a pad_token_id of -1, or of another token that they do not have: that is
    as if they had none. (transformers fills rows with it, which no tokenizer can decode.) Where
    the end of text would be the padding and does not exist, the first one that does takes its
    place.
    """
    vocab, pad, eos = model.info.vocab_size, params.pad_token_id, params.eos_token_id or ()
    if pad is not None and not 0 <= pad < vocab:
        if given.get("pad_token_id") is not None:
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
    params: Params, given: Any, own_tokenizer: Callable[[], Tokenizer]
) -> Tokenizer | None:
    form = constraint.asked(params) is not None
    if params.stop_strings is None and not params.token_healing and not form:
        return None
    return own_tokenizer() if given is None else Tokenizer.of(given)


def _likeliest(
    model: Model,
    defaults: Mapping[str, Any],
    own_tokenizer: Callable[[], Tokenizer],
    objects: Objects,
    ids: Sequence[int],
    biases: Mapping[int, float],
) -> int:
    """The likeliest token after `ids` with these biases, by the model's own defaults."""
    knobs = {
        "max_new_tokens": 1,
        "sequence_bias": {(token,): bias for token, bias in biases.items()},
        "do_sample": False,
        "num_beams": 1,
        "num_return_sequences": 1,
        "token_healing": False,
    }
    call = prepare(model, defaults, own_tokenizer, [ids], objects, knobs)
    return next(filter(None, call.steps()))[0].token


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


def _stop_text(params: Params, tokenizer: Tokenizer | None) -> stop.StopText | None:
    if params.stop_strings is None or tokenizer is None:
        return None
    in_bytes = tokenizer.bytes_are is not None
    return stop.StopStrings(tokenizer.spelling, params.stop_strings, in_bytes)


def _draft(model: Model, params: Params, assistant: Any) -> lookup.Draft | None:
    """What guesses tokens, if anything does."""
    if assistant is None and params.prompt_lookup_num_tokens is None:
        return None
    if params.num_beams > 1:
        raise ValueError("tokens cannot be guessed for beams: use num_beams=1")
    if params.guidance_scale not in (None, 1.0):
        raise ValueError("guidance_scale cannot be used with an assistant_model")
    if assistant is None:
        assert params.prompt_lookup_num_tokens is not None
        return lookup.prompt_lookup(
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
    return lookup.Assistant(
        helper,
        params.num_assistant_tokens,
        params.assistant_confidence_threshold,
        params.num_assistant_tokens_schedule != "constant",
    )
