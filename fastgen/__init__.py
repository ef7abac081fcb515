"""transformers' `generate`, without torch: numpy, onnxruntime and tokenizers.

How a prompt becomes text, file by file:

    params      every knob: its name, default and rule  values    a check for each kind of value
    prompt      ids, masks, tensors -> rows            tokenizer   text <-> ids
    tensors     torch's, without torch                 chat        messages -> text
    request     the rows of one call and what they share
    model       new ids and a cache -> logits          cache       keys and values, in place
    jsonfile    what strangers wrote, checked          sandbox     where chat templates run
    forms       messages as a template reads them
    prefill     prompts -> the cache, chunk by chunk   prefix      what is kept of them for later
    codes       keys and values in 8 bits              desk        in 32, where prompts are read
    bounds      what a call would take of memory       memory      pages given back
    cpu         cores, and what they can               atomic      files that appear whole
    extras      what else can be installed             swap        one directory for another
    prompts     read in 8 bits by a model of 4
    processors  logits -> logits, one function a knob  watermark   two of them
    constraint  which tokens JSON, a grammar allow     healing     the prompt's last token, again
    schema      JSON schemas, made exact               trial       where strangers' are tried first
    trial_process  the process that may die of them
    pick        logits -> token, torch's random draws      softmax     and its logarithm
    stop        when a row ends                        output      what comes out
    batch       THE LOOP: rows join, step, leave       beam        beams over the same stages
    guidance    what it would say without the prompt   lookup      several tokens a step
    call        one call, checked and ready to run     score       how likely given tokens are
    schedule    many people's calls, side by side
    generator   what people hold: CausalLM, load, generate
    hub         a name -> a model directory            demo        the embedded one
    tune        what is fastest on this machine        tuning      kept beside the model
    measure     how fast models are on this machine    picture     that, as bars and as a PNG
    interrupt   Ctrl-C, in imports and between steps   report      what an export found, as a table
    folders     what lies in those of others           export      from torch or ONNX to a directory

and what stands on it:

    __main__    the command line's door                commands    what it does: one file a command
    serve       the HTTP service                       jobs        many rows: files, a cluster
    conversation  turns, answered and kept
"""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING, Any

# onnxruntime reports telemetry by default; its own switch works only before it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from fastgen.generator import CausalLM, generate, load, verify
    from fastgen.generator import CausalLM as CausalLMModelForOnnxGeneration
    from fastgen.model import ModelError
    from fastgen.output import GenerateOutput, Token
    from fastgen.params import Params
    from fastgen.prefix import PrefixCache
    from fastgen.tokenizer import Tokenizer

__version__ = "0.1.0"
__all__ = [
    "CausalLM",
    "CausalLMModelForOnnxGeneration",
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
    "CausalLM": "generator", "generate": "generator", "load": "generator", "ModelError": "model",
    "GenerateOutput": "output", "Token": "output", "Params": "params", "PrefixCache": "prefix",
    "Tokenizer": "tokenizer", "verify": "generator",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """What is offered, and the modules, imported when they are first used.

    So `python -m fastgen`, which imports this before anything of its own, can settle what Ctrl-C
    does before numpy and onnxruntime are imported.
    """
    if name == "CausalLMModelForOnnxGeneration":  # the name that fastgpt's users know
        found = __getattr__("CausalLM")
    elif name in _OFFERED:
        found = getattr(importlib.import_module(f"fastgen.{_OFFERED[name]}"), name)
    elif not name.startswith("_") and importlib.util.find_spec(f"fastgen.{name}"):
        found = importlib.import_module(f"fastgen.{name}")
    else:
        raise AttributeError(f"module 'fastgen' has no attribute {name!r}")
    globals()[name] = found
    return found
