"""The official anthropic SDK against the gateway: what its own users write, unchanged."""

import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

import anthropic
import pytest
from anthropic import AsyncAnthropic, beta_async_tool
from messageskit import TOOLS, USER
from pydantic import BaseModel

from gatewaykit import Gateway, assert_samples_match, call, drifts, gateway_for, sampled, seen_by
from tokentape.testing import FakeSGLang, Fault

THOUGHT = "<think>\nthe user\n</think>\n\n"
ASK: Any = {"model": "policy", "max_tokens": 500, "messages": [USER]}


@contextlib.asynccontextmanager
async def sdk(gateway: Gateway, path: str, **options: Any) -> AsyncGenerator[AsyncAnthropic]:
    async with AsyncAnthropic(
        **{"base_url": gateway.url + path, "api_key": "unused", "max_retries": 0, **options}
    ) as client:
        yield client


@pytest.fixture
async def session_id(gateway: Gateway) -> str:
    return await gateway.create()


@pytest.fixture(params=["", "/v1"], ids=["plain", "v1"])
async def client(
    gateway: Gateway, session_id: str, request: pytest.FixtureRequest
) -> AsyncIterator[AsyncAnthropic]:
    """With the session's URL, and with the base_url that `POST /sessions` answers."""
    async with sdk(gateway, f"/sessions/{session_id}{request.param}") as client:
        yield client


async def exact(fake: FakeSGLang, gateway: Gateway, session_id: str, *, num_turns: int) -> None:
    samples = await gateway.samples(session_id)
    assert len(samples) == 1, [s["branch_reason"] for s in samples]
    assert_samples_match(seen_by(fake), samples, num_turns=num_turns)


@pytest.mark.parametrize("replay", ["object", "param", "dump", "dump without null"])
async def test_a_tool_loop(
    fake: FakeSGLang, gateway: Gateway, client: AsyncAnthropic, session_id: str, replay: str
) -> None:
    """The reply goes back as the SDK's own objects, or as any dump of them."""
    calls = call("weather", {"city": "hello", "at": 1.0}) + "\n" + call("clock", {})
    fake.script(
        sampled(THOUGHT + calls, seed=1),
        sampled("the weather is " + call("weather", {"city": "world"}), seed=2),
        sampled("hello world", seed=3),
    )
    messages: list[Any] = [USER]
    for turn in range(3):
        reply = await client.messages.create(
            model="policy",
            max_tokens=500,
            system="the tool",
            messages=messages,
            tools=TOOLS,  # pyright: ignore[reportArgumentType]
            thinking={"type": "enabled", "budget_tokens": 1024},
        )
        assert reply.stop_reason == ("end_turn" if turn == 2 else "tool_use")
        dumped = reply.model_dump()["content"]
        shapes: dict[str, Any] = {
            "object": {"role": "assistant", "content": reply.content},
            "param": reply.to_param(),
            "dump": {"role": "assistant", "content": dumped},
            "dump without null": reply.model_dump(exclude_none=True, include={"role", "content"}),
        }
        messages.append(shapes[replay])
        results = [
            {"type": "tool_result", "tool_use_id": block.id, "content": "sunny"}
            for block in reply.content
            if block.type == "tool_use"
        ]
        messages.append({"role": "user", "content": results})
    assert drifts(fake.requests[0].output_ids)
    await exact(fake, gateway, session_id, num_turns=3)


async def test_what_a_reply_has(fake: FakeSGLang, client: AsyncAnthropic, session_id: str) -> None:
    fake.script(sampled(THOUGHT + "hello", seed=1))
    reply = await client.messages.create(**ASK, extra_body={"return_token_ids": True, "top_k": 20})
    thought, said = reply.content
    assert (thought.type, said.type) == ("thinking", "text")
    assert thought.type == "thinking"
    assert said.type == "text"
    assert (thought.thinking, said.text) == ("the user", "hello")
    assert reply.usage.input_tokens == len(fake.requests[0].input_ids)
    assert reply.usage.output_tokens == len(fake.requests[0].output_ids)
    tape: Any = (reply.model_extra or {})["tokentape"]
    assert tape["session_id"] == session_id
    assert thought.signature == tape["turn_id"]
    assert tape["completion_ids"] == fake.requests[0].output_ids
    assert fake.requests[0].sampling_params["top_k"] == 20


async def test_raw_stream(fake: FakeSGLang, client: AsyncAnthropic, session_id: str) -> None:
    fake.script(sampled("hello " + call("weather", {"city": "日"}), seed=2))
    stream = await client.messages.create(**ASK, tools=TOOLS, stream=True)
    events = [event async for event in stream]
    started, *_, ended, stopped = events
    assert started.type == "message_start"
    assert ended.type == "message_delta"
    assert stopped.type == "message_stop"
    assert ended.delta.stop_reason == "tool_use"
    begun: Any = (started.message.model_extra or {})["tokentape"]
    tape: Any = (ended.model_extra or {})["tokentape"]
    assert begun == {"session_id": session_id, "turn_id": tape["turn_id"]}
    assert tape["parse"]["status"] == "ok"


