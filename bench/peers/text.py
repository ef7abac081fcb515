"""The text of real models that the engines' faithfulness is measured on: rows of ids.

python text.py MODEL FILE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

KINDS = ("several kinds", "documentation", "its own")
TOKENS = 1024  # of each of the first two, or half of the last, about
ROW = 256  # tokens of a row, at most
SOME = 32  # rows that a model writes, of which those are taken that make up the tokens
SEED = 7  # of the text that a model without a tokenizer writes


def rows(name: str) -> list[dict[str, Any]]:
    """The text that a real model's engines are judged on: rows of ids, each with its kind.

    Half is text of several kinds, of the half of fastgen's own that no export calibrates on; half
    is documentation, of `export/held_out.txt`. What has no tokenizer is judged on text that it
    wrote itself, drawn by torch.
    """
    import real

    from fastgen.export.prove import corpus
    from fastgen.export.torch_model.original import Original
    from fastgen.export.torch_model.source import load

    source = real.directory(name)
    if not (source / "tokenizer.json").exists():
        return own_text(source)
    origin = Original(load(str(source)))
    info = origin.describe()
    found = [(KINDS[0], row) for row in corpus.of(origin, info).evaluation(TOKENS)]
    held_out = corpus.TEXTS.with_name("held_out.txt").read_text(encoding="utf-8")
    reader = corpus.Reader.of(origin, info)
    count = 0
    for document in held_out.split("<|endoftext|>"):
        for row in reader.rows(document) if document.strip() else []:
            if count < TOKENS:
                found.append((KINDS[1], row))
                count += len(row)
    return [{"kind": kind, "ids": row.tolist()} for kind, row in found]


def own_text(source: Path) -> list[dict[str, Any]]:
    """Rows that a model writes from its whole distribution, each up to the end that it gives it."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    end = model.config.eos_token_id
    torch.manual_seed(SEED)
    start = torch.full((SOME, 1), model.config.bos_token_id)
    drawn = model.generate(
        start,
        attention_mask=torch.ones_like(start),
        do_sample=True,
        top_k=0,
        max_new_tokens=ROW - 1,
        pad_token_id=end,
    )
    found: list[dict[str, Any]] = []
    for ids in drawn.tolist():
        row = ids[: ids.index(end) + 1] if end in ids else ids
        if sum(len(one["ids"]) for one in found) < 2 * TOKENS:
            found.append({"kind": KINDS[2], "ids": row})
    return found


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(rows(sys.argv[1])))
