"""Every type of transformers' causal language models: exported, and beside the original.

    python bench/architectures.py [TYPE ...] [--quantised] [--json OUT] [--markdown OUT]

A type's tiny random model (`shrink`) is exported as it would be by anybody, then asked what
transformers' own model is asked: logits of ragged rows at prefill and decode, greedy tokens far
beyond its windows, three beams, seeded draws. transformers runs each row alone, without padding,
which some of its own models do not take well. Each type has a process of its own and a time limit.
"""

from __future__ import annotations

import argparse
import inspect
import json
import logging
import multiprocessing
import os
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import onnxruntime
import shrink
import torch
import transformers
from transformers import DynamicCache, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fastgen import CausalLM
from fastgen.export import Mismatch, UnsupportedModel, export
from fastgen.export.prove import check
from fastgen.export.source.origin import Tolerance
from fastgen.export.trace import graph
from fastgen.export.trace.attention import CACHES

LENGTHS, LONG, NEW = (1, 9, 30), 120, 16
CLOSE = Tolerance().max_difference  # of the largest logit: what an exact one may differ by
BEAMS = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
DRAWS = {"do_sample": True, "top_k": 0, "temperature": 1.5}
# What a row's logits may differ by from those that it has alone, of the largest: what lies between
# two codes may go to the one or the other.
ALONE = {"int8": 0.01, "int4": 0.05}
SECONDS = 240  # that one type may take

# What can become of a type, the best first.
EXACT, CAUGHT, REFUSED, WRONG, FAILED, LATE, UNBUILT = (
    "exact",
    "caught by the check",
    "refused",
    "WRONG",
    "crash",
    "too slow",
    "not run: no tiny model of it that takes text",
)


@dataclass
class Found:
    """The result of a type.

    Attributes:
        difference: the largest of a logit, as a share of the largest logit.
        quantised: whether it loads and runs in int8 and int4, too.
        notes: what was not the same there.
    """

    kind: str
    outcome: str = EXACT
    reason: str = ""
    difference: float | None = None
    seconds: float = 0.0
    quantised: bool = False
    notes: list[str] = field(default_factory=list)


