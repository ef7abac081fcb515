"""A job on two Ray actors, one of which is killed on the way, beside the same job in one process.

    python bench/cluster.py

Rows of the demo model (or `--model`), prompts of different lengths, half of them drawn. All three
jobs must give the same lines in the same order: no row lost, none twice. What was begun more often
than once is what the kill cost.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import ray
import shapes

from fastgen.jobs.ray.cluster import Generate
from fastgen.jobs.ray.spread import Spread, run

WORDS = [
    "The os module",
    "class ",
    "The json module reads",
    "import sys\n",
    "A dictionary maps keys",
]


class Noted(Generate):
    """An engine that notes who begins with how many rows, and who ends with them."""

    def __init__(self, notes: str, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.notes = notes

    def done(self, rows: Any) -> Any:
        found = list(rows)
        self.note("begun", len(found))
        done = super().done(found)
        self.note("ended", len(found))
        return done

    def note(self, what: str, rows: int) -> None:
        with open(self.notes, "a") as file:
            file.write(f"{what} {os.getpid()} {rows}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a model directory [default: the embedded demo model]")
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--new", type=int, default=8, help="new tokens of a row, at most")
    parser.add_argument("--at-once", type=int, default=256, help="rows that an actor takes")
    args = parser.parse_args()
    print(f"{args.rows:,} rows of 2 to {args.new} tokens; {shapes.machine(None)}\n")
    print("|  | s | rows a second | rows begun again |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        source = home / "in.jsonl"
        with source.open("w") as file:
            for n in range(args.rows):
                prompt = WORDS[n % len(WORDS)] * (1 + n % 3)
                new = 2 + n * 5 % (args.new - 1)
                row = {"prompt": prompt, "max_new_tokens": new, "do_sample": n % 2 == 0, "id": n}
                file.write(json.dumps(row) + "\n")
        seconds, expected = in_one_process(args, source, home / "one.jsonl")
        tell("one process, 2 threads", seconds, args.rows, 0)
        # A CPU more than there are, on paper, for those who read and write the files.
        ray.init(
            "local",
            num_cpus=3,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=200 << 20,
            logging_level="ERROR",
        )
        try:
            for name, kill in (("two actors of 1 thread", False), ("one of them killed", True)):
                seconds, again, lines = on_ray(args, source, home / f"ray{kill:d}.jsonl", kill)
                assert lines == expected, "rows are lost, twice, in another order or different"
                tell(name, seconds, args.rows, again)
        finally:
            ray.shutdown()
    print("\nAll three gave the same lines in the same order: no row lost, none twice.")


def tell(name: str, seconds: float, rows: int, again: int) -> None:
    print(f"| {name} | {seconds:.1f} | {rows / seconds:,.0f} | {again:,} |", flush=True)


def in_one_process(args: argparse.Namespace, source: Path, out: Path) -> tuple[float, list[bytes]]:
    """Seconds of `fastgen batch`, its start included, and what it wrote."""
    command = [sys.executable, "-m", "fastgen", "batch", source, out, "--seed", "0", "--quiet"]
    start = time.perf_counter()
    subprocess.run([*command, *(["-m", args.model] if args.model else [])], check=True)
    return time.perf_counter() - start, out.read_bytes().splitlines()


def on_ray(
    args: argparse.Namespace, source: Path, out: Path, kill: bool
) -> tuple[float, int, list[bytes]]:
    """Seconds, actors' start included; rows that were begun again; and what was written."""
    notes = out.with_suffix(".notes")
    notes.touch()
    arguments = {"notes": str(notes), "model": args.model, "seed": 0}
    over = threading.Event()
    killer = threading.Thread(target=kill_one, args=(notes, args.rows // 3, over))
    if kill:
        killer.start()
    start = time.perf_counter()
    try:
        spread = Spread("auto", actors=2, cpus=1, rows=args.at_once, ordered=True)
        rows, bad = run(spread, Noted, arguments, str(source), str(out), quiet=True)
    finally:
        over.set()
    seconds = time.perf_counter() - start
    assert (rows, bad) == (args.rows, 0), f"{rows} rows, {bad} bad"
    begun = [(pid, count) for what, pid, count in read(notes) if what == "begun"]
    assert len({pid for pid, _ in begun}) == 2 + kill, "nobody was killed"
    lines = [one for file in sorted(out.iterdir()) for one in file.read_bytes().splitlines()]
    return seconds, sum(count for _, count in begun) - args.rows, lines


def kill_one(notes: Path, rows: int, over: threading.Event) -> None:
    """Once so many rows are done, kill an actor that is in the midst of others."""
    while not over.wait(0.01):
        found = read(notes)
        ended = [pid for what, pid, _ in found if what == "ended"]
        busy = [pid for what, pid, _ in found if what == "begun"]
        if sum(count for what, _, count in found if what == "ended") < rows:
            continue
        for pid in set(busy):
            if busy.count(pid) > ended.count(pid):
                over.wait(0.2)  # into its work
                os.kill(pid, signal.SIGKILL)
                return


def read(notes: Path) -> list[tuple[str, int, int]]:
    lines = [line.split() for line in notes.read_text().splitlines()]
    return [(line[0], int(line[1]), int(line[2])) for line in lines if len(line) == 3]


if __name__ == "__main__":
    main()
