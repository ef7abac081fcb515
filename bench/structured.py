"""Measure the cost of a JSON schema a token, and its gain: certain tokens take no step.

    python bench/structured.py
    python bench/structured.py --shapes distilgpt2 smollm-135m --precision int8 --keep DIRECTORY

For the demo model, and for shapes with random weights and a made-up byte-level vocabulary of their
size, in interleaved rounds over the same prompt:

- plain: greedy text of as many tokens as the JSON has, without a schema;
- stepped: the JSON, a step for each token, so that what is more than plain is the processor;
- forced: the JSON as it comes, where what is certain is taken without a step.

And the processor alone, without a model: microseconds a token, of which a token that follows for
the first time costs more than one that many texts have in common.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import shapes

import fastgen
from fastgen.engine import prepare
from fastgen.sampling import constraint
from fastgen.sampling.processors import Context
from fastgen.timing.rounds import in_rounds

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 20, "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "address": {
            "type": "object",
            "properties": {
                "street": {"type": "string", "minLength": 20, "maxLength": 40},
                "postal_code": {"type": "string", "pattern": "^[0-9]{5}$"},
                "country": {"enum": ["Denmark", "Germany", "Poland"]},
            },
            "required": ["street", "postal_code", "country"],
            "additionalProperties": False,
        },
        "tags": {
            "type": "array",
            "items": {"type": "string", "minLength": 3, "maxLength": 12},
            "minItems": 3,
            "maxItems": 3,
        },
    },
    "required": ["name", "age", "address", "tags"],
    "additionalProperties": False,
}
PROMPT = "The customer as JSON: "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="*", choices=shapes.SHAPES, default=[])
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds; medians count")
    parser.add_argument("--keep", type=Path, help="keep exported models here, and use those there")
    args = parser.parse_args()

    print(f"{shapes.machine(args.threads)}\n")
    print(
        "| | tokens | certain | plain, ms a token | stepped | forced | of a step | "
        "processor, us a token | mask known |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name, model, tokenizer in models(args):
        print(row(name, model, tokenizer, args.rounds), flush=True)


def models(args: argparse.Namespace) -> Iterator[tuple[str, fastgen.CausalLM, Any]]:
    """Each model with its name, and with a tokenizer."""
    demo = fastgen.load(threads=args.threads)
    yield f"demo ({demo.model.info.vocab_size:,} tokens)", demo, demo.tokenizer
    for shape in args.shapes:
        with shapes.exported(shape, [args.precision], args.keep) as paths:
            model = fastgen.load(next(iter(paths.values())), threads=args.threads)
            vocab = model.model.info.vocab_size
            yield f"{shape} {args.precision} ({vocab:,} tokens)", model, made_up(vocab)


def made_up(vocab_size: int) -> Any:
    """A byte-level tokenizer with so many tokens: all bytes, and words of random letters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    random = np.random.default_rng(0)
    letters = list("etaoinshrdlucmfwygpbvkxqjz")
    vocabulary = {
        token: i
        for i, token in enumerate(
            ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
        )
    }
    before, after = ["", "Ġ", 'Ġ"', '"'], ["", "", "", '":', '",', "."]
    while len(vocabulary) < vocab_size:
        word = "".join(random.choice(letters, random.integers(2, 9)))
        vocabulary.setdefault(random.choice(before) + word + random.choice(after), len(vocabulary))
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<pad>", "<s>", "</s>"])
    return fastgen.Tokenizer.of(made)


def row(name: str, model: fastgen.CausalLM, tokenizer: Any, rounds: int) -> str:
    """The line of the table for a model."""
    ids = tokenizer.encode(PROMPT)
    ends = tokenizer.index("</s>")  # of a tokenizer that was made up
    eos = model.generation_config.eos_token_id if ends is None else ends
    common: dict[str, Any] = {"tokenizer": tokenizer, "eos_token_id": eos}
    forms: dict[str, Any] = {"json_schema": SCHEMA, "max_new_tokens": 450, **common}
    text = model.generate(ids, **forms)[0][len(ids) :]
    json.loads(tokenizer.decode(text))
    plain = {"max_new_tokens": len(text), "eos_token_id": None}

    def timed(side: str, knobs: dict[str, Any]) -> float:
        with stepping() if side == "stepped" else contextlib.nullcontext():
            start = time.perf_counter()
            new = model.generate(ids, **knobs)[0][len(ids) :]
            took = time.perf_counter() - start
        if side != "plain":  # int8 rounds a step of several tokens otherwise: another text
            json.loads(tokenizer.decode(new))
        return took / len(new)

    sides = {"plain": plain, "stepped": forms, "forced": forms}
    seconds = in_rounds(
        {side: lambda _, side=side: timed(side, sides[side]) for side in sides}, rounds
    )
    each = {side: 1e3 * statistics.median(all_) for side, all_ in seconds.items()}
    extra = statistics.median(
        (b - a) / a for a, b in zip(seconds["plain"], seconds["stepped"], strict=True)
    )
    certain, first, again = processor(model, tokenizer, common["eos_token_id"], text)
    return (
        f"| {name} | {len(text)} | {certain} | {each['plain']:.3f} | {each['stepped']:.3f} | "
        f"{each['forced']:.3f} | {100 * extra:+.1f}% | {first:.0f} | {again:.0f} |"
    )


@contextlib.contextmanager
def stepping() -> Iterator[None]:
    """Every token takes a step, certain or not."""
    plain = prepare._may_force
    prepare._may_force = lambda request: False
    try:
        yield
    finally:
        prepare._may_force = plain


def processor(
    model: fastgen.CausalLM, tokenizer: Any, eos: Any, text: list[int]
) -> tuple[int, float, float]:
    """Count certain tokens of a text, and time the processor: us a token, first and again."""
    vocab = model.model.info.vocab_size
    params = fastgen.Params(json_schema=SCHEMA, eos_token_id=eos)
    form = constraint.build(params, tokenizer, vocab, 1)
    assert form is not None
    scores = np.random.default_rng(0).standard_normal((1, vocab)).astype(np.float32)
    certain, first, again = 0, [], []
    for length in range(len(text)):
        ids = np.array([0, *text[:length]])
        context = Context([ids], np.ones(1, int), np.array([10**6]), np.zeros(1, int), np.zeros(1))
        for seconds in (first, again):
            mine = scores.copy()
            start = time.perf_counter()
            form(context, mine)
            seconds.append(time.perf_counter() - start)
        certain += int(np.isfinite(mine).sum() == 1)
    return certain, 1e6 * statistics.mean(first), 1e6 * statistics.mean(again)


if __name__ == "__main__":
    main()