def types() -> list[str]:
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def rows_of(model: PreTrainedModel, lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Ragged rows of ids that mean nothing special to the model."""
    random = np.random.default_rng(seed)
    vocab = model.get_output_embeddings().weight.shape[0]
    return [random.integers(shrink.FIRST, vocab, length).tolist() for length in lengths]


def _remembering(model: PreTrainedModel) -> list[Any]:
    """The modules that keep a state in themselves, which a row of one token would begin with."""
    return [module for module in model.modules() if hasattr(module, "conv1d_state")]


def original(
    model: PreTrainedModel, row: list[int], seed: int | None = None, **settings: Any
) -> Any:
    """transformers' `generate` of one row alone."""
    if seed is not None:
        torch.manual_seed(seed)
    ids = torch.tensor([row])
    for module in _remembering(model):
        module.conv1d_state = None
    settings = {"max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0, "do_sample": False,
                "return_dict_in_generate": True, "output_logits": True} | settings  # fmt: skip
    return model.generate(ids, attention_mask=torch.ones_like(ids), **settings)


def compare(model: PreTrainedModel, directory: Path) -> tuple[float, list[str]]:
    """The largest difference of a logit, as a share, and what else was not the same."""
    ours, wrong, largest = CausalLM(directory), [], 0.0
    limit = ours.model.info.max_length or 1 << 20
    rows = rows_of(model, (*LENGTHS, min(LONG, limit - NEW)))
    settings = {"max_new_tokens": NEW, "eos_token_id": None}
    arrays = [np.array(row) for row in rows]
    agreement = check.compare(
        check.reference_logits(model, arrays), check.exported_logits(ours.model, arrays)
    )
    largest = agreement.max_difference
    found = ours.generate(rows, **settings, output_logits=True, return_dict_in_generate=True)
    for number, row in enumerate(rows):
        expected = original(model, row)
        same = found.sequences[number][-NEW:] == expected.sequences[0, -NEW:].tolist()
        ours_said = np.stack([step[number] for step in found.logits])
        theirs_said = torch.cat(expected.logits).float().numpy()
        if same:
            scale = float(np.abs(theirs_said).max())
            largest = max(largest, float(np.abs(ours_said - theirs_said).max()) / scale)
        else:
            wrong.append(f"greedy tokens after {len(row)} tokens")
    # transformers cannot reorder a state that is not in its Cache: then its beams read all anew.
    caches = {*CACHES} & {*inspect.signature(model.forward).parameters}
    own_state = _remembering(model) or any(
        isinstance(one, type) and issubclass(one, DynamicCache) and one is not DynamicCache
        for one in vars(sys.modules[type(model).__module__]).values()
    )
    for row in rows[:3]:
        theirs = original(model, row, **BEAMS, use_cache=bool(caches) and not own_state)
        mine = ours.generate([row], **settings, **BEAMS, return_dict_in_generate=True)
        tied = np.allclose(mine.sequences_scores, theirs.sequences_scores, rtol=1e-5)
        if mine.sequences != theirs.sequences.tolist() and not tied:
            wrong.append(f"3 beams after {len(row)} tokens")
        theirs = original(model, row, len(row), **DRAWS)
        if ours.generate([row], **settings, **DRAWS, seed=len(row)) != theirs.sequences.tolist():
            wrong.append(f"draws after {len(row)} tokens")
    return largest, wrong


def independent(directory: Path, rows: list[list[int]], share: float) -> bool:
    """Compare rows in one batch with each alone: their logits may differ by a share of them."""
    ours = CausalLM(directory)
    settings = {"max_new_tokens": NEW, "eos_token_id": None, "output_logits": True,
                "return_dict_in_generate": True}  # fmt: skip
    together = ours.generate(rows, **settings)
    for number, row in enumerate(rows):
        alone = ours.generate([row], **settings)
        for step, (one, other) in enumerate(zip(together.logits, alone.logits, strict=True)):
            if np.abs(one[number] - other[0]).max() > share * np.abs(other).max():
                return False
            said = [
                text[len(text) - NEW + step]
                for text in (together.sequences[number], alone.sequences[0])
            ]
            if said[0] != said[1]:  # two that were near: from here on it is another text
                break
    return True


@contextmanager
def converted_once() -> Iterator[None]:
    """Exports of one model in several precisions convert it once."""
    real, kept = graph.convert, []

    def convert(*args: Any) -> Any:
        if not kept:
            kept.append(real(*args))
        return kept[0].clone()

    graph.convert = convert
    try:
        yield
    finally:
        graph.convert = real


def examine(kind: str, directory: Path, quantised: bool = False) -> Found:
    """Build, export and compare one type; whatever goes wrong is what is found."""
    found, unable = Found(kind), None
    try:
        model = shrink.build(kind)
    except Exception as error:
        return _failed(found, UNBUILT, error)
    try:
        rows = rows_of(model, LENGTHS)
        for row in rows:
            original(model, row, max_new_tokens=3)
    except Exception as error:  # what the export says of it is worth more
        unable = error
    try:
        with converted_once():
            _export(model, directory / "fp32", "fp32")
            if unable is not None:
                return _failed(found, UNBUILT, unable)
            found.difference, wrong = compare(model, directory / "fp32")
            if wrong or not found.difference <= CLOSE:
                found.outcome, found.reason = WRONG, "; ".join(wrong) or "logits"
            for precision, share in ALONE.items() if quantised else ():
                _export(model, directory / precision, precision)
                if not independent(directory / precision, rows, share):
                    found.notes.append(f"{precision}: rows are not independent")
            found.quantised = quantised
    except UnsupportedModel as error:
        reason = str(error).removeprefix(f"{model.config.model_type} cannot be exported: ")
        found.outcome, found.reason = REFUSED, reason
    except Mismatch as error:
        found.outcome, found.reason = CAUGHT, str(error).partition(": ")[2]
    except Exception as error:
        return _failed(found, FAILED, error)
    return found


def _export(model: PreTrainedModel, out: Path, precision: str) -> None:
    """Random weights are no text: what quantising costs them is not judged."""
    export(model, out, precision=precision, progress=None, allow_mismatch=precision != "fp32")


def _failed(found: Found, outcome: str, error: Exception) -> Found:
    place = traceback.extract_tb(error.__traceback__)[-1]
    line = " ".join(str(error).split())[:200]
    found.outcome = outcome
    found.reason = f"{type(error).__name__}: {line} ({Path(place.filename).name}:{place.lineno})"
    return found


def _child(kind: str, quantised: bool, pipe: Any) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)
        os.dup2(nothing.fileno(), 1)
    with tempfile.TemporaryDirectory() as directory:
        pipe.send(asdict(examine(kind, Path(directory), quantised)))


def run(kinds: Sequence[str], quantised: bool, jobs: int, seconds: float) -> Iterator[Found]:
    """Examine each type in a process of its own: what kills one does not stop the others."""
    fork = multiprocessing.get_context("fork")  # imports are shared
    waiting, running = list(kinds), []
    while waiting or running:
        while waiting and len(running) < jobs:
            kind = waiting.pop(0)
            ours, theirs = fork.Pipe(duplex=False)
            process = fork.Process(target=_child, args=(kind, quantised, theirs))
            process.start()
            theirs.close()
            running.append((kind, process, ours, time.monotonic()))
        for one in list(running):
            kind, process, pipe, start = one
            spent = time.monotonic() - start
            found = None
            if pipe.poll(0.1):
                try:
                    found = Found(**pipe.recv())
                except EOFError:
                    process.join()
                    found = Found(kind, FAILED, f"its process ended with {process.exitcode}")
            elif spent > seconds:
                process.kill()
                found = Found(kind, LATE, f"more than {seconds:.0f} s")
            if found is not None:
                process.join()
                running.remove(one)
                found.seconds = round(spent, 1)
                yield found


