"""The speed of models on this machine.

measure  reading, one row, many rows, beams, threads   plot    that, as bars and as a PNG
tune     the fastest kernels and threads               rounds  calls in turn, and their medians
"""
