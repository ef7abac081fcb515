"""The faithfulness of an engine: its logits beside those of transformers in float32."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peers import text
from peers.engines import BASE, adapter
from peers.home import HERE, STAMP, Home, digest
from peers.workers import Worker

ROWS, FOUND = "rows.json", "found.json"
CHUNK = 32  # positions at a time
WEIGHTS = {".onnx", ".data", ".bin", ".xml", ".gguf", ".safetensors"}  # endings of a model's files


def of(home: Home, shape: str, worker: Worker) -> dict[str, Any]:
    """The loss of an engine on a real model's text, kept from one run to the next.

    Returns:
        for each kind of text: `tokens` that were predicted, and sums over them: `kl` (of the
        engine from transformers, nats), `loss` and `reference_loss` (nats), `same` (the likeliest
        token is the same).

    Raises:
        Failed: the engine gave an error.
        Unavailable: there is no such text.
    """
    told = reference(home, shape, worker.threads)
    environment = adapter(worker.name).environment or worker.name
    made_from = "".join(
        [
            *((place / STAMP).read_text() for place in (told, worker.directory)),
            (home.environment(environment) / STAMP).read_text(),
            inspect.getsource(worker.engine),
            inspect.getsource(compared),
        ]
    )

    def make(path: Path) -> None:
        path.mkdir()
        try:
            found = measured(worker, told, path / "logits.npy")
        finally:
            worker.stop()
        (path / FOUND).write_text(json.dumps(found))

    place = home.path / "faith" / f"{shape}-{worker.name}-{worker.precision}"
    kept: dict[str, Any] = json.loads((home.kept(place, made_from, make) / FOUND).read_text())
    return kept


def reference(home: Home, shape: str, threads: int) -> Path:
    """A directory with the rows of a real model's text, and transformers' logits of each."""
    source = (home.source(shape) / STAMP).read_text()
    texts = HERE.parents[1] / "export"
    files = [*sorted((texts / "texts").glob("*.*")), texts / "held_out.txt"]
    made_from = source + inspect.getsource(text)
    made_from += "".join(digest(file.read_text(encoding="utf-8")) for file in files)

    def write(path: Path) -> None:
        path.mkdir()
        command = [sys.executable, str(HERE / "text.py"), shape, str(path / ROWS)]
        home.run(command, f"text-{shape}", {"PYTHONPATH": str(HERE.parent)})

    rows = (home.kept(home.path / "text" / shape, made_from, write) / ROWS).read_text()

    def make(path: Path) -> None:
        path.mkdir()
        (path / ROWS).write_text(rows)
        worker = Worker.of(home, shape, BASE, "fp32", threads)
        try:
            for number, row in enumerate(json.loads(rows)):
                worker.ask(do="logits", ids=row["ids"], file=str(path / f"{number}.npy"))
        finally:
            worker.stop()

    return home.kept(home.path / "reference" / shape, source + rows, make)


def measured(worker: Worker, told: Path, file: Path) -> dict[str, Any]:
    """Ask an engine for the logits of every row, and compare; `file` holds those of one row."""
    found: dict[str, Any] = {}
    for number, row in enumerate(json.loads((told / ROWS).read_text())):
        expected = np.load(told / f"{number}.npy", mmap_mode="r")
        logits = expected  # transformers' own
        if worker.name != BASE:
            worker.ask(do="logits", ids=row["ids"], file=str(file))
            logits = np.load(file, mmap_mode="r")
        sums = found.setdefault(row["kind"], {})
        for name, value in compared(row["ids"], expected, logits).items():
            sums[name] = sums.get(name, 0) + value
    file.unlink(missing_ok=True)
    return found


def compared(
    ids: list[int], expected: NDArray[np.float32], logits: NDArray[np.float32]
) -> dict[str, float]:
    """The sums of a row, over all ids but the first.

    Args:
        ids: the row's.
        expected: transformers' logits, [len(ids), vocab].
        logits: the engine's; its vocabulary may have padding at the end.

    Raises:
        ValueError: logits of another shape.
    """
    tokens, vocab = expected.shape
    if logits.ndim != 2 or len(logits) != tokens or logits.shape[1] < vocab:
        raise ValueError(f"logits must be [{tokens}, {vocab}], an engine gave {logits.shape}")
    sums = {"tokens": tokens - 1, "kl": 0.0, "loss": 0.0, "reference_loss": 0.0, "same": 0}
    for start, stop in _chunks(tokens - 1):
        p, q = (_log_softmax(one[start:stop, :vocab]) for one in (expected, logits))
        at = np.arange(stop - start), np.array(ids[start + 1 : stop + 1])
        sums["kl"] += float((np.exp(p) * (p - q)).sum())
        sums["loss"] -= float(q[at].sum())
        sums["reference_loss"] -= float(p[at].sum())
        sums["same"] += int((p.argmax(1) == q.argmax(1)).sum())
    return sums


def megabytes(directory: Path) -> float:
    """The size of a model's graph and weights, without a tokenizer's and what folders have."""
    files = (path for path in directory.iterdir() if path.suffix in WEIGHTS)
    return sum(path.stat().st_size for path in files if "tokenizer" not in path.name) / 1e6


def _chunks(count: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + CHUNK, count)) for start in range(0, count, CHUNK))


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """In float64: what float32 loses is as much as float32 engines differ by."""
    exact = logits.astype(np.float64)
    exact -= exact.max(axis=1, keepdims=True)
    exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
    return exact
