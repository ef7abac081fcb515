"""From an ONNX folder of other tools to a model directory, without torch.

folder      what lies in a folder             signature  what a graph takes and gives
plain       a graph, run as others run it     prepare    one graph of single precision
attention   what attention becomes            shapes     what each value's shape is, by running
rewrite     their graph -> ours               rotary     rotations that are written out
origin      a folder as the source of an export
"""
