"""Laws that hold whatever the model says."""

from __future__ import annotations

import threading

import numpy as np
import numpy_model
import pytest
import tiny
from calls import generate
from tiny import core, ragged

import fastgen
from fastgen.engine import batch, prefill
from fastgen.engine.model import SPARE_BYTES
from fastgen.sampling import sampler
from fastgen.text.tokenizer import TextStream

KINDS = ["gpt2", "llama", "gemma2", *core(*numpy_model.KINDS)]
SAMPLING = {"do_sample": True, "top_k": 20, "top_p": 0.95, "temperature": 0.9}


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_batched_is_single(pair, kind):
    _, model = pair(kind)
    rows = ragged(4, (2, 31, 7, 19, 5, 1, 26, 12))
    together = model.generate(rows, max_new_tokens=12)
    for row, out in zip(rows, together, strict=True):
        alone = model.generate(row, max_new_tokens=12)[0]
        assert out[31 - len(row) :][: len(alone)] == alone
        assert set(out[31 - len(row) + len(alone) :]) <= {0}


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_with_a_seed_a_row_is_single(pair, kind):
    _, model = pair(kind)
    rows = ragged(5, (2, 17, 7, 9, 5, 1, 13, 12))
    seeds = [11, 12, 13, 14, 11, 2**40, 0, 7]
    together = model.generate(rows, max_new_tokens=12, seed=seeds, **SAMPLING)
    for row, seed, out in zip(rows, seeds, together, strict=True):
        alone = model.generate(row, max_new_tokens=12, seed=seed, **SAMPLING)[0]
        assert out[17 - len(row) :][: len(alone)] == alone


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [1, 5, 16])
def test_chunked_prefill_is_whole(pair, kind, chunk):
    _, model = pair(kind)
    rows = ragged(6, (40, 33, 2))
    whole = model.generate(rows, max_new_tokens=8)
    chunks = prefill.Chunks(chunk, 3 * chunk)
    assert generate(model, rows, chunks, max_new_tokens=8) == whole


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_is_returned(pair, kind):
    _, model = pair(kind)
    for knobs in ({}, {"seed": 3, **SAMPLING}):
        rows = ragged(7, (4, 9))
        tokens = list(model.stream(rows, max_new_tokens=10, **knobs))
        whole = model.generate(rows, max_new_tokens=10, **knobs)
        for place, out in enumerate(whole):
            mine = [token.id for token in tokens if token.row == place]
            assert out[9:][: len(mine)] == mine
            assert all(token.logprob <= 0 for token in tokens)


@pytest.mark.parametrize("kind", ["llama", *core("demo")])
def test_streamed_text_is_completed_text(pair, kind):
    _, model = pair(kind)
    text = "The quick na\u00efve \u4f60\u597d fox"
    knobs = {"max_new_tokens": 40, "seed": 1, "do_sample": True, "top_k": 0}
    pieces = [token.text for token in model.stream(text, **knobs)]
    assert "".join(pieces) == model.complete(text, **knobs)
    assert model.complete([text], **knobs) == [model.complete(text, **knobs)]


@pytest.mark.parametrize("kind", KINDS)
def test_first_of_several_sequences_is_a_prompt_prefilled_once(pair, kind):
    _, model = pair(kind)
    rows = ragged(8, (4, 9))
    out = model.generate(
        rows, num_return_sequences=3, seed=[1, 2, 3, 4, 5, 6], max_new_tokens=9, **SAMPLING
    )
    for place, seed in enumerate([1, 2, 3, 4, 5, 6]):
        row = rows[place // 3]
        alone = model.generate(row, seed=seed, max_new_tokens=9, **SAMPLING)[0]
        assert out[place][9 - len(row) :][: len(alone)] == alone


@pytest.mark.parametrize("kind", ["llama", *core("numpy")])
@pytest.mark.parametrize("seed", [7, [1, 2, 3]], ids=["one", "each its own"])
def test_what_was_drawn_is_not_kept(pair, kind, seed, monkeypatch):
    kept, row = [], sampler.Stream.row

    def counted(self, *place):
        words = row(self, *place)
        kept.append(self.kept)
        return words

    monkeypatch.setattr(sampler.Stream, "row", counted)
    _, model = pair(kind)
    model.generate(ragged(8, (4, 9, 6)), seed=seed, max_new_tokens=9, **SAMPLING)
    assert len(kept) > 9 and max(kept) == 1


@pytest.mark.parametrize("kind", ["llama", *core(*numpy_model.KINDS)])
def test_rows_that_join_late_change_nothing(pair, kind):
    """A server's rows: they join while others run, and leave at different times."""
    _, model = pair(kind)
    rows = ragged(9, (5, 12, 3, 20))
    alone = [model.generate(row, max_new_tokens=4 + 3 * i)[0] for i, row in enumerate(rows)]
    running = batch.Batch(model.model)
    requests = []
    for i, row in enumerate(rows):
        requests.append(model._call(row, knobs={"max_new_tokens": 4 + 3 * i}).request)
        running.add(requests[-1])
        running.step()
    while running.rows:
        running.step()
    for request, expected in zip(requests, alone, strict=True):
        assert request.sequences()[0].tolist() == expected


@pytest.mark.parametrize("kind", ["gpt2", *core(*numpy_model.KINDS)])
def test_threads_may_share_a_model(pair, kind):
    _, model = pair(kind)
    rows = [ragged(seed, (6,))[0] for seed in range(6)]
    expected = [model.generate(row, max_new_tokens=12) for row in rows]
    found: dict[int, object] = {}

    def run(place: int) -> None:
        found[place] = model.generate(rows[place], max_new_tokens=12)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(rows))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(len(rows))] == expected


