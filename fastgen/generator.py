"""What people hold: a loaded model that generates, streams, completes, chats and scores."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fastgen import beam, hub, lookup, processors, prompt, stop
from fastgen.batch import Batch, Event
from fastgen.guidance import Unconditional
from fastgen.model import Model
from fastgen.output import GenerateOutput, Token
from fastgen.params import Params, resolve
from fastgen.prompt import Prompts
from fastgen.request import Request
from fastgen.tokenizer import FILE as TOKENIZER
from fastgen.tokenizer import TextStream, Tokenizer


class Settings:
    """A JSON file's content with attributes, as transformers' configurations have them.

    Attributes may be set (`model.generation_config.pad_token_id = 0`) and then count as defaults.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.__dict__.update(content)

    def to_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def __repr__(self) -> str:
        return f"Settings({self.__dict__})"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None  # transformers' configurations answer None for what is not set


class CausalLM:
    """A causal language model: transformers' `generate` on numpy and onnxruntime.

    Args:
        directory: a model directory that `fastgen export` wrote.
        threads: threads of a step; None for the physical cores.

    Attributes:
        config: the model's config.json.
        generation_config: the model's defaults for `generate`.

    Raises:
        ModelError: the directory cannot be used; the message says why.
    """

    device = "cpu"

    def __init__(self, directory: str | os.PathLike[str], threads: int | None = None) -> None:
        self.directory = Path(directory)
        self.name_or_path = str(directory)
        self.model = Model(self.directory, threads)
        self.config = Settings(_json(self.directory / "config.json"))
        self.generation_config = Settings(_json(self.directory / "generation_config.json"))

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        precision: str | None = None,
        threads: int | None = None,
        revision: str | None = None,
    ) -> Self:
        """Load a fastgen directory, a transformers model or a hub repository of either kind.

        A transformers model is exported on first use (which needs the extra `export`) and kept in
        a cache (`FASTGEN_CACHE`, by default ~/.cache/fastgen); afterwards torch is not needed.

        Args:
            name_or_path: a directory, or a hub id such as "distilgpt2".
            precision: "fp32", "int8" or "int4" of an export.
            threads: threads of a step; None for the physical cores.
            revision: a branch, tag or commit of the hub repository.
        """
        model = cls(hub.exported(name_or_path, precision, revision), threads)
        model.name_or_path = str(name_or_path)
        return model

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer; a ValueError if it was exported for ids only."""
        return Tokenizer(self.directory)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Itself: there is one device. For scripts that were written for torch."""
        return self

    def eval(self) -> Self:
        """Itself, as `to`."""
        return self

    def generate(
        self,
        input_ids: Any = None,
        *,
        attention_mask: Any = None,
        generation_config: Any = None,
        logits_processor: Sequence[processors.UserProcessor] | None = None,
        stopping_criteria: Sequence[stop.Criterion] | None = None,
        prefix_allowed_tokens_fn: processors.PrefixAllowedTokens | None = None,
        negative_prompt_ids: Any = None,
        negative_prompt_attention_mask: Any = None,
        assistant_model: CausalLM | None = None,
        tokenizer: Any = None,
        streamer: Any = None,
        inputs: Any = None,
        **knobs: Any,
    ) -> Any:
        """Generate as transformers' `generate` does: the same keywords give the same tokens.

        Args:
            input_ids: a list of ints, a (ragged) list of lists, an integer array of one or two
                dimensions, or a torch tensor. None starts from the model's bos token.
            attention_mask: 1 for tokens, 0 for padding; a ragged list needs none.
            generation_config: defaults of the call: an object with `to_dict()`, or a dict.
            logits_processor: callables (ids int64 [rows, length], scores float32 [rows, vocab])
                -> scores, after the built-in processors and before the sampling warpers. They see
                the rows that still run.
            stopping_criteria: callables of the same arguments -> bool, or bool [rows].
            prefix_allowed_tokens_fn: (batch id, ids [length]) -> the tokens allowed next.
            negative_prompt_ids: what classifier-free guidance steers away from; see
                `guidance_scale`. Padding is left out, so a padded one is as if given alone.
            negative_prompt_attention_mask: its mask.
            assistant_model: a smaller fastgen model with the same vocabulary that guesses tokens.
                The result is that of generation without it, for the same seed too.
            tokenizer: for `stop_strings`; by default the model's own.
            streamer: an object with `put(ids)` and `end()`, such as transformers' TextStreamer.
            inputs: another name of `input_ids`.
            knobs: see `fastgen.Params`; `None` switches one off.

        Returns:
            int64 [rows * num_return_sequences, length] in the kind that came in, padded as
            transformers pads; a `GenerateOutput` with `return_dict_in_generate=True`.

        Raises:
            ValueError: a keyword or its value, the ids or the mask: the message names it.
        """
        if inputs is not None:
            if input_ids is not None:
                raise ValueError("inputs and input_ids are two names of one thing: pass one")
            input_ids = inputs
        call = self._call(
            input_ids,
            attention_mask=attention_mask,
            generation_config=generation_config,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
            negative_prompt_ids=negative_prompt_ids,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
            assistant_model=assistant_model,
            tokenizer=tokenizer,
            knobs=knobs,
        )
        request = call.request
        if streamer is not None and request.params.num_beams > 1:
            raise ValueError(
                f"streamer cannot be used with num_beams={request.params.num_beams}: beams change "
                "until the end"
            )
        if streamer is not None:
            ids = call.prompts.ids
            streamer.put(np.repeat(ids, len(request.rows) // len(ids), axis=0))
        for events in call.steps():
            if streamer is not None:
                streamer.put(_tokens(request, events))
        if streamer is not None:
            streamer.end()
        return _result(request, call.prompts)

    def stream(
        self, prompt: Any, *, skip_special_tokens: bool = True, **kwargs: Any
    ) -> Iterator[Token]:
        """Generate token by token. (Beams change until the end: with them, all come at the end.)

        Args:
            prompt: a text, or ids as `generate` takes them; of several rows, each `Token` says
                which one it belongs to.
            skip_special_tokens: whether the text leaves out special tokens.
            kwargs: the keywords of `generate`.

        Yields:
            A `Token` as soon as it is known.
        """
        if isinstance(prompt, str):
            prompt = [prompt]
        if isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], str):
            prompt = [self.tokenizer.encode(text) for text in prompt]
        objects = {name: kwargs.pop(name) for name in _OBJECTS if name in kwargs}
        call = self._call(prompt, knobs=kwargs, logprobs=True, **objects)
        texts = None
        if (self.directory / TOKENIZER).is_file():
            texts = [
                TextStream(self.tokenizer, row.prompt.tolist(), skip_special_tokens)
                for row in call.request.rows
            ]
        return _as_tokens(call, texts)

    def complete(self, prompt: str | Sequence[str], **kwargs: Any) -> Any:
        """The text that follows: str for a str, a list for a list (see `generate`'s keywords)."""
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not texts:
            raise ValueError("no prompt was given: pass a text or a list of texts")
        parts: dict[int, list[str]] = {}
        for token in self.stream(texts, **kwargs):
            parts.setdefault(token.row, []).append(token.text)
        out = ["".join(parts[row]) for row in sorted(parts)]
        return out[0] if isinstance(prompt, str) and len(out) == 1 else out

    def _call(
        self,
        ids: Any,
        *,
        knobs: Mapping[str, Any],
        attention_mask: Any = None,
        generation_config: Any = None,
        logits_processor: Sequence[processors.UserProcessor] | None = None,
        stopping_criteria: Sequence[stop.Criterion] | None = None,
        prefix_allowed_tokens_fn: processors.PrefixAllowedTokens | None = None,
        negative_prompt_ids: Any = None,
        negative_prompt_attention_mask: Any = None,
        assistant_model: CausalLM | None = None,
        tokenizer: Any = None,
        logprobs: bool = False,
    ) -> Call:
        """Check everything that was passed and make of it what the searches run."""
        info = self.model.info
        params = resolve(self.generation_config.to_dict(), _mapping(generation_config), knobs)
        prompts = self._read(ids, attention_mask, params)
        width, longest = prompts.ids.shape[1], max(len(row) for row in prompts.rows)
        max_length = stop.length_limit(params, width, longest, info.max_length, info.hard_limit)
        unconditional = None
        if params.guidance_scale not in (None, 1.0):
            negative = None
            if negative_prompt_ids is not None:
                negative = self._read(negative_prompt_ids, negative_prompt_attention_mask, params)
            unconditional = self._unconditional(params, prompts, negative, max_length)
        chain = processors.build(
            params,
            info.vocab_size,
            prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
            logits_processor=logits_processor or (),
            unconditional=unconditional,
        )
        request = Request(
            params=params,
            prompts=prompts.rows,
            padded=prompts.ids,
            pads=prompts.pads,
            max_length=max_length,
            chain=chain or None,
            criteria=stopping_criteria or (),
            stop_text=self._stop_text(params, tokenizer),
            logprobs=logprobs,
        )
        return Call(self.model, request, prompts, self._draft(params, assistant_model))

    def _read(self, ids: Any, attention_mask: Any, params: Params) -> Prompts:
        if ids is None:
            if params.bos_token_id is None:
                raise ValueError("no input_ids were given and the model has no bos_token_id")
            ids = [[params.bos_token_id]]
        return prompt.read(
            ids,
            attention_mask,
            vocab_size=self.model.info.vocab_size,
            pad_token_id=params.pad_token_id,
            eos_token_id=params.eos_token_id,
        )

    def _unconditional(
        self, params: Params, prompts: Prompts, negative: Prompts | None, max_length: int
    ) -> Unconditional:
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
        return Unconditional(self.model, copies * len(prompts.ids), max_length, rows, copies)

    def _stop_text(self, params: Params, tokenizer: Any) -> stop.StopText | None:
        if params.stop_strings is None:
            return None
        known = self.tokenizer if tokenizer is None else Tokenizer.of(tokenizer)
        return stop.StopStrings(known.spelling, params.stop_strings, known.bytes_are is not None)

    def _draft(self, params: Params, assistant: CausalLM | None) -> lookup.Draft | None:
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
        ours, theirs = self.model.info.vocab_size, assistant.model.info.vocab_size
        if ours != theirs:
            raise ValueError(f"assistant_model has a vocabulary of {theirs}, the model of {ours}")
        return lookup.Assistant(
            assistant.model,
            params.num_assistant_tokens,
            params.assistant_confidence_threshold,
            params.num_assistant_tokens_schedule == "heuristic",
        )


