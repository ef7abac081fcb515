"""Calls that come and go: each gets what it gets alone, and nobody stands still for long."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np
import numpy_model
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import core

from fastgen import PrefixCache
from fastgen.engine.cache import Cache
from fastgen.engine.model import Model
from fastgen.engine.prefill import CHUNK
from fastgen.engine.schedule import Scheduler, bytes_of, fitting_chunk
from fastgen.engine.speculative import SpeculationBudget

EXAMPLES = int(os.environ.get("FASTGEN_EXAMPLES", "12"))

KNOBS = (
    {},
    {"do_sample": True, "seed": 3, "top_k": 20},
    {"do_sample": True, "seed": 4, "num_return_sequences": 3},
    {"num_beams": 3, "num_return_sequences": 2},
    {"prompt_lookup_num_tokens": 4},
    {"repetition_penalty": 1.4},
    {"no_repeat_ngram_size": 2, "eos_token_id": None},
    {"eos_token_id": [7, 8, 9], "do_sample": True, "seed": 1},
)


def alone(model, prompt, knobs):
    """The tokens of each row of a call when nothing else runs."""
    rows: dict[int, list[int]] = {}
    for token in model.stream([prompt], **knobs):
        rows.setdefault(token.row, []).append(token.id)
    return rows


def run(scheduler, arrivals, cancels=()):
    """Submit call i before step `arrivals[i]`; returns each call's tokens by row, and the steps."""
    got = {id(call): {} for _, call in arrivals}
    waiting, step = sorted(arrivals, key=lambda one: one[0]), 0
    while waiting or not scheduler.idle:
        while waiting and waiting[0][0] <= step:
            scheduler.submit(waiting.pop(0)[1])
        for at, call in cancels:
            if at == step:
                scheduler.cancel(call)
        for call, events in scheduler.step():
            for event in events:
                got[id(call)].setdefault(event.row.index, []).append(event.token)
        step += 1
        assert step < 5000
    return [got[id(call)] for _, call in arrivals], step


@pytest.mark.parametrize("name", ["gpt2", "llama", "mamba", *core(*numpy_model.KINDS)])
def test_each_call_gets_what_it_gets_alone(name, pair):
    _, model = pair(name)

    @settings(max_examples=EXAMPLES, deadline=None)
    @given(st.integers(0, 2**32 - 1))
    def check(seed):
        random = np.random.default_rng(seed)
        arrivals, expected = [], []
        for _ in range(int(random.integers(1, 12))):
            knobs = KNOBS[int(random.integers(len(KNOBS)))]
            knobs = {**knobs, "max_new_tokens": int(random.integers(1, 24))}
            prompt = random.integers(3, 90, int(random.choice([1, 5, 31, 70, 100]))).tolist()
            expected.append(alone(model, prompt, knobs))
            arrivals.append((int(random.integers(0, 30)), model.call([prompt], **knobs)))
        cancelled = [
            (int(random.integers(0, 40)), call) for _, call in arrivals if random.random() < 0.2
        ]
        scheduler = Scheduler(
            model.model,
            max_rows=int(random.choice([4, 16])),
            chunk=32,
            prefix_cache=PrefixCache() if random.random() < 0.5 else None,
        )
        got, _ = run(scheduler, arrivals, cancelled)
        left = {id(call) for _, call in cancelled}
        for (_, call), mine, whole in zip(arrivals, got, expected, strict=True):
            assert call.request.error is None
            if id(call) not in left:
                assert mine == whole
            for row, tokens in mine.items():  # what came before it was cancelled
                assert tokens == whole[row][: len(tokens)]
        assert (scheduler.rows, scheduler.waiting, scheduler.held) == (0, 0, 0)
        scheduler.close()

    check()


def test_an_error_is_its_own(pair):
    """A call that rules out every token, and one whose function fails, disturb nobody."""
    _, model = pair("gpt2")

    def wrong(ids, scores):
        raise KeyError("mine")

    prompt, knobs = [5, 6, 7], {"max_new_tokens": 12, "do_sample": True, "seed": 1}
    nothing = {"logit_bias": {token: -np.inf for token in range(model.model.info.vocab_size)}}
    calls = [
        model.call([prompt], **knobs),
        model.call([prompt], **knobs, **nothing),
        model.call([prompt], **knobs, logits_processor=[wrong]),
        model.call([prompt], max_new_tokens=4, num_beams=2, logits_processor=[wrong]),
        model.call([prompt], **knobs | {"seed": 2}),
    ]
    got, _ = run(Scheduler(model.model, chunk=32), [(0, call) for call in calls])
    assert got[0] == alone(model, prompt, knobs)
    assert got[4] == alone(model, prompt, knobs | {"seed": 2})
    assert "ruled out" in str(calls[1].request.error)
    assert isinstance(calls[2].request.error, KeyError)
    assert isinstance(calls[3].request.error, KeyError)
    assert got[1:4] == [{}, {}, {}]


