"""The store's contract, run through every implementation; then what only SQLite can get wrong."""

import asyncio
import contextlib
import itertools
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from recorded import Recorder, call, record, result, said, turn, user

from tokentape.errors import ConfigError, EngineFailed, SessionExists, StoreError, StoreFull
from tokentape.gateway.session import restore
from tokentape.gateway.sessions import Sessions
from tokentape.invariants import check_samples
from tokentape.metrics import Metrics
from tokentape.postgres import PostgresStore
from tokentape.schema import SCHEMA_VERSION
from tokentape.store import Failure, SessionRecord, SQLiteStore, Store, StoredSession
from tokentape.types import Message, Sampling, TokenRun
from tokentape.volatile import NOTHING

Open = Callable[[], Store]


@pytest.fixture(params=["sqlite", "postgres"])
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    """How an implementation is opened, again and again, on the same data."""
    if request.param == "sqlite":
        return lambda: SQLiteStore(tmp_path / "store.sqlite")
    dsn = request.getfixturevalue("database")
    return lambda: PostgresStore(dsn)


@pytest.fixture
async def store(open_store: Open) -> AsyncIterator[Store]:
    store = open_store()
    yield store
    await store.aclose()


async def reopened(store: Store, open_store: Open, session_id: str = "s") -> StoredSession | None:
    """What another process finds after this one has ended."""
    await store.aclose()
    other = open_store()
    try:
        return await other.load(session_id)
    finally:
        await other.aclose()


FULL = record(
    state="finished",
    created_at=1.75,
    metadata={"ünï": [1, 2.5, None, {"": "\0 😀"}], "big": 2**63},
    sampling=Sampling(temperature=0.0, stop=("</a>",), stop_token_ids=(0,), seed=0),
    max_turns=0,
    max_tokens=1,
    reward=0.0,
    group_id="",
    turn_rewards={"t": -1.5, "ü": 0.0},
    branch_rewards={"t": 2.0},
)


# -- the contract


@pytest.mark.parametrize(
    "made", [FULL, record(), record(metadata={}, reward=-1.0)], ids=["full", "bare", "some"]
)
async def test_a_session_comes_back_as_it_was(made: SessionRecord, store: Store, open_store: Open) -> None:
    await store.put_session(made)
    assert repr(await store.load("s")) == repr(StoredSession(made, (), ()))
    assert repr(await reopened(store, open_store)) == repr(StoredSession(made, (), ()))


async def test_turns_and_failures_come_back_in_order(store: Store, open_store: Open) -> None:
    ids = ["t3", "t1", "t2", "t0"]  # not their own order
    turns = [turn(i, parent_id=parent) for i, parent in zip(ids, [None, *ids], strict=False)]
    turns.append(
        turn(
            "t9",
            prompt=[],
            completion=[0, 2**31 - 1],
            logprobs=array("f", [-0.0, -1e-45]),
            stop_id=0,
            messages=(Message("user", ""), Message("tool", None, tool_call_id="")),
            reply=Message("assistant", None, ""),
            attempts=({"status": "ok", "span": [0, 1]},),
            num_cached_tokens=None,
        )
    )
    failures = [Failure("engine_failed", "a\0b 😀", 0, 3.5), Failure("client_gone", "", 7, 0.0)]
    await store.put_session(record())
    for one in turns:
        await store.put_turns("s", [one])
    for failure in failures:
        await store.put_failure("s", failure)
    expected = repr(StoredSession(record(), tuple(turns), tuple(failures)))
    assert repr(await store.load("s")) == expected
    assert repr(await reopened(store, open_store)) == expected


async def test_an_unknown_session_is_none(store: Store) -> None:
    assert await store.load("s") is None
    await store.delete("s")


