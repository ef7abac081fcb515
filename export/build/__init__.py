"""From a checkpoint to a graph without torch: config.json and safetensors, by a description.

decoder   a model's layers, as data     weights   tensors, read in parts
unpacked  tensors of a quantised checkpoint
families  config.json -> decoder, by its type, in families_llama, families_gemma,
          families_layer_norm, families_post_norm and families_mixture
configuration  config.json, field by field, none overlooked
pieces    parts that families share     rotary    frequencies of rotary embeddings
graph     a description and weights -> the graph that a trace gives
mixture   experts in it             writer    a graph as it grows
origin    such a checkpoint as the origin of an export
proved    the same, beside the original in torch
"""
