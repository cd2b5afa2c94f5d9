"""Time: a session's deadline, and signs of life on a slow stream."""

import asyncio
import contextlib
import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from gatewaykit import USER, Agent, Gateway, Json, assert_samples_match, gateway_for, sampled, seen_by, split
from tokentape.engines.base import GenerateRequest
from tokentape.gateway import chat
from tokentape.gateway.api import AgentApi
from tokentape.gateway.parts import Gateway as Parts
from tokentape.gateway.parts import PartsConfig, parts
from tokentape.testing import FakeEngine, FakeSGLang, Fault, Reply

both_ways = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


def failures_in(store: Path) -> list[tuple[str, int]]:
    with contextlib.closing(sqlite3.connect(store)) as connection:
        return connection.execute("SELECT kind, num_tokens FROM failures").fetchall()


@both_ways
async def test_a_deadline_in_the_middle_of_a_turn(
    fake: FakeSGLang, gateway: Gateway, store: Path, stream: bool
) -> None:
    """The engine is stopped; the turn is a failure of the session's, and what was before it stays."""
    session_id = await gateway.create(deadline_s=1.0)
    agent = Agent(gateway, session_id)
    fake.script(sampled("hello", seed=1), Reply(split("hello world " * 60, seed=1), delay_s=0.02))
    await agent.turn(USER)
    body = {"messages": [*agent.messages, USER], "stream": stream}
    if stream:
        events = [event async for event in gateway.events(session_id, body)]
        assert events[0]["choices"][0]["delta"]["content"]
        error = events[-1]["error"]
    else:
        answer = await gateway.post(session_id, body)
        assert answer.status == 400
        assert answer.headers["x-should-retry"] == "false"
        error = answer.error
    assert (error["code"], error["type"]) == ("limit_reached", "invalid_request_error")
    assert "deadline" in error["message"]
    await fake.until(lambda: fake.aborts == [fake.requests[1].rid])
    summary = await gateway.show(session_id)
    assert (summary["turns"], summary["failures"]) == (1, {"limit_reached": 1})
    [(kind, num_tokens)] = failures_in(store)
    assert kind == "limit_reached"
    assert (num_tokens > 5) == stream
    assert_samples_match(seen_by(fake)[:1], await gateway.samples(session_id), num_turns=1)


@both_ways
async def test_a_deadline_before_the_first_token(fake: FakeSGLang, gateway: Gateway, stream: bool) -> None:
    session_id = await gateway.create(deadline_s=0.3)
    fake.script(Fault("stall", after=0, reply=sampled("hello")))
    answer = await gateway.post(session_id, {"messages": [USER], "stream": stream})
    assert (answer.status, answer.error["code"]) == (400, "limit_reached")
    assert (await gateway.show(session_id))["failures"] == {"limit_reached": 1}


async def test_after_the_deadline(fake: FakeSGLang, model_dir: Path, store: Path) -> None:
    """No more turns, also after a restart; everything else goes on."""
    async with gateway_for(fake.url, model_dir, store) as gateway:
        session_id = await gateway.create(deadline_s=0.5)
        await gateway.chat(session_id, [USER])
        await asyncio.sleep(0.6)
        answer = await gateway.post(session_id, {"messages": [USER]})
        assert (answer.status, answer.error["code"]) == (400, "limit_reached")
    async with gateway_for(fake.url, model_dir, store) as gateway:
        answer = await gateway.post(session_id, {"messages": [USER], "seed": 1})
        assert (answer.status, answer.error["code"]) == (400, "limit_reached")
        assert len(fake.requests) == 1
        summary = await gateway.ok("POST", f"/sessions/{session_id}/finish", {"reward": 1})
        assert (summary["turns"], summary["failures"]) == (1, {})
        assert_samples_match(seen_by(fake), await gateway.samples(session_id), num_turns=1)


@pytest.mark.parametrize("deadline_s", [0, -1, "1", 1e12, True])
async def test_deadlines_that_are_none(gateway: Gateway, deadline_s: Any) -> None:
    answer = await gateway.request("POST", "/sessions", {"deadline_s": deadline_s})
    assert answer.status == 400
    assert "deadline_s" in answer.error["message"]