@dataclass
class Call:
    """One call, ready to run."""

    model: Model
    request: Request
    prompts: Prompts
    draft: lookup.Draft | None = None

    def steps(self) -> Iterator[list[Event]]:
        """Run it: the new tokens of each step. Beams come all at once, when they are known."""
        params = self.request.params
        if params.num_beams > 1 or params.num_beam_groups > 1:
            yield from beam.search(self.model, self.request)
            return
        batch = Batch(self.model)
        if self.draft is not None:
            batch = lookup.Speculation(self.model, self.draft)
        batch.add(self.request)
        while batch.rows:
            yield batch.step()


# What `stream` takes besides knobs; `generate` spells them out.
_OBJECTS = (
    "attention_mask", "generation_config", "logits_processor", "stopping_criteria",
    "prefix_allowed_tokens_fn", "negative_prompt_ids", "negative_prompt_attention_mask",
    "assistant_model", "tokenizer",
)  # fmt: skip


def _mapping(config: Any) -> Mapping[str, Any] | None:
    if config is None or isinstance(config, Mapping):
        return config
    if not hasattr(config, "to_dict"):
        raise ValueError(f"generation_config must be a dict or have to_dict(), got {config!r}")
    return dict(config.to_dict())


def _as_tokens(call: Call, texts: list[TextStream] | None) -> Iterator[Token]:
    for events in call.steps():
        last = {event.row.index: place for place, event in enumerate(events)}
        for place, event in enumerate(events):
            row = event.row
            # A step may bring a row several tokens; its reason to end belongs to the last.
            reason = row.finish_reason if last[row.index] == place else None
            text = "" if texts is None else texts[row.index].push(event.token)
            if reason and texts is not None:
                text += texts[row.index].end()
            yield Token(
                id=event.token,
                text=text,
                logprob=event.logprob,
                top_logprobs=event.top_logprobs,
                finish_reason=reason,
                row=row.index,
            )