async def test_a_record_is_replaced_and_its_turns_stay(store: Store) -> None:
    await store.put_session(record())
    await store.put_turns("s", [turn()])
    await store.put_failure("s", Failure("k", "m", 0, 0.0))
    await store.put_session(FULL)
    stored = await store.load("s")
    assert stored is not None
    assert (stored.record, len(stored.turns), len(stored.failures)) == (FULL, 1, 1)
    assert len(await store.list_sessions(state=None, after="", limit=9)) == 1


async def test_two_sessions_side_by_side(store: Store) -> None:
    for session_id in "ab":
        await store.put_session(record(session_id))
    for index in range(6):
        await store.put_turns("ab"[index % 2], [turn(f"t{index}")])
        await store.put_failure("ba"[index % 2], Failure("k", str(index), 0, 0.0))
    a, b = await store.load("a"), await store.load("b")
    assert a is not None
    assert b is not None
    assert [t.turn_id for t in a.turns] == ["t0", "t2", "t4"]
    assert [t.turn_id for t in b.turns] == ["t1", "t3", "t5"]
    assert [f.message for f in a.failures] == ["1", "3", "5"]
    await store.delete("a")
    assert await store.load("a") is None
    assert await store.load("b") == b


async def test_a_deleted_session_leaves_nothing_to_one_of_its_name(store: Store) -> None:
    for _ in range(2):
        await store.put_session(record())
        await store.put_turns("s", [turn()])  # the turn's id is free again as well
        await store.put_failure("s", Failure("k", "m", 0, 0.0))
        stored = await store.load("s")
        assert stored is not None
        assert (len(stored.turns), len(stored.failures)) == (1, 1)
        await store.delete("s")


async def test_sessions_are_listed_page_by_page(store: Store) -> None:
    names = ["a", "a-1", "a.2", "b", "B", "é", "~", "0"]
    for index, name in enumerate(names):
        await store.put_session(
            record(name, state="finished" if index % 2 else "open", metadata={"i": index})
        )

    async def listed(state: str | None, limit: int) -> list[str]:
        seen: list[str] = []
        while page := await store.list_sessions(state=state, after=seen[-1] if seen else "", limit=limit):
            assert len(page) <= limit
            assert all(r.metadata == {"i": names.index(r.session_id)} for r in page)
            seen += [r.session_id for r in page]
        return seen

    for limit in (1, 3, 8, 100):
        assert await listed(None, limit) == sorted(names)
        assert await listed("open", limit) == sorted(names[0::2])
        assert await listed("finished", limit) == sorted(names[1::2])
        assert await listed("sealed", limit) == []


async def test_versions_keep_their_order(store: Store, open_store: Open) -> None:
    """The engine's keep their place; a caller's is in force from now on, whenever it was before."""
    for version, said_by in (("b", "engine"), ("a", "caller"), ("b", "engine")):
        await store.put_version(version, said_by)
    assert await store.versions() == [("b", "engine"), ("a", "caller")]
    for version in ("b", "c", "a", "a"):
        await store.put_version(version, "caller")
    order = [("b", "caller"), ("c", "caller"), ("a", "caller")]
    assert await store.versions() == order
    await store.aclose()
    other = open_store()
    assert await other.versions() == order
    await other.aclose()


async def test_a_turn_of_a_known_id_is_refused_and_changes_nothing(store: Store) -> None:
    await store.put_session(record())
    await store.put_turns("s", [turn("t", created_at=1.0)])
    for session_id in ("s", "other"):
        with pytest.raises(StoreError):
            await store.put_turns(session_id, [turn("t", created_at=2.0)])
    stored = await store.load("s")
    assert stored is not None
    assert [t.created_at for t in stored.turns] == [1.0]


async def test_a_turn_that_cannot_be_encoded_is_refused(store: Store) -> None:
    await store.put_session(record())
    with pytest.raises(StoreError):
        await store.put_turns("s", [turn(reply=said("\ud800"))])
    with pytest.raises(StoreError):
        await store.put_turns("s", [turn(arguments={"a": object()})])
    stored = await store.load("s")
    assert stored is not None
    assert stored.turns == ()


