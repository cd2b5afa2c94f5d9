"""How long a turn took, stage by stage: for the metrics, its line in the log, and its spans."""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tokentape.errors import TokentapeError
from tokentape.gateway import spans
from tokentape.metrics import Metrics
from tokentape.tape import Turn

log = logging.getLogger("tokentape.turns")


class Clock:
    """Runs from the moment that it is made; `turn_id` is the first of the turns that are asked for."""

    def __init__(self, metrics: Metrics, turn_id: str) -> None:
        self._metrics = metrics
        self._turn_id = turn_id
        self._where = spans.here()
        self._began = self._planned = self._sampled = time.monotonic()

    def planned(self) -> None:
        """The prompt is known."""
        self._planned = time.monotonic()
        self._metrics.plan_seconds.observe(self._planned - self._began)

    def first_token(self) -> None:
        """A stream has its first token."""
        self._metrics.first_token_seconds.observe(time.monotonic() - self._began)

    def sampled(self) -> None:
        """The engine has ended, and its text is parsed."""
        self._sampled = time.monotonic()
        self._metrics.engine_seconds.observe(self._sampled - self._planned)

    def committed(self, session_id: str, turns: Sequence[Turn], num_prompt: int) -> None:
        """The turns of one request are durable: a line for each."""
        now = time.monotonic()
        self._metrics.commit_seconds.observe(now - self._sampled)
        self._metrics.turn_seconds.observe(now - self._began)
        stages = (
            ("turn", self._began, now),
            ("plan", self._began, self._planned),
            ("engine", self._planned, self._sampled),
            ("commit", self._sampled, now),
        )
        sampled = sum(len(turn.completion) for turn in turns)
        told = {"session": session_id, "turn": self._turn_id, "prompt": num_prompt, "sampled": sampled}
        spans.record(self._where, stages, told)
        if not log.isEnabledFor(logging.INFO):
            return
        times = {
            "plan_ms": self._planned - self._began,
            "engine_ms": self._sampled - self._planned,
            "commit_ms": now - self._sampled,
            "total_ms": now - self._began,
        }
        for turn in turns:
            fields = {
                "session": session_id,
                "turn": turn.turn_id,
                "parent": turn.parent_id,
                "outcome": "committed",
                "branch_reason": turn.branch_reason,
                "prompt": num_prompt,
                "new": len(turn.prompt),
                "sampled": len(turn.completion),
                "cached": turn.num_cached_tokens,
                "finish": turn.finish_reason,
                "parse": turn.parse_status,
                "version": turn.versions[-1].version,
                **{name: round(1e3 * seconds, 2) for name, seconds in times.items()},
            }
            log.info("%s", _line(fields), extra={"fields": fields})

    def failed(self, session_id: str, error: TokentapeError) -> Mapping[str, Any]:
        """The turn has failed: which it was, and how long it took."""
        now = time.monotonic()
        told = {"session": session_id, "turn": self._turn_id, "kind": error.kind}
        spans.record(self._where, (("turn", self._began, now),), told, error)
        return {"turn": self._turn_id, "total_ms": round(1e3 * (now - self._began), 2)}


def note_failure(session_id: str, error: TokentapeError, num_tokens: int, clock: Clock | None = None) -> None:
    """The line of a turn that was not committed: `num_tokens` were sampled for it; no clock: never begun."""
    fields = {"session": session_id, **({} if clock is None else clock.failed(session_id, error))}
    fields |= {"outcome": "failed", "kind": error.kind, "sampled": num_tokens, "error": str(error)}
    log.warning("%s", _line(fields), extra={"fields": fields})


def _line(fields: Mapping[str, Any]) -> str:
    """`name=value` with a space between; None is left out, what could be misread is a JSON string."""
    return " ".join([f"{name}={_value(value)}" for name, value in fields.items() if value is not None])


def _value(value: object) -> str:
    text = str(value)
    return (
        json.dumps(text)
        if not text or not text.isascii() or not text.isprintable() or set(text) & {*' ="'}
        else text
    )
