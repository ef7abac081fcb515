"""Measure how well models predict documentation that the demo was not trained on.

    python bench/held_out.py fastgen/demo other-int8 --write

Each document of `export/held_out.txt` is followed by the end of text, which is predicted as well.
Tokens are read in windows of 512 without a past before them, as when the demo is trained; each is
predicted once. Bits a byte and perplexity a word compare models of different vocabularies;
perplexity a token does not.
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np

TEXT = Path(__file__).resolve().parents[1] / "export" / "held_out.txt"
END = "<|endoftext|>"
PROMPTS = ("The os module", "class ", "The json module", "class urllib.request.Request")
WINDOW = 512  # tokens, the first of which is only read


def main(text: Path = TEXT) -> None:
    """Measure with the documents of a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path, help="fastgen's directories")
    parser.add_argument("--write", action="store_true", help="show what they write, too")
    args = parser.parse_args()

    import fastgen

    documents = [one for one in text.read_text(encoding="utf-8").split(END) if one]
    size = sum(len(one.encode()) for one in documents)
    words = sum(len(one.split()) for one in documents)
    print(f"{len(documents)} documents, {size:,} bytes, {words:,} words\n")
    print("| model | weights | MB | tokens | bits a byte | perplexity a word | a token |")
    print("|---|---|---|---|---|---|---|")
    models = [(place.name, fastgen.load(place)) for place in args.models]
    for name, model in models:
        nats, tokens = predicted(model, documents)
        info = model.model.info
        stored = sum(file.stat().st_size for file in model.directory.iterdir()) / 1e6
        print(
            f"| {name}, {info.precision} | {info.parameters:,} | {stored:.1f} | {tokens:,} "
            f"| {nats / math.log(2) / size:.4f} | {math.exp(nats / words):,.1f} "
            f"| {math.exp(nats / tokens):.2f} |",
            flush=True,
        )
    if args.write:
        for name, model in models:
            for prompt in PROMPTS:
                said = model.complete(prompt, max_new_tokens=64)
                print(f"\n--- {name}: {prompt!r}\n{prompt}{said}")


def predicted(model: Any, documents: list[str]) -> tuple[float, int]:
    """The nats that all documents take, and the number of tokens."""
    end = model.tokenizer.index(END)
    ids = [end]
    for document in documents:
        ids += [*model.tokenizer.encode(document), end]
    starts = range(0, len(ids) - 1, WINDOW - 1)
    rows = [ids[start : start + WINDOW] for start in starts]
    told = [model.score([row])[0] for row in rows]
    assert sum(len(one) - 1 for one in told) == len(ids) - 1
    return -float(np.sum([one[1:].sum() for one in told])), len(ids) - 1


if __name__ == "__main__":
    main()
