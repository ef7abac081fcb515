"""Everything that was passed to `generate`, checked, and made a call.

`prepare` has phases, which come in this order since each needs those before it: the knobs say how
ids are padded, the prompts how long they are, the lengths how much memory is needed; nothing is
allocated before that is known to be there. The processors need what they are to look at.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fastgen.engine import memory_estimate, prefix_cache, speculative
from fastgen.engine.call import Call
from fastgen.engine.guidance import Unconditional
from fastgen.engine.model import Model
from fastgen.engine.request import Request
from fastgen.inputs import prompt, tensors, validators
from fastgen.inputs.params import Params, resolve
from fastgen.inputs.prompt import Prompts
from fastgen.sampling import constraint, processors, stop
from fastgen.text import token_healing
from fastgen.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Loaded:
    """A model with its files, as far as calls need them.

    Attributes:
        defaults: the content of generation_config.json.
        tokenizer: gives the model's tokenizer, or raises if it has none; None for ids only.
        chain: gives the processors of knobs and a vocabulary: the same for equal knobs, so that
            the rows of several calls go through them together.
    """

    model: Model
    defaults: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Callable[[], Tokenizer] | None = None
    chain: Callable[[Params, int], processors.Chain] = processors.build


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
        """True if the caller works with torch's tensors, as far as these arguments show."""
        return any(
            tensors.is_tensor(value) or tensors.of_transformers(value)
            for value in vars(self).values()
        )


