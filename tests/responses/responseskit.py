"""What tests of the Responses wire share: requests, a checker of its streams, an agent that replays."""

import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gatewaykit import Answer, Gateway, Json, assert_samples_match, seen_by
from tokentape.testing import FakeSGLang

WEATHER: Json = {
    "type": "function",
    "name": "weather",
    "description": "the weather in a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": False,
}
CLOCK: Json = {"type": "function", "name": "clock", "parameters": {"type": "object", "properties": {}}}
PATCH: Json = {
    "type": "custom",
    "name": "apply_patch",
    "description": "edits files",
    "format": {"type": "grammar", "syntax": "lark", "definition": "start: /.+/"},
}
TEAM: Json = {
    "type": "namespace",
    "name": "team",
    "description": "other agents",
    "tools": [{"type": "function", "name": "ask", "parameters": {"type": "object", "properties": {}}}],
}


async def post(
    gateway: Gateway, session_id: str, body: Any, headers: Mapping[str, str] | None = None
) -> Answer:
    return await gateway.request("POST", f"/sessions/{session_id}/v1/responses", body, headers)


async def respond(gateway: Gateway, session_id: str, input_: Any, **fields: Any) -> Json:
    """A response, streamed or not."""
    body = {"model": "policy", "input": input_, **fields}
    if fields.get("stream"):
        return accumulated([event async for event in events(gateway, session_id, body)])
    answer = await post(gateway, session_id, body)
    assert answer.status == 200, answer
    return answer.body


async def events(gateway: Gateway, session_id: str, body: Json) -> AsyncGenerator[Json]:
    """The decoded events of a stream; each is named as its type says."""
    path = f"{gateway.url}/sessions/{session_id}/v1/responses"
    name = ""
    async with gateway.http.post(path, data=json.dumps({**body, "stream": True})) as response:
        assert response.status == 200, await response.text()
        assert response.content_type == "text/event-stream"
        async for line in response.content:
            if line.startswith(b"event: "):
                name = line[7:].strip().decode()
            elif line.strip():
                assert line.startswith(b"data: ")
                event = json.loads(line[6:])
                assert event["type"] == name
                yield event


def accumulated(stream: Sequence[Json]) -> Json:
    """The response that a stream ends with, after a check that its events tell the same, in order."""
    assert [event["sequence_number"] for event in stream] == list(range(len(stream)))
    assert [event["type"] for event in stream[:2]] == ["response.created", "response.in_progress"]
    last = stream[-1]
    assert last["type"] == f"response.{last['response']['status']}", last
    items: list[Json] = []
    done: list[Json] = []
    for event in stream[2:-1]:
        kind = event["type"].removeprefix("response.")
        if kind == "in_progress":
            continue
        assert len(done) == event["output_index"], "an item goes on after it was done"
        if kind == "output_item.added":
            assert len(items) == event["output_index"]
            assert event["item"]["status"] == "in_progress"
            items.append(event["item"])
            continue
        item = items[event["output_index"]]
        if kind == "output_item.done":
            whole = {**event["item"], "status": "in_progress", "encrypted_content": None}
            assert whole == {**item, "encrypted_content": None}
            assert event["item"]["id"] == item["id"]
            done.append(event["item"])
            continue
        assert event["item_id"] == item["id"]
        _apply(item, kind, event)
    assert len(items) == len(done)
    assert last["response"]["output"] == done
    return last["response"]


def _apply(item: Json, kind: str, event: Json) -> None:
    match kind:
        case "content_part.added":
            assert len(item["content"]) == event["content_index"]
            item["content"].append(event["part"])
        case "reasoning_summary_part.added":
            assert len(item["summary"]) == event["summary_index"]
            item["summary"].append(event["part"])
        case "output_text.delta" | "reasoning_text.delta":
            item["content"][event["content_index"]]["text"] += event["delta"]
        case "reasoning_summary_text.delta":
            item["summary"][event["summary_index"]]["text"] += event["delta"]
        case "function_call_arguments.delta":
            item["arguments"] += event["delta"]
        case "custom_tool_call_input.delta":
            item["input"] += event["delta"]
        case "output_text.done" | "reasoning_text.done":
            assert item["content"][event["content_index"]]["text"] == event["text"]
        case "reasoning_summary_text.done":
            assert item["summary"][event["summary_index"]]["text"] == event["text"]
        case "content_part.done":
            assert item["content"][event["content_index"]] == event["part"]
        case "reasoning_summary_part.done":
            assert item["summary"][event["summary_index"]] == event["part"]
        case "function_call_arguments.done":
            assert (item["arguments"], item["name"]) == (event["arguments"], event["name"])
        case "custom_tool_call_input.done":
            assert item["input"] == event["input"]
        case _:
            raise AssertionError(f"no such event: {kind}")


def user(text: str) -> Json:
    return {"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}


def results(items: Sequence[Json], text: str = "sunny") -> list[Json]:
    """An output for every call among these items."""
    return [
        {"type": f"{item['type']}_output", "call_id": item["call_id"], "output": f"{text} {at}"}
        for at, item in enumerate(item for item in items if "call_id" in item)
    ]


@dataclass
class Items:
    """An agent that keeps its conversation as items: what comes out goes in again as it is."""

    gateway: Gateway
    session_id: str
    fields: Json = field(default_factory=dict[str, Any])
    items: list[Json] = field(default_factory=list[Json])

    async def turn(self, *new: Json, **fields: Any) -> Json:
        self.items += new
        response = await respond(self.gateway, self.session_id, self.items, **{**self.fields, **fields})
        self.items += response["output"]
        return response


async def check(
    fake: FakeSGLang, gateway: Gateway, session_id: str, *, num_turns: int, num_samples: int = 1
) -> list[Json]:
    """Every id that reached the engine, against every id in the samples."""
    samples = await gateway.samples(session_id)
    assert len(samples) == num_samples, [s["branch_reason"] for s in samples]
    assert_samples_match(seen_by(fake), samples, num_turns=num_turns)
    return samples


def prompt_of(fake: FakeSGLang, at: int = -1) -> str:
    """The text of a prompt that reached the engine."""
    assert fake.tokenizer is not None
    return fake.tokenizer.decode(fake.requests[at].input_ids, skip_special_tokens=False)
