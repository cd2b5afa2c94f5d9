"""Where turns become durable. The store knows rows and transactions, nothing of trees or tokens.

One file on one machine is a `SQLiteStore`; what replicas on several share is a `postgres.PostgresStore`.

`SQLiteStore` has one writer thread. Whatever is waiting when it is free goes into one transaction, so that a
hundred sessions share one fsync; a `put` returns only after its own transaction is on disk.

A change that fails before its COMMIT has not happened. Where COMMIT itself fails (disk full, fsync failed)
it may be in the log all the same, until the next transaction overwrites it: a crash between the two brings it
back. Such a `StoreError` is `uncertain`.
"""

import asyncio
import contextlib
import fcntl
import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

from tokentape.errors import ConfigError, StoreError, StoreFull
from tokentape.schema import (
    FAILURES,
    SCHEMA_VERSION,
    SESSIONS,
    TURNS,
    WEIGHTS,
    Column,
    create_table,
    from_json,
    insert_into,
    rows_to_turns,
    to_json,
    turn_to_row,
)
from tokentape.tape import Turn
from tokentape.types import Json, Sampling

log = logging.getLogger(__name__)
T = TypeVar("T")

_PUT_SESSION = insert_into("sessions", SESSIONS).replace("INSERT", "REPLACE", 1)
_PUT_TURN = insert_into("turns", TURNS)
_TO_THE_END = """
ON CONFLICT (version) DO UPDATE
SET rowid = (SELECT max(rowid) + 1 FROM weights), said_by = excluded.said_by WHERE excluded.said_by = 'caller'
"""
_PUT_VERSION = insert_into("weights", WEIGHTS) + _TO_THE_END
_PUT_FAILURE = insert_into("failures", FAILURES)
_FROM = "SELECT * FROM sessions WHERE session_id > :after"
_LIST = f"{_FROM} ORDER BY session_id LIMIT :limit"
_LIST_STATE = f"{_FROM} AND state = :state ORDER BY session_id LIMIT :limit"
_INDEXES = (  # made where they are not there: an older file gets what is new when it is opened
    "turns_by_session ON turns (session_id)",
    "failures_by_session ON failures (session_id)",
    "sessions_by_state ON sessions (state, session_id)",
)


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """A session without its turns.

    `state` is "open", "finished" or "sealed". `deadline` is in seconds since the epoch. None: no limit.
    `group_id` names the episodes that are compared with each other. `turn_rewards` are by the turn's id,
    `branch_rewards` by the id of the branch's last turn.
    """

    session_id: str
    state: str
    created_at: float
    metadata: Json = field(default_factory=dict[str, Any])
    sampling: Sampling = field(default_factory=Sampling)
    max_turns: int | None = None
    max_tokens: int | None = None
    deadline: float | None = None
    reward: float | None = None
    group_id: str | None = None
    turn_rewards: dict[str, float] = field(default_factory=dict[str, float])
    branch_rewards: dict[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, slots=True)
class Failure:
    """A turn that was not committed: an error's `kind`; `num_tokens` were sampled before it."""

    kind: str
    message: str
    num_tokens: int
    created_at: float


@dataclass(frozen=True, slots=True)
class StoredSession:
    """All that is stored of a session: turns in the order of their commits."""

    record: SessionRecord
    turns: tuple[Turn, ...]
    failures: tuple[Failure, ...]


class Store(Protocol):
    """Durable sessions. A change is on disk when its coroutine returns.

    `StoreError`: nothing changed. One that is `uncertain` does not know: whoever goes on must first read what
    the store has.
    """

    async def put_session(self, record: SessionRecord) -> None:
        """Create the session, or replace its record."""
        ...

    async def put_turns(self, session_id: str, turns: Sequence[Turn]) -> None:
        """Append turns: all of them, or none."""
        ...

    async def put_failure(self, session_id: str, failure: Failure) -> None:
        """Append a failure."""
        ...

    async def put_version(self, version: str, said_by: str) -> None:
        """Remember that these weights have come, behind all others; the engine's keep an earlier place."""
        ...

    async def versions(self) -> Sequence[tuple[str, str]]:
        """All weights, in the order in which they came last; who said so of each: "engine" or "caller"."""
        ...

    async def delete(self, session_id: str) -> None:
        """Remove a session and all that belongs to it."""
        ...

    async def load(self, session_id: str) -> StoredSession | None:
        """A session with its turns; None where there is none. From now on it is written here.

        Raises:
            SessionElsewhere: another replica has it.
        """
        ...

    async def read(self, session_id: str) -> StoredSession | None:
        """The same to look at: whoever writes it goes on."""
        ...

    async def holds(self, session_id: str) -> bool:
        """Whether a session loaded or created here still is written here and by nobody else."""
        ...

    async def release(self, session_id: str) -> None:
        """Write the session no more, until it is loaded again."""
        ...

    async def list_sessions(self, *, state: str | None, after: str, limit: int) -> Sequence[SessionRecord]:
        """Sessions in the order of their ids, from the first behind `after`."""
        ...

    async def aclose(self) -> None:
        """Finish what is waiting and close."""
        ...


