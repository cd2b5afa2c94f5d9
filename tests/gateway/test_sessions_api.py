"""The control API: sessions are made, listed, limited, finished, deleted, and used by many at once."""

import asyncio
import contextlib
import json
import sqlite3
from pathlib import Path
from typing import Any

import openai
import pyarrow as pa
import pytest

from gatewaykit import (
    USER,
    WEATHER,
    Agent,
    Gateway,
    Json,
    assert_samples_match,
    call,
    drifts,
    gateway_for,
    sampled,
    seen_by,
    split,
)
from tokentape.testing import FakeSGLang, Reply
from tokentape.testing.sglang import ReceivedRequest

ARROW = "application/vnd.apache.arrow.stream"


# -- create


async def test_create(gateway: Gateway) -> None:
    made = await gateway.ok("POST", "/sessions", {"session_id": "run-1:a@b.c~d_e", "metadata": {"task": 7}})
    assert made == {"session_id": "run-1:a@b.c~d_e", "base_url": f"{gateway.url}/sessions/run-1:a@b.c~d_e/v1"}
    async with openai.AsyncOpenAI(base_url=made["base_url"], api_key="x", max_retries=0) as client:
        await client.chat.completions.create(model="policy", messages=[USER])
        assert [m.id async for m in client.models.list()] == ["policy"]
    summary = await gateway.show("run-1:a@b.c~d_e")
    assert (summary["turns"], summary["metadata"], summary["state"]) == (1, {"task": 7}, "open")


async def test_ids_that_are_made(gateway: Gateway) -> None:
    ids = {await gateway.create() for _ in range(50)}
    ids.add((await gateway.ok("POST", "/sessions", None))["session_id"])  # no body at all
    assert len(ids) == 51
    assert all(len(i) >= 24 for i in ids)  # 144 random bits
    assert len({i[2:6] for i in ids}) > 45


async def test_an_id_is_given_once(gateway: Gateway) -> None:
    await gateway.create(session_id="mine", metadata={"a": 1})
    answer = await gateway.request("POST", "/sessions", {"session_id": "mine"})
    assert (answer.status, answer.error["code"], answer.error["param"]) == (
        409,
        "session_exists",
        "session_id",
    )
    answers = await asyncio.gather(
        *(gateway.request("POST", "/sessions", {"session_id": "b"}) for _ in range(8))
    )
    assert sorted(a.status for a in answers) == [200] + [409] * 7
    assert (await gateway.show("mine"))["metadata"] == {"a": 1}


@pytest.mark.parametrize(
    "body",
    [
        [],
        "x",
        b"{",
        b'{"metadata": {"a": "\xff"}}',
        b'{"metadata": {"a": "\\ud800"}}',
        b'{"metadata": {"a": NaN}}',
        b'{"metadata": ' + b'{"a":' * 3000 + b"1" + b"}" * 3000 + b"}",
        {"session_id": 7},
        {"session_id": ""},
        {"session_id": "a/b"},
        {"session_id": "a b"},
        {"session_id": ".."},
        {"session_id": "é"},
        {"session_id": "a\n"},
        {"session_id": "x" * 129},
        {"metadata": []},
        {"unknown": 1},
        {"max_turns": 0},
        {"max_turns": -1},
        {"max_turns": 2**70},
        {"max_tokens": 0},
        {"max_tokens": "7"},
        {"max_tokens": 2**70},
        {"sampling": []},
        {"sampling": {"temperature": -1}},
        {"sampling": {"temperature": "hot"}},
        {"sampling": {"max_tokens": 0}},
        {"sampling": {"max_tokens": -5}},
        {"sampling": {"temprature": 1}},
        {"sampling": {"n": 2}},
        {"sampling": {"stop": [""]}},
        {"sampling": {"top_k": 0}},
        {"sampling": {"seed": 2**70}},
    ],
    ids=lambda b: ascii(b)[:40],
)
async def test_bad_creations(gateway: Gateway, body: Any) -> None:
    answer = await gateway.request("POST", "/sessions", body)
    assert answer.status == 400, answer
    assert answer.error["type"] == "invalid_request_error"
    assert (await gateway.ok("GET", "/sessions"))["sessions"] == []


