"""What all replicas are told reaches those that come, that leave, and that were cut off from the store."""

import asyncio
import contextlib
import itertools
import json
import threading
import time
from collections.abc import AsyncGenerator, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import aiohttp.web
import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from gatewaykit import TOKENIZER, USER, Agent, Gateway, gateway_for, sampled
from tokentape.engines.server import serve
from tokentape.gateway import catchup, replicas
from tokentape.gateway.memory import MemoryLimits
from tokentape.gateway.replicas import places
from tokentape.testing import FakeSGLang, ReceivedRequest, Reply

T = TypeVar("T")
LEASE_S = 1.0
LONG = {"messages": [{"role": "user", "content": "hello world hello"}]}


class Cable:
    """What a replica reaches its store through; while it is cut nothing goes through.

    It has a thread of its own: a store that is being opened keeps the caller's loop from running.
    """

    def __init__(self, dsn: str) -> None:
        given = conninfo_to_dict(dsn)
        self._target = given["host"], int(given["port"])
        self._is_cut = False
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._server = self._do(asyncio.start_server(self._connected, "127.0.0.1", 0))
        port = self._server.sockets[0].getsockname()[1]
        self.dsn = f"postgresql://{given['user']}@127.0.0.1:{port}/{given['dbname']}"

    def cut(self) -> None:
        self._do(self._cut())

    def mend(self) -> None:
        self._is_cut = False

    def close(self) -> None:
        self.cut()
        self._server.close()
        self._do(asyncio.sleep(0.1))  # its connections end
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _cut(self) -> None:
        self._is_cut = True
        for writer in self._writers:
            writer.transport.abort()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._is_cut:
            writer.transport.abort()
            return
        up_reader, up_writer = await asyncio.open_connection(*self._target)
        both = {writer, up_writer}
        self._writers |= both
        await asyncio.gather(_pump(reader, up_writer), _pump(up_reader, writer))
        self._writers -= both


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.transport.abort()


@pytest.fixture
def cable(database: str) -> Iterator[Cable]:
    with contextlib.closing(Cable(database)) as cable:
        yield cable


def at(gateway: Gateway, *others: Gateway) -> str:
    """An id whose place is a gateway, among others."""
    urls = [gateway.url, *(other.url for other in others)]
    return next(name for name in (f"s{n}" for n in itertools.count()) if places(name, urls)[0] == gateway.url)


async def until(gateway: Gateway, *, current: bool) -> None:
    async with asyncio.timeout(10):
        while (await gateway.ok("GET", "/healthz"))["current"] != current:  # noqa: ASYNC110  # a state
            await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def two(
    fake: FakeSGLang, model_dir: Path, one: str, other: str
) -> AsyncGenerator[tuple[Gateway, Gateway]]:
    async with (
        gateway_for(fake.url, model_dir, one, lease_s=LEASE_S) as first,
        gateway_for(fake.url, model_dir, other, lease_s=LEASE_S) as second,
    ):
        yield first, second


async def announced(gateway: Gateway, version: str) -> None:
    await gateway.ok("POST", "/pause")
    await gateway.ok("POST", "/weights", {"version": version})
    await gateway.ok("POST", "/resume")


async def test_orders_missed_by_one_that_is_cut_off(
    fake: FakeSGLang, model_dir: Path, database: str, cable: Cable
) -> None:
    """It is back with the pause, or without it, and with the weights' name, before it samples."""
    fake.responder = lambda _: sampled("hello")
    async with two(fake, model_dir, cable.dsn, database) as (away, stays):
        await announced(stays, "v1")
        cable.cut()
        await until(away, current=False)
        await asyncio.sleep(LEASE_S)
        await stays.ok("POST", "/pause")
        await stays.ok("POST", "/weights", {"version": "v2"})
        assert not (await away.ok("GET", "/healthz"))["paused"]
        cable.mend()
        await until(away, current=True)
        assert (await away.ok("GET", "/healthz"))["paused"]
        cable.cut()
        await until(away, current=False)
        await asyncio.sleep(LEASE_S)
        await stays.ok("POST", "/resume")
        session_id = at(away, stays)
        await stays.create(session_id=session_id)
        cable.mend()
        await until(away, current=True)
        async with asyncio.timeout(10):
            await Agent(away, session_id).turn(USER)
        [sample] = await stays.samples(session_id)
        assert [span["version"] for span in sample["weight_versions"]] == ["v2"]