def _tokens(request: Request, events: Sequence[Event]) -> NDArray[np.int64]:
    """int64 [rows]: the new token of each row, padding for those that have ended."""
    out = np.full(len(request.rows), request.pad_token_id, np.int64)
    for event in events:
        out[event.row.index] = event.token
    return out


def _result(request: Request, prompts: Prompts) -> Any:
    sequences = prompts.give_back(request.sequences())
    params = request.params
    if not params.return_dict_in_generate:
        return sequences
    beams = params.num_beams > 1
    return GenerateOutput(
        sequences=sequences,
        scores=tuple(request.scores) if params.output_scores else None,
        logits=tuple(request.logits) if params.output_logits else None,
        sequences_scores=request.sequences_scores() if beams and params.output_scores else None,
        beam_indices=request.beam_indices() if beams else None,
        finish_reasons=[row.finish_reason or "" for row in request.rows],
        top_logprobs=request.top_logprobs if params.top_logprobs else None,
    )


def load(
    name_or_path: str | os.PathLike[str] | None = None, *, threads: int | None = None
) -> CausalLM:
    """Load a model directory, or a hub repository that holds one; torch is not needed.

    Args:
        name_or_path: a directory or a hub id; None for the embedded demo model.
        threads: threads of a step; None for the physical cores.

    Raises:
        ModelError: there is no usable model; the message says what was found.
    """
    return CausalLM(hub.directory(name_or_path), threads)


@functools.lru_cache(maxsize=8)
def _loaded(directory: Path) -> CausalLM:
    return CausalLM(directory)


def generate(
    input_ids: Any = None, *, model: str | os.PathLike[str] | None = None, **kwargs: Any
) -> Any:
    """`CausalLM.generate` of a model directory, which is loaded once; None is the demo model."""
    return _loaded(hub.directory(model).resolve()).generate(input_ids, **kwargs)


def _json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