# -- list, show


async def test_list(gateway: Gateway) -> None:
    ids = [f"s{i:02}" for i in range(7)]
    for i in ids:
        await gateway.create(session_id=i, metadata={"i": i})
    await gateway.ok("POST", "/sessions/s03/finish", {"reward": 0.5})
    got: list[str] = []
    after = ""
    for _ in range(4):
        page = await gateway.ok("GET", f"/sessions?limit=2&after={after}")
        got += [s["session_id"] for s in page["sessions"]]
        after = got[-1]
        if not page["has_more"]:
            break
    assert got == ids
    finished = (await gateway.ok("GET", "/sessions?state=finished"))["sessions"]
    assert [(s["session_id"], s["reward"], s["metadata"]) for s in finished] == [("s03", 0.5, {"i": "s03"})]
    assert len((await gateway.ok("GET", "/sessions?state=open"))["sessions"]) == 6
    for query in ("limit=0", "limit=1001", "limit=x", "limit=-1", f"limit={10**30}"):
        answer = await gateway.request("GET", f"/sessions?{query}")
        assert (answer.status, answer.error["param"]) == (400, "limit")
    assert (await gateway.request("GET", "/sessions?after=%ff%00&state=%ff")).status in (200, 400)


async def test_show(fake: FakeSGLang, gateway: Gateway) -> None:
    session_id = await gateway.create()
    empty = await gateway.show(session_id)
    assert {k: empty[k] for k in ("turns", "branches", "tokens", "sampled_tokens", "failures", "reward")} == {
        "turns": 0,
        "branches": 0,
        "tokens": 0,
        "sampled_tokens": 0,
        "failures": {},
        "reward": None,
    }
    assert await gateway.samples(session_id) == []
    fake.script(sampled("hello"), sampled(call("weather", "{")))
    await gateway.chat(session_id, [USER], tools=[WEATHER])
    await gateway.chat(session_id, [USER], tools=[WEATHER])
    summary = await gateway.show(session_id)
    assert (summary["turns"], summary["branches"]) == (2, 2)
    assert summary["branch_reasons"] == {"root": 1, "resampled": 1}
    assert summary["parse_statuses"] == {"ok": 1, "invalid_json": 1}
    assert summary["tokens"] == sum(len(r.input_ids + r.output_ids) for r in fake.requests)


async def test_samples_as_json_and_arrow(fake: FakeSGLang, gateway: Gateway) -> None:
    session_id = await gateway.create(metadata={"a": 1})
    agent = Agent(gateway, session_id, {"tools": [WEATHER]})
    fake.script(*(sampled("the weather", seed=n) for n in range(3)))
    for _ in range(2):
        await agent.turn(USER)
    await gateway.chat(session_id, [USER], tools=[WEATHER])
    await gateway.ok("POST", f"/sessions/{session_id}/finish", {"reward": 0.25})
    rows = await gateway.samples(session_id)
    answer = await gateway.request("GET", f"/sessions/{session_id}/samples", headers={"Accept": ARROW})
    assert answer.headers["Content-Type"] == ARROW
    table = pa.ipc.open_stream(answer.body).read_all()
    assert table.to_pylist() == rows
    assert len(rows) == 2
    assert [r["reward"] for r in rows] == [0.25, 0.25]
    assert json.loads(rows[0]["metadata"]) == {"a": 1}
    empty = await gateway.create()
    answer = await gateway.request("GET", f"/sessions/{empty}/samples", headers={"Accept": ARROW})
    assert pa.ipc.open_stream(answer.body).read_all().num_rows == 0


# -- finish, delete


async def test_finish(fake: FakeSGLang, gateway: Gateway, store: Path) -> None:
    session_id = await gateway.create(metadata={"a": 1, "b": 1})
    await gateway.chat(session_id, [USER])
    first = await gateway.ok("POST", f"/sessions/{session_id}/finish", {"reward": 1, "metadata": {"b": 2}})
    assert (first["state"], first["reward"], first["metadata"]) == ("finished", 1.0, {"a": 1, "b": 2})
    again = await gateway.ok("POST", f"/sessions/{session_id}/finish", {"reward": 1})
    assert again == first
    assert await gateway.ok("POST", f"/sessions/{session_id}/finish") == first  # no body
    answer = await gateway.request("POST", f"/sessions/{session_id}/finish", {"reward": 0.5})
    assert (answer.status, answer.error["code"]) == (409, "session_closed")
    assert await gateway.show(session_id) == first
    assert len(fake.requests) == 1


