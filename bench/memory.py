"""Measure the memory and the first answer of a fresh process for each model directory.

    python bench/memory.py DIRECTORY...

Resident memory after loading, after generating 64 tokens and after a prompt of 512, its peak, and
the seconds to load and to the first token. `files` is what the directory holds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import json, re, resource, sys, time
start = time.perf_counter()
import fastgen
imported = time.perf_counter()
model = fastgen.load(sys.argv[1], threads=2)
loaded = time.perf_counter()

def resident():
    text = open("/proc/self/smaps_rollup").read()
    return int(re.search(r"Rss:\\s+(\\d+)", text).group(1)) / 1e3

out = {"rss loaded": resident()}
first = list(range(5, 21))
model.generate(first, max_new_tokens=1)
out["s import"] = imported - start
out["s load"] = loaded - imported
out["s first token"] = time.perf_counter() - start
model.generate(first, max_new_tokens=64, eos_token_id=None)
out["rss 64 tokens"] = resident()
model.generate(list(range(5, 517)), max_new_tokens=2)
out["rss prompt of 512"] = resident()
out["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
print(json.dumps(out))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directories", nargs="+", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    rows = []
    for directory in args.directories:
        runs = [run(directory) for _ in range(args.rounds)]
        size = sum(p.stat().st_size for p in directory.iterdir()) / 1e6
        found = {name: statistics.median(r[name] for r in runs) for name in runs[0]}
        rows.append({"MB files": size, **found})
    names = list(rows[0])
    print("| model | " + " | ".join(names) + " | rss / files |")
    print("|---" * (len(names) + 2) + "|")
    for directory, row in zip(args.directories, rows, strict=True):
        cells = [f"{row[n]:.3f}" if n.startswith("s ") else f"{row[n]:.0f}" for n in names]
        share = row["rss 64 tokens"] / row["MB files"]
        print(f"| {directory.name} | {' | '.join(cells)} | {share:.2f} |")


def run(directory: Path) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(directory)], capture_output=True, text=True, check=True
    )
    return dict(json.loads(done.stdout))


if __name__ == "__main__":
    main()
