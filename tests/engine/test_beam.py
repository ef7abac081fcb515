"""Beams: what transformers finds, in tokens, scores and beam indices; and diverse beams.

A difference is forgiven as a tie only if, in transformers' own run, two numbers that it compares
are less than 1e-5 apart (see `closest`): neighbours among the best candidates of a step, among
the sequences that have ended, or the two sides of the rule that stops the search.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from beam_ties import TIE, closest
from hypothesis import given
from hypothesis import strategies as st
from tiny import left_padded, ragged
from transformers import StoppingCriteriaList

from fastgen.engine.beam import run as beams
from fastgen.engine.cache import Cache
from fastgen.sampling import sampler
from fastgen.sampling.softmax import log_softmax, normalisers

KINDS = ["gpt2", "llama"]
DICT = {"return_dict_in_generate": True, "output_scores": True}
ties: list[Any] = []


def compare(pair: Any, rows: list[list[int]], seed: int | None = None, **knobs: Any) -> Any:
    """Generate with both and insist on the same; returns what transformers gave."""
    theirs, ours = pair
    ids, mask = left_padded(rows)
    given = {"do_sample": False, "max_new_tokens": 12, "attention_mask": mask, **DICT, **knobs}
    if seed is not None:
        torch.manual_seed(seed)
    expected = theirs.generate(ids, **given)
    given = {"do_sample": False, "max_new_tokens": 12, **DICT, **knobs}
    found = ours.generate(ids, attention_mask=mask, seed=seed, **given)
    same = torch.equal(expected.sequences, found.sequences)
    if not same and seed is None:
        gap = closest(
            theirs,
            ids,
            {"do_sample": False, "max_new_tokens": 12, **DICT, **knobs, "attention_mask": mask},
        )
        if gap < TIE:
            ties.append((rows, knobs, gap))
            return expected
    assert same, (rows, knobs, expected.sequences, found.sequences)
    if given.get("output_scores"):
        np.testing.assert_allclose(
            found.sequences_scores, expected.sequences_scores, rtol=1e-4, atol=1e-4
        )
        assert len(found.scores) == len(expected.scores)
        for mine, other in zip(found.scores, expected.scores, strict=True):
            assert mine.shape == tuple(other.shape)
    assert np.asarray(found.beam_indices).dtype == np.int32
    np.testing.assert_array_equal(found.beam_indices, expected.beam_indices)
    # Prompts whose search is over leave the batch if nobody looks at their scores.
    bare = {**given, "return_dict_in_generate": False, "output_scores": False}
    again = ours.generate(ids, attention_mask=mask, seed=seed, **bare)
    assert torch.equal(again, found.sequences), "prompts that leave change the result"
    return expected


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny models are slower with more, and much slower where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def ends(pair):
    """`ends(kind, count)`: tokens that beams of this model often come to, to serve as eos."""

    def find(kind: str, rows: list[list[int]], count: int) -> list[int]:
        theirs, _ = pair(kind)
        ids, mask = left_padded(rows)
        found = theirs.generate(
            ids,
            attention_mask=mask,
            num_beams=4,
            num_return_sequences=4,
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
        )
        tokens, counts = found[:, ids.shape[1] + 2 :].unique(return_counts=True)
        order = counts.argsort(descending=True)
        return tokens[order].tolist()[1 : 1 + count]  # the second: not all end at once

    return find


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("num_beams", [2, 3, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_beams_are_those_of_transformers(pair, ends, kind, num_beams, early_stopping):
    """One kind has every other setting, the second the rest: a search sees logits only."""
    before, ended, late, first = len(ties), 0, 0, KINDS.index(kind)
    for rows in ([[5, 6, 7]], ragged(1), ragged(21, (9, 2, 14))):
        eos = ends(kind, rows, 3)
        settings = itertools.product((-1.0, 0.0, 0.5, 1.0, 2.0), (None, eos[0], eos))
        for place, (length_penalty, eos_token_id) in list(enumerate(settings))[first::2]:
            returned = num_beams if place % 4 else 1
            out = compare(
                pair(kind),
                rows,
                num_beams=num_beams,
                early_stopping=early_stopping,
                length_penalty=length_penalty,
                eos_token_id=eos_token_id,
                num_return_sequences=returned,
                pad_token_id=0,
            )
            lengths = (out.beam_indices >= 0).sum(dim=1)
            ended += int((lengths < 12).sum())
            late += int((lengths == 12).sum())
    assert ended > 25 and late > 10, "the eos ids are chosen so that some end and some do not"
    assert len(ties) - before <= 2, ties[before:]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "knobs",
    [
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 7},
        {"repetition_penalty": 0.8, "renormalize_logits": True},
        {"bad_words_ids": [[3], [20, 21]], "sequence_bias": {(7,): 2.0, (44, 44): -1.5}},
        {"forced_eos_token_id": 2, "max_new_tokens": 6},
        {"suppress_tokens": [3, 20, 44, 48], "exponential_decay_length_penalty": (2, 1.4)},
        {"encoder_repetition_penalty": 1.4, "encoder_no_repeat_ngram_size": 2},
        {"max_new_tokens": 1},
        {"pad_token_id": 3},
        {"output_logits": True, "output_scores": False},
    ],
    ids=lambda knobs: next(iter(knobs)),
)
def test_processors_act_on_beams(pair, ends, kind, knobs):
    rows = ragged(2, (4, 9, 6))
    for eos, num_beams in itertools.product((1, 2), (2, 4)):
        knobs = {"eos_token_id": ends(kind, rows, eos), "pad_token_id": 0, **knobs}
        compare(pair(kind), rows, num_beams=num_beams, num_return_sequences=2, **knobs)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_logits_of_a_step_are_those_of_transformers(pair, kind):
    theirs, ours = pair(kind)
    rows = ragged(3, (4, 9))
    ids, mask = left_padded(rows)
    knobs = {"num_beams": 3, "max_new_tokens": 8, "output_logits": True, "do_sample": False,
             "repetition_penalty": 1.2, "eos_token_id": None, **DICT}  # fmt: skip
    expected = theirs.generate(ids, attention_mask=mask, **knobs)
    found = ours.generate(rows, **knobs)
    for name in ("scores", "logits"):
        for mine, other in zip(found[name], expected[name], strict=True):
            np.testing.assert_allclose(mine, other, rtol=1e-4, atol=2e-5)
    gathered = theirs.compute_transition_scores(
        torch.tensor(found.sequences),
        tuple(map(torch.tensor, found.scores)),
        torch.tensor(found.beam_indices),
        normalize_logits=False,
    )
    np.testing.assert_allclose(gathered.sum(dim=1) / 8, found.sequences_scores, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "knobs",
    [
        {"num_beams": 2},
        {"num_beams": 3, "temperature": 0.7},
        {"num_beams": 3, "temperature": 1.5, "top_k": 0},
        {"num_beams": 4, "top_k": 0, "top_p": 0.9},
        {"num_beams": 5, "top_k": 7, "repetition_penalty": 1.2},
        {"num_beams": 2, "early_stopping": True, "length_penalty": 2.0, "min_p": 0.01},
    ],
    ids=str,
)
def test_beam_sampling_repeats_a_seed_of_torch(pair, ends, kind, knobs):
    rows = ragged(4, (4, 9, 6))
    for seed, count in itertools.product(range(6), (0, 1, 2)):
        eos = ends(kind, rows, count) or None
        compare(
            pair(kind),
            rows,
            seed,
            do_sample=True,
            eos_token_id=eos,
            pad_token_id=0,
            num_return_sequences=2,
            **knobs,
        )


def test_a_seed_for_each_prompt_is_the_prompt_alone(pair, ends):
    _, ours = pair("llama")
    rows = ragged(5, (4, 9, 1, 6))
    knobs = {"do_sample": True, "num_beams": 3, "top_k": 0, "eos_token_id": ends("llama", rows, 2),
             "pad_token_id": 0, "max_new_tokens": 12}  # fmt: skip
    seeds = [7, 8, 7, 9]
    together = ours.generate(rows, seed=seeds, **knobs)
    for row, seed, out in zip(rows, seeds, together, strict=True):
        alone = ours.generate(row, seed=seed, **knobs)[0]
        assert out[9 - len(row) :][: len(alone)] == alone
    with pytest.raises(ValueError, match="3 values for 4"):
        ours.generate(rows, seed=[1, 2, 3], **knobs)


@pytest.mark.parametrize("knobs", [{}, {"num_beam_groups": 2, "diversity_penalty": 1.0}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_together_are_prompts_alone(pair, ends, kind, knobs):
    _, ours = pair(kind)
    rows = ragged(6, (2, 31, 7, 19, 5, 1, 26, 12))
    knobs = {"num_beams": 4, "num_return_sequences": 2, "eos_token_id": ends(kind, rows, 2),
             "pad_token_id": 0, "max_new_tokens": 20, **knobs}  # fmt: skip
    together = ours.generate(rows, **knobs)
    for place, row in enumerate(rows):
        for out, alone in zip(together[2 * place :], ours.generate(row, **knobs), strict=False):
            assert out[31 - len(row) :][: len(alone)] == alone
            assert set(out[31 - len(row) + len(alone) :]) <= {0, knobs["eos_token_id"][0]}


def test_callers_criteria_act_on_candidates(pair):
    rows = ragged(7, (4, 9))
    theirs, ours = pair("gpt2")
    ids, mask = left_padded(rows)
    knobs = {"num_beams": 3, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **DICT}
    for stop in ({20, 42}, {3}, {48, 44, 7, 3}, set(range(99))):
        expected = theirs.generate(
            ids,
            attention_mask=mask,
            **knobs,
            stopping_criteria=StoppingCriteriaList(
                [lambda ids, scores, stop=stop: torch.isin(ids[:, -1], torch.tensor([*stop]))]
            ),
        )
        seen = []

        def criterion(ids: Any, scores: Any, stop: set[int] = stop, seen: Any = seen) -> Any:
            seen.append((len(scores), ids.shape[1] - 9, {step.shape for step in scores}))
            return np.isin(ids[:, -1], [*stop])

        found = ours.generate(rows, stopping_criteria=[criterion], **knobs)
        assert found.sequences == expected.sequences.tolist()
        np.testing.assert_array_equal(found.beam_indices, expected.beam_indices)
        assert all(one == (step, step, {(6, 99)}) for step, one in enumerate(seen, 1))
        assert set(found.finish_reasons) <= {"criterion", "length", "eos"}
        # A stop text is asked in the same place.
        request = ours._call(rows, knobs=knobs).request
        request.stop_text = lambda ids, stop=stop: int(ids[-1]) in stop
        list(beams.search(ours.model, request))
        assert request.sequences().tolist() == found.sequences


def test_stop_strings_end_beams(pair):
    theirs, ours = pair("llama")
    rows = ragged(12, (4, 9))
    ids, mask = left_padded(rows)
    knobs = {"num_beams": 4, "num_return_sequences": 3, "max_new_tokens": 12, "do_sample": False,
             "pad_token_id": 0, "eos_token_id": 2, "suppress_tokens": [2]}  # fmt: skip
    free = ours.generate(rows, **knobs)
    text = ours.tokenizer.decode(free[0][12:14])
    expected = theirs.generate(
        ids, attention_mask=mask, stop_strings=[text], tokenizer=tiny.tokenizer(), **knobs
    )
    assert expected.tolist() != free
    assert ours.generate(rows, stop_strings=[text], **knobs) == expected.tolist()


def test_guidance_acts_on_beams(pair, ends):
    rows = ragged(13, (4, 9, 6))
    knobs = {"num_beams": 4, "guidance_scale": 1.7, "pad_token_id": 0}
    compare(pair("llama"), rows, **knobs, eos_token_id=ends("llama", rows, 1))
    knobs |= {"num_beam_groups": 2, "diversity_penalty": 1e-9, "max_new_tokens": 8}
    knobs |= {"eos_token_id": None, "num_return_sequences": 4}
    together = pair("llama")[1].generate(rows[:1], **knobs)
    assert together[0] == together[1], "both groups see their own rows of the guidance"


def test_the_clock_ends_the_search(pair):
    theirs, ours = pair("gpt2")
    knobs = {"num_beams": 3, "max_new_tokens": 12, "max_time": 1e-9, "do_sample": False}
    expected = theirs.generate(torch.tensor([[5, 6, 7]]), **knobs)
    assert expected.shape == (1, 4)
    found = ours.generate([5, 6, 7], return_dict_in_generate=True, **knobs)
    assert found.sequences == expected.tolist() and found.finish_reasons == ["time"]


def test_callers_processors_see_beams_as_in_transformers(pair):
    theirs, ours = pair("llama")
    rows = ragged(8, (4, 9))
    ids, mask = left_padded(rows)
    knobs = {"num_beams": 3, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    shapes = []

    def processor(ids: Any, scores: Any) -> Any:
        shapes.append((tuple(ids.shape), tuple(scores.shape)))
        scores[:, ids[:, -1] % 50] -= 1.0
        return scores

    allowed = [[3, 9, 20, 44], list(range(40, 99))]
    expected = theirs.generate(
        ids,
        attention_mask=mask,
        logits_processor=[processor],
        **knobs,
        prefix_allowed_tokens_fn=lambda batch_id, ids: allowed[batch_id],
    )
    theirs_saw = shapes[:]
    shapes.clear()
    found = ours.generate(
        rows,
        logits_processor=[processor],
        **knobs,
        prefix_allowed_tokens_fn=lambda batch_id, ids: allowed[batch_id],
    )
    assert found == expected.tolist()
    assert shapes == theirs_saw


def test_beams_are_told_as_a_stream(pair, ends):
    _, ours = pair("llama")
    rows = ragged(9, (4, 9))
    knobs = {"num_beams": 3, "num_return_sequences": 2, "eos_token_id": ends("llama", rows, 2),
             "max_new_tokens": 10, "repetition_penalty": 1.1, "top_logprobs": 2}  # fmt: skip
    whole = ours.generate(rows, **DICT, **knobs)
    tokens = list(ours.stream(rows, **knobs))
    for place, out in enumerate(whole.sequences):
        mine = [token for token in tokens if token.row == place]
        assert out[9:][: len(mine)] == [token.id for token in mine]
        assert [token.finish_reason for token in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1].finish_reason == whole.finish_reasons[place] != ""
        for step, token in enumerate(mine):
            scores = log_softmax(whole.scores[step][whole.beam_indices[place, step]][None])
            assert token.logprob == pytest.approx(scores[0, token.id], abs=1e-5)
            best = np.sort(scores[0])[::-1][:2]
            np.testing.assert_allclose([p for _, p in token.top_logprobs], best, atol=1e-5)
        assert [token.top_logprobs for token in mine] == whole.top_logprobs[place]


def test_a_prompt_is_prefilled_once_and_only_differences_move(pair, monkeypatch):
    _, ours = pair("llama")
    row = ragged(10, (40,))[0]
    fed, moved = [], []
    forward, copy = type(ours.model).forward, Cache._copy

    def counted(self: Any, new: Any, *args: Any) -> Any:
        fed.append(sum(map(len, new)))
        return forward(self, new, *args)

    def watched(self: Any, sources: Any, slots: Any, start: int, end: int) -> None:
        moved.append((start, end))
        copy(self, sources, slots, start, end)

    monkeypatch.setattr(type(ours.model), "forward", counted)
    monkeypatch.setattr(Cache, "_copy", watched)
    ours.generate(row, num_beams=4, max_new_tokens=20, eos_token_id=None)
    assert fed == [40] + [4] * 19
    first, later = moved[:3], moved[3:]
    assert first == [(0, 40)] * 3, "the prompt is copied to the other beams"
    assert later and all(start >= 40 for start, _ in later)
    assert sum(end - start for start, end in later) < 4 * sum(range(20)) / 4


@pytest.mark.parametrize(
    ("knobs", "text"),
    [
        ({"num_beams": 4, "num_beam_groups": 3, "diversity_penalty": 1.0}, "multiple"),
        ({"num_beams": 1, "num_beam_groups": 2, "diversity_penalty": 1.0}, "multiple"),
        ({"num_beams": 4, "num_beam_groups": 2}, "diversity_penalty above 0"),
        ({"num_beams": 4, "diversity_penalty": 1.0}, "needs num_beam_groups"),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0, "do_sample": True},
         "cannot be sampled"),
        ({"num_beams": 4, "eos_token_id": list(range(99))}, "candidates"),
    ],
)  # fmt: skip
def test_knobs_that_do_not_fit_are_errors(pair, knobs, text):
    with pytest.raises(ValueError, match=text):
        pair("gpt2")[1].generate([5, 6], max_new_tokens=3, **knobs)


class Silent:
    put = end = print


def test_beams_cannot_be_streamed_to_a_streamer(pair):
    with pytest.raises(ValueError, match="num_beams=2"):
        pair("gpt2")[1].generate([5, 6], num_beams=2, max_new_tokens=3, streamer=Silent())


# -- Diverse beam search, against loops written from the paper and the scorer's rules ------------


def slow_groups(
    theirs: Any,
    prompt: list[int],
    *,
    beams: int,
    groups: int,
    diversity: float,
    eos: list[int],
    new: int,
    length_penalty: float,
    early: Any,
    wanted: int,
    banned: list[int] | None = None,
) -> tuple[list[list[int]], list[float], list[list[int]]]:
    """Sequences (after the prompt), scores and beam indices of one prompt, with plain loops."""
    size = beams // groups
    running = [[(0.0 if b == 0 else -1e9, [], []) for b in range(size)] for _ in range(groups)]
    ended: list[list[tuple[float, list[int], list[int]]]] = [[] for _ in range(groups)]
    done = [False] * groups
    pad = 0

    def add(group: int, total: float, tokens: list[int], lines: list[int]) -> None:
        score = total / len(tokens) ** length_penalty
        kept = ended[group]
        if len(kept) < size or score > min(kept)[0]:
            kept.append((score, tokens, lines))
            if len(kept) > size:
                kept.remove(min(kept, key=lambda one: one[0]))

    for step in range(new):
        taken: list[int] = []  # by earlier groups in this step
        for group in range(groups):
            if done[group]:
                running[group] = [(s, t + [pad], ls) for s, t, ls in running[group]]
                taken += [pad] * size
                continue
            options = []
            for place, (total, tokens, lines) in enumerate(running[group]):
                ids = torch.tensor([prompt + tokens])
                logits = theirs(ids).logits[0, -1].float()
                scores = logits.log_softmax(0)
                for token in taken:
                    scores[token] -= diversity
                if banned is not None:  # these, and what is there already
                    scores[sorted({*banned, *prompt, *tokens})] = -torch.inf
                absolute = group * size + place
                for token, value in enumerate(scores.tolist()):
                    sequence = (tokens + [token], lines + [absolute])
                    options.append((np.float32(total) + np.float32(value), *sequence))
            options.sort(key=lambda option: -option[0])
            options = options[: max(2, 1 + len(eos)) * size]
            following = []
            for rank, (total, tokens, lines) in enumerate(options):
                if tokens[-1] in eos:
                    if rank < size:
                        add(group, float(total), tokens, lines)
                elif len(following) < size:
                    following.append((float(total), tokens, lines))
                if len(following) == size:
                    break
            running[group] = following
            taken += [tokens[-1] for _, tokens, _ in following]
            if len(ended[group]) == size:
                length = new if early == "never" and length_penalty > 0 else step + 1
                best = float(options[0][0]) / length**length_penalty
                done[group] = early is True or min(ended[group])[0] >= best
        if all(done):
            break
    for group in range(groups):
        if not done[group]:
            for total, tokens, lines in running[group]:
                add(group, total, tokens, lines)
    # Groups may end alike: what has ended is not counted against later groups. Of equals, the last.
    best = sorted((one for kept in ended for one in kept), key=lambda one: one[0])[::-1][:wanted]
    return [b[1] for b in best], [b[0] for b in best], [b[2] for b in best]


@pytest.mark.parametrize("early", [True, False, "never"])
@pytest.mark.parametrize(
    ("kind", "beams", "groups"),
    [("gpt2", 2, 2), ("llama", 4, 2), ("gpt2", 6, 3), ("gpt2", 6, 2)],  # the loops see logits only
)
def test_diverse_beams_are_those_of_the_slow_loops(pair, ends, kind, beams, groups, early):
    theirs, ours = pair(kind)
    rows = ragged(11, (4, 9, 6))
    for length_penalty, diversity, count in [
        (1.0, 0.7, 0),
        (0.0, 2.0, 1),
        (-0.5, 0.3, 2),
        (2.0, 5.0, 2),
    ]:
        eos = ends(kind, rows, count)
        found = ours.generate(
            rows,
            num_beams=beams,
            num_beam_groups=groups,
            diversity_penalty=diversity,
            length_penalty=length_penalty,
            early_stopping=early,
            eos_token_id=eos or None,
            pad_token_id=0,
            max_new_tokens=10,
            num_return_sequences=beams,
            no_repeat_ngram_size=1 if count == 2 else 0,
            **DICT,
        )
        for place, row in enumerate(rows):
            padding = [0] if len(row) < 9 else []  # is there already, in transformers' eyes
            with torch.no_grad():
                tokens, scores, lines = slow_groups(
                    theirs,
                    row,
                    beams=beams,
                    groups=groups,
                    diversity=diversity,
                    eos=eos,
                    new=10,
                    length_penalty=length_penalty,
                    early=early,
                    wanted=beams,
                    banned=padding if count == 2 else None,
                )
            mine = slice(place * beams, (place + 1) * beams)
            np.testing.assert_allclose(found.sequences_scores[mine], scores, atol=1e-4)
            for out, indices, expected, line in zip(
                found.sequences[mine], found.beam_indices[mine], tokens, lines, strict=True
            ):
                assert out[9 : 9 + len(expected)] == expected
                assert set(out[9 + len(expected) :]) <= {0}
                assert indices[: len(line)].tolist() == [place * beams + i for i in line]
                assert set(indices[len(line) :].tolist()) <= {-1}


def test_equal_scores_in_a_group_are_no_error(pair):
    """Every token is equally likely: all that ends has the score of something else."""
    knobs = {"num_beams": 6, "num_beam_groups": 2, "diversity_penalty": 1.0, "max_new_tokens": 5,
             "eos_token_id": [5, 6], "num_return_sequences": 6}  # fmt: skip
    flat = [lambda ids, scores: np.zeros_like(scores)]
    out = pair("gpt2")[1].generate([7, 8], logits_processor=flat, **knobs)
    assert len(out) == 6


def test_groups_differ(pair):
    _, ours = pair("gpt2")
    knobs = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 6, "eos_token_id": None}
    diverse = ours.generate([5, 6, 7], num_beam_groups=4, diversity_penalty=50.0, **knobs)
    for step in range(3, 9):
        assert len({out[step] for out in diverse}) == 4


# -- The parts -----------------------------------------------------------------------------------


@given(st.data())
def test_largest_is_a_full_sort(data):
    seed = data.draw(st.integers(0, 2**32 - 1))
    random = np.random.default_rng(seed)
    size = data.draw(st.sampled_from([3, 50, 700, 5000]))
    count = data.draw(st.integers(1, min(size, 24)))
    values = random.integers(-9, 9, size).astype(np.float32)
    if data.draw(st.booleans()):
        values = random.standard_normal(size).astype(np.float32)
    values[random.random(size) < data.draw(st.sampled_from([0, 0.5, 0.999, 1]))] = -np.inf
    expected = np.argsort(-values, kind="stable")[:count]
    np.testing.assert_array_equal(sampler.largest(values, count), expected)


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 6]), st.sampled_from([0.0, 0.5, 0.99]))
def test_several_draws_are_torchs(seed, count, dead):
    random = np.random.default_rng(seed)
    scores = (3 * random.standard_normal(500)).astype(np.float32)
    scores[random.random(500) < dead] = -np.inf
    scores[0] = 0
    if np.isfinite(scores).sum() < count:
        return
    torch.manual_seed(seed)
    expected = torch.multinomial(torch.tensor(scores).softmax(0), count)
    found = sampler.sample_several(scores, sampler.Stream(seed, 1).row(0, 0, 500), count)
    assert found.tolist() == expected.tolist()


@given(st.integers(0, 2**32 - 1))
def test_cache_take_moves_what_differs(seed):
    random = np.random.default_rng(seed)
    cache = Cache([(2, 3), (1, 4), (2, 3)], 6, 9)
    for view in cache.slots(0, 6):
        view[:] = random.standard_normal(view.shape)
        view[:, :, :2] = view[:1, :, :2]
    cache.lengths[:] = random.integers(3, 10, 6)
    before = [view.copy() for view in cache.slots(0, 6)]
    lengths = cache.lengths.copy()
    parents = random.integers(0, 6, random.integers(1, 7))
    starts = random.integers(0, 3, len(parents))
    cache.take(parents, starts)
    assert cache.lengths.tolist() == [*lengths[parents], *[0] * (6 - len(parents))]
    for old, new in zip(before, cache.slots(0, 6), strict=True):
        for slot, parent in enumerate(parents):
            held = lengths[parent]
            np.testing.assert_array_equal(new[slot, :, :held], old[parent, :, :held])


@pytest.mark.parametrize("case", range(120))
def test_continuations_are_the_largest_sums_to_the_bit(case):
    """Beside the scores of everything: ties, impossible tokens and beams that count as dead."""
    random = np.random.default_rng(case)
    rows, vocab = int(random.integers(1, 6)), int(random.choice([50, 99, 333, 5000]))
    count = min(int(random.choice([2, 4, 8, 15])), vocab)
    logits = random.standard_normal((rows, vocab)) * random.choice([0.001, 1, 10])
    logits = (logits.round(1) if case % 3 == 0 else logits).astype(np.float32)
    if case % 5 == 0:
        logits[random.random((rows, vocab)) < 0.3] = -np.inf
    slots = random.permutation(rows)
    before = (-10 * random.random(rows)).astype(np.float32)
    if case % 4 == 0:
        before[1:] = -1e9
    everything = log_softmax(logits)[slots]
    sums = everything + before[:, None]
    places = sampler.largest(sums.ravel(), count)
    top, norm = normalisers(logits)
    totals, parents, tokens, own = sampler.continuations(logits, top, norm, slots, before, count)
    assert (parents * vocab + tokens).tolist() == places.tolist()
    assert totals.tolist() == sums.ravel()[places].tolist()
    assert own.tolist() == everything[parents, tokens].tolist()
