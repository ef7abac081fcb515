"""Inputs of a caller, checked: knobs, ids, masks and tensors.

params      every knob, and how they are merged   validators  a check for each kind of value
knob        a knob's kind and rule                tensors     torch's, without torch
keywords    transformers' others: inert, unsupported, objects
prompt      ids, masks, tensors -> rows            lengths     of a text, where nobody sets one
"""
