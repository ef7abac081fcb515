"""What is made once and kept: each tool's environment, its models, the folders it makes of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from peers.home import OFFLINE, STAMP, Home, Unavailable, python_in

from folders import demo, kinds

HERE = Path(__file__).resolve().parent
MAKE = HERE / "make.py"
DEMO = "demo"
# transformers.js's precisions, besides the graph itself.
SUFFIXES = ("fp16", "q4", "q4f16", "bnb4", "uint8", "quantized")


@dataclass(frozen=True)
class Tool:
    """A tool, and what is made with it.

    Attributes:
        environment: its requirements file, and where that lies.
        does: what `make.py` calls it.
        kinds: types of models, each with what is made of them.
    """

    name: str
    version: str
    environment: str
    requirements: Path
    does: str
    kinds: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Folder:
    """A folder that a tool should have made.

    Attributes:
        what: as `make.py` calls it, and a precision of it where there are several.
        path: None where the tool failed, as `error` says.
        source: the transformers model it was made of.
    """

    tool: Tool
    kind: str
    what: str
    precision: str | None
    path: Path | None
    source: Path | None
    error: str = ""


_PEERS = HERE.parent / "peers" / "requirements"
_BUILT = ("fp32", "int4")
TOOLS = (
    Tool(
        "onnxruntime-genai", "0.18.0", "ort_genai-convert", _PEERS, "builder",
        {
            DEMO: ("fp32", "int4"),
            "llama": ("fp32", "int8", "int4", "fp32-pruned", "fp16-cpu", "fp16-cuda", "fp16-dml",
                      "int4-cuda", "int4-webgpu"),
            **dict.fromkeys(
                ("mistral", "qwen2", "qwen3", "phi", "phi3", "gemma", "gemma2", "gemma3_text",
                 "olmo", "granite", "smollm3", "nemotron", "gpt2"), _BUILT),
        },
    ),
    Tool(
        "optimum-onnx", "0.1.0", "optimum_onnx", _PEERS, "optimum",
        {
            DEMO: ("fp32", "q4"),
            **dict.fromkeys(("llama", "gpt2", "qwen3"), ("fp32", *SUFFIXES)),
            **dict.fromkeys(
                [kind for kind in kinds.KINDS if kind not in ("llama", "gpt2", "qwen3")],
                ("fp32",)),
        },
    ),
    Tool(
        "optimum", "1.17.1", "optimum_merged", HERE / "requirements", "merged",
        {
            DEMO: ("merged",),
            **dict.fromkeys(("gpt2", "llama"), ("merged", "two", "one")),
            **dict.fromkeys(
                ("mistral", "phi", "opt", "gpt_neox", "gpt_neo", "gptj", "codegen", "gpt_bigcode",
                 "falcon", "bloom"), ("merged",)),
        },
    ),
)  # fmt: skip


def folders(home: Home, tool: Tool, kind: str) -> Iterator[Folder]:
    """The folders of a type by a tool; makes what is missing."""
    wanted = tool.kinds[kind]
    try:
        place = _kept(home, tool, kind)
    except Unavailable as error:
        yield from (Folder(tool, kind, what, None, None, None, str(error)) for what in wanted)
        return
    for what in wanted:
        several = tool.does == "optimum"
        path = place / ("js" if several else what)
        said = path.with_name(f"{path.name}.json")
        if several and path.is_dir() and what != "fp32":
            said = path / "onnx" / f"model_{what}.onnx.json"
        error = json.loads(said.read_text())["error"] if said.exists() else ""
        if not path.is_dir() or error:
            yield Folder(tool, kind, what, None, None, place / "source", error)
            continue
        precision = what if several else None
        yield Folder(tool, kind, what, precision, path, place / "source")


def _kept(home: Home, tool: Tool, kind: str) -> Path:
    python = str(python_in(home.environment(tool.environment, tool.requirements)))
    stamp = (home.path / "environments" / tool.environment / STAMP).read_text()
    settings = "" if kind == DEMO else repr(kinds.settings(kind))

    def make(path: Path) -> None:
        name = f"folders-{tool.does}-{kind}"
        source = path / "source"
        if kind == DEMO:
            demo.write(source)
        else:
            home.run([python, str(MAKE), "source", kind, str(source)], f"{name}-source", OFFLINE)
        one = [tool.does, str(source), str(path)]
        several = tool.does == "optimum"
        whats = ["js"] if several else list(tool.kinds[kind])
        home.run([python, str(MAKE), *one, *whats], name, OFFLINE)
        graph = path / "js" / "onnx" / "model.onnx"
        more = [f"model_{what}.onnx" for what in tool.kinds[kind] if what != "fp32"]
        if several and more and graph.exists():
            place = str(graph.parent)
            command = [sys.executable, str(MAKE), "quantised", str(graph), place, *more]
            home.run(command, f"{name}-quantised", OFFLINE)

    made_from = MAKE.read_text() + stamp + settings + repr(tool.kinds[kind])
    return home.kept(home.path / "folders" / f"{tool.does}-{kind}", made_from, make)
