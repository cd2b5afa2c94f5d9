"""A request that is asked again: the same turn when it is a retry, another one when it is not."""

import asyncio
import contextlib
import json
import socket
import sqlite3
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from proxy import Proxy, proxy_to

from gatewaykit import (
    USER,
    WEATHER,
    Agent,
    Gateway,
    Json,
    assert_samples_match,
    call,
    gateway_for,
    joined,
    sampled,
    seen_by,
)
from serving import serving
from tokentape.gateway.chat.reply import ChatWriter
from tokentape.gateway.session import Session
from tokentape.testing import FakeSGLang, Fault, Reply

both_ways = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
RETRY = {"x-stainless-retry-count": "1"}
FIRST = {"x-stainless-retry-count": "0"}
TEXT = "<think>\nthe user\n</think>\n\nhello " + call("weather", {"city": "日本"}) + call("clock", {})


def body_of(*, stream: bool = False, **fields: Any) -> Json:
    return {"model": "policy", "messages": [USER], "stream": stream, **fields}


def slow(num_words: int = 6, *, delay_s: float = 0.015, seed: int = 1) -> Reply:
    return sampled("hello world " * num_words, seed=seed, delay_s=delay_s)


def reply_of(answer: Any) -> Json:
    """The reply of an answer, streamed or not."""
    if isinstance(answer.body, dict):
        return answer.body
    events = [line[6:] for line in answer.body.split(b"\n\n") if line.startswith(b"data: ")]
    assert events[-1] == b"[DONE]"
    return joined([json.loads(event) for event in events[:-1]])


async def one_turn(fake: FakeSGLang, gateway: Gateway, session_id: str, *replies: Json) -> None:
    """All replies are of one turn, which the engine sampled once, and the session goes on from it."""
    assert len(fake.requests) == 1
    assert len({reply["tokentape"]["turn_id"] for reply in replies}) == 1
    assert all(r["choices"] == replies[0]["choices"] for r in replies)
    agent = Agent(gateway, session_id, messages=[USER, replies[0]["choices"][0]["message"]])
    after = await agent.turn(USER)
    assert after["tokentape"]["branch_reason"] is None
    assert_samples_match(seen_by(fake), await gateway.samples(session_id), num_turns=2)


@pytest.fixture
async def proxy(gateway: Gateway) -> AsyncIterator[Proxy]:
    async with proxy_to(gateway.url) as proxy:
        yield proxy


# -- the SDK's own retries


@both_ways
async def test_the_sdk_retries_while_the_first_call_runs(
    fake: FakeSGLang, gateway: Gateway, proxy: Proxy, stream: bool
) -> None:
    """A proxy in between keeps the first connection open: both wait for one turn."""
    session_id = await gateway.create()
    proxy.losses = ["patience"]
    fake.script(sampled("hello", seed=1, delay_s=0.6))
    client: Any
    async with gateway.openai(
        session_id, base_url=f"{proxy.url}/sessions/{session_id}/v1", timeout=0.5, max_retries=3
    ) as client:
        completion = await client.chat.completions.create(model="policy", messages=[USER], stream=stream)
        if stream:
            reply = joined([chunk.model_dump(exclude_unset=True) async for chunk in completion])
        else:
            reply = completion.model_dump()
    assert len(proxy.replies) > 1, "the SDK did not retry"
    await one_turn(fake, gateway, session_id, reply)
    assert (await gateway.show(session_id))["failures"] == {}


async def test_the_sdk_retries_after_it_left(fake: FakeSGLang, gateway: Gateway) -> None:
    """Without a proxy its timeout is a hang-up: the first turn is aborted, and the second one is the only."""
    session_id = await gateway.create()
    fake.script(slow(40), sampled("hello", seed=2))
    async with gateway.openai(session_id, timeout=0.3, max_retries=2) as client:
        await client.chat.completions.create(model="policy", messages=[USER])
    assert fake.aborts == [fake.requests[0].rid]
    summary = await gateway.show(session_id)
    assert (summary["turns"], summary["failures"]) == (1, {"client_gone": 1})
    assert_samples_match(seen_by(fake), await gateway.samples(session_id), num_turns=1)


@both_ways
async def test_the_sdk_retries_because_the_reply_was_lost(
    fake: FakeSGLang, gateway: Gateway, proxy: Proxy, stream: bool
) -> None:
    session_id = await gateway.create()
    proxy.losses = ["reply", "reply"]
    fake.script(sampled("hello world", seed=1))
    async with gateway.openai(
        session_id, base_url=f"{proxy.url}/sessions/{session_id}/v1", max_retries=3
    ) as client:
        completion: Any = await client.chat.completions.create(model="policy", messages=[USER], stream=stream)
        reply = (
            joined([chunk.model_dump(exclude_unset=True) async for chunk in completion])
            if stream
            else completion.model_dump()
        )
    assert len(proxy.replies) == 3
    assert proxy.replies[0].startswith(b"HTTP/1.1 200")
    await one_turn(fake, gateway, session_id, reply)


