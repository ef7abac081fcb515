"""Measure what model directories lose beside the first of them, on text that no export has seen.

    python bench/beside.py FP32 INT8 INT4 [...] --text export/held_out.txt docs/*.md

Rows of 256 tokens of each file, read from scratch: KL divergence from the first model's logits, in
nats, top-1 and perplexity, each with its standard error. Without --text, what comes with fastgen
and is not calibrated on: `export/held_out.txt` and the pages of `docs/`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

HOME = Path(__file__).resolve().parents[1]
TEXTS = [HOME / "export" / "held_out.txt", *sorted((HOME / "docs").glob("*.md"))]
ROW = 256  # tokens, the first of which is only read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIRECTORY")
    parser.add_argument("--text", nargs="+", type=Path, default=TEXTS, metavar="FILE")
    parser.add_argument("--tokens", type=int, default=16384, help="of all files, at most")
    args = parser.parse_args()

    import fastgen
    from fastgen.export.prove import quality

    exact, *others = (fastgen.load(directory).model for directory in args.directories)
    tokenizer = fastgen.load(args.directories[0]).tokenizer
    rows = rows_of(tokenizer, args.text, args.tokens)
    print(f"{sum(map(len, rows)):,} tokens in {len(rows)} rows\n")
    print("| model | KL | top-1 | perplexity | more |\n|---|---|---|---|---|")
    logits = partial(whole, exact)
    for directory, model in zip(args.directories[1:], others, strict=True):
        print(line(directory.name, quality.measure(logits, model, rows)), flush=True)


def rows_of(tokenizer: Any, files: Sequence[Path], most: int) -> list[Any]:
    """Rows of ids that lie evenly in what the files hold."""
    rows = [row for file in files for row in cut(tokenizer, file.read_text(encoding="utf-8"))]
    wanted = min(len(rows), most // ROW)
    return [rows[at] for at in np.linspace(0, len(rows) - 1, wanted).round().astype(int)]


def cut(tokenizer: Any, text: str) -> Iterator[Any]:
    """Rows of a text, each behind what the tokenizer puts before a text."""
    before = tokenizer.encode("")
    ids = tokenizer.encode(text)[len(before) :]
    step = ROW - len(before)
    for at in range(0, len(ids) - step + 1, step):
        yield np.array([*before, *ids[at : at + step]], np.int64)


def whole(model: Any, row: Any) -> Any:
    """float32 [length, vocab]: the logits of a row."""
    cache = model.new_cache(1, len(row))
    return model.forward([row], cache, logits_positions=np.arange(len(row))[None])[0]


def line(name: str, found: Any) -> str:
    return (
        f"| {name} | {found.kl:.4f} ± {found.kl_error:.4f} | {found.top1:.1%} "
        f"| {found.perplexity:.3f} against {found.reference_perplexity:.3f} "
        f"| {found.more_perplexity:+.2%} ± {found.perplexity_error:.2%} |"
    )


if __name__ == "__main__":
    main()
