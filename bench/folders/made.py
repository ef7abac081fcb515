"""Make once and keep each tool's environment, its models, and the folders it makes of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
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


class Maker:
    """A tool in a process of its own, which makes what is not there yet."""

    def __init__(self, home: Home, tool: Tool) -> None:
        self.home, self.tool = home, tool
        self.processes: dict[str, subprocess.Popen[str]] = {}

    def __enter__(self) -> Maker:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            with process:
                assert process.stdin
                process.stdin.close()

    @property
    def python(self) -> Path:
        """Of the tool's environment."""
        return python_in(self.home.environment(self.tool.environment, self.tool.requirements))

    @property
    def stamp(self) -> str:
        """Everything that making a folder depends on besides its model."""
        environment = self.python.parents[1]
        return MAKE.read_text() + (environment / STAMP).read_text()

    def make(self, source: Path, target: Path, whats: Sequence[str], kind: str = "") -> None:
        """Folders of a model.

        Raises:
            Unavailable: there is no such model.
        """
        self._ask(self.tool.does, self.python, source, target, whats, kind)

    def quantise(self, graph: Path, target: Path, whats: Sequence[str]) -> None:
        """transformers.js's precisions of a graph, by the driver's own onnxruntime."""
        names = [f"{graph.stem}_{what}.onnx" for what in whats]
        self._ask("quantised", Path(sys.executable), graph, target, names, "")

    def _ask(
        self, does: str, python: Path, source: Path, target: Path, whats: Sequence[str], kind: str
    ) -> None:
        if does not in self.processes:
            with self.home.log(f"make-{does}").open("a") as log:
                self.processes[does] = subprocess.Popen(
                    [str(python), str(MAKE), does],
                    env=os.environ | OFFLINE,
                    text=True,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                )
        process = self.processes[does]
        assert process.stdin and process.stdout
        request = {"kind": kind, "source": str(source), "target": str(target), "whats": [*whats]}
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            del self.processes[does]
            raise Unavailable(f"{does} ended with code {process.wait()}")
        if error := json.loads(line).get("error"):
            raise Unavailable(error)

    def folders(self, kind: str) -> Iterator[Folder]:
        """The folders of a type."""
        tool, several = self.tool, self.tool.does == "optimum"
        try:
            place = self._kept(kind)
        except Unavailable as error:
            for what in tool.kinds[kind]:
                yield Folder(tool, kind, what, None, None, None, str(error))
            return
        for what in tool.kinds[kind]:
            path = place / ("js" if several else what)
            failed = [path.with_name(f"{path.name}.json")]
            if several:
                failed.append(path / "onnx" / f"model_{what}.onnx.json")
            error = "".join(
                json.loads(said.read_text())["error"] for said in failed if said.exists()
            )
            made = None if error else path
            yield Folder(tool, kind, what, what if several else None, made, place / "source", error)

    def _kept(self, kind: str) -> Path:
        whats = self.tool.kinds[kind]
        settings = "" if kind == DEMO else repr(kinds.settings(kind))

        def make(path: Path) -> None:
            if kind == DEMO:
                demo.write(path / "source")
            several = self.tool.does == "optimum"
            self.make(path / "source", path, ["js"] if several else whats, kind)
            graph = path / "js" / "onnx" / "model.onnx"
            more = [what for what in whats if what != "fp32"]
            if several and more and graph.exists():
                self.quantise(graph, graph.parent, more)

        place = self.home.path / "folders" / f"{self.tool.does}-{kind}"
        return self.home.kept(place, self.stamp + settings + repr(whats), make)
