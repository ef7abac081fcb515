"""From a checkpoint to a graph without torch: config.json and safetensors, by a description.

decoder   a model's layers, as data      families  config.json -> decoder, by its type
configuration  config.json, field by field, none overlooked
families_*     the families, by their norms; pieces  the parts that they share
weights   tensors, read in parts         rotary    frequencies of rotary embeddings
graph     a description and weights -> the graph that a trace gives
origin    such a checkpoint as the origin of an export
proved    the same, beside the original in torch
"""
