"""Kept prefixes: a hit is a fresh prefill, and there are never more bytes than allowed."""

from __future__ import annotations

import json
import threading
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from calls import generate
from hypothesis import given, settings
from hypothesis import strategies as st
from scripts import run
from tiny import ragged

import fastgen
from fastgen import PrefixCache
from fastgen.engine import batch
from fastgen.engine.cache import Cache
from fastgen.engine.prefill import WHOLE, Chunks
from fastgen.engine.prefix_cache import BLOCK
from fastgen.export import bundle, export
from fastgen.export.source.origin import Tolerance

KINDS = ["gpt2", "llama", "mistral", "gemma2", "gemma3_text", "phi3", "opt", "gpt_neox"]
BASE = ragged(100, (600,))[0]
KNOBS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 0, "seed": 5},
    "sampling with a seed a row": {"do_sample": True, "seed": [1, 2, 3]},
    "several sequences": {"do_sample": True, "num_return_sequences": 2, "seed": 5},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beam sampling": {"num_beams": 3, "do_sample": True, "seed": 5},
    "groups": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "lookup": {"prompt_lookup_num_tokens": 4},
    "guidance": {"guidance_scale": 1.5, "negative_prompt_ids": [[5, 6, 7]]},
    "processors": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
}


# Chunks that the prompts of models with 128 positions fill several times.
SMALL = Chunks(2 * BLOCK, 5 * BLOCK)


@pytest.fixture(scope="module", params=["fp32", "int8", "int4"])
def long(request, tmp_path_factory) -> fastgen.CausalLM:
    """A llama with room for several chunks, in each precision."""
    model = tiny.build("llama", max_position_embeddings=700, tie_word_embeddings=True)
    path = tmp_path_factory.mktemp("long") / request.param
    export(
        model,
        path,
        tokenizer=tiny.tokenizer(),
        precision=request.param,
        progress=None,
        tolerance=Tolerance(max_difference=1.0, kl=1.0, top1=0.0, greedy=False),
    )
    return fastgen.load(path)


def prompts(seed: int, *lengths: tuple[int, int]) -> list[list[int]]:
    """Rows that share so many tokens with `BASE` and have so many more."""
    return [
        BASE[:shared] + ragged(seed + place, (more,))[0]
        for place, (shared, more) in enumerate(lengths)
    ]


def assert_same(one: fastgen.GenerateOutput, other: fastgen.GenerateOutput) -> None:
    """Tokens, and logits bit for bit."""
    assert one.sequences == other.sequences
    for a, b in zip(one.logits, other.logits, strict=True):
        assert np.array_equal(a, b)


