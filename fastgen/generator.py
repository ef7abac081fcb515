"""A loaded model that generates, streams, completes, chats and scores: the front of fastgen."""

from __future__ import annotations

import copy
import functools
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fastgen import first_use
from fastgen.engine import memory_estimate, score
from fastgen.engine.call import Call
from fastgen.engine.model import Model
from fastgen.engine.output import Token
from fastgen.engine.prefix_cache import PrefixCache, check
from fastgen.engine.prepare import Loaded, Objects, last_token, prepare, read
from fastgen.engine.score import Choosing, decision
from fastgen.engine.writer import Writer
from fastgen.inputs import tensors, validators
from fastgen.inputs.lengths import default_length
from fastgen.inputs.params import Params
from fastgen.sampling import processors, stop
from fastgen.store import jsonfile
from fastgen.store.model_info import (
    CHAT_TEMPLATE,
    CONFIG,
    GENERATION_CONFIG,
    TOKENIZER,
    TOKENIZER_CONFIG,
    ModelInfo,
)
from fastgen.store.tuning import Tuning
from fastgen.text import token_healing
from fastgen.text.tokenizer import TextStream, Tokenizer


class Settings:
    """A JSON file's content with attributes, as transformers' configurations have them.

    Attributes may be set (`model.generation_config.pad_token_id = 0`) and then count as defaults.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        # A field that has a method's name must not take its place.
        self.__dict__.update((k, v) for k, v in content.items() if not hasattr(Settings, k))

    def to_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def __repr__(self) -> str:
        return f"Settings({self.__dict__})"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None  # transformers' configurations answer None for what is not set


class Device(str):
    """The device of the model: "cpu", with the attribute of torch's devices that scripts use."""

    @property
    def type(self) -> str:
        return str(self)


