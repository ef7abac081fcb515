"""What people hold: a loaded model that generates, streams, completes, chats and scores."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fastgen import hub, processors, prompt, stop
from fastgen.batch import Batch, Event
from fastgen.model import Model
from fastgen.output import GenerateOutput, Token
from fastgen.params import Params, resolve
from fastgen.prompt import Prompts
from fastgen.request import Request
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
                -> scores, after the built-in processors and before the sampling warpers.
            stopping_criteria: callables of the same arguments -> bool, or bool [rows].
            prefix_allowed_tokens_fn: (batch id, ids [length]) -> the tokens allowed next.
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
        params = self._params(generation_config, knobs)
        prompts = self._read(input_ids, attention_mask, params)
        request = self._request(
            params,
            prompts,
            logits_processor=logits_processor or (),
            prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
            criteria=stopping_criteria or (),
        )
        if streamer is not None:
            streamer.put(np.repeat(prompts.ids, len(request.rows) // len(prompts.ids), axis=0))
        for events in self._steps(request):
            if streamer is not None:
                streamer.put(_tokens(request, events))
        if streamer is not None:
            streamer.end()
        return _result(request, prompts)

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
        request, prompts = self._for_stream(prompt, kwargs)
        texts = self._text_streams(prompt, prompts, request, skip_special_tokens)
        return self._tokens(request, texts)

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

    # How a call becomes a request

    def _params(self, config: Any, knobs: Mapping[str, Any]) -> Params:
        if config is not None and not isinstance(config, Mapping):
            if not hasattr(config, "to_dict"):
                raise ValueError(f"generation_config must have to_dict() or be a dict: {config!r}")
            config = config.to_dict()
        return resolve(self.generation_config.to_dict(), config, knobs)

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

    def _request(
        self,
        params: Params,
        prompts: Prompts,
        *,
        criteria: Sequence[stop.Criterion] = (),
        logprobs: bool = False,
        **chain: Any,
    ) -> Request:
        info = self.model.info
        width, longest = prompts.ids.shape[1], max(len(row) for row in prompts.rows)
        return Request(
            params=params,
            prompts=prompts.rows,
            padded=prompts.ids,
            pads=prompts.pads,
            max_length=stop.length_limit(params, width, longest, info.max_length, info.hard_limit),
            chain=processors.build(params, info.vocab_size, **chain) or None,
            criteria=criteria,
            logprobs=logprobs,
        )

    def _steps(self, request: Request) -> Iterator[list[Event]]:
        batch = Batch(self.model)
        batch.add(request)
        while batch.rows:
            yield batch.step()

    # How a request becomes text

    def _for_stream(self, prompt: Any, kwargs: dict[str, Any]) -> tuple[Request, Prompts]:
        """The request of a stream; texts are encoded, and errors come before the first token."""
        objects = {
            name: kwargs.pop(name, None)
            for name in ("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn")
        }
        mask, config = kwargs.pop("attention_mask", None), kwargs.pop("generation_config", None)
        params = self._params(config, kwargs)
        if isinstance(prompt, str):
            prompt = [prompt]
        if isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], str):
            prompt = [self.tokenizer.encode(text) for text in prompt]
        prompts = self._read(prompt, mask, params)
        request = self._request(
            params,
            prompts,
            logits_processor=objects["logits_processor"] or (),
            prefix_allowed_tokens_fn=objects["prefix_allowed_tokens_fn"],
            criteria=objects["stopping_criteria"] or (),
            logprobs=True,
        )
        return request, prompts

    def _text_streams(
        self, prompt: Any, prompts: Prompts, request: Request, skip: bool
    ) -> list[TextStream] | None:
        """One for each row; None for ids of a model without tokenizer."""
        try:
            tokenizer = self.tokenizer
        except ValueError:
            return None
        return [TextStream(tokenizer, row.prompt.tolist(), skip) for row in request.rows]

    def _tokens(self, request: Request, texts: list[TextStream] | None) -> Iterator[Token]:
        for events in self._steps(request):
            for event in events:
                row = event.row
                text = "" if texts is None else texts[row.index].push(event.token)
                if row.finish_reason and texts is not None:
                    text += texts[row.index].end()
                yield Token(
                    id=event.token,
                    text=text,
                    logprob=event.logprob,
                    top_logprobs=event.top_logprobs,
                    finish_reason=row.finish_reason,
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
    return GenerateOutput(
        sequences=sequences,
        scores=tuple(request.scores) if params.output_scores else None,
        logits=tuple(request.logits) if params.output_logits else None,
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
