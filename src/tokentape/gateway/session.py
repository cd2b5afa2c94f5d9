"""A session in memory: its tree, what it may still do, and what is known of the requests that grow it."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import msgspec
from msgspec import Raw

from tokentape.conversation import Known, frame_key
from tokentape.errors import (
    ClientGone,
    LimitReached,
    SessionClosed,
    SessionSealed,
    TokentapeError,
)
from tokentape.gateway.answers import Answers
from tokentape.gateway.memory import Memo, size_of
from tokentape.gateway.replays import Replays
from tokentape.render import Frame
from tokentape.store import SessionRecord, StoredSession
from tokentape.tape import Turn
from tokentape.tree import Tree
from tokentape.types import Json, Message
from tokentape.volatile import NOTHING, Volatile

_T = TypeVar("_T")


@dataclass(eq=False, slots=True, weakref_slot=True)
class Session:
    """One episode. Turns may run side by side; commits happen one at a time, under `commit_lock`.

    `answers` are those of its requests. `replays` are what they repeat. `ending` is why the session
    is about to take no more turns.
    """

    record: SessionRecord
    tree: Tree
    failures: Counter[str] = field(default_factory=Counter[str])
    num_sampled_tokens: int = 0
    commit_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    answers: Answers = field(default_factory=Answers)
    ending: TokentapeError | None = None
    replays: Replays = field(default_factory=Replays)
    _memo: Memo = field(default_factory=Memo)
    _num_turn_bytes: int = 0

    @property
    def session_id(self) -> str:
        """The session's id."""
        return self.record.session_id

    @property
    def num_bytes(self) -> int:
        """Roughly what the session takes in memory."""
        return self._num_turn_bytes + self._memo.num_bytes + self.replays.num_bytes

    @property
    def idle(self) -> bool:
        """Whether nothing is being done with the session."""
        return self.ending is None and not self.commit_lock.locked() and not self.answers.in_use

    def frame(self, tools: bytes, arguments: bytes) -> tuple[Frame, tuple[bytes, bytes]]:
        """Tools (OpenAI's shape) and template arguments from their JSON, with their identity."""

        def decode() -> tuple[Frame, tuple[bytes, bytes]]:
            frame = Frame(tuple(msgspec.json.decode(tools)), msgspec.json.decode(arguments))
            return frame, frame_key(frame.tools, frame.arguments)

        return self._memo.get("frame", tools + b"\0" + arguments, decode)

    def known(self, wire: str, raw: Raw, decode: Callable[[], Sequence[Message]]) -> tuple[Known, ...]:
        """What one message of a wire means; `decode` is asked only where these bytes are new.

        An unchanged message of the history costs one hash and one look-up. `wire` has 16 letters at most.
        """
        return self._memo.get(wire, raw, lambda: tuple(self.tree.know(message) for message in decode()))

    def check_open(self) -> None:
        """Raise `SessionClosed` or `SessionSealed` unless the session takes turns."""
        if self.record.state == "sealed":
            raise SessionSealed(
                f"session {self.session_id!r} is sealed: a commit failed half-way; the next request reads "
                "it from the store again, and goes on with what is there"
            )
        if self.record.state != "open":
            raise SessionClosed(
                f"session {self.session_id!r} is {self.record.state}: it takes no more turns; "
                "create another with POST /sessions"
            )
        if self.ending is not None:
            raise self.ending

    async def end(self, reason: TokentapeError) -> None:
        """Take no more turns, stop those that are being sampled, and wait until that is recorded."""
        self.ending = reason
        await self.answers.stop()

    def cancelled(self) -> TokentapeError:
        """Why a turn of this session was cancelled."""
        return self.ending or ClientGone("the client left before the turn was committed")

    def seconds_left(self) -> float | None:
        """Seconds to the session's deadline, None where it has none."""
        deadline = self.record.deadline
        return None if deadline is None else deadline - time.time()

    def budget(self, num_turns: int = 1) -> int | None:
        """How many tokens may still be sampled, None without a limit.

        Raises:
            LimitReached: none is left, or no time, or not so many turns.
        """
        record = self.record
        if (left := self.seconds_left()) is not None and left <= 0:
            raise LimitReached(f"session {self.session_id!r} has reached its deadline: finish it")
        if record.max_turns is not None and len(self.tree) + num_turns > record.max_turns:
            used = f"has used {len(self.tree)} of its {record.max_turns} turns"
            raise LimitReached(f"session {self.session_id!r} {used}")
        if record.max_tokens is None:
            return None
        left = record.max_tokens - self.num_sampled_tokens
        if left <= 0:
            raise LimitReached(
                f"session {self.session_id!r} has used its {record.max_tokens} sampled tokens: finish it"
            )
        return left

    def check_budget(self, num_tokens: int, num_turns: int) -> None:
        """Raise `LimitReached` where turns of so many sampled tokens are too much.

        Asked again at the commit: turns that run side by side each began within the limits.
        """
        left = self.budget(num_turns)
        if left is not None and num_tokens > left:
            raise LimitReached(f"session {self.session_id!r} has {left} tokens left, not {num_tokens}")

    def seal(self) -> None:
        """Take no more turns: the tree may not be what the store has. The store's state is not changed."""
        self.record = replace(self.record, state="sealed")

    async def read(self, question: Callable[[], _T]) -> _T:
        """The answer to a question about the tree, found in a thread; nothing is committed meanwhile."""
        async with self.commit_lock:
            return await asyncio.to_thread(question)

    def commit(self, turn: Turn) -> None:
        """Append a durable turn."""
        self.tree.commit(turn)
        self._num_turn_bytes += size_of(turn)
        self.num_sampled_tokens += len(turn.completion)
        self.answers.commit(turn)
        parent = self.tree.turn(turn.parent_id) if turn.parent_id is not None else None
        if parent is not None:
            self.answers.received(parent.origin.request_id)

    def summary(self) -> Json:
        """What `GET /sessions/{id}` answers."""
        labels = self.tree.labels()
        return {
            "session_id": self.session_id,
            "state": self.record.state,
            "created_at": self.record.created_at,
            "turns": len(self.tree),
            "branches": len(self.tree.ends(labels)),
            "branch_reasons": dict(Counter(t.branch_reason for t in self.tree.turns() if t.branch_reason)),
            "labels": dict(Counter(label.name for label in labels.values())),
            "tokens": sum(len(t.prompt) + len(t.completion) for t in self.tree.turns()),
            "sampled_tokens": self.num_sampled_tokens,
            "weight_versions": self._weight_versions(),
            "parse_statuses": dict(Counter(t.parse_status for t in self.tree.turns())),
            "failures": dict(self.failures),
            "reward": self.record.reward,
            "turn_rewards": self.record.turn_rewards,
            "branch_rewards": self.record.branch_rewards,
            "group_id": self.record.group_id,
            "metadata": self.record.metadata,
        }

    def _weight_versions(self) -> dict[str, int]:
        """How many tokens each version sampled."""
        counts: Counter[str] = Counter()
        for turn in self.tree.turns():
            for span in turn.versions:
                counts[span.version] += span.end - span.start
        return dict(counts)


def restore(
    stored: StoredSession, content_tests: tuple[str, ...] = (), volatile: Volatile = NOTHING
) -> Session:
    """A session as it was before a restart: its turns committed again, in their order."""
    session = Session(stored.record, Tree(content_tests, volatile), Counter(f.kind for f in stored.failures))
    for turn in stored.turns:
        session.commit(turn)
    return session
