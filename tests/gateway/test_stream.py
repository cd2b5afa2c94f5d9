"""Streams: tokens leave as they come, the end only after the commit, and what fails in between."""

import asyncio
import contextlib
import json
import sqlite3
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from gatewaykit import (
    END,
    TOKENIZER,
    USER,
    WEATHER,
    Gateway,
    Json,
    assert_samples_match,
    call,
    cut,
    gateway_for,
    joined,
    sampled,
    seen_by,
    split,
)
from tokentape.testing import FakeSGLang, Fault, Reply

LONG = Reply(split("hello world " * 40, seed=1), delay_s=0.02)

TEXTS = [
    "the weather is hello",
    "",
    "  hello\n\n",
    "<think>\nthe user\n</think>\n\nhello",
    "<think>\nthe user is",
    "<think>\n\n</think>\n\n",
    "hello "
    + call("weather", {"city": "日本"})
    + "\n"
    + call("weather", {"city": "</tool_call>"})
    + " world",
    call("weather", "{bad") + " hello",
    "é日本語 👩‍👩‍👧 \u0301",
    "<tool_ca",
    "<think",
]


@pytest.mark.parametrize("incremental", [False, True], ids=["cumulative", "incremental"])
@pytest.mark.parametrize(
    ("text", "ended"),
    [(text, True) for text in TEXTS] + [(text, False) for text in TEXTS if text],
    ids=lambda v: {True: "stopped", False: "cut"}.get(v) if isinstance(v, bool) else ascii(v)[:16],
)
async def test_a_stream_says_what_a_whole_reply_says(
    fake: FakeSGLang, gateway: Gateway, text: str, ended: bool, incremental: bool
) -> None:
    fake.incremental = incremental
    reply = sampled(text, seed=4) if ended else cut(text, seed=4)
    session_id = await gateway.create()
    fields: Json = {"tools": [WEATHER], "logprobs": True, "return_token_ids": True}
    fake.script(reply, reply)
    whole = await gateway.chat(session_id, [USER], **fields)
    stream = await gateway.chat(
        session_id, [USER], **fields, stream=True, stream_options={"include_usage": True}
    )
    message, streamed = (r["choices"][0]["message"] for r in (whole, stream))
    for tool_call in [*message.get("tool_calls", []), *streamed.get("tool_calls", [])]:
        assert tool_call.pop("id").startswith("call_")
    message["content"], streamed["content"] = message["content"] or None, streamed["content"] or None
    if message.get("reasoning_content") == "":
        del message["reasoning_content"]  # an empty thought has no delta
    assert streamed == message
    assert stream["choices"][0]["logprobs"] == whole["choices"][0]["logprobs"]
    assert stream["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    for tape in (whole["tokentape"], stream["tokentape"]):
        del tape["turn_id"], tape["branch_reason"]
    assert stream["tokentape"] == whole["tokentape"]
    assert stream["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert_samples_match(seen_by(fake), await gateway.samples(session_id), num_turns=2)


async def test_tokens_leave_before_the_engine_has_ended(fake: FakeSGLang, gateway: Gateway) -> None:
    session_id = await gateway.create()
    ids = split("hello world " * 5, seed=1)
    fake.script(Reply(ids, delay_s=0.02))
    texts: list[str] = []
    async for event in gateway.events(session_id, {"messages": [USER]}):
        [choice] = event["choices"]
        if content := choice["delta"].get("content"):
            texts.append(content)
            if len(texts) == 3:
                num_sampled = len(fake.requests[0].output_ids)
                assert num_sampled < len(ids) / 2, "the engine had ended before the third delta came"
    assert len(texts) > len(ids) / 2
    assert "".join(texts) == "hello world " * 5


async def test_a_character_of_several_tokens_comes_whole(fake: FakeSGLang, gateway: Gateway) -> None:
    session_id = await gateway.create()
    text = "日本語👩é"
    fake.script(sampled(text, seed=9))
    events = [e async for e in gateway.events(session_id, {"messages": [USER]})]
    deltas = [c for e in events if (c := e["choices"][0]["delta"].get("content"))]
    assert len(fake.requests[0].output_ids) > len(text) + 1
    assert "\ufffd" not in "".join(deltas)
    assert deltas == list(text)


async def test_the_shape_of_a_stream(fake: FakeSGLang, gateway: Gateway) -> None:
    session_id = await gateway.create()
    fake.script(Reply([TOKENIZER.token_to_id("hello"), END]))
    body = {"messages": [USER], "stream_options": {"include_usage": True}}
    first, *middle, last, usage = [e async for e in gateway.events(session_id, body)]
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": "hello"}
    assert not middle
    assert last["choices"] == [{"index": 0, "delta": {}, "finish_reason": "stop", "logprobs": None}]
    assert set(last["tokentape"]) >= {"turn_id", "parse"}
    assert usage["choices"] == []
    assert usage["usage"]["total_tokens"] == sum(
        map(len, (fake.requests[0].input_ids, fake.requests[0].output_ids))
    )
    events = [e async for e in gateway.events(session_id, {"messages": [USER]})]
    assert all("usage" not in e for e in events)


# -- commit before the end


async def test_the_end_comes_after_the_commit(fake: FakeSGLang, gateway: Gateway, store: Path) -> None:
    """A lock on the store holds back the finish chunk, and nothing else."""
    session_id = await gateway.create()
    fake.script(sampled("hello world", seed=1))
    finished = asyncio.Event()
    deltas: list[str] = []

    async def read() -> None:
        async for event in gateway.events(session_id, {"messages": [USER]}):
            deltas.append(event["choices"][0]["delta"].get("content") or "")
            if event["choices"][0]["finish_reason"]:
                assert turns_in(store) == [event["id"]]
                finished.set()

    with contextlib.closing(sqlite3.connect(store, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        reader = asyncio.create_task(read())
        await fake.until(lambda: "".join(deltas) == "hello world")
        await asyncio.sleep(0.2)
        assert not finished.is_set()
        assert turns_in(store) == []
        other.execute("ROLLBACK")
    await reader
    assert finished.is_set()


def turns_in(store: Path) -> list[str]:
    with contextlib.closing(sqlite3.connect(store)) as connection:
        return [row[0] for row in connection.execute("SELECT turn_id FROM turns ORDER BY rowid")]


@contextlib.contextmanager
def broken(store: Path) -> Any:
    """A store that cannot take a turn."""
    with contextlib.closing(sqlite3.connect(store)) as connection:
        connection.execute("ALTER TABLE turns RENAME TO gone")
    yield
    with contextlib.closing(sqlite3.connect(store)) as connection:
        connection.execute("ALTER TABLE gone RENAME TO turns")


async def test_a_turn_that_cannot_be_stored(fake: FakeSGLang, gateway: Gateway, store: Path) -> None:
    session_id = await gateway.create()
    fake.script(sampled("hello"), sampled("world"), sampled("the"), sampled("hello"))
    with broken(store):
        events = [e async for e in gateway.events(session_id, {"messages": [USER]})]
        assert all(c["finish_reason"] is None for e in events[:-1] for c in e["choices"])
        assert events[-1]["error"]["code"] == "store_error"
        async with gateway.openai(session_id) as client:
            stream = await client.chat.completions.create(model="policy", messages=[USER], stream=True)
            with pytest.raises(openai.APIError, match="store"):
                async for _ in stream:
                    pass
        answer = await gateway.post(session_id, {"messages": [USER]})
        assert (answer.status, answer.error["code"]) == (503, "store_error")
    summary = await gateway.show(session_id)
    assert (summary["turns"], summary["failures"]) == (0, {"store_error": 3})
    await gateway.chat(session_id, [USER], stream=True)
    samples = await gateway.samples(session_id)
    assert samples[0]["branch_reason"] == "root"
    assert_samples_match(seen_by(fake), samples, num_turns=1)


# -- failures in the middle

IN_STREAM = [
    (Fault("error_event", after=2), "engine_failed"),
    (Fault("disconnect", after=2), "engine_disconnected"),
    (Fault("cut", after=2), "engine_disconnected"),
    (Fault("stall", after=2), "engine_timeout"),
    (Fault("no_done"), "engine_disconnected"),
    (Fault("wrong_count"), "engine_protocol_error"),
    (Fault("shifted_ids"), "engine_protocol_error"),
    (Fault("logprob", value=None), "engine_protocol_error"),
]


@pytest.mark.parametrize(("fault", "code"), IN_STREAM, ids=lambda v: getattr(v, "kind", ""))
async def test_the_engine_fails_behind_some_tokens(
    fake: FakeSGLang, model_dir: Path, store: Path, fault: Fault, code: str
) -> None:
    text = split("hello world", seed=1)
    fault = Fault(fault.kind, after=fault.after, value=fault.value, reply=Reply(text))
    async with gateway_for(fake.url, model_dir, store, engine={"token_timeout_s": 0.3}) as gateway:
        session_id = await gateway.create()
        fake.script(fault, fault, sampled("hello"))
        events = [e async for e in gateway.events(session_id, {"messages": [USER]})]
        assert events[0]["choices"][0]["delta"]["content"]
        assert all(c["finish_reason"] is None for e in events[:-1] for c in e["choices"])
        error = events[-1]["error"]
        assert (error["type"], error["code"], error["param"]) == ("server_error", code, None)
        async with gateway.openai(session_id) as client:
            stream = await client.chat.completions.create(model="policy", messages=[USER], stream=True)
            with pytest.raises(openai.APIError) as raised:
                async for _ in stream:
                    pass
            assert raised.value.code == code
        summary = await gateway.show(session_id)
        assert (summary["turns"], summary["failures"]) == (0, {code: 2})
        await gateway.chat(session_id, [USER])
        assert_samples_match(seen_by(fake), await gateway.samples(session_id), num_turns=1)
    with contextlib.closing(sqlite3.connect(store)) as connection:
        kinds = connection.execute("SELECT kind, num_tokens FROM failures").fetchall()
    assert [kind for kind, _ in kinds] == [code, code]
    assert all(num_tokens >= 2 for _, num_tokens in kinds)


# -- the client leaves


async def test_the_client_leaves_a_stream(fake: FakeSGLang, gateway: Gateway) -> None:
    session_id = await gateway.create()
    fake.script(LONG, sampled("hello"))
    async with gateway.openai(session_id) as client:
        stream = await client.chat.completions.create(model="policy", messages=[USER], stream=True)
        async for _ in stream:
            break
        await stream.close()
    await nothing_committed(fake, gateway, session_id)


async def test_the_client_leaves_a_request(fake: FakeSGLang, gateway: Gateway) -> None:
    session_id = await gateway.create()
    fake.script(LONG, sampled("hello"))
    async with gateway.openai(session_id, timeout=0.2) as client:
        with pytest.raises(openai.APITimeoutError):
            await client.chat.completions.create(model="policy", messages=[USER])
    await nothing_committed(fake, gateway, session_id)


async def test_the_client_leaves_before_the_first_token(fake: FakeSGLang, gateway: Gateway) -> None:
    session_id = await gateway.create()
    fake.script(Fault("stall", after=0, reply=LONG), sampled("hello"))
    path = f"{gateway.url}/sessions/{session_id}/v1/chat/completions"
    body, timeout = json.dumps({"messages": [USER], "stream": True}), aiohttp.ClientTimeout(total=0.2)
    with pytest.raises(TimeoutError):
        await gateway.http.post(path, data=body, timeout=timeout)
    await nothing_committed(fake, gateway, session_id)


async def nothing_committed(fake: FakeSGLang, gateway: Gateway, session_id: str) -> None:
    """The engine was told to stop, the failure is counted, and the session goes on as if nothing had been."""
    await fake.until(lambda: fake.aborts != [])
    assert fake.aborts == [fake.requests[0].rid]
    for _ in range(500):  # the turn's end: its failure is stored by then
        metrics = await gateway.ok("GET", "/metrics")
        if b"tokentape_active_turns 0.0" in metrics:
            break
        await asyncio.sleep(0.01)
    assert b'tokentape_failures_total{kind="client_gone"} 1.0' in metrics
    summary = await gateway.show(session_id)
    assert (summary["turns"], summary["failures"]) == (0, {"client_gone": 1})
    reply = await gateway.chat(session_id, [USER])
    assert reply["tokentape"]["branch_reason"] == "root"
    assert_samples_match(seen_by(fake), await gateway.samples(session_id), num_turns=1)


# -- the stop token


async def test_the_stop_token_never_leaks(fake: FakeSGLang, gateway: Gateway) -> None:
    session_id = await gateway.create()
    think = TOKENIZER.token_to_id("</think>")
    fake.script(
        sampled("hello"),
        Reply([*split("hello"), TOKENIZER.token_to_id("<|endoftext|>")]),
        Reply([END]),
        Reply([*split("hello"), think, 40]),
    )
    expected = ["hello", "hello", "", "hello</think>"]
    for text in expected:
        events = [e async for e in gateway.events(session_id, {"messages": [USER], "stop_token_ids": [40]})]
        assert (joined(events)["choices"][0]["message"]["content"] or "") == text
        assert "<|" not in json.dumps(events)


async def test_calls_leave_only_when_the_turn_is_durable(
    fake: FakeSGLang, gateway: Gateway, store: Path
) -> None:
    """Agents run a call as soon as they have read it."""
    session_id = await gateway.create()
    fake.script(*(sampled("hello " + call("weather", {"city": "x"})) for _ in range(2)))
    body = {"messages": [USER], "tools": [WEATHER]}
    with broken(store):
        lost = [e async for e in gateway.events(session_id, body)]
    assert "error" in lost[-1]
    assert not any("tool_calls" in c["delta"] for e in lost[:-1] for c in e["choices"])
    kept = joined([e async for e in gateway.events(session_id, body)])
    assert len(kept["choices"][0]["message"]["tool_calls"]) == 1


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_finish_during_the_commit(
    fake: FakeSGLang, gateway: Gateway, store: Path, stream: bool
) -> None:
    """Too late to stop it: the turn is part of the session, and its caller gets it."""
    session_id = await gateway.create()
    with contextlib.closing(sqlite3.connect(store, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")  # the gateway's own transaction has to wait
        running = asyncio.create_task(gateway.chat(session_id, [USER], stream=stream))
        await fake.until(lambda: len(fake.requests) == 1)
        await asyncio.sleep(0.1)
        finishing = asyncio.create_task(gateway.ok("POST", f"/sessions/{session_id}/finish", {"reward": 1}))
        await asyncio.sleep(0.1)
        assert not running.done()
        connection.execute("COMMIT")
        reply, summary = await asyncio.gather(running, finishing)
    assert (summary["turns"], summary["failures"]) == (1, {})
    [sample] = await gateway.samples(session_id)
    assert sample["sample_id"] == reply["tokentape"]["turn_id"]
