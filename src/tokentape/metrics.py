"""Counters and histograms of one gateway, in a registry of its own: no globals."""

from collections import Counter as Counts
from collections.abc import Iterator, Sequence
from typing import Protocol

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)
_CHANGES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_TOKENS = (16, 64, 256, 1024, 4096, 16384, 65536, 262144)


class Metrics:
    """What a gateway counts. Labels are small closed sets: reasons, statuses, kinds of errors."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"tokentape_{name}", text, labels, registry=self.registry)

        self.turns = counter("turns", "Committed turns by finish reason", "finish_reason")
        self.branches = counter("branches", "Turns that started a branch, by reason", "reason")
        self.failures = counter("failures", "Turns that were not committed, by kind of error", "kind")
        self.refusals = counter("refusals", "Requests refused before a turn, by kind of error", "kind")
        self.parse_statuses = counter("parse_statuses", "Committed turns by parse status", "status")
        self.foreign_calls = counter(
            "foreign_calls", "Turns with another format's call in the text", "format"
        )
        self.extended = counter("extended_turns", "Turns whose prompt extends a recorded turn's")
        self.trained_tokens = counter("trained_tokens", "Sampled tokens of finished sessions")
        self.answered_again = counter("answered_again", "Requests that got the answer of an earlier one")
        self.resumed = counter("resumed", "Generations that went on after an abort, each time")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of committed turns")
        self.cached_tokens = counter("cached_tokens", "Prompt tokens that the engine had cached")
        self.sampled_tokens = counter("sampled_tokens", "Sampled tokens of committed turns")
        self.rendered_tokens = counter("rendered_tokens", "Tokens that had to be tokenised: new text only")
        self.neutralised = counter("neutralised", "Control tokens of untrusted text that stayed text")
        self.ignored_fields = counter("ignored_fields", "Request fields without effect")
        self.active_turns = Gauge("tokentape_active_turns", "Turns under way", registry=self.registry)
        self.waiting_turns = Gauge(
            "tokentape_waiting_turns", "Requests that wait for their turn", registry=self.registry
        )
        self.sessions = Gauge("tokentape_sessions_in_memory", "Sessions in memory", registry=self.registry)
        self.session_bytes = Gauge(
            "tokentape_session_bytes", "What they take, roughly", registry=self.registry
        )
        stages = Histogram(
            "tokentape_stage_seconds",
            "A turn's time by stage: plan (prefix and bridge), engine (generation, parsing), commit (store)",
            ["stage"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.plan_seconds, self.engine_seconds, self.commit_seconds = map(
            stages.labels, ("plan", "engine", "commit")
        )
        self.first_token_seconds = Histogram(
            "tokentape_first_token_seconds",
            "Streams: from the request to its first token",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.store_seconds = Histogram(
            "tokentape_store_seconds", "Transactions of the store", buckets=_SECONDS, registry=self.registry
        )
        self.store_changes = Histogram(
            "tokentape_store_changes",
            "Changes that shared a transaction",
            buckets=_CHANGES,
            registry=self.registry,
        )
        self.store_errors = counter("store_errors", "Transactions that failed")
        self.turn_seconds = Histogram(
            "tokentape_turn_seconds", "Whole turns", buckets=_SECONDS, registry=self.registry
        )
        self.prompt_length = Histogram(
            "tokentape_prompt_length", "Prompt tokens of a turn", buckets=_TOKENS, registry=self.registry
        )

    def watch_workers(self, pool: "Pool") -> None:
        """Report what a pool of engines knows of its workers, whenever somebody asks."""
        self.registry.register(_Workers(pool))

    def to_text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)


class PoolWorker(Protocol):
    """One engine: generations by `outcomes`, "ok" or the kind of the error; tokens of prompts, and cached."""

    url: str
    num_running: int
    num_ejections: int
    outcomes: Counts[str]
    num_prompt: int
    num_cached: int

    @property
    def state(self) -> str:
        """Whether it is in use."""
        ...


class Pool(Protocol):
    """Several engines; `moved` counts what went on at another one, by the kind of error."""

    moved: Counts[str]

    @property
    def workers(self) -> Sequence[PoolWorker]:
        """All of them."""
        ...


class _Workers(Collector):
    """The pool's own counts: nothing is counted twice on the way."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def collect(self) -> Iterator[Metric]:
        rows = self._pool.workers
        running = GaugeMetricFamily("tokentape_worker_running", "Generations under way", labels=["worker"])
        for row in rows:
            running.add_metric([row.url], row.num_running)
        yield running
        for name, text, counts in (
            ("ejections", "Times taken out of use", [row.num_ejections for row in rows]),
            ("prompt_tokens", "Prompt tokens of ended generations", [row.num_prompt for row in rows]),
            ("cached_tokens", "Of these, cached by the worker", [row.num_cached for row in rows]),
        ):
            counter = CounterMetricFamily(f"tokentape_worker_{name}", text, labels=["worker"])
            for row, count in zip(rows, counts, strict=True):
                counter.add_metric([row.url], count)
            yield counter
        up = GaugeMetricFamily("tokentape_worker_state", "1 for the state", labels=["worker", "state"])
        ended = CounterMetricFamily(
            "tokentape_worker_generations", "Ended generations", labels=["worker", "outcome"]
        )
        for row in rows:
            up.add_metric([row.url, row.state], 1)
            for outcome, count in row.outcomes.items():
                ended.add_metric([row.url, outcome], count)
        moved = CounterMetricFamily(
            "tokentape_generations_moved", "Generations that went on at another worker", labels=["kind"]
        )
        for kind, count in self._pool.moved.items():
            moved.add_metric([kind], count)
        yield from (up, ended, moved)
