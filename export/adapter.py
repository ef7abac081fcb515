"""Adapters (PEFT's: LoRA and its kin), merged into the model that they were trained on.

Once merged, the weights are ordinary ones: the proof compares with the merged model, and nothing
at run time knows of it.
"""

from __future__ import annotations

import warnings
from pathlib import Path

from transformers import PreTrainedModel

from fastgen import extras, jsonfile
from fastgen.jsonfile import ModelError

CONFIG = "adapter_config.json"
ADVICE = "save the adapter again with save_pretrained"


def base_of(path: Path) -> str | None:
    """The model that an adapter's directory was trained on; None if it holds a whole model.

    Raises:
        ModelError: it does not say which.
    """
    if not (path / CONFIG).is_file() or (path / "config.json").is_file():
        return None
    said = jsonfile.read(path / CONFIG, ADVICE)
    name = "base_model_name_or_path"
    return str(jsonfile.take(said, path / CONFIG, name, jsonfile.is_text, "a model's name", ADVICE))


def merged(model: PreTrainedModel, path: Path) -> PreTrainedModel:
    """`model`, which is changed, with the adapter of a directory in its weights.

    Raises:
        ModelError: peft is not installed, or it is no adapter of this model.
    """
    if not (path / CONFIG).is_file():
        raise ModelError(f"{path} is no adapter: it has no {CONFIG}")
    try:
        import peft
    except ImportError as error:
        raise ModelError(
            f"{path} is an adapter; merging it needs peft: {extras.install('adapter')} ({error})"
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Weights that the adapter should have and has not: peft only warns of them.
            warnings.filterwarnings("error", "Found missing adapter keys")
            whole = peft.PeftModel.from_pretrained(model, str(path)).merge_and_unload()
    except Exception as error:  # of peft, torch and safetensors, all kinds
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ModelError(f"the adapter {path} cannot be merged: {reason}") from error
    return whole
