"""How fast models are on this machine.

measure  reading, one row, many rows, beams, threads   plot  that, as bars and as a PNG
tune     which kernels and threads are the fastest
"""
