"""What only a shared store can get wrong: who may write a session, and what a lost answer means."""

import asyncio
from typing import Any

import psycopg
import pytest
from recorded import record, turn

from tokentape.errors import LeaseLost, SessionElsewhere, SessionExists
from tokentape.postgres import PostgresStore


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


async def test_a_turn_whose_answer_was_lost_is_stored_once(database: str) -> None:
    """The connection breaks behind the commit: the second try finds it."""
    store = PostgresStore(database)
    await store.put_session(record())
    broken: list[int] = []
    execute = psycopg.AsyncCursor.execute

    async def lost(self: Any, query: Any, *given: Any, **more: Any) -> Any:
        done = await execute(self, query, *given, **more)
        if b"INSERT INTO turns" in query and not broken:
            broken.append(1)
            await self.connection.close()
            raise psycopg.OperationalError("the connection is lost")
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(psycopg.AsyncCursor, "execute", lost)
        await store.put_turns("s", [turn("t1"), turn("t2")])
    assert broken
    stored = await store.load("s")
    assert stored is not None
    assert [t.turn_id for t in stored.turns] == ["t1", "t2"]
    await store.aclose()
