"""transformers' `generate`, without torch: numpy, onnxruntime and tokenizers.

From the bottom to the top; an area imports those above it in this list:

    errors        ModelError and UnsupportedModel
    system        the machine: cores, memory, extras, Ctrl-C
    inputs        what a caller passes, checked: knobs, ids, tensors
    store         a model directory: its files, the hub, what is kept beside it
    text          text and messages <-> ids
    sampling      logits -> tokens, and when a row ends
    engine        the loop: prompts are read into a cache, rows step and leave
    first_use     a name -> a model directory, exported if need be
    generator     what people hold: CausalLM, load, generate
    conversation  turns of a chat, answered and kept
    timing        how fast models are on this machine
    serve         the HTTP service
    jobs          many rows: files in, files out, on one machine or a cluster
    commands      the command line: one file a command
    __main__      its door

Beside them: `export` (from a model to a directory), `params` (the knobs by their documented name)
and `demo` (the embedded model). `docs/architecture.md` has the picture and the walk of a prompt.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

# onnxruntime reports telemetry by default; its own switch works only before it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from fastgen.engine.output import Decision, GenerateOutput, Token
    from fastgen.engine.prefix_cache import PrefixCache
    from fastgen.errors import ModelError
    from fastgen.generator import CausalLM, generate, load, verify
    from fastgen.generator import CausalLM as CausalLMModelForOnnxGeneration
    from fastgen.inputs.params import Params
    from fastgen.text.tokenizer import Tokenizer

__version__ = "0.1.0"
__all__ = [
    "CausalLM",
    "CausalLMModelForOnnxGeneration",
    "Decision",
    "GenerateOutput",
    "ModelError",
    "Params",
    "PrefixCache",
    "Token",
    "Tokenizer",
    "generate",
    "load",
    "verify",
]

_OFFERED = {
    "CausalLM": "generator",
    "Decision": "engine.output",
    "GenerateOutput": "engine.output",
    "ModelError": "errors",
    "Params": "inputs.params",
    "PrefixCache": "engine.prefix_cache",
    "Token": "engine.output",
    "Tokenizer": "text.tokenizer",
    "generate": "generator",
    "load": "generator",
    "verify": "generator",
}
_MODULES = ("export", "jobs", "params", "serve")  # public ones, by their documented names


def __getattr__(name: str) -> Any:
    """Import what is offered, and public modules, when they are first used.

    So `python -m fastgen`, which imports this before anything of its own, can settle what Ctrl-C
    does before numpy and onnxruntime are imported.
    """
    if name == "CausalLMModelForOnnxGeneration":  # the name that fastgpt's users know
        value = __getattr__("CausalLM")
    elif name in _OFFERED:
        value = getattr(importlib.import_module(f"fastgen.{_OFFERED[name]}"), name)
    elif name in _MODULES:
        value = importlib.import_module(f"fastgen.{name}")
    else:
        raise AttributeError(f"module 'fastgen' has no attribute {name!r}")
    globals()[name] = value
    return value