class CausalLM:
    """A causal language model: transformers' `generate` on numpy and onnxruntime.

    Args:
        directory: a model directory that `fastgen export` wrote.
        threads: threads of a step; None for the physical cores.
        tuning: how to run it; None for what `fastgen tune` found best on this machine.
        prefill_precision: see `load`.
        prompts: the old name of `prefill_precision`.
        packed: see `load`.

    Attributes:
        config: the model's config.json.
        generation_config: the model's defaults for `generate`.
        has_tokenizer: whether it takes and gives texts, or ids only.

    Raises:
        ModelError: the directory cannot be used; the message says why.
    """

    device = Device("cpu")

    def __init__(
        self,
        directory: str | os.PathLike[str],
        threads: int | None = None,
        tuning: Tuning | None = None,
        prefill_precision: str | None = None,
        *,
        prompts: str | None = None,
        packed: bool = False,
    ) -> None:
        prefill_precision = renamed_prompts(prompts, prefill_precision)
        self.directory = Path(directory)
        self.name_or_path = str(directory)
        self.model = Model(self.directory, threads, tuning, prefill_precision, packed)
        _warn(self.model.cautions)
        self.config = Settings(jsonfile.read(self.directory / CONFIG))
        self.generation_config = Settings(jsonfile.read(self.directory / GENERATION_CONFIG))
        self.has_tokenizer = (self.directory / TOKENIZER).is_file()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        precision: str | None = None,
        cache_precision: str | None = None,
        threads: int | None = None,
        prefill_precision: str | None = None,
        revision: str | None = None,
        prompts: str | None = None,
        packed: bool = False,
    ) -> Self:
        """Load a fastgen directory, a transformers model, an ONNX folder that others exported, or
        a hub repository of any of these kinds.

        A transformers model is exported on first use (which needs the extra `export`), an ONNX
        folder is rewritten (which needs the extra `onnx`, and no torch). What comes of it is kept
        in a cache (`FASTGEN_CACHE`, by default ~/.cache/fastgen) and needs neither.

        Args:
            name_or_path: a directory, or a hub id such as "distilgpt2".
            precision: "fp32", "int8" (an export's default) or "int4"; of an ONNX folder also its
                own, such as "q4" (its default), "q8", "fp16" or "q4f16".
            cache_precision: of keys and values, "fp32" (an export's default) or "int8".
            threads: threads of a step; None for the physical cores.
            prefill_precision: see `load`.
            revision: a branch, tag or commit of the hub repository.
            prompts: the old name of `prefill_precision`.
            packed: see `load`.

        Raises:
            ModelError: there is no such model, or not in that precision, or what is needed to make
                one of it is not installed.
            ValueError: it cannot be expressed, or its export differs from it.
        """
        prefill_precision = renamed_prompts(prompts, prefill_precision)
        directory = first_use.exported(name_or_path, precision, cache_precision, revision)
        model = cls(directory, threads, prefill_precision=prefill_precision, packed=packed)
        model.name_or_path = str(name_or_path)
        return model

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, read at the first use.

        Raises:
            ModelError: the model was exported for ids only, or its files are no longer as they were
                exported.
        """
        self.model.info.check(self.directory, TOKENIZER, TOKENIZER_CONFIG)
        return Tokenizer(self.directory)

    def without_defaults(self) -> Self:
        """The same model with no defaults of its own: what its generation config says is put by."""
        out = copy.copy(self)
        out.generation_config = Settings({})
        return out

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Itself: there is one device. For scripts that were written for torch."""
        return self

    def eval(self) -> Self:
        """Itself, as `to`."""
        return self

    def generate(
        self,
        input_ids: Any = None,
        generation_config: Any = None,
        *,
        attention_mask: Any = None,
        logits_processor: Sequence[processors.UserProcessor] | None = None,
        stopping_criteria: Sequence[stop.Criterion] | None = None,
        prefix_allowed_tokens_fn: processors.PrefixAllowedTokens | None = None,
        negative_prompt_ids: Any = None,
        negative_prompt_attention_mask: Any = None,
        assistant_model: CausalLM | None = None,
        tokenizer: Any = None,
        prefix_cache: PrefixCache | None = None,
        streamer: Any = None,
        inputs: Any = None,
        **knobs: Any,
    ) -> Any:
        """Generate as transformers' `generate` does: the same keywords give the same tokens.

        Args:
            input_ids: a list of ints, a (ragged) list of lists, an integer array of one or two
                dimensions, or a torch tensor. None starts from the model's bos token.
            generation_config: defaults of the call: an object with `to_dict()`, or a dict.
            attention_mask: 1 for tokens, 0 for padding; a ragged list needs none.
            logits_processor: callables (ids int64 [rows, length], scores float32 [rows, vocab])
                -> scores, after the built-in processors and before the sampling warpers. They see
                the rows that still run.
            stopping_criteria: callables (ids int64 [rows, length], scores) -> bool, or bool
                [rows], after each token. They see all rows, ended ones padded; the scores are
                those of all steps so far, a tuple of float32 [rows, vocab] (of beams [rows *
                num_beams, vocab]), with `output_scores` and `return_dict_in_generate`, else None.
            prefix_allowed_tokens_fn: (batch id, ids [length]) -> the tokens allowed next, as
                integers or as a mask of the vocabulary.
            negative_prompt_ids: what classifier-free guidance steers away from; needs
                `guidance_scale`. Padding is left out, so a padded one is as if given alone.
            negative_prompt_attention_mask: its mask.
            assistant_model: a smaller fastgen model with the same vocabulary that guesses tokens.
                The result is that of generation without it, for the same seed too.
            tokenizer: for `stop_strings` and `token_healing`; by default the model's own.
            prefix_cache: keeps the prompts' keys and values for later calls; the result is the
                same (with int8 keys and values: up to their rounding, see `PrefixCache`).
            streamer: an object with `put(ids)` and `end()`, such as transformers' TextStreamer.
            inputs: another name of `input_ids`.
            knobs: see `fastgen.Params`; `None` switches one off.

        Callables get torch tensors if the ids are one or if they are of transformers' classes,
        such as a `LogitsProcessorList` or `StoppingCriteriaList`; else numpy arrays. (Where
        transformers lets such an object replace a built-in one of its class, here both apply.)

        Sampling repeats `torch.manual_seed(seed)`. Without a seed it is different each time; but
        where the ids are a torch tensor, it draws from torch's own default generator and leaves
        it as transformers would, so that `torch.manual_seed(7)` or `transformers.set_seed(7)`
        holds for the calls that follow.

        Returns:
            int64 [rows * num_return_sequences, length] in the kind that came in, padded as
            transformers pads; a `GenerateOutput` with `return_dict_in_generate=True`. Without
            ids it is a list, or a tensor where another argument is one or is an object of
            transformers (a `GenerationConfig`, for one).

        Raises:
            ValueError: a keyword or its value, the ids or the mask: the message names it. Or the
                scores hold nan, or rule every token out, where one has to be chosen.

        Warns:
            UserWarning: no length is set; a row is padded on the right; the text may get longer
                than the model was made for; a schema says something that only annotates.
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
            prefix_cache=prefix_cache,
            knobs=knobs,
        )
        _warn(call.notes)
        if streamer is not None:
            call.tell(streamer)
        else:
            for _ in call.steps():
                pass
        return call.result()

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
        call = self.call(prompt, logprobs=True, **kwargs)
        _warn(call.notes)
        return _tokens_of(call, self.writer(call, skip_special_tokens))

    def call(
        self,
        prompt: Any,
        *,
        logprobs: bool | str = False,
        stop: Sequence[str] = (),
        **kwargs: Any,
    ) -> Call:
        """A call that is checked and has not begun, for those that run many (see `schedule`).

        Args:
            prompt: as `stream` takes it.
            logprobs: whether its tokens carry their log-probability: True under the scores that
                they were chosen from, "model" as the model has it, before any knob (of beams, both
                are their own).
            stop: texts that end a row, looked for in what is new alone, as OpenAI's `stop`;
                `stop_strings` may begin in the prompt, as in transformers.
            kwargs: the keywords of `generate`.

        Raises:
            ValueError: whatever cannot be done; the message names it.
        """
        objects = {name: kwargs.pop(name) for name in _OBJECTS if name in kwargs}
        return self._call(
            self._ids(prompt), knobs=kwargs, logprobs=logprobs, stop_texts=stop, **objects
        )

    def healing(self, ids: Sequence[int]) -> tuple[list[int], Call | None]:
        """A prompt's `token_healing` as a call, for those that run many (see `schedule`).

        Returns:
            ids that stay, and the call whose only token follows them: then they are the prompt of
            a `call` without token_healing. No call where they are the prompt as they are.
        """
        prompt = token_healing.reopen(ids, self.tokenizer)
        if not prompt.biases:
            return prompt.ids, None
        call = last_token(self._loaded, prompt)
        _warn(call.cautions)
        return prompt.ids, call

    def writer(self, call: Call, skip_special_tokens: bool = True) -> Writer:
        """The `Writer` that makes tokens with their text of a call's events."""
        if not self.has_tokenizer:
            return Writer(None)
        rows = call.request.rows
        return Writer(
            [TextStream(self.tokenizer, r.prompt.tolist(), skip_special_tokens) for r in rows]
        )

    def complete(self, prompt: str | Sequence[str], **kwargs: Any) -> Any:
        """The text that follows: str for a str, a list for a list (see `generate`'s keywords)."""
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not texts:
            raise ValueError("no prompt was given: pass a text or a list of texts")
        out = self._written(texts, kwargs)
        return out[0] if isinstance(prompt, str) and len(out) == 1 else out

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_variables: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The model's reply to a conversation, by its own chat template (extra `chat`).

        Args:
            messages: such as `[{"role": "user", "content": "Hi"}]`, oldest first.
            tools: JSON schemas of functions, for templates that know of them.
            template_variables: what else the template sees, such as `{"enable_thinking": False}`.
            kwargs: the keywords of `generate`. Where no length is set, here or in the model's
                defaults, a reply has 256 tokens at most.

        Returns:
            The reply without special tokens; a list with `num_return_sequences` above 1.
        """
        ids = self.chat_ids(messages, tools, template_variables)
        new = default_length("reply", kwargs, self.generation_config.to_dict())
        if new is not None and not kwargs.get("generation_config"):
            kwargs["max_new_tokens"] = new
        out = self._written([ids], kwargs)
        return out[0] if len(out) == 1 else out

    def chat_text(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of a conversation by the model's own chat template, as `chat` reads it.

        Raises:
            ModelError: the template is not the one that was exported.
            ValueError: there is none, or it refuses the messages.
        """
        from fastgen.text import chat_template  # late: a process starts sooner without

        self.model.info.check(self.directory, CHAT_TEMPLATE)
        variables = dict(template_variables or {})
        config = self.tokenizer.config
        return chat_template.prompt(self.directory, config, messages, tools, **variables)

    def chat_ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The tokens of `chat_text`, which raises the same."""
        text = self.chat_text(messages, tools, template_variables)
        return self.tokenizer.encode(text, add_special_tokens=False)

    def score(
        self,
        ids: Any,
        *,
        prefix: Any = None,
        attention_mask: Any = None,
        prefix_cache: PrefixCache | None = None,
    ) -> Any:
        """The log-probability of each given token, as the model predicts it from those before.

        Args:
            ids: one text or row of ids, or several of them, as `generate` takes them.
            prefix: one text or row of ids that comes before every row and is read only once:
                then these are continuations, cut into tokens apart from it.
            attention_mask: 0 for the padding of a rectangular array, which is left out. Without
                one every id counts.
            prefix_cache: keeps the prefix's keys and values for later calls.

        Returns:
            float32 [length] for one text or row, a list of them for several. The first token,
            which nothing predicts, has nan; with a prefix it has its number too.

        Raises:
            ValueError: a row is empty, or longer (with the prefix) than the model takes.
        """
        check(prefix_cache)
        if prefix_cache is not None and prefix is None:
            raise ValueError("prefix_cache keeps a prefix: pass the prefix that the rows share")
        before = None
        if prefix is not None:
            before, *others = self._rows(prefix)
            if others:
                raise ValueError(f"prefix must be one text or row, got {1 + len(others)}")
        rows = self._rows(ids, attention_mask, special=prefix is None)
        limit = self.model.info.max_length
        longest = max(map(len, rows)) + (0 if before is None else len(before))
        if limit is not None and longest > limit:
            raise ValueError(f"{longest} tokens cannot be scored: the model takes {limit} at most")
        out = score.log_probabilities(self.model, rows, before, prefix_cache)
        return out[0] if _is_one(ids) else out

    def choose(
        self,
        prompt: Any,
        options: Sequence[Any],
        *,
        temperature: float = 1.0,
        per_token: bool = False,
        prefix_cache: PrefixCache | None = None,
    ) -> Any:
        """Decide which of some options follows a prompt, with a probability for each.

        An option's score is the log-probability of its tokens after the prompt, summed up; the
        probabilities are the softmax of the scores over the options. Of options that are one token
        each this is what transformers' `DecisionPipeline` computes of its labels. A long option is
        seldom as likely as a short one: `per_token` compares the mean of their tokens instead.

        A prompt is read once for all its options, and what prompts begin with alike is read once
        for all of them.

        Args:
            prompt: one text or row of ids, or several of them, as `generate` takes them. A
                conversation's is `chat_ids(messages)`.
            options: two or more texts or rows of ids; for several prompts also a list of these
                for each. A text is cut into tokens apart from the prompt: where words follow a
                space, it begins with that space.
            temperature: that the scores are divided by, such as a calibrated one.
            per_token: whether options are compared by the mean of their tokens, not by the sum.
            prefix_cache: keeps the prompts' keys and values for later calls.

        Returns:
            a `Decision` for one prompt, a list of them for several.

        Raises:
            ValueError: there are fewer than two options, one is empty or there twice, or the
                prompt with one is longer than the model takes; or the temperature is not positive.
        """
        check(prefix_cache)
        temperature = validators.number("temperature", temperature)
        if not 0 < temperature < float("inf"):
            raise validators.wrong("temperature", "a positive number", temperature)
        if isinstance(options, str):
            raise _too_few(options)
        prompts = self._rows(prompt)
        known = prefix_cache
        if known is None and len(prompts) > 1:
            known = PrefixCache()
        out, given = [], list(options)
        each = not _is_one(prompt) and _are_lists(given)
        if each and len(given) != len(prompts):
            raise ValueError(
                f"options are {len(given)} lists for {len(prompts)} prompts: give one for each"
            )
        shared = None if each else self.options(given)
        for index, row in enumerate(prompts):
            mine = shared or self.options(given[index])
            choosing = self.choosing(row.tolist(), mine, known)
            memory_estimate.check({"keys and values": choosing.bytes}, "shorter texts need less")
            for _ in choosing.steps():
                pass
            options = given[index] if each else given
            out.append(decision(options, choosing.option_logprobs, temperature, per_token))
        return out[0] if _is_one(prompt) else out

    def options(self, given: Sequence[Any]) -> list[list[int]]:
        """The ids of options, for those that make `choosing` of them.

        Raises:
            ValueError: there are fewer than two, or one is empty, or there twice.
        """
        if isinstance(given, str) or len(given) < 2:
            raise _too_few(given)
        rows = [
            self.tokenizer.encode(validators.text("an option", one), add_special_tokens=False)
            if isinstance(one, str)
            else (self._rows([one])[0].tolist() if len(one) else [])
            for one in given
        ]
        for index, row in enumerate(rows):
            if not row:
                raise ValueError(f"option {index} is empty: it needs at least one token")
            if row in rows[:index]:
                raise ValueError(f"option {index} is there twice: {given[index]!r}")
        return rows

    def choosing(
        self,
        prompt: Sequence[int],
        options: Sequence[Sequence[int]],
        prefix_cache: PrefixCache | None = None,
    ) -> Choosing:
        """A decision that is checked and has not begun, for those that run many (see `schedule`).

        Args:
            prompt: ids.
            options: of `options`.

        Raises:
            ValueError: the prompt with an option is longer than the model takes.
        """
        limit, longest = self.model.info.max_length, len(prompt) + max(map(len, options))
        if limit is not None and longest > limit:
            raise ValueError(
                f"{longest} tokens of a prompt and an option cannot be scored: the model takes "
                f"{limit} at most"
            )
        return Choosing(self.model, prompt, options, prefix_cache)

    def perplexity(self, texts: Any) -> float:
        """exp of the mean negative log-probability of all tokens of some texts (or rows of ids).

        The first token of each is not counted: nothing predicts it.
        """
        logprobs = self.score(texts)
        return score.perplexity(logprobs if isinstance(logprobs, list) else [logprobs])

    def compute_transition_scores(
        self,
        sequences: Any,
        scores: Sequence[Any],
        beam_indices: Any = None,
        normalize_logits: bool = False,
    ) -> Any:
        """The score of each generated token, as transformers' method of this name gives it.

        Args:
            sequences, scores, beam_indices: of a `GenerateOutput` with `output_scores=True`.
            normalize_logits: whether scores become log-probabilities.

        Returns:
            float32 [rows, new], a tensor if `sequences` is one. What follows a row's end is 0.
        """
        out = score.transition_scores(
            np.asarray(tensors.array(sequences)),
            [tensors.array(step) for step in scores],
            tensors.array(beam_indices),
            normalize_logits,
        )
        return tensors.tensor(out) if tensors.is_tensor(sequences) else out

    def _ids(self, prompt: Any, special: bool = True) -> Any:
        """A text or several as ids; what is no text as it is."""
        if isinstance(prompt, str):
            prompt = [prompt]
        if isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], str):
            texts = [validators.text("the prompt", one) for one in prompt]
            return [self.tokenizer.encode(text, add_special_tokens=special) for text in texts]
        return prompt

    def _rows(
        self, ids: Any, attention_mask: Any = None, special: bool = True
    ) -> list[NDArray[np.int64]]:
        """int64 [length] of each text or row of ids, without what the mask leaves out."""
        prompts = read(self.model, Params(), self._ids(ids, special), attention_mask)
        _warn(prompts.cautions)
        return prompts.rows

    def _written(self, prompts: Sequence[Any], kwargs: Mapping[str, Any]) -> list[str]:
        """The texts that `stream` writes, a row each; a row may have no token."""
        kwargs = dict(kwargs)
        skip_special_tokens = kwargs.pop("skip_special_tokens", True)
        call = self.call(prompts, logprobs=True, **kwargs)
        _warn(call.notes)
        parts: list[list[str]] = [[] for _ in call.request.rows]
        for token in _tokens_of(call, self.writer(call, skip_special_tokens)):
            parts[token.row].append(token.text)
        return ["".join(row) for row in parts]

    def _call(
        self,
        ids: Any,
        *,
        knobs: Mapping[str, Any],
        logprobs: bool | str = False,
        stop_texts: Sequence[str] = (),
        **objects: Any,
    ) -> Call:
        call = prepare(self._loaded, ids, Objects(**objects), knobs, logprobs, stop_texts)
        _warn(call.cautions)
        return call

    @functools.cached_property
    def _chain(self) -> Callable[[Params, int], processors.Chain]:
        """The processors of knobs: the same for equal ones."""
        return functools.lru_cache(maxsize=64)(processors.build)

    @property
    def _loaded(self) -> Loaded:
        """The model as calls need it, with its defaults as they are now."""
        defaults = self.generation_config.to_dict()
        return Loaded(self.model, defaults, lambda: self.tokenizer, self._chain)


_OBJECTS = tuple(Objects.__dataclass_fields__)


def renamed_prompts(prompts: str | None, prefill_precision: str | None) -> str | None:
    """The precision, also where a caller gave it by its old name `prompts`."""
    if prompts is None:
        return prefill_precision
    _warn(["prompts is now named prefill_precision"], DeprecationWarning)
    return prefill_precision or prompts


def _warn(texts: Sequence[str], category: type[Warning] = UserWarning) -> None:
    """Warn at the line that called this module, whatever lies between it and here."""
    if not texts:
        return
    frame, level = sys._getframe(), 1
    while frame.f_back and frame.f_globals is globals():
        frame, level = frame.f_back, level + 1
    for text in texts:
        warnings.warn(text, category, stacklevel=level)


def _tokens_of(call: Call, writer: Writer) -> Iterator[Token]:
    for step in call.steps():
        yield from writer.take(step.events)


def _is_one(ids: Any) -> bool:
    """True of one text or one row of ids, rather than several."""
    return isinstance(ids, str) or not (
        isinstance(ids[0], str) or np.ndim(tensors.array(ids[0])) > 0
    )


def _too_few(options: Any) -> ValueError:
    return ValueError(f"options must be two or more texts or rows of ids, got {options!r}")


def _are_lists(options: Sequence[Any]) -> bool:
    """True of lists of options, rather than options: their items are texts or rows of ids."""
    return all(
        isinstance(one, Sequence)
        and not isinstance(one, str)
        and bool(one)
        and (isinstance(one[0], str) or np.ndim(tensors.array(one[0])) > 0)
        for one in options
    )


def load(
    name_or_path: str | os.PathLike[str] | None = None,
    *,
    threads: int | None = None,
    prefill_precision: str | None = None,
    prompts: str | None = None,
    packed: bool = False,
) -> CausalLM:
    """Load a model by its name: a fastgen directory, an ONNX folder or a transformers model.

    The last two are made into a directory in the cache on first use, as `CausalLM.from_pretrained`
    says, which also takes a precision; a fastgen directory needs no torch and no onnx.

    Args:
        name_or_path: a directory or a hub id; None for the embedded demo model.
        threads: threads of a step; None for the physical cores.
        prefill_precision: "int8" reads prompts, and takes every step of so many new tokens of all
            rows that it pays, with a second form of the layers' matrices: int8 per output channel,
            made on loading in memory of up to a byte a weight (`fastgen info`). It is faster and
            rounds activations otherwise, so a row of many says nearly what it says alone. "same"
            has one form for all; None as `fastgen tune` left it, or "same".
        prompts: the old name of `prefill_precision`.
        packed: whether to run from packed weights that are kept on the disk, and to keep them first
            where there are none for this model, processor and onnxruntime: twice the model's size
            or more, in the cache (`FASTGEN_CACHE`). Loading is faster, processes that run the same
            model share most of its memory, and every logit is the same. `fastgen info` shows
            what is kept, and removes it.

    Raises:
        ModelError: there is no usable model, or it cannot read prompts so; the message says what
            was found.
        ValueError: threads, prefill_precision.

    Warns:
        UserWarning: packed weights were damaged, and made again; or none can be kept, and the model
            runs without.
    """
    prefill_precision = renamed_prompts(prompts, prefill_precision)
    return CausalLM(
        first_use.directory(name_or_path),
        threads,
        prefill_precision=prefill_precision,
        packed=packed,
    )


def verify(name_or_path: str | os.PathLike[str] | None = None) -> None:
    """Compare every file of a model directory, weights too, with the digests of its export.

    Loading does the same with all files but the weights. This reads them all: 0.7 seconds for
    each GB that is in memory, and what the disk takes for the rest.

    Args:
        name_or_path: a directory or a hub id; None for the embedded demo model.

    Raises:
        ModelError: files are missing, truncated or changed: it names them all. Or an older fastgen
            exported the model, without digests.
    """
    ModelInfo.verify(first_use.directory(name_or_path))


@functools.lru_cache(maxsize=8)
def _loaded(directory: Path) -> CausalLM:
    return CausalLM(directory)


def generate(
    input_ids: Any = None, *, model: str | os.PathLike[str] | None = None, **kwargs: Any
) -> Any:
    """`CausalLM.generate` of a model (see `load`), which is loaded once; None is the demo model."""
    return _loaded(first_use.directory(model).resolve()).generate(input_ids, **kwargs)
