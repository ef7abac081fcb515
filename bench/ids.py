"""The ids of texts by the tokenizer that is read of a GGUF file, and by other readers of the file.

    python bench/ids.py FILE ... --llama PYTHON [--texts 2000] [--original DIRECTORY]

The texts are passages of `export/texts` (prose, code, 28 languages), made ones of any Unicode
letters, spaces, digits and punctuation, and both with special tokens of the file among them. They
are compared with llama.cpp's ids (PYTHON is one that has llama-cpp-python), for SentencePiece's
kind with those of the library `sentencepiece` (of the texts without added tokens, which are found
before it joins pieces), and with those of DIRECTORY's tokenizer.json, where the original can be
had.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from fastgen.export.gguf import file, tensors, vocabulary

PASSAGES = Path(__file__).resolve().parents[1] / "export" / "texts"
SPACES = " \t\n\r  \n\n\n\u00a0\u3000\u200b"
PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~…“”«»—·。、\uff01\uff1f"
WORDS = (
    "don't", "I'LL", "we've", "x=1", "f(x)", "naïve", "café", "ﬁn", "你好", "世界", "مرحبا", "שלום",
    "नमस्ते", "🙂", "👩\u200d👩\u200d👧", "3.14", "1e-9", "0xFF",
)  # fmt: skip
SHOWN = 3  # texts that differ

LLAMA = """
import json, sys
from llama_cpp import Llama
model = Llama(sys.argv[1], vocab_only=True, verbose=False)
for line in sys.stdin:
    text = json.loads(line).encode()
    print(json.dumps(model.tokenize(text, add_bos=False, special=True)))
"""


def passages() -> list[str]:
    texts = []
    for path in sorted(PASSAGES.glob("*.txt")):
        texts += path.read_text(encoding="utf-8").split("\n\n")
    return [text for text in texts if text.strip()]


def letters(draw: random.Random) -> str:
    """Any characters that Unicode assigns, of the first planes above all."""
    out = []
    while len(out) < draw.randint(1, 12):
        one = chr(draw.randrange(1, draw.choice((0x80, 0x250, 0x3000, 0x10000, 0x20000))))
        if unicodedata.category(one) not in ("Cs", "Cn", "Co"):
            out.append(one)
    return "".join(out)


def made(draw: random.Random) -> str:
    kinds: tuple[Callable[[], str], ...] = (
        lambda: draw.choice(WORDS),
        lambda: letters(draw),
        lambda: "".join(draw.choices(SPACES, k=draw.randint(1, 5))),
        lambda: "".join(draw.choices(PUNCTUATION, k=draw.randint(1, 4))),
        lambda: str(draw.randrange(10 ** draw.randint(1, 9))),
        lambda: " " + draw.choice(WORDS),
    )
    return "".join(draw.choice(kinds)() for _ in range(draw.randint(1, 14)))


def texts(count: int, special: Sequence[str]) -> list[str]:
    """Texts, each once: half of them passages or parts of them; a tenth has special tokens."""
    draw, found = random.Random(0), passages()
    out: dict[str, None] = {}
    while len(out) < count:
        if draw.random() < 0.5:
            text = draw.choice(found)
            at = draw.randrange(len(text))
            text = text[at : at + draw.choice((20, 80, 300, 2000))]
        else:
            text = made(draw)
        if special and draw.random() < 0.1:
            at = draw.randrange(len(text) + 1)
            text = text[:at] + draw.choice(special) + text[at:]
        out[text] = None
    return list(out)


def by_llama(path: Path, python: str, given: Sequence[str]) -> list[list[int]]:
    lines = "".join(json.dumps(text) + "\n" for text in given)
    command = [python, "-c", LLAMA, path]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def by_sentencepiece(opened: file.File, given: Sequence[str]) -> list[list[int]]:
    """The library's ids by the pieces, scores and types of a file."""
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    said = {name: opened.metadata[f"tokenizer.ggml.{name}"] for name in COLUMNS}
    for text, score, kind in zip(*said.values(), strict=True):
        piece = proto.pieces.add()
        piece.piece, piece.score, piece.type = text, float(score), int(kind)
    trainer, normal = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type, trainer.byte_fallback = 2, True
    trainer.vocab_size = len(proto.pieces)
    names = {"unk_id": "unknown", "bos_id": "bos", "eos_id": "eos", "pad_id": "padding"}
    for name, theirs in names.items():
        number = opened.metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        setattr(trainer, name, -1 if number is None else int(number))
        if number is not None:
            setattr(trainer, name.replace("_id", "_piece"), proto.pieces[int(number)].piece)
    normal.name, normal.remove_extra_whitespaces = "identity", False
    normal.escape_whitespaces = True
    normal.add_dummy_prefix = bool(opened.metadata.get("tokenizer.ggml.add_space_prefix", True))
    processor: Any = SentencePieceProcessor(model_proto=proto.SerializeToString())
    return [processor.encode(text) for text in given]


COLUMNS = ("tokens", "scores", "token_type")


def told(
    name: str, theirs: Sequence[list[int]], ours: Sequence[list[int]], given: Sequence[str]
) -> None:
    differing = [
        at for at, (one, other) in enumerate(zip(ours, theirs, strict=True)) if one != other
    ]
    print(f"| {name} | {len(given):,} | {len(given) - len(differing):,} |", flush=True)
    for at in differing[:SHOWN]:
        print(f"    {given[at][:80]!r}\n        {ours[at][:12]}\n        {theirs[at][:12]}")


def compare(path: Path, count: int, python: str | None, original: Path | None) -> None:
    opened = file.read(path, tensors.block_sizes())
    tokenizer, _, note = vocabulary.read(opened)
    if tokenizer is None:
        raise SystemExit(f"{path}: {note}")
    added = [one.content for one in tokenizer.get_added_tokens_decoder().values()]
    given = texts(count, added)
    ours = [tokenizer.encode(text, add_special_tokens=False).ids for text in given]
    print(f"\n| {path.name} beside | texts | the same ids |\n|---|---|---|")
    if python:
        told("llama.cpp", by_llama(path, python, given), ours, given)
    if opened.metadata.get("tokenizer.ggml.model") == "llama":
        plain = [at for at, text in enumerate(given) if not any(one in text for one in added)]
        chosen = [given[at] for at in plain]
        theirs = by_sentencepiece(opened, chosen)
        told("SentencePiece", theirs, [ours[at] for at in plain], chosen)
    if original:
        theirs = Tokenizer.from_file(str(original / "tokenizer.json"))
        found = [theirs.encode(text, add_special_tokens=False).ids for text in given]
        told(f"tokenizer.json of {original.name}", found, ours, given)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--llama", metavar="PYTHON", help="one that has llama-cpp-python")
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--original", type=Path, help="a directory with the model's tokenizer.json")
    args = parser.parse_args()
    for path in args.files:
        compare(path, args.texts, args.llama, args.original)


if __name__ == "__main__":
    main()
