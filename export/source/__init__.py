"""The part that all sources of an export have in common.

origin      what an export is made of, whatever it is
checkpoint  whether its files are whole
quantised   the methods of quantised weights that can be read
vocabulary  its tokenizer's files, without transformers
"""
