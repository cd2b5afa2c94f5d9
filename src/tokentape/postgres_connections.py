"""The thread that has a PostgreSQL store's connections, and what it does when one of them is lost."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

import psycopg
import uvloop
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from tokentape.errors import StoreError, StoreFull, one_line
from tokentape.postgres_sql import Connection, migrate

T = TypeVar("T")

_PATIENCE_S = 30.0  # how long a change waits for a PostgreSQL that is being restarted
_RETRY_S = 0.2
_MAX_CONNECTIONS = 16
_CONNECTING: Mapping[str, Any] = {
    # A partition must become an error: packets that nobody answers, then probes where nothing is sent.
    "connect_timeout": 5,
    "tcp_user_timeout": 8000,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 2,
    "application_name": "tokentape",
}


class Connections:
    """A pool for what is stored and read, a connection of its own for the lease, and their thread.

    Nothing that a gateway computes delays them; commits that wait for each other do not delay the lease.
    """

    def __init__(self) -> None:
        self.closed = False
        self._working: set[asyncio.Task[Any]] = set()
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tokentape-store", daemon=True)
        self._thread.start()

    async def open(self, dsn: str, tokenizer: str | None, *, readonly: bool) -> None:
        """Connect, and bring the tables up to date; in the thread.

        Raises:
            ConfigError: as `postgres_sql.migrate`.
            psycopg.Error: it cannot be reached.
        """
        options = "default_transaction_read_only=on" if readonly else "synchronous_commit=on"
        told = str(conninfo_to_dict(dsn).get("options", ""))
        conninfo = make_conninfo(
            dsn,
            **{name: value for name, value in _CONNECTING.items() if name not in conninfo_to_dict(dsn)},
            options=f"{told} -c idle_in_transaction_session_timeout=30s -c {options}".strip(),
        )
        async with await Connection.connect(conninfo, autocommit=True, row_factory=dict_row) as connection:
            await migrate(connection, tokenizer, readonly=readonly)
        self.pool, self.for_lease = (
            AsyncConnectionPool[Connection](
                conninfo,
                kwargs={"autocommit": True, "row_factory": dict_row},
                min_size=0 if readonly else 1,
                max_size=size,
                timeout=5.0,
                open=False,
            )
            for size in (_MAX_CONNECTIONS, 1)
        )
        await self.pool.open()
        if not readonly:
            await self.for_lease.open()

    async def trying(self, run: Callable[[Connection, bool], Awaitable[T]], *, writes: bool) -> T:
        """Run on a connection, and `again` on another one where it was lost: it may be done already.

        Raises:
            StoreError: it did not go well for half a minute.
        """
        until, again = self._loop.time() + _PATIENCE_S, False
        while True:
            sent = False
            try:
                async with asyncio.timeout_at(until), self.pool.connection() as connection:
                    sent = True
                    return await run(connection, again)
            except (
                psycopg.OperationalError,
                PoolTimeout,
                psycopg.errors.ReadOnlySqlTransaction,
                TimeoutError,
            ) as error:
                again = again or (sent and writes)
                if isinstance(error, psycopg.errors.DiskFull):
                    raise StoreFull(f"the store failed: {one_line(error)}") from error
                if self._loop.time() >= until or self.closed:
                    raise StoreError(f"the store failed: {one_line(error)}", uncertain=again) from error
                await asyncio.sleep(_RETRY_S)
            except psycopg.Error as error:
                raise StoreError(f"the store failed: {one_line(error)}", uncertain=again) from error

    async def do(self, work: Coroutine[Any, Any, T]) -> T:
        """Have it done in the thread, to its end even where the caller no longer waits."""
        if self.closed:
            work.close()
            raise StoreError("the store is closed")
        done = self.submit(work)
        done.add_done_callback(lambda one: one.cancelled() or one.exception())  # somebody has looked at it
        return await asyncio.shield(asyncio.wrap_future(done))

    def submit(self, work: Coroutine[Any, Any, T]) -> "Future[T]":
        """The same, from any thread."""

        async def run() -> T:
            task = asyncio.current_task()
            assert task is not None  # noqa: S101  # it is one
            self._working.add(task)
            try:
                return await work
            finally:
                self._working.discard(task)

        return asyncio.run_coroutine_threadsafe(run(), self._loop)

    async def settle(self) -> None:
        """Finish what is being done; in the thread."""
        await asyncio.gather(
            *(task for task in self._working if task is not asyncio.current_task()), return_exceptions=True
        )

    async def close(self) -> None:
        """Close the connections; in the thread."""
        await self.for_lease.close()
        await self.pool.close()

    def end(self) -> None:
        """End the thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