@dataclass(frozen=True)
class _Inputs:
    """The prompts of a call, and what else its texts need.

    Attributes:
        tokenizer: None where nothing needs one.
        new_stops: texts that end a row, looked for among the new tokens alone.
    """

    prompts: Prompts
    tokenizer: Tokenizer | None
    new_stops: tuple[str, ...]

    @property
    def width(self) -> int:
        """Tokens of a prompt, padding included."""
        return int(self.prompts.ids.shape[1])

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt, without padding."""
        return max(len(row) for row in self.prompts.rows)

    @property
    def as_tensors(self) -> bool:
        """True if callers' functions get torch's tensors."""
        return self.prompts.kind == "torch"


def prepare(
    loaded: Loaded,
    ids: Any,
    objects: Objects,
    knobs: Mapping[str, Any],
    logprobs: bool | str = False,
    stop_texts: Sequence[str] = (),
) -> Call:
    """Check everything that was passed and make a call of it.

    Args:
        ids: as `prompt.read` takes them; None for the bos token.
        logprobs: whether tokens carry their log-probability, and of which scores (see
            `CausalLM.call`).
        stop_texts: as `stop_strings`, looked for among the new tokens alone.

    Raises:
        ValueError: whatever cannot be done; the message names it.
    """
    if logprobs not in (False, True, "model"):
        raise validators.wrong("logprobs", 'True, False or "model"', logprobs)
    model, info = loaded.model, loaded.model.info
    params = _params(loaded, objects, knobs)
    inputs = _inputs(loaded, params, ids, objects, stop_texts)  # healed, before it is measured
    max_length, cautions = stop.length_limit(
        params, inputs.width, inputs.longest, info.max_length, info.hard_limit
    )
    draft = _draft(model, params, objects.assistant_model)
    _check_memory(model, params, inputs, max_length, draft)  # before anything is allocated
    unconditional = _unconditional(model, params, inputs.prompts, objects, max_length)
    form = _form(model, params, inputs)
    request = Request(
        params=params,
        prompts=inputs.prompts.rows,
        padded=inputs.prompts.ids,
        pads=inputs.prompts.pads,
        max_length=max_length,
        chain=_chain(loaded, params, objects, inputs.as_tensors, unconditional, form) or None,
        criteria=tensors.bridged("stopping_criteria", objects.stopping_criteria, inputs.as_tensors),
        stop_text=_stop_text(params, inputs),
        constraint=form,
        unconditional=unconditional,
        logprobs=bool(logprobs),
        of_model=logprobs == "model",
        prefix_cache=objects.prefix_cache,
        torch=tensors.module() if inputs.as_tensors else None,
    )
    if params.num_beams > 1 or params.num_beam_groups > 1:
        from fastgen.engine.beam import run as beams  # late: a process starts sooner without

        beams.check(request, info.vocab_size)
    request.forces = form is not None and _may_force(request)
    return Call(model, request, inputs.prompts, draft, inputs.prompts.cautions + cautions)


# --- knobs ---------------------------------------------------------------------------------------


def _params(loaded: Loaded, objects: Objects, knobs: Mapping[str, Any]) -> Params:
    """The knobs of the call, with a pad token that exists."""
    config = _mapping(objects.generation_config)
    params = resolve(loaded.defaults, config, knobs)
    return _with_padding(params, loaded.model, {**(config or {}), **knobs})


def _mapping(config: Any) -> Mapping[str, Any] | None:
    if config is None:
        return None
    if not isinstance(config, Mapping) and not hasattr(config, "to_dict"):
        raise ValueError(
            f"generation_config must be a dict or have to_dict(), got {validators.shown(config)}"
        )
    mapping = dict(config if isinstance(config, Mapping) else config.to_dict())
    odd = [name for name in mapping if not isinstance(name, str) or not name]
    if odd:
        raise ValueError(
            f"generation_config must have names of knobs as its keys, got {validators.shown(odd)}"
        )
    return mapping


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


# --- prompts -------------------------------------------------------------------------------------


def _inputs(
    loaded: Loaded, params: Params, ids: Any, objects: Objects, stop_texts: Sequence[str]
) -> _Inputs:
    """Read the prompts; with `token_healing`, their last tokens are chosen here."""
    prefix_cache.check(objects.prefix_cache)
    prompts = read(loaded.model, params, ids, objects.attention_mask)
    if ids is None and objects.among_tensors:
        prompts = replace(prompts, kind="torch")
    stops: tuple[str, ...] = ()
    if stop_texts:
        stops = resolve({}, None, {"stop_strings": list(stop_texts)}).stop_strings or ()
    tokenizer = _tokenizer(loaded, params, stops, objects.tokenizer)
    if params.token_healing and tokenizer is not None:
        rows = [
            _healed(loaded, token_healing.reopen(row.tolist(), tokenizer), objects.prefix_cache)
            for row in prompts.rows
        ]
        healed = read(loaded.model, params, rows)
        cautions = tuple(dict.fromkeys(prompts.cautions + healed.cautions))
        prompts = replace(healed, kind=prompts.kind, cautions=cautions)
    return _Inputs(prompts, tokenizer, stops)


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
    loaded: Loaded, params: Params, new_stops: Sequence[str], given: Any
) -> Tokenizer | None:
    """The tokenizer, if something needs one: the caller's, or else the model's own."""
    form = constraint.asked(params) is not None
    if not (params.stop_strings or new_stops or params.token_healing or form):
        return None
    if given is not None:
        return Tokenizer.of(given)
    if loaded.tokenizer is None:
        raise ValueError("stop_strings, token_healing and the form of a text need a tokenizer")
    return loaded.tokenizer()


def _healed(loaded: Loaded, reopened: token_healing.Reopened, prefix_cache: Any) -> list[int]:
    """A prompt with its last token, which is chosen here and now.

    In the thread that makes the call, and not when its turn comes: a call has its prompt from the
    beginning. A service, which must not keep others waiting that long, lets a scheduler run
    `CausalLM.healing` first.
    """
    if not reopened.biases:
        return reopened.ids
    steps = last_token(loaded, reopened, prefix_cache).steps()
    return [*reopened.ids, next(step.events[0].token for step in steps if step.events)]


def last_token(loaded: Loaded, reopened: token_healing.Reopened, prefix_cache: Any = None) -> Call:
    """The call whose only token is the last of a prompt, by the biases and the model's defaults.

    It heals nothing itself, so `prepare` comes back to itself once at most.
    """
    tokens = list(reopened.biases)
    objects = Objects(prefix_cache=prefix_cache, prefix_allowed_tokens_fn=lambda *_: tokens)
    knobs = {
        "max_new_tokens": 1,
        "sequence_bias": {(token,): bias for token, bias in reopened.biases.items()},
        "do_sample": False,
        "num_beams": 1,
        "num_return_sequences": 1,
        "token_healing": False,
    }
    return prepare(loaded, [reopened.ids], objects, knobs)


# --- limits --------------------------------------------------------------------------------------


def _check_memory(
    model: Model,
    params: Params,
    inputs: _Inputs,
    max_length: int,
    draft: speculative.Draft | None,
) -> None:
    """Raise a ValueError if the call needs more memory than there is."""
    helper = draft.model.info if isinstance(draft, speculative.Assistant) else None
    rows = len(inputs.prompts.rows)
    memory_estimate.check(
        memory_estimate.of_call(model.info, params, rows, inputs.width, max_length, helper),
        "fewer rows, beams or sequences, or a lower max_new_tokens, need less",
    )


def _draft(model: Model, params: Params, assistant: Any) -> speculative.Draft | None:
    """The draft that guesses tokens, if anything does."""
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


# --- guidance ------------------------------------------------------------------------------------


def _unconditional(
    model: Model, params: Params, prompts: Prompts, objects: Objects, max_length: int
) -> Unconditional | None:
    """The logits from which classifier-free guidance steers away, if it does."""
    negative = _negative(model, params, objects, max_length - prompts.ids.shape[1])
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


def _negative(model: Model, params: Params, objects: Objects, new: int) -> Prompts | None:
    """The negative prompts, if there are any, with room for `new` tokens."""
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


# --- the form of the text, and its ends ----------------------------------------------------------


def _form(model: Model, params: Params, inputs: _Inputs) -> constraint.Constraint | None:
    """The form that the text of each row has to have, if any."""
    if inputs.tokenizer is None:
        return None
    copies = max(params.num_beams, params.num_return_sequences)
    rows = len(inputs.prompts.rows) * copies
    return constraint.build(params, inputs.tokenizer, model.info.vocab_size, rows)


def _stop_text(params: Params, inputs: _Inputs) -> stop.StopText | None:
    """The rule that ends a row by its text; `new_stops` do not look at the prompt."""
    tokenizer = inputs.tokenizer
    rules = [(params.stop_strings, 0), (inputs.new_stops, inputs.width)]
    if tokenizer is None or not any(texts for texts, _ in rules):
        return None
    in_bytes = tokenizer.bytes_are is not None
    each = [
        stop.StopStrings(tokenizer.spelling, texts, in_bytes, first)
        for texts, first in rules
        if texts
    ]
    return lambda ids: any(rule(ids) for rule in each)


# --- processors ----------------------------------------------------------------------------------


def _chain(
    loaded: Loaded,
    params: Params,
    objects: Objects,
    as_tensors: bool,
    unconditional: Unconditional | None,
    form: constraint.Constraint | None,
) -> processors.Chain:
    """The processors; calls that differ in no knob of theirs share one chain."""
    allowed = tensors.bridged(
        "prefix_allowed_tokens_fn", objects.prefix_allowed_tokens_fn, as_tensors
    )
    callers = tensors.bridged("logits_processor", objects.logits_processor, as_tensors)
    own = bool(allowed or callers or unconditional or form)
    if not own and params.watermarking_config is None:  # which may be a dict
        return loaded.chain(_of_a_chain(params), loaded.model.info.vocab_size)
    return processors.build(
        params,
        loaded.model.info.vocab_size,
        prefix_allowed_tokens_fn=allowed[0] if allowed else None,
        logits_processor=callers,
        unconditional=unconditional,
        constraint=(form.name, form) if form else None,
    )


@functools.lru_cache(maxsize=64)
def _of_a_chain(params: Params) -> Params:
    """The same knobs without those that no processor looks at."""
    return replace(params, **_OF_NO_CHAIN)


# Knobs that no processor looks at, and that calls differ in.
_OF_NO_CHAIN: dict[str, Any] = dict.fromkeys(
    ("max_length", "max_new_tokens", "max_time", "stop_strings", "seed")
)


def _may_force(request: Request) -> bool:
    """True if a forced token can be taken without a step, and nothing shows it.

    Not where somebody looks at every step, or draws along with it; nor where another processor may
    rule the token out, or keeps a cache of its own.
    """
    seen = request.keeps or request.of_model or request.criteria or request.params.num_beams > 1
    drawn = request.params.do_sample and request.torch is not None
    banned = request.chain is not None and request.chain.may_ban(but=request.constraint)
    return not (seen or drawn or banned or request.unconditional is not None)
