"""transformers' `generate`, without torch: numpy, onnxruntime and tokenizers.

How a prompt becomes text, file by file:

    params      every knob: its name, default and check
    prompt      ids, masks, tensors -> rows            tokenizer   text <-> ids
    tensors     torch's, without torch                 chat        messages -> text
    healing     the prompt's last token, again
    request     the rows of one call and what they share
    model       new ids and a cache -> logits          cache       keys and values, in place
    prefix      prompts' keys and values, for later
    cpu         cores, and what they can                   memory      pages given back
    extras      what else can be installed
    processors  logits -> logits, one function a knob  watermark   two of them
    pick        logits -> token, torch's random draws      softmax     and its logarithm
    stop        when a row ends                        output      what comes out
    batch       THE LOOP: rows join, step, leave       beam        beams over the same stages
    guidance    what it would say without the prompt   lookup      several tokens a step
    call        one call, checked and ready to run     score       how likely given tokens are
    generator   what people hold: CausalLM, load, generate
    hub         a name -> a model directory            demo        the embedded one
    tune        what is fastest on this machine        tuning      kept beside the model
    __main__    the command line                       report      what an export found, as a table
    export      from torch to a directory
"""

from __future__ import annotations

import os

# onnxruntime reports telemetry by default; its own switch works only before it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

from fastgen.generator import CausalLM, generate, load
from fastgen.model import ModelError
from fastgen.output import GenerateOutput, Token
from fastgen.params import Params
from fastgen.prefix import PrefixCache
from fastgen.tokenizer import Tokenizer

CausalLMModelForOnnxGeneration = CausalLM  # the name that fastgpt's users know

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
]
