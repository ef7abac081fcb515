"""The counts at `/metrics`, by model, under the names that vLLM gives them.

A board that was drawn for vLLM shows a service of fastgen's once `vllm:` in it is `fastgen:`.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import prometheus_client
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)

from fastgen.engine.score import Scoring
from fastgen.serve.answers import REASONS

if TYPE_CHECKING:
    from fastgen.engine.call import Call
    from fastgen.engine.prefix_cache import PrefixCache
    from fastgen.serve.engine import Engine, Progress, RunningCall

PREFIX = "fastgen:"
LABEL = "model_name"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
# Why a row has ended (see `fastgen.Token`), in vLLM's words.
ENDED = {"cancelled": "abort", "error": "error"} | REASONS

COUNTERS = {
    "prompt_tokens": "tokens of prompts",
    "generation_tokens": "new tokens",
    "scored_tokens": "tokens of texts that were scored",
    "prefix_cache_queries": "tokens of prompts that were looked for among those that are kept",
    "prefix_cache_hits": "tokens of prompts that were found there, and not read again",
}
GAUGES = {
    "num_requests_running": "calls that run or are being read; each prompt of a request is one",
    "num_requests_waiting": "calls that wait for room",
    "num_rows_running": "rows that run or are being read",
    "kv_cache_usage_perc": "of the memory that calls may come to hold, what running ones may: 0-1",
    "promised_bytes": "that running calls may come to hold",
    "prefix_cache_bytes": "of prompts that are kept",
    "model_loaded": "1 while the model is loaded",
}
HISTOGRAMS = {
    "time_to_first_token_seconds": ("from a call's arrival to its first token", SECONDS),
    "inter_token_latency_seconds": ("from one step of a call to its next", SECONDS),
    "e2e_request_latency_seconds": ("from a call's arrival to its end", SECONDS),
    "request_queue_time_seconds": ("that a call waited until its prompt was begun", SECONDS),
    "request_prefill_time_seconds": ("from there to its first token", SECONDS),
    "request_decode_time_seconds": ("from its first token to its end", SECONDS),
    "request_prompt_tokens": ("tokens of a call's prompts", TOKENS),
    "request_generation_tokens": ("new tokens of a call", TOKENS),
}


class Histogram:
    """A histogram. (prometheus_client's own looks at every bucket, at every token.)"""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts, self.sum = [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def buckets(self) -> list[tuple[str, int]]:
        bounds = [*map(str, self.bounds), "+Inf"]
        return list(zip(bounds, accumulate(self.counts), strict=True))


class ModelMetrics:
    """Counts of one model, whether it is loaded or not.

    Args:
        prefix_cache: what is kept of its prompts.
    """

    def __init__(self, prefix_cache: PrefixCache) -> None:
        self.prefix_cache = prefix_cache
        self.prompt_tokens = self.generation_tokens = self.scored_tokens = 0
        self.ended: Counter[str] = Counter()
        self.histograms = {name: Histogram(bounds) for name, (_, bounds) in HISTOGRAMS.items()}
        self._first = self.histograms["time_to_first_token_seconds"]
        self._between = self.histograms["inter_token_latency_seconds"]
        self._engine: Engine | None = None
        self._tokens: dict[int, tuple[float, float]] = {}  # when its first and last came, by call

    def watch(self, engine: Engine | None) -> None:
        """Show an engine's own counts; None once it has ended."""
        self._engine = engine
        self._tokens.clear()

    def step(self, steps: list[Progress]) -> None:
        """Count a step of some calls."""
        now = time.perf_counter()
        for stream, tokens, _, _ in steps:
            if isinstance(stream.call, Scoring):
                if stream.done and stream.error is None:
                    self.scored_tokens += len(stream.call.logprobs)
                continue
            if tokens:
                self.generation_tokens += len(tokens)
                times = self._tokens.get(id(stream))
                if times is None:
                    self.prompt_tokens += sum(map(len, stream.call.request.prompts))
                    self._first.observe(now - stream.begun)
                    self._tokens[id(stream)] = now, now
                else:
                    self._between.observe(now - times[1])
                    self._tokens[id(stream)] = times[0], now
            if stream.done:
                self._end(stream, stream.call, now)

    def _end(self, stream: RunningCall, call: Call, now: float) -> None:
        """Count a call that is over."""
        request, (first, _) = call.request, self._tokens.pop(id(stream), (None, None))
        for row in request.rows:
            reason = "error" if stream.error else row.finish_reason or "cancelled"
            self.ended[ENDED.get(reason, "stop")] += 1
        seen = self.histograms
        seen["e2e_request_latency_seconds"].observe(now - stream.begun)
        seen["request_prompt_tokens"].observe(sum(map(len, request.prompts)))
        new = sum(row.length - request.prompt_length for row in request.rows)
        seen["request_generation_tokens"].observe(new)
        if request.started is not None:
            seen["request_queue_time_seconds"].observe(max(0.0, request.started - stream.begun))
            if first is not None:
                seen["request_prefill_time_seconds"].observe(first - request.started)
                seen["request_decode_time_seconds"].observe(now - first)

    def counters(self) -> dict[str, float]:
        cache = self.prefix_cache
        return {
            "prompt_tokens": self.prompt_tokens,
            "generation_tokens": self.generation_tokens,
            "scored_tokens": self.scored_tokens,
            "prefix_cache_queries": cache.tokens_queried,
            "prefix_cache_hits": cache.tokens_reused,
        }

    def gauges(self) -> dict[str, float]:
        engine = self._engine
        out = dict.fromkeys(GAUGES, 0.0)
        if engine is not None:
            scheduler, waiting = engine.scheduler, engine.waiting
            out |= {
                "num_requests_running": max(0, engine.running - waiting),
                "num_requests_waiting": waiting,
                "num_rows_running": scheduler.rows,
                "kv_cache_usage_perc": scheduler.held / scheduler.max_bytes,
                "promised_bytes": scheduler.held,
                "prefix_cache_bytes": self.prefix_cache.nbytes,
                "model_loaded": 1,
            }
        return out


class Metrics:
    """Counts of a service, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = prometheus_client.Counter(
            "http_requests",
            "HTTP requests",
            ["handler", "method", "status"],
            registry=self.registry,
        )
        self._models: dict[str, ModelMetrics] = {}
        self.registry.register(self)

    def of(self, name: str, prefix_cache: PrefixCache) -> ModelMetrics:
        """The counts of a model, which are shown from now on."""
        self._models[name] = ModelMetrics(prefix_cache)
        return self._models[name]

    def collect(self) -> Iterator[Any]:
        """The counts of the models, as Prometheus's client wants them."""
        counters = {name: model.counters() for name, model in self._models.items()}
        gauges = {name: model.gauges() for name, model in self._models.items()}
        for kind, described, values in (
            (CounterMetricFamily, COUNTERS, counters),
            (GaugeMetricFamily, GAUGES, gauges),
        ):
            for metric, what in described.items():
                family = kind(PREFIX + metric, what, labels=[LABEL])
                for name in self._models:
                    family.add_metric([name], values[name][metric])
                yield family
        for metric, (what, _) in HISTOGRAMS.items():
            histogram = HistogramMetricFamily(PREFIX + metric, what, labels=[LABEL])
            for name, model in self._models.items():
                shown = model.histograms[metric]
                histogram.add_metric([name], shown.buckets(), shown.sum)
            yield histogram
        ends = CounterMetricFamily(
            PREFIX + "request_success", "sequences by their end", labels=[LABEL, "finished_reason"]
        )
        for name, model in self._models.items():
            for reason in ("stop", "length", "abort", "error"):
                ends.add_metric([name, reason], model.ended[reason])
        yield ends

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        shown: bytes = generate_latest(self.registry)
        return shown