# -- the headers


@both_ways
@pytest.mark.parametrize("headers", [RETRY, {"Idempotency-Key": "a"}], ids=["retry", "key"])
async def test_a_retry_of_an_answered_request(
    fake: FakeSGLang, gateway: Gateway, headers: dict[str, str], stream: bool
) -> None:
    session_id = await gateway.create()
    body = body_of(stream=stream, tools=[WEATHER], return_token_ids=True, logprobs=True)
    fake.script(sampled(TEXT, seed=3))
    first = await gateway.post(session_id, body, {**headers, **FIRST} if "Idempotency-Key" in headers else {})
    again = [await gateway.post(session_id, body, headers) for _ in range(3)]
    replies = [reply_of(answer) for answer in (first, *again)]
    for reply in replies:  # in seconds: when the stream began, or when the turn was committed
        del reply["created"]
    assert all(reply == replies[0] for reply in replies), "a replay says something else"
    assert [c["function"]["name"] for c in replies[0]["choices"][0]["message"]["tool_calls"]] == [
        "weather",
        "clock",
    ]
    assert len(fake.requests) == 1
    assert_samples_match(seen_by(fake), await gateway.samples(session_id), num_turns=1)


async def test_another_request_is_no_retry(fake: FakeSGLang, gateway: Gateway) -> None:
    """Whatever its headers say: another body, another key, another session."""
    session_id, other = await gateway.create(), await gateway.create()
    await gateway.post(session_id, body_of(), {"Idempotency-Key": "a"})
    await gateway.post(session_id, body_of(), {"Idempotency-Key": "b"})
    await gateway.post(session_id, body_of(seed=1), {"Idempotency-Key": "a"})
    await gateway.post(session_id, body_of(seed=2), RETRY)
    await gateway.post(other, body_of(), {"Idempotency-Key": "a"})
    assert len(fake.requests) == 5
    assert (await gateway.show(session_id))["branch_reasons"] == {"root": 1, "resampled": 3}
    assert (await gateway.show(other))["branch_reasons"] == {"root": 1}


async def test_the_same_request_again_is_sampled_again(fake: FakeSGLang, gateway: Gateway) -> None:
    """Without a sign that it is a retry, and after its answer was sent."""
    session_id = await gateway.create()
    for headers in ({}, FIRST, {}):
        await gateway.post(session_id, body_of(), headers)
    assert len(fake.requests) == 3
    assert (await gateway.show(session_id))["branch_reasons"] == {"root": 1, "resampled": 2}


@both_ways
async def test_a_failed_request_is_no_answer(fake: FakeSGLang, gateway: Gateway, stream: bool) -> None:
    """The retry of a second sample is not answered with the first."""
    session_id = await gateway.create()
    fake.script(
        sampled("hello", seed=1), Fault("status", status=500), sampled("world", seed=2), sampled("the")
    )
    body = body_of(stream=stream)
    first = reply_of(await gateway.post(session_id, body, FIRST))
    assert (await gateway.post(session_id, body, FIRST)).status == 502
    second = reply_of(await gateway.post(session_id, body, RETRY))
    assert second["tokentape"]["turn_id"] != first["tokentape"]["turn_id"]
    assert second["choices"][0]["message"]["content"] == "world"
    assert reply_of(await gateway.post(session_id, body, RETRY)) == second
    assert_samples_match(
        [s for s in seen_by(fake) if s.output_ids], await gateway.samples(session_id), num_turns=2
    )


@pytest.mark.parametrize("headers", [{}, RETRY], ids=["no header", "retry"])
@both_ways
async def test_side_by_side_they_are_one_turn(
    fake: FakeSGLang, gateway: Gateway, headers: dict[str, str], stream: bool
) -> None:
    session_id = await gateway.create()
    fake.script(slow())
    body = body_of(stream=stream)
    answers = await asyncio.gather(*(gateway.post(session_id, body, headers) for _ in range(4)))
    await one_turn(fake, gateway, session_id, *(reply_of(answer) for answer in answers))


