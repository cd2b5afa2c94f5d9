"""An agent that speaks Anthropic's Messages, and a reader of streams that insists on the order of events."""

import contextlib
import json
import sqlite3
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from gatewaykit import Answer, Gateway, Json, assert_samples_match, seen_by
from tokentape.testing import FakeSGLang

both_ways = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])

USER: Json = {"role": "user", "content": "hello world"}
WEATHER: Json = {
    "name": "weather",
    "description": "the weather in a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CLOCK: Json = {"name": "clock", "input_schema": {"type": "object", "properties": {}}}
TOOLS = [WEATHER, CLOCK]


async def post(
    gateway: Gateway, session_id: str, body: Any, headers: Mapping[str, str] | None = None
) -> Answer:
    return await gateway.request("POST", f"/sessions/{session_id}/v1/messages", body, headers)


def body_of(messages: Sequence[Json], **fields: Any) -> Json:
    return {"model": "policy", "max_tokens": 500, "messages": messages, **fields}


async def say(gateway: Gateway, session_id: str, messages: Sequence[Json], **fields: Any) -> Json:
    """A message, streamed or not: the events of a stream are put together as an SDK does it."""
    body = body_of(messages, **fields)
    if fields.get("stream"):
        return joined([event async for event in events(gateway, session_id, body)])
    answer = await post(gateway, session_id, body)
    assert answer.status == 200, answer
    return answer.body


async def refused(gateway: Gateway, session_id: str, body: Any, status: int = 400) -> str:
    """What a refused request is told; the session has no turn of it."""
    answer = await post(gateway, session_id, body)
    assert answer.status == status, answer
    return error_of(answer.body)["message"]


def error_of(body: Any) -> Json:
    assert set(body) == {"type", "error", "request_id"}, body
    assert body["type"] == "error"
    assert set(body["error"]) - {"details"} == {"type", "message"}
    return body["error"]


async def events(gateway: Gateway, session_id: str, body: Json) -> AsyncGenerator[Json]:
    """The decoded events of a stream; each names its type twice."""
    path = f"{gateway.url}/sessions/{session_id}/v1/messages"
    async with gateway.http.post(path, data=json.dumps({**body, "stream": True})) as response:
        assert response.status == 200, await response.text()
        assert response.content_type == "text/event-stream"
        for piece in (await response.text()).split("\n\n")[:-1]:
            name, data = piece.split("\n")
            event = json.loads(data.removeprefix("data: "))
            assert name == f"event: {event['type']}"
            yield event


_FULL = {"thinking_delta": "thinking", "text_delta": "text", "signature_delta": "signature"}


def joined(events: Sequence[Json]) -> Json:
    """The message that the events of a stream make, in the shape of one that was not streamed."""
    first, *rest, before, last = [event for event in events if event["type"] != "ping"]
    assert first["type"] == "message_start"
    assert last == {"type": "message_stop"}
    message: Json = {**first["message"], "content": []}
    assert first["message"]["content"] == []
    assert message["stop_reason"] is None
    is_open = False
    for event in rest:
        kind = event["type"].removeprefix("content_block_")
        if kind == "start":
            assert not is_open
            assert event["index"] == len(message["content"])
            message["content"].append({**event["content_block"], "parts": []})
        else:
            assert is_open
            assert event["index"] == len(message["content"]) - 1
        block = message["content"][-1]
        if kind == "delta":
            delta = event["delta"]
            if delta["type"] == "input_json_delta":
                block["parts"].append(delta["partial_json"])
            else:
                name = _FULL[delta["type"]]
                assert delta[name]
                block[name] += delta[name]
        elif kind == "stop":
            parts = block.pop("parts")
            if block["type"] == "tool_use":
                assert block["input"] == {}
                block["input"] = json.loads("".join(parts))
        is_open = kind != "stop"
    assert not is_open
    assert before["type"] == "message_delta"
    ids = {name: message["tokentape"][name] for name in ("session_id", "turn_id")}
    assert message["tokentape"] == ids == {name: before["tokentape"][name] for name in ids}
    more = {name: value for name, value in before.items() if name not in ("type", "delta", "usage")}
    return {**message, **before["delta"], **more, "usage": {**message["usage"], **before["usage"]}}


@dataclass
class Agent:
    """Keeps a conversation and replays it as it came: a reply's blocks go back as they are."""

    gateway: Gateway
    session_id: str
    fields: Json = field(default_factory=dict[str, Any])
    messages: list[Json] = field(default_factory=list[Json])

    async def turn(self, *blocks: Json | str, **fields: Any) -> Json:
        """Say something and take the reply into the history."""
        content = [text(block) if isinstance(block, str) else block for block in blocks]
        self.messages.append({"role": "user", "content": content})
        reply = await say(self.gateway, self.session_id, self.messages, **{**self.fields, **fields})
        self.messages.append({"role": "assistant", "content": reply["content"]})
        return reply

    def results(self, result: str = "sunny") -> list[Json]:
        """A result for every call of the last reply."""
        calls = [block for block in self.messages[-1]["content"] if block["type"] == "tool_use"]
        return [result_of(call, f"{result} {index}") for index, call in enumerate(calls)]

    async def check(self, fake: FakeSGLang, *, num_turns: int, num_samples: int = 1) -> list[Json]:
        """Every id that reached the engine, against every id in the samples."""
        samples = await self.gateway.samples(self.session_id)
        assert len(samples) == num_samples, [s["branch_reason"] for s in samples]
        assert_samples_match(seen_by(fake), samples, num_turns=num_turns)
        return samples


def text(said: str, **fields: Any) -> Json:
    return {"type": "text", "text": said, **fields}


def result_of(call: Json, content: Any, **fields: Any) -> Json:
    return {"type": "tool_result", "tool_use_id": call["id"], "content": content, **fields}


def origins(store: Path) -> list[Json]:
    """What is stored of the requests that the turns answer, in the order of their commits."""
    with contextlib.closing(sqlite3.connect(store)) as db:
        return [json.loads(row[0]) for row in db.execute("SELECT origin FROM turns ORDER BY rowid")]