async def test_a_hundred_puts_at_once_all_land_but_the_bad_ones(store: Store, open_store: Open) -> None:
    await store.put_session(record())
    await store.put_turns("s", [turn("known")])
    puts: list[Awaitable[None]] = []
    for index in range(100):
        puts.append(store.put_turns("s", [turn(f"t{index:03}")]))
        if index % 30 == 7:
            puts.append(store.put_turns("s", [turn("known")]))
    results = await asyncio.gather(*puts, return_exceptions=True)
    errors = [r for r in results if r is not None]
    assert len(errors) == 4
    assert all(isinstance(e, StoreError) for e in errors)
    stored = await reopened(store, open_store)
    assert stored is not None
    assert [t.turn_id for t in stored.turns] == ["known", *(f"t{i:03}" for i in range(100))]


async def test_who_no_longer_waits_disturbs_nobody(store: Store) -> None:
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    await store.put_session(record())
    tasks = [asyncio.ensure_future(store.put_turns("s", [turn(f"t{i}")])) for i in range(20)]
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert results[1::2] == [None] * 10
    assert all(isinstance(r, asyncio.CancelledError) for r in results[::2])
    stored = await store.load("s")
    assert stored is not None
    names = [t.turn_id for t in stored.turns]
    assert set(names) >= {f"t{i}" for i in range(1, 20, 2)}
    assert len(names) == len(set(names))
    assert complaints == []


async def test_a_closed_store_says_so(store: Store) -> None:
    await store.put_session(record())
    await store.aclose()
    await store.aclose()  # closing again is no mistake
    for use in (
        store.put_session(record()),
        store.put_turns("s", [turn()]),
        store.put_failure("s", Failure("k", "m", 0, 0.0)),
        store.delete("s"),
        store.load("s"),
        store.list_sessions(state=None, after="", limit=1),
    ):
        with pytest.raises(StoreError, match="closed"):
            await use


async def test_closing_waits_for_what_was_asked(store: Store, open_store: Open) -> None:
    await store.put_session(record())
    tasks = [asyncio.ensure_future(store.put_turns("s", [turn(f"t{i}")])) for i in range(50)]
    await asyncio.sleep(0)
    stored = await reopened(store, open_store)
    assert stored is not None
    assert len(stored.turns) == 50
    await asyncio.gather(*tasks)


def test_one_store_serves_several_loops(open_store: Open) -> None:
    store = open_store()
    asyncio.run(store.put_session(record()))
    asyncio.run(store.put_turns("s", [turn()]))
    assert asyncio.run(store.load("s")) is not None
    asyncio.run(store.aclose())


async def test_a_session_goes_on_after_a_restart_as_if_nothing_had_been(
    store: Store, open_store: Open
) -> None:
    """Attach, reasons and samples of the restored tree are those of the one that was lost."""
    recorder = Recorder()
    first = said("a", call(arguments='{"x": 1, "y": 2}'), reasoning="r")
    messages = [user("u"), first, result("1")]
    recorder.run([user("u")], first)
    recorder.run(messages, said("b"))
    recorder.run([user("u"), first, result("2")], said("c"))
    await store.put_session(record())
    for one in recorder.tree.turns():
        await store.put_turns("s", [one])
    stored = await reopened(store, open_store)
    assert stored is not None
    other = Recorder(restore(stored).tree)
    assert other.rows() == recorder.rows()
    assert check_samples(other.rows()) == []
    replay = [
        user("u"),
        said("a\n", call(arguments='{"y": 2.0, "x": 1}', id="z")),
        result("1", "z"),
        said("b"),
        user("v"),
    ]
    assert other.plan(replay) == recorder.plan(replay)
    parent, num_matched, reason = other.plan(replay)
    assert (parent.turn_id if parent else None, num_matched, reason) == ("t2", 4, None)


# -- sessions over a store