async def test_side_by_side_and_no_retries(fake: FakeSGLang, gateway: Gateway) -> None:
    """An SDK that samples a request several times at once says that none is a retry."""
    session_id = await gateway.create()
    fake.script(*(slow(2, seed=n) for n in range(3)))
    answers = await asyncio.gather(*(gateway.post(session_id, body_of(), FIRST) for _ in range(3)))
    turn_ids = {reply_of(answer)["tokentape"]["turn_id"] for answer in answers}
    assert len(turn_ids) == len(fake.requests) == 3
    assert_samples_match(seen_by(fake), await gateway.samples(session_id), num_turns=3)


async def test_whole_and_streamed_are_two_requests(fake: FakeSGLang, gateway: Gateway) -> None:
    """Other bytes, another request, though it asks for the same."""
    session_id = await gateway.create()
    fake.script(slow(2, seed=1), slow(2, seed=2))
    await asyncio.gather(gateway.post(session_id, body_of()), gateway.post(session_id, body_of(stream=True)))
    assert len(fake.requests) == 2


# -- streams with several readers


async def opened(gateway: Gateway, session_id: str, **fields: Any) -> aiohttp.ClientResponse:
    path = f"{gateway.url}/sessions/{session_id}/v1/chat/completions"
    response = await gateway.http.post(path, data=json.dumps(body_of(stream=True, **fields)))
    assert response.status == 200
    return response


async def rest(response: aiohttp.ClientResponse) -> Json:
    lines = [line[6:] async for line in response.content if line.startswith(b"data: ")]
    assert lines[-1].strip() == b"[DONE]"
    return joined([json.loads(line) for line in lines[:-1]])


async def test_a_second_reader_gets_the_whole_stream(fake: FakeSGLang, gateway: Gateway) -> None:
    session_id = await gateway.create()
    fake.script(slow())
    first = await opened(gateway, session_id)
    await fake.until(lambda: len(fake.requests[0].output_ids) > 10)
    second = await opened(gateway, session_id)
    replies = await asyncio.gather(rest(first), rest(second))
    assert replies[0]["choices"][0]["message"]["content"] == "hello world " * 6
    await one_turn(fake, gateway, session_id, *replies)


@pytest.mark.parametrize("leaves", [0, 1], ids=["first", "second"])
async def test_one_reader_leaves(fake: FakeSGLang, gateway: Gateway, leaves: int) -> None:
    session_id = await gateway.create()
    fake.script(slow())
    readers = [await opened(gateway, session_id) for _ in range(2)]
    await fake.until(lambda: len(fake.requests[0].output_ids) > 5)
    readers[leaves].close()
    reply = await rest(readers[1 - leaves])
    assert not fake.aborts
    await one_turn(fake, gateway, session_id, reply)


async def test_both_readers_leave(fake: FakeSGLang, gateway: Gateway) -> None:
    session_id = await gateway.create()
    fake.script(slow(60))
    readers = [await opened(gateway, session_id) for _ in range(2)]
    await fake.until(lambda: len(fake.requests[0].output_ids) > 5)
    readers[0].close()
    await asyncio.sleep(0.1)
    assert not fake.aborts
    readers[1].close()
    await fake.until(lambda: fake.aborts == [fake.requests[0].rid])
    await quiet(gateway)
    summary = await gateway.show(session_id)
    assert (summary["turns"], summary["failures"]) == (0, {"client_gone": 1})
    reply = await gateway.chat(session_id, [USER])
    assert reply["tokentape"]["branch_reason"] == "root"


async def test_back_again_while_the_first_is_being_aborted(fake: FakeSGLang, gateway: Gateway) -> None:
    """A retry never gets the failure of the call that its own client left."""
    session_id = await gateway.create()
    for _ in range(10):
        fake.script(slow(60), sampled("hello"))
        reader = await opened(gateway, session_id)
        reader.close()
        answer = await gateway.post(session_id, body_of(stream=True), RETRY)
        assert answer.status == 200, answer
        assert reply_of(answer)["choices"][0]["message"]["content"]
        session_id = await gateway.create()
        fake.requests.clear()
        fake._script.clear()


async def quiet(gateway: Gateway) -> None:
    """Wait until no turn runs."""
    for _ in range(500):
        if b"tokentape_active_turns 0.0" in await gateway.ok("GET", "/metrics"):
            return
        await asyncio.sleep(0.01)
    pytest.fail("a turn does not end")


# -- a reply that is lost behind its commit