def outputs(model: fastgen.CausalLM, rows: Any, chunks: Chunks = WHOLE, **kwargs: Any) -> Any:
    settings = {"max_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True}
    return generate(model, rows, chunks, **settings, **kwargs)


# --- a hit is a fresh prefill -------------------------------------------------------------------


@pytest.mark.parametrize("kind", tiny.some(KINDS, {*KINDS} - {"phi3"}))
def test_a_hit_gives_the_tokens_and_logits_of_a_fresh_prefill(pair, kind):
    _, model = pair(kind)
    cache = PrefixCache()
    for rows in (
        prompts(1, (100, 3)),
        prompts(2, (100, 9), (40, 40), (0, 7), (70, 1)),
        prompts(3, (97, 1), (64, 32)),
        prompts(2, (100, 9), (40, 40), (0, 7), (70, 1)),
    ):
        assert_same(outputs(model, rows, SMALL, prefix_cache=cache), outputs(model, rows, SMALL))
    assert cache.hits >= 7 and cache.tokens_reused >= 5 * BLOCK


@pytest.mark.parametrize("name", KNOBS)
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_every_search_gives_the_same_with_a_hit(pair, kind, name):
    _, model = pair(kind)
    rows, cache = prompts(4, (90, 4), (70, 20), (0, 9)), PrefixCache()
    knobs = KNOBS[name]
    fresh = outputs(model, rows, SMALL, **knobs)
    assert_same(outputs(model, rows, SMALL, **knobs, prefix_cache=cache), fresh)
    first = cache.tokens_reused
    assert_same(outputs(model, rows, SMALL, **knobs, prefix_cache=cache), fresh)
    assert cache.tokens_reused >= first + 3 * BLOCK


def test_an_assistant_may_be_used_with_it(pair):
    _, model = pair("llama")
    _, helper = pair("llama", num_hidden_layers=1)
    rows, cache = prompts(5, (90, 4), (70, 20)), PrefixCache()
    for _ in range(2):
        found = outputs(model, rows, SMALL, assistant_model=helper, prefix_cache=cache)
        assert found.sequences == outputs(model, rows, SMALL).sequences
    assert cache.hits >= 2


def test_every_precision_and_length_is_bit_exact(long):
    """Lengths at which a kernel meets one row apart, if the rest is not cut with care."""
    cache = PrefixCache()
    random = np.random.default_rng(0)
    for turn in range(8):
        rows = prompts(
            200 + 10 * turn,
            *(
                (shared, int(random.integers(0, 17)) * BLOCK + int(random.integers(1, 4)))
                for shared in random.integers(0, 60, random.integers(1, 5)).tolist()
            ),
        )
        rows += [BASE[: int(random.integers(1, 18)) * BLOCK + int(random.integers(0, 3))]]
        again = [row[: len(row) - turn] for row in rows if len(row) > turn]
        for mine in (rows, again):
            kept = outputs(long, mine, prefix_cache=cache)
            assert_same(kept, outputs(long, mine))
    assert cache.tokens_reused > 1000


@pytest.mark.parametrize("length", [257, 289, 321, 385, 450])
def test_one_prompt_is_bit_exact_at_every_edge(long, length):
    row = BASE[:length]
    fresh = outputs(long, row)
    for shared in range(BLOCK, length, 3 * BLOCK):
        cache = PrefixCache()
        long.generate(BASE[:shared], max_new_tokens=1, prefix_cache=cache)
        assert len(cache) == shared
        assert_same(outputs(long, row, prefix_cache=cache), fresh)
        assert cache.tokens_reused >= min(shared, (length - 1) // 256 * 256)


def test_rows_of_one_call_share_their_prefix(long):
    rows, cache = prompts(6, *[(300, 5 + place) for place in range(8)]), PrefixCache()
    kept = long.generate(rows, max_new_tokens=3, prefix_cache=cache)
    assert cache.hits == 7 and cache.misses == 1  # the first is read, then the rest of all others
    assert kept == long.generate(rows, max_new_tokens=3)


def test_a_conversation_goes_on_from_what_is_kept(long):
    cache, turn = PrefixCache(), BASE[:70]
    for length in (0, 96, 192):
        before = cache.tokens_reused
        out = long.generate(turn, max_new_tokens=20, eos_token_id=None, prefix_cache=cache)[0]
        assert out == long.generate(turn, max_new_tokens=20, eos_token_id=None)[0]
        assert cache.tokens_reused - before >= min(length, 64)
        turn = out + ragged(len(out), (60,))[0]
    assert cache.hits == 2


def test_texts_streams_and_scores_take_it(pair):
    _, model = pair("llama")
    cache, text = PrefixCache(), "The quick brown fox jumps over the lazy dog. " * 2
    one = model.complete([text, text + "And"], max_new_tokens=5, prefix_cache=cache)
    two = [token.text for token in model.stream(text, max_new_tokens=5, prefix_cache=cache)]
    assert one[0] == "".join(two) == model.complete(text, max_new_tokens=5)
    assert cache.tokens_reused >= BLOCK
    healed = {"token_healing": True, "max_new_tokens": 5}
    before = cache.hits
    assert model.complete(text, **healed, prefix_cache=cache) == model.complete(text, **healed)
    assert cache.hits > before


def test_scores_after_a_kept_prefix_are_the_same(long):
    cache, rows = PrefixCache(), [[5, 6, 7], [8]]
    for length in (200, 201, 230, 257):
        fresh = long.score(rows, prefix=BASE[:length])
        for _ in range(2):
            kept = long.score(rows, prefix=BASE[:length], prefix_cache=cache)
            for a, b in zip(kept, fresh, strict=True):
                assert np.array_equal(a, b, equal_nan=True)
    assert cache.hits == 7
    row = BASE[:230] + [5]  # what was scored is of use to generation
    assert_same(outputs(long, row, prefix_cache=cache), outputs(long, row))
    assert cache.hits == 8


def test_rows_that_join_late_find_what_is_kept(long):
    cache, running = PrefixCache(), batch.Batch(long.model)
    rows = prompts(7, (280, 9), (290, 4), (100, 30))
    requests = []
    for row in rows:
        call = long._call(row, knobs={"max_new_tokens": 9}, prefix_cache=cache)
        requests.append(call.request)
        running.add(requests[-1])
        running.step()
    while running.rows:
        running.step()
    assert (cache.hits, cache.misses) == (2, 1)
    for request, row in zip(requests, rows, strict=True):
        expected = long.generate(row, max_new_tokens=9)
        assert request.sequences()[0, : len(row) + 2].tolist() == expected[0][: len(row) + 2]


# --- whose it is --------------------------------------------------------------------------------


def test_models_share_a_cache_and_find_only_their_own(pair):
    _, model = pair("llama")
    _, other = pair("llama", rope_theta=50000.0)  # the same shapes
    assert model.model.fingerprint != other.model.fingerprint
    assert model.model.fingerprint == fastgen.load(model.directory).model.fingerprint
    cache, row = PrefixCache(), BASE[:100]
    for one in (model, other):
        assert_same(outputs(one, row, SMALL, prefix_cache=cache), outputs(one, row, SMALL))
    assert (cache.hits, cache.misses) == (0, 2)
    for one in (model, other):
        assert_same(outputs(one, row, SMALL, prefix_cache=cache), outputs(one, row, SMALL))
    assert (cache.hits, cache.misses) == (2, 2)


def test_another_weight_is_another_model(pair, tmp_path):
    _, model = pair("gpt2")
    for path in model.directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert fastgen.load(tmp_path).model.fingerprint == model.model.fingerprint
    weights = tmp_path / "model.onnx.data"
    content = bytearray(weights.read_bytes())
    content[1000] ^= 1
    weights.write_bytes(content)
    bundle.sign(tmp_path)
    assert fastgen.load(tmp_path).model.fingerprint != model.model.fingerprint


@pytest.mark.parametrize("call", ["generate", "stream", "score"])
def test_what_is_no_prefix_cache_is_refused(pair, call):
    _, model = pair("llama")
    with pytest.raises(ValueError, match=r"prefix_cache must be a fastgen\.PrefixCache, got"):
        getattr(model, call)([[5, 6]], prefix_cache={})
    with pytest.raises(ValueError, match="prefix_cache keeps a prefix"):
        model.score([[5, 6]], prefix_cache=PrefixCache())
    with pytest.raises(ValueError, match="did you mean prefix_cache"):
        model.generate([[5, 6]], prefix_cach=PrefixCache())
    with pytest.raises(ValueError, match="max_bytes must be positive, got 0"):
        PrefixCache(0)


# --- a plain model of it ------------------------------------------------------------------------

SHAPES = ((2, 3), (1, 2), (2, 3))
SIZE = Cache(SHAPES, 1, 1).nbytes(BLOCK)


def filled(prompt: np.ndarray) -> Cache:
    """A slot whose keys and values tell which tokens they are of, and at which place."""
    cache = Cache(SHAPES, 1, len(prompt))
    for layer, view in enumerate(cache.slots(0, 1)):
        view[0] = (1000 * layer + 10 * np.arange(len(prompt)) + prompt)[:, None]
    cache.lengths[0] = len(prompt)
    return cache


@settings(deadline=None, max_examples=150)
@given(
    room=st.integers(1, 9 * SIZE),
    calls=st.lists(
        st.tuples(st.lists(st.integers(0, 1), max_size=6), st.integers(0, BLOCK - 1)), max_size=25
    ),
)
def test_it_is_a_dictionary_of_prefixes_that_forgets_the_oldest(room, calls):
    cache = PrefixCache(room)
    used: dict[tuple[int, ...], int] = {}  # prefix (a digit a block) -> when it was used last
    for now, (digits, more) in enumerate(calls):
        prompt = np.repeat(np.array([*digits, 2]), BLOCK)[: BLOCK * len(digits) + more + 1]
        found = 0
        while found < len(digits) and tuple(digits[: found + 1]) in used:
            found += 1
        slot = Cache(SHAPES, 1, len(prompt))
        cache.fetch("model", [prompt], slot, 0, BLOCK)
        assert slot.lengths[0] == BLOCK * found
        for mine, right in zip(slot.slots(0, 1), filled(prompt).slots(0, 1), strict=True):
            assert np.array_equal(mine[:, :, : BLOCK * found], right[:, :, : BLOCK * found])

        cache.keep("model", prompt, filled(prompt), 0, 256, {})
        whole = digits + [2] * (len(prompt) // BLOCK - len(digits))
        mine = [tuple(whole[:end]) for end in range(1, len(whole) + 1)][: room // SIZE]
        used.update(dict.fromkeys(mine, now))
        while len(used) * SIZE > room:
            del used[min(used, key=lambda prefix: (used[prefix], -len(prefix)))]
        assert len(cache) == BLOCK * len(used)
        assert cache.nbytes == SIZE * len(used) <= room
    cache.clear()
    assert (len(cache), cache.nbytes) == (0, 0)


def test_what_extends_a_kept_prompt_is_not_kept_twice():
    cache, ids = PrefixCache(), np.arange(5 * BLOCK)
    cache.keep("model", ids[: 3 * BLOCK], filled(ids), 0, 256, {})
    cache.keep("model", ids, filled(ids), 0, 256, {})
    cache.keep("model", ids[: 4 * BLOCK + 1], filled(ids), 0, 256, {})
    assert cache.nbytes == 5 * SIZE and len(cache) == 5 * BLOCK


def test_caches_of_another_type_do_not_meet():
    cache, ids = PrefixCache(), np.arange(2 * BLOCK + 1)
    cache.keep("model", ids, filled(ids), 0, 256, {})
    for other in (Cache(SHAPES[:1], 1, 99), Cache(SHAPES[::-1], 1, 99)):
        cache.fetch("model", [ids], other, 0, BLOCK)
        assert (other.lengths[0] > 0) == (other.layout == filled(ids).layout)


def test_the_arrays_that_are_kept_are_no_views():
    cache, ids = PrefixCache(), np.arange(BLOCK + 1)
    slot = filled(ids)
    cache.keep("model", ids, slot, 0, 256, {})
    for view in slot.slots(0, 1):
        view[:] = 0
    cache.fetch("model", [ids], slot := Cache(SHAPES, 1, 99), 0, BLOCK)
    assert all((view[:, :, 1:BLOCK] > 0).all() for view in slot.slots(0, 1))


# --- threads ------------------------------------------------------------------------------------


def test_threads_may_share_it(pair):
    _, model = pair("llama")
    rows = prompts(8, (90, 4), (90, 9), (64, 20), (40, 41), (33, 1), (0, 70))
    expected = [generate(model, row, SMALL, max_new_tokens=4) for row in rows]
    size = model.model.new_cache(1, 1).nbytes(BLOCK)
    cache, wrong = PrefixCache(4 * size), []

    def work(place: int) -> None:
        for turn in range(8):
            at = (place + turn) % len(rows)
            found = generate(model, rows[at], SMALL, max_new_tokens=4, prefix_cache=cache)
            if found != expected[at]:
                wrong.append(at)
            if cache.nbytes > 4 * size or cache.nbytes != len(cache) // BLOCK * size:
                wrong.append(cache.nbytes)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert cache.hits + cache.misses == 32


# --- files --------------------------------------------------------------------------------------


@pytest.fixture
def kept() -> PrefixCache:
    """Three prompts, the last of which was used last."""
    cache = PrefixCache()
    for first in (1, 2, 3):
        ids = np.arange(3 * BLOCK) + first
        cache.keep("model", ids, filled(ids), 0, 256, {})
    return cache


def finds(cache: PrefixCache, first: int) -> int:
    slot, ids = Cache(SHAPES, 1, 999), np.arange(3 * BLOCK + 1) + first
    cache.fetch("model", [ids], slot, 0, BLOCK)
    held = int(slot.lengths[0])
    for mine, right in zip(slot.slots(0, 1), filled(ids).slots(0, 1), strict=True):
        assert np.array_equal(mine[:, :, :held], right[:, :, :held])
    return held


def test_what_is_saved_is_loaded(kept, tmp_path):
    kept.save(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    again = PrefixCache.load(tmp_path / "file")
    assert (len(again), again.nbytes) == (len(kept), kept.nbytes)
    assert [finds(again, first) for first in (1, 2, 3)] == [3 * BLOCK] * 3
    PrefixCache().save(str(tmp_path / "file"))
    assert len(PrefixCache.load(str(tmp_path / "file"))) == 0


def test_less_room_loads_what_was_used_last(kept, tmp_path):
    finds(kept, 1)
    kept.save(tmp_path / "file")
    again = PrefixCache.load(tmp_path / "file", max_bytes=5 * SIZE + 1)
    assert again.nbytes == 5 * SIZE
    assert [finds(again, first) for first in (1, 2, 3)] == [3 * BLOCK, 0, 2 * BLOCK]
    ids = np.arange(BLOCK) + 9
    again.keep("model", ids, filled(ids), 0, 256, {})  # the end of the oldest goes first
    assert [finds(again, first) for first in (1, 2, 3)] == [2 * BLOCK, 0, 2 * BLOCK]


def test_a_model_goes_on_from_a_file(long, tmp_path):
    cache, row = PrefixCache(), BASE[:300]
    fresh = outputs(long, row, prefix_cache=cache)
    cache.save(tmp_path / "file")
    again = PrefixCache.load(tmp_path / "file")
    assert_same(outputs(long, row, prefix_cache=again), fresh)
    assert again.tokens_reused >= 256


def test_a_file_that_is_not_whole_is_one_clear_error(kept, tmp_path):
    kept.save(tmp_path / "file")
    content = (tmp_path / "file").read_bytes()
    broken = [content[:end] for end in range(0, len(content), len(content) // 40)]
    broken += [b"", b"hello", b"PK\3\4" + bytes(50), content[:2000] + bytes(99) + content[2099:]]
    for bytes_ in broken:
        (tmp_path / "file").write_bytes(bytes_)
        with pytest.raises(ValueError, match="file is truncated or is no file of PrefixCache"):
            PrefixCache.load(tmp_path / "file")


def test_a_foreign_file_is_one_clear_error(tmp_path):
    path = tmp_path / "file.npz"
    np.savez(path, a=np.arange(3))
    with pytest.raises(ValueError, match="no file of PrefixCache"):
        PrefixCache.load(path)
    with path.open("wb") as file:
        np.save(file, np.arange(3))
    with pytest.raises(ValueError, match="no file of PrefixCache"):
        PrefixCache.load(path)
    with path.open("wb") as file:
        np.save(file, np.array([{}]), allow_pickle=True)
    with pytest.raises(ValueError, match="no file of PrefixCache"):
        PrefixCache.load(path)
    forged(path, HEADER | {"format": 3, "names": [], "sizes": []})
    with pytest.raises(ValueError, match=r"has format 3 .* reads format 2"):
        PrefixCache.load(path)
    with pytest.raises(FileNotFoundError):
        PrefixCache.load(tmp_path / "nothing")


def forged(path: Path, header: Any, *blocks: Any, compressed: bool = False) -> Path:
    """A file as `save` writes it, with another header and other blocks: an array or a list each."""
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    parts = {
        f"{place}.{part}": array
        for place, block in enumerate(blocks)
        for part, array in enumerate(block if isinstance(block, list) else [block])
    }
    write = np.savez_compressed if compressed else np.savez
    with path.open("wb") as file:
        write(file, header=np.frombuffer(content, np.uint8), **parts)
    return path


BLOCKS = np.zeros((2, 1, BLOCK, 4), np.float32)
HEADER = {"format": 2, "block": BLOCK, "names": ["00" * 16], "sizes": [BLOCK]}


@pytest.mark.parametrize(
    ("header", "array", "words"),
    [
        (HEADER, BLOCKS.astype(np.float64), "where a block should be"),
        (HEADER | {"sizes": [0]}, BLOCKS, r"it has blocks of \[0\] tokens"),
        (HEADER | {"sizes": [True]}, BLOCKS, r"it has blocks of \[True\] tokens"),
        (HEADER | {"sizes": [32, 32]}, BLOCKS, "it has blocks of"),
        (HEADER, np.asfortranarray(BLOCKS + 1), "says that it is"),
        (HEADER | {"names": ["zz"]}, BLOCKS, "hexadecimal"),
        (HEADER | {"names": ["00", "01"], "sizes": [32, 32]}, BLOCKS, r"it has \[\] where a block"),
        (HEADER | {"names": ["00", "00"]}, BLOCKS, "it has a block twice"),
        (HEADER | {"names": 5}, BLOCKS, "not iterable"),
        ([], BLOCKS, "list indices"),
        (b"[" * 100_000, BLOCKS, "recursion"),
        (b"\xff", BLOCKS, "codec"),
    ],
)
def test_a_forged_file_is_one_clear_error(tmp_path, header, array, words):
    path = forged(tmp_path / "file", header, array)
    with pytest.raises(ValueError, match=rf"file is truncated or is no file.*{words}.*delete it"):
        PrefixCache.load(path)


def test_sizes_are_compared_before_anything_is_read(tmp_path):
    """A header that asks for terabytes, and members that would inflate to them."""
    huge = np.zeros((2, 1, BLOCK, 2**18), np.float32)
    bomb = forged(tmp_path / "bomb", HEADER, huge, compressed=True)
    assert bomb.stat().st_size < huge.nbytes / 100
    with pytest.raises(ValueError, match=r"bomb is truncated .* what it holds is compressed"):
        PrefixCache.load(bomb)
    plain = forged(tmp_path / "plain", HEADER, BLOCKS)
    asks = tmp_path / "asks"
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(asks, "w") as target:
        for name in source.namelist():
            shape = b"(2, 1, 32, 4), }" + b" " * 9
            target.writestr(name, source.read(name).replace(shape, b"(2, 1, 32, 4000000000), }"))
    with pytest.raises(ValueError, match=r"says that it is float32 .*4000000000.*has 1,024 bytes"):
        PrefixCache.load(asks)
    twice = forged(tmp_path / "twice", HEADER, BLOCKS)
    with zipfile.ZipFile(twice) as archive:
        sizes = sum(one.file_size for one in archive.infolist())
    assert sizes <= twice.stat().st_size
    content = twice.read_bytes()
    central = content.index(b"PK\1\2")
    size = (1024 + 128).to_bytes(4, "little")
    forged_size = content[:central] + content[central:].replace(size, b"\0\0\0\x7f")
    twice.write_bytes(forged_size)
    with pytest.raises(ValueError, match="what it holds is larger than itself"):
        PrefixCache.load(twice)


def test_a_block_of_another_shape_is_refused_before_anything_is_taken_in(kept, tmp_path):
    """A file can put any block under any name."""
    ids = np.arange(3 * BLOCK + 1) + 1
    kept.save(tmp_path / "file")
    with np.load(tmp_path / "file") as file:
        saved = dict(file)
    header = json.loads(saved.pop("header").tobytes())
    blocks = [
        [part for name, part in saved.items() if name.startswith(f"{place}.")]
        for place in range(len(header["names"]))
    ]
    forged(tmp_path / "file", header, *blocks)
    assert finds(PrefixCache.load(tmp_path / "file"), 1) == 3 * BLOCK
    for place, size, wrong in (
        (0, BLOCK, [part[..., :1] for part in blocks[0]]),
        (1, BLOCK, blocks[1][:1]),
        (1, BLOCK + 1, blocks[1]),
        (2, BLOCK, [part.astype(np.int8) for part in blocks[2]]),
    ):
        sizes = [*header["sizes"][:place], size, *header["sizes"][place + 1 :]]
        others = [*blocks[:place], wrong, *blocks[place + 1 :]]
        forged(tmp_path / "file", header | {"sizes": sizes}, *others)
        slot = Cache(SHAPES, 1, 999)
        with pytest.raises(ValueError, match=r"keys and values of another shape .* delete it"):
            PrefixCache.load(tmp_path / "file").fetch("model", [ids], slot, 0, BLOCK)
        assert slot.lengths[0] == 0


def test_saving_is_all_or_nothing(kept, tmp_path, monkeypatch):
    PrefixCache().save(tmp_path / "file")
    before = (tmp_path / "file").read_bytes()

    def full(file: Any, **_: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space"):
        kept.save(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_command_line_keeps_a_file(pair, tmp_path):
    directory, file = pair("gpt2")[1].directory, tmp_path / "kept"
    text = "The quick brown fox jumps over the lazy dog. " * 2
    flags = ["-m", directory, "--max-new-tokens", "5"]
    expected = run("generate", text, *flags)
    assert run("generate", text, *flags, "--prefix-cache", file) == expected
    size = len(PrefixCache.load(file))
    assert size >= BLOCK
    assert run("generate", text, *flags, "--prefix-cache", file) == expected
    assert len(PrefixCache.load(file)) == size
    for more in (["--json"], ["--num-beams", "2"]):
        with_file = run("generate", text, *flags, *more, "--prefix-cache", file)
        assert with_file == run("generate", text, *flags, *more)
    Path(file).write_bytes(b"no such thing")
    code, out, err = run("generate", text, *flags, "--prefix-cache", file)
    assert (code, out) == (2, "") and "no file of PrefixCache" in err and err.count("\n") == 1
