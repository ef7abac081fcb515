"""From a checkpoint to a graph without torch: config.json and safetensors, by a description.

decoder   what a model is, as data       families  configurations that are known, as that
weights   tensors, read in parts         rotary    frequencies of rotary embeddings
graph     a description and weights -> the graph that a trace gives
origin    such a checkpoint as the origin of an export
proved    the same, beside the original in torch
"""
