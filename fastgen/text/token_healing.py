"""Token healing: the prompt's last token is chosen again, together with what may continue it.

A prompt that stops inside a word ("http:", "def gen") is cut into tokens that the model has seldom
seen before what should follow. So its last token is taken back, and the model chooses among all
tokens that begin with it (github.com/guidance-ai/guidance, "token healing").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fastgen.text.tokenizer import Tokenizer

# transformers' biases, of what begins with the last token and of that token itself.
EXTENSION, ORIGINAL = 10.0, 11.0


@dataclass(frozen=True)
class Reopened:
    """A prompt whose last token is to be chosen again.

    Attributes:
        ids: what stays.
        biases: what may follow it, {token: bias}; empty where nothing is to be chosen.
    """

    ids: list[int]
    biases: dict[int, float] = field(default_factory=dict)


def reopen(ids: Sequence[int], tokenizer: Tokenizer) -> Reopened:
    """`ids`, a prompt without padding, without its last token if a longer one may fit better.

    As transformers' `heal_tokens`: the text is stripped and cut into tokens anew, and the likeliest
    token by these biases takes the last one's place. It differs in that a bos token stays (there it
    becomes padding, which the model then reads), that rows are healed without each other's padding,
    that the choice is never sampled, and that nothing but what begins with the last token is chosen
    (there another token that is likelier by more than the bias is, and the prompt loses its end).
    """
    cut = tokenizer.encode(tokenizer.decode(ids).strip())
    if len(cut) < 2:
        return Reopened(cut or list(ids))
    *before, last = cut
    biases = {token: EXTENSION for token in tokenizer.extensions(last)}
    if len(biases) < 2:
        return Reopened(cut)
    return Reopened(before, biases | {last: ORIGINAL})
