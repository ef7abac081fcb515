"""fastgen beside transformers, live, over some hundred configurations: which tokens differ?

    python tests/parity_report.py

Every configuration runs in both, with the same ids, mask and keywords (and `seed=s` here for
`torch.manual_seed(s)` there). A difference is a tie if the two best candidates of the step where it
begins are less than 1e-5 apart in transformers' own numbers; ties are counted apart.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import tiny
import torch
import transformers
from beam_ties import TIE, closest
from tiny import left_padded, ragged
from transformers import WatermarkingConfig

from fastgen.sampling import sampler

Pair = Callable[[str], tuple[Any, Any]]

KINDS = ("gpt2", "llama", "gemma2", "qwen3")
NEW = 8
ONE_ROW, RAGGED = ragged(31, (9,)), ragged(32, (4, 9, 7))

MODES: dict[str, list[dict[str, Any]]] = {
    "greedy": [{}],
    "sampling": [
        {"do_sample": True, **warpers}
        for warpers in (
            {}, {"temperature": 0.7, "top_k": 20}, {"top_k": 0, "top_p": 0.9},
            {"min_p": 0.1, "num_return_sequences": 2}, {"typical_p": 0.8}, {"top_h": 0.6},
            {"epsilon_cutoff": 0.02, "temperature": 1.4}, {"eta_cutoff": 0.03},
        )
    ],
    "beams": [
        {"num_beams": beams, **rest}
        for beams, rest in (
            (2, {}), (3, {"early_stopping": True, "num_return_sequences": 3}),
            (4, {"length_penalty": 2.0, "early_stopping": "never"}),
            (3, {"length_penalty": -1.0, "num_return_sequences": 2}),
        )
    ],
    "beam sampling": [
        {"num_beams": beams, "do_sample": True, **rest}
        for beams, rest in (
            (2, {}), (3, {"top_k": 0, "top_p": 0.9, "num_return_sequences": 2}),
            (3, {"temperature": 0.8, "length_penalty": 2.0, "early_stopping": True}),
        )
    ],
}  # fmt: skip

PROCESSORS: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.3},
    {"no_repeat_ngram_size": 2, "max_new_tokens": 14},
    {"min_new_tokens": 6},
    {"min_length": 14, "renormalize_logits": True},
    {"bad_words_ids": [[17], [20, 21], [40], [5, 6]]},
    {"sequence_bias": {(7,): 3.0, (44, 45): -1.5, (8,): -4.0}},
    {"suppress_tokens": list(range(10, 30)), "begin_suppress_tokens": [40, 41, 42]},
    {"forced_eos_token_id": 2, "remove_invalid_values": True},
    {"exponential_decay_length_penalty": (2, 1.6)},
    {"encoder_repetition_penalty": 1.4, "encoder_no_repeat_ngram_size": 2},
    {"guidance_scale": 1.7},
    {"guidance_scale": 2.5, "negative_prompt_ids": True},
    {"watermarking_config": WatermarkingConfig(bias=2.5)},
    {"watermarking_config": WatermarkingConfig(bias=4.0, seeding_scheme="selfhash"),
     "max_new_tokens": 4},
    {"repetition_penalty": 0.8, "no_repeat_ngram_size": 3, "min_new_tokens": 4,
     "guidance_scale": 0.7},
]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One configuration; `ends` says how many eos ids there are."""

    mode: str
    kind: str
    rows: list[list[int]]
    ends: int
    knobs: dict[str, Any]
    seed: int


def cases(kinds: Sequence[str]) -> Iterator[Case]:
    """Every mode, architecture and processor, one row and ragged rows; the rest takes turns."""
    for mode, settings in MODES.items():
        turn = itertools.count()
        product = itertools.product(kinds, (ONE_ROW, RAGGED), PROCESSORS)
        for (kind, rows, processors), place in zip(product, turn, strict=False):
            knobs = {"max_new_tokens": NEW, **settings[place % len(settings)], **processors}
            ends = 1 if "exponential_decay_length_penalty" in knobs else (1, 5, 0)[place % 3]
            if knobs.pop("negative_prompt_ids", False):
                if "num_beams" in knobs or "num_return_sequences" in knobs:
                    continue  # transformers does not expand them: it fails
                negative = ragged(33, (5,) * len(rows))
                knobs["negative_prompt_ids"] = torch.tensor(negative)
            yield Case(mode, kind, rows, ends, knobs, seed=place)


