"""What `/metrics` shows: requests, tokens and the times between them, rows, queue, prefix cache."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from fastgen.output import Token

if TYPE_CHECKING:
    from fastgen.serve.engine import Engine, Stream

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class _Known:
    """What an engine, its scheduler and its prefix cache count themselves, read when asked for."""

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
            ("fastgen_prefix_cache_tokens_reused", "tokens that were not read again",
             cache.tokens_reused),
        ):  # fmt: skip
            yield CounterMetricFamily(name, what, value=value)


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
        self.new_tokens = Counter("fastgen_generated_tokens", "new tokens", registry=self.registry)
        self.first = Histogram(
            "fastgen_time_to_first_token_seconds", "from a call's arrival to its first token",
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self.between = Histogram(
            "fastgen_time_between_tokens_seconds", "from one step of a call to its next",
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self._latest: dict[int, float] = {}  # of each stream, by id: when its last tokens came

    def watch(self, engine: Engine) -> None:
        """Show what the engine knows by itself."""
        self.registry.register(_Known(engine))

    def step(self, news: list[tuple[Stream, list[Token]]]) -> None:
        """Note what a step brought."""
        now = time.perf_counter()
        for stream, tokens in news:
            if tokens:
                self.new_tokens.inc(len(tokens))
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
