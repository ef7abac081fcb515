"""Folders by the real tools, each in an environment of its own, by the code of `bench/folders`.

    pytest -m slow tests/export/test_other_tools.py

The environments are gigabytes, and kept in FASTGEN_BENCH_HOME where that is set.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import onnx_ir
import pytest

from fastgen.export import export

BENCH = Path(__file__).parents[2] / "bench"
sys.path.append(str(BENCH))

from folders import compare, made  # noqa: E402
from peers.home import Home  # noqa: E402

pytestmark = pytest.mark.slow

TOOLS = {tool.does: tool for tool in made.TOOLS}
# What must come of folders, by tool and type; the types are those with a mechanism of their own.
EXPECTED: dict[tuple[str, str], dict[str, str]] = {
    ("builder", made.DEMO): {"fp32": compare.EXACT, "int4": compare.EQUAL},
    ("builder", "llama"): {
        "fp32": compare.EXACT, "int8": compare.EQUAL, "int4": compare.EQUAL,
        "fp32-pruned": compare.EXACT, "fp16-cpu": compare.REFUSED, "fp16-cuda": compare.EQUAL,
        "fp16-dml": compare.EQUAL, "int4-cuda": compare.EQUAL, "int4-webgpu": compare.EQUAL,
    },
    ("optimum", made.DEMO): {"fp32": compare.EXACT, "q4": compare.EQUAL},
    ("optimum", "gpt2"): {
        "fp32": compare.EXACT, **dict.fromkeys(made.SUFFIXES, compare.EQUAL),
    },
    ("optimum", "gemma3_text"): {"fp32": compare.EXACT},
    ("optimum", "bloom"): {"fp32": compare.REFUSED},
    ("merged", made.DEMO): {"merged": compare.EXACT},
    ("merged", "gpt2"): dict.fromkeys(("merged", "two", "one"), compare.EXACT),
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    kept = os.environ.get("FASTGEN_BENCH_HOME")
    place = Path(kept) if kept else tmp_path_factory.mktemp("folders")
    with contextlib.closing(Home(place)) as home:
        yield home


@pytest.mark.parametrize(("does", "kind"), EXPECTED, ids=["-".join(one) for one in EXPECTED])
def test_folders_of_real_tools_say_what_they_said(home: Home, does: str, kind: str) -> None:
    with made.Maker(home, TOOLS[does]) as maker:
        found = [compare.examine(folder) for folder in maker.folders(kind)]
    said = {one.what: (one.outcome, one.reason) for one in found}
    assert {what: outcome for what, (outcome, _) in said.items()} == EXPECTED[does, kind], said


def test_no_cast_is_left_between_a_cache_of_half_precision_and_attention(
    home: Home, tmp_path: Path
) -> None:
    with made.Maker(home, TOOLS["optimum"]) as maker:
        folder = next(one for one in maker.folders("llama") if one.what == "q4f16")
    assert folder.path is not None
    export(folder.path, tmp_path / "out", precision="q4f16", progress=None)
    graph = onnx_ir.load(tmp_path / "out" / "model.onnx").graph
    theirs = onnx_ir.load(folder.path / "onnx" / "model_q4f16.onnx").graph
    beside = [
        {
            near.op_type
            for value in (*node.inputs, *node.outputs)
            if value is not None
            for near in (value.producer(), *(use.node for use in value.uses()))
            if near is not None
        }
        for node in graph
        if node.op_type == "GroupQueryAttention"
    ]
    assert sum(node.op_type == "Cast" for node in theirs) > 2
    assert len(beside) == 2 and not any("Cast" in near for near in beside)
