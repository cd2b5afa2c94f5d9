"""Open sessions: in memory while they are used, in the store for good; their limits and counts."""

import asyncio
import contextlib
import re
import secrets
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import msgspec
from msgspec import Raw

from tokentape.conversation import Known, frame_key
from tokentape.errors import (
    ClientGone,
    LeaseLost,
    LimitReached,
    NotFound,
    RequestError,
    SessionClosed,
    SessionExists,
    SessionSealed,
    StoreError,
    TokentapeError,
)
from tokentape.gateway.answers import Answers
from tokentape.gateway.credit import Credit, check_metadata, credited
from tokentape.gateway.memory import Memo, Memory, MemoryLimits, size_of
from tokentape.gateway.replays import Replays
from tokentape.metrics import Metrics
from tokentape.render import Frame
from tokentape.store import Failure, SessionRecord, Store, StoredSession
from tokentape.tape import Turn
from tokentape.tree import Tree
from tokentape.types import Json, Message, Sampling
from tokentape.volatile import NOTHING, Volatile

_T = TypeVar("_T")
_MAX_DELIVERED = 100_000
SESSION_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._~:@-]{0,127}")


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
        limits: MemoryLimits | None = None,
    ) -> None:
        self._store = store
        self._content_tests = content_tests
        self._volatile = volatile
        self._metrics = metrics
        self._auto_sessions = auto_sessions
        self.new_id = new_session_id
        self._memory: Memory[Session] = Memory(limits or MemoryLimits(), self._left)
        self._delivered: dict[str, frozenset[str]] = {}  # of sessions that left memory; the oldest first
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._one_restore = asyncio.Semaphore(1)  # several threads would keep the event loop from running
        metrics.sessions.set_function(lambda: len(self._memory))
        metrics.session_bytes.set_function(lambda: self._memory.num_bytes)

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
        check_metadata(metadata or {})
        given = session_id is not None
        session_id = session_id if session_id is not None else self.new_id()
        if not SESSION_ID.fullmatch(session_id):
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
        async with self._locked(session_id):
            if given and await self._find(session_id) is not None:
                raise SessionExists(
                    f"session {session_id!r} exists already: use it, or take another id", param="session_id"
                )
            await self._store.put_session(record)
            session = Session(record, Tree(self._content_tests, self._volatile))
            self._memory.use(session)
            return session

    async def get(self, session_id: str, *, used: bool = False) -> Session:
        """The session of this id, as it was when it was last committed.

        An agent that has `used` it makes it, where sessions are made on demand; a question about it does not.

        Raises:
            NotFound: there is none.
        """
        session = self._memory.get(session_id)
        if session is not None and not await self._store.holds(session_id):
            session.seal()  # another replica has it, and may have gone on
        if session is None or session.record.state == "sealed":
            async with self._locked(session_id):
                session = await self._find(session_id)
        if session is not None:
            if session.record.state == "open":
                self._memory.use(session)
            return session
        if not (used and self._auto_sessions):
            raise NotFound(f"session {session_id!r} does not exist: create it with POST /sessions")
        try:
            return await self.create(session_id)
        except SessionExists:  # another request of the same agent was first
            return await self.get(session_id)

    async def credit(self, session: Session, credit: Credit) -> None:
        """Add rewards and metadata to a session that is open.

        Raises:
            SessionClosed: it takes no more.
            RequestError: a reward is not finite, or for a turn or a branch that is not there.
        """
        await to_the_end(self._credit(session, credit))

    async def _credit(self, session: Session, credit: Credit) -> None:
        async with session.commit_lock:
            session.check_open()
            await self._put_record(session, credited(session.record, session.tree, credit))

    async def finish(self, session: Session, credit: Credit) -> None:
        """Close a session, with rewards and metadata as `credit` takes them.

        Finishing again changes nothing, and is an error only where it would.

        Raises:
            SessionClosed: it is finished with other rewards or other metadata.
            RequestError: a reward is not finite, or for a turn or a branch that is not there.
        """
        credited(session.record, session.tree, credit)  # before anything is stopped
        await to_the_end(self._finish(session, credit))

    async def _finish(self, session: Session, credit: Credit) -> None:
        if session.record.state == "open":
            await session.end(
                SessionClosed(f"session {session.session_id!r} is being finished: it takes no more turns")
            )
        try:
            await self._finish_ended(session, credit)
        except TokentapeError:
            session.ending = None
            raise

    async def _finish_ended(self, session: Session, credit: Credit) -> None:
        async with session.commit_lock:
            if session.record.state == "deleted":
                raise NotFound(f"session {session.session_id!r} does not exist")
            if session.record.state == "sealed":
                session.check_open()
            record = replace(credited(session.record, session.tree, credit, last=True), state="finished")
            if session.record.state == "finished":
                if record.reward != session.record.reward:
                    raise SessionClosed(
                        f"session {session.session_id!r} is finished with reward {session.record.reward}: "
                        "it keeps what it was finished with"
                    )
                if record != session.record:
                    what = "metadata" if record.metadata != session.record.metadata else "rewards"
                    raise SessionClosed(
                        f"session {session.session_id!r} is finished with other {what}: "
                        "it keeps what it was finished with"
                    )
                return
            await self._put_record(session, record)
            self._metrics.trained_tokens.inc(session.num_sampled_tokens)
            self._memory.let_go(session)

    async def delete(self, session_id: str) -> None:
        """Remove a session from memory and store.

        Raises:
            NotFound: there is none.
        """
        await to_the_end(self._delete(session_id))

    async def _delete(self, session_id: str) -> None:
        session = await self.get(session_id)
        await session.end(SessionClosed(f"session {session_id!r} is being deleted: it takes no more turns"))
        try:
            async with self._locked(session_id), session.commit_lock:
                if session.record.state == "sealed":  # another copy may have been made
                    session.check_open()
                if session.record.state == "deleted":  # by somebody else; the id may be another's by now
                    raise NotFound(f"session {session_id!r} does not exist")
                await self._store.delete(session_id)
                session.record = replace(session.record, state="deleted")  # late turns find it closed
                self._memory.forget(session)
        except TokentapeError:
            session.ending = None
            raise

    async def list_sessions(self, *, state: str | None, after: str, limit: int) -> Sequence[SessionRecord]:
        """Records of sessions, by id.

        Raises:
            RequestError: `after` has a NUL, which PostgreSQL cannot compare with.
        """
        if "\0" in after:
            raise RequestError("`after` must not have a NUL character", param="after")
        return await self._store.list_sessions(state=state, after=after, limit=limit)

    async def release(self, session_id: str) -> None:
        """Give back a session that nobody is using: another replica may have it from now on."""
        async with self._locked(session_id):
            session = self._memory.get(session_id)
            if session is None or session.idle:
                if session is not None:
                    session.seal()  # who has got it a moment ago asks again
                    self._left(session)
                    self._memory.forget(session)
                await self._store.release(session_id)

    def is_here(self, session_id: str) -> bool:
        """Whether the session is open and in memory."""
        session = self._memory.get(session_id)
        return session is not None and session.record.state == "open"

    def open_ids(self) -> list[str]:
        """The open sessions in memory."""
        return [one.session_id for one in self._memory.all() if one.record.state == "open"]

    async def end_all(self, reason: TokentapeError) -> None:
        """End every open session here; in the store they stay open, and may be continued another time."""
        await asyncio.gather(*(session.end(reason) for session in self._memory.all()))

    async def fail(self, session: Session, error: TokentapeError, num_tokens: int) -> None:
        """Count a turn that was not committed, and keep what it was."""
        self._metrics.failures.labels(error.kind).inc()
        session.failures[error.kind] += 1
        if session.record.state == "deleted":  # a later session of the same id must not inherit it
            return
        await self._store.put_failure(
            session.session_id, Failure(error.kind, str(error), num_tokens, time.time())
        )

    async def commit(self, session: Session, turns: Sequence[Turn]) -> None:
        """Make turns durable, then append them to the tree; the caller has the session's commit lock.

        Raises:
            StoreError: nothing was appended. Where nobody knows what the store has, the session is sealed.
        """
        with _sealing(session):
            await self._store.put_turns(session.session_id, turns)
        try:
            for turn in turns:
                session.commit(turn)
        except BaseException:  # the store has what the tree has not
            session.seal()
            raise
        self._memory.use(session)

    async def _put_record(self, session: Session, record: SessionRecord) -> None:
        with _sealing(session):
            await self._store.put_session(record)
        session.record = record

    async def _find(self, session_id: str) -> Session | None:
        """The session in memory, or read from the store; the caller has the lock of this id."""
        session = self._memory.get(session_id)
        if session is not None and session.record.state != "sealed":
            return session
        if session is not None:
            await session.answers.stop()  # what it still does to the store comes before the question
            self._left(session)
            self._memory.forget(session)
        if not SESSION_ID.fullmatch(session_id):  # no such id was ever given; it may not even be text
            return None
        stored = await self._store.load(session_id)
        if stored is None:
            return None
        async with self._one_restore:
            session = await asyncio.to_thread(restore, stored, self._content_tests, self._volatile)
        for request_id in self._delivered.pop(session_id, ()):
            session.answers.received(request_id)
        self._memory.see(session)
        return session

    @contextlib.asynccontextmanager
    async def _locked(self, session_id: str) -> AsyncGenerator[None]:
        """One at a time reads, makes or deletes the session of this id."""
        lock = self._locks.get(session_id)
        if lock is None:
            lock = self._locks[session_id] = asyncio.Lock()
        async with lock:
            yield

    def _left(self, session: Session) -> None:
        """Remember of a session that leaves memory what the store does not: which replies have arrived."""
        if delivered := session.answers.delivered(session.tree.turns()):
            self._delivered[session.session_id] = delivered
            if len(self._delivered) > _MAX_DELIVERED:  # these come back as after a restart
                del self._delivered[next(iter(self._delivered))]


def new_session_id() -> str:
    """An id that cannot be guessed."""
    return f"s-{secrets.token_urlsafe(18).replace('_', '~')}"


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


@contextlib.contextmanager
def _sealing(session: Session) -> Generator[None]:
    """Seal the session where nobody knows whether the store has changed, or where others change it."""
    try:
        yield
    except StoreError as error:
        if error.uncertain or isinstance(error, LeaseLost):
            session.seal()
        raise