@pytest.mark.parametrize(
    "body",
    [{"reward": "good"}, {"reward": True}, {"rewards": 1}, b'{"reward": NaN}', b'{"reward": 1e999}', []],
)
async def test_bad_finishes(gateway: Gateway, body: Any) -> None:
    session_id = await gateway.create()
    answer = await gateway.request("POST", f"/sessions/{session_id}/finish", body)
    assert answer.status == 400
    assert (await gateway.show(session_id))["state"] == "open"


async def test_delete(fake: FakeSGLang, gateway: Gateway, store: Path) -> None:
    session_id = await gateway.create(session_id="x")
    await gateway.chat(session_id, [USER])
    assert await gateway.ok("DELETE", "/sessions/x") == {"session_id": "x", "deleted": True}
    assert (await gateway.request("GET", "/sessions/x")).status == 404
    assert (await gateway.request("DELETE", "/sessions/x")).status == 404
    await gateway.create(session_id="x")
    assert (await gateway.show("x"))["turns"] == 0


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_finish_while_a_turn_runs(fake: FakeSGLang, gateway: Gateway, stream: bool) -> None:
    """The turn is stopped, on the engine too; it is not committed, and that is recorded."""
    session_id = await gateway.create()
    fake.script(sampled("hello world " * 30, seed=1, delay_s=0.01))
    running = asyncio.create_task(outcome(gateway, session_id, stream=stream))
    await fake.until(lambda: len(fake.requests) == 1 and (not stream or len(fake.requests[0].output_ids) > 3))
    finished = await gateway.ok("POST", f"/sessions/{session_id}/finish", {"reward": 1})
    assert finished["turns"] == 0
    assert await running == "session_closed"
    summary = await gateway.show(session_id)
    assert (summary["turns"], summary["failures"]) == (0, {"session_closed": 1})
    assert await gateway.samples(session_id) == []
    assert fake.aborts == [fake.requests[0].rid]


async def test_finish_before_a_stream_has_begun(fake: FakeSGLang, gateway: Gateway) -> None:
    """It gets the status that a request without `stream` gets."""
    session_id = await gateway.create()
    fake.script(sampled("hello", delay_s=5))
    running = asyncio.create_task(gateway.post(session_id, {"messages": [USER], "stream": True}))
    await fake.until(lambda: len(fake.requests) == 1)
    await gateway.ok("POST", f"/sessions/{session_id}/finish")
    answer = await running
    assert (answer.status, answer.error["code"]) == (409, "session_closed")
    assert answer.headers["x-should-retry"] == "false"


async def test_delete_while_a_turn_runs(fake: FakeSGLang, gateway: Gateway, store: Path) -> None:
    session_id = await gateway.create(session_id="x")
    fake.script(sampled("hello world", seed=1, delay_s=0.5))
    running = asyncio.create_task(outcome(gateway, session_id, stream=False))
    await fake.until(lambda: len(fake.requests) == 1)
    await gateway.ok("DELETE", f"/sessions/{session_id}")
    assert fake.aborts == [fake.requests[0].rid]
    await gateway.create(session_id="x")
    assert await running == "session_closed"
    summary = await gateway.show("x")
    assert (summary["turns"], summary["failures"]) == (0, {})
    with contextlib.closing(sqlite3.connect(store)) as connection:
        assert connection.execute("SELECT count(*) FROM turns").fetchone() == (0,)
        assert connection.execute("SELECT count(*) FROM failures").fetchone() == (0,)


async def outcome(gateway: Gateway, session_id: str, *, stream: bool, text: str = "hello") -> str:
    """The error code of a turn, or "ok"."""
    body: Json = {"messages": [{"role": "user", "content": text}]}
    if stream:
        events = [e async for e in gateway.events(session_id, body)]
        return events[-1]["error"]["code"] if "error" in events[-1] else "ok"
    answer = await gateway.post(session_id, body)
    return "ok" if answer.status == 200 else answer.error["code"]


