"""The plan of a step: the jobs let in, the chunk read, the search that steps. No model runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastgen.engine.cuts import Cuts
from fastgen.engine.plan import Entry, Plan, Planner, Work

MANY = 1_000_000


@dataclass
class Reading:
    """Prompts that are being read, so many tokens of which are left."""

    left: int


def planner(**limits: Any) -> Planner:
    usual = {
        "max_bytes": MANY,
        "max_rows": 64,
        "cuts": Cuts(32, 32, True),
        "max_tokens": MANY,
        "margin": 0,
    }
    return Planner(**usual | limits)


def entry(job: str, work: Work = Work.ROWS, **numbers: int) -> Entry:
    return Entry(job, work, **{"rows": 1, "bytes": 1, "prompt": 40, "longest": 50} | numbers)


def jobs(entries) -> str:
    return " ".join(entry.job for entry in entries)


def shown(plan: Plan) -> tuple[str, str, str | None, str | None]:
    """The jobs of a plan: let in, begun, scored, searched."""
    one = [None if found is None else found.job for found in (plan.score, plan.search)]
    return jobs(plan.enter), jobs(plan.begin), one[0], one[1]


def test_nothing_waits_and_nothing_is_planned():
    assert planner().plan([]) == Plan([], None, [], None, None)


def test_jobs_enter_in_order_and_nobody_overtakes():
    plan = planner(max_bytes=5)
    plan.waiting.extend([entry("a", bytes=3), entry("b", bytes=3), entry("c", bytes=1)])
    first = plan.plan([])
    assert jobs(first.enter) == "a" and jobs(plan.waiting) == "b c"
    assert (plan.rows, plan.held) == (1, 3)
    plan.leave(first.enter[0])
    assert jobs(plan.plan([]).enter) == "b c" and (plan.rows, plan.held) == (2, 4)


def test_rows_are_limited():
    plan = planner(max_rows=4)
    plan.waiting.extend([entry("a", rows=3), entry("b", rows=2), entry("c")])
    assert jobs(plan.plan([]).enter) == "a"


def test_a_long_row_waits_until_the_cache_has_room_but_never_alone():
    plan = planner(max_tokens=100)
    plan.waiting.extend([entry("short", longest=20), entry("long", longest=400)])
    (short,) = plan.plan([]).enter
    assert jobs(plan.waiting) == "long"
    plan.leave(short)
    assert jobs(plan.plan([]).enter) == "long" and plan.longest() == 400


def test_a_job_that_waits_can_leave():
    plan = planner()
    one = entry("a")
    plan.waiting.append(one)
    plan.leave(one)
    assert not plan.waiting and (plan.rows, plan.held) == (0, 0)


def test_short_prompts_begin_together_if_one_chunk_holds_them():
    plan = planner()
    plan.waiting.extend(entry(name, prompt=10) for name in "abcd")
    assert shown(plan.plan([])) == ("a b c d", "a b c", None, None)
    assert jobs(plan.begun) == "a b c" and jobs(plan.unread) == "d"


def test_prompts_begin_apart_if_they_would_be_read_one_after_the_other():
    plan = planner(cuts=Cuts(256, 256, True))
    prompts = {"a": 64, "b": 60, "c": 64, "d": 20, "e": 21}
    plan.waiting.extend(entry(name, prompt=tokens) for name, tokens in prompts.items())
    assert [jobs(plan.plan([]).begin) for _ in range(2)] == ["a b c", "d e"]


def test_prompts_with_caches_of_their_own_begin_apart():
    plan = planner()
    plan.waiting.extend([entry("a", prompt=10, read_with=1), entry("b", prompt=10, read_with=2)])
    assert jobs(plan.plan([]).begin) == "a"


def test_the_oldest_and_the_nearest_to_its_end_take_turns():
    plan, long, short = planner(), Reading(500), Reading(20)
    assert [plan.plan([long, short]).read for _ in range(4)] == [long, short, long, short]


def test_a_short_prompt_overtakes_a_long_one_every_other_step():
    plan, long = planner(), Reading(500)
    plan.waiting.append(entry("short", prompt=5))
    first, second = plan.plan([long]), plan.plan([long])
    assert first.read is long and not first.begin
    assert second.read is None and jobs(second.begin) == "short"


def test_texts_are_scored_in_turns_and_let_prompts_read_in_between():
    plan = planner()
    plan.waiting.extend([entry("a", Work.SCORING), entry("b", Work.SCORING)])
    assert [plan.plan([]).score.job for _ in range(3)] == ["a", "b", "a"]
    reading = Reading(100)
    plans = [plan.plan([reading]) for _ in range(4)]
    assert [one.read for one in plans] == [reading, None, reading, None]
    assert [one.score and one.score.job for one in plans] == [None, "b", None, "a"]


def test_searches_step_in_turns_beside_what_is_read():
    plan, reading = planner(), Reading(9)
    plan.waiting.extend([entry("a", Work.SEARCH), entry("b", Work.SEARCH)])
    plans = [plan.plan([reading]) for _ in range(3)]
    assert [one.search.job for one in plans] == ["a", "b", "a"]
    assert all(one.read is reading for one in plans)
    plan.leave(plans[0].search)
    assert plan.plan([]).search.job == "b"