def run(pair: Pair, kinds: Sequence[str] = KINDS) -> Counter[tuple[str, str]]:
    """{(mode, "equal" | "ties" | "different"): configurations}."""
    ends = {kind: likely_tokens(pair(kind)[0]) for kind in kinds}
    counts: Counter[tuple[str, str]] = Counter()
    for case in cases(kinds):
        knobs = {"do_sample": False, "pad_token_id": 0, **case.knobs}
        knobs["eos_token_id"] = ends[case.kind][: case.ends] or None
        counts[case.mode, compare(pair(case.kind), case, knobs)] += 1
    return counts


def likely_tokens(model: Any) -> list[int]:
    """Tokens that this model often comes to: as eos ids, they end some rows and not others."""
    ids, mask = left_padded(RAGGED)
    torch.manual_seed(0)
    found = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NEW,
        do_sample=True,
        num_return_sequences=4,
        eos_token_id=None,
    )
    tokens, counts = found[:, ids.shape[1] + 2 :].unique(return_counts=True)
    return [int(token) for token in tokens[counts.argsort(descending=True)]]


def compare(pair: tuple[Any, Any], case: Case, knobs: dict[str, Any]) -> str:
    """ "equal", "ties" or "different"."""
    theirs, ours = pair
    ids, mask = left_padded(case.rows)
    torch.manual_seed(case.seed)
    expected = theirs.generate(ids, attention_mask=mask, **knobs)
    found = ours.generate(ids, attention_mask=mask, seed=case.seed, **knobs)
    if torch.equal(expected, found):
        return "equal"
    tie = gap(theirs, case, {"attention_mask": mask, **knobs}, ids, found) < TIE
    if not tie:
        print(f"{case}\n  transformers: {expected.tolist()}\n  fastgen:      {found.tolist()}")
    return "ties" if tie else "different"


def gap(
    theirs: Any, case: Case, knobs: dict[str, Any], ids: torch.Tensor, found: torch.Tensor
) -> float:
    """The distance of transformers' two best candidates where the difference begins."""
    if case.mode == "beams":
        return closest(theirs, ids, knobs)
    if case.mode == "beam sampling":
        return 1.0  # no tie is known, so none is forgiven
    torch.manual_seed(case.seed)
    out = theirs.generate(ids, return_dict_in_generate=True, output_scores=True, **knobs)
    width = min(out.sequences.shape[1], found.shape[1])
    parted = (out.sequences[:, :width] != found[:, :width]).nonzero()
    row, column = parted[parted[:, 1].argmin()].tolist()
    step = column - ids.shape[1]
    values = out.scores[step][row].softmax(-1).double().numpy()
    if case.mode == "sampling":
        stream = sampler.Stream(case.seed, len(found))
        values = values / sampler.exponential(sampler.uniform(stream.row(step, row, len(values))))
    else:
        values = out.scores[step][row].double().numpy()
    second, first = np.sort(values)[-2:]
    return float(first - second) / max(1.0, abs(first))


def table(counts: Counter[tuple[str, str]]) -> str:
    """The counts as text, a line a mode."""
    lines = [f"{'mode':<14}{'configs':>8}{'equal':>8}{'ties':>8}{'different':>11}"]
    for mode in (*MODES, "all"):
        found = [
            sum(n for (m, o), n in counts.items() if o == outcome and mode in (m, "all"))
            for outcome in ("equal", "ties", "different")
        ]
        lines.append(f"{mode:<14}{sum(found):>8}{found[0]:>8}{found[1]:>8}{found[2]:>11}")
    return "\n".join(lines)


def main() -> None:
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # more only wait for each other on models this small
    with tempfile.TemporaryDirectory() as home:
        pairs = {kind: tiny.exported(kind, Path(home) / kind) for kind in KINDS}
        print(table(run(pairs.__getitem__)))


if __name__ == "__main__":
    main()
