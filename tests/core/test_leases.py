"""What only a shared store can get wrong: who may write a session, and what a lost answer means."""

import asyncio
from typing import Any

import psycopg
import pytest
from recorded import record, turn

from tokentape.doctor.postgres import check_postgres
from tokentape.errors import ConfigError, LeaseLost, SessionElsewhere, SessionExists, StoreError
from tokentape.export import stored_samples
from tokentape.postgres import PostgresStore
from tokentape.shared import Replica


async def test_only_one_writes_a_session(database: str) -> None:
    one, two = PostgresStore(database, lease_s=60.0), PostgresStore(database, lease_s=60.0)
    await one.advertise("http://one")
    await one.put_session(record())
    await one.put_turns("s", [turn("t1")])
    with pytest.raises(SessionElsewhere) as elsewhere:
        await two.load("s")
    assert elsewhere.value.url == "http://one"
    with pytest.raises(SessionExists):
        await two.put_session(record(reward=2.0))
    with pytest.raises(LeaseLost):
        await two.put_turns("s", [turn("t2")])
    with pytest.raises(LeaseLost):
        await two.delete("s")
    assert await one.holds("s")
    await two.dismiss(one.replica_id)
    stored = await two.load("s")
    assert stored is not None
    assert [t.turn_id for t in stored.turns] == ["t1"]
    assert stored.record == record()
    for write in (one.put_turns("s", [turn("t3")]), one.put_session(record(reward=1.0))):
        with pytest.raises(LeaseLost):
            await write
    await two.put_turns("s", [turn("t4")])
    await one.aclose()
    await two.aclose()


async def test_who_is_leaving_is_seen_but_nobody_is_sent_there(database: str) -> None:
    one, two = PostgresStore(database, lease_s=60.0), PostgresStore(database, lease_s=60.0)
    await one.advertise("http://one", is_leaving=True)
    await one.put_session(record())
    assert await two.replicas() == [Replica(one.replica_id, "http://one", is_leaving=True)]
    with pytest.raises(SessionElsewhere) as elsewhere:
        await two.load("s")
    assert elsewhere.value.url is None
    await one.advertise(None)
    assert await two.replicas() == []
    await one.aclose()
    await two.aclose()


async def test_a_lease_that_ran_out_is_asked_for_again(database: str) -> None:
    """Who was cut off from the database answers for no session before it has looked."""
    one, two = PostgresStore(database, lease_s=0.3), PostgresStore(database, lease_s=60.0)
    await one.put_session(record())
    assert await one.holds("s")
    one._renewing.cancel()
    await asyncio.sleep(0.5)
    assert await one.holds("s")  # nobody has taken it: the database says so
    assert await two.load("s") is not None
    assert not await one.holds("s")
    await one.aclose()
    await two.aclose()


async def test_a_replica_that_was_taken_for_dead_asks_again(database: str) -> None:
    """Its lease was taken away while it lived: at the next renewal it knows that sessions may have gone."""
    one, two = PostgresStore(database, lease_s=60.0), PostgresStore(database, lease_s=60.0)
    await one.put_session(record())
    await two.dismiss(one.replica_id)
    assert await two.load("s") is not None
    await one._connections.do(one._renew())
    assert not await one.holds("s")
    await one.aclose()
    await two.aclose()


