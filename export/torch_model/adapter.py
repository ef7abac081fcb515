"""Adapters (PEFT's: LoRA and its kin), merged into the model that they were trained on.

Once merged, the weights are ordinary ones: the proof compares with the merged model, and nothing
at run time knows of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from fastgen.errors import ModelError, UnsupportedModel
from fastgen.store import jsonfile
from fastgen.store.model_info import CONFIG
from fastgen.system import extras

ADAPTER_CONFIG = "adapter_config.json"
ADVICE = "save the adapter again with save_pretrained"
SHORT = 400  # characters of peft's error messages that are worth repeating
TRIED = 12  # tokens of which a merged model has to say the same
NEAR = 1e-2  # of the largest logit: what adding up weights in another order may change


def base_of(path: Path) -> str | None:
    """The model that an adapter's directory was trained on; None if it holds a whole model.

    Raises:
        ModelError: it does not say which.
    """
    if not (path / ADAPTER_CONFIG).is_file() or (path / CONFIG).is_file():
        return None
    config = jsonfile.read(path / ADAPTER_CONFIG, ADVICE)
    name = "base_model_name_or_path"
    return str(
        jsonfile.take(
            config, path / ADAPTER_CONFIG, name, jsonfile.is_text, "a model's name", ADVICE
        )
    )


def merged(model: PreTrainedModel, path: Path, tokens: int = 0) -> PreTrainedModel:
    """`model`, which is changed, with the adapter of a directory in its weights.

    Where tokens were added, the vocabulary grows as peft's AutoPeftModel has it: to what the
    adapter holds rows for, or its tokenizer has tokens.

    Args:
        tokens: of the adapter's own tokenizer; 0 if it brings none.

    Raises:
        ModelError: peft is not installed, or it is no adapter of this model.
        UnsupportedModel: it is of a kind that cannot become part of the weights.
    """
    if not (path / ADAPTER_CONFIG).is_file():
        raise ModelError(f"{path} is no adapter: it has no {ADAPTER_CONFIG}")
    try:
        import peft
    except ImportError as error:
        raise ModelError(
            f"{path} is an adapter; merging it needs peft: {extras.install('adapter')} ({error})"
        ) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Weights that the adapter should have and has not: peft only warns of them.
        warnings.filterwarnings("error", "Found missing adapter keys")
        try:
            config = peft.PeftConfig.from_pretrained(str(path))
            _check_kind(config)
            weights = peft.utils.load_peft_weights(str(path), device="cpu")
            _resize(model, weights, tokens)
            _untie(model, weights)
            adapted = peft.PeftModel.from_pretrained(model, str(path)).eval()
        except UnsupportedModel:
            raise
        except Exception as error:  # of peft, torch and safetensors, all kinds
            raise ModelError(f"the adapter {path} cannot be merged: {_said(error)}") from error
        try:
            expected = _logits(adapted)
            whole: PreTrainedModel = adapted.merge_and_unload().eval()
            _check_same(expected, _logits(whole))
        except Exception as error:  # it fits the model: what fails is how its kind computes
            raise _cannot(config, _said(error)) from error
    return whole


def _check_kind(config: Any) -> None:
    """Refuse what is no change of weights."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING as tuners

    if config.is_prompt_learning:
        raise _cannot(
            config, "what it has learned stands before each prompt, and changes no weight"
        )
    if not hasattr(tuners.get(config.peft_type), "merge_and_unload"):
        raise _cannot(config, "it computes beside the model's weights, and peft cannot merge it")
    if getattr(config, "alora_invocation_tokens", None):
        raise _cannot(config, "it works only after certain tokens (aLoRA)")


def _cannot(config: Any, why: str) -> UnsupportedModel:
    kind = getattr(config.peft_type, "value", config.peft_type)
    return UnsupportedModel(
        f"an adapter of the kind {kind} cannot become part of a model's weights: {why}"
    )


def _resize(model: PreTrainedModel, weights: dict[str, torch.Tensor], tokens: int) -> None:
    """Give a model as many rows of its vocabulary as the adapter was trained with."""
    there = model.get_input_embeddings().weight.shape[0]
    rows = {count for name in _tables(model) for count in _rows(weights, name)}
    wanted = rows.pop() if len(rows) == 1 else max(there, tokens)
    if wanted != there:
        model.resize_token_embeddings(wanted)


def _untie(model: PreTrainedModel, weights: dict[str, torch.Tensor]) -> None:
    """Let a head that is the embedding have weights of its own where a LoRA is on one of them.

    Merged into the one tensor it would be in both, and two would be in it twice.
    """
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is not table.weight:
        return
    if any(f".{module}.lora_" in name for module in _tables(model) for name in weights):
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
            config.tie_word_embeddings = False


def _tables(model: PreTrainedModel) -> list[str]:
    """The names of the modules that have a row for each token."""
    tables = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    return [name for name, module in model.named_modules() if id(module) in tables]


def _rows(weights: dict[str, torch.Tensor], module: str) -> Iterator[int]:
    """The rows of a table of the vocabulary, as an adapter's weights have it."""
    for name, weight in weights.items():
        if f".{module}." not in name:
            continue
        if "lora_embedding_A" in name:
            yield weight.shape[1]
        elif name.endswith((f".{module}.weight", "lora_B.weight")):
            yield weight.shape[0]


def _logits(model: Any) -> torch.Tensor:
    """The logits of a row of the vocabulary's first and last tokens."""
    config = model.config.get_text_config(decoder=True)
    size = config.vocab_size
    ids = torch.arange(size - TRIED, size) % size
    ids[::2] = torch.arange(len(ids[::2])) % size
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids[None]).logits.float()
    return logits


def _check_same(expected: torch.Tensor, actual: torch.Tensor) -> None:
    near = NEAR * float(expected.abs().max())
    if expected.shape != actual.shape or not torch.allclose(expected, actual, rtol=0, atol=near):
        raise ValueError("merged, the model says something else")


def _said(error: BaseException) -> str:
    line = " ".join(str(error).split()) or repr(error)
    return line if len(line) <= SHORT else line[:SHORT].rsplit(" ", 1)[0] + " ..."