def test_a_short_prompt_overtakes_a_long_one_that_is_being_read(pair):
    _, model = pair("gpt2")
    random = np.random.default_rng(0)
    long = model.call([random.integers(3, 90, 120).tolist()], max_new_tokens=4)
    other = model.call([random.integers(3, 90, 119).tolist()], max_new_tokens=4)
    short = model.call([[5, 6, 7]], max_new_tokens=4)
    scheduler, began = Scheduler(model.model, chunk=32), []
    for call in (long, other, short):
        scheduler.submit(call)
    while not scheduler.idle:
        began += [call for call, _ in scheduler.step() if call not in began]
    assert began == [short, long, other]


def test_running_rows_advance_while_a_prompt_is_read(pair):
    """Between two of their tokens there is one chunk, and one step of one search."""
    _, model = pair("gpt2")
    random = np.random.default_rng(0)
    scheduler, read = Scheduler(model.model, chunk=32), []
    forward = model.model.forward

    def counted(new, *rest):
        read.append(max(map(len, new)))
        return forward(new, *rest)

    running = model.call([[5, 6, 7]], max_new_tokens=60, eos_token_id=None)
    scheduler.submit(running)
    scheduler.step()
    model.model.forward = counted
    try:
        for _ in range(3):
            scheduler.submit(model.call([random.integers(3, 90, 100).tolist()], max_new_tokens=2))
            scheduler.submit(model.call([[9, 8, 7]], max_new_tokens=5, num_beams=2))
        while not scheduler.idle:
            before = len(read)
            out = scheduler.step()
            if not running.request.done:
                assert any(call is running for call, _ in out)
            assert len(read) - before <= 3 and max(read[before:], default=0) <= 32
    finally:
        del model.model.forward


