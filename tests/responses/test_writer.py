"""What no server test reaches: an idle stream, a stream that is told twice, errors of the core."""

import json
from typing import Any

import pytest
from responseskit import PATCH, WEATHER, accumulated, events, post

from gatewaykit import TOKENIZER, USER, Gateway, Json, call, sampled
from tokentape.errors import ContextOverflow, EngineAborted, SessionClosed
from tokentape.gateway.exchange import Progress, Started
from tokentape.gateway.responses.output import ResponseFields
from tokentape.gateway.responses.reply import ResponsesWriter
from tokentape.parse import TextDelta
from tokentape.testing import FakeSGLang, Fault
from tokentape.tokenizer import Tokenizer

TURN = "t-" + "0" * 24


def writer(tmp_path: Any) -> ResponsesWriter:
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path / "tokenizer.json", template_text="", num_ids=None)
    return ResponsesWriter(ResponseFields("s", "policy", tokenizer, {"echo": {}}, (), None))


def decoded(raw: bytes) -> list[Json]:
    return [json.loads(part.partition(b"data: ")[2]) for part in raw.split(b"\n\n") if part]


def test_an_idle_stream_says_so_in_an_event(tmp_path: Any) -> None:
    """Codex counts events, not comments, against its idle limit."""
    one = writer(tmp_path)
    assert one.ping() == b": ping\n\n"
    raw = one.start(Started((TURN,), 5, 1.5)) + one.ping()
    raw += one.progress(Progress(0, (), (), [TextDelta("a")])) + one.ping()
    stream = decoded(raw)
    assert [event["sequence_number"] for event in stream] == list(range(len(stream)))
    assert [event["type"] for event in stream].count("response.in_progress") == 3
    assert stream[0]["response"]["id"] == "resp_" + "0" * 24


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (EngineAborted("x"), "server_error"),
        (SessionClosed("x"), "invalid_prompt"),  # Codex tries all others again
        (ContextOverflow("x"), "context_length_exceeded"),
    ],
)
def test_codes_of_failed_responses(tmp_path: Any, error: Any, code: str) -> None:
    one = writer(tmp_path)
    one.start(Started((TURN,), 5, 1.5))
    failed, last = decoded(one.error(error))
    assert failed["response"]["status"] == "failed"
    assert failed["response"]["error"]["code"] == code
    assert last["type"] == "error"
    assert last["error"]["message"] == last["message"]


async def test_no_call_leaves_before_its_turn_is_durable(fake: FakeSGLang, gateway: Gateway) -> None:
    """Codex runs a call as soon as it has read it."""
    text = "<think>\nthe\n</think>\n\nhello " + call("weather", {"city": "a"})
    fake.script(Fault("wrong_count", reply=sampled(text, seed=1)))
    session = await gateway.create()
    body: Json = {"input": "hello", "tools": [WEATHER]}
    seen = [event async for event in events(gateway, session, body)]
    assert seen[-2]["type"] == "response.failed"
    assert {e["item"]["type"] for e in seen if "item" in e} == {"reasoning", "message"}
    assert [e["item"]["type"] for e in seen if e["type"] == "response.output_item.done"] == ["reasoning"]


FUNCTION: Json = {name: WEATHER[name] for name in ("name", "description", "parameters")}
BODIES: dict[str, Json] = {
    "chat/completions": {"messages": [USER], "tools": [{"type": "function", "function": FUNCTION}]},
    "messages": {
        "messages": [USER],
        "max_tokens": 500,
        "tools": [{"name": "weather", "input_schema": FUNCTION["parameters"]}],
    },
    "responses": {"input": "hello", "tools": [WEATHER]},
}


@pytest.mark.parametrize("route", BODIES)
async def test_no_call_leaves_on_any_wire(fake: FakeSGLang, gateway: Gateway, route: str) -> None:
    """The same reply shows its call where the turn is durable, and does not where it fails."""
    text = "hello " + call("weather", {"city": "Kyoto"})
    fake.script(Fault("wrong_count", reply=sampled(text, seed=1)), sampled(text, seed=1))
    session = await gateway.create()
    streams: list[bytes] = []
    for _ in range(2):
        path, body = f"{gateway.url}/sessions/{session}/v1/{route}", {**BODIES[route], "stream": True}
        async with gateway.http.post(path, json=body) as response:
            assert response.status == 200
            streams.append(await response.read())
    assert all(b"hello" in stream for stream in streams)
    assert [b"Kyoto" in stream for stream in streams] == [False, True]


async def test_a_retry_is_told_the_same(fake: FakeSGLang, gateway: Gateway) -> None:
    text = "<think>\nthe\n</think>\n\nhello " + call("weather", {"city": "a"}) + call("apply_patch", {"a": 1})
    fake.script(sampled(text, seed=1))
    session = await gateway.create()
    body: Json = {"input": "hello", "tools": [WEATHER, PATCH], "stream": True}
    first = accumulated([event async for event in events(gateway, session, body)])
    headers = {"x-stainless-retry-count": "1"}
    path = f"{gateway.url}/sessions/{session}/v1/responses"
    async with gateway.http.post(path, json=body, headers=headers) as response:
        again = accumulated(decoded(await response.read()))
    assert (again["id"], again["output"]) == (first["id"], first["output"])
    assert len(fake.requests) == 1


async def test_what_the_core_refuses_is_named_as_here(gateway: Gateway) -> None:
    session = await gateway.create()
    schema = {"type": "object", "properties": {"a": {"type": "integer", "multipleOf": 2}}}
    format_ = {"type": "json_schema", "name": "a", "schema": schema}
    answer = await post(gateway, session, {"input": "hello", "text": {"format": format_}})
    assert (answer.status, answer.error["param"]) == (400, "text.format")
    deep: Json = {}
    for _ in range(200):
        deep = {"items": deep}
    for body in (
        {"text": {"format": {**format_, "schema": deep}}},
        {"text": {"format": {**format_, "schema": deep}}, "tool_choice": "required", "tools": [WEATHER]},
    ):
        answer = await post(gateway, session, {"input": "hello", **body})
        assert answer.status in (200, 400), answer
    for nested in ('{"input": ' + "[" * 9000 + "]" * 9000 + "}", '{"tools": [' * 3000, "[]", "\xff"):
        answer = await post(gateway, session, nested.encode("latin-1"))
        assert answer.status == 400, answer
    tools = '{"input": "a", "tools": [{"type": "custom", "name": "a", "x": ' + "[" * 5000 + "]" * 5000 + "}]}"
    assert (await post(gateway, session, tools.encode())).status == 400
