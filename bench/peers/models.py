"""The model that every engine converts, as transformers saves it.

A shape has random weights, and a tokenizer for those that need one. A real model is one of
`bench/real.py`.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

# A model with the usual random weights says its last token again and again, whatever its layers
# do. With layers this many times as strong, its text shows whether an engine computes them right.
LIVELIER = 1.5
RANDOM = "random-weights"  # a file beside such a model


def make(name: str, directory: Path) -> None:
    """Save a model as transformers saves one, with a tokenizer beside it that each engine reads."""
    import shapes

    if name in shapes.SHAPES:
        make_random(name, directory)
    else:
        make_real(name, directory)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    # Engines whose converters read an older transformers' config look for these names.
    config.setdefault("torch_dtype", "float32")
    if rope := config.get("rope_parameters"):
        config.setdefault("rope_theta", rope.get("full_attention", rope)["rope_theta"])
    path.write_text(json.dumps(config, indent=2))
    if name in shapes.SHAPES or not (directory / "tokenizer.json").exists():
        make_tokenizer(directory, config["vocab_size"], config["eos_token_id"])


def is_random(source: Path) -> bool:
    """True for a model of random weights, whose text says nothing."""
    return (source / RANDOM).exists()


def make_real(name: str, directory: Path) -> None:
    """Save a model of `bench/real.py`, its weights in one file of safetensors."""
    import real
    import torch
    from transformers import AutoModelForCausalLM

    source = real.directory(name)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.save_pretrained(directory)
    for file in source.glob("*token*"):
        shutil.copy(file, directory)
    path = directory / "tokenizer_config.json"
    if path.exists():  # prompts are ids: what older versions of transformers can read will do
        said = json.loads(path.read_text())
        write_tokenizer_config(directory, said.get("eos_token") or said["bos_token"])


def make_random(shape: str, directory: Path) -> None:
    """Save a model of that shape with random weights."""
    import shapes
    import torch

    model = shapes.build(shape)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and not any(part in name for part in ("wte", "wpe", "embed")):
                weight *= LIVELIER
    model.save_pretrained(directory)
    (directory / RANDOM).touch()


def make_tokenizer(directory: Path, size: int, eos: int) -> None:
    """A byte-level tokenizer of exactly `size` tokens: most are fillers, none is ever used.

    Prompts are given as ids, so a tokenizer only has to be there and to know every id.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*letters, *(f"filler{i}" for i in range(size - len(letters) - 1))]
    names.insert(eos, "<|endoftext|>")
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    write_tokenizer_config(directory, "<|endoftext|>")


def write_tokenizer_config(directory: Path, special: str) -> None:
    """One that all versions of transformers read, with one token for all that is special."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": special,
        "eos_token": special,
        "pad_token": special,
        "unk_token": special,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


if __name__ == "__main__":
    make(sys.argv[1], Path(sys.argv[2]))