@both_ways
async def test_the_client_leaves_while_the_turn_is_committed(
    fake: FakeSGLang, gateway: Gateway, store: Path, stream: bool
) -> None:
    session_id = await gateway.create()
    fake.script(sampled("hello", seed=1))
    path = f"{gateway.url}/sessions/{session_id}/v1/chat/completions"
    with contextlib.closing(sqlite3.connect(store, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        async with aiohttp.ClientSession() as http:
            asked = asyncio.create_task(http.post(path, data=json.dumps(body_of(stream=stream))))
            await fake.until(lambda: fake.requests != [] and len(fake.requests[0].output_ids) > 1)
            await asyncio.sleep(0.2)  # it waits for the store now
            if stream:  # its first tokens have come
                (await asked).close()
            asked.cancel()
        await asyncio.sleep(0.1)
        other.execute("ROLLBACK")
    reply = reply_of(await gateway.post(session_id, body_of(stream=stream)))
    assert (await gateway.show(session_id))["failures"] == {}
    await one_turn(fake, gateway, session_id, reply)


@both_ways
@pytest.mark.parametrize("where", ["commit", "write"])
async def test_the_connection_breaks_right_behind_the_commit(
    fake: FakeSGLang, gateway: Gateway, monkeypatch: pytest.MonkeyPatch, stream: bool, where: str
) -> None:
    """As soon as the turn is committed, or one step before the reply's last bytes are sent."""
    session_id = await gateway.create()
    fake.script(sampled("hello", seed=1))
    end = "end" if stream else "whole"
    owner: Any = Session if where == "commit" else ChatWriter
    name = "commit" if where == "commit" else end
    original = getattr(owner, name)
    host, port = gateway.url.removeprefix("http://").split(":")
    client = socket.create_connection((host, int(port)))
    broken = asyncio.Event()

    def break_there(self: Any, given: Any) -> Any:
        broken.set()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()  # a RST, now
        return original(self, given)

    body = json.dumps(body_of(stream=stream))
    head = f"POST /sessions/{session_id}/v1/chat/completions HTTP/1.1\r\nHost: x"
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, break_there)
        client.sendall(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        await asyncio.wait_for(broken.wait(), 5)
    await quiet(gateway)
    assert (await gateway.show(session_id))["turns"] == 1
    reply = reply_of(await gateway.post(session_id, body_of(stream=stream)))
    await one_turn(fake, gateway, session_id, reply)


# -- after a restart


@both_ways
async def test_after_a_restart_a_last_request_is_answered_once_more(
    fake: FakeSGLang, model_dir: Path, store: Path, stream: bool
) -> None:
    """Nobody knows whether its answer arrived; what was continued did."""
    fake.script(sampled("hello", seed=1), sampled("the weather", seed=2))
    async with gateway_for(fake.url, model_dir, store) as gateway:
        session_id = await gateway.create()
        first = reply_of(await gateway.post(session_id, body_of(stream=stream)))
        messages = [USER, first["choices"][0]["message"], USER]
        last = reply_of(await gateway.post(session_id, body_of(stream=stream, messages=messages)))
    async with gateway_for(fake.url, model_dir, store) as gateway:
        again = reply_of(await gateway.post(session_id, body_of(stream=stream, messages=messages)))
        assert again["tokentape"] == last["tokentape"]
        assert again["choices"] == last["choices"]
        assert len(fake.requests) == 2
        for asked in (messages, [USER]):
            anew = reply_of(await gateway.post(session_id, body_of(stream=stream, messages=asked)))
            assert anew["tokentape"]["branch_reason"] == "resampled"
        assert len(fake.requests) == 4
        kept = reply_of(await gateway.post(session_id, body_of(stream=stream), RETRY))
        assert kept["tokentape"]["turn_id"] == anew["tokentape"]["turn_id"]
        assert_samples_match(seen_by(fake), await gateway.samples(session_id), num_turns=4)


@both_ways
async def test_after_kill_9(
    fake: FakeSGLang, model_dir: Path, store: Path, tmp_path: Path, stream: bool
) -> None:
    command = ("serve", "--model", str(model_dir), "--engine", fake.url, "--port", "0", "--store", str(store))
    fake.script(sampled(TEXT, seed=1))
    body = body_of(stream=stream, tools=[WEATHER])
    async with aiohttp.ClientSession() as http:
        async with serving(tmp_path / "log", *command) as process:
            gateway = Gateway(process.url, http)
            session_id = await gateway.create()
            first = reply_of(await gateway.post(session_id, body))
            process.process.kill()
            await process.ended()
        async with serving(tmp_path / "log", *command) as process:
            gateway = Gateway(process.url, http)
            again = reply_of(await gateway.post(session_id, body))
            assert again["choices"] == first["choices"]
            assert again["tokentape"] == first["tokentape"]
            assert len(fake.requests) == 1
            anew = reply_of(await gateway.post(session_id, body))
            assert anew["tokentape"]["branch_reason"] == "resampled"
            assert_samples_match(seen_by(fake), await gateway.samples(session_id), num_turns=2)
