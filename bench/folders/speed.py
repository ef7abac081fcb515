"""A folder as others run it, and as fastgen does: interleaved, in processes of their own.

optimum's `generate` on the folder that optimum made, onnxruntime-genai's loop on its own, each in
its environment; fastgen on the same folder, opened.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir
from peers.cases import CASES, Case, prompts
from peers.home import STAMP, Home, Unavailable
from peers.workers import Failed, Worker
from shapes import SHAPES

from fastgen.export import export
from fastgen.timing.rounds import in_rounds
from folders import demo
from folders.made import DEMO, TOOLS, Maker, Tool

ENGINES = {"builder": "ort_genai", "optimum": "optimum_onnx"}
WHATS = {"builder": ("fp32", "int8", "int4"), "optimum": ("fp32", "fp16", "q4", "q4f16",
                                                          "quantized")}  # fmt: skip
WANTED = ("greedy-16", "greedy-256", "beams-4-new-64", "rows-8")


@dataclass
class Pair:
    """A folder as its tool runs it, and as we do.

    Attributes:
        seconds: of the rounds of each case: theirs, ours.
        casts: in the graph that we made of it.
    """

    shape: str
    tool: Tool
    what: str
    theirs: Worker
    ours: Worker
    casts: int
    seconds: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def measure(
    home: Home, shapes: Sequence[str], cases: Sequence[str], rounds: int, threads: int
) -> Iterator[Pair]:
    """Time all folders of some shapes; each is given when it is through."""
    for shape in shapes:
        source = _source(home, shape)
        for tool in TOOLS:
            with Maker(home, tool) as maker:
                for what in WHATS.get(tool.does, ()):
                    try:
                        pair = _pair(maker, shape, source, what, threads)
                    except Unavailable as error:
                        print(f"{shape} {tool.name} {what}: {error}", file=sys.stderr)
                        continue
                    try:
                        for name in cases:
                            _time(pair, CASES[name], _vocabulary(shape), rounds)
                    finally:
                        pair.theirs.stop()
                        pair.ours.stop()
                    yield pair


def _source(home: Home, shape: str) -> Path:
    if shape == DEMO:
        return home.kept(home.path / "models" / DEMO, Path(demo.__file__).read_text(), demo.write)
    return home.source(shape)


def _vocabulary(shape: str) -> int:
    return 2048 if shape == DEMO else SHAPES[shape][1].get("vocab_size", 50257)


def _pair(maker: Maker, shape: str, source: Path, what: str, threads: int) -> Pair:
    """A folder of one graph, its own engine and ours."""
    home, tool = maker.home, maker.tool
    made_from = maker.stamp + (source / STAMP).read_text()
    name = f"{shape}-{tool.does}"

    def make(path: Path) -> None:
        maker.make(source, path, ["js" if tool.does == "optimum" else what])
        if said := next(path.glob("*.json"), None):
            raise Unavailable(json.loads(said.read_text())["error"])

    def alone(path: Path) -> None:
        """One graph and its weights, with what is said of it, as an engine loads it."""
        folder = home.kept(home.path / "speed" / f"{name}-made", made_from, make) / "js"
        path.mkdir()
        for file in folder.glob("*.json"):
            shutil.copy(file, path)
        if what == "fp32":
            for file in (folder / "onnx").glob("model.onnx*"):
                shutil.copy(file, path)
            return
        maker.quantise(folder / "onnx" / "model.onnx", path, [what])
        if (said := path / f"model_{what}.onnx.json").exists():
            raise Unavailable(json.loads(said.read_text())["error"])

    place = home.path / "speed" / f"{name}-{what}"
    if tool.does == "optimum":
        folder = home.kept(place, made_from, alone)
    else:
        folder = home.kept(place, made_from, make) / what

    def rewrite(path: Path) -> None:
        # Random weights may part from themselves where half precision becomes single.
        export(folder, path, progress=None, allow_mismatch=True)

    ours = home.kept(place.with_name(f"{place.name}-ours"), made_from + home.package, rewrite)
    graph = onnx_ir.load(ours / "model.onnx").graph
    casts = sum(node.op_type == "Cast" for node in graph)
    engine = ENGINES[tool.does]
    runs = maker.python if engine == tool.environment else home.python(engine)
    log = home.log(f"speed-run-{name}-{what}")
    return Pair(
        shape,
        tool,
        what,
        Worker(engine, what, folder, runs, threads, log),
        Worker("ours", what, ours, home.python("ours"), threads, log.with_suffix(".ours.log")),
        casts,
    )


def _time(pair: Pair, case: Case, vocabulary: int, rounds: int) -> None:
    """Both in turn, with the same new prompts; the first round warms up."""

    def timed(worker: Worker) -> Callable[[int], float]:
        return lambda turn: worker.generate(case, prompts(case, vocabulary, turn))["seconds"]

    try:
        found = in_rounds({"theirs": timed(pair.theirs), "ours": timed(pair.ours)}, rounds)
    except Failed as error:
        pair.failed[case.name] = str(error)
        return
    pair.seconds[case.name] = list(zip(found["theirs"], found["ours"], strict=True))


def table(pairs: Sequence[Pair], cases: Sequence[str]) -> str:
    """Milliseconds a token of theirs and ours, and how many times faster ours is."""
    titles = [CASES[name].title for name in cases]
    lines = [f"| model | folder | {' | '.join(titles)} | Casts |"]
    lines.append("|---|---|" + "---|" * (len(cases) + 1))
    for pair in pairs:
        cells = [pair.shape, f"{pair.tool.name} {pair.what}"]
        for name in cases:
            if name in pair.failed:
                cells.append(f"theirs fails: {pair.failed[name][:80]}".replace("|", "\\|"))
                continue
            times = pair.seconds[name]
            one, other = (
                1e3 * statistics.median(both) / CASES[name].new for both in zip(*times, strict=True)
            )
            faster = statistics.median(a / b for a, b in times)
            cells.append(f"{one:.1f} -> {other:.1f} ({faster:.2f})")
        lines.append(f"| {' | '.join([*cells, str(pair.casts)])} |")
    return "\n".join(lines)
