"""What is known for certain of a run: what the workers sampled, and what the agents were told.

Both are written while the run lasts, by those who know; `check.py` compares an export with them.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

_TURN_ID = re.compile(r"t-[0-9a-f]+")


class Generation(msgspec.Struct, frozen=True):
    """What a worker sampled for one request, written before any of it was sent.

    `rid` is the turn's id; each further request for it has a number behind that (`.2`, `-1`). `ids` and
    `logprobs` (nats) are parallel. The first `num_sound` of them were sent as they are; the rest may have
    been falsified, or not sent at all. `mode` says what the worker did wrong.
    """

    rid: str
    prompt_ids: list[int]
    ids: list[int]
    logprobs: list[float]
    version: str
    num_sound: int
    mode: str = "none"

    @property
    def turn_id(self) -> str:
        """The turn that it was sampled for."""
        found = _TURN_ID.match(self.rid)
        return self.rid if found is None else found[0]

    def to_json(self) -> bytes:
        """One line of a worker's log."""
        return msgspec.json.encode(self)


class Acknowledged(msgspec.Struct, frozen=True):
    """A reply that an agent received to its end: the turn, as the gateway described it.

    `request` is the agent's own number of the request, `at` the monotonic time, seconds.
    """

    agent: str
    request: int
    session_id: str
    turn_id: str
    parent_turn_id: str | None
    branch_reason: str | None
    prompt_ids: list[int]
    completion_ids: list[int]
    logprobs: list[float]
    at: float


class Retry(msgspec.Struct, frozen=True):
    """A try of a request that did not succeed: `why` is a status, "connection" or "timeout"."""

    agent: str
    request: int
    at: float
    why: str


class Episode(msgspec.Struct):
    """A session as its agent knew it. `is_linear`: it never went back nor asked twice.

    `summary` is what `finish` answered; None: it never got there.
    """

    session_id: str
    agent: str
    is_linear: bool
    summary: dict[str, Any] | None = None


class Account(msgspec.Struct):
    """All that the agents and the conductor know. `kills` are the times at which a gateway ended."""

    acknowledged: list[Acknowledged] = []
    retries: list[Retry] = []
    episodes: list[Episode] = []
    kills: list[float] = []
    stuck: list[str] = []


def read_generations(logs: Sequence[Path]) -> list[Generation]:
    """All generations of the workers' logs."""
    return [generation for log in logs for generation in _lines(log)]


def _lines(log: Path) -> Iterator[Generation]:
    """Lines that a kill has cut are left out: nothing of them was sent."""
    for line in log.read_bytes().splitlines():
        try:
            yield msgspec.json.decode(line, type=Generation)
        except msgspec.DecodeError:
            continue
