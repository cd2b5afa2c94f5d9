"""The store that replicas on several machines share: PostgreSQL, and leases that keep one writer a session.

A replica has a row that expires unless it is renewed, and a session names its holder and counts them: its
`fence`. Whoever asks for a session takes it where it has no holder or one that has expired, which raises the
fence. A commit names the fence that the session was taken with, in the same statement: who has lost a session
cannot write to it, whatever it believes. Expiry only decides when others may take it; exactness hangs on the
fence.

The thread that has the connections (`postgres_connections`) renews the lease.
"""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Any
from weakref import WeakValueDictionary

import psycopg
from psycopg.rows import DictRow
from psycopg_pool import PoolTimeout

from tokentape.errors import ConfigError, LeaseLost, SessionElsewhere, SessionExists, StoreError, one_line
from tokentape.postgres_connections import Connections
from tokentape.postgres_dsn import without_password
from tokentape.postgres_sql import (
    ARE_THERE,
    CREATE,
    DELETE,
    DISMISS,
    FAILED,
    FORGET,
    HELD_BY,
    HOLDER,
    LIST,
    LIST_STATE,
    LOAD,
    PUT_VERSION,
    RELEASE,
    RELEASE_ALL,
    RENEW,
    REPLACE,
    REPLICAS,
    TAKE,
    VERSIONS,
    Connection,
    put_turns,
)
from tokentape.schema import FAILURES, SESSIONS, rows_to_turns, turn_to_row
from tokentape.shared import Replica
from tokentape.store import Failure, SessionRecord, StoredSession, record_of, row_of
from tokentape.tape import Turn

log = logging.getLogger(__name__)

_NONE = -1  # no session has this fence


