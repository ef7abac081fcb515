"""Where a model comes from: a directory or the hub, as torch weights in float32, with tokenizer."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from fastgen.export.attention import UnsupportedModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from fastgen import hub
from fastgen.model import ModelError


@dataclass
class Source:
    """A model to export.

    Attributes:
        model: float32, in eval mode.
        tokenizer: one that has a `tokenizer.json`; None if the model is exported for ids only.
        note: why there is no tokenizer.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast | None
    note: str = ""


def load(name_or_path: str | os.PathLike[str], revision: str | None = None) -> Source:
    """Load from a `save_pretrained` directory or a hub id, whatever the stored dtype is.

    Raises:
        ModelError: there is no such model.
        UnsupportedModel: it is not a causal language model that transformers knows.
    """
    path = Path(name_or_path)
    if not path.is_dir():
        if path.exists():
            raise ModelError(f"{path} is a file; expected a directory or a hub id")
        path = hub.snapshot(str(name_or_path), revision, hub.NOT_READ)
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{name_or_path} is not a transformers model: {error}") from error
    try:
        model = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=torch.float32)
    except (ValueError, KeyError) as error:
        raise UnsupportedModel(
            f"{config.model_type} cannot be exported: transformers has no causal language model "
            f"for it, or cannot load this one: {error}"
        ) from error
    except OSError as error:
        raise ModelError(f"{name_or_path} cannot be loaded: {error}") from error
    tokenizer, note = _tokenizer(path)
    return Source(str(name_or_path), model.eval(), tokenizer, note)


def of_object(model: PreTrainedModel, tokenizer: object | None) -> Source:
    """A model object as a source; it is copied if it is not in float32."""
    if any(p.dtype != torch.float32 for p in model.parameters() if p.is_floating_point()):
        model = copy.deepcopy(model).float()
    fast, note = _fast(tokenizer) if tokenizer is not None else (None, "no tokenizer was given")
    return Source(model.config.name_or_path or model.config.model_type, model, fast, note)


def _tokenizer(path: Path) -> tuple[PreTrainedTokenizerFast | None, str]:
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        return None, f"transformers cannot load its tokenizer: {str(error).splitlines()[0]}"
    return _fast(tokenizer)


def _fast(tokenizer: object) -> tuple[PreTrainedTokenizerFast | None, str]:
    """The tokenizer as one that has a `tokenizer.json`; a slow one is converted if it can be."""
    if getattr(tokenizer, "is_fast", False):
        return tokenizer, ""  # type: ignore[return-value]
    from transformers.convert_slow_tokenizer import convert_slow_tokenizer

    try:
        backend = convert_slow_tokenizer(tokenizer)
    except (ValueError, KeyError, AttributeError, NotImplementedError, ImportError) as error:
        return None, f"{type(tokenizer).__name__} has no fast form: {error}"
    special = getattr(tokenizer, "special_tokens_map", {})
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special), ""