LONG = np.random.default_rng(9).integers(3, 90, 100).tolist()
DEMANDING = {
    "a long prompt": ([LONG], {}),
    "many prompts": ([LONG[:20], LONG[:30], LONG[5:40], LONG[9:30]], {}),
    "many sequences": ([LONG], {"do_sample": True, "seed": 1, "num_return_sequences": 8}),
    "beams of many prompts": ([LONG[:20], LONG[:30], LONG[5:40]], {"num_beams": 3}),
    "a negative prompt": ([[5, 6]], {"guidance_scale": 1.5, "negative_prompt_ids": [LONG]}),
    "beams with a negative prompt": (
        [[5, 6]], {"guidance_scale": 1.5, "negative_prompt_ids": [LONG], "num_beams": 3}
    ),
    "long guesses": ([[*range(5, 15)] * 6], {"prompt_lookup_num_tokens": 60}),
    "an assistant": (
        [LONG, LONG[3:60]],
        {"assistant_model": True, "num_assistant_tokens": 60, "assistant_confidence_threshold": 0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", DEMANDING)
def test_no_call_keeps_others_waiting_for_more_than_a_chunk(what, pair, monkeypatch):
    """A running row gets a token every step, and a step is so many tokens, whatever a call holds.

    It is measured in tokens that are read, padding included: by the prompts a chunk, by the rows
    that run and by a search (and what guesses for it) another one each.
    """
    _, model = pair("llama")
    monkeypatch.setattr(SpeculationBudget, "allowed", lambda self, remaining: remaining)
    prompts, knobs = DEMANDING[what]
    if "assistant_model" in knobs:
        knobs = {**knobs, "assistant_model": model}
    expected = model.generate(prompts, max_new_tokens=12, eos_token_id=None, **knobs)
    call = model.call(prompts, max_new_tokens=12, eos_token_id=None, **knobs)
    read: list[int] = []
    plain = Model.forward

    def counted(self, new, *rest, **more):
        read.append(len(new) * max(map(len, new)))
        return plain(self, new, *rest, **more)

    monkeypatch.setattr(Model, "forward", counted)
    scheduler = Scheduler(model.model, chunk=32)
    neighbour = model.call([[5, 6, 7]], max_new_tokens=60, eos_token_id=None)
    scheduler.submit(neighbour)
    scheduler.step()
    scheduler.submit(call)
    while not call.request.done:
        read.clear()
        told = {id(one): len(events) for one, events in scheduler.step()}
        assert told.get(id(neighbour)) == 1
        assert max(read) <= 32 and sum(read) <= 4 * 32
    assert call.request.error is None
    assert call.request.sequences().tolist() == expected
    scheduler.close()


def test_what_does_not_fit_waits_in_order_and_what_never_fits_is_refused(pair):
    _, model = pair("gpt2")
    calls = [model.call([[5, 6, place]], max_new_tokens=6) for place in range(7, 12)]
    most = 2 * bytes_of(calls[0])
    scheduler, ended = Scheduler(model.model, max_bytes=most, chunk=32), []
    for call in calls:
        scheduler.submit(call)
    with pytest.raises(ValueError, match=r"may need [\d,]+ bytes of memory, calls have"):
        scheduler.submit(model.call([[5, 6]], max_new_tokens=100))
    with pytest.raises(ValueError, match="90 rows or beams, 64 may run here"):
        Scheduler(model.model).submit(model.call([[5]], max_new_tokens=2, num_beams=90))
    while not scheduler.idle:
        ended += [call for call, _ in scheduler.step() if call.request.done]
        assert scheduler.held <= most and scheduler.rows <= 2
    assert ended == calls


def test_memory_that_rows_have_reached_is_given_back(pair):
    """Slots whose rows have left do not keep what those reached for ever."""
    _, model = pair("gpt2")
    random = np.random.default_rng(0)
    call = model.call([random.integers(3, 90, 100).tolist()], max_new_tokens=2)
    scheduler = Scheduler(model.model, max_bytes=2 * bytes_of(call), chunk=32)
    cache = scheduler.cache
    for _ in range(20):
        scheduler.submit(model.call([random.integers(3, 90, 100).tolist()], max_new_tokens=2))
        scheduler.submit(model.call([[5, 6, 7]], max_new_tokens=8))
    while not scheduler.idle:
        scheduler.step()
        assert cache.reached() * model.model.info.cache_bytes <= scheduler.max_bytes


def test_buffers_are_no_larger_than_the_machine_allows(pair):
    """They are as long as the longest row: a long one waits, and then they are made anew."""
    _, model = pair("gpt2")
    token, knobs = model.model.info.cache_bytes, {"max_new_tokens": 20, "eos_token_id": None}
    prompt = [*range(3, 98)]
    short = [model.call([[5, 6, place]], max_new_tokens=4) for place in range(7, 16)]
    long, later = model.call([prompt], **knobs), model.call([prompt[:80]], max_new_tokens=4)
    most = 4 * (long.request.max_length + CHUNK) * token
    scheduler = Scheduler(model.model, max_bytes=most, chunk=32, max_buffers=0)
    for call in (*short, long, later):
        scheduler.submit(call)
    waited, cancelled = False, False
    while not scheduler.idle:
        scheduler.step()
        waited = waited or (scheduler.rows < 5 and scheduler.waiting == 2)
        if (
            later in [entry.job for entry in scheduler.planner.begun] and not cancelled
        ):  # while it is being read
            scheduler.cancel(later)
            cancelled = True
            scheduler.submit(model.call([[5, 6, 7]], max_new_tokens=4))
        assert scheduler.rows * scheduler.planner.longest() * token <= most
        assert scheduler.cache.size <= 2 * most
    assert waited and cancelled
    assert [call.request.error for call in (*short, long)] == [None] * 10
    assert long.request.rows[0].generated.tolist() == alone(model, prompt, knobs)[0]


@pytest.mark.parametrize("bad", [{"max_bytes": 0}, {"max_rows": -1}, {"chunk": 0}, {"chunk": 40}])
def test_settings_that_cannot_be(bad, pair):
    _, model = pair("gpt2")
    with pytest.raises(ValueError, match=next(iter(bad))):
        Scheduler(model.model, **bad)


def test_a_chunk_that_takes_too_long_is_cut(pair):
    _, model = pair("gpt2")
    assert fitting_chunk(model.model)[0] == 256
    assert fitting_chunk(model.model, stall=0.0)[0] == 64


def test_calls_with_equal_knobs_go_through_their_processors_together(pair):
    _, model = pair("gpt2")
    knobs = {"do_sample": True, "top_k": 7, "repetition_penalty": 1.2}
    one = model.call([[5, 6]], seed=1, max_new_tokens=3, **knobs)
    other = model.call([[7, 8, 9]], seed=2, max_new_tokens=9, stop_strings=None, **knobs)
    assert one.request.chain is other.request.chain
    assert (
        one.request.chain
        is not model.call([[5]], max_new_tokens=3, **knobs | {"top_k": 8}).request.chain
    )


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="asks Linux")
def test_what_no_row_reaches_takes_no_memory() -> None:
    def resident() -> int:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * mmap.PAGESIZE

    cache = Cache([(4, 64)] * 8, rows=16, capacity=4096)
    before = resident()
    for view in cache.slots(0, 16):
        view[:, :, :10] = 1
    assert cache.size == 2**30
    assert resident() - before < 2**25
