"""A model directory: its files, where they come from, and what is measured and kept beside them.

model_info    what `fastgen.json` says          graph_io  what a graph takes and gives
hub           a name -> a model directory       onnx_folders  what lies in those of others
jsonfile      what strangers wrote, checked     tuning    how it runs best on this machine
report        what an export found, as a table  files     that appear whole or not at all
swap          one directory for another
"""
