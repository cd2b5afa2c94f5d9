"""`make live`: two real SGLang servers behind the real sglang-router, and behind the gateway's own pool."""

import asyncio
import contextlib
import itertools
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from gatewaykit import Agent, Gateway, Json, assert_samples_match, gateway_for
from livekit import LiveServer, LiveServers, routed, workers_of
from recording import Recording, recording
from tokentape.engines.pool import PoolConfig
from tokentape.invariants import check_samples
from updatekit import check, endless, perturbed

pytestmark = pytest.mark.live

PATIENT: Json = {"first_token_timeout_s": 60.0, "token_timeout_s": 60.0, "total_timeout_s": 200.0}
SYSTEM: Json = {"role": "system", "content": "You are a helpful assistant."}


@contextlib.asynccontextmanager
async def behind_a_router(
    servers: list[LiveServer], store: Path, worker_urls: list[str] | None = None
) -> AsyncGenerator[tuple[Gateway, str]]:
    """A gateway whose only engine is the router; its URL."""
    with contextlib.ExitStack() as stack:
        urls = worker_urls or [server.url for server in servers]
        router = await asyncio.to_thread(stack.enter_context, routed(urls))
        async with gateway_for(router, servers[0].model_dir, store, engine=PATIENT) as gateway:
            await gateway.ok("GET", "/readyz")
            yield gateway, router


async def talk(gateway: Gateway, number: int, num_turns: int, max_tokens: int) -> Agent:
    """A session at temperature 1: its first turn is whole or streamed, then by turns."""
    fields = {"temperature": 1.0, "max_tokens": max_tokens}
    agent = Agent(gateway, await gateway.create(), fields, [SYSTEM])
    for turn in range(num_turns):
        user = {"role": "user", "content": f"Tell a story about {100 * number + turn}."}
        await agent.turn(user, stream=(number + turn) % 2 == 0)
    return agent


def turn_ids(samples: list[Json]) -> list[str]:
    assert len(samples) == 1, [s["branch_reason"] for s in samples]
    return [turn["turn_id"] for turn in samples[0]["turns"]]