async def test_a_turn_under_which_unnamed_weights_changed_unseen(
    fake: FakeSGLang, model_dir: Path, database: str, cable: Cable
) -> None:
    """Nobody knows which weights sampled which token: it is refused, not named after the old ones."""
    fake.responder = lambda _: sampled("hello world " * 10, delay_s=0.08)
    async with two(fake, model_dir, cable.dsn, database) as (away, stays):
        await announced(stays, "v1")
        session_id = at(away, stays)
        await away.create(session_id=session_id)
        turn = asyncio.ensure_future(away.post(session_id, LONG))
        await fake.until(lambda: bool(fake.requests))
        cable.cut()
        await until(away, current=False)
        await asyncio.sleep(LEASE_S)
        await announced(stays, "v2")
        assert not turn.done()
        cable.mend()
        answer = await turn
        assert (answer.status, answer.error["code"]) == (503, "engine_aborted"), answer
        fake.responder = lambda _: sampled("hello")
        assert (await away.post(session_id, LONG)).status == 200
        assert set((await away.show(session_id))["weight_versions"]) == {"v2"}


async def test_one_that_comes_samples_nothing_before_it_knows(
    fake: FakeSGLang, model_dir: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the first of the others is mute: which holds up nobody."""

    async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    fake.responder = lambda _: sampled("hello")
    async with (
        gateway_for(fake.url, model_dir, database, lease_s=60.0) as gateway,
        await asyncio.start_server(mute, "127.0.0.1", 0) as server,
    ):
        await gateway.ok("POST", "/pause")
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        with psycopg.connect(database, autocommit=True) as connection:
            put = "INSERT INTO replicas VALUES ('r-0', %s, false, now() + interval '60 s')"
            connection.execute(put, (url,))
            monkeypatch.setattr(catchup, "_ASK_S", 60.0)
            began = time.monotonic()
            async with gateway_for(fake.url, model_dir, database, lease_s=60.0) as late:
                assert time.monotonic() - began < 30
                assert (await late.ok("GET", "/healthz")).items() >= {"paused": True, "current": True}.items()
                connection.execute("DELETE FROM replicas WHERE replica_id = 'r-0'")
                session_id = at(late, gateway, Gateway(url, late.http))
                await late.create(session_id=session_id)
                turn = asyncio.ensure_future(late.post(session_id, LONG))
                await asyncio.sleep(0.3)
                assert not fake.requests
                await gateway.ok("POST", "/resume")
                assert (await turn).status == 200


async def test_a_turn_waits_while_nobody_says_whether_there_is_a_pause(
    fake: FakeSGLang, model_dir: Path, database: str
) -> None:
    """One that is just coming is asked for a session already: its answer waits until it knows."""
    fake.responder = lambda _: sampled("hello")
    silence = asyncio.Event()

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await silence.wait()
        body = b'{"paused": true, "current": true}'
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        writer.write(head.encode() + body)
        writer.close()

    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(await asyncio.start_server(slow, "127.0.0.1", 0))
        slow_url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        # The tables must be there before a replica that does not exist is put into them.
        async with gateway_for(fake.url, model_dir, database, lease_s=LEASE_S) as first:
            await first.create(session_id="s")
        with psycopg.connect(database, autocommit=True) as connection:
            put = "INSERT INTO replicas VALUES ('r-0', %s, false, now() + interval '60 s')"
            connection.execute(put, (slow_url,))
            coming = asyncio.ensure_future(
                stack.enter_async_context(gateway_for(fake.url, model_dir, database, lease_s=LEASE_S))
            )
            find = "SELECT url FROM replicas WHERE url IS NOT NULL AND replica_id <> 'r-0'"
            while not (found := connection.execute(find).fetchall()):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            assert not coming.done()
            url = found[0][0]
        session = await stack.enter_async_context(aiohttp.ClientSession())
        gateway = Gateway(url, session)
        turn = asyncio.ensure_future(gateway.post("s", LONG, {"X-Tokentape-Passed-On": "1"}))
        await asyncio.sleep(0.5)
        assert not fake.requests
        silence.set()
        await coming
        await asyncio.sleep(0.5)
        assert not fake.requests
        turn.cancel()


async def test_one_that_leaves_is_told(fake: FakeSGLang, model_dir: Path, database: str) -> None:
    """It gets no session, and still samples what it has."""
    fake.responder = lambda _: sampled("hello " * 20, delay_s=0.05)
    async with contextlib.AsyncExitStack() as stack:
        own = await stack.enter_async_context(contextlib.AsyncExitStack())
        options = {"lease_s": 60.0, "drain_s": 20.0}
        goes = await own.enter_async_context(gateway_for(fake.url, model_dir, database, **options))
        stays = await stack.enter_async_context(gateway_for(fake.url, model_dir, database, lease_s=60.0))
        client = await stack.enter_async_context(aiohttp.ClientSession())
        goes = Gateway(goes.url, client)
        session_id = at(goes, stays)
        await goes.create(session_id=session_id)
        turn = asyncio.ensure_future(goes.post(session_id, LONG))
        await fake.until(lambda: bool(fake.requests))
        leaving = asyncio.ensure_future(own.aclose())
        await asyncio.sleep(0.3)
        await stays.ok("POST", "/pause")
        assert (await goes.ok("GET", "/healthz"))["paused"]
        assert not turn.done()
        await stays.ok("POST", "/resume")
        assert (await turn).status == 200
        await leaving
        assert (await stays.show(session_id))["turns"] == 1


async def test_one_that_leaves_gives_back_what_it_does_not_use(
    fake: FakeSGLang, model_dir: Path, database: str
) -> None:
    """Also what is finished, and what has left its memory: nobody waits for its last turn."""
    fake.responder = lambda _: sampled("hello")
    async with contextlib.AsyncExitStack() as stack:
        own = await stack.enter_async_context(contextlib.AsyncExitStack())
        memory = MemoryLimits(max_sessions=2)
        goes = await own.enter_async_context(
            gateway_for(fake.url, model_dir, database, lease_s=60.0, drain_s=20.0, memory=memory)
        )
        client = await stack.enter_async_context(aiohttp.ClientSession())
        goes = Gateway(goes.url, client)
        for session_id in ("evicted", "idle", "finished", "busy"):
            await goes.create(session_id=session_id)
            await Agent(goes, session_id).turn(USER)
        await goes.ok("POST", "/sessions/finished/finish", {"reward": 1.0})
        fake.responder = lambda _: sampled("hello " * 8, delay_s=0.1)
        turn = asyncio.ensure_future(goes.post("busy", LONG))
        await fake.until(lambda: len(fake.requests) == 5)
        stays = await stack.enter_async_context(gateway_for(fake.url, model_dir, database, lease_s=60.0))
        leaving = asyncio.ensure_future(own.aclose())
        async with asyncio.timeout(3):
            for session_id in ("evicted", "idle", "finished"):
                assert (await stays.show(session_id))["turns"] == 1
        assert not turn.done()
        assert (await turn).status == 200
        await leaving


async def test_a_body_that_comes_slowly_while_its_session_moves(
    fake: FakeSGLang, model_dir: Path, database: str
) -> None:
    fake.responder = lambda _: sampled("hello")
    async with contextlib.AsyncExitStack() as stack:
        one = await stack.enter_async_context(gateway_for(fake.url, model_dir, database, lease_s=LEASE_S))
        names = [f"s{n}" for n in range(6)]
        for name in names:
            await one.create(session_id=name)
        rest = asyncio.Event()

        async def slowly() -> AsyncGenerator[bytes]:
            body = json.dumps(LONG).encode()
            yield body[:5]
            await rest.wait()
            yield body[5:]

        async def post(name: str) -> int:
            path = f"{one.url}/sessions/{name}/v1/chat/completions"
            async with one.http.post(path, data=slowly()) as answer:
                return answer.status

        posts = asyncio.gather(*(post(name) for name in names))
        await asyncio.sleep(0.2)
        await stack.enter_async_context(gateway_for(fake.url, model_dir, database, lease_s=LEASE_S))
        await asyncio.sleep(LEASE_S)
        rest.set()
        assert await posts == [200] * len(names)


async def test_the_oldest_version_of_a_session_that_moved(
    fake: FakeSGLang, model_dir: Path, database: str
) -> None:
    """Versions that others saw have their place, too."""

    def answer(_: ReceivedRequest) -> Reply:
        return sampled("hello")

    fake.responder, fake.weight_version = answer, "w1"
    async with gateway_for(fake.url, model_dir, database, lease_s=60.0) as one:
        async with gateway_for(fake.url, model_dir, database, lease_s=60.0) as two:
            agent = Agent(two, at(two, one))
            await two.create(session_id=agent.session_id)
            await agent.turn(USER)
            fake.weight_version = "w2"
            other = at(one, two)
            await one.create(session_id=other)
            await Agent(one, other).turn(USER)  # sees w2 and has never seen w1
            await agent.turn(USER)
        assert (await one.show(agent.session_id))["oldest_version"] == "w1"
        assert (await one.ok("GET", "/weights"))["versions"] == ["w1", "w2"]


async def test_places_are_worked_out_when_somebody_comes(
    fake: FakeSGLang, model_dir: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for all sessions again and again."""
    async with two(fake, model_dir, database, database) as (one, other):
        names = [
            name for name in (f"s{n}" for n in range(60)) if places(name, [one.url, other.url])[0] == one.url
        ]
        for name in names:
            await one.create(session_id=name)
        await asyncio.sleep(LEASE_S)
        asked: list[str] = []

        def counted(session_id: str, urls: list[str]) -> list[str]:
            asked.append(session_id)
            return places(session_id, urls)

        monkeypatch.setattr(replicas, "places", counted)
        await asyncio.sleep(LEASE_S)
        assert asked == []
        async with gateway_for(fake.url, model_dir, database, lease_s=LEASE_S) as third:
            await asyncio.sleep(LEASE_S)
            assert set(names) <= set(asked)
            urls = [one.url, other.url, third.url]
            with psycopg.connect(database) as connection:
                rows = connection.execute(
                    "SELECT session_id FROM sessions JOIN replicas ON replica_id = holder WHERE url = %s",
                    (one.url,),
                ).fetchall()
            assert sorted(row[0] for row in rows) == sorted(n for n in names if places(n, urls)[0] == one.url)


async def test_an_engine_that_is_exchanged_replica_by_replica(
    fake: FakeSGLang, model_dir: Path, database: str
) -> None:
    """What each was started with is its own; only what came and went at run time is handed on."""
    async with (
        FakeSGLang(TOKENIZER) as new,
        FakeSGLang(TOKENIZER) as added,
        gateway_for(fake.url, model_dir, database, lease_s=60.0) as old,
    ):
        await old.ok("POST", "/workers", {"url": added.url})
        async with gateway_for(new.url, model_dir, database, lease_s=60.0) as one:
            said = await one.ok("GET", "/workers")
            assert [worker["url"] for worker in said["workers"]] == [new.url, added.url]
            assert said["changes"] == {added.url: True}
            assert (await old.request("DELETE", f"/workers?url={added.url}")).status == 200
            said = await one.ok("GET", "/workers")
            assert [worker["url"] for worker in said["workers"]] == [new.url]


async def test_one_deadline_for_all_that_is_drained(fake: FakeSGLang, model_dir: Path, database: str) -> None:
    """A replica that leaves, and the server under it, have `drain_s` together."""
    fake.responder = lambda _: sampled("hello " * 200, delay_s=0.1)
    async with contextlib.AsyncExitStack() as stack:
        own = await stack.enter_async_context(contextlib.AsyncExitStack())
        goes = await own.enter_async_context(
            gateway_for(fake.url, model_dir, database, lease_s=60.0, drain_s=1.5)
        )
        client = await stack.enter_async_context(aiohttp.ClientSession())
        goes = Gateway(goes.url, client)
        turn = asyncio.ensure_future(goes.post(await goes.create(), LONG))
        await fake.until(lambda: bool(fake.requests))
        began = time.monotonic()
        await own.aclose()
        assert 1.4 < time.monotonic() - began < 2.7
        await asyncio.gather(turn, return_exceptions=True)


async def test_a_server_waits_once_for_its_requests() -> None:
    async def never(request: aiohttp.web.Request) -> aiohttp.web.Response:
        await asyncio.sleep(60)
        raise AssertionError

    async def at_once(request: aiohttp.web.Request) -> aiohttp.web.Response:
        return aiohttp.web.Response()

    app = aiohttp.web.Application()
    app.router.add_get("/never", never)
    app.router.add_get("/", at_once)
    async with aiohttp.ClientSession() as client:
        async with serve(app, drain_s=5.0) as url, client.get(url) as answer:
            assert answer.status == 200  # its connection stays open, and holds up nobody
            began = time.monotonic()
        assert time.monotonic() - began < 1.0
        app = aiohttp.web.Application()
        app.router.add_get("/never", never)
        async with serve(app, drain_s=1.0) as url:
            asked = asyncio.ensure_future(client.get(f"{url}/never"))
            await asyncio.sleep(0.2)
            began = time.monotonic()
        assert 0.9 < time.monotonic() - began < 1.7
        await asyncio.gather(asked, return_exceptions=True)