# -- limits


async def test_max_turns(fake: FakeSGLang, gateway: Gateway) -> None:
    session_id = await gateway.create(max_turns=2)
    agent = Agent(gateway, session_id)
    await agent.turn(USER)
    await agent.turn(USER)
    answer = await gateway.post(session_id, {"messages": [USER]})
    assert (answer.status, answer.error["code"]) == (400, "limit_reached")
    assert len(fake.requests) == 2
    assert (await gateway.show(session_id))["failures"] == {}


async def test_max_turns_holds_for_turns_side_by_side(fake: FakeSGLang, gateway: Gateway) -> None:
    session_id = await gateway.create(max_turns=2)
    fake.script(*(sampled("hello world", seed=n, delay_s=0.01) for n in range(5)))
    outcomes = await asyncio.gather(
        *(outcome(gateway, session_id, stream=bool(n % 2), text=f"hello {n}") for n in range(5))
    )
    assert sorted(outcomes) == ["limit_reached"] * 3 + ["ok"] * 2
    assert (await gateway.show(session_id))["turns"] == 2


async def test_max_tokens(fake: FakeSGLang, gateway: Gateway) -> None:
    session_id = await gateway.create(max_tokens=10)
    ids = split("hello world hello", seed=1)
    fake.script(Reply(ids[:6]), Reply(ids), sampled("never"))
    await gateway.chat(session_id, [USER])
    reply = await gateway.chat(session_id, [USER], max_tokens=50)
    assert reply["choices"][0]["finish_reason"] == "length"
    assert [r.sampling_params["max_new_tokens"] for r in fake.requests] == [10, 4]
    answer = await gateway.post(session_id, {"messages": [USER]})
    assert (answer.status, answer.error["code"]) == (400, "limit_reached")
    assert (await gateway.show(session_id))["sampled_tokens"] == 10


# -- the rest of the surface


async def test_health_and_metrics(fake: FakeSGLang, gateway: Gateway) -> None:
    assert (await gateway.ok("GET", "/healthz"))["status"] == "ok"
    ready = await gateway.ok("GET", "/readyz")
    assert ready["engine"] == {"model": "fake", "context_length": 8192, "weight_version": "default"}
    session_id = await gateway.create()
    fake.script(sampled("hello", seed=1))
    await gateway.chat(session_id, [USER], user="me")
    await gateway.post(session_id, {"messages": []})
    text = (await gateway.ok("GET", "/metrics")).decode()
    for line in (
        'tokentape_turns_total{finish_reason="stop"} 1.0',
        'tokentape_branches_total{reason="root"} 1.0',
        'tokentape_refusals_total{kind="request_error"} 1.0',
        'tokentape_parse_statuses_total{status="ok"} 1.0',
        "tokentape_ignored_fields_total 1.0",
        f"tokentape_sampled_tokens_total {len(fake.requests[0].output_ids)}.0",
        f"tokentape_prompt_tokens_total {len(fake.requests[0].input_ids)}.0",
        "tokentape_sessions_in_memory 1.0",
        "tokentape_active_turns 0.0",
    ):
        assert line in text.splitlines(), line


async def test_ways_to_name_the_session(fake: FakeSGLang, gateway: Gateway) -> None:
    session_id = await gateway.create()
    body = {"messages": [USER]}
    for headers in (
        {"X-Session-Id": session_id},
        {"Authorization": f"Bearer {session_id}"},
        {"x-api-key": session_id},
        {"X-Session-Id": session_id, "Authorization": "Bearer sk-something"},
    ):
        answer = await gateway.request("POST", "/v1/chat/completions", body, headers)
        assert answer.status == 200
        assert answer.body["tokentape"]["session_id"] == session_id
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=session_id, max_retries=0) as client:
        await client.chat.completions.create(model="policy", messages=[USER])
    assert (await gateway.show(session_id))["turns"] == 5


