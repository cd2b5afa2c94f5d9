"""`n` replies to one request: turns of their own, sampled side by side, committed together or not at all."""

import asyncio
import contextlib
import json
import sqlite3
from itertools import pairwise
from pathlib import Path
from typing import Any

import openai
import pytest

from gatewaykit import (
    USER,
    WEATHER,
    Agent,
    Gateway,
    Json,
    assert_samples_match,
    call,
    joined,
    sampled,
    seen_by,
    split,
    turn_id_of,
)
from tokentape.testing import FakeSGLang, Fault, Reply

both_ways = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
TEXTS = ["hello world", "<think>\nthe user\n</think>\n\nthe weather", call("weather", {"city": "x"})]


async def ask(gateway: Gateway, session_id: str, *, stream: bool, **fields: Any) -> list[Json]:
    """A reply for every choice, each in the shape of a reply of its own."""
    body = {"messages": [USER], **fields}
    if not stream:
        answer = await gateway.post(session_id, body)
        assert answer.status == 200, answer
        choices = answer.body.pop("choices")
        assert [c["index"] for c in choices] == list(range(len(choices)))
        return [{**answer.body, "tokentape": c.pop("tokentape"), "choices": [c]} for c in choices]
    return apart([event async for event in gateway.events(session_id, body)])


def apart(events: list[Json]) -> list[Json]:
    """A reply for every choice of a stream."""
    num = 1 + max(choice["index"] for event in events for choice in event["choices"])
    replies: list[Json] = []
    for index in range(num):
        own = [e for e in events if [c["index"] for c in e["choices"]] in ([index], [])]
        assert own[0]["choices"][0]["delta"]["role"] == "assistant"
        assert all("role" not in c["delta"] for e in own[1:] for c in e["choices"])
        replies.append(joined(own))
        assert replies[-1]["choices"][0]["index"] == 0  # as `joined` counts
    return replies


@both_ways
async def test_choices(fake: FakeSGLang, gateway: Gateway, stream: bool) -> None:
    session_id = await gateway.create()
    fake.script(*(sampled(text, seed=n, delay_s=0.002) for n, text in enumerate(TEXTS)))
    fields: Json = {"n": 3, "seed": 41, "tools": [WEATHER], "logprobs": True, "return_token_ids": True}
    if stream:
        fields["stream_options"] = {"include_usage": True}
    replies = await ask(gateway, session_id, stream=stream, **fields)
    requests = {turn_id_of(r.rid): r for r in fake.requests}
    turn_ids = [reply["tokentape"]["turn_id"] for reply in replies]
    assert sorted(turn_ids) == sorted(requests)
    assert len({tuple(r.input_ids) for r in fake.requests}) == 1
    assert [requests[i].sampling_params["sampling_seed"] for i in turn_ids] == [41, 42, 43]
    assert all(reply["id"] == turn_ids[0] for reply in replies)
    for reply, turn_id in zip(replies, turn_ids, strict=True):
        request, tape = requests[turn_id], reply["tokentape"]
        assert (tape["prompt_ids"], tape["completion_ids"]) == (request.input_ids, request.output_ids)
        entries = reply["choices"][0]["logprobs"]["content"]
        assert [e["logprob"] for e in entries] == tape["logprobs"]
        assert tape["completion_tokens"] == len(request.output_ids)
        assert reply["usage"] == replies[0]["usage"]
    assert [r["tokentape"]["branch_reason"] for r in replies] == ["root", "choice", "choice"]
    messages = {r["choices"][0]["message"]["content"] for r in replies}
    assert messages == {"hello world", "the weather", None}
    usage = replies[0]["usage"]
    assert usage["prompt_tokens"] == len(fake.requests[0].input_ids)
    assert usage["completion_tokens"] == sum(len(r.output_ids) for r in fake.requests)
    samples = await gateway.samples(session_id)
    assert [s["branch_reason"] for s in samples] == ["root", "choice", "choice"]
    assert_samples_match(seen_by(fake), samples, num_turns=3)
    summary = await gateway.show(session_id)
    assert (summary["turns"], summary["branch_reasons"]) == (3, {"root": 1, "choice": 2})


async def test_a_whole_reply_names_its_first_choice(fake: FakeSGLang, gateway: Gateway) -> None:
    session_id = await gateway.create()
    answer = await gateway.post(session_id, {"messages": [USER], "n": 2})
    choices = answer.body["choices"]
    assert answer.body["tokentape"] == choices[0]["tokentape"] != choices[1]["tokentape"]
    one = await gateway.post(session_id, {"messages": [USER], "n": 1})
    assert "tokentape" not in one.body["choices"][0]


