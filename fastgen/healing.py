"""Token healing: the prompt's last token is chosen again, together with what may continue it.

A prompt that stops inside a word ("http:", "def gen") is cut into tokens that the model has seldom
seen before what should follow. So its last token is taken back, and the model chooses among all
tokens that begin with it (github.com/guidance-ai/guidance, "token healing").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from fastgen.tokenizer import Tokenizer

# transformers' biases: only what begins with the last token has a chance, itself a little more.
EXTENSION, ORIGINAL = 10.0, 11.0

# ids, {token: bias} -> the likeliest next token
Likeliest = Callable[[Sequence[int], Mapping[int, float]], int]


def heal(ids: Sequence[int], tokenizer: Tokenizer, likeliest: Likeliest) -> list[int]:
    """`ids` with its last token replaced, if a longer one fits better.

    As transformers' `heal_tokens`: the text is stripped and cut into tokens anew. It differs in
    that a bos token stays (there it becomes padding, which the model then reads), that rows
    are healed without each other's padding, and that the choice is never sampled.

    Args:
        ids: a prompt without padding.
        likeliest: picks the token that takes the last one's place.
    """
    cut = tokenizer.encode(tokenizer.decode(ids).strip())
    if len(cut) < 2:
        return cut or list(ids)
    *before, last = cut
    biases = {token: EXTENSION for token in tokenizer.extensions(last)}
    if len(biases) < 2:
        return cut
    return [*before, likeliest(before, biases | {last: ORIGINAL})]
