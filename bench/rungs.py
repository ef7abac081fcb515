"""Measure the loss of each kind of matrix at the output, at each rung of the ladder.

    python bench/rungs.py smollm2 --precision int4
    python bench/rungs.py DIRECTORY --precision int8 --each --text mine.jsonl

A model of bench/real.py, or a transformers directory. Every line is a model as an export writes it,
with the kernels that run: its matrices at the first rung of the precision's ladder, but for those
that the line names. KL divergence, in nats, and perplexity, on two sets of rows that no code is
made of. With --each, kinds of matrices also go up alone.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import real


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help=f"one of {', '.join(real.MODELS)}, or a directory")
    parser.add_argument("--precision", default="int4", choices=["int8", "int4"])
    parser.add_argument("--each", action="store_true", help="each kind alone, too")
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="instead of fastgen's own")
    args = parser.parse_args()
    source = real.directory(args.model) if args.model in real.MODELS else Path(args.model)
    with tempfile.TemporaryDirectory() as temporary:
        lab = Lab(source, args.precision, args.text, Path(temporary))
        print("| matrices that go up | to | KL | perplexity | KL, other rows | perplexity | MB |")
        print("|---|---|---|---|---|---|---|", flush=True)
        with lab.plan() as plan:
            for line in lab.lines(plan, args.each):
                print(line, flush=True)


class Lab:
    """A model in float32, turned, with the rows that an export has of it."""

    def __init__(self, source: Path, precision: str, texts: list[Path], home: Path) -> None:
        import onnx_ir

        import fastgen
        from fastgen.export import export, stages
        from fastgen.export.prove import corpus, quality
        from fastgen.export.quantize import recipe, rotate
        from fastgen.export.rewrite import onnx_file
        from fastgen.export.torch_model.original import Original
        from fastgen.export.torch_model.source import load
        from fastgen.store.model_info import ModelInfo

        self.precision, self.home = precision, home
        floats = export(source, home / "fp32", precision="fp32", progress=None)
        origin = Original(load(str(source)))
        self.info = replace(ModelInfo.parse(floats), precision=precision)
        found = corpus.of(origin, self.info, texts, lambda: fastgen.load(floats))
        more = recipe.RECIPES[precision].tokens + stages.TUNED
        tuned, self.used = stages.apart(found.calibration(more), stages.TUNED)
        self.rows = [tuned, found.evaluation(quality.TOKENS)]
        said = {row.tobytes(): origin.logits(row) for rows in self.rows for row in rows}
        self.said = lambda row: said[row.tobytes()]
        graph = onnx_ir.load(floats / "model.onnx")
        rotate.rotate(graph)
        (home / "turned").mkdir()
        onnx_file.save(graph, home / "turned" / "model.onnx")
        self.graph = onnx_ir.load(home / "turned" / "model.onnx")

    @contextmanager
    def plan(self) -> Iterator[Any]:
        from fastgen.export.quantize import recipe

        with recipe.planned(self.graph, self.precision, self.used, lambda *_: None) as plan:
            yield plan

    def lines(self, plan: Any, each: bool) -> Iterator[str]:
        """The table: all at the first rung, kind after kind at each other, all at each other."""
        kinds: dict[str, list[str]] = {}
        for kind, members in plan._kinds().items():
            kinds.setdefault(kind.partition(",")[0], []).extend(one.product.name for one in members)
        yield self.line("none", "", plan)
        for rung in range(1, len(plan._recipe.ladder)):
            name = str(plan._recipe.ladder[rung].kernel or "float32")
            for kind, members in kinds.items() if each else ():
                yield self.line(kind, name, plan, rung, lambda one, some=set(members): one in some)
            yield self.line("all", name, plan, rung, lambda _: True)

    def line(
        self,
        kind: str,
        name: str,
        plan: Any,
        rung: int = 0,
        goes: Callable[[str], bool] = lambda _: False,
    ) -> str:
        import fastgen
        from fastgen.export import bundle
        from fastgen.export.prove import quality
        from fastgen.export.rewrite import onnx_file

        for matrix in plan._matrices.values():
            goes_up = matrix.may_climb and goes(matrix.product.name)
            matrix.rung = rung if goes_up else 0
        graph = plan.make(lambda *_: None)
        out = self.home / "made"
        out.mkdir()
        onnx_file.save(graph, out / "model.onnx")
        bundle.seal(out, self.info)
        model = fastgen.load(out).model
        cells = [quality.measure(self.said, model, rows) for rows in self.rows]
        size = sum(path.stat().st_size for path in out.glob("model.onnx*")) / 1e6
        del model
        shutil.rmtree(out)
        told = " | ".join(f"{one.kl:.4f} | {one.more_perplexity:+.1%}" for one in cells)
        return f"| {kind} | {name} | {told} | {size:.0f} |"


if __name__ == "__main__":
    np.set_printoptions(precision=4)
    main()
