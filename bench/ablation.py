"""Measure what each text, rotation and rung earns a quantised model, and what it takes.

    python bench/ablation.py smollm2 --precision int8 --tokens 1536
    python bench/ablation.py mgm --precision int4

A model of bench/real.py, or a transformers directory. Every line is a model as an export writes it,
with the kernels that run. All lines but those of rungs have all matrices at the rung that turns
what they read. KL divergence, in nats, and perplexity, on two sets of rows of all kinds that no
code is made of; seconds of processor for the codes, the text that the model writes left aside.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import real
from rungs import Lab

TURNED = 1  # the rung of a ladder that turns what a matrix reads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help=f"one of {', '.join(real.MODELS)}, or a directory")
    parser.add_argument("--precision", default="int8", choices=["int8", "int4"])
    parser.add_argument("--tokens", type=int, help="of calibration, instead of the recipe's own")
    parser.add_argument("--only", nargs="+", choices=["text", "rotation", "rung"])
    args = parser.parse_args()
    wanted = args.only or ["text", "rotation", "rung"]
    source = real.directory(args.model) if args.model in real.MODELS else Path(args.model)
    with tempfile.TemporaryDirectory() as temporary:
        lab = Lab(source, args.precision, [], Path(temporary), args.tokens)
        print("| | | KL | perplexity | KL, other rows | perplexity | MB | seconds |")
        print("|---|---|---|---|---|---|---|---|", flush=True)
        with closing(lab):
            for what in wanted:
                LINES[what](lab)


def texts(lab: Lab) -> None:
    """All kinds of text, each alone, and all but the model's own."""
    kinds = list(lab.corpus.kinds)
    choices = {"all": kinds, **{kind: [kind] for kind in kinds}, "all but own": kinds[:-1]}
    for name, some in choices.items():
        if not some or (len(kinds) == 1 and name != "all"):
            continue  # a model without a tokenizer has its own alone
        rows = lab.used if name == "all" else lab.corpus.only(some).calibration(lab.tokens)
        seen = {row.tobytes() for row in lab.rows[0]}
        if rows := [row for row in rows if row.tobytes() not in seen]:
            line(lab, "text", name, "all", rows)


def rotations(lab: Lab) -> None:
    for rotated in ("nothing", "values", "all"):
        for rung, mixed in ((0, ""), (TURNED, ", and what matrices read")):
            line(lab, "turned", rotated + mixed, rotated, lab.used, rung)


def rungs(lab: Lab) -> None:
    from fastgen.export.quantize import recipe

    for rung, step in enumerate(recipe.RECIPES[lab.precision].ladder):
        line(lab, "rung", str(step.kernel or "float32"), "all", lab.used, rung)


LINES = {"text": texts, "rotation": rotations, "rung": rungs}


def line(lab: Lab, what: str, name: str, rotated: str, rows: list[Any], rung: int = TURNED) -> None:
    """Print a line of the table."""
    start = time.process_time()
    with lab.plan(lab.turned(rotated), rows) as plan:
        for matrix in plan._matrices.values():
            matrix.rung = rung if matrix.may_climb else 0
        plan.make(lambda *_: None)
        seconds = time.process_time() - start
        *cells, size = lab.measured(plan)
    told = " | ".join(f"{one.kl:.4f} | {one.more_perplexity:+.2%}" for one in cells)
    print(f"| {what} | {name} | {told} | {size / 1e6:.1f} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
