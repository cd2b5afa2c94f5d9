"""Replicas on Ray behind one base URL: killed, added and taken away while agents go on."""

import asyncio
import contextlib
import signal
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from click.testing import CliRunner

import tokentape
from gatewaykit import USER, Agent, Gateway, assert_samples_match, sampled, seen_by
from serving import serving
from tokentape.cli import main
from tokentape.engines.sglang import SGLangConfig
from tokentape.errors import ConfigError
from tokentape.gateway.replicas import places
from tokentape.gateway.service import ServiceConfig
from tokentape.postgres import PostgresStore
from tokentape.rollout import Episode, Group
from tokentape.scale import Cluster, ScaleConfig
from tokentape.scale.front import front
from tokentape.testing import FakeSGLang

pytestmark = pytest.mark.filterwarnings("default")  # Ray's own


@contextlib.asynccontextmanager
async def cluster(
    fake: FakeSGLang, model_dir: Path, database: str, **scale: Any
) -> AsyncGenerator[tuple[Cluster, Gateway]]:
    service = ServiceConfig(
        model=str(model_dir),
        engine=SGLangConfig(fake.url, token_timeout_s=10.0),
        store=database,
        lease_s=2.0,
        drain_s=5.0,
    )
    made = Cluster(service, ScaleConfig(num_cpus=0.1, look_s=0.2, **scale))
    await asyncio.to_thread(made.__enter__)
    try:
        async with aiohttp.ClientSession() as client:
            yield made, Gateway(made.url, client)
    finally:
        await asyncio.to_thread(made.__exit__)


async def there(made: Cluster, count: int) -> None:
    async with asyncio.timeout(60):
        while len(made.replicas) != count:  # noqa: ASYNC110  # a state, no event
            await asyncio.sleep(0.05)


async def test_replicas_come_and_go_under_traffic(
    ray_here: None, fake: FakeSGLang, model_dir: Path, database: str
) -> None:
    """One is killed, one more is asked for, two go: no turn is lost, each session goes on exact."""
    import ray

    fake.responder = lambda asked: sampled("hello", seed=len(asked.input_ids))
    async with cluster(fake, model_dir, database, replicas=2) as (made, gateway):
        agents = [Agent(gateway, await gateway.create()) for _ in range(8)]
        playing, num_turns = True, 0

        async def play(agent: Agent) -> None:
            nonlocal num_turns
            while playing:
                reply = await gateway.post(agent.session_id, {"messages": [*agent.messages, USER]})
                if reply.status == 200:
                    message = reply.body["choices"][0]["message"]
                    agent.messages += [USER, {"role": "assistant", "content": message["content"]}]
                    num_turns += 1
                else:  # what its replica was sampling when it died; an SDK tries again
                    assert reply.status in (502, 503)
                await asyncio.sleep(0.02)

        playing_agents = [asyncio.ensure_future(play(agent)) for agent in agents]
        before = made.replicas
        actor = made._supervisor._there[before[0].url][0]
        await asyncio.to_thread(ray.kill, actor)
        async with asyncio.timeout(60):
            while before[0] in made.replicas or len(made.replicas) < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        for count in (3, 1):
            made.scale(count)
            await there(made, count)
            await asyncio.sleep(1)
        playing = False
        await asyncio.gather(*playing_agents)
        assert num_turns > 50
        rows = [row for agent in agents for row in await gateway.samples(agent.session_id)]
        assert_samples_match(seen_by(fake), rows, num_turns=num_turns)
        text = (await gateway.request("GET", "/metrics")).body.decode()
        assert "tokentape_turns_total" in text


async def test_as_many_replicas_as_the_load_asks_for(
    ray_here: None, fake: FakeSGLang, model_dir: Path, database: str
) -> None:
    fake.responder = lambda _: sampled("hello " * 40, delay_s=0.05)
    scale = {"replicas": 1, "max_replicas": 2, "turns_per_replica": 4.0}
    async with cluster(fake, model_dir, database, **scale) as (made, gateway):
        sessions = [await gateway.create() for _ in range(8)]
        turns = [asyncio.ensure_future(gateway.post(one, {"messages": [USER]})) for one in sessions]
        await there(made, 2)
        assert {answer.status for answer in await asyncio.gather(*turns)} == {200}
        await there(made, 1)
        for one in sessions:
            assert (await gateway.show(one))["turns"] == 1


def test_wrong_clusters(ray_here: None, model_dir: Path, database: str, tmp_path: Path) -> None:
    def refused(*more: str) -> str:
        arguments = ["serve", "--model", str(model_dir), "--engine", "http://127.0.0.1:9", "--ray", *more]
        done = CliRunner().invoke(main, arguments)
        assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.output
        return done.stderr

    assert "postgresql://" in refused("--store", str(tmp_path / "file.sqlite"))
    assert "--workers" in refused("--store", database, "--workers", "2")
    assert "--advertise" in refused("--store", database, "--advertise", "http://x")
    service = ServiceConfig(
        model=str(model_dir / "nowhere"), engine=SGLangConfig("http://127.0.0.1:9"), store=database
    )
    with pytest.raises(ConfigError, match="nowhere"), Cluster(service, ScaleConfig(num_cpus=0.1)):
        pass
    assert "raise --max-replicas (max_replicas) from 2" in refused(
        "--store", database, "--replicas", "4", "--max-replicas", "2"
    )