async def test_choices_leave_as_they_come(fake: FakeSGLang, gateway: Gateway) -> None:
    session_id = await gateway.create()
    fake.script(*(sampled("hello world " * 4, seed=n, delay_s=0.01) for n in range(3)))
    body = {"messages": [USER], "n": 3, "stream_options": {"include_usage": True}}
    events = [event async for event in gateway.events(session_id, body)]
    order = [e["choices"][0]["index"] for e in events if e["choices"] and e["choices"][0]["delta"]]
    changes = sum(a != b for a, b in pairwise(order))
    assert changes > 10, order  # not one after the other
    ends = [e for e in events if e["choices"] and e["choices"][0]["finish_reason"]]
    assert [e["choices"][0]["index"] for e in ends] == [0, 1, 2]
    assert len({e["tokentape"]["turn_id"] for e in ends}) == 3
    assert events[-1]["choices"] == []
    assert sum("usage" in e for e in events) == 1


@both_ways
async def test_every_choice_can_be_continued(fake: FakeSGLang, gateway: Gateway, stream: bool) -> None:
    session_id = await gateway.create()
    fake.script(*(sampled(f"hello world {n}", seed=n) for n in range(3)))
    replies = await ask(gateway, session_id, stream=stream, n=3)
    for n, reply in enumerate(replies):
        fake.script(*(sampled("the weather", seed=10 * n + k) for k in range(2)))
        agent = Agent(gateway, session_id, messages=[USER, reply["choices"][0]["message"]])
        after = await agent.turn(USER, stream=stream)
        assert after["tokentape"]["parent_turn_id"] == reply["tokentape"]["turn_id"]
        assert after["tokentape"]["branch_reason"] is None
        await agent.turn(USER)
    samples = await gateway.samples(session_id)
    assert len(samples) == 3
    assert_samples_match(seen_by(fake), samples, num_turns=9)


async def test_choices_in_the_middle_of_a_conversation(fake: FakeSGLang, gateway: Gateway) -> None:
    """They share their prefix, whose tokens are trained once."""
    agent = Agent(gateway, await gateway.create(), {"tools": [WEATHER]})
    fake.script(sampled(call("weather", {"city": "x"}), seed=1))
    await agent.turn(USER)
    fake.script(*(sampled(f"the weather {n}", seed=n) for n in range(3)))
    messages = [*agent.messages, *agent.results()]
    replies = await ask(gateway, agent.session_id, stream=False, n=3, messages=messages, **agent.fields)
    assert [r["tokentape"]["branch_reason"] for r in replies] == [None, "choice", "choice"]
    assert len({r["tokentape"]["parent_turn_id"] for r in replies}) == 1
    samples = await gateway.samples(agent.session_id)
    assert [[t["trained"] for t in s["turns"]] for s in samples] == [
        [True, True],
        [False, True],
        [False, True],
    ]
    assert_samples_match(seen_by(fake), samples, num_turns=4)


async def test_choices_that_say_the_same(fake: FakeSGLang, gateway: Gateway) -> None:
    """Other tokens, the same text: whichever is continued, each is trained once."""
    agent = Agent(gateway, await gateway.create())
    fake.script(sampled("hello world", seed=1), sampled("hello world", seed=2))
    replies = await ask(gateway, agent.session_id, stream=False, n=2)
    agent.messages = [USER, replies[1]["choices"][0]["message"]]
    after = await agent.turn(USER)
    assert after["tokentape"]["parent_turn_id"] in {r["tokentape"]["turn_id"] for r in replies}
    assert_samples_match(seen_by(fake), await gateway.samples(agent.session_id), num_turns=3)


@both_ways
async def test_one_choice_fails(fake: FakeSGLang, gateway: Gateway, stream: bool) -> None:
    """The others are aborted, and nothing is committed."""
    session_id = await gateway.create()
    long = sampled("hello world " * 30, seed=1, delay_s=0.02)
    fake.script(long, Fault("error_event", after=2, reply=Reply(split("hello world"), delay_s=0.02)), long)
    if stream:
        events = [e async for e in gateway.events(session_id, {"messages": [USER], "n": 3})]
        assert events[-1]["error"]["code"] == "engine_failed"
        assert all(c["finish_reason"] is None for e in events[:-1] for c in e["choices"])
    else:
        answer = await gateway.post(session_id, {"messages": [USER], "n": 3})
        assert (answer.status, answer.error["code"]) == (502, "engine_failed")
    failed = fake.requests[1].rid
    await fake.until(lambda: len(fake.aborts) == 2)
    assert sorted(fake.aborts) == sorted(r.rid for r in fake.requests if r.rid != failed)
    summary = await gateway.show(session_id)
    assert (summary["turns"], summary["failures"]) == (0, {"engine_failed": 1})
    reply = await gateway.chat(session_id, [USER])
    assert reply["tokentape"]["branch_reason"] == "root"
    assert_samples_match(seen_by(fake), await gateway.samples(session_id), num_turns=1)


@both_ways
async def test_the_client_leaves_all_choices(fake: FakeSGLang, gateway: Gateway, stream: bool) -> None:
    session_id = await gateway.create()
    fake.script(*(sampled("hello world " * 30, seed=n, delay_s=0.02) for n in range(3)))
    async with gateway.openai(session_id, timeout=0.3) as client:
        if stream:
            chunks = await client.chat.completions.create(model="policy", messages=[USER], n=3, stream=True)
            async for _ in chunks:
                break
            await chunks.close()
        else:
            with pytest.raises(openai.APITimeoutError):
                await client.chat.completions.create(model="policy", messages=[USER], n=3)
    await fake.until(lambda: len(fake.aborts) == 3)
    await asyncio.sleep(0.05)
    summary = await gateway.show(session_id)
    assert (summary["turns"], summary["failures"]) == (0, {"client_gone": 1})


