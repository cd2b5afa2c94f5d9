"""Several gateways on one PostgreSQL: whichever is asked, a session has one writer, and goes on exact."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import AsyncGenerator
from pathlib import Path

import aiohttp
import pytest
from click.testing import CliRunner
from postgres import Postgres

from gatewaykit import (
    TOKENIZER,
    USER,
    WEATHER,
    Agent,
    Gateway,
    assert_samples_match,
    gateway_for,
    sampled,
    seen_by,
)
from serving import Process, serving
from tokentape.cli import main
from tokentape.errors import ConfigError
from tokentape.gateway.passing import connector
from tokentape.gateway.replicas import places
from tokentape.invariants import check_samples
from tokentape.postgres import PostgresStore
from tokentape.stores import open_store
from tokentape.testing import FakeSGLang

LEASE_S = 1.0


@contextlib.asynccontextmanager
async def replicas(
    fake: FakeSGLang, model_dir: Path, database: str, count: int = 3
) -> AsyncGenerator[list[Gateway]]:
    async with contextlib.AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(gateway_for(fake.url, model_dir, database, lease_s=LEASE_S))
            for _ in range(count)
        ]


async def test_any_replica_is_asked_for_any_session(fake: FakeSGLang, model_dir: Path, database: str) -> None:
    fake.responder = lambda asked: sampled("the weather is hello", seed=len(asked.input_ids))
    async with replicas(fake, model_dir, database) as gateways:
        agents = [
            Agent(gateways[n % 3], await gateways[n % 3].create(), {"tools": [WEATHER]}) for n in range(9)
        ]
        for turn in range(4):
            for n, agent in enumerate(agents):
                agent.gateway = gateways[(n + turn) % 3]
                agent.fields["stream"] = turn % 2 == 1
                await agent.turn(USER)
        for agent in agents:
            summaries = [await gateway.show(agent.session_id) for gateway in gateways]
            assert [(s["turns"], s["branches"]) for s in summaries] == [(4, 1)] * 3
        rows = [row for agent in agents for row in await gateways[0].samples(agent.session_id)]
        assert check_samples(rows) == []
        assert_samples_match(seen_by(fake), rows, num_turns=36)
        again = await gateways[1].request("POST", "/sessions", {"session_id": agents[0].session_id})
        assert again.status == 409
        listed = await gateways[2].ok("GET", "/sessions")
        assert {one["session_id"] for one in listed["sessions"]} == {agent.session_id for agent in agents}


async def test_what_concerns_all_is_done_by_all(fake: FakeSGLang, model_dir: Path, database: str) -> None:
    fake.responder = lambda _: sampled("hello")
    async with replicas(fake, model_dir, database) as gateways:
        await gateways[0].ok("POST", "/pause")
        assert [(await one.ok("GET", "/readyz"))["paused"] for one in gateways] == [True] * 3
        await gateways[1].ok("POST", "/resume")
        assert [(await one.ok("GET", "/readyz"))["paused"] for one in gateways] == [False] * 3


async def test_who_comes_late_is_as_the_others(fake: FakeSGLang, model_dir: Path, database: str) -> None:
    """Paused, and with the engines that came and went at run time."""
    async with FakeSGLang(TOKENIZER) as added, replicas(fake, model_dir, database, 2) as gateways:
        await gateways[0].ok("POST", "/workers", {"url": added.url})
        assert (await gateways[1].request("DELETE", f"/workers?url={fake.url}")).status == 200
        await gateways[0].ok("POST", "/pause")
        async with gateway_for(fake.url, model_dir, database, lease_s=LEASE_S) as late:
            assert (await late.ok("GET", "/healthz"))["paused"]
            assert [one["url"] for one in (await late.ok("GET", "/workers"))["workers"]] == [added.url]
            await late.ok("POST", "/resume")
            assert [(await one.ok("GET", "/healthz"))["paused"] for one in gateways] == [False] * 2


async def test_sessions_move_to_who_comes_and_from_who_goes(
    fake: FakeSGLang, model_dir: Path, database: str
) -> None:
    """A replica that leaves gives its sessions back at once; nobody waits for a lease."""
    fake.responder = lambda asked: sampled("hello", seed=len(asked.input_ids))
    async with contextlib.AsyncExitStack() as stack:

        async def arrive() -> tuple[contextlib.AsyncExitStack, Gateway]:
            own = await stack.enter_async_context(contextlib.AsyncExitStack())
            return own, await own.enter_async_context(
                gateway_for(fake.url, model_dir, database, lease_s=60.0)
            )

        first, one = await arrive()
        agents = [Agent(one, await one.create()) for _ in range(8)]
        for agent in agents:
            await agent.turn(USER)
        _, two = await arrive()
        for agent in agents:  # all still held by the first one
            agent.gateway = two
            await agent.turn(USER)
        async with asyncio.timeout(10):
            await first.aclose()
        async with asyncio.timeout(10):
            for agent in agents:
                await agent.turn(USER)
        rows = [row for agent in agents for row in await two.samples(agent.session_id)]
        assert_samples_match(seen_by(fake), rows, num_turns=24)


@contextlib.asynccontextmanager
async def two_of_them(
    fake: FakeSGLang, model_dir: Path, database: str, tmp_path: Path
) -> AsyncGenerator[tuple[Process, Gateway, Gateway]]:
    """A replica that is a process of its own, as process and as gateway, and one that is here."""
    fake.responder = lambda asked: sampled("hello", seed=len(asked.input_ids))
    arguments = ["serve", "--model", str(model_dir), "--engine", fake.url, "--port", "0"]
    arguments += ["--store", database, "--lease", str(LEASE_S)]
    async with (
        gateway_for(fake.url, model_dir, database, lease_s=LEASE_S) as stays,
        serving(tmp_path / "log", *arguments) as process,
        aiohttp.ClientSession() as client,
    ):
        yield process, Gateway(process.url, client), stays


async def test_a_replica_that_is_killed(
    fake: FakeSGLang, model_dir: Path, database: str, tmp_path: Path
) -> None:
    """Its sessions are answered by the others when its lease is over, with all that it acknowledged."""
    async with two_of_them(fake, model_dir, database, tmp_path) as (process, goes, stays):
        agents = [Agent(goes, await goes.create(session_id=f"s{n}")) for n in range(8)]
        for agent in agents:
            await agent.turn(USER)
        process.process.kill()
        await process.ended()
        for agent in agents:
            agent.gateway = stays
        await asyncio.gather(*(agent.turn(USER) for agent in agents))
        rows = [row for agent in agents for row in await stays.samples(agent.session_id)]
        assert_samples_match(seen_by(fake), rows, num_turns=16)


async def test_a_replica_that_was_frozen_has_what_another_one_finished(
    fake: FakeSGLang, model_dir: Path, database: str, tmp_path: Path
) -> None:
    """It has the first turn in memory; nobody may be given that for the whole."""
    async with two_of_them(fake, model_dir, database, tmp_path) as (process, frozen, stays):
        agents = [Agent(frozen, await frozen.create(session_id=f"s{n}")) for n in range(6)]
        for agent in agents:
            await agent.turn(USER)
        process.process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(2 * LEASE_S)
        for agent in agents:
            agent.gateway = stays
            await agent.turn(USER)
            await stays.ok("POST", f"/sessions/{agent.session_id}/finish", {"reward": 1.0})
        process.process.send_signal(signal.SIGCONT)
        for gateway in (frozen, stays):
            for agent in agents:
                [row] = await gateway.samples(agent.session_id)
                assert (len(row["turns"]), row["reward"]) == (2, 1.0)


async def test_a_turn_that_is_overtaken_is_refused(fake: FakeSGLang, model_dir: Path, database: str) -> None:
    """No split brain: whoever lost the session samples to the end, and cannot commit it."""
    async with gateway_for(fake.url, model_dir, database, lease_s=60.0) as gateway:
        agent = Agent(gateway, await gateway.create())
        fake.script(sampled("hello", seed=1))
        await agent.turn(USER)
        fake.script(sampled("too late", seed=2, delay_s=0.02), sampled("in time", seed=3))
        late = asyncio.ensure_future(
            gateway.post(agent.session_id, {"messages": [USER, agent.messages[-1], USER]})
        )
        await asyncio.sleep(0.1)
        other = PostgresStore(database)
        [replica] = await other.replicas()
        await other.dismiss(replica.replica_id)  # the others believe that it is dead
        taken = await other.load(agent.session_id)
        assert taken is not None
        assert len(taken.turns) == 1
        answer = await late
        assert (answer.status, answer.error["code"]) == (503, "lease_lost")
        assert len((await other.load(agent.session_id)).turns) == 1  # type: ignore[union-attr]
        await other.aclose()
        # It asks again, has the session again, and goes on with what is there.
        await agent.turn(USER)
        assert (await gateway.show(agent.session_id))["turns"] == 2


async def test_postgres_is_restarted_under_load(
    fake: FakeSGLang, model_dir: Path, database: str, postgres_server: Postgres
) -> None:
    """A crash of the database is a pause: no agent sees an error, no turn is lost or stored twice."""
    fake.responder = lambda asked: sampled("hello", seed=len(asked.input_ids))
    async with replicas(fake, model_dir, database, 2) as gateways:
        agents = [Agent(gateways[n % 2], await gateways[n % 2].create()) for n in range(6)]

        async def episode(agent: Agent) -> None:
            for _ in range(12):
                await agent.turn(USER)

        episodes = asyncio.gather(*(episode(agent) for agent in agents))
        await asyncio.sleep(0.2)
        await asyncio.to_thread(postgres_server.stop)
        await asyncio.sleep(LEASE_S)
        await asyncio.to_thread(postgres_server.start)
        await episodes
        rows = [row for agent in agents for row in await gateways[0].samples(agent.session_id)]
        assert_samples_match(seen_by(fake), rows, num_turns=72)


async def test_a_peer_whose_machine_is_gone_is_probed(fake: FakeSGLang) -> None:
    """It sends nothing that would end a connection; without probes its answer is waited for without end."""
    probed: list[socket.socket] = []
    made = connector()
    factory = made._socket_factory
    assert factory is not None
    made._socket_factory = lambda address: probed.append(own := factory(address)) or own
    async with aiohttp.ClientSession(connector=made) as client, client.get(f"{fake.url}/health") as answer:
        assert answer.status == 200
        [own] = probed
        assert own.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        options = ("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 8000)
        for name, value in options:
            if hasattr(socket, name):
                assert own.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) == value


def test_a_place_moves_only_where_it_must() -> None:
    names, urls = [f"s-{n}" for n in range(3000)], ["http://a", "http://b", "http://c"]
    before = {name: places(name, urls)[0] for name in names}
    assert all(800 < list(before.values()).count(url) < 1200 for url in urls)
    fewer = {name: places(name, urls[:2])[0] for name in names}
    assert all(fewer[name] == place for name, place in before.items() if place in urls[:2])
    more = {name: places(name, [*urls, "http://d"])[0] for name in names}
    assert {more[name] for name in names if more[name] != before[name]} == {"http://d"}


# -- wrong options


def test_wrong_stores_are_told_at_start(database: str, model_dir: Path) -> None:
    import psycopg

    def refused(store: str, *more: str) -> str:
        done = CliRunner().invoke(
            main, ["serve", "--model", str(model_dir), "--engine", "http://x", "--store", store, *more]
        )
        assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.output
        return done.stderr

    name = database.rpartition("/")[2]
    assert "does not exist" in refused(database.replace(name, "nowhere"))
    assert "refused" in refused("postgresql://user:secret@127.0.0.1:1/x").lower()
    assert "secret" not in refused("postgresql://user:secret@127.0.0.1:1/x")
    assert "--workers" in refused(database, "--workers", "2")
    assert "--advertise" in refused(database, "--host", "0.0.0.0")
    asyncio.run(open_store(database, tokenizer="another").aclose())
    assert "another tokenizer" in refused(database)
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("UPDATE tokentape SET value = '99' WHERE name = 'schema'")
    assert "schema version 99" in refused(database)


async def test_an_export_beside_the_gateways(
    fake: FakeSGLang, model_dir: Path, database: str, tmp_path: Path
) -> None:
    """It takes no session, and a database without a store is no store."""
    fake.responder = lambda _: sampled("hello")
    out = tmp_path / "out.parquet"
    with pytest.raises(ConfigError, match="no tokentape store"):
        open_store(database, readonly=True)
    async with replicas(fake, model_dir, database, 2) as gateways:
        agent = Agent(gateways[0], await gateways[0].create())
        await agent.turn(USER)
        done = await asyncio.to_thread(
            CliRunner().invoke, main, ["export", "--store", database, "--out", str(out)]
        )
        assert done.output == f"1 samples in {out}\n"
        await agent.turn(USER)
