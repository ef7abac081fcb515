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
from contextlib import ExitStack, closing, contextmanager
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
        with closing(lab), lab.plan(lab.turned()) as plan:
            for line in lab.lines(plan, args.each):
                print(line, flush=True)


class Lab:
    """A model in float32, with the rows that an export has of it.

    Args:
        tokens: of calibration; None for the recipe's own.
    """

    def __init__(
        self, source: Path, precision: str, texts: list[Path], home: Path, tokens: int | None = None
    ) -> None:
        import fastgen
        from fastgen.export import export, stages
        from fastgen.export.prove import corpus, quality
        from fastgen.export.quantize import calibrate, recipe
        from fastgen.store.model_info import ModelInfo

        self.precision, self.home = precision, home
        self.floats = export(source, home / "fp32", precision="fp32", progress=None)
        self.info = replace(ModelInfo.parse(self.floats), precision=precision)
        model = fastgen.load(self.floats)
        self.corpus = corpus.of(origin_of(source), self.info, texts, model)
        self.tokens = tokens or recipe.RECIPES[precision].tokens
        self.corpus.write(self.tokens + stages.TUNED, quality.TOKENS)
        rows = self.corpus.calibration(self.tokens + stages.TUNED)
        tuned, self.used = stages.apart(rows, stages.TUNED)
        self.rows = [tuned, self.corpus.evaluation(quality.TOKENS)]
        self.open = ExitStack()
        self.said = quality.Exact.of(
            lambda: model.model,
            self.info.vocab_size,
            self.open.enter_context(calibrate.shelf(home)).room,
        )

    def close(self) -> None:
        """Let go of the file that logits are in."""
        self.open.close()

    def turned(self, rotated: str = "all") -> Any:
        """The graph, turned: "all" that can be, its "values" alone, or "nothing"."""
        import onnx_ir

        from fastgen.export.quantize import rotate, rotate_values
        from fastgen.export.rewrite import onnx_file

        graph = onnx_ir.load(self.floats / "model.onnx")
        if rotated == "all":
            rotate.rotate(graph)
        elif rotated == "values":
            for node in rotate_values.attention_nodes(graph.graph):
                rotate_values.turn_values(graph.graph, node)
        place = self.home / rotated
        place.mkdir(exist_ok=True)
        onnx_file.save(graph, place / "model.onnx")
        return onnx_ir.load(place / "model.onnx")

    @contextmanager
    def plan(self, graph: Any, used: Any = None) -> Iterator[Any]:
        from fastgen.export.quantize import recipe

        used = self.used if used is None else used
        with recipe.planned(graph, self.precision, used, lambda *_: None) as plan:
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
        for matrix in plan._matrices.values():
            goes_up = matrix.may_climb and goes(matrix.product.name)
            matrix.rung = rung if goes_up else 0
        *cells, size = self.measured(plan)
        told = " | ".join(f"{one.kl:.4f} | {one.more_perplexity:+.1%}" for one in cells)
        return f"| {kind} | {name} | {told} | {size / 1e6:.0f} |"

    def measured(self, plan: Any) -> list[Any]:
        """The loss of a plan's model on the two sets of rows, and its bytes."""
        import fastgen
        from fastgen.export import bundle
        from fastgen.export.prove import quality
        from fastgen.export.rewrite import onnx_file

        graph = plan.make(lambda *_: None)
        out = self.home / "made"
        out.mkdir()
        onnx_file.save(graph, out / "model.onnx")
        bundle.seal(out, self.info)
        model = fastgen.load(out).model
        cells = [quality.measure(self.said, model, rows) for rows in self.rows]
        size = sum(path.stat().st_size for path in out.glob("model.onnx*"))
        del model
        shutil.rmtree(out)
        return [*cells, size]


def origin_of(source: Path) -> Any:
    """The origin of a model, for its tokenizer and its chat template: without torch, if it can."""
    from fastgen.errors import UnsupportedModel
    from fastgen.export.build import origin

    try:
        return origin.Built(origin.of_directory(source))
    except UnsupportedModel:
        from fastgen.export.torch_model.original import Original
        from fastgen.export.torch_model.source import load

        return Original(load(str(source)))


if __name__ == "__main__":
    np.set_printoptions(precision=4)
    main()