async def test_a_deadline_does_not_end_a_turn_that_is_in_time(fake: FakeSGLang, gateway: Gateway) -> None:
    session_id = await gateway.create(deadline_s=30)
    await gateway.chat(session_id, [USER])


# -- signs of life


def silent_then(text: str) -> Any:
    def respond(request: GenerateRequest) -> Reply:
        del request
        return Reply(sampled(text).ids, delay_s=0.12)

    return respond


def with_pings(gateway: Parts, ping_s: float) -> AgentApi:
    return AgentApi(gateway.turns, gateway.api.config, gateway.api.admission, ping_s=ping_s)


async def test_a_slow_stream_says_that_it_is_alive(model_dir: Path) -> None:
    """A comment wherever nothing came for `ping_s`: between tokens, and before the first."""
    engine = FakeEngine(responder=silent_then("hello"))
    config = PartsConfig(model=str(model_dir), engine=engine, store=None)
    async with (
        parts(config) as gateway,
        contextlib.aclosing(
            AgentApi(gateway.turns, gateway.api.config, gateway.api.admission, ping_s=0.05)
        ) as api,
    ):
        session = await gateway.sessions.create()
        body = json.dumps({"messages": [USER], "stream": True}).encode()
        decoded = api.decode(chat.WIRE, session, body, {})
        async with api.answering(session, decoded, {}) as answering:
            pieces = [piece async for piece in answering.pieces()]
        pings = [piece for piece in pieces if piece == b": ping\n\n"]
        assert len(pings) >= 2
        assert pieces[0] == b": ping\n\n"  # before any token
        said = b"".join(piece for piece in pieces if piece not in pings)
        assert said.startswith(b"data: {")
        assert said.endswith(b"data: [DONE]\n\n")


async def test_a_fast_stream_has_no_pings(fake: FakeSGLang, gateway: Gateway) -> None:
    """`Gateway.events` takes nothing but data."""
    session_id = await gateway.create()
    await gateway.chat(session_id, [USER], stream=True)


async def test_the_sdk_does_not_see_pings(
    fake: FakeSGLang, gateway: Gateway, monkeypatch: pytest.MonkeyPatch, model_dir: Path, store: Path
) -> None:
    monkeypatch.setitem(AgentApi.__init__.__kwdefaults__, "ping_s", 0.05)
    fake.script(sampled("hello", delay_s=0.1))
    async with gateway_for(fake.url, model_dir, store.with_name("pings")) as pinging:
        session_id = await pinging.create()
        async with pinging.openai(session_id) as client:
            stream = await client.chat.completions.create(model="policy", messages=[USER], stream=True)
            chunks: list[Json] = [chunk.model_dump() async for chunk in stream]
        assert "".join(c["choices"][0]["delta"]["content"] or "" for c in chunks) == "hello"
        fake.script(sampled("hello", delay_s=0.1))
        body = {"messages": [USER], "stream": True, "seed": 1}
        assert b": ping\n\n" in (await pinging.post(session_id, body)).body


async def test_a_failure_behind_a_ping_is_an_event(model_dir: Path) -> None:
    """The headers have left with it: no status can say it any more."""
    config = PartsConfig(model=str(model_dir), engine=FakeEngine(responder=silent_then("hello")), store=None)
    async with (
        parts(config) as gateway,
        contextlib.aclosing(
            AgentApi(gateway.turns, gateway.api.config, gateway.api.admission, ping_s=0.03)
        ) as api,
    ):
        session = await gateway.sessions.create(deadline_s=0.1)
        decoded = api.decode(
            chat.WIRE, session, b'{"messages": [{"role": "user", "content": "x"}], "stream": true}', {}
        )
        async with api.answering(session, decoded, {}) as answering:
            pieces = [piece async for piece in answering.pieces()]
        assert pieces[0] == b": ping\n\n"
        assert json.loads(pieces[-1][6:])["error"]["code"] == "limit_reached"
