"""Open sessions: their trees in memory, their records in the store, their limits and counts."""

import asyncio
import math
import re
import secrets
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any, TypeVar

import msgspec
from msgspec import Raw

from tokentape.conversation import Known, frame_key
from tokentape.errors import (
    ClientGone,
    LimitReached,
    NotFound,
    RequestError,
    SessionClosed,
    SessionExists,
    TokentapeError,
)
from tokentape.gateway.answers import Answers
from tokentape.gateway.replays import Replays
from tokentape.metrics import Metrics
from tokentape.render import Frame
from tokentape.store import Failure, SessionRecord, Store, StoredSession
from tokentape.tape import Turn
from tokentape.tree import Tree
from tokentape.types import Json, Message, Sampling
from tokentape.volatile import NOTHING, Volatile

_T = TypeVar("_T")
_MEMO_BYTES = 32 * 2**20
SESSION_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._~:@-]{0,127}")


class Memo:
    """What replayed bytes mean, decoded once; the oldest is forgotten beyond `_MEMO_BYTES`."""

    def __init__(self) -> None:
        self._kept: dict[bytes, tuple[Any, int]] = {}
        self._num_bytes = 0

    def get(self, kind: str, raw: Raw | bytes, decode: Callable[[], _T]) -> _T:
        """The meaning of `raw`; `decode` is asked where it is not known."""
        key = blake2b(raw, digest_size=16, person=kind.encode()).digest()
        if (found := self._kept.get(key)) is not None:
            return found[0]
        meaning, num_bytes = decode(), len(bytes(raw))
        self._kept[key] = meaning, num_bytes
        self._num_bytes += num_bytes
        while self._num_bytes > _MEMO_BYTES and len(self._kept) > 1:
            self._num_bytes -= self._kept.pop(next(iter(self._kept)))[1]
        return meaning


class Credit(msgspec.Struct, forbid_unknown_fields=True):
    """What a session, its turns and its branches earned: `POST /sessions/{id}/rewards`, and with `/finish`.

    `reward` is the session's; `turn_rewards` are by the turn's id, `branch_rewards` by the id of the branch's
    last turn and stand in the session's place there. What is given replaces what was there, null removes it
    (a session's `reward` stays). `metadata` is added.
    """

    reward: float | None = None
    turn_rewards: dict[str, float | None] = msgspec.field(default_factory=dict[str, "float | None"])
    branch_rewards: dict[str, float | None] = msgspec.field(default_factory=dict[str, "float | None"])
    metadata: Json = msgspec.field(default_factory=dict[str, Any])


@dataclass(eq=False, slots=True)
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

    @property
    def session_id(self) -> str:
        """The session's id."""
        return self.record.session_id

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
        """Raise `SessionClosed` unless the session takes turns."""
        if self.record.state != "open":
            raise SessionClosed(f"session {self.session_id!r} is {self.record.state}: it takes no more turns")
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
            raise LimitReached(f"session {self.session_id!r} has reached its deadline")
        if record.max_turns is not None and len(self.tree) + num_turns > record.max_turns:
            used = f"has used {len(self.tree)} of its {record.max_turns} turns"
            raise LimitReached(f"session {self.session_id!r} {used}")
        if record.max_tokens is None:
            return None
        left = record.max_tokens - self.num_sampled_tokens
        if left <= 0:
            raise LimitReached(f"session {self.session_id!r} has used its {record.max_tokens} sampled tokens")
        return left

    def check_budget(self, num_tokens: int, num_turns: int) -> None:
        """Raise `LimitReached` where turns of so many sampled tokens are too much.

        Asked again at the commit: turns that run side by side each began within the limits.
        """
        left = self.budget(num_turns)
        if left is not None and num_tokens > left:
            raise LimitReached(f"session {self.session_id!r} has {left} tokens left, not {num_tokens}")

    def commit(self, turn: Turn) -> None:
        """Append a durable turn."""
        self.tree.commit(turn)
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