@pytest.mark.parametrize("kind", ["llama", *core(*numpy_model.KINDS)])
def test_a_step_allocates_nothing_that_grows_with_the_context(pair, kind):
    _, model = pair(kind)
    running = batch.Batch(model.model)
    knobs = {"max_new_tokens": 60, "eos_token_id": None}
    running.add(model._call(ragged(1, (5, 9)), knobs=knobs).request)
    running.step()
    running.step()
    buffers = [view.ctypes.data for view in running.cache.slots(0, 2)]
    bound = dict(running.cache.bindings)
    for _ in range(50):
        running.step()
        assert [view.ctypes.data for view in running.cache.slots(0, 2)] == buffers
        assert running.cache.bindings == bound


@pytest.mark.parametrize("kind", ["gpt2", *core("numpy")])
def test_inputs_are_not_changed(pair, kind):
    _, model = pair(kind)
    ids = np.array([[0, 5, 6], [7, 8, 9]])
    mask = np.array([[0, 1, 1], [1, 1, 1]])
    model.generate(ids, attention_mask=mask, max_new_tokens=3)
    assert ids.tolist() == [[0, 5, 6], [7, 8, 9]] and mask.tolist() == [[0, 1, 1], [1, 1, 1]]


@pytest.mark.parametrize("kind", ["gpt2", *core("demo")])
@pytest.mark.parametrize("seed", range(20))
def test_streamed_text_never_shows_half_a_character(pair, kind, seed):
    _, model = pair(kind)
    tokenizer: fastgen.Tokenizer = model.tokenizer
    random = np.random.default_rng(seed)
    text = "".join(random.choice(list("ab \u00ef\u4f60\U0001f642\u597d\u00e9")) for _ in range(30))
    ids = tokenizer.encode(text)
    cut = int(random.integers(0, 4))
    stream = TextStream(tokenizer, ids[:cut])
    context = tokenizer.decode(ids[:cut])
    pieces = [stream.push(i) for i in ids[cut:]]
    assert not any("\ufffd" in piece for piece in pieces[1:]) or "\ufffd" in context
    shown = "".join([*pieces, stream.end()])
    if "\ufffd" not in context:
        assert context + shown == tokenizer.decode(ids)


def test_broken_bytes_come_out_as_they_decode(pair):
    _, model = pair("gpt2")
    tokenizer = model.tokenizer
    random = np.random.default_rng(0)
    for _ in range(50):
        ids = random.integers(3, tiny.VOCAB - 2, 25).tolist()
        stream = TextStream(tokenizer)
        shown = "".join([*(stream.push(i) for i in ids), stream.end()])
        assert shown == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["llama", *core(*numpy_model.KINDS)])
def test_a_call_leaves_nothing_to_the_next_but_memory(pair, kind):
    """Calls of other sizes, searches and an abandoned stream in between change nothing."""
    _, model = pair(kind)
    rows = ragged(8, (9, 3, 30))
    first = model.generate(rows, max_new_tokens=12)
    for knobs in ({"num_beams": 3}, {"do_sample": True, "seed": 1}, {"max_new_tokens": 60}):
        model.generate(rows[:1], **{"max_new_tokens": 20, **knobs})
        assert model.generate(rows, max_new_tokens=12) == first
    stream = model.stream(rows, max_new_tokens=12)
    next(stream)
    assert model.generate(rows, max_new_tokens=12) == first
    stream.close()
    assert model.generate(rows, max_new_tokens=12) == first
    kept, made = (model.model.borrow_cache(1, 8) for _ in range(2))
    assert kept.capacity >= 256 and made.capacity == 8  # one was kept
    model.model.give_back(kept)


@pytest.mark.parametrize("kind", ["gpt2", *core(*numpy_model.KINDS)])
def test_a_processor_may_keep_what_it_sees(pair, kind):
    _, model = pair(kind)
    seen = []

    def look(_, scores):
        seen.append(scores)
        return scores

    out = model.generate(
        [5, 6, 7],
        max_new_tokens=5,
        suppress_tokens=[4],
        logits_processor=[look],
        output_scores=True,
        return_dict_in_generate=True,
    )
    assert len(seen) == len(out.scores) > 1
    assert all(np.array_equal(*pair) for pair in zip(seen, out.scores, strict=True))


@pytest.mark.parametrize("kind", ["gpt2", *core(*numpy_model.KINDS)])
def test_memory_of_a_call_serves_the_next(pair, kind):
    _, model = pair(kind)
    model.generate(ragged(9, (20, 4)), max_new_tokens=8)
    kept = model.model.borrow_cache(1, 1)
    model.model.give_back(kept)
    model.generate(ragged(10, (7,)), max_new_tokens=8)
    assert model.model.borrow_cache(1, 1) is kept and kept.capacity % 256 == 0
    model.model.give_back(kept)


def test_a_large_cache_is_not_kept(pair):
    _, model = pair("gemma2")
    model.model.borrow_cache(1, 1)  # without giving it back
    many = SPARE_BYTES // model.model.new_cache(1, 8).size + 1
    for rows, is_kept in ((1, True), (many, False)):
        cache = model.model.new_cache(rows, 8)
        model.model.give_back(cache)
        assert (model.model.borrow_cache(1, 7) is cache) == is_kept
    assert model.model.borrow_cache(1, 7).capacity == 7  # a new one
