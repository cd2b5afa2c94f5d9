"""Responses by their id: to go on from, and to ask for."""

import json
from pathlib import Path
from typing import Any

import pytest
from responseskit import CLOCK, PATCH, TEAM, WEATHER, check, post, prompt_of, respond, results, user

from gatewaykit import Gateway, Json, call, cut, gateway_for, sampled
from tokentape.testing import FakeSGLang

TOOLS: Json = {"tools": [PATCH, WEATHER, TEAM, CLOCK]}
THOUGHT = "<think>\nthe user\n</think>\n\n"


async def get(gateway: Gateway, session: str, path: str) -> Any:
    return await gateway.ok("GET", f"/sessions/{session}/v1/responses/{path}")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_chain(fake: FakeSGLang, gateway: Gateway, stream: bool) -> None:
    session = await gateway.create()
    fields: Json = {**TOOLS, "instructions": "the tool", "stream": stream}
    fake.script(
        sampled(THOUGHT + "hello " + call("weather", {"city": "hello"}), seed=1),
        sampled(THOUGHT + call("apply_patch", {"patch": "hello"}) + call("team__ask", {}), seed=2),
        sampled("the end", seed=3),
        sampled("hello", seed=4),
    )
    response = await respond(gateway, session, "hello", **fields)
    for _ in range(2):
        new = results(response["output"])
        response = await respond(gateway, session, new, previous_response_id=response["id"], **fields)
    assert response["previous_response_id"] is not None
    await check(fake, gateway, session, num_turns=3)
    fields["instructions"] = "hello world"  # instructions are not carried over: another prompt
    response = await respond(gateway, session, "hello", previous_response_id=response["id"], **fields)
    samples = await check(fake, gateway, session, num_turns=4, num_samples=2)
    assert samples[1]["branch_reason"] == "edited_history"
    assert "the tool" not in json.loads(samples[1]["messages"])[0]["content"]
    assert prompt_of(fake).count("hello world") == 1
    del fields["instructions"]
    fake.script(sampled("hello"))
    await respond(gateway, session, "hello", previous_response_id=response["id"], **fields)
    assert "hello world" not in prompt_of(fake)


async def test_two_from_one(fake: FakeSGLang, gateway: Gateway) -> None:
    session = await gateway.create()
    fake.script(sampled("hello", seed=1), sampled("the", seed=2), sampled("world", seed=3))
    first = await respond(gateway, session, "hello")
    for text in ("the", "world"):
        await respond(gateway, session, text, previous_response_id=first["id"])
    samples = await check(fake, gateway, session, num_turns=3, num_samples=2)
    assert samples[1]["branch_reason"] == "forked"


async def test_a_restart(fake: FakeSGLang, model_dir: Path, store: Path) -> None:
    fields: Json = {
        **TOOLS,
        "instructions": "the tool",
        "temperature": 0.5,
        "metadata": {"a": "b"},
        "text": {"format": {"type": "text"}},
        "include": ["reasoning.encrypted_content"],
        "reasoning": {"summary": "auto"},
        "tool_choice": "auto",
        "max_output_tokens": 99,
    }
    fake.script(
        sampled(THOUGHT + call("apply_patch", {"input": "hello"}), seed=1), sampled("the end", seed=2)
    )
    async with gateway_for(fake.url, model_dir, store) as gateway:
        session = await gateway.create()
        first = await respond(gateway, session, "hello", **fields)
        assert await _same(gateway, session, first)
    async with gateway_for(fake.url, model_dir, store) as gateway:
        assert await _same(gateway, session, first)
        second = await respond(
            gateway, session, results(first["output"]), previous_response_id=first["id"], **fields
        )
        items = await get(gateway, session, f"{second['id']}/input_items?order=asc")
        assert [item["type"] for item in items["data"]] == [
            *("message", "reasoning", "custom_tool_call", "custom_tool_call_output")
        ]
        assert items["data"][1:3] == first["output"]
        await check(fake, gateway, session, num_turns=2)
        await gateway.ok("POST", f"/sessions/{session}/finish", {})
        assert await _same(gateway, session, second)


async def _same(gateway: Gateway, session: str, response: Json) -> bool:
    """Functions come back with all that a policy is shown of them; the rest is as it was."""
    again = await get(gateway, session, response["id"])
    shown = sorted((tool["name"], tool.get("parameters"), tool.get("format")) for tool in response["tools"])
    assert shown == sorted((t["name"], t.get("parameters"), t.get("format")) for t in again["tools"])
    same = [key for key in response if key != "tools"]
    assert {key: again[key] for key in same} == {key: response[key] for key in same}
    return True