async def test_max_turns_counts_choices(fake: FakeSGLang, gateway: Gateway) -> None:
    session_id = await gateway.create(max_turns=3)
    await ask(gateway, session_id, stream=False, n=2)
    answer = await gateway.post(session_id, {"messages": [USER], "n": 2, "seed": 1})
    assert (answer.status, answer.error["code"]) == (400, "limit_reached")
    assert len(fake.requests) == 2
    await gateway.chat(session_id, [USER], n=1, seed=2)
    summary = await gateway.show(session_id)
    assert (summary["turns"], summary["failures"]) == (3, {})


async def test_max_tokens_is_shared_by_choices(fake: FakeSGLang, gateway: Gateway) -> None:
    """Each may use its share: together they never have to be thrown away."""
    session_id = await gateway.create(max_tokens=10)
    fake.script(*(Reply(split("hello world hello", seed=n)) for n in range(3)))
    replies = await ask(gateway, session_id, stream=False, n=3)
    assert [r.sampling_params["max_new_tokens"] for r in fake.requests] == [3, 3, 3]
    assert [r["choices"][0]["finish_reason"] for r in replies] == ["length"] * 3
    answer = await gateway.post(session_id, {"messages": [USER], "n": 2})
    assert (answer.status, answer.error["code"]) == (400, "limit_reached")
    assert len(fake.requests) == 3
    assert_samples_match(seen_by(fake), await gateway.samples(session_id), num_turns=3)


@both_ways
async def test_choices_are_stored_together(
    fake: FakeSGLang, gateway: Gateway, store: Path, stream: bool
) -> None:
    """A store that fails at the last of them has none."""
    session_id = await gateway.create()
    with contextlib.closing(sqlite3.connect(store)) as other:
        full = "SELECT RAISE(ABORT, 'full') WHERE (SELECT count(*) FROM turns) >= 2;"
        other.execute(f"CREATE TRIGGER full BEFORE INSERT ON turns BEGIN {full} END")
        if stream:
            events = [e async for e in gateway.events(session_id, {"messages": [USER], "n": 3})]
            assert events[-1]["error"]["code"] == "store_error"
        else:
            answer = await gateway.post(session_id, {"messages": [USER], "n": 3})
            assert (answer.status, answer.error["code"]) == (503, "store_error")
        assert other.execute("SELECT count(*) FROM turns").fetchone() == (0,)
        other.execute("DROP TRIGGER full")
    assert (await gateway.show(session_id))["turns"] == 0
    await ask(gateway, session_id, stream=stream, n=3)
    assert_samples_match(seen_by(fake), await gateway.samples(session_id), num_turns=3)


@both_ways
async def test_the_last_seeds(fake: FakeSGLang, gateway: Gateway, stream: bool) -> None:
    session_id = await gateway.create()
    await ask(gateway, session_id, stream=stream, n=2, seed=2**63 - 1)
    assert sorted(r.sampling_params["sampling_seed"] for r in fake.requests) == [-(2**63), 2**63 - 1]


async def test_in_the_sdk(fake: FakeSGLang, gateway: Gateway) -> None:
    session_id = await gateway.create()
    fake.script(*(sampled(f"hello {n}", seed=n) for n in range(4)))
    async with gateway.openai(session_id) as client:
        completion = await client.chat.completions.create(model="policy", messages=[USER], n=2)
        assert {c.message.content for c in completion.choices} == {"hello 0", "hello 1"}
        texts = {0: "", 1: ""}
        async with client.chat.completions.stream(model="policy", messages=[USER], n=2) as stream:
            async for event in stream:
                if event.type == "chunk":
                    for choice in event.chunk.choices:
                        texts[choice.index] += choice.delta.content or ""
            final = await stream.get_final_completion()
    assert set(texts.values()) == {"hello 2", "hello 3"}
    assert [c.message.content for c in final.choices] == [texts[0], texts[1]]
    assert_samples_match(seen_by(fake), await gateway.samples(session_id), num_turns=4)


@both_ways
async def test_a_retry_gets_all_of_them(fake: FakeSGLang, gateway: Gateway, stream: bool) -> None:
    session_id = await gateway.create()
    body = {"messages": [USER], "n": 3, "return_token_ids": True}
    first = await gateway.post(session_id, body)
    again = await gateway.post(session_id, body, {"x-stainless-retry-count": "1"})
    assert again.body == first.body
    assert len(fake.requests) == 3
    assert_samples_match(seen_by(fake), await gateway.samples(session_id), num_turns=3)
    metadata = [json.loads(s["metadata"]) for s in await gateway.samples(session_id)]
    assert len(metadata) == 3