async def test_stream_helper(
    fake: FakeSGLang, gateway: Gateway, client: AsyncAnthropic, session_id: str
) -> None:
    """`messages.stream` puts the events together itself."""
    fake.script(
        sampled(THOUGHT + "hello " + call("weather", {"city": "x"}) + call("clock", {}), seed=2),
        sampled("world", seed=3),
    )
    async with client.messages.stream(**ASK, tools=TOOLS) as stream:
        kinds = {event.type async for event in stream}
        message = await stream.get_final_message()
    assert {"thinking", "signature", "text", "input_json", "content_block_stop", "message_stop"} <= kinds
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert [b.input for b in message.content if b.type == "tool_use"] == [{"city": "x"}, {}]
    assert message.stop_reason == "tool_use"
    assert message.usage.output_tokens == len(fake.requests[0].output_ids)
    results = [
        {"type": "tool_result", "tool_use_id": b.id, "content": [{"type": "text", "text": "x"}]}
        for b in message.content
        if b.type == "tool_use"
    ]
    said: Any = [b.model_dump() for b in message.content]
    messages: Any = [USER, {"role": "assistant", "content": said}, {"role": "user", "content": results}]
    async with client.messages.stream(**{**ASK, "messages": messages}, tools=TOOLS) as stream:
        assert "".join([text async for text in stream.text_stream]) == "world"
        assert await stream.get_final_text() == "world"
    await exact(fake, gateway, session_id, num_turns=2)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_tool_runner(
    fake: FakeSGLang, gateway: Gateway, client: AsyncAnthropic, session_id: str, stream: bool
) -> None:
    """The beta's loop: it calls the tools itself, also one that fails."""

    @beta_async_tool
    async def weather(city: str) -> str:
        """The weather in a city.

        Args:
            city: its name
        """
        if city == "nowhere":
            raise ValueError("no such city")
        return f"sunny in {city}"

    fake.script(
        sampled(call("weather", {"city": "hello"}) + call("weather", {"city": "nowhere"}), seed=1),
        sampled("the " + call("weather", {"city": "world"}), seed=2),
        sampled("hello world", seed=3),
    )
    runner: Any = client.beta.messages.tool_runner(**ASK, tools=[weather], stream=stream)
    final = await runner.until_done()
    assert final.content[0].text == "hello world"
    [sample] = await gateway.samples(session_id)
    results = [m["content"] for m in json.loads(sample["messages"]) if m["role"] == "tool"]
    assert results[0] == "sunny in hello"
    assert results[1].startswith("Error: ")
    assert results[2] == "sunny in world"
    await exact(fake, gateway, session_id, num_turns=3)


async def test_parse(fake: FakeSGLang, client: AsyncAnthropic) -> None:
    class Weather(BaseModel):
        city: str

    fake.script(sampled('{"city": "hello"}'))
    parsed = await client.messages.parse(**ASK, output_format=Weather)
    assert parsed.parsed_output == Weather(city="hello")
    assert '"city"' in fake.requests[0].sampling_params["structural_tag"]


async def test_count_tokens(fake: FakeSGLang, client: AsyncAnthropic) -> None:
    ask = {"model": "policy", "messages": [USER], "tools": TOOLS, "system": "the tool"}
    counted = await client.messages.count_tokens(**ask)
    assert (await client.beta.messages.count_tokens(**ask)).input_tokens == counted.input_tokens
    fake.script(sampled("hello"))
    usage = (await client.messages.create(**ask, max_tokens=5)).usage
    assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)


async def test_models(client: AsyncAnthropic) -> None:
    [model] = [model async for model in client.models.list()]
    assert (model.id, model.display_name, model.type) == ("policy", "policy", "model")
    assert model.created_at.year == 1970
    assert await client.models.retrieve("policy") == model
    with pytest.raises(anthropic.NotFoundError, match="only 'policy'"):
        await client.models.retrieve("other")


async def test_errors(fake: FakeSGLang, gateway: Gateway, client: AsyncAnthropic) -> None:
    with pytest.raises(anthropic.BadRequestError, match="prefill is not supported") as bad:
        await client.messages.create(**{**ASK, "messages": [USER, {"role": "assistant", "content": "a"}]})
    assert bad.value.type == "invalid_request_error"
    with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: \d+ tokens > 8192 maximum"):
        await client.messages.create(**{**ASK, "messages": [{"role": "user", "content": "x" * 9000}]})
    fake.script(
        Fault("status", status=503), Fault("disconnect", after=2, reply=sampled("hello", delay_s=0.01))
    )
    with pytest.raises(anthropic.InternalServerError):
        await client.messages.create(**ASK)
    with pytest.raises(anthropic.APIStatusError) as failed:
        async with client.messages.stream(**ASK) as stream:
            await stream.until_done()
    assert failed.value.type == "api_error"
    async with sdk(gateway, "/sessions/nobody") as other:
        with pytest.raises(anthropic.NotFoundError, match="does not exist"):
            await other.messages.create(**ASK)


async def test_keys(fake: FakeSGLang, model_dir: Path, store: Path) -> None:
    """Either of the SDK's credentials is the session's id, or the gateway's key."""
    async with gateway_for(fake.url, model_dir, store) as gateway:
        session_id = await gateway.create()
        for options in ({"api_key": session_id}, {"api_key": None, "auth_token": session_id}):
            fake.script(sampled("hello"))
            async with sdk(gateway, "", **options) as client:
                await client.messages.create(**ASK)
    async with gateway_for(fake.url, model_dir, store, http={"api_key": "secret"}) as gateway:
        async with sdk(gateway, f"/sessions/{session_id}", api_key="wrong") as client:
            with pytest.raises(anthropic.AuthenticationError):
                await client.messages.create(**ASK)
        async with sdk(gateway, f"/sessions/{session_id}", api_key="secret") as client:
            fake.script(sampled("hello"))
            await client.messages.create(**ASK)


async def test_retries(fake: FakeSGLang, gateway: Gateway, session_id: str) -> None:
    """The SDK tries again by itself what is worth it; the turn is there once."""
    async with sdk(gateway, f"/sessions/{session_id}", max_retries=2) as client:
        fake.script(Fault("status", status=503), sampled("hello"))
        reply = await client.messages.create(**ASK)
    assert reply.stop_reason == "end_turn"
    assert (await gateway.show(session_id))["turns"] == 1