async def test_sessions_are_read_when_they_are_asked_for(store: Store) -> None:
    sessions = Sessions(store, (), NOTHING, Metrics())
    session = await sessions.create("s", metadata={"a": 1}, max_turns=2)
    await store.put_turns("s", [turn("t")])
    await sessions.fail(session, EngineFailed("no"), 3)
    others = Sessions(store, (), NOTHING, Metrics())
    again = await others.get("s")
    assert again is await others.get("s")
    assert (len(again.tree), again.num_sampled_tokens, again.failures) == (1, 2, {"engine_failed": 1})
    assert again.record == session.record
    with pytest.raises(SessionExists):
        await others.create("s")


async def test_a_failure_after_the_deletion_is_not_inherited(store: Store) -> None:
    """A turn is under way when its session is deleted; it fails; a new session takes the name."""
    sessions = Sessions(store, (), NOTHING, Metrics())
    session = await sessions.create("s")
    await sessions.delete("s")
    await sessions.fail(session, EngineFailed("late"), 0)
    await sessions.create("s")
    assert (await Sessions(store, (), NOTHING, Metrics()).get("s")).failures == {}


# -- SQLite


def table_rows(path: Path) -> list[str]:
    connection = sqlite3.connect(path)
    try:
        return [row[0] for row in connection.execute("SELECT turn_id FROM turns ORDER BY rowid")]
    finally:
        connection.close()


async def test_a_put_returns_after_its_commit(tmp_path: Path) -> None:
    """The control of "commit before reply": another connection sees the turn as soon as the put returns."""
    store = SQLiteStore(tmp_path / "s.sqlite")
    await store.put_session(record())
    for index in range(5):
        await store.put_turns("s", [turn(f"t{index}")])
        assert table_rows(tmp_path / "s.sqlite") == [f"t{i}" for i in range(index + 1)]
    await store.aclose()


async def test_turns_of_one_request_are_stored_together_or_not_at_all(tmp_path: Path) -> None:
    """The second of three cannot be stored: neither is the first, and what waited beside them is."""
    path = tmp_path / "s.sqlite"
    store = SQLiteStore(path)
    await store.put_session(record())
    await store.put_turns("s", [turn("t0")])
    with pytest.raises(StoreError):
        await store.put_turns("s", [turn("a"), turn("t0"), turn("b")])  # t0 is there already
    assert table_rows(path) == ["t0"]
    with pytest.raises(StoreError, match="cannot be stored"):
        await store.put_turns("s", [turn("a"), turn("b", reply=Message("assistant", "\ud800"))])
    assert table_rows(path) == ["t0"]
    release = threading.Event()
    blocked = asyncio.ensure_future(store._do(lambda _: release.wait(10)))
    await asyncio.sleep(0.05)
    puts = [["c1", "c2"], ["d1", "t0", "d2"], ["e1", "e2"]]
    work = [asyncio.ensure_future(store.put_turns("s", [turn(i) for i in ids])) for ids in puts]
    await asyncio.sleep(0)
    release.set()
    await blocked
    results = await asyncio.gather(*work, return_exceptions=True)
    assert [type(result) for result in results] == [type(None), StoreError, type(None)]
    assert table_rows(path) == ["t0", "c1", "c2", "e1", "e2"]
    await store.aclose()


async def test_what_waits_shares_a_transaction(tmp_path: Path) -> None:
    store = SQLiteStore(tmp_path / "s.sqlite")
    statements: list[str] = []
    store._connection.set_trace_callback(statements.append)
    release = threading.Event()
    blocked = asyncio.ensure_future(store._do(lambda _: release.wait(10)))
    await asyncio.sleep(0.05)
    puts = [asyncio.ensure_future(store.put_turns("s", [turn(f"t{i}")])) for i in range(64)]
    await asyncio.sleep(0)
    release.set()
    await asyncio.gather(blocked, *puts)
    assert statements.count("COMMIT") == 2  # the one that was blocked, and all the others
    await store.aclose()