# What a type's family is told by: an attribute of its configuration that is neither 0 nor None.
FAMILIES: dict[str, str] = {
    "experts": r"^(moe_)?(n|num)_.*experts$|^moe_num_experts",
    "recurrences": r"ssm|state_size|d_state|linear_(num|head|attn)|lru|^attention_hidden",
    "convolutions": r"^conv_|_conv_|d_conv",
    "latent keys": r"kv_lora_rank",
    "windows": r"^(sliding_)?window(_size)?$|^sliding_window|^local_attention$|attention_window",
    "chunks": r"attention_chunk_size",
    "shared keys": r"num_kv_shared",
    "capped scores": r"attn_logit_softcapping",
    "rotations": r"rope_parameters|rotary_dim",
}


def family(kind: str) -> str:
    """The mechanisms of a type, by its configuration."""
    try:
        config = shrink.config_of(kind).get_text_config(decoder=True)
    except Exception:  # of all kinds: some defaults do not build
        return ""
    named = [name for name, value in vars(config).items() if value]
    found = [
        name
        for name, pattern in FAMILIES.items()
        if any(re.search(pattern, attribute) for attribute in named)
    ]
    return ", ".join(found) or "none of these"


def table(all_found: Sequence[Found], command: str) -> str:
    """The results as Markdown: counts, and a table for each outcome."""
    counts = Counter(one.outcome for one in all_found)
    order = [
        name for name in (EXACT, CAUGHT, REFUSED, WRONG, FAILED, LATE, UNBUILT) if name in counts
    ]
    lines = [
        "# Every architecture of transformers", "",
        f"    {command}", "",
        f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}, "
        f"onnxruntime {onnxruntime.__version__}. {len(all_found)} types: "
        + ", ".join(f"{counts[name]} {name}" for name in order) + ".", "",
        "A tiny random model of each type, made from its default configuration by "
        "`bench/shrink.py`, is exported in fp32 and compared with transformers' own, each of whose "
        f"rows runs alone: logits of ragged rows ({', '.join(map(str, LENGTHS))} and {LONG} "
        "tokens) at prefill and decode, greedy tokens, 3 beams, seeded draws. Exact means that "
        f"every token is the same and no logit differs by more than {CLOSE:.0e} of the largest.",
    ]  # fmt: skip
    for name in order:
        ones = sorted((one for one in all_found if one.outcome == name), key=lambda one: one.kind)
        lines += ["", f"## {name[0].upper()}{name[1:]}: {len(ones)}", ""]
        if name == EXACT:
            families: dict[str, list[str]] = {}
            for one in ones:
                said = f"{one.kind} {one.difference:.0e}"
                families.setdefault(family(one.kind), []).append(said)
            lines += [
                "| experts, recurrences ... | types, with the largest difference of a logit |",
                "|---|---|",
            ]
            lines += [f"| {name} | {', '.join(families[name])} |" for name in sorted(families)]
            continue
        lines += ["| reason | types |", "|---|---|"]
        reasons: dict[str, list[str]] = {}
        for one in ones:
            reasons.setdefault(one.reason.replace("|", "\\|"), []).append(one.kind)
        grouped = sorted(reasons.items(), key=lambda item: -len(item[1]))
        lines += [f"| {reason} | {', '.join(kinds)} |" for reason, kinds in grouped]
    quantised, noted = sum(one.quantised for one in all_found), [o for o in all_found if o.notes]
    if quantised:
        lines += ["", "## Quantised", ""]
        lines += [
            f"{quantised} types load and run in int8 and in int4; a row in a batch has the logits "
            f"that it has alone (int8: to {ALONE['int8']:.0e} of the largest, int4: to "
            f"{ALONE['int4']:.0e}){', but for:' if noted else '.'}"
        ]
        lines += ["", *(f"- {one.kind}: {'; '.join(one.notes)}" for one in noted)] if noted else []
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("types", nargs="*", help="all of them, if none is named")
    parser.add_argument("--quantised", action="store_true", help="int8 and int4 besides")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="that a type may take")
    parser.add_argument("--json", type=Path, help="results; types that are in it are not run again")
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    done = []
    if options.json and options.json.exists():
        done = [Found(**one) for one in json.loads(options.json.read_text())]
    known = {one.kind for one in done}
    left = [kind for kind in options.types or types() if kind not in known]
    for found in run(left, options.quantised, options.jobs, options.seconds):
        done.append(found)
        difference = "" if found.difference is None else f"{found.difference:.0e}"
        print(
            f"{found.kind:28} {found.outcome:12} {difference:6} {found.seconds:5.1f} s  "
            f"{found.reason[:150]} {'; '.join(found.notes)}",
            flush=True,
        )
        if options.json:  # what is found by now
            options.json.write_text(json.dumps([asdict(one) for one in done], indent=1))
    done.sort(key=lambda one: one.kind)
    print(dict(Counter(one.outcome for one in done)))
    command = "python bench/architectures.py" + (" --quantised" if options.quantised else "")
    if options.markdown:
        text = table(done, f"{command} --markdown bench/architectures.md")
        options.markdown.write_text(re.sub(r" +\n", "\n", text))


if __name__ == "__main__":
    main()
