"""Open a folder as a user would, and compare it with transformers and with the folder itself."""

from __future__ import annotations

import json
import logging
import statistics
import tempfile
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path

import architectures
import numpy as np
import onnx_ir
import torch
import transformers
from transformers import AutoModelForCausalLM

from fastgen.engine.model import Model
from fastgen.errors import ModelError
from fastgen.export import Mismatch, UnsupportedModel, export
from fastgen.export.onnx_folder import folder as folders_of
from fastgen.export.onnx_folder.origin import Folder as Origin
from fastgen.export.onnx_folder.plain import Plain
from fastgen.export.onnx_folder.prepare import prepare
from fastgen.export.prove import check
from folders import demo
from folders.made import DEMO, Folder

# The best first. "Equal" is: exact, and not transformers' model; or not in single precision.
EXACT, EQUAL, REFUSED, UNMADE, WRONG, FAILED = (
    "exact",
    "equals the folder",
    "refused",
    "not made",
    "WRONG",
    "crash",
)
CLOSE = 1e-5  # of the largest logit
# Where activations are quantised by their largest one, its last bit decides which codes all others
# have: then most rows must be close, and none farther than this.
ROUNDED = 5e-2


@dataclass
class Found:
    """The result of a folder.

    Attributes:
        difference: the largest of a logit from the folder's, as a share of the largest logit: the
            folder's graph in single precision, by plain `session.run`.
        theirs: likewise from transformers' model, in ragged rows.
    """

    tool: str
    version: str
    kind: str
    what: str
    outcome: str
    attention: str = ""
    difference: float | None = None
    theirs: float | None = None
    reason: str = ""


def quiet() -> None:
    """For a process that does nothing else."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)


def examine(folder: Folder) -> Found:
    """Open and compare a folder; whatever goes wrong is what is found."""
    tool = folder.tool
    found = Found(tool.name, tool.version, folder.kind, folder.what, UNMADE, reason=folder.error)
    if folder.path is None or folder.source is None:
        return found
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers, about its own models
        out = Path(place) / "out"
        try:
            export(folder.path, out, precision=folder.precision, progress=None)
            _compare(found, folder, folder.path, folder.source, out)
        except (UnsupportedModel, ModelError) as error:
            found.outcome, found.reason = REFUSED, _without_name(str(error))
        except Mismatch as error:
            found.outcome, found.reason = WRONG, _without_name(str(error))
        except Exception as error:
            traceback.print_exc()
            line = " ".join(str(error).split())[:200]
            found.outcome, found.reason = FAILED, f"{type(error).__name__}: {line}"
    return found


def _compare(found: Found, folder: Folder, path: Path, source: Path, out: Path) -> None:
    said = json.loads((out / "report.json").read_text())["folder"]
    found.attention = " and ".join(said["attention"])
    origin = Origin(folders_of.choose(path, folder.precision))
    rows = from_folder(origin, out)
    found.difference = max(rows)
    rounds = any(kind.startswith("DynamicQuantize") for kind in origin.operators)
    equal = found.difference <= CLOSE
    if rounds:
        equal = statistics.median(rows) <= CLOSE and found.difference <= ROUNDED
    found.outcome = EQUAL if equal else WRONG
    notes = list(said["notes"])
    if said["half_precision_became_single"]:
        notes.append("half precision became single")
    if origin.first == "fp32" and not said["half_precision_became_single"]:
        theirs = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager").eval()
        found.theirs, wrong = architectures.compare(theirs, out)
        if folder.kind == DEMO:
            wrong += demo.compare(source, out)
        if not wrong and found.theirs <= CLOSE and found.outcome == EQUAL:
            found.outcome = EXACT
        else:
            notes.append(f"transformers has other {'tokens' if wrong else 'logits'}")
    found.reason = "; ".join(notes)


def from_folder(origin: Origin, out: Path) -> list[float]:
    """The largest difference of a logit from the folder's, of rows alone, as others run them."""
    rows = origin.probes()
    with tempfile.TemporaryDirectory() as place:
        graph = Path(place) / "single.onnx"
        single, _ = prepare(onnx_ir.load(origin.choice.graph))
        onnx_ir.save(single, graph, external_data="single.data")
        signature = origin.signature.single()
        plain = Plain(graph, [graph.with_name("single.data")], signature)
        cut = -check.DECODED
        theirs = [plain.logits(row[:cut], row[cut:]) for row in rows]
    model = Model(out)
    ours = [check.exported_logits(model, [row])[0] for row in rows]
    scale = max(float(np.abs(logits).max()) for logits in theirs)
    return [float(np.abs(a - b).max()) / scale for a, b in zip(theirs, ours, strict=True)]


def _without_name(text: str) -> str:
    for words in (" cannot be exported: ", " cannot be opened: ", "with the original: "):
        text = text.partition(words)[2] or text
    return text
