"""Counters and histograms of one gateway, in a registry of its own: no globals."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)
_TOKENS = (16, 64, 256, 1024, 4096, 16384, 65536, 262144)


class Metrics:
    """What a gateway counts. Labels are small closed sets: reasons, statuses, kinds of errors."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

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
        self.resumed = counter("resumed", "Generations that went on after an abort, each time")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of committed turns")
        self.cached_tokens = counter("cached_tokens", "Prompt tokens that the engine had cached")
        self.sampled_tokens = counter("sampled_tokens", "Sampled tokens of committed turns")
        self.rendered_tokens = counter("rendered_tokens", "Tokens that had to be tokenised: new text only")
        self.neutralised = counter("neutralised", "Control tokens of untrusted text that stayed text")
        self.ignored_fields = counter("ignored_fields", "Request fields without effect")
        self.active_turns = Gauge("tokentape_active_turns", "Turns under way", registry=self.registry)
        self.sessions = Gauge("tokentape_sessions_in_memory", "Sessions in memory", registry=self.registry)
        self.turn_seconds = Histogram(
            "tokentape_turn_seconds", "Whole turns", buckets=_SECONDS, registry=self.registry
        )
        self.prompt_length = Histogram(
            "tokentape_prompt_length", "Prompt tokens of a turn", buckets=_TOKENS, registry=self.registry
        )

    def to_text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)
