"""A small tokenizer of each kind, made on the spot."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEXT = ['{"name": "Ann", "age": 7, "kind": "cat"} the quick brown fox, 12 + 30 = 42.'] * 3


def byte_level() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    made.train_from_iterator(TEXT, trainer)
    return made


def prefixed() -> Tokenizer:
    made = byte_level()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return made


def _pieces() -> list[str]:
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    words = ["▁", "▁the", "▁{", "{", '"', '":', '▁"', "name", "age", ",", "▁a", "}", "cat", "▁cat"]
    return ["<unk>", "<s>", "</s>", *bytes_, *words, *"abcdeghiklmnorst0123456789.+()-"]


def metaspace() -> Tokenizer:
    """As SentencePiece's unigram models: a space in front, and bytes for what is missing."""
    pieces = _pieces()
    scores = [-20.0 + len(piece) if place > 258 else -50.0 for place, piece in enumerate(pieces)]
    vocab = list(zip(pieces, scores, strict=True))
    made = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    made.decoder = decoders.Sequence(
        [
            decoders.ByteFallback(),
            decoders.Metaspace(replacement="▁", prepend_scheme="always"),
        ]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made


def llama() -> Tokenizer:
    """As Llama's: a space in front by the normalizer, and taken off again by the decoder."""
    pieces = _pieces()
    merges = [("▁", "{"), ("▁", "a"), ('"', ":")]
    made = Tokenizer(
        models.BPE(
            vocab={
                piece: i for i, piece in enumerate(dict.fromkeys([*pieces, "▁{", "▁a", '":', ":"]))
            },
            merges=merges,
            byte_fallback=True,
            fuse_unk=True,
            unk_token="<unk>",
        )
    )
    made.normalizer = normalizers.Sequence(
        [
            normalizers.Prepend("▁"),
            normalizers.Replace(" ", "▁"),
        ]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made


def wordpiece() -> Tokenizer:
    words = ["[UNK]", "<s>", "</s>", *'abcdefghijklmnopqrstuvwxyz0123456789,.{}:"', "the", "cat"]
    words += ["##" + char for char in "abcdefghijklmnopqrstuvwxyz0123456789"] + ["##ing", "quick"]
    made = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.add_special_tokens(["[UNK]", "<s>", "</s>"])
    return made


def gemma() -> Tokenizer:
    """As Gemma's: no space in front, spaces spelt out, bytes for what is missing."""
    made = llama()
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
        ]
    )
    return made


def suffixed() -> Tokenizer:
    """As the first GPT's: a word's last token says that it is."""
    words = ["<unk>", "<s>", "</s>", *"abcdefgh", *(char + "</w>" for char in "abcdefgh")]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.decoder = decoders.BPEDecoder()
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made


def undecoded() -> Tokenizer:
    """Without a decoder: words with spaces between them."""
    made = suffixed()
    made.decoder = None
    return made