class PostgresStore:
    """A store in a PostgreSQL database, shared with whoever opens the same one.

    It makes its tables, and brings older ones up to date. A change that meets a PostgreSQL which is being
    restarted is tried again for half a minute; a turn is never stored twice.

    Args:
        dsn: `postgresql://user:password@host:port/database`, or whatever libpq takes.
        readonly: only look: take no session, make no table.
        tokenizer: fingerprint of the tokenizer whose ids the database holds; a new one takes it.
        lease_s: seconds after which others may take the sessions of a replica that is not heard of.
        on_transaction: is told of each change in the store's thread: seconds, number of changes, is it well.

    Raises:
        ConfigError: the database cannot be reached or written, has a newer schema, or holds the ids of
            another tokenizer.
    """

    def __init__(
        self,
        dsn: str,
        *,
        readonly: bool = False,
        tokenizer: str | None = None,
        lease_s: float = 10.0,
        on_transaction: Callable[[float, int, bool], None] = lambda seconds, changes, ok: None,
    ) -> None:
        self.replica_id = f"r-{secrets.token_hex(6)}"
        self.lease_s = lease_s
        self._url: str | None = None
        self._is_leaving = False
        self._name = without_password(dsn)
        self._readonly = readonly
        self._on_transaction = on_transaction
        self._fences: dict[str, int] = {}
        self._confirmed: dict[str, int] = {}  # session → the lapse before which it was last known to be held
        self._num_lapses = 0
        self._valid_until = 0.0  # on this machine's clock: taken before the database was asked
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._connections = Connections()
        try:
            self._connections.submit(self._open(dsn, tokenizer)).result()
        except (psycopg.Error, PoolTimeout, OSError, ConfigError) as error:
            self._connections.end()
            raise ConfigError(f"--store {self._name}: {' '.join(str(error).split())}") from None

    # -- the store

    async def put_session(self, record: SessionRecord) -> None:
        """Create the session, or replace its record."""
        row = row_of(SESSIONS, record)

        async def run(connection: Connection, again: bool) -> None:
            del again  # done twice is done once
            fence = self._fences.get(record.session_id)
            statement = CREATE if fence is None else REPLACE
            given = {**row, "me": self.replica_id, "fence": fence, "first": secrets.randbits(48)}
            found = await _row(connection, statement, given)
            if found is None and fence is None:
                raise SessionExists(f"session {record.session_id!r} exists already", param="session_id")
            self._check_held(record.session_id, held=found is not None)
            if record.state == "finished":  # it takes no more turns: nothing is to be kept
                self._fences.pop(record.session_id, None)
                self._confirmed.pop(record.session_id, None)
            elif found is not None:
                self._fences[record.session_id] = found["fence"]
                self._confirmed.setdefault(record.session_id, self._num_lapses)

        await self._change(record.session_id, run)

    async def put_turns(self, session_id: str, turns: Sequence[Turn]) -> None:
        """Append turns: all of them, or none; in one statement.

        Raises:
            LeaseLost: another replica has taken the session.
        """
        try:
            rows = [turn_to_row(session_id, turn) for turn in turns]
        except (TypeError, ValueError) as error:  # what JSON cannot hold: half a surrogate pair
            raise StoreError(f"turn {turns[0].turn_id} cannot be stored: {error}") from error
        given = {f"{name}{index}": value for index, row in enumerate(rows) for name, value in row.items()}
        given["session_id"] = session_id
        given["turn_ids"] = [turn.turn_id for turn in turns]

        async def run(connection: Connection, again: bool) -> None:
            if again and await _are_there(connection, given):
                return  # the first time went well, only its answer was lost
            given["fence"] = self._fences.get(session_id, _NONE)
            [found] = await _rows(connection, put_turns(len(turns), again=again), given)
            self._check_held(session_id, held=found["held"] == 1)
            if again and not await _are_there(connection, given):
                raise StoreError(f"turn {turns[0].turn_id} has the id of another")

        await self._change(session_id, run, num_changes=len(turns))

    async def put_failure(self, session_id: str, failure: Failure) -> None:
        """Append a failure."""
        row = row_of(FAILURES[1:], failure)
        row |= {"session_id": session_id, "message": failure.message.encode(errors="backslashreplace")}

        async def run(connection: Connection, again: bool) -> None:
            del again  # counted twice where an answer was lost: it is no data that is trained
            await connection.execute(FAILED, row)

        await self._change(session_id, run)

    async def put_version(self, version: str, said_by: str) -> None:
        """Remember that these weights have come, behind all others; the engine's keep an earlier place."""
        given = {"version": version, "now": time.time(), "said_by": said_by}

        async def run(connection: Connection, again: bool) -> None:
            del again
            await connection.execute(PUT_VERSION, given)

        await self._change("", run)

    async def versions(self) -> Sequence[tuple[str, str]]:
        """All weights, in the order in which they came last; who said so of each: "engine" or "caller"."""
        rows = await self._read(VERSIONS)
        return [(row["version"], row["said_by"]) for row in rows]

    async def delete(self, session_id: str) -> None:
        """Remove a session and all that belongs to it.

        Raises:
            LeaseLost: another replica has taken it.
        """

        async def run(connection: Connection, again: bool) -> None:
            del again
            given = {"session_id": session_id, "me": self.replica_id}
            [found] = await _rows(connection, DELETE, given)
            self._check_held(session_id, held=not found["there"])
            self._fences.pop(session_id, None)
            self._confirmed.pop(session_id, None)

        await self._change(session_id, run)

    async def load(self, session_id: str) -> StoredSession | None:
        """A session with its turns; None where there is none. From now on it is written here.

        Raises:
            SessionElsewhere: another replica has it.
        """
        return await self._load(session_id, self._take)

    async def read(self, session_id: str) -> StoredSession | None:
        """The same without taking it: whoever writes it goes on."""

        async def look(connection: Connection, given: Mapping[str, Any]) -> DictRow | None:
            return await _row(connection, LOAD["session"], given)

        return await self._load(session_id, look)

    async def _load(
        self, session_id: str, find: Callable[[Connection, Mapping[str, Any]], Awaitable[DictRow | None]]
    ) -> StoredSession | None:
        async def run(
            connection: Connection, again: bool
        ) -> tuple[DictRow, list[DictRow], list[DictRow]] | None:
            del again
            given = {"session_id": session_id, "me": self.replica_id}
            found = await find(connection, given)
            if found is None:
                return None
            return (
                found,
                await _rows(connection, LOAD["turns"], given),
                await _rows(connection, LOAD["failures"], given),
            )

        found = await self._connections.do(self._connections.trying(run, writes=False))
        if found is None:
            return None
        record, turns, failures = found
        return StoredSession(
            record_of(record),
            await asyncio.to_thread(rows_to_turns, turns),
            tuple(
                Failure(row["kind"], row["message"].decode(), row["num_tokens"], row["created_at"])
                for row in failures
            ),
        )

    async def holds(self, session_id: str) -> bool:
        """Whether a session loaded or created here still is written here and by nobody else.

        The database is asked only where the lease may have run out since it was last known.
        """
        if self.is_leased and self._confirmed.get(session_id) == self._num_lapses:
            return True
        fence, lapses = self._fences.get(session_id), self._num_lapses
        rows = await self._read(HELD_BY, {"session_id": session_id})
        # A finished one has no fence here: whatever becomes of its holder, it stays as it is.
        held = bool(rows) and (rows[0]["state"] == "finished" if fence is None else rows[0]["fence"] == fence)
        if held and fence is not None:
            self._confirmed[session_id] = lapses
        return held

    async def list_sessions(self, *, state: str | None, after: str, limit: int) -> Sequence[SessionRecord]:
        """Sessions in the order of their ids, from the first behind `after`."""
        given = {"after": after, "state": state, "limit": limit}
        rows = await self._read(LIST if state is None else LIST_STATE, given)
        return [record_of(row) for row in rows]

    async def aclose(self) -> None:
        """Finish what is waiting, give all sessions back, and close."""
        if not self._connections.closed:
            self._connections.closed = True
            await asyncio.wrap_future(self._connections.submit(self._close()))
            await asyncio.to_thread(self._connections.end)

    # -- replicas

    @property
    def num_lapses(self) -> int:
        """How often others may have taken this replica's sessions."""
        return self._num_lapses

    @property
    def is_leased(self) -> bool:
        """Whether this replica's lease holds, as far as it knows: nobody else can have its sessions."""
        return time.monotonic() < self._valid_until

    async def advertise(self, url: str | None, *, is_leaving: bool = False) -> None:
        """Say where the others reach this replica; None: it is no longer reached."""
        self._url, self._is_leaving = url, is_leaving
        try:
            await self._connections.do(self._renew())
        except (psycopg.Error, PoolTimeout) as error:
            raise StoreError(f"the store failed: {one_line(error)}") from error

    async def replicas(self) -> Sequence[Replica]:
        """The replicas that are reached."""
        return [Replica(**row) for row in await self._read(REPLICAS)]

    async def dismiss(self, replica_id: str) -> None:
        """Take a replica's lease away, because it is known to be dead: its sessions are anybody's at once."""

        async def run(connection: Connection, again: bool) -> None:
            del again
            await connection.execute(DISMISS, {"replica_id": replica_id})

        await self._change("", run)

    async def release(self, session_id: str) -> None:
        """Give a session back: whoever asks for it next has it."""

        async def run(connection: Connection, again: bool) -> None:
            del again
            if (fence := self._fences.get(session_id)) is not None:
                await connection.execute(RELEASE, {"session_id": session_id, "fence": fence})
            self._fences.pop(session_id, None)
            self._confirmed.pop(session_id, None)

        await self._change(session_id, run)

    async def release_all(self, busy: Collection[str]) -> None:
        """Give back all sessions but those `busy`: also the ones that are in no memory."""

        async def run(connection: Connection, again: bool) -> None:
            del again
            for row in await _rows(connection, RELEASE_ALL, {"me": self.replica_id, "busy": list(busy)}):
                self._fences.pop(row["session_id"], None)
                self._confirmed.pop(row["session_id"], None)

        await self._change("", run)

    # -- in the store's thread

    async def _open(self, dsn: str, tokenizer: str | None) -> None:
        await self._connections.open(dsn, tokenizer, readonly=self._readonly)
        if not self._readonly:
            await self._renew()
            async with self._connections.for_lease.connection() as connection:
                await connection.execute(FORGET)
            self._renewing = asyncio.ensure_future(self._renew_for_ever())

    async def _close(self) -> None:
        if not self._readonly:
            self._renewing.cancel()
        await self._connections.settle()
        with contextlib.suppress(psycopg.Error, PoolTimeout):  # then the lease runs out by itself
            if not self._readonly:
                async with self._connections.for_lease.connection() as connection:
                    await connection.execute(DISMISS, {"replica_id": self.replica_id})
        await self._connections.close()

    async def _renew(self) -> None:
        began = time.monotonic()
        async with self._connections.for_lease.connection() as connection:
            given = {
                "me": self.replica_id,
                "url": self._url,
                "is_leaving": self._is_leaving,
                "lease_s": self.lease_s,
            }
            [found] = await _rows(connection, RENEW, given)
        if self._valid_until < time.monotonic() or found["has_lapsed"]:  # by this clock, or by the database's
            self._num_lapses += 1  # others may have taken sessions meanwhile: each is asked for again
        self._valid_until = began + self.lease_s

    async def _renew_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self.lease_s / 5)
            try:
                await self._renew()
            except (psycopg.Error, PoolTimeout) as error:
                log.warning("store: the lease cannot be renewed: %s", one_line(error))

    async def _take(self, connection: Connection, given: Mapping[str, Any]) -> DictRow | None:
        lapses = self._num_lapses
        found = await _row(connection, TAKE, given)
        if found is not None:
            if found["state"] == "open":
                self._fences[found["session_id"]] = found["fence"]
                self._confirmed[found["session_id"]] = lapses
            else:
                self._fences.pop(found["session_id"], None)
            return found
        holder = await _row(connection, HOLDER, given)
        if holder is None:
            self._fences.pop(given["session_id"], None)
            return None
        raise SessionElsewhere(
            f"session {given['session_id']!r} is another replica's ({holder['holder']}); try again",
            url=holder["url"],
        )

    def _check_held(self, session_id: str, *, held: bool) -> None:
        if not held:
            self._fences[session_id] = _NONE  # until it is loaded again: nothing may make it anew
            self._confirmed.pop(session_id, None)
            raise LeaseLost(
                f"session {session_id!r} is no longer this replica's: nothing was stored; "
                "the next request is answered by the one that has it"
            )

    async def _read(self, statement: str, given: Mapping[str, Any] | None = None) -> list[DictRow]:
        async def run(connection: Connection, again: bool) -> list[DictRow]:
            del again
            return await _rows(connection, statement, given or {})

        return await self._connections.do(self._connections.trying(run, writes=False))

    async def _change(
        self, session_id: str, run: Callable[[Connection, bool], Awaitable[None]], *, num_changes: int = 1
    ) -> None:
        """Changes of one session are made one behind the other, in the order in which they were asked for."""

        async def change() -> None:
            began = time.monotonic()
            lock = self._turns.get(session_id)
            if lock is None:
                lock = self._turns[session_id] = asyncio.Lock()
            try:
                async with lock:
                    await self._connections.trying(run, writes=True)
            except BaseException:
                self._on_transaction(time.monotonic() - began, num_changes, False)
                raise
            self._on_transaction(time.monotonic() - began, num_changes, True)

        await self._connections.do(change())


async def _rows(connection: Connection, statement: str, given: Mapping[str, Any]) -> list[DictRow]:
    async with connection.cursor(binary=True) as cursor:
        await cursor.execute(statement.encode(), given)
        return await cursor.fetchall()


async def _row(connection: Connection, statement: str, given: Mapping[str, Any]) -> DictRow | None:
    return next(iter(await _rows(connection, statement, given)), None)


async def _are_there(connection: Connection, given: Mapping[str, Any]) -> bool:
    [found] = await _rows(connection, ARE_THERE, given)
    return found["there"] == len(given["turn_ids"])
