"""What a caller passes, checked: knobs, ids, masks and tensors.

params      every knob: its name, default and rule   validators  a check for each kind of value
prompt      ids, masks, tensors -> rows              tensors     torch's, without torch
lengths     of a text, where nobody sets one
"""