class Sessions:
    """All sessions of a gateway; those that are not in memory are read from the store on demand."""

    def __init__(
        self,
        store: Store,
        content_tests: tuple[str, ...],
        volatile: Volatile,
        metrics: Metrics,
        *,
        auto_sessions: bool = False,
    ) -> None:
        self._store = store
        self._content_tests = content_tests
        self._volatile = volatile
        self._metrics = metrics
        self._auto_sessions = auto_sessions
        self._sessions: dict[str, Session] = {}
        self._lock = asyncio.Lock()

    async def create(
        self,
        session_id: str | None = None,
        *,
        metadata: Mapping[str, Any] | None = None,
        sampling: Sampling | None = None,
        max_turns: int | None = None,
        max_tokens: int | None = None,
        deadline_s: float | None = None,
        group_id: str | None = None,
    ) -> Session:
        """Create an open session; without an id it gets one that cannot be guessed.

        Raises:
            SessionExists: the id is taken.
            RequestError: the id has characters that a URL or a header cannot carry.
        """
        _check_metadata(metadata or {})
        if session_id is None:
            session_id = new_session_id()
        elif not SESSION_ID.fullmatch(session_id):
            raise RequestError(
                "session_id must be 1 to 128 letters, digits or ._~:@- and start with a letter or digit",
                param="session_id",
            )
        now = time.time()
        record = SessionRecord(
            session_id,
            "open",
            now,
            dict(metadata or {}),
            sampling or Sampling(),
            max_turns,
            max_tokens,
            None if deadline_s is None else now + deadline_s,
            group_id=group_id,
        )
        async with self._lock:
            if await self._find(session_id) is not None:
                raise SessionExists(f"session {session_id!r} exists already", param="session_id")
            await self._store.put_session(record)
            return self._keep(Session(record, Tree(self._content_tests, self._volatile)))

    async def get(self, session_id: str, *, used: bool = False) -> Session:
        """The session of this id, as it was when it was last committed.

        An agent that has `used` it makes it, where sessions are made on demand; a question about it does not.

        Raises:
            NotFound: there is none.
        """
        session = self._sessions.get(session_id)
        if session is not None:
            return session
        async with self._lock:
            session = await self._find(session_id)
        if session is not None:
            return session
        if not (used and self._auto_sessions):
            raise NotFound(f"session {session_id!r} does not exist: create it with POST /sessions")
        try:
            return await self.create(session_id)
        except SessionExists:  # another request of the same agent was first
            return await self.get(session_id)

    async def credit(self, session: Session, credit: "Credit") -> None:
        """Add rewards and metadata to a session that is open.

        Raises:
            SessionClosed: it takes no more.
            RequestError: a reward is not finite, or for a turn or a branch that is not there.
        """
        await to_the_end(self._credit(session, credit))

    async def _credit(self, session: Session, credit: "Credit") -> None:
        async with session.commit_lock:
            session.check_open()
            record = _credited(session, credit)
            await self._store.put_session(record)
            session.record = record

    async def finish(self, session: Session, credit: "Credit") -> None:
        """Close a session, with rewards and metadata as `credit` takes them.

        Finishing again changes nothing, and is an error only where it would.

        Raises:
            SessionClosed: it is finished with other rewards or other metadata.
            RequestError: a reward is not finite, or for a turn or a branch that is not there.
        """
        _credited(session, credit)  # before anything is stopped
        await to_the_end(self._finish(session, credit))

    async def _finish(self, session: Session, credit: "Credit") -> None:
        if session.record.state == "open":
            await session.end(SessionClosed(f"session {session.session_id!r} is being finished"))
        try:
            await self._finish_ended(session, credit)
        except TokentapeError:
            session.ending = None
            raise

    async def _finish_ended(self, session: Session, credit: "Credit") -> None:
        async with session.commit_lock:
            if session.record.state == "deleted":
                raise NotFound(f"session {session.session_id!r} does not exist")
            record = replace(_credited(session, credit, last=True), state="finished")
            if session.record.state == "finished":
                if record.reward != session.record.reward:
                    raise SessionClosed(
                        f"session {session.session_id!r} is finished with reward {session.record.reward}"
                    )
                if record != session.record:
                    what = "metadata" if record.metadata != session.record.metadata else "rewards"
                    raise SessionClosed(f"session {session.session_id!r} is finished with other {what}")
                return
            await self._store.put_session(record)
            session.record = record
            self._forget(session)

    async def delete(self, session_id: str) -> None:
        """Remove a session from memory and store.

        Raises:
            NotFound: there is none.
        """
        await to_the_end(self._delete(session_id))

    async def _delete(self, session_id: str) -> None:
        session = await self.get(session_id)
        await session.end(SessionClosed(f"session {session_id!r} is being deleted"))
        try:
            async with self._lock, session.commit_lock:
                if session.record.state == "deleted":  # by somebody else; the id may be another's by now
                    raise NotFound(f"session {session_id!r} does not exist")
                await self._store.delete(session_id)
                session.record = replace(session.record, state="deleted")  # late turns find it closed
                self._forget(session)
        except TokentapeError:
            session.ending = None
            raise

    async def list_sessions(self, *, state: str | None, after: str, limit: int) -> Sequence[SessionRecord]:
        """Records of sessions, by id."""
        return await self._store.list_sessions(state=state, after=after, limit=limit)

    async def end_all(self, reason: TokentapeError) -> None:
        """End every open session here; in the store they stay open, and may be continued another time."""
        await asyncio.gather(*(session.end(reason) for session in self._sessions.values()))

    async def fail(self, session: Session, error: TokentapeError, num_tokens: int) -> None:
        """Count a turn that was not committed, and keep what it was."""
        self._metrics.failures.labels(error.kind).inc()
        session.failures[error.kind] += 1
        if session.record.state == "deleted":  # a later session of the same id must not inherit it
            return
        await self._store.put_failure(
            session.session_id, Failure(error.kind, str(error), num_tokens, time.time())
        )

    async def _find(self, session_id: str) -> Session | None:
        session = self._sessions.get(session_id)
        if session is not None:
            return session
        if not SESSION_ID.fullmatch(session_id):  # no such id was ever given; it may not even be text
            return None
        stored = await self._store.load(session_id)
        if stored is None:
            return None
        session = restore(stored, self._content_tests, self._volatile)
        return self._keep(session) if session.record.state == "open" else session

    def _forget(self, session: Session) -> None:
        """Free the memory of a session that takes no more turns; it is read from the store when asked for."""
        self._sessions.pop(session.session_id, None)
        self._metrics.sessions.set(len(self._sessions))

    def _keep(self, session: Session) -> Session:
        self._sessions[session.session_id] = session
        self._metrics.sessions.set(len(self._sessions))
        return session


