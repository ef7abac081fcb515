"""The tokenizer of a GGUF file: byte-level BPE with its pre-tokenizer, and SentencePiece's BPE.

A file names its pre-tokenizer (`tokenizer.ggml.pre`); what these are is llama.cpp's and, where the
two differ, the original tokenizer.json's. One that is not known is refused, since its tokens would
be others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from fastgen.errors import UnsupportedModel
from fastgen.export.gguf.file import File

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # types of tokens
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's

_CASES = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_END = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORD = r"[^\r\n\p{L}\p{N}]?"
LLAMA3 = rf"{_CASES}|{_WORD}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_END}"
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}", 1)
GPT_4O = (
    rf"{_WORD}{_UPPER}*{_LOWER}+{_CASES}?|{_WORD}{_UPPER}+{_LOWER}*{_CASES}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_END}"
)
TEKKEN = GPT_4O.replace(f"{_CASES}?", "").replace(r"\p{N}{1,3}", r"\p{N}", 1)
DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2 = ""  # what the byte level has itself
DIGITS = r"\p{N}"

# Of each pre-tokenizer the expressions that split a text, one after the other.
SPLITS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "mpt", "jais", "gigachat"), (GPT2,)),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
        (DIGITS, GPT2),
    ),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "smaug-bpe", "dbrx", "pixtral", "lfm2"),
        (LLAMA3,),
    ),
    **dict.fromkeys(("chatglm-bpe", "glm4"), (LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"), (QWEN2,)),
    **dict.fromkeys(("gpt-4o", "llama4"), (GPT_4O,)),
    "tekken": (TEKKEN,),
    **dict.fromkeys(
        ("deepseek-v3", "deepseek-r1", "hunyuan-dense"),
        (r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", DEEPSEEK3),
    ),
}  # fmt: skip
# Those that take a word as it is where the vocabulary has it, and begin with a token.
WHOLE_WORDS = {
    "llama-bpe", "llama3", "llama-v3", "falcon3", "smaug-bpe", "pixtral", "lfm2", "tekken",
}  # fmt: skip
COMPOSED = {"qwen2", "deepseek-r1-qwen", "stablelm2"}  # the original reads NFC


def read(file: File) -> tuple[Tokenizer | None, dict[str, Any], str]:
    """The tokenizer of a file, what tokenizer_config.json says, and why there is none.

    Raises:
        UnsupportedModel: its vocabulary contradicts itself.
    """
    kind = file.metadata.get("tokenizer.ggml.model")
    if kind in (None, "no_vocab", "none"):
        return None, {}, "the file has no vocabulary"
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise UnsupportedModel("its vocabulary has no tokens")
    types = file.metadata.get("tokenizer.ggml.token_type")
    types = [NORMAL] * len(tokens) if types is None else list(types)
    if len(types) != len(tokens):
        raise UnsupportedModel(f"it has {len(tokens)} tokens and {len(types)} types of them")
    config = _configuration(file, tokens)
    pre = str(file.metadata.get("tokenizer.ggml.pre", "default"))
    if kind == "gpt2":
        if pre == "default" and file.architecture == "gpt2":
            pre = "gpt-2"
        if pre not in SPLITS:
            return None, config, f"its pre-tokenizer is {pre!r}, which is not known"
        tokenizer = _byte_level(file, tokens, pre)
        begins = pre in WHOLE_WORDS
    elif kind == "llama":
        tokenizer, begins = _sentence_pieces(file, tokens, types), True
    else:
        return None, config, f"its tokenizer is of the kind {kind!r}, which is not known"
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t in _of(tokens, types, CONTROL)]
    )
    tokenizer.add_tokens(
        [
            AddedToken(t, normalized=kind == "llama" and SPACE in t, special=False)
            for t in _of(tokens, types, USER_DEFINED)
        ]
    )
    _add_ends(tokenizer, file, config, begins)
    return tokenizer, config, ""


def _of(tokens: Sequence[str], types: Sequence[int], kind: int) -> Iterator[str]:
    return (token for token, token_type in zip(tokens, types, strict=True) if token_type == kind)


def _byte_level(file: File, tokens: list[str], pre: str) -> Tokenizer:
    lines = file.metadata.get("tokenizer.ggml.merges")
    if not isinstance(lines, list):
        raise UnsupportedModel("its vocabulary has no merges")
    merges = [_pair(line) for line in lines]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        _model(vocabulary, merges, ignore_merges=pre in WHOLE_WORDS, fuse_unk=False)
    )
    if pre in COMPOSED:
        tokenizer.normalizer = normalizers.NFC()
    splits = SPLITS[pre]
    steps: list[Any] = []
    for expression in splits:
        if expression == DIGITS and GPT2 in splits:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        elif expression != GPT2:
            steps.append(pre_tokenizers.Split(Regex(expression), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=GPT2 in splits))
    tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _model(vocabulary: dict[str, int], merges: list[tuple[str, str]], **rules: Any) -> models.BPE:
    try:
        return models.BPE(vocabulary, merges, **rules)
    except Exception as error:  # tokenizers raises Exception itself
        raise UnsupportedModel(f"its vocabulary contradicts itself: {error}") from error


def _pair(line: Any) -> tuple[str, str]:
    """The two halves of a merge. A half may be a space itself in no vocabulary of bytes."""
    parts = line.split(" ") if isinstance(line, str) else []
    if len(parts) != 2:
        raise UnsupportedModel(f"its vocabulary has {line!r} among its merges")
    return parts[0], parts[1]


def _sentence_pieces(file: File, tokens: list[str], types: Sequence[int]) -> Tokenizer:
    scores = file.metadata.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        raise UnsupportedModel("its vocabulary has no score of each token")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    unknown = next(_of(tokens, types, UNKNOWN), None)
    number = file.metadata.get("tokenizer.ggml.unknown_token_id")
    if unknown is None and isinstance(number, int) and 0 <= number < len(tokens):
        unknown = tokens[number]
    falls_back = BYTE in types
    model = _model(
        vocabulary,
        _merges(vocabulary, tokens, scores, types),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=bool(falls_back),
        ignore_merges=False,
    )
    tokenizer = Tokenizer(model)
    prefixed = bool(file.metadata.get("tokenizer.ggml.add_space_prefix", True))
    spaces = normalizers.Replace(" ", SPACE)
    steps = [normalizers.Prepend(SPACE), spaces] if prefixed else [spaces]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if prefixed else []),
        ]
    )
    return tokenizer


def _merges(
    vocabulary: dict[str, int], tokens: list[str], scores: Sequence[float], types: Sequence[int]
) -> list[tuple[str, str]]:
    """Pairs of pieces that make a piece, the likeliest piece first: SentencePiece joins by that."""
    merges = []
    for token, score, kind in zip(tokens, scores, types, strict=True):
        if kind != NORMAL:
            continue
        for at in range(1, len(token)):
            left, right = vocabulary.get(token[:at]), vocabulary.get(token[at:])
            if left is not None and right is not None:
                merges.append((-score, left, right))
    merges.sort()
    return [(tokens[left], tokens[right]) for _, left, right in merges]


def _add_ends(tokenizer: Tokenizer, file: File, config: dict[str, Any], begins: bool) -> None:
    """The tokens that a text begins and ends with."""
    first = file.metadata.get("tokenizer.ggml.add_bos_token", begins)
    last = file.metadata.get("tokenizer.ggml.add_eos_token", False)
    before = [config["bos_token"]] if first and "bos_token" in config else []
    after = [config["eos_token"]] if last and "eos_token" in config else []
    if not before and not after:
        return
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *(f"{t}:1" for t in before), "$B:1",
              *(f"{t}:1" for t in after)],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in {*before, *after}],
    )  # fmt: skip


IDS = {
    "bos": "bos_token",
    "eos": "eos_token",
    "unknown": "unk_token",
    "padding": "pad_token",
}


def special_ids(file: File, tokens: int) -> dict[str, int]:
    """Ids by transformers' names, such as "bos_token_id".

    Raises:
        UnsupportedModel: one is no token.
    """
    ids = {}
    for theirs, name in IDS.items():
        number = file.metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        if number is None:
            continue
        if not isinstance(number, int) or not 0 <= number < tokens:
            raise UnsupportedModel(f"its {name} is {number!r}, and it has {tokens} tokens")
        ids[f"{name}_id"] = number
    return ids


def end_ids(file: File, tokens: int) -> dict[str, Any]:
    """The ids that end a text, where there are several: of the text, of a turn, of a message."""
    names = ("eos", "eot", "eom")
    numbers = [file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in names]
    ids = [number for number in numbers if isinstance(number, int) and 0 <= number < tokens]
    return {"eos_token_id": list(dict.fromkeys(ids))} if len(set(ids)) > 1 else {}


def _configuration(file: File, tokens: list[str]) -> dict[str, Any]:
    """The content of tokenizer_config.json: special tokens and chat templates."""
    ids = special_ids(file, len(tokens))
    config: dict[str, Any] = {name.removesuffix("_id"): tokens[n] for name, n in ids.items()}
    config["clean_up_tokenization_spaces"] = False
    template = file.metadata.get("tokenizer.chat_template")
    names = file.metadata.get("tokenizer.chat_templates")
    names = names if isinstance(names, list) else []
    named = {name: file.metadata.get(f"tokenizer.chat_template.{name}") for name in names}
    if isinstance(template, str):
        named["default"] = template
    if set(named) == {"default"}:
        config["chat_template"] = template
    elif named:
        config["chat_template"] = [{"name": n, "template": text} for n, text in named.items()]
    return config