async def test_a_commit_is_one_statement(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One round trip: nothing opens or closes a transaction around it, however many turns there are."""
    store = PostgresStore(database)
    await store.put_session(record())
    said: list[Any] = []
    execute = psycopg.AsyncCursor.execute

    async def noted(self: Any, query: Any, *given: Any, **more: Any) -> Any:
        said.append(query)
        assert self.connection.autocommit
        return await execute(self, query, *given, **more)

    monkeypatch.setattr(psycopg.AsyncCursor, "execute", noted)
    await store.put_turns("s", [turn(f"t{n}") for n in range(8)])
    assert len(said) == 1
    assert await store.holds("s")
    assert len(said) == 1
    monkeypatch.undo()
    await store.aclose()


async def test_several_make_the_tables_at_once(database: str) -> None:
    stores = await asyncio.gather(*(asyncio.to_thread(PostgresStore, database) for _ in range(6)))
    await stores[0].put_session(record())
    assert [len(await one.list_sessions(state=None, after="", limit=9)) for one in stores] == [1] * 6
    for one in stores:
        await one.aclose()


def test_who_may_not_make_tables_is_told(database: str) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("DROP ROLE IF EXISTS reader")
        connection.execute("CREATE ROLE reader LOGIN")
        connection.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    with pytest.raises(ConfigError, match="permission denied for schema public"):
        PostgresStore(database.replace("tokentape@", "reader@"))


async def test_a_lease_that_is_renewed_too_late_is_another_one(database: str) -> None:
    """What it was known to hold before is asked for again, although it has a lease."""
    one, two = PostgresStore(database, lease_s=0.5), PostgresStore(database, lease_s=60.0)
    for session_id in ("s", "t"):
        await one.put_session(record(session_id))
    one._renewing.cancel()
    await asyncio.sleep(0.6)
    assert await two.load("s") is not None
    await one._connections.do(one._renew())
    assert one.is_leased
    assert [await one.holds(session_id) for session_id in ("s", "t")] == [False, True]
    await one.aclose()
    await two.aclose()


@pytest.mark.parametrize("is_taken", [False, True], ids=["still held", "taken meanwhile"])
async def test_a_turn_whose_answer_was_lost_is_stored_once(is_taken: bool, database: str) -> None:
    """The connection breaks behind the commit: the second try finds it, whoever has the session by then."""
    other = PostgresStore(database)
    store = PostgresStore(database)
    await store.put_session(record())
    broken: list[int] = []
    execute = psycopg.AsyncCursor.execute

    async def lost(self: Any, query: Any, *given: Any, **more: Any) -> Any:
        done = await execute(self, query, *given, **more)
        if isinstance(query, bytes) and b"INSERT INTO turns" in query and not broken:
            broken.append(1)
            await self.connection.close()
            if is_taken:
                await asyncio.wrap_future(other._connections.submit(_taken(other, store.replica_id)))
            raise psycopg.OperationalError("the connection is lost")
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(psycopg.AsyncCursor, "execute", lost)
        await store.put_turns("s", [turn("t1"), turn("t2")])
    assert broken
    stored = await (other if is_taken else store).load("s")
    assert stored is not None
    assert [t.turn_id for t in stored.turns] == ["t1", "t2"]
    await store.aclose()
    await other.aclose()


async def _taken(other: PostgresStore, holder: str) -> None:
    """Another replica takes the session; in its own store's thread."""
    async with other._connections.pool.connection() as connection:
        await connection.execute("DELETE FROM replicas WHERE replica_id = %s", (holder,))
        await other._take(connection, {"session_id": "s", "me": other.replica_id})


async def test_a_session_that_was_deleted_and_made_again_is_another_one(database: str) -> None:
    """Who held the first one commits nothing to the second: no two of them have the same fence."""
    one, two = PostgresStore(database, lease_s=60.0), PostgresStore(database, lease_s=60.0)
    await one.put_session(record())
    await two.dismiss(one.replica_id)
    assert await two.load("s") is not None
    await two.delete("s")
    await two.put_session(record(metadata={"of": "two"}))
    await one._connections.do(one._renew())
    assert not await one.holds("s")
    for write in (one.put_turns("s", [turn("t1")]), one.put_session(record(state="finished", reward=9.0))):
        with pytest.raises(LeaseLost):
            await write
    stored = await two.load("s")
    assert stored is not None
    assert (stored.record, stored.turns) == (record(metadata={"of": "two"}), ())
    await one.aclose()
    await two.aclose()


async def test_a_session_that_another_one_finished_is_read_again(database: str) -> None:
    """What was here before it went is half of it."""
    one, two = PostgresStore(database, lease_s=60.0), PostgresStore(database, lease_s=60.0)
    await one.put_session(record())
    await two.dismiss(one.replica_id)
    assert await two.load("s") is not None
    await two.put_turns("s", [turn("t1")])
    await two.put_session(record(state="finished"))
    await one._connections.do(one._renew())
    assert not await one.holds("s")
    assert await two.holds("s")
    await two.release_all(())
    stored = await one.load("s")
    assert stored is not None
    assert [t.turn_id for t in stored.turns] == ["t1"]
    assert await one.holds("s")
    await one.aclose()
    await two.aclose()


async def test_a_lease_that_ended_by_the_databases_clock_alone_is_another_one(database: str) -> None:
    one = PostgresStore(database, lease_s=60.0)
    async with await psycopg.AsyncConnection.connect(database, autocommit=True) as connection:
        await connection.execute("UPDATE replicas SET expires_at = now() - interval '1 second'")
    before = one.num_lapses
    await one._connections.do(one._renew())
    assert one.num_lapses == before + 1
    await one._connections.do(one._renew())
    assert one.num_lapses == before + 1
    await one.aclose()


async def test_commits_that_wait_do_not_delay_the_lease(database: str) -> None:
    """All of the store's connections wait for somebody's lock; the lease is renewed on its own."""
    store = PostgresStore(database, lease_s=1.0)
    names = [f"s{number}" for number in range(20)]
    for name in names:
        await store.put_session(record(name))
    async with await psycopg.AsyncConnection.connect(database) as connection:
        await connection.execute("LOCK TABLE turns IN SHARE MODE")
        commits = asyncio.gather(*(store.put_turns(name, [turn(f"t-{name}")]) for name in names))
        before = store.num_lapses
        for _ in range(20):
            await asyncio.sleep(0.1)
            assert store.is_leased
        assert not commits.done()
    await commits
    assert store.num_lapses == before
    await store.aclose()


async def test_to_read_is_not_to_take(database: str) -> None:
    one, two = PostgresStore(database, lease_s=60.0), PostgresStore(database, lease_s=60.0)
    await one.put_session(record())
    await one.put_turns("s", [turn("t1")])
    stored = await two.read("s")
    assert stored is not None
    assert [t.turn_id for t in stored.turns] == ["t1"]
    await one.put_turns("s", [turn("t2", parent_id="t1", branch_reason=None)])
    assert await two.read("none") is None
    [batch] = [batch async for batch in stored_samples(two, ["s"])]  # nor is to export
    assert batch.num_rows == 1
    await one.put_turns("s", [turn("t3", parent_id="t2", branch_reason=None)])
    await one.aclose()
    await two.aclose()


async def test_who_leaves_gives_back_what_it_does_not_use(database: str) -> None:
    """Also the sessions that are finished, and those that are in no memory any more."""
    one, two = PostgresStore(database, lease_s=60.0), PostgresStore(database, lease_s=60.0)
    for name in ("busy", "idle", "done"):
        await one.put_session(record(name))
    await one.put_session(record("done", state="finished"))
    await one.release_all({"busy"})
    assert await two.load("idle") is not None
    assert await two.load("done") is not None
    with pytest.raises(SessionElsewhere):
        await two.load("busy")
    await one.put_turns("busy", [turn("t1")])
    with pytest.raises(LeaseLost):
        await one.put_turns("idle", [turn("t2")])
    await one.aclose()
    await two.aclose()


async def test_a_lost_database_is_a_store_error(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever leaves just then must be able to."""
    store = PostgresStore(database, lease_s=60.0)

    async def lost() -> None:
        raise psycopg.OperationalError("the connection is closed")

    monkeypatch.setattr(store, "_renew", lost)
    with pytest.raises(StoreError, match="the connection is closed"):
        await store.advertise(None)
    await store.aclose()


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://tape:se/cret@127.0.0.1:1/x",
        "postgresql://tape:12/cret@127.0.0.1:1/x",
        "postgresql://tape:se@cret@127.0.0.1:1/x",
        "postgresql://tape:se@c/ret@127.0.0.1:1/x",
        "postgresql://tape:s?e@cret@127.0.0.1:1/x",
        "postgresql://tape:s?e@c/ret@127.0.0.1:1/x",
        "postgresql://tape:se%cret@127.0.0.1:1/x",
        "postgresql://tape:secret/x",
        "postgresql://tape:secret@[127.0.0.1:1/x",
        "postgresql://tape:secret@127.0.0.1:1/x?passwd=cret",
        "host=127.0.0.1 port=1 password=se cret",
    ],
)
def test_a_password_that_is_written_wrong_is_not_shown(dsn: str) -> None:
    """libpq takes a piece of it for the host, the port, the database or an option, and says so."""
    with pytest.raises(ConfigError, match="cannot be told apart") as caught:
        PostgresStore(dsn)
    checks = check_postgres(dsn, None)
    for said in (str(caught.value), checks[0].found):
        assert not any(piece in said for piece in ("tape:", "se/", "se@", "cret", "12"))


@pytest.mark.parametrize(
    ("dsn", "shown"),
    [
        ("postgresql://tape:s?user=ecret@127.0.0.1:1/x", "postgresql://127.0.0.1:1/x: "),
        ("postgresql://tape:s%2Fe%40c@127.0.0.1:1/x?connect_timeout=2", "postgresql://127.0.0.1:1/x: "),
        ("postgres://me%40corp:secret@127.0.0.1:1,[::1]:2/a%40b", "postgresql://127.0.0.1,::1:1,2/a@b: "),
        ("host=127.0.0.1 port=1 dbname=x password=s/e@c", "postgresql://127.0.0.1:1/x: "),
        ("postgresql:///x?host=/nowhere&user=me@corp&password=secret", "postgresql:///nowhere/x: "),
    ],
)
def test_a_dsn_is_shown_without_its_password(dsn: str, shown: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PostgresStore(dsn)
    assert str(caught.value).startswith(f"--store {shown}")
    assert not any(piece in str(caught.value) for piece in ("secret", "s/e", "ecret"))
