"""`serve --workers N`: real processes on one port; whichever is asked, a session is answered by its own."""

import asyncio
import contextlib
import json
import os
import signal
import socket
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from gatewaykit import END, TOKENIZER, USER, Gateway, sampled, split
from serving import Process, serving
from tokentape.errors import ConfigError
from tokentape.gateway.passing import summed
from tokentape.gateway.pinned import Place
from tokentape.invariants import check_samples
from tokentape.store import lock_store
from tokentape.testing import FakeSGLang, Reply

COUNT = 2
PLACE = Place(0, COUNT, Path("/"))


def of(index: int, name: str = "s") -> str:
    """A session id of this process."""
    return next(f"{name}-{n}" for n in range(1000) if PLACE.owner(f"{name}-{n}") == index)


@contextlib.asynccontextmanager
async def gateways(
    tmp_path: Path, fake: FakeSGLang, model_dir: Path, *more: str
) -> AsyncGenerator[tuple[Gateway, Process]]:
    arguments = [
        "serve",
        "--model",
        str(model_dir),
        "--engine",
        fake.url,
        "--port",
        "0",
        "--workers",
        str(COUNT),
    ]
    arguments += ["--store", str(tmp_path / "many.sqlite"), *more]
    async with serving(tmp_path / "log", *arguments) as process, aiohttp.ClientSession() as client:
        yield Gateway(process.url, client), process


