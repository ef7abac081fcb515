"""Loads a model from a directory or the hub: torch weights in float32, and its tokenizer."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import pickle
import tempfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from fastgen.errors import ModelError, UnsupportedModel
from fastgen.export.prove.check import TEXTS
from fastgen.export.source import checkpoint
from fastgen.export.source.origin import name_of
from fastgen.export.torch_model import adapter, text
from fastgen.export.trace import refuse, rope, sparse, stored
from fastgen.store import hub, jsonfile
from fastgen.store.model_info import CONFIG, INFO
from fastgen.text.tokenizer import Tokenizer

SHORT = 300  # characters of somebody else's error message that are worth repeating


@dataclass
class Source:
    """A model to export.

    Attributes:
        name: what it is called: a hub id or a directory's own name, never a path.
        model: in float32.
        tokenizer: one that has a `tokenizer.json`; None if the model is exported for ids only.
        note: why there is no tokenizer.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast | None
    note: str = ""


def load(
    name_or_path: str | os.PathLike[str],
    adapted: str | os.PathLike[str] | None = None,
    in_own_types: Callable[[Path], bool] = lambda path: False,
) -> Source:
    """Load from a `save_pretrained` directory or a hub id, whatever the stored dtype is.

    Args:
        name_or_path: a model, or an adapter, which says which model it belongs to.
        adapted: an adapter to merge into the model, a directory or a hub id.
        in_own_types: whether the weights in a directory stay as they are stored (see `stored`).

    Raises:
        ModelError: there is no such model, or it is not complete.
        UnsupportedModel: it is no model that writes text, or none that transformers knows.
    """
    name, path = _place(name_or_path)
    if (path / INFO).is_file():
        raise ModelError(f"{name} is a fastgen model already: there is nothing to export")
    checkpoint.check(path)
    base = adapter.base_of(path)
    if base is not None and adapted is not None:
        raise ModelError(f"{name} is an adapter itself: merge one into a model at a time")
    if base is not None:
        return _with_adapter(load(base), name, path)
    if adapted is not None:
        return _with_adapter(load(path), *_place(adapted))
    config = _configuration(path)
    said = refuse.quantisation(config)
    with refuse.by_name(config.model_type):
        refuse.configuration(config)
        if said:
            config.quantization_config = said | {"dequantize": True}
        own_types = not said and in_own_types(path)
        model = text.alone(_model(path, config, own_types).eval())
        refuse.configuration(model.config)
        _settle(model)
    tokenizer, note = _tokenizer(path, config)
    return Source(name, model, tokenizer, note)


def _place(name_or_path: str | os.PathLike[str]) -> tuple[str, Path]:
    """The name of a model or an adapter, and the directory where it is."""
    path = Path(name_or_path)
    if path.exists() and not path.is_dir():
        raise ModelError(f"{path} is a file; expected a directory or a hub id")
    if path.is_dir():
        return name_of(path), path
    return str(name_or_path), hub.transformers_snapshot(str(name_or_path))


def _with_adapter(base: Source, name: str, path: Path) -> Source:
    """A model with an adapter merged; the adapter's own tokenizer, if it brings one."""
    checkpoint.check(path)
    own, note = _tokenizer(path) if any(path.glob("tokenizer*")) else (None, "")
    with quiet():
        model = adapter.merged(base.model, path, 0 if own is None else len(own)).eval()
    return Source(name, model, own or base.tokenizer, note if own is None and note else base.note)


def of_object(model: PreTrainedModel, tokenizer: object | None) -> Source:
    """A model object as a source; what is exported is a copy where it is another one."""
    kind, given_name = model.config.model_type, model.config.name_or_path
    devices = {p.device.type for p in model.parameters()}
    if "meta" in devices:
        raise UnsupportedModel(f"{kind} has no weights: it is on device 'meta'")
    with refuse.by_name(kind):
        refuse.configuration(model.config)
        model = text.alone(model)
    if devices != {"cpu"} or any(
        p.dtype != torch.float32 for p in model.parameters() if p.is_floating_point()
    ):
        model = copy.deepcopy(model).float().cpu()
    elif rope.limit(model) is not None or sparse.limit(model) is not None:
        model = copy.deepcopy(model)
    _settle(model)
    fast, note = _fast(tokenizer) if tokenizer is not None else (None, "no tokenizer was given")
    path = Path(given_name)
    name = name_of(path) if given_name and (path.is_absolute() or path.exists()) else given_name
    return Source(name or kind, model, fast, note)


def _settle(model: PreTrainedModel) -> None:
    """Give it as many positions as the graph can say the same for."""
    sparse.settle(model)
    rope.settle(model)


def _configuration(path: Path) -> PretrainedConfig:
    """Read config.json.

    Types of weights that torch does not have, such as "auto", are left out: the files have them.
    """
    fields = jsonfile.read(path / CONFIG, checkpoint.ADVICE)
    known = _without_unknown_types(fields)
    try:
        with contextlib.ExitStack() as stack:
            directory = path
            if known != fields:
                directory = Path(
                    stack.enter_context(tempfile.TemporaryDirectory(prefix="fastgen-"))
                )
                (directory / CONFIG).write_text(json.dumps(known), encoding="utf-8")
            stack.enter_context(quiet())
            config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        for each in (config, config.get_text_config()):
            each.return_dict = True  # as `generate` has it, whatever is written there
    except Exception as error:  # of all kinds: each configuration checks what it is given itself
        if "trust_remote_code" in str(error):
            raise UnsupportedModel(
                f"{name_of(path)} cannot be exported: it brings Python code of its own, which "
                "fastgen does not run"
            ) from error
        raise ModelError(f"{path} is not a transformers model: {_short(error)}") from error
    config.name_or_path = str(path)
    return config


