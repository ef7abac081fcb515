"""What `/metrics` shows: requests, tokens and the times between them, rows, queue, prefix cache."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from fastgen.output import Token

if TYPE_CHECKING:
    from fastgen.serve.engine import Engine, Stream

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


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
        cache, scheduler = engine.prefix_cache, engine.scheduler
        for name, what, value in (
            ("fastgen_rows_running", "rows that run or are being read", lambda: scheduler.rows),
            ("fastgen_calls_waiting", "calls that wait for room", lambda: engine.waiting),
            ("fastgen_bytes_promised", "that running calls may come to hold",
             lambda: scheduler.held),
            ("fastgen_prefix_cache_bytes", "of prompts that are kept", lambda: cache.nbytes),
            ("fastgen_prefix_cache_hits", "prompts that were found in part", lambda: cache.hits),
            ("fastgen_prefix_cache_misses", "prompts that were not", lambda: cache.misses),
            ("fastgen_prefix_cache_tokens_reused", "tokens that were not read again",
             lambda: cache.tokens_reused),
        ):  # fmt: skip
            Gauge(name, what, registry=self.registry).set_function(value)

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
        return generate_latest(self.registry)