def children(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


async def fresh(gateway: Gateway, session_id: str, messages: list[Any], **headers: str) -> Any:
    """A turn over a connection of its own: the parent hands it over."""
    async with aiohttp.ClientSession() as client:
        return await Gateway(gateway.url, client).post(session_id, {"messages": messages}, headers)


async def test_sessions_are_spread_and_reached_from_everywhere(
    tmp_path: Path, fake: FakeSGLang, model_dir: Path
) -> None:
    fake.responder = lambda _: sampled("hello")
    async with gateways(tmp_path, fake, model_dir) as (gateway, process):
        mine = [await gateway.create() for _ in range(16)]
        assert {PLACE.owner(one) for one in mine} <= {0, 1}
        named = [await gateway.create(session_id=of(index)) for index in range(COUNT)]
        again = await gateway.request("POST", "/sessions", {"session_id": of(1)})
        assert again.status == 409
        # One connection, sessions of both: what is another's is passed on, streamed or not.
        for session_id in named:
            first = (await gateway.chat(session_id, [USER]))["choices"][0]["message"]
            second = await gateway.chat(session_id, [USER, first, USER], stream=True)
            assert second["choices"][0]["message"]["content"] == "hello"
            assert (await fresh(gateway, session_id, [USER, first, USER, first, USER])).status == 200
            summary = await gateway.show(session_id)
            assert (summary["turns"], summary["branches"]) == (3, 1)
            assert check_samples(await gateway.samples(session_id)) == []
        assert {w["session_id"] for w in (await gateway.ok("GET", "/sessions"))["sessions"]} == {
            *mine,
            *named,
        }
        text = (await gateway.request("GET", "/metrics")).body.decode()
        assert 'tokentape_turns_total{finish_reason="stop"} 6.0' in text
        assert (await gateway.request("GET", "/sessions/nobody")).status == 404
        assert (await gateway.post("nobody", {"messages": [USER]})).status == 404
        process.process.send_signal(signal.SIGTERM)
        assert await process.ended() == 0


async def test_a_session_named_by_a_header_or_a_key(
    tmp_path: Path, fake: FakeSGLang, model_dir: Path
) -> None:
    fake.responder = lambda _: sampled("hello")
    async with gateways(tmp_path, fake, model_dir, "--auto-sessions") as (gateway, _):
        for index in range(COUNT):
            for headers in ({"X-Session-Id": of(index)}, {"Authorization": f"Bearer {of(index)}"}):
                async with aiohttp.ClientSession() as client:
                    answer = await Gateway(gateway.url, client).request(
                        "POST", "/v1/chat/completions", {"messages": [USER]}, headers
                    )
                assert answer.status == 200
            assert (await gateway.show(of(index)))["turns"] == 2


async def test_keys_hold_in_every_process(tmp_path: Path, fake: FakeSGLang, model_dir: Path) -> None:
    fake.responder = lambda _: sampled("hello")
    async with gateways(tmp_path, fake, model_dir, "--api-key", "secret") as (gateway, _):
        key = {"Authorization": "Bearer secret"}
        for index in range(COUNT):
            made = await gateway.request("POST", "/sessions", {"session_id": of(index)}, key)
            own = {"Authorization": f"Bearer {made.body['api_key']}"}
            for headers, status in ((own, 200), (key, 200), ({"Authorization": "Bearer x"}, 401)):
                answer = await gateway.post(of(index), {"messages": [USER]}, headers)
                assert answer.status == status
            other = await gateway.post(of(1 - index), {"messages": [USER]}, own)
            assert other.status == 401


async def test_a_client_that_leaves_a_passed_on_stream(
    tmp_path: Path, fake: FakeSGLang, model_dir: Path
) -> None:
    fake.responder = lambda _: Reply([*split("hello world " * 30, seed=1), END], delay_s=0.05)
    async with gateways(tmp_path, fake, model_dir) as (gateway, _):
        for index in range(COUNT):  # one of the two is passed on
            await gateway.create(session_id=of(index))
            url = f"{gateway.url}/sessions/{of(index)}/v1/chat/completions"
            async with gateway.http.post(url, json={"messages": [USER], "stream": True}) as response:
                await response.content.readany()
            await fake.until(lambda index=index: len(fake.aborts) > index)
            await asyncio.sleep(0.1)
            summary = await gateway.show(of(index))
            assert (summary["turns"], summary["failures"]) == (0, {"client_gone": 1})


async def test_what_concerns_all_is_done_by_all(tmp_path: Path, fake: FakeSGLang, model_dir: Path) -> None:
    fake.responder = lambda _: sampled("hello")
    async with FakeSGLang(fake.tokenizer) as other, gateways(tmp_path, fake, model_dir) as (gateway, _):
        for index in range(COUNT):
            await gateway.create(session_id=of(index))
        await gateway.ok("POST", "/pause")
        waiting = [asyncio.create_task(fresh(gateway, of(index), [USER])) for index in range(COUNT)]
        await asyncio.sleep(0.3)
        assert (len(fake.requests), [task.done() for task in waiting]) == (0, [False, False])
        await gateway.ok("POST", "/weights", {"version": "7"})
        await gateway.ok("POST", "/resume")
        assert [answer.status for answer in await asyncio.gather(*waiting)] == [200, 200]
        for index in range(COUNT):
            assert (await gateway.show(of(index)))["weight_versions"] == {
                "7": len(fake.requests[0].output_ids)
            }
        await gateway.ok("POST", "/workers", {"url": other.url})
        await gateway.ok("DELETE", f"/workers?url={fake.url}")
        before = len(fake.requests)
        other.responder = fake.responder
        for index in range(COUNT):
            assert (await fresh(gateway, of(index), [USER])).status == 200
        assert (len(fake.requests), len(other.requests)) == (before, 2)
        refused = await gateway.request("DELETE", f"/workers?url={other.url}")
        assert refused.status == 409


async def test_a_process_that_dies_is_started_again(
    tmp_path: Path, fake: FakeSGLang, model_dir: Path
) -> None:
    fake.responder = lambda _: sampled("hello")
    async with gateways(tmp_path, fake, model_dir) as (gateway, process):
        replies: dict[str, Any] = {}
        for index in range(COUNT):
            await gateway.create(session_id=of(index))
            answer = await fresh(gateway, of(index), [USER])
            replies[of(index)] = answer.body["choices"][0]["message"]
        before = children(process.process.pid)
        assert len(before) == COUNT
        os.kill(before[0], signal.SIGKILL)
        async with asyncio.timeout(30):
            for session_id, reply in replies.items():
                while True:
                    with contextlib.suppress(aiohttp.ClientError):
                        answer = await fresh(gateway, session_id, [USER, reply, USER])
                        assert answer.status in (200, 503)
                        if answer.status == 200:
                            break
                    await asyncio.sleep(0.1)
        for session_id in replies:
            async with aiohttp.ClientSession() as client:
                one = Gateway(gateway.url, client)
                assert (await one.show(session_id))["turns"] == 2
                (sample,) = await one.samples(session_id)
                assert check_samples([sample]) == []
        assert len(children(process.process.pid)) == COUNT
        process.process.send_signal(signal.SIGTERM)
        assert await process.ended() == 0


async def test_a_process_that_is_started_again_is_as_the_others(
    tmp_path: Path, fake: FakeSGLang, model_dir: Path
) -> None:
    """Paused, and with the engines that came and went at run time."""
    fake.responder = lambda _: sampled("hello")
    async with (
        FakeSGLang(TOKENIZER) as added,
        gateways(tmp_path, fake, model_dir) as (gateway, process),
    ):
        await gateway.ok("POST", "/workers", {"url": added.url})
        assert (await gateway.request("DELETE", f"/workers?url={fake.url}")).status == 200
        await gateway.ok("POST", "/pause")
        before = children(process.process.pid)
        for pid in before:  # one by one: the other knows
            os.kill(pid, signal.SIGKILL)
            async with asyncio.timeout(30):
                while not await all_are_there(gateway):  # noqa: ASYNC110  # a state, no event
                    await asyncio.sleep(0.1)
        assert pid not in children(process.process.pid)
        for _ in range(2 * COUNT):  # a connection each: both processes are asked
            async with aiohttp.ClientSession() as client:
                assert (await Gateway(gateway.url, client).ok("GET", "/healthz"))["paused"]
        seen: list[list[str]] = []
        for _ in range(2 * COUNT):  # a connection each: both processes are asked
            async with aiohttp.ClientSession() as client:
                said = await Gateway(gateway.url, client).ok("GET", "/workers")
                seen.append([worker["url"] for worker in said["workers"]])
        assert seen == [[added.url]] * 2 * COUNT


async def all_are_there(gateway: Gateway) -> bool:
    """Whether every process answers for its own."""
    for index in range(COUNT):
        with contextlib.suppress(aiohttp.ClientError):
            async with aiohttp.ClientSession() as client:
                path = f"/sessions/{of(index, 'nobody')}"
                if (await Gateway(gateway.url, client).request("GET", path)).status == 404:
                    continue
        return False
    return True


async def test_the_store_is_locked_while_any_process_has_it(
    tmp_path: Path, fake: FakeSGLang, model_dir: Path
) -> None:
    """The parent is killed while a process still finishes a turn: nobody else opens the store before that."""
    fake.responder = lambda _: sampled("hello " * 20, delay_s=0.05)
    async with gateways(tmp_path, fake, model_dir) as (gateway, process):
        await gateway.create(session_id=of(0))
        turn = asyncio.ensure_future(fresh(gateway, of(0), [USER]))
        await asyncio.sleep(0.3)
        process.process.kill()
        await process.process.wait()
        with pytest.raises(ConfigError, match="in use"):
            lock_store(str(tmp_path / "many.sqlite"))
        assert (await turn).status == 200
        async with asyncio.timeout(10):
            while True:
                with contextlib.suppress(ConfigError):
                    lock_store(str(tmp_path / "many.sqlite")).close()
                    return
                await asyncio.sleep(0.1)


async def test_a_parent_that_dies_takes_all_with_it(
    tmp_path: Path, fake: FakeSGLang, model_dir: Path
) -> None:
    async with gateways(tmp_path, fake, model_dir) as (_, process):
        pids = children(process.process.pid)
        process.process.kill()
        await process.ended()
        async with asyncio.timeout(10):
            while any(Path(f"/proc/{pid}").exists() for pid in pids):  # noqa: ASYNC110, ASYNC240
                await asyncio.sleep(0.05)


async def test_odd_connections_hold_up_nobody(tmp_path: Path, fake: FakeSGLang, model_dir: Path) -> None:
    fake.responder = lambda _: sampled("hello")
    async with gateways(tmp_path, fake, model_dir) as (gateway, _):
        host, port = gateway.url.removeprefix("http://").split(":")
        silent = [socket.create_connection((host, int(port))) for _ in range(20)]
        session_id = await gateway.create(session_id=of(1))
        body = json.dumps({"messages": [USER]}).encode()
        head = f"POST /sessions/{session_id}/v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
        head += f"Content-Length: {len(body)}\r\n"
        reader, writer = await asyncio.open_connection(host, int(port))
        for piece in (
            head[:7].encode(),
            head[7:].encode(),
            b"\r\n",
            body,
        ):  # in pieces: nobody sees whose it is
            writer.write(piece)
            await asyncio.sleep(0.05)
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        writer.close()
        garbage = socket.create_connection((host, int(port)))
        garbage.sendall(b"\x00\xff\r\n\r\n")
        assert (await fresh(gateway, session_id, [USER])).status == 200
        for one in (*silent, garbage):
            one.close()


async def test_a_store_that_is_in_use(tmp_path: Path, fake: FakeSGLang, model_dir: Path) -> None:
    async with gateways(tmp_path, fake, model_dir):
        with pytest.raises(AssertionError):
            async with gateways(tmp_path, fake, model_dir):
                pass
        assert "in use by another gateway" in (tmp_path / "log").read_text()


def test_metrics_add_up() -> None:
    one = '# HELP a_total b\n# TYPE a_total counter\na_total{k="x\\"y"} 1.0\na_total{k="z"} 2.0\n'
    two = '# HELP a_total b\n# TYPE a_total counter\na_total{k="z"} 3.0\n# HELP g h\n# TYPE g gauge\ng 4.0\n'
    read = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(summed([one, two]).decode())
        for sample in family.samples
    }
    assert read == {("a_total", 'x"y'): 1.0, ("a_total", "z"): 5.0, ("g",): 4.0}


def test_points_in_time_are_not_added() -> None:
    def text(start: float, created: float) -> str:
        return (
            "# HELP process_start_time_seconds x\n# TYPE process_start_time_seconds gauge\n"
            f"process_start_time_seconds {start}\n"
            f"# HELP a_total b\n# TYPE a_total counter\na_total 1.0\na_created {created}\n"
        )

    added = summed([text(30.0, 31.0), text(20.0, 22.0), text(40.0, 44.0)]).decode()
    read = {s.name: s.value for family in text_string_to_metric_families(added) for s in family.samples}
    assert read == {"process_start_time_seconds": 20.0, "a_total": 3.0, "a_created": 22.0}


def test_owners_are_spread_and_stay() -> None:
    owners = [Place(0, 4, Path("/")).owner(f"s-{n}") for n in range(4000)]
    assert all(800 < owners.count(index) < 1200 for index in range(4))
    assert [Place(0, 2, Path("/")).owner(name) for name in ("a", "b", "c", "d")] == [
        Place(1, 2, Path("/x")).owner(name) for name in ("a", "b", "c", "d")
    ]