async def test_sessions_stay_with_a_server_and_are_exact(
    sglang_servers: LiveServers, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What reached each server is recorded between the router and it."""
    num_sessions, num_turns = 6, 3
    servers = await asyncio.to_thread(sglang_servers.of, "tiny", 2)
    async with contextlib.AsyncExitStack() as stack:
        records = [await stack.enter_async_context(recording(server.url)) for server in servers]
        gateway, _ = await stack.enter_async_context(
            behind_a_router(servers, tmp_path / "s.sqlite", [record.url for record in records])
        )
        agents = await asyncio.gather(*(talk(gateway, n, num_turns, 40) for n in range(num_sessions)))
        rows = [await gateway.samples(agent.session_id) for agent in agents]
        on = [[record for record in records if record.seen(turn_ids(samples))] for samples in rows]
    cached: list[int] = []
    for samples, its_records in zip(rows, on, strict=True):
        (record,) = its_records  # one server only
        names = turn_ids(samples)
        by_turn = {s.turn_id: s for s in record.seen(names)}
        assert_samples_match(by_turn.values(), samples, num_turns=num_turns)
        path = [by_turn[name] for name in names]
        for before, after in itertools.pairwise(path):
            assert after.input_ids[: len(before.input_ids)] == before.input_ids
            so_far = len(before.input_ids) + len(before.output_ids)
            cached.append(so_far - 1 - num_cached(record, after.turn_id))
    with capsys.disabled():
        shares = [sum(1 for its in on if its == [record]) for record in records]
        print(f"\nsessions by server: {shares}; tokens missing from the prefix cache: {cached}")  # noqa: T201
    assert min(shares) >= 1, "one server had all: this run proves nothing"
    assert max(cached) <= 0


def num_cached(record: Recording, turn_id: str) -> int:
    raw = next(bytes(raw) for request, raw in record.exchanges if request["rid"].endswith(turn_id))
    first = raw.splitlines()[0].removeprefix(b"data: ")  # the whole answer, or its first event
    return json.loads(first)["meta_info"]["cached_tokens"]


async def test_an_update_of_all_servers(
    sglang_servers: LiveServers, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One server misses an update: the gateway says so, and so does every token. Then it has it, too."""
    servers = await asyncio.to_thread(sglang_servers.of, "tiny", 2)
    old = await asyncio.to_thread(endless, servers[0].model_dir, tmp_path / "old")
    noisy = await asyncio.to_thread(perturbed, old, tmp_path / "noisy", scale=0.8)
    new = await asyncio.to_thread(endless, noisy, tmp_path / "new")
    async with (
        behind_a_router(servers, tmp_path / "s.sqlite") as (gateway, router),
        aiohttp.ClientSession(raise_for_status=True) as trainer,
    ):
        urls = await asyncio.to_thread(workers_of, router)
        assert sorted(urls) == sorted(server.url for server in servers)
        await asyncio.gather(*(update(trainer, url, old, "1") for url in urls))
        assert (await gateway.ok("POST", "/weights", {"version": "1"}))["said_by"] == "engine"

        first = asyncio.gather(*(talk(gateway, n, 1, 200) for n in range(4)))
        await until_all_sample(gateway, 4, trainer, urls)
        assert (await gateway.ok("POST", "/pause"))["interrupted"] == 4
        await update(trainer, urls[0], new, "2")
        answer = await gateway.request("POST", "/weights", {"version": "2"})
        assert (answer.status, answer.error["code"]) == (409, "weights_differ")
        await gateway.ok("POST", "/resume")
        agents = await first

        await gateway.ok("POST", "/pause")
        await update(trainer, urls[1], new, "2")
        state = await gateway.ok("POST", "/weights", {"version": "2"})
        assert (state["version"], state["servers"]) == ("2", dict.fromkeys(urls, "2"))
        await gateway.ok("POST", "/resume")
        await asyncio.gather(*(agent.turn({"role": "user", "content": "And then?"}) for agent in agents))
        rows = [row for agent in agents for row in await gateway.samples(agent.session_id)]
    for row in rows:
        first_turn, last_turn = ([v["version"] for v in within(row, turn)] for turn in row["turns"])
        assert first_turn in (["1"], ["1", "2"])
        assert last_turn == ["2"]
    assert {len(within(row, row["turns"][0])) for row in rows} == {1, 2}, "no server missed the update"
    checked = await asyncio.to_thread(check, rows, {"1": old, "2": new})
    wrong = sum(checked.other) / len(checked.other)
    with capsys.disabled():
        means = {version: f"{sum(d) / len(d):.4f} ({len(d)})" for version, d in checked.own.items()}
        print(f"\nmean difference (tokens) by version: {means}; under the other weights {wrong:.3f}")  # noqa: T201
    assert all(sum(d) / len(d) < 0.06 for d in checked.own.values())
    assert wrong > 0.5, "both weights say the same: this run proves nothing"


def within(row: Json, turn: Json) -> list[Json]:
    return [v for v in row["weight_versions"] if turn["start"] <= v["start"] < turn["end"]]


async def update(trainer: aiohttp.ClientSession, url: str, model_dir: Path, version: str) -> None:
    body = {"model_path": str(model_dir), "weight_version": version}
    async with trainer.post(url + "/update_weights_from_disk", json=body) as answer:
        assert (await answer.json())["success"] is True


async def until_all_sample(
    gateway: Gateway, num_running: int, http: aiohttp.ClientSession, urls: list[str]
) -> None:
    """A cache in use cannot be flushed: all servers must refuse at one time."""
    async with asyncio.timeout(30):
        while True:
            num = (await gateway.ok("GET", "/weights"))["running"]
            if num >= num_running and all(await asyncio.gather(*(samples(http, url) for url in urls))):
                return
            await asyncio.sleep(0.05)


async def samples(http: aiohttp.ClientSession, url: str) -> bool:
    async with http.post(url + "/flush_cache", raise_for_status=False) as answer:
        return answer.status != 200


async def test_the_router_loses_a_server(
    sglang_servers: LiveServers, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    servers = await asyncio.to_thread(sglang_servers.of, "tiny", 2)
    async with behind_a_router(servers, tmp_path / "s.sqlite") as (gateway, _):
        model_dir, rows = await under_loss(gateway, servers, tmp_path)
        (worker,) = (await gateway.ok("GET", "/workers"))["workers"]
        assert list(worker["servers"]) == [servers[0].url]
        said = moved(await gateway.request("GET", "/metrics"))
    await assert_sound(rows, model_dir, said, capsys)


async def test_the_pool_loses_a_server(
    sglang_servers: LiveServers, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    servers = await asyncio.to_thread(sglang_servers.of, "tiny", 2)
    pool = PoolConfig(more=(servers[1].url,), health_interval_s=1.0)
    one = servers[0]
    async with gateway_for(
        one.url, one.model_dir, tmp_path / "s.sqlite", engine=PATIENT, pool=pool
    ) as gateway:
        await gateway.ok("GET", "/readyz")
        model_dir, rows = await under_loss(gateway, servers, tmp_path)
        workers = (await gateway.ok("GET", "/workers"))["workers"]
        assert {w["url"]: w["state"] for w in workers} == {
            servers[0].url: "healthy",
            servers[1].url: "ejected",
        }
        said = moved(await gateway.request("GET", "/metrics"))
    await assert_sound(rows, model_dir, said, capsys)


async def under_loss(gateway: Gateway, servers: list[LiveServer], tmp_path: Path) -> tuple[Path, list[Json]]:
    """Six sessions of four turns; the second server is killed while it samples. No turn may be lost.

    The weights, and the samples.
    """
    model_dir = await asyncio.to_thread(endless, servers[0].model_dir, tmp_path / "endless")
    async with aiohttp.ClientSession(raise_for_status=True) as trainer:
        for server in servers:
            await update(trainer, server.url, model_dir, "0")  # whatever the test before left there
        load = asyncio.gather(*(talk(gateway, n, 4, 64) for n in range(6)))
        await asyncio.sleep(2)
        await until_all_sample(gateway, 6, trainer, [server.url for server in servers])
    servers[1].process.kill()
    agents = await load
    rows: list[Json] = []
    for agent in agents:
        summary = await gateway.show(agent.session_id)
        assert (summary["turns"], summary["failures"]) == (4, {})
        rows += await gateway.samples(agent.session_id)
    return model_dir, rows


def moved(metrics: Any) -> list[str]:
    names = ("tokentape_generations_moved_total{", "tokentape_resumed_total ")
    return [line for line in metrics.body.decode().splitlines() if line.startswith(names)]


async def assert_sound(
    rows: list[Json], model_dir: Path, said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Every token is that of the model, behind what its tape has before it."""
    assert len(rows) == 6
    assert check_samples(rows) == []
    own = (await asyncio.to_thread(check, rows, {"0": model_dir})).own["0"]
    with capsys.disabled():
        print(f"\n{said}; mean difference of {len(own)} tokens {sum(own) / len(own):.4f}")  # noqa: T201
    assert sum(own) / len(own) < 0.06
