"""The counts at `/metrics`: requests, tokens, times between them, rows, queue, prefix cache."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)

from fastgen.engine.score import Scoring

if TYPE_CHECKING:
    from fastgen.serve.engine import Engine, Progress

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class _Known:
    """Counts of an engine, its scheduler and its prefix cache, read when asked for."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def collect(self) -> Iterator[Any]:
        cache, scheduler = self.engine.prefix_cache, self.engine.scheduler
        for name, what, value in (
            ("fastgen_rows_running", "rows that run or are being read", scheduler.rows),
            ("fastgen_calls_waiting", "calls that wait for room", self.engine.waiting),
            ("fastgen_bytes_promised", "that running calls may come to hold", scheduler.held),
            ("fastgen_prefix_cache_bytes", "of prompts that are kept", cache.nbytes),
        ):
            yield GaugeMetricFamily(name, what, value=value)
        for name, what, value in (
            ("fastgen_prefix_cache_hits", "prompts that were found in part", cache.hits),
            ("fastgen_prefix_cache_misses", "prompts that were not", cache.misses),
            (
                "fastgen_prefix_cache_tokens_reused",
                "tokens that were not read again",
                cache.tokens_reused,
            ),
        ):
            yield CounterMetricFamily(name, what, value=value)


class Times:
    """A histogram of seconds. (prometheus_client's own looks at every bucket, at every token.)"""

    def __init__(self, name: str, what: str) -> None:
        self.name, self.what = name, what
        self.counts, self.sum = [0] * (len(SECONDS) + 1), 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(SECONDS, seconds)] += 1
        self.sum += seconds

    def collect(self) -> Iterator[Any]:
        bounds = [*map(str, SECONDS), "+Inf"]
        buckets = list(zip(bounds, accumulate(self.counts), strict=True))
        yield HistogramMetricFamily(self.name, self.what, buckets=buckets, sum_value=self.sum)


class Metrics:
    """Counts of one engine, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "fastgen_requests", "HTTP requests", ["route", "status"], registry=self.registry
        )
        self.prompt_tokens = Counter(
            "fastgen_prompt_tokens", "tokens of prompts", registry=self.registry
        )
        self.scored_tokens = Counter(
            "fastgen_scored_tokens", "tokens of prompts that were scored", registry=self.registry
        )
        self.new_tokens = Counter("fastgen_generated_tokens", "new tokens", registry=self.registry)
        self.first = Times(
            "fastgen_time_to_first_token_seconds", "from a call's arrival to its first token"
        )
        self.between = Times(
            "fastgen_time_between_tokens_seconds", "from one step of a call to its next"
        )
        self.registry.register(self.first)
        self.registry.register(self.between)
        self._latest: dict[int, float] = {}  # of each call, by id: when its last tokens came

    def watch(self, engine: Engine) -> None:
        """Show the engine's own counts."""
        self.registry.register(_Known(engine))

    def step(self, steps: list[Progress]) -> None:
        """Count a step of some calls."""
        now = time.perf_counter()
        if count := sum(len(progress.tokens) for progress in steps):
            self.new_tokens.inc(count)
        for stream, tokens, _, _ in steps:
            if isinstance(stream.call, Scoring):
                if stream.done and stream.error is None:
                    self.scored_tokens.inc(len(stream.call.logprobs))
            elif tokens:
                before = self._latest.get(id(stream))
                if before is None:
                    self.prompt_tokens.inc(sum(map(len, stream.call.request.prompts)))
                    self.first.observe(now - stream.begun)
                else:
                    self.between.observe(now - before)
                self._latest[id(stream)] = now
            if stream.done:
                self._latest.pop(id(stream), None)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        shown: bytes = generate_latest(self.registry)
        return shown
