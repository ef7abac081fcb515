"""A model directory: its files, where they come from, and what is measured and kept beside them.

model_info    names of its files, `fastgen.json`  files     that appear whole or not at all
resolve       the model that a name stands for    hub       repositories and their files
onnx_folders  what lies in those of others        graph_io  inputs and outputs of a graph
jsonfile      what strangers wrote, checked       tuning    how it runs best on this machine
report        what an export found, as a table  packed    weights as kernels want them, kept
"""