@pytest.mark.parametrize(
    ("scale", "said"),
    [
        ({"replicas": 4, "max_replicas": 2}, r"4 replicas .* raise --max-replicas \(max_replicas\) from 2"),
        ({"max_replicas": 1}, "2 replicas to begin with"),
        ({"replicas": 2, "min_replicas": 3}, "lower min_replicas, 3"),
        ({"replicas": 0}, "at least one"),
        ({"min_replicas": 0}, "at least one"),
    ],
)
def test_numbers_of_replicas_that_do_not_fit(scale: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ScaleConfig(**scale)


def test_a_ray_that_does_not_fit(model_dir: Path, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "__version__", "2.9.1")
    service = ServiceConfig(model=str(model_dir), engine=SGLangConfig("http://127.0.0.1:9"), store=database)
    with pytest.raises(ConfigError, match=r"Ray 2\.9\.1 is too old"):
        Cluster(service).__enter__()


async def test_the_front_asks_the_next_one(fake: FakeSGLang, model_dir: Path, database: str) -> None:
    """A replica that is gone, or cut off, costs another try; where nobody is there, it says so."""
    from gatewaykit import gateway_for

    fake.responder = lambda _: sampled("hello")
    urls: list[str] = []
    async with (
        gateway_for(fake.url, model_dir, database) as gateway,
        front(lambda: urls, "127.0.0.1", 0, max_body_bytes=1 << 20, drain_s=1.0) as url,
        aiohttp.ClientSession() as client,
    ):
        urls += [gateway.url, "http://127.0.0.1:9"]
        gone = next(f"s{n}" for n in range(99) if places(f"s{n}", urls)[0] == urls[1])
        behind = Gateway(url, client)
        assert await behind.create(session_id=gone) == gone
        made = await behind.ok("POST", "/sessions")
        assert made["base_url"].startswith(f"{url}/sessions/")
        agent = Agent(behind, gone)
        await agent.turn(USER)
        await agent.turn(USER, stream=True)
        by_header = await behind.request(
            "POST", "/v1/chat/completions", {"messages": agent.messages}, {"X-Session-Id": gone}
        )
        assert by_header.status == 200
        assert (await behind.show(gone))["turns"] == 3
        too_large = await behind.post(gone, {"messages": [{"role": "user", "content": "x" * (2 << 20)}]})
        assert (too_large.status, too_large.error["code"]) == (413, "too_large")


async def test_metrics_behind_a_key(fake: FakeSGLang, model_dir: Path, database: str) -> None:
    """The front knows no key: whoever has a wrong one is told what the replicas say."""
    from gatewaykit import gateway_for

    urls = ["http://127.0.0.1:9"]
    async with (
        gateway_for(fake.url, model_dir, database, http={"api_key": "right"}) as gateway,
        front(lambda: urls, "127.0.0.1", 0, max_body_bytes=1 << 20, drain_s=1.0) as url,
        aiohttp.ClientSession() as client,
    ):
        urls.append(gateway.url)
        behind = Gateway(url, client)
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            answer = await behind.request("GET", "/metrics", headers=headers)
            assert (answer.status, answer.error["code"]) == (401, "unauthorized")
        answer = await behind.request("GET", "/metrics", headers={"Authorization": "Bearer right"})
        assert answer.status == 200
        assert "tokentape_turns_total" in answer.body.decode()


async def test_rollouts_over_replicas(
    ray_here: None, fake: FakeSGLang, model_dir: Path, database: str
) -> None:
    """A replica is killed in the middle of a run: every group comes whole, every episode once."""
    import ray

    fake.responder = lambda asked: sampled("hello", seed=len(asked.input_ids), delay_s=0.02)

    async def episode(task: Any, one: Episode) -> float:
        async with aiohttp.ClientSession() as client:
            body: dict[str, Any] = {"messages": [{"role": "user", "content": f"hello {task}"}]}
            async with client.post(f"{one.base_url}/chat/completions", json=body) as answer:
                answer.raise_for_status()
        return float(task)

    async with cluster(fake, model_dir, database, replicas=2) as (made, gateway):
        seen: list[Group] = []
        tasks = range(24)
        async with tokentape.rollouts(
            episode, tasks, gateway=made.url, group_size=4, concurrency=16, retries=5, progress=False
        ) as groups:
            async for group in groups:
                seen.append(group)
                if len(seen) == 3:
                    actor = made._supervisor._there[made.replicas[0].url][0]
                    await asyncio.to_thread(ray.kill, actor)
        assert sorted(group.index for group in seen) == list(tasks)
        assert all(group.complete and set(group.rewards) == {float(group.task)} for group in seen)
        told = [one for group in seen for one in group.session_ids]
        listed = (await gateway.ok("GET", "/sessions?limit=1000"))["sessions"]
        assert sorted(told) == sorted(one["session_id"] for one in listed)
        assert {one["state"] for one in listed} == {"finished"}


async def test_the_command(fake: FakeSGLang, model_dir: Path, database: str, tmp_path: Path) -> None:
    """`tokentape serve --ray` starts a Ray of its own where none is, serves, and leaves nothing behind."""
    fake.responder = lambda _: sampled("hello")
    arguments = ["serve", "--ray", "--replicas", "1", "--model", str(model_dir), "--engine", fake.url]
    arguments += ["--store", database, "--port", "0", "--drain-timeout", "2"]
    async with serving(tmp_path / "log", *arguments) as process, aiohttp.ClientSession() as client:
        gateway = Gateway(process.url, client)
        agent = Agent(gateway, await gateway.create())
        await agent.turn(USER)
        assert (await gateway.show(agent.session_id))["turns"] == 1
        process.process.send_signal(signal.SIGTERM)
        assert await process.ended() == 0
    store = PostgresStore(database)
    assert await store.replicas() == []
    assert await store.load(agent.session_id) is not None
    await store.aclose()