@dataclass(slots=True)
class _Work:
    """One change or question for the store's thread; `done` is answered on the loop that asked."""

    run: Callable[[sqlite3.Connection], Any]
    writes: bool
    done: "asyncio.Future[Any]"
    loop: asyncio.AbstractEventLoop


class SQLiteStore:
    """The default store: one SQLite file in WAL mode, `synchronous=FULL`.

    Args:
        path: the file; its directory must exist. ":memory:" keeps nothing after `aclose`.
        exclusive: be the only one who may write it until `aclose` or the end of the process. Two gateways on
            one file would each extend trees that the other does not know.
        readonly: only look, beside a gateway that writes; the file must be a store.
        on_transaction: is told of each in the store's thread: seconds, number of changes, is it well.
        tokenizer: fingerprint of the tokenizer whose ids the file holds; a new file takes it.

    Raises:
        ConfigError: the file cannot be opened, is no SQLite file, has a newer schema, is another's
            exclusively, or holds the ids of another tokenizer.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        exclusive: bool = False,
        readonly: bool = False,
        tokenizer: str | None = None,
        on_transaction: Callable[[float, int, bool], None] = lambda seconds, changes, ok: None,
    ) -> None:
        self._path = str(path)
        self._readonly = readonly
        self._on_transaction = on_transaction
        self._queue: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        with contextlib.ExitStack() as opened:
            if exclusive:
                opened.enter_context(lock_store(self._path))
            try:
                connection = sqlite3.connect(
                    f"{Path(self._path).absolute().as_uri()}?mode=ro" if readonly else self._path,
                    check_same_thread=False,
                    isolation_level=None,
                    uri=readonly,
                )
                self._connection = opened.enter_context(contextlib.closing(connection))
                self._prepare(tokenizer)
            except (sqlite3.Error, ConfigError) as error:
                raise ConfigError(f"--store {self._path}: {error}") from error
            self._opened = opened.pop_all()
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="tokentape-store", daemon=True)
        self._thread.start()

    async def put_session(self, record: SessionRecord) -> None:
        """Create the session, or replace its record."""
        row = row_of(SESSIONS, record)
        await self._insert(_PUT_SESSION, [row])

    async def put_turns(self, session_id: str, turns: Sequence[Turn]) -> None:
        """Append turns: all of them, or none."""
        try:
            rows = [turn_to_row(session_id, turn) for turn in turns]
        except (TypeError, ValueError) as error:  # what JSON cannot hold: half a surrogate pair
            raise StoreError(f"turn {turns[0].turn_id} cannot be stored: {error}") from error
        await self._insert(_PUT_TURN, rows)

    async def put_failure(self, session_id: str, failure: Failure) -> None:
        """Append a failure."""
        row = {"session_id": session_id, **row_of(FAILURES[1:], failure)}
        await self._insert(_PUT_FAILURE, [row])

    async def put_version(self, version: str, said_by: str) -> None:
        """Remember that these weights have come, behind all others; the engine's keep an earlier place."""
        row = {"version": version, "first_seen_at": time.time(), "said_by": said_by}
        await self._insert(_PUT_VERSION, [row])

    async def versions(self) -> Sequence[tuple[str, str]]:
        """All weights, in the order in which they came last; who said so of each: "engine" or "caller"."""

        def run(connection: sqlite3.Connection) -> Sequence[tuple[str, str]]:
            rows = connection.execute("SELECT version, said_by FROM weights ORDER BY rowid")
            return [(row["version"], row["said_by"]) for row in rows]

        return await self._do(run, writes=False)

    async def delete(self, session_id: str) -> None:
        """Remove a session and all that belongs to it."""

        def run(connection: sqlite3.Connection) -> None:
            for table in ("sessions", "turns", "failures"):
                connection.execute(f"DELETE FROM {table} WHERE session_id = ?", (session_id,))  # noqa: S608

        await self._do(run)

    async def load(self, session_id: str) -> StoredSession | None:
        """A session with its turns; None where there is none."""
        return await self.read(session_id)

    async def read(self, session_id: str) -> StoredSession | None:
        """The same: nobody else may write it."""

        def run(
            connection: sqlite3.Connection,
        ) -> tuple[Any, list[Any], list[Any]]:
            where, given = "WHERE session_id = ? ORDER BY rowid", (session_id,)
            return (
                connection.execute("SELECT * FROM sessions WHERE session_id = ?", given).fetchone(),
                connection.execute(f"SELECT * FROM turns {where}", given).fetchall(),  # noqa: S608
                connection.execute(f"SELECT * FROM failures {where}", given).fetchall(),  # noqa: S608
            )

        found, turns, failures = await self._do(run, writes=False)
        if found is None:
            return None
        # Decoding takes longer than reading: not in the thread that others' commits wait for.
        return StoredSession(
            record_of(found),
            await asyncio.to_thread(rows_to_turns, turns),
            tuple(Failure(**{c.name: row[c.name] for c in FAILURES[1:]}) for row in failures),
        )

    async def holds(self, session_id: str) -> bool:
        """Whether it is written here and by nobody else: the file's lock says so for all of them."""
        del session_id
        return True

    async def release(self, session_id: str) -> None:
        """Nothing: nobody else could have it."""

    async def list_sessions(self, *, state: str | None, after: str, limit: int) -> Sequence[SessionRecord]:
        """Sessions in the order of their ids, from the first behind `after`."""
        statement = _LIST if state is None else _LIST_STATE

        def run(connection: sqlite3.Connection) -> list[Any]:
            given = {"after": after, "state": state, "limit": limit}
            return connection.execute(statement, given).fetchall()

        return [record_of(row) for row in await self._do(run, writes=False)]

    async def aclose(self) -> None:
        """Finish what is waiting and close."""
        if not self._closed:
            self._closed = True
            self._queue.put(None)
            await asyncio.to_thread(self._thread.join)
            self._opened.close()

    def _prepare(self, tokenizer: str | None) -> None:
        connection = self._connection
        connection.row_factory = sqlite3.Row
        if not self._readonly:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA busy_timeout=10000")  # an export may read the file at the same time
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, SCHEMA_VERSION):
            raise ConfigError(
                f"schema version {version}, but this tokentape knows {SCHEMA_VERSION}: "
                "use the tokentape that wrote it"
            )
        tables = {"sessions": SESSIONS, "turns": TURNS, "failures": FAILURES, "weights": WEIGHTS}
        for name, columns in tables.items():
            if not self._readonly:
                connection.execute(create_table(name, columns))
            names = ", ".join(c.name for c in columns)
            connection.execute(f"SELECT {names} FROM {name} LIMIT 0")  # noqa: S608  # not somebody else's table
        if self._readonly:
            return
        for index in _INDEXES:
            connection.execute(f"CREATE INDEX IF NOT EXISTS {index}")
        if version < SCHEMA_VERSION:
            connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
        if tokenizer is not None:
            connection.execute("CREATE TABLE IF NOT EXISTS tokenizer (fingerprint TEXT NOT NULL)")
            found = connection.execute("SELECT fingerprint FROM tokenizer").fetchone()
            if found is None:
                connection.execute("INSERT INTO tokenizer VALUES (?)", (tokenizer,))
            elif found[0] != tokenizer:
                raise ConfigError(
                    "its sessions were recorded with another tokenizer: use another --store for this --model"
                )

    async def _insert(self, statement: str, rows: Sequence[Mapping[str, Any]]) -> None:
        def run(connection: sqlite3.Connection) -> None:
            connection.executemany(statement, rows)  # the cursor dies here: another thread must not free it

        await self._do(run)

    async def _do(self, run: Callable[[sqlite3.Connection], T], *, writes: bool = True) -> T:
        if self._closed:
            raise StoreError("the store is closed")
        loop = asyncio.get_running_loop()
        work = _Work(run, writes, loop.create_future(), loop)
        self._queue.put(work)
        return await work.done

    def _serve(self) -> None:
        """The store's thread: everything that waits becomes one transaction."""
        running = True
        while running:
            batch = [self._queue.get()]
            with contextlib.suppress(queue.Empty):
                while True:
                    batch.append(self._queue.get_nowait())
            work = [item for item in batch if item is not None]
            running = len(work) == len(batch)
            if work:
                self._transact(work)

    def _transact(self, batch: list[_Work]) -> None:
        """Run a batch in one transaction; where that fails, each change in its own."""
        began, num_changes, committing = time.monotonic(), sum(work.writes for work in batch), False
        try:
            # A question takes no write lock: an export must not hold up the gateway that writes to its file.
            self._connection.execute("BEGIN IMMEDIATE" if any(work.writes for work in batch) else "BEGIN")
            results = [work.run(self._connection) for work in batch]
            committing = any(work.writes for work in batch)
            self._connection.execute("COMMIT")
        except Exception as error:  # a boundary: whatever a row cannot be turned into must not end the thread
            rolled_back = self._roll_back()
            if len(batch) > 1:  # a transaction that succeeds overwrites whatever this one left in the log
                for work in batch:
                    self._transact([work])
                return
            log.exception("store: %s", self._path)
            self._on_transaction(time.monotonic() - began, num_changes, False)
            # A constraint is checked before a write; otherwise COMMIT does not say how far it came.
            uncertain = not rolled_back or (committing and not isinstance(error, sqlite3.IntegrityError))
            _answer(batch[0], error=_typed(error, uncertain=uncertain and batch[0].writes))
        else:
            if num_changes:
                self._on_transaction(time.monotonic() - began, num_changes, True)
            for work, result in zip(batch, results, strict=True):
                _answer(work, result=result)

    def _roll_back(self) -> bool:
        """End a transaction that failed; whether it is known to have ended."""
        if self._connection.in_transaction:  # SQLite ends it by itself where the disk is full or broken
            with contextlib.suppress(sqlite3.Error):
                self._connection.execute("ROLLBACK")
        return not self._connection.in_transaction


