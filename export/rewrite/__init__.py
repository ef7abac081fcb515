"""Rewriting rules on a graph: the same numbers from fewer nodes and less memory.

trim    the rules                       window  layers with a window are shown what they see
edit    reading and changing a graph    node    the attention node
mixture    mixtures of experts          onnx_file  a graph as a file, with its weights
contract   the graph's contract, for graphs that are being written
"""
