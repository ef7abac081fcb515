"""Logits to tokens, and when a row ends.

processors  logits -> logits, one function a knob  watermark  two of them
sampler     logits -> token, torch's random draws  softmax    and its logarithm
constraint  which tokens JSON, a grammar allow     schema     JSON schemas, made exact
trial       where grammars of strangers are tried  trial_process  the process that may die of them
stop        when a row ends
"""