async def test_what_is_not_there(fake: FakeSGLang, gateway: Gateway) -> None:
    """Another session's response is as unknown as none, and one that is not stored as good as gone."""
    fake.script(sampled("hello"), sampled("hello"), sampled("hello"))
    here, elsewhere = await gateway.create(), await gateway.create()
    stored = (await respond(gateway, here, "hello"))["id"]
    unstored = await respond(gateway, here, "hello", store=False)
    chat = await gateway.chat(here, [{"role": "user", "content": "hello"}])
    foreign = "resp_" + chat["id"].removeprefix("t-")
    for session, id_ in [
        (elsewhere, stored),
        (here, unstored["id"]),
        (here, foreign),
        (here, "resp_1"),
        (here, "x"),
    ]:
        for method, end in [("GET", ""), ("GET", "/input_items"), ("DELETE", ""), ("POST", "/cancel")]:
            answer = await gateway.request(method, f"/sessions/{session}/v1/responses/{id_}{end}")
            assert answer.status == 404, answer
            assert id_ in answer.error["message"]
        answer = await post(gateway, session, {"input": "hello", "previous_response_id": id_})
        assert (answer.status, answer.error["param"]) == (404, "previous_response_id")
    for session, item in [
        (here, unstored["output"][0]["id"]),
        (elsewhere, "msg_" + stored.removeprefix("resp_") + "_0"),
        (here, "msg_" + stored.removeprefix("resp_") + "_1"),
        (here, "rs_" + stored.removeprefix("resp_") + "_0"),
    ]:
        answer = await post(gateway, session, {"input": [{"type": "item_reference", "id": item}]})
        assert (answer.status, answer.error["param"]) == (404, "input[0].id")
    assert len(fake.requests) == 3


async def test_what_is_there_cannot_be_deleted_or_cancelled(fake: FakeSGLang, gateway: Gateway) -> None:
    fake.script(sampled("hello"))
    session = await gateway.create()
    id_ = (await respond(gateway, session, "hello"))["id"]
    for method, end in [("DELETE", ""), ("POST", "/cancel"), ("GET", "?stream=true")]:
        answer = await gateway.request(method, f"/sessions/{session}/v1/responses/{id_}{end}")
        assert answer.status == 400, answer


async def test_pages_of_input_items(fake: FakeSGLang, gateway: Gateway) -> None:
    fake.script(cut(THOUGHT + "hello"), sampled("hello"))
    session = await gateway.create()
    said = [user("hello"), {"role": "assistant", "content": "the"}, user("world")]
    first = await respond(gateway, session, said, instructions="the tool")
    path = f"{first['id']}/input_items"
    page = await get(gateway, session, f"{path}?order=asc&limit=2")
    assert [item["content"][0]["text"] for item in page["data"]] == ["hello", "the"]
    assert page["has_more"] is True
    page = await get(gateway, session, f"{path}?order=asc&after={page['last_id']}")
    assert [item["content"][0]["text"] for item in page["data"]] == ["world"]
    assert page["has_more"] is False
    page = await get(gateway, session, path)
    assert [item["content"][0]["text"] for item in page["data"]] == ["world", "the", "hello"]
    for query in ("order=up", "limit=0", "limit=x", "after=nothing"):
        answer = await gateway.request("GET", f"/sessions/{session}/v1/responses/{path}?{query}")
        assert answer.status == 400


async def test_without_the_prefix(fake: FakeSGLang, gateway: Gateway) -> None:
    fake.script(sampled("hello"))
    session = await gateway.create()
    headers = {"X-Session-Id": session}
    answer = await gateway.request("POST", "/v1/responses", {"input": "hello"}, headers)
    assert answer.status == 200
    again = await gateway.request("GET", f"/v1/responses/{answer.body['id']}", headers=headers)
    assert again.body["output"] == answer.body["output"]


async def test_tokens_are_counted_exactly(fake: FakeSGLang, gateway: Gateway) -> None:
    session = await gateway.create()
    body: Json = {"input": "hello", "instructions": "the tool", **TOOLS}
    answer = await gateway.ok("POST", f"/sessions/{session}/v1/responses/input_tokens", body)
    fake.script(sampled("hello"))
    response = await respond(
        gateway, session, body["input"], **{k: v for k, v in body.items() if k != "input"}
    )
    assert answer == {
        "object": "response.input_tokens",
        "input_tokens": response["usage"]["input_tokens"],
    }


@pytest.mark.parametrize("named", [0, 1])
@pytest.mark.parametrize("by", ["previous_response_id", "items"])
async def test_of_two_that_say_the_same_the_named_one_goes_on(
    fake: FakeSGLang, gateway: Gateway, named: int, by: str
) -> None:
    """The same text in other tokens: the agent goes on from the one that it took."""
    session_id = await gateway.create()
    fake.script(sampled("hello world", seed=1), sampled("hello world", seed=2), sampled("hello"))
    replies = [await respond(gateway, session_id, "hello") for _ in range(2)]
    assert fake.requests[0].output_ids != fake.requests[1].output_ids
    next_: list[Json] = [{"role": "user", "content": "world"}]
    if by == "items":
        first: list[Json] = [{"role": "user", "content": "hello"}]
        reply = await respond(gateway, session_id, [*first, *replies[named]["output"], *next_])
    else:
        reply = await respond(gateway, session_id, next_, previous_response_id=replies[named]["id"])
    assert reply["tokentape"]["parent_turn_id"] == replies[named]["tokentape"]["turn_id"]
