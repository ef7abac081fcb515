"""Watch resident memory over many calls of mixed lengths, rows and beams: it must stay flat.

    python bench/flat.py DIRECTORY --calls 1000

Every call has other knobs, drawn at random; the memory is read after every twentieth. The exit
code is 1 if it grows: if the last quarter of the calls has a median above that of the second one
by more than `--allowed` MB.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import shapes

EVERY = 20  # calls between two looks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", nargs="?", type=Path, help="default: the demo model")
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--longest", type=int, default=300, help="tokens of a prompt, at most")
    parser.add_argument("--allowed", type=float, default=8.0, help="MB of growth")
    args = parser.parse_args()

    import fastgen

    model = fastgen.load(args.directory)
    random = np.random.default_rng(0)
    seen: list[float] = []
    for call in range(args.calls):
        model.generate(**knobs(random, model.model.info.vocab_size, args.longest))
        if call % EVERY == EVERY - 1:
            seen.append(shapes.resident())
    quarter = len(seen) // 4
    early = statistics.median(seen[quarter : 2 * quarter])
    late = statistics.median(seen[3 * quarter :])
    shown = ", ".join(f"{value:.0f}" for value in seen[:: max(1, len(seen) // 10)])
    print(f"MB resident after calls, a tenth apart: {shown}")
    print(f"median of the second quarter {early:.1f} MB, of the last {late:.1f} MB")
    sys.exit(late > early + args.allowed)


def knobs(random: np.random.Generator, vocab: int, longest: int) -> dict[str, Any]:
    """A call: one to eight ragged rows; greedy, sampled, or one to four beams."""
    rows = [
        random.integers(3, vocab, int(random.integers(1, longest))).tolist()
        for _ in range(int(random.choice([1, 1, 2, 4, 8])))
    ]
    more: dict[str, Any] = [
        {},
        {"do_sample": True, "seed": int(random.integers(1000))},
        {"num_beams": int(random.integers(2, 5))},
        {"prompt_lookup_num_tokens": 4},
    ][int(random.integers(4))]
    return {"input_ids": rows, "max_new_tokens": int(random.integers(1, 24)), **more}


if __name__ == "__main__":
    main()