async def test_auto_sessions(fake: FakeSGLang, model_dir: Path, store: Path) -> None:
    async with gateway_for(fake.url, model_dir, store, auto_sessions=True) as gateway:
        for path in ("/sessions/typo", "/sessions/typo/samples"):
            assert (await gateway.request("GET", path)).status == 404  # a question makes nothing
        assert (await gateway.request("POST", "/sessions/typo/finish")).status == 404
        assert (await gateway.ok("GET", "/sessions"))["sessions"] == []
        bodies = [{"messages": [{"role": "user", "content": f"hello {n}"}]} for n in range(4)]
        answers = await asyncio.gather(*(gateway.post("new", body) for body in bodies))
        assert [a.status for a in answers] == [200] * 4
        assert (await gateway.show("new"))["turns"] == 4
        assert (await gateway.post("b%20d", {"messages": [USER]})).status == 400
        headers = {"Authorization": "Bearer other"}
        assert (
            await gateway.request("POST", "/v1/chat/completions", {"messages": [USER]}, headers)
        ).status == 200
        assert (await gateway.show("other"))["turns"] == 1


# -- many at once


async def test_sessions_side_by_side(fake: FakeSGLang, gateway: Gateway) -> None:
    """16 agents, 6 turns each, all at once: no token of one is ever in another."""

    def respond(request: ReceivedRequest) -> Reply:
        number = sum(request.input_ids) % 97
        return Reply(
            [*split(f"hello world {number} ", seed=number), *sampled(call("weather", {"n": number})).ids]
        )

    fake.responder = respond

    async def run(number: int) -> list[Json]:
        agent = Agent(gateway, await gateway.create(), {"tools": [WEATHER], "stream": bool(number % 2)})
        await agent.turn({"role": "user", "content": f"the weather {number}"})
        for _ in range(5):
            await agent.turn(*agent.results(f"{number}"))
        samples = await gateway.samples(agent.session_id)
        assert len(samples) == 1
        assert json.loads(samples[0]["messages"]) == agent.messages
        return samples

    everything = [sample for samples in await asyncio.gather(*map(run, range(16))) for sample in samples]
    assert_samples_match(seen_by(fake), everything, num_turns=96)
    assert sum(drifts(r.output_ids) for r in fake.requests) > 30


async def test_two_turns_of_a_session_side_by_side(fake: FakeSGLang, gateway: Gateway) -> None:
    session_id = await gateway.create()
    agent = Agent(gateway, session_id)
    fake.script(*(sampled("the weather", seed=n, delay_s=0.01) for n in range(8)))
    await agent.turn(USER)
    others = [[*agent.messages, {"role": "user", "content": f"the {n}"}] for n in range(3)] + [
        [*agent.messages, USER]
    ] * 2
    replies = await asyncio.gather(
        *(gateway.chat(session_id, m, stream=n % 2 == 0) for n, m in enumerate(others))
    )
    reasons = sorted(str(r["tokentape"]["branch_reason"]) for r in replies)
    assert reasons == ["None", "forked", "forked", "forked", "resampled"]
    agent.messages = [*others[1], replies[1]["choices"][0]["message"]]
    await agent.turn(USER)
    samples = await gateway.samples(session_id)
    assert len(samples) == 5
    assert_samples_match(seen_by(fake), samples, num_turns=7)


@pytest.mark.parametrize(
    ("method", "path", "body", "said"),
    [
        ("POST", "/sessions", {"group_id": "a\0b"}, "$.group_id"),
        ("POST", "/sessions", {"group_id": "\0\n"}, "$.group_id"),
        ("POST", "/sessions", {"session_id": "a\0b"}, "session_id must be"),
        ("POST", "/weights", {"version": "a\0b"}, "$.version"),
        ("GET", "/sessions?after=a%00b", None, "`after` must not have a NUL"),
    ],
)
async def test_a_nul_is_refused(gateway: Gateway, method: str, path: str, body: Any, said: str) -> None:
    """PostgreSQL's text has none: there it was a failure of the store, and worth another try."""
    reply = await gateway.request(method, path, body)
    assert (reply.status, reply.error["type"]) == (400, "invalid_request_error")
    assert said in reply.error["message"]
