"""Folders that the real tools make, opened: a table of what becomes of each, and how fast it is.

    python bench/folders --home DIR --markdown bench/folders.md
    python bench/folders --home DIR --only optimum-onnx/llama 'onnxruntime-genai/*'
    python bench/folders --home DIR --speed --rounds 5

Run it with the Python that has fastgen's `export` extra. Each tool gets an environment of its own,
makes tiny random models and folders of them, and the embedded demo model's; `--home` keeps all
that for the next run. A folder is opened as anybody would open it, then asked what it is asked by
plain `session.run`, and transformers' own model where it is in single precision.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import multiprocessing
import os
import platform
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
sys.path[0] = str(Path(__file__).resolve().parents[1])

from peers.cases import CASES  # noqa: E402
from peers.home import Home  # noqa: E402
from shapes import SHAPES  # noqa: E402

from folders import compare, made, speed  # noqa: E402
from folders.compare import Found  # noqa: E402
from folders.made import DEMO  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python bench/folders",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--home",
        type=Path,
        default=os.environ.get("FASTGEN_BENCH_HOME"),
        help="keeps environments and folders; else temporary",
    )
    parser.add_argument("--only", nargs="+", default=["*"], metavar="TOOL/TYPE", help="a pattern")
    parser.add_argument("--json", type=Path, help="what was found; what is in it is not done again")
    parser.add_argument("--markdown", type=Path, help="write the table")
    parser.add_argument("--speed", action="store_true", help="time folders instead")
    parser.add_argument(
        "--shapes",
        nargs="+",
        choices=[DEMO, *SHAPES],
        default=["smollm-135m", "distilgpt2"],
        help="of --speed",
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=speed.WANTED, metavar="CASE")
    parser.add_argument("--rounds", type=int, default=5, help="of --speed, after one that warms up")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        place = args.home or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        home = stack.enter_context(contextlib.closing(Home(place)))
        if args.speed:
            pairs = []
            for pair in speed.measure(home, args.shapes, args.cases, args.rounds, args.threads):
                pairs.append(pair)
                print(speed.table([pair], args.cases).splitlines()[-1], flush=True)
            print(speed.table(pairs, args.cases))
            return
        done = []
        if args.json and args.json.exists():
            done = [Found(**one) for one in json.loads(args.json.read_text())]
        for found in run(home, args.only, {(one.tool, one.kind) for one in done}):
            done.append(found)
            print(line(found), flush=True)
            if args.json:
                args.json.write_text(json.dumps([asdict(one) for one in done], indent=1))
    names = [(tool.name, kind) for tool in made.TOOLS for kind in tool.kinds]
    done.sort(key=lambda one: names.index((one.tool, one.kind)))
    print(dict(Counter(one.outcome for one in done)))
    if args.markdown:
        args.markdown.write_text(table(done))


def run(home: Home, patterns: Sequence[str], done: set[tuple[str, str]]) -> Iterator[Found]:
    """Make and examine the folders that match, in a process that may end."""
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(1, spawn, compare.quiet)
    for tool in made.TOOLS:
        with made.Maker(home, tool) as maker:
            for kind in tool.kinds:
                name = f"{tool.name}/{kind}"
                if (tool.name, kind) in done or not any(fnmatch.fnmatch(name, p) for p in patterns):
                    continue
                for folder in maker.folders(kind):
                    try:
                        yield pool.submit(compare.examine, folder).result()
                    except BrokenProcessPool:
                        pool = ProcessPoolExecutor(1, spawn, compare.quiet)
                        yield Found(
                            tool.name,
                            tool.version,
                            kind,
                            folder.what,
                            compare.FAILED,
                            reason="its process ended",
                        )
    pool.shutdown()


def line(found: Found) -> str:
    shown = [found.tool, found.kind, found.what, found.outcome, number(found.difference),
             number(found.theirs), found.reason[:300]]  # fmt: skip
    return " | ".join(shown)


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.0e}"


def table(all_found: Sequence[Found]) -> str:
    """The results as Markdown."""
    counts = Counter(one.outcome for one in all_found)
    order = [
        one
        for one in (
            compare.EXACT,
            compare.EQUAL,
            compare.REFUSED,
            compare.UNMADE,
            compare.WRONG,
            compare.FAILED,
        )
        if one in counts
    ]
    from onnxruntime import __version__ as runtime
    from transformers import __version__ as transformers

    lines = [
        "# Folders that other tools export", "",
        "    python bench/folders --home DIR --markdown bench/folders.md", "",
        f"Python {platform.python_version()}, onnxruntime {runtime}, transformers {transformers}. "
        f"{len(all_found)} folders: {', '.join(f'{counts[one]} {one}' for one in order)}.", "",
        "Each tool makes folders of tiny random models, and of the embedded demo model, in an "
        "environment of its own; `fastgen export` opens them. *From the folder* is the largest "
        "difference of a logit between the rewritten graph and the folder's own, in single "
        "precision and by plain `session.run`, as a share of the largest logit: rows of several "
        "lengths, beyond windows, their last tokens one by one. *From transformers* is that of "
        "transformers' own model, for ragged rows. Exact means that it is at most "
        f"{compare.CLOSE:.0e}, and that greedy tokens, 3 beams and seeded draws are "
        "transformers', token for token (of the demo model, on rows padded on the left, also 4 "
        "beams that say no pair of tokens twice). A folder equals itself, not transformers', "
        "where it is quantised, or computes something else than its config.json says.", "",
        "| tool | model | folder | attention | | from the folder | from transformers | |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for one in all_found:
        cells = [f"{one.tool} {one.version}", one.kind, one.what, one.attention, one.outcome,
                 number(one.difference), number(one.theirs), one.reason]  # fmt: skip
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
