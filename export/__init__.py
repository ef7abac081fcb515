"""From a model of any kind to a model directory.

pipeline      the export                             options    its keywords, and their target
opening       a model -> what a graph is made of     stages     the steps, and what they hand on:
work          an export on its way                   progress   shows them, and what they take
source        what all sources have in common        torch_model  a transformers model as one
build         a checkpoint, without torch            onnx_folder  what others exported
trace         torch's code -> a graph                gguf       llama.cpp's files
rewrite       fewer nodes, less memory               prove      does it say what the original says
quantize      weights, keys and values in 8 or 4 bits
many_tokens   which form each matrix has for them
bundle        the model directory                    requirements  of memory and disk
demo          trains the embedded model              manual     Python's manual as text, for it
"""

from fastgen.errors import UnsupportedModel
from fastgen.export.pipeline import export
from fastgen.export.prove.check import Mismatch

__all__ = ["Mismatch", "UnsupportedModel", "export"]
