"""Comparing an export with its origin, and the cost of a precision.

check    logits and continuations of both    corpus    the text for calibration and judging
quality  the cost of a precision on text     own_text  text that the model writes itself
profile  the time of each operator           reader    documents as rows of ids
"""