def lock_store(path: str) -> IO[bytes]:
    """The lock of a store, held while the file is open: the kernel lets go of it however the process ends."""
    try:
        file = open(f"{path}.lock", "wb")  # noqa: SIM115, PTH123  # closed with the store
    except OSError as error:
        raise ConfigError(f"--store {path}: {error}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise ConfigError(f"--store {path} is in use by another gateway: stop it, or name another") from None
    return file


def _typed(error: Exception, *, uncertain: bool) -> StoreError:
    code = getattr(error, "sqlite_errorcode", None)  # the module's own errors have none
    kind = StoreFull if code == sqlite3.SQLITE_FULL else StoreError
    return kind(f"the store failed: {error}", uncertain=uncertain)


def _answer(work: _Work, *, result: object = None, error: StoreError | None = None) -> None:
    def answer() -> None:
        if work.done.done():  # the caller has gone
            return
        if error is not None:
            work.done.set_exception(error)
        else:
            work.done.set_result(result)

    with contextlib.suppress(RuntimeError):  # its loop is closed
        work.loop.call_soon_threadsafe(answer)


def row_of(columns: Sequence[Column], record: object) -> dict[str, Any]:
    """A record's fields as values of these columns."""
    values = {c.name: getattr(record, c.name) for c in columns}
    return values | {c.name: to_json(values[c.name]) for c in columns if c.kind == "json"}


def record_of(row: Mapping[str, Any] | sqlite3.Row) -> SessionRecord:
    """The session that a row of `SESSIONS` holds."""
    values = {c.name: row[c.name] for c in SESSIONS}
    for name in ("metadata", "turn_rewards", "branch_rewards"):
        values[name] = from_json(row[name], Json)
    values["sampling"] = from_json(row["sampling"], Sampling)
    return SessionRecord(**values)