async def test_durability_is_what_it_was_set_to(tmp_path: Path) -> None:
    store = SQLiteStore(tmp_path / "s.sqlite")
    for pragma, value in (("journal_mode", "wal"), ("synchronous", 2), ("user_version", SCHEMA_VERSION)):
        assert await store._do(lambda c, p=pragma: c.execute(f"PRAGMA {p}").fetchone()[0]) == value
    await store.aclose()


def _newer(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version={SCHEMA_VERSION + 1}")
    connection.close()


def _older(path: Path) -> None:
    """As the first release left it: other columns."""
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE turns (turn_id TEXT, session_id TEXT, ignored TEXT)")
    connection.execute("PRAGMA user_version=1")
    connection.close()


def _of_somebody_else(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE sessions (id INTEGER, cookie TEXT)")
    connection.close()


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "newer": (_newer, f"schema version {SCHEMA_VERSION + 1}.*knows {SCHEMA_VERSION}: use the tokentape that"),
    "older": (_older, f"schema version 1.*knows {SCHEMA_VERSION}: use the tokentape that wrote it"),
    "garbage": (lambda path: path.write_bytes(os.urandom(4096)), "not a database"),
    "text": (lambda path: path.write_text("hello " * 500), "not a database"),
    "directory": (lambda path: path.mkdir(), "unable to open"),
    "of another program": (_of_somebody_else, "session_id"),
    "no such directory": (lambda path: path.parent.rmdir(), "unable to open"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_file_that_is_no_store_is_a_wrong_option(kind: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "s.sqlite"
    make, words = WRONG[kind]
    make(path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(ConfigError, match=f"(?s)--store {path}: .*{words}"):
        SQLiteStore(path)
    if kind in ("garbage", "text"):
        assert path.read_bytes() == before


async def test_an_older_store_is_left_as_it_was(tmp_path: Path) -> None:
    _older(tmp_path / "s.sqlite")
    for readonly in (False, True):
        with pytest.raises(ConfigError, match="schema version 1"):
            SQLiteStore(tmp_path / "s.sqlite", readonly=readonly)
    connection = sqlite3.connect(tmp_path / "s.sqlite")
    tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    assert (tables, connection.execute("PRAGMA user_version").fetchone()) == ([("turns",)], (1,))
    connection.close()


def test_an_empty_file_is_a_new_store(tmp_path: Path) -> None:
    (tmp_path / "s.sqlite").touch()
    asyncio.run(SQLiteStore(tmp_path / "s.sqlite").aclose())
    assert table_rows(tmp_path / "s.sqlite") == []


async def test_a_full_disk_refuses_the_turn_and_keeps_the_others(tmp_path: Path) -> None:
    """SQLite's own limit of pages answers as a full disk does, with SQLITE_FULL."""
    store = SQLiteStore(tmp_path / "s.sqlite")
    await store.put_session(record())
    await store.put_turns("s", [turn("before")])
    pages = await store._do(lambda c: c.execute("PRAGMA page_count").fetchone()[0])
    await store._do(lambda c: c.execute(f"PRAGMA max_page_count={pages + 8}").fetchone())
    big = list(range(40_000))  # 160 kB: no room at all
    for _ in range(2):
        with pytest.raises(StoreFull, match="full"):
            await store.put_turns("s", [turn("big", prompt=big)])
    results = await asyncio.gather(
        store.put_turns("s", [turn("small-1")]),
        store.put_turns("s", [turn("big", prompt=big)]),
        store.put_turns("s", [turn("small-2")]),
        return_exceptions=True,
    )
    assert [type(r) for r in results] == [type(None), StoreFull, type(None)]
    await store._do(lambda c: c.execute("PRAGMA max_page_count=1000000").fetchone())
    await store.put_turns("s", [turn("big", prompt=big)])  # the same turn, once there is room
    await store.aclose()
    assert table_rows(tmp_path / "s.sqlite") == ["before", "small-1", "small-2", "big"]


async def test_a_file_that_turned_read_only_refuses_the_turn(tmp_path: Path) -> None:
    store = SQLiteStore(tmp_path / "s.sqlite")
    await store.put_session(record())
    await store._do(lambda c: c.execute("PRAGMA query_only=1"))
    with pytest.raises(StoreError, match="readonly"):
        await store.put_turns("s", [turn()])
    assert await store.load("s") == StoredSession(record(), (), ())
    await store._do(lambda c: c.execute("PRAGMA query_only=0"), writes=False)
    await store.put_turns("s", [turn()])
    await store.aclose()


async def test_a_commit_that_fails_is_no_success(tmp_path: Path) -> None:
    """Every statement ran, only the commit did not: that is where a deferred constraint is checked."""
    store = SQLiteStore(tmp_path / "s.sqlite")

    def orphan(connection: sqlite3.Connection) -> None:
        connection.execute("PRAGMA defer_foreign_keys=1")
        connection.execute("INSERT INTO child VALUES ('nobody')")

    connection = store._connection
    connection.execute("CREATE TABLE child (id TEXT REFERENCES sessions(session_id))")
    connection.execute("PRAGMA foreign_keys=1")
    good = asyncio.ensure_future(store.put_session(record()))
    with pytest.raises(StoreError, match="FOREIGN KEY"):
        await store._do(orphan)
    await good
    await store.put_turns("s", [turn()])
    assert connection.in_transaction is False
    await store.aclose()
    assert table_rows(tmp_path / "s.sqlite") == ["t"]


async def test_a_question_waits_for_no_writer_and_holds_up_none(tmp_path: Path) -> None:
    """`tokentape export` reads the file that a gateway is writing to."""
    reader = SQLiteStore(tmp_path / "s.sqlite")
    writer = sqlite3.connect(tmp_path / "s.sqlite", timeout=0, check_same_thread=False)
    await reader.put_session(record())
    writer.execute("BEGIN IMMEDIATE")
    assert await reader.load("s") == StoredSession(record(), (), ())
    writer.rollback()

    def read(connection: sqlite3.Connection) -> str:
        connection.execute("SELECT count(*) FROM turns").fetchone()
        writer.execute("UPDATE sessions SET state = 'finished'")  # locked, if the question held the lock
        writer.commit()
        return "read"

    assert await reader._do(read, writes=False) == "read"
    [seen] = await reader.list_sessions(state=None, after="", limit=1)
    assert seen.state == "finished"
    writer.close()
    await reader.aclose()


async def test_another_process_that_holds_the_file_is_waited_for(tmp_path: Path) -> None:
    store = SQLiteStore(tmp_path / "s.sqlite")
    await store.put_session(record())
    other = sqlite3.connect(tmp_path / "s.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    put = asyncio.ensure_future(store.put_turns("s", [turn()]))
    await asyncio.sleep(0.2)
    assert not put.done()
    other.execute("ROLLBACK")
    await put
    other.close()
    await store.aclose()


WRITER = """
import asyncio, sys
from recorded import record, turn
from tokentape.store import SQLiteStore

async def write(store, session_id):
    await store.put_session(record(session_id))
    for index in range(10**6):
        name = f"{session_id}-{index}"
        await store.put_turns(session_id, [turn(name, prompt=[index] * 2000, completion=[index] * 50)])
        print(name, flush=True)

async def main():
    store = SQLiteStore(sys.argv[1])
    await asyncio.gather(*(write(store, f"s{n}") for n in range(4)))

asyncio.run(main())
"""


@pytest.mark.parametrize("num_acknowledged", [1, 40, 150])
def test_what_was_acknowledged_survives_a_kill(tmp_path: Path, num_acknowledged: int) -> None:
    path = tmp_path / "s.sqlite"
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
    )
    assert writer.stdout is not None
    acknowledged = list(itertools.islice(writer.stdout, num_acknowledged))
    writer.send_signal(signal.SIGKILL)
    acknowledged += [line for line in writer.stdout if line.endswith("\n")]
    writer.stdout.close()
    assert writer.wait() == -signal.SIGKILL
    names = [line.strip() for line in acknowledged]
    assert len(names) >= num_acknowledged

    asyncio.run(check_after_kill(path, names))


async def check_after_kill(path: Path, names: list[str]) -> None:
    """Every acknowledged turn is there, whole; at most one more of each session; and the store goes on."""
    store = SQLiteStore(path)
    [check] = await store._do(lambda c: c.execute("PRAGMA integrity_check").fetchone())
    assert check == "ok"
    stored = [await store.load(f"s{n}") for n in range(4)]
    turns = {t.turn_id: t for one in stored if one for t in one.turns}
    assert set(names) <= set(turns)
    assert len(turns) - len(names) <= 4  # committed, and killed before it could say so
    for one in turns.values():  # no half turn
        one.verify()
        index = int(one.turn_id.split("-")[1])
        assert one.prompt == TokenRun([index] * 2000)
        assert one.completion == TokenRun([index] * 50)
    for number, one in enumerate(stored):  # no gap either
        found = [t.turn_id for t in one.turns] if one else []
        assert found == [f"s{number}-{i}" for i in range(len(found))]
    await store.put_turns("s0", [turn("and on")])
    await store.aclose()


async def test_the_control_a_store_that_answers_too_early_is_caught(tmp_path: Path) -> None:
    """The same check on a store that skips its commit."""

    class Early(SQLiteStore):
        def _transact(self, batch: list[Any]) -> None:
            for work in batch:
                result = work.run(self._connection)
                work.loop.call_soon_threadsafe(work.done.set_result, result)

    store = Early(tmp_path / "s.sqlite")
    store._connection.execute("BEGIN IMMEDIATE")
    await store.put_turns("s", [turn()])
    assert table_rows(tmp_path / "s.sqlite") == []  # acknowledged, and not there
    store._connection.execute("ROLLBACK")
    await store.aclose()


async def test_ids_of_two_tokenizers_never_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    await SQLiteStore(path, tokenizer="a").aclose()
    await SQLiteStore(path).aclose()  # an export does not ask
    await SQLiteStore(path, tokenizer="a").aclose()
    with pytest.raises(ConfigError, match="another tokenizer"):
        SQLiteStore(path, tokenizer="b")


async def test_one_file_has_one_exclusive_writer(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    first = SQLiteStore(path, exclusive=True)
    with pytest.raises(ConfigError, match="in use by another gateway"):
        SQLiteStore(path, exclusive=True)
    reader = SQLiteStore(path)  # an export may look
    await reader.aclose()
    await first.aclose()
    again = SQLiteStore(path, exclusive=True)  # the negative control: it was the lock, not the file
    await again.aclose()


async def test_a_reader_changes_nothing(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.sqlite"
    with contextlib.closing(sqlite3.connect(foreign)) as connection:
        connection.execute("CREATE TABLE theirs (x)")
    before = foreign.read_bytes()
    with pytest.raises(ConfigError, match=r"foreign\.sqlite"):
        SQLiteStore(foreign, readonly=True)
    assert foreign.read_bytes() == before
    with pytest.raises(ConfigError, match=r"none\.sqlite"):
        SQLiteStore(tmp_path / "none.sqlite", readonly=True)
    assert not (tmp_path / "none.sqlite").exists()
    writer = SQLiteStore(tmp_path / "store.sqlite")
    await writer.put_session(record())
    reader = SQLiteStore(tmp_path / "store.sqlite", readonly=True)  # the negative control
    assert (await reader.load("s")) == StoredSession(record(), (), ())
    with pytest.raises(StoreError):
        await reader.put_session(record())
    await reader.aclose()
    await writer.aclose()
