"""Beam search: the likeliest sequences of each prompt, searched side by side.

run         a search from its prompts to its tokens   search      the loop that all searches share
plain       beam search and beam sampling             diverse     groups that avoid each other
hypotheses  beams, and sequences that have ended

Rows are compared with each other and change places, which is why this is no part of `batch`. Work
that is not done: a prompt is prefilled once, not once for each beam. A beam whose parent lives on
in another slot of the cache is not moved at all: beams are dealt out to the slots so that every
parent keeps its own, and only the further children of a parent are copied, from the token on at
which they differ from what the slot held. Prompts whose search is over leave the batch; in
transformers they run on until the last is done, which changes nothing of theirs.
"""
