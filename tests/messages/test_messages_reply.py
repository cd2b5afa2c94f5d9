"""Messages: what a reply looks like, whole and as a stream; errors; counting; models; routes."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from messageskit import (
    CLOCK,
    TOOLS,
    USER,
    Agent,
    body_of,
    both_ways,
    error_of,
    events,
    joined,
    post,
    refused,
    say,
    text,
)

from gatewaykit import END, Gateway, Json, call, cut, gateway_for, sampled, split
from tokentape.errors import (
    ClientGone,
    ContextOverflow,
    EngineFailed,
    EngineProtocolError,
    EngineTimeout,
    EngineUnavailable,
    InternalError,
    NotFound,
    SessionClosed,
    StoreError,
    TokentapeError,
    TooLarge,
    Unauthorized,
)
from tokentape.gateway.messages import WIRE
from tokentape.testing import FakeSGLang, Fault, Reply

THOUGHT = "<think>\nthe user\n</think>\n\n"


@both_ways
async def test_what_a_reply_has(fake: FakeSGLang, gateway: Gateway, stream: bool) -> None:
    session_id = await gateway.create()
    fake.script(sampled(THOUGHT + "hello " + call("weather", {"city": "日"}) + call("clock", {}), seed=3))
    reply = await say(gateway, session_id, [USER], tools=TOOLS, stream=stream)
    [request] = fake.requests
    tape = reply.pop("tokentape")
    turn_id = tape["turn_id"]
    ids = [block.pop("id") for block in reply["content"] if block["type"] == "tool_use"]
    assert reply == {
        "id": "msg_" + turn_id.removeprefix("t-"),
        "type": "message",
        "role": "assistant",
        "model": "policy",
        "content": [
            {"type": "thinking", "thinking": "the user", "signature": turn_id},
            text("hello"),
            {"type": "tool_use", "name": "weather", "input": {"city": "日"}},
            {"type": "tool_use", "name": "clock", "input": {}},
        ],
        "stop_reason": "tool_use",
        "stop_sequence": None,
        "usage": {
            "input_tokens": len(request.input_ids),
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": len(request.output_ids),
        },
    }
    [sample] = await gateway.samples(session_id)
    recorded = json.loads(sample["messages"])[-1]
    assert ids == [c["id"] for c in recorded["tool_calls"]]
    assert tape["parse"]["status"] == "ok"
    assert [a["status"] for a in tape["parse"]["attempts"]] == ["ok", "ok"]


async def test_the_order_of_events(fake: FakeSGLang, gateway: Gateway) -> None:
    """One block at a time; calls leave last, when the turn is durable."""
    session_id = await gateway.create()
    fake.script(sampled(THOUGHT + "hello " + call("clock", {}) + " world " + call("clock", {})))
    body = body_of([USER], tools=[CLOCK])
    kinds: list[str] = []
    blocks: list[str] = []
    async for event in events(gateway, session_id, body):
        if not kinds or kinds[-1] != event["type"]:
            kinds.append(event["type"])
        if event["type"] == "content_block_start":
            blocks.append(event["content_block"]["type"])
    block = ["content_block_start", "content_block_delta", "content_block_stop"]
    assert kinds == ["message_start", *(4 * block), "message_delta", "message_stop"]
    assert blocks == ["thinking", "text", "tool_use", "tool_use"]


@both_ways
async def test_text_between_calls_is_one_text(fake: FakeSGLang, gateway: Gateway, stream: bool) -> None:
    agent = Agent(gateway, await gateway.create(), {"tools": [CLOCK]})
    said = "hello " + call("clock", {}) + " world" + call("clock", {})
    fake.script(sampled(said, seed=1), sampled("hello", seed=3))
    reply = await agent.turn("hello", stream=stream)
    assert [b.get("text") for b in reply["content"] if b["type"] == "text"] == ["hello  world"]
    await agent.turn(*agent.results())
    await agent.check(fake, num_turns=2)


async def test_many_small_deltas(fake: FakeSGLang, gateway: Gateway) -> None:
    session_id = await gateway.create()
    fake.responder = lambda _: sampled(THOUGHT + "hello world", delay_s=0.01)
    received = [e async for e in events(gateway, session_id, body_of([USER]))]
    deltas = [e["delta"] for e in received if e["type"] == "content_block_delta"]
    assert [d["type"] for d in deltas].count("thinking_delta") > 3
    assert [d["type"] for d in deltas].count("signature_delta") == 1
    assert "".join(d.get("text", "") for d in deltas) == "hello world"
    assert joined(received)["content"][0]["thinking"] == "the user"


@both_ways
async def test_an_empty_reply(fake: FakeSGLang, gateway: Gateway, stream: bool) -> None:
    agent = Agent(gateway, await gateway.create(), {"stream": stream})
    fake.script(Reply([END]), sampled("<think>\n\n</think>\n\n"), sampled("hello"))
    reply = await agent.turn("hello")
    assert (reply["content"], reply["stop_reason"]) == ([], "end_turn")
    assert reply["usage"]["output_tokens"] == 1
    reply = await agent.turn("hello")
    assert reply["content"] == []  # an empty thought is none
    await agent.turn("hello")
    await agent.check(fake, num_turns=3)


async def test_ping(fake: FakeSGLang, model_dir: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokentape.gateway.api.AgentApi.__init__.__kwdefaults__", {"ping_s": 0.05})
    async with gateway_for(fake.url, model_dir, store) as gateway:
        fake.script(sampled("hello", delay_s=0.3))
        session_id = await gateway.create()
        kinds = [e["type"] async for e in events(gateway, session_id, body_of([USER]))]
    assert kinds[:2] == ["message_start", "ping"]
    assert kinds[-1] == "message_stop"


# -- stop_reason


@both_ways
@pytest.mark.parametrize(
    ("reply", "fields", "expected"),
    [
        (sampled("hello"), {}, ("end_turn", None)),
        (sampled("hello"), {"stop_sequences": ["wor"]}, ("end_turn", None)),
        (cut("hello world"), {"max_tokens": 3}, ("max_tokens", None)),
        (cut(call("clock", {}) + "hello"), {"max_tokens": 10**4}, ("model_context_window_exceeded", None)),
        (sampled(call("clock", {})), {}, ("tool_use", None)),
        (sampled(call("nothing", {})), {}, ("tool_use", None)),
        (sampled(call("clock", "{")), {}, ("end_turn", None)),
        (
            Reply(split("hello wor"), matched="wor"),
            {"stop_sequences": ["x", "wor"]},
            ("stop_sequence", "wor"),
        ),
        (
            Reply(split("hello wor"), matched="lo wor"),  # the one that ends first counts
            {"stop_sequences": ["lo wor", "wo"]},
            ("stop_sequence", "wo"),
        ),
        (Reply(split("hello wor"), matched="wor"), {}, ("stop_sequence", "wor")),  # the session's
        (
            Reply(split(call("clock", {}) + " wor"), matched="wor"),
            {"stop_sequences": ["wor"]},
            ("tool_use", None),
        ),
        (
            Reply(split(call("clock", {})), matched="</tool_call>"),
            {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
            ("tool_use", None),
        ),
        (  # the gateway's own stop string is none of the caller's
            Reply(split(call("clock", "{")), matched="</tool_call>"),
            {
                "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
                "stop_sequences": ["wor"],
            },
            ("end_turn", None),
        ),
    ],
)
async def test_stop_reasons(
    fake: FakeSGLang,
    gateway: Gateway,
    reply: Reply,
    fields: Json,
    expected: tuple[str, str | None],
    stream: bool,
) -> None:
    session_id = await gateway.create(sampling={"stop": ["wor"]} if not fields else {})
    fake.script(reply)
    message = await say(gateway, session_id, [USER], tools=TOOLS, **fields, stream=stream)
    assert (message["stop_reason"], message["stop_sequence"]) == expected
    assert all(expected[1] not in b["text"] for b in message["content"] if expected[1])


@both_ways
async def test_a_sessions_budget_is_no_context(fake: FakeSGLang, gateway: Gateway, stream: bool) -> None:
    session_id = await gateway.create(max_tokens=4)
    fake.script(cut("hello world, the weather"))
    message = await say(gateway, session_id, [USER], stream=stream)
    assert message["stop_reason"] == "max_tokens"
    assert message["usage"]["output_tokens"] == 4


async def test_the_context_ends_a_turn(fake: FakeSGLang, gateway: Gateway) -> None:
    session_id = await gateway.create()
    long = {"role": "user", "content": "x" * 8000}
    count = await gateway.request("POST", f"/sessions/{session_id}/v1/messages/count_tokens", body_of([long]))
    fake.responder = lambda _: cut("hello world " * 500)
    message = await say(gateway, session_id, [long], max_tokens=4000)
    assert message["stop_reason"] == "model_context_window_exceeded"
    assert message["usage"]["output_tokens"] == 8192 - count.body["input_tokens"]


# -- usage and counting


@both_ways
async def test_cache_reads(fake: FakeSGLang, gateway: Gateway, stream: bool) -> None:
    agent = Agent(gateway, await gateway.create(), {"stream": stream})
    fake.script(sampled("hello"), Reply(split("world"), cached=11))
    await agent.turn("hello")
    usage = (await agent.turn("hello"))["usage"]
    assert usage["cache_read_input_tokens"] == 11
    assert usage["input_tokens"] == len(fake.requests[1].input_ids) - 11
    assert usage["cache_creation_input_tokens"] == 0


async def test_count_tokens_is_exact(fake: FakeSGLang, gateway: Gateway) -> None:
    """In every state of a conversation, for the very body that is sent."""
    agent = Agent(gateway, await gateway.create(), {"tools": TOOLS, "system": "the tool", "max_tokens": 100})
    path = f"/sessions/{agent.session_id}/v1/messages/count_tokens"
    fake.script(*(sampled("the " + call("clock", {}), seed=i) for i in range(4)))
    new: list[Any] = ["hello"]
    for _ in range(4):
        messages = [
            *agent.messages,
            {"role": "user", "content": [text(b) if isinstance(b, str) else b for b in new]},
        ]
        for extra in ({}, {"max_tokens": 5, "stream": True}):
            body = {"model": "policy", "messages": messages, "tools": TOOLS, "system": "the tool", **extra}
            counted = await gateway.request("POST", path + "?beta=true", body)
            assert counted.status == 200
            assert set(counted.body) == {"input_tokens"}
        usage = (await agent.turn(*new))["usage"]
        assert counted.body["input_tokens"] == usage["input_tokens"] + usage["cache_read_input_tokens"]
        new = [*agent.results(), "hello"]
    assert (await gateway.show(agent.session_id))["turns"] == 4


async def test_count_tokens_of_too_much(gateway: Gateway) -> None:
    """What does not fit can be counted: that is what counting is for."""
    session_id = await gateway.create()
    path = f"/sessions/{session_id}/v1/messages/count_tokens"
    long = [{"role": "user", "content": "x" * 9000}]
    answer = await gateway.request("POST", path, {"model": "policy", "messages": long})
    assert answer.body["input_tokens"] > 9000
    answer = await gateway.request("POST", path, {"model": "policy", "messages": []})
    assert error_of(answer.body)["type"] == "invalid_request_error"


# -- errors


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (Unauthorized("x"), "authentication_error"),
        (NotFound("x"), "not_found_error"),
        (SessionClosed("x"), "invalid_request_error"),
        (TooLarge("x"), "request_too_large"),
        (ClientGone("x"), "invalid_request_error"),
        (EngineProtocolError("x"), "api_error"),
        (EngineFailed("x"), "api_error"),
        (EngineUnavailable("x"), "overloaded_error"),
        (StoreError("x"), "overloaded_error"),
        (EngineTimeout("x"), "timeout_error"),
        (InternalError("x"), "api_error"),
    ],
    ids=lambda v: v.kind if isinstance(v, TokentapeError) else v,
)
def test_error_types(error: TokentapeError, kind: str) -> None:
    assert error_of(WIRE.error_body(error)) == {"type": kind, "message": "x"}


@pytest.mark.parametrize(
    ("num", "maximum", "said"),
    [
        (205000, 200000, "prompt is too long: 205000 tokens > 200000 maximum"),
        (200000, 200000, "prompt is too long: 200000 tokens > 199999 maximum"),
        (None, None, "prompt is too long: x"),
    ],
)
def test_context_overflow(num: int | None, maximum: int | None, said: str) -> None:
    error = ContextOverflow("x", num_prompt_tokens=num, context_length=maximum)
    assert error_of(WIRE.error_body(error)) == {"type": "invalid_request_error", "message": said}


@both_ways
async def test_a_prompt_that_is_too_long(fake: FakeSGLang, gateway: Gateway, stream: bool) -> None:
    session_id = await gateway.create()
    body = body_of([{"role": "user", "content": "x" * 9000}], stream=stream)
    said = await refused(gateway, session_id, body)
    num = int(said.removeprefix("prompt is too long: ").removesuffix(" tokens > 8192 maximum"))
    assert num > 9000
    assert not fake.requests


async def test_a_failure_inside_a_stream(fake: FakeSGLang, gateway: Gateway) -> None:
    session_id = await gateway.create()
    fake.script(Fault("disconnect", after=3, reply=sampled("hello world", delay_s=0.01)))
    received = [e async for e in events(gateway, session_id, body_of([USER]))]
    assert received[0]["type"] == "message_start"
    assert error_of(received[-1])["type"] == "api_error"
    assert all(e["type"] not in ("message_delta", "message_stop") for e in received)
    assert (await gateway.show(session_id))["turns"] == 0


async def test_a_failure_before_a_stream(fake: FakeSGLang, gateway: Gateway) -> None:
    fake.script(Fault("status", status=503))
    answer = await post(gateway, await gateway.create(), body_of([USER], stream=True))
    assert answer.status in (502, 503)
    assert error_of(answer.body)["type"] in ("api_error", "overloaded_error")


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [
        ("POST", "/sessions/none/v1/messages", 404, "not_found_error"),
        ("POST", "/sessions/none/v1/messages/count_tokens?beta=true", 404, "not_found_error"),
        ("POST", "/v1/messages", 404, "not_found_error"),
        ("GET", "/v1/messages", 405, "invalid_request_error"),
        ("POST", "/v1/messages/batches", 404, "not_found_error"),
    ],
)
async def test_errors_of_the_boundary(
    gateway: Gateway, method: str, path: str, status: int, kind: str
) -> None:
    answer = await gateway.request(method, path, body_of([USER]) if method == "POST" else None)
    assert answer.status == status
    assert error_of(answer.body)["type"] == kind
    assert answer.headers["x-should-retry"] == "false"


async def test_other_errors_of_the_boundary(fake: FakeSGLang, model_dir: Path, store: Path) -> None:
    http = {"api_key": "secret", "max_body_bytes": 1000}
    async with gateway_for(fake.url, model_dir, store, http=http) as gateway:
        answer = await gateway.request("POST", "/v1/messages", body_of([USER]), {"x-api-key": "wrong"})
        assert (answer.status, error_of(answer.body)["type"]) == (401, "authentication_error")
        answer = await gateway.request(
            "POST", "/v1/messages", b" " * 2000, {"x-api-key": "secret", "X-Session-Id": "x"}
        )
        assert answer.status in (404, 413)
        headers = {"x-api-key": "secret"}
        created = await gateway.request("POST", "/sessions", {}, headers)
        path = f"/sessions/{created.body['session_id']}/v1/messages"
        answer = await gateway.request("POST", path, b" " * 2000, headers)
        assert (answer.status, error_of(answer.body)["type"]) == (413, "request_too_large")
        answer = await gateway.request(
            "GET", "/v1/nothing", None, {**headers, "anthropic-version": "2023-06-01"}
        )
        assert (answer.status, error_of(answer.body)["type"]) == (404, "not_found_error")


async def test_a_finished_session(gateway: Gateway) -> None:
    session_id = await gateway.create()
    await gateway.ok("POST", f"/sessions/{session_id}/finish")
    await refused(gateway, session_id, body_of([USER]), status=409)


# -- routes and models


@pytest.mark.parametrize("prefix", ["", "/v1"])
@both_ways
async def test_routes(fake: FakeSGLang, gateway: Gateway, prefix: str, stream: bool) -> None:
    """With /v1 behind a base URL that ends in it, and without a session in the path."""
    session_id = await gateway.create()
    body = body_of([USER], stream=stream)
    fake.script(*(sampled("hello", seed=i) for i in range(3)))
    for path, headers in (
        (f"/sessions/{session_id}{prefix}/v1/messages?beta=true", {}),
        (f"{prefix}/v1/messages", {"x-api-key": session_id}),
        (f"{prefix}/v1/messages", {"Authorization": f"Bearer {session_id}"}),
    ):
        answer = await gateway.request("POST", path, body, headers)
        assert answer.status == 200, answer
        path = path.replace("messages", "messages/count_tokens")
        assert (await gateway.request("POST", path, body, headers)).status == 200
    assert (await gateway.show(session_id))["turns"] == 3


async def test_a_retry_gets_the_same_reply(fake: FakeSGLang, gateway: Gateway) -> None:
    session_id = await gateway.create()
    fake.script(sampled(THOUGHT + "hello " + call("clock", {}), seed=1), sampled("world"))
    body = body_of([USER], tools=TOOLS)
    first = await post(gateway, session_id, body, {"x-stainless-retry-count": "0"})
    again = await post(gateway, session_id, body, {"x-stainless-retry-count": "1"})
    assert again.body == first.body
    other = await post(gateway, session_id, body, {"x-stainless-retry-count": "0"})
    assert other.body["id"] != first.body["id"]


async def test_a_stream_that_is_retried(fake: FakeSGLang, gateway: Gateway) -> None:
    session_id = await gateway.create()
    fake.script(sampled(THOUGHT + "hello " + call("clock", {}), seed=1))
    body = body_of([USER], tools=TOOLS, stream=True)
    replies: list[Json] = []
    for count in ("0", "1"):
        answer = await post(gateway, session_id, body, {"x-stainless-retry-count": count})
        pieces = answer.body.decode().split("\n\n")[:-1]
        replies.append(joined([json.loads(piece.split("data: ")[1]) for piece in pieces]))
    assert replies[0] == replies[1]
    assert len(fake.requests) == 1


async def test_models(gateway: Gateway) -> None:
    session_id = await gateway.create()
    for prefix in ("/v1", f"/sessions/{session_id}/v1", f"/sessions/{session_id}/v1/v1"):
        listed = await gateway.ok("GET", f"{prefix}/models?limit=1000")
        [model] = listed["data"]
        assert (listed["has_more"], listed["first_id"], listed["last_id"]) == (False, "policy", "policy")
        assert await gateway.ok("GET", f"{prefix}/models/policy") == model
    missing = await gateway.request("GET", "/v1/models/a%2Fb", None, {"anthropic-version": "2023-06-01"})
    assert missing.status == 404
    assert "'a/b'" in error_of(missing.body)["message"]


async def test_side_by_side(fake: FakeSGLang, gateway: Gateway) -> None:
    """A sub-agent's turns come between those of its parent, in one session."""
    session_id = await gateway.create()
    main = Agent(gateway, session_id, {"tools": TOOLS, "system": "main"})
    sub = Agent(gateway, session_id, {"system": "sub", "stream": True})
    fake.script(*(sampled(call("clock", {}), seed=i) for i in range(4)))
    await asyncio.gather(main.turn("hello"), sub.turn("the"))
    await asyncio.gather(main.turn(*main.results()), sub.turn("world"))
    await main.check(fake, num_turns=4, num_samples=2)
