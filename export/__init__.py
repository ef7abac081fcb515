"""From a transformers model, or a folder that others exported, to a model directory.

pipeline    the export, step by step          origin     what it is made of, whatever it is
original    a transformers model as that      foreign    an ONNX folder as that, without torch
                                              build      a checkpoint as that, without torch
                                              source     hub, directory or object -> model
                                              text       the text part of a model of pictures
                                              adapter    PEFT's, merged
                                              checkpoint whether its files are whole
                                              vocabulary a tokenizer's files, without transformers
refuse      what no graph can express         unsupported  how that is said
graph       model -> graph                    attention  what attention becomes
                                              node       its node: inputs and attributes
                                              repeat     layers that are alike, traced once
                                              hooks      models with code of their own
                                              states     recurrences and convolutions
                                              experts    mixtures of them
                                              rope       rotations that change with the length
                                              sparse     attention by an index while it is plain
trim        rewriting rules                   check      whether both say the same
window      layers are shown what they see
bundle      the model directory               demo       trains the embedded demo model
rotate      outliers turned away, exactly
recipe      weights in int8 and int4          cache      keys and values in int8
calibrate   what flows through the graph      smooth     outliers moved into the weights
quantize    weights to codes                  gptq       codes for the least error of the output
quality     what a precision costs on text    profile    where its time goes
prompts     a second graph that reads them    manual     Python's, as plain text for the demo
corpus      the text that both are made for   texts/     what of it comes with fastgen
parts       large matrices, by parts          stored     weights in their own type until used
room        what it needs of the machine      progress   what it shows, and what it took
"""

from fastgen.export.check import Mismatch
from fastgen.export.pipeline import export
from fastgen.export.unsupported import UnsupportedModel

__all__ = ["Mismatch", "UnsupportedModel", "export"]