def new_session_id() -> str:
    """An id that cannot be guessed."""
    return f"s-{secrets.token_urlsafe(18).replace('_', '~')}"


def _credited(session: Session, credit: Credit, *, last: bool = False) -> SessionRecord:
    """The session's record with a credit added; `last`: every rewarded branch must be one."""
    _check_metadata(credit.metadata)
    record, tree = session.record, session.tree
    turn_rewards = _merged(record.turn_rewards, credit.turn_rewards)
    branch_rewards = _merged(record.branch_rewards, credit.branch_rewards)
    given = {**turn_rewards, **branch_rewards, "reward": credit.reward or 0.0}
    if wrong := next((name for name, value in given.items() if not math.isfinite(value)), None):
        raise RequestError(f"the reward of {wrong} is not a finite number", param="reward")
    if turn_id := next((turn_id for turn_id in turn_rewards if turn_id not in tree), None):
        raise RequestError(f"turn_rewards: the session has no turn {turn_id!r}", param="turn_rewards")
    asked = branch_rewards if last else _merged({}, credit.branch_rewards)
    if asked:
        ends = tree.ends(tree.labels())
        if other := next((key for key in asked if key not in ends), None):
            raise RequestError(
                f"branch_rewards: no branch ends with turn {other!r}; those of the session end with "
                f"{', '.join(ends)}. A branch that has gone on is named by its new end; null takes back",
                param="branch_rewards",
            )
    return replace(
        record,
        reward=record.reward if credit.reward is None else credit.reward,
        turn_rewards=turn_rewards,
        branch_rewards=branch_rewards,
        metadata={**record.metadata, **credit.metadata},
    )


def _merged(old: Mapping[str, float], new: Mapping[str, float | None]) -> dict[str, float]:
    both = {**old, **new}
    return {key: value for key, value in both.items() if value is not None}


def _check_metadata(metadata: Mapping[str, Any]) -> None:
    if "tokentape" in metadata:
        raise RequestError("the metadata key `tokentape` is the gateway's own", param="metadata.tokentape")


async def to_the_end(work: Coroutine[Any, Any, _T], *, then_cancel: bool = True) -> _T:
    """Await work that must not stop half-way: a caller cancelled meanwhile is so only after its end.

    Without `then_cancel` it has come too late: the caller goes on with the result.
    """
    task = asyncio.ensure_future(work)
    cancelled = False
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            cancelled = True
    if cancelled and then_cancel:
        task.exception()  # somebody has looked at it
        raise asyncio.CancelledError
    return task.result()


def restore(
    stored: StoredSession, content_tests: tuple[str, ...] = (), volatile: Volatile = NOTHING
) -> Session:
    """A session as it was before a restart: its turns committed again, in their order."""
    session = Session(stored.record, Tree(content_tests, volatile), Counter(f.kind for f in stored.failures))
    for turn in stored.turns:
        session.commit(turn)
    return session
