"""From a transformers model, a checkpoint or an ONNX folder to a model directory.

pipeline      the export, step by step
source        what all sources have in common        torch_model  a transformers model as one
build         a checkpoint, without torch            onnx_folder  what others exported
trace         torch's code -> a graph
rewrite       fewer nodes, less memory               prove      does it say what the original says
quantize      weights, keys and values in 8 or 4 bits
bundle        the model directory                    requirements  of memory and disk
progress      what an export shows, and what it took
demo          trains the embedded model              manual     Python's manual as text, for it
"""

from fastgen.errors import UnsupportedModel
from fastgen.export.pipeline import export
from fastgen.export.prove.check import Mismatch

__all__ = ["Mismatch", "UnsupportedModel", "export"]
