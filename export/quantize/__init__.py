"""Weights, keys and values in fewer bits.

recipe     which kernel each matrix gets     kernels       weights to codes, and their nodes
codes      each matrix's, for a kernel       calibrate     what flows through the graph on text
gptq       codes of the least output error   follow        codes for what is quantised before them
passage    a graph a piece at a time     values_apart  a product of their own for values
rotate     outliers turned away, exactly     smooth        outliers moved into the weights
rotate_values  the same in attention         rotation      the matrices that turn
activations  nodes that quantise activations
kv_int8    keys and values in int8           prefill_int8  a second form for many tokens
experts    mixtures of experts           parts         large matrices, a part at a time
grid       numbers that lie on a grid    blas          numpy's products, on one thread
           already, as a GGUF file's     divergence    two sets of logits
triangle   triangular factors
"""
