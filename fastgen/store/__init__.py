"""A model directory: its files, where they come from, and what is measured and kept beside them.

model_info    names of its files, `fastgen.json`  graph_io  inputs and outputs of a graph
hub           a name -> a model directory         onnx_folders  what lies in those of others
jsonfile      what strangers wrote, checked       tuning    how it runs best on this machine
report        what an export found, as a table    files     that appear whole or not at all
"""