def _without_unknown_types(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration, and those within it, without a `dtype` that is none of torch's."""
    return {
        name: _without_unknown_types(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if name not in ("dtype", "torch_dtype")
        or isinstance(getattr(torch, str(value), None), torch.dtype)
    }


def _model(path: Path, config: PretrainedConfig, own_types: bool) -> PreTrainedModel:
    """The weights, all of them: transformers makes up what a checkpoint lacks.

    Args:
        own_types: keep them as they are stored.
    """
    if own_types:
        model = _loaded(path, copy.deepcopy(config), "auto")
        if stored.keep(model):
            return model
    return _loaded(path, config, torch.float32)


def _loaded(path: Path, config: PretrainedConfig, dtype: torch.dtype | str) -> PreTrainedModel:
    door = text.known(config)
    if door is None:
        raise UnsupportedModel("transformers has no causal language model of this type")
    try:
        with quiet():
            model, loading_info = door.from_pretrained(
                path,
                config=config,
                dtype=dtype,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are told below, with the sizes
            )
    except OSError as error:
        raise ModelError(f"{path} cannot be loaded: {_short(error)}") from error
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path} cannot be loaded: its weights are damaged, or hold more than weights, which "
            f"fastgen does not run: {checkpoint.ADVICE}, with safetensors"
        ) from error
    except Exception as error:  # of all kinds: what is read may contradict itself
        raise UnsupportedModel(f"transformers cannot load it: {_short(error)}") from error
    _check_sizes(path, loading_info["mismatched_keys"])
    missing = sorted(loading_info["missing_keys"])
    if missing:
        raise ModelError(
            f"{path} is not a whole causal language model: it lacks {jsonfile.some(missing)}"
        )
    return model


def _check_sizes(path: Path, differing: Collection[tuple[str, Any, Any]]) -> None:
    """Raise a ModelError for weights of other sizes than the configuration has."""
    differences = [
        f"{name} is {list(stored)} where {CONFIG} makes it {list(expected)}"
        for name, stored, expected in sorted(differing)
    ]
    if differences:
        raise ModelError(
            f"{path} contradicts itself: {jsonfile.some(differences)}. Correct {CONFIG} "
            f"(vocab_size, if tokens were added), or {checkpoint.ADVICE}"
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' bars and advice: the export shows its own steps and findings."""
    say = transformers.utils.logging
    bars, verbosity = say.is_progress_bar_enabled(), say.get_verbosity()
    say.disable_progress_bar()
    say.set_verbosity_error()
    try:
        yield
    finally:
        say.set_verbosity(verbosity)
        if bars:
            say.enable_progress_bar()


def _tokenizer(
    path: Path, config: PretrainedConfig | None = None
) -> tuple[PreTrainedTokenizerFast | None, str]:
    """A directory's tokenizer, or why there is none.

    Args:
        config: the model's, which says the kind where the tokenizer's files do not; None to read
            the directory's.
    """
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(path, config=config, trust_remote_code=False)
    except Exception as error:  # of all kinds: files of any age and origin are read
        return None, f"transformers cannot load its tokenizer: {_short(error)}"
    return _fast(tokenizer)


def _fast(tokenizer: object) -> tuple[PreTrainedTokenizerFast | None, str]:
    """The tokenizer as one that has a `tokenizer.json`, or why there is none.

    A slow one is converted. Either way the file alone must give the ids that the tokenizer gives:
    wrong ids in silence are worse than none.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(
            f"tokenizer must be a tokenizer of transformers, got {type(tokenizer).__name__}"
        )
    kind = type(tokenizer).__name__
    if _is_empty(tokenizer):
        # What transformers makes of a directory without a tokenizer's files.
        return None, f"its {kind} has no vocabulary"
    fast = tokenizer
    if not tokenizer.is_fast:
        try:
            fast = _converted(tokenizer)
        except Exception as error:  # converters fail in many ways
            return None, f"its {kind} has no fast form: {_short(error)}"
    alone = Tokenizer.of(fast)
    if any(alone.encode(text) != tokenizer(text)["input_ids"] for text in TEXTS):
        return None, f"its {kind} gives other ids than the tokenizer.json made of it"
    return fast, ""


def _is_empty(tokenizer: PreTrainedTokenizerBase) -> bool:
    ids = {i for text in TEXTS for i in tokenizer(text, add_special_tokens=False)["input_ids"]}
    return ids <= {tokenizer.unk_token_id}


def _converted(slow: Any) -> PreTrainedTokenizerFast:
    """A slow tokenizer as a fast one; added tokens keep their ids."""
    from transformers.convert_slow_tokenizer import SpmConverter, convert_slow_tokenizer

    try:
        backend = convert_slow_tokenizer(slow)
    except (ValueError, AttributeError):
        if not str(getattr(slow, "vocab_file", "")).endswith(".model"):
            raise
        backend = SpmConverter(slow).converted()  # sentencepiece, of a class without a converter
    for index, token in sorted(slow.added_tokens_decoder.items()):
        backend.add_tokens([token])
        if backend.token_to_id(token.content) != index:
            raise ValueError(f"the token {token.content!r} would not keep its id {index}")
    return PreTrainedTokenizerFast(tokenizer_object=backend, **slow.special_tokens_map)


def _short(error: BaseException) -> str:
    """An error in one line, cut where it stops to be of use."""
    line = " ".join(str(error).strip().split("\n\n")[0].split())
    if not line or isinstance(error, KeyError):  # whose text is a name alone
        line = repr(error)
    return line if len(line) <= SHORT else line[:SHORT].rsplit(" ", 1)[0] + " ..."
