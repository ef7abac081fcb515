"""What every source of an export has in common.

origin      what an export is made of, whatever it is
checkpoint  whether its files are whole
vocabulary  its tokenizer's files, without transformers
"""
