"""The official openai SDK against the gateway: what its own users write, unchanged."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from gatewaykit import CLOCK, USER, WEATHER, Gateway, assert_samples_match, call, drifts, sampled, seen_by
from tokentape.testing import FakeSGLang, Fault

TOOLS: Any = [WEATHER, CLOCK]


@pytest.fixture
async def session_id(gateway: Gateway) -> str:
    return await gateway.create()


@pytest.fixture
async def client(gateway: Gateway, session_id: str) -> AsyncIterator[AsyncOpenAI]:
    async with gateway.openai(session_id) as client:
        yield client


async def exact(fake: FakeSGLang, gateway: Gateway, session_id: str, *, num_turns: int) -> None:
    samples = await gateway.samples(session_id)
    assert len(samples) == 1
    assert_samples_match(seen_by(fake), samples, num_turns=num_turns)


@pytest.mark.parametrize("replay", ["object", "dump", "dump without null"])
async def test_a_tool_loop(
    fake: FakeSGLang, gateway: Gateway, client: AsyncOpenAI, session_id: str, replay: str
) -> None:
    """The reply goes back as the SDK's own object, or as either dump of it."""
    calls = call("weather", {"city": "hello"}) + "\n" + call("clock", {})
    fake.script(
        sampled("<think>\nthe user\n</think>\n\n" + calls, seed=1),
        sampled("the weather is " + call("weather", {"city": "world"}), seed=2),
        sampled("hello world", seed=3),
    )
    messages: list[Any] = [{"role": "system", "content": "the tool"}, USER]
    for turn in range(3):
        completion = await client.chat.completions.create(model="policy", messages=messages, tools=TOOLS)
        message = completion.choices[0].message
        dumps: dict[str, Any] = {
            "object": message,
            "dump": message.model_dump(),
            "dump without null": message.model_dump(exclude_none=True),
        }
        messages.append(dumps[replay])
        assert completion.choices[0].finish_reason == ("stop" if turn == 2 else "tool_calls")
        calls_made = message.tool_calls or []
        messages += [{"role": "tool", "tool_call_id": made.id, "content": "sunny"} for made in calls_made]
    assert drifts(fake.requests[0].output_ids)
    await exact(fake, gateway, session_id, num_turns=3)


async def test_what_a_reply_has(fake: FakeSGLang, client: AsyncOpenAI, session_id: str) -> None:
    fake.script(sampled("<think>\nthe user\n</think>\n\nhello", seed=1))
    completion = await client.chat.completions.create(
        model="policy", messages=[USER], logprobs=True, extra_body={"return_token_ids": True, "top_k": 20}
    )
    message: Any = completion.choices[0].message
    assert (message.content, message.reasoning_content) == ("hello", "the user")
    assert completion.usage is not None
    assert completion.usage.completion_tokens == len(fake.requests[0].output_ids)
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    assert len(logprobs.content or []) == completion.usage.completion_tokens
    tape: Any = (completion.model_extra or {})["tokentape"]
    assert tape["session_id"] == session_id
    assert tape["completion_ids"] == fake.requests[0].output_ids
    assert fake.requests[0].sampling_params["top_k"] == 20


async def test_raw_stream(fake: FakeSGLang, gateway: Gateway, client: AsyncOpenAI, session_id: str) -> None:
    fake.script(sampled("hello " + call("weather", {"city": "日"}), seed=2))
    stream = await client.chat.completions.create(
        model="policy", messages=[USER], tools=TOOLS, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    [tool_call] = [t for c in chunks if c.choices for t in c.choices[0].delta.tool_calls or []]
    assert text == "hello"
    assert tool_call.function is not None
    assert (tool_call.function.name, tool_call.function.arguments) == ("weather", '{"city": "\\u65e5"}')
    assert chunks[-1].usage is not None
    assert chunks[-2].choices[0].finish_reason == "tool_calls"
    assert (chunks[-2].model_extra or {})["tokentape"]["session_id"] == session_id
    await exact(fake, gateway, session_id, num_turns=1)


async def test_stream_helper(
    fake: FakeSGLang, gateway: Gateway, client: AsyncOpenAI, session_id: str
) -> None:
    """`chat.completions.stream` puts the chunks together itself."""
    fake.script(
        sampled("hello " + call("weather", {"city": "x"}) + call("clock", {}), seed=2), sampled("world")
    )
    async with client.chat.completions.stream(model="policy", messages=[USER], tools=TOOLS) as stream:
        kinds = {event.type async for event in stream}
        completion = await stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done", "tool_calls.function.arguments.done"} <= kinds
    message = completion.choices[0].message
    assert message.content == "hello"
    assert [t.function.name for t in message.tool_calls or []] == ["weather", "clock"]
    messages: list[Any] = [USER, message.model_dump(exclude_none=True)]
    messages += [{"role": "tool", "tool_call_id": t.id, "content": "x"} for t in message.tool_calls or []]
    async with client.chat.completions.stream(model="policy", messages=messages, tools=TOOLS) as stream:
        await stream.until_done()
    await exact(fake, gateway, session_id, num_turns=2)


async def test_structured_output(
    fake: FakeSGLang, gateway: Gateway, client: AsyncOpenAI, session_id: str
) -> None:
    """`chat.completions.parse` sends the model's schema, and reads the reply with it."""

    class Weather(BaseModel):
        city: str

    fake.script(sampled('<think>\nthe user\n</think>\n\n{"city": "hello"}', seed=3), sampled("world"))
    first = await client.chat.completions.parse(model="policy", messages=[USER], response_format=Weather)
    message: Any = first.choices[0].message
    assert message.parsed == Weather(city="hello")
    [request] = fake.requests
    assert '"city"' in request.sampling_params["structural_tag"]
    await client.chat.completions.create(
        model="policy", messages=[USER, message.model_dump(exclude={"parsed", "reasoning_content"}), USER]
    )
    samples = await gateway.samples(session_id)
    assert_samples_match(seen_by(fake), samples, num_turns=2)


async def test_other_resources_are_not_there(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        await client.completions.create(model="policy", prompt="x")
    with pytest.raises(openai.NotFoundError):
        await client.embeddings.create(model="policy", input="x")


async def test_the_sync_client(fake: FakeSGLang, gateway: Gateway, session_id: str) -> None:
    fake.script(sampled("hello", seed=1), sampled("world", seed=2))

    def talk() -> list[str]:
        base_url = f"{gateway.url}/sessions/{session_id}/v1"
        with OpenAI(base_url=base_url, api_key="x", max_retries=0) as client:
            first = client.chat.completions.create(model="policy", messages=[USER])
            message: Any = first.choices[0].message
            with client.chat.completions.create(
                model="policy", messages=[USER, message, USER], stream=True
            ) as stream:
                return ["".join(chunk.choices[0].delta.content or "" for chunk in stream)]

    assert await asyncio.to_thread(talk) == ["world"]
    await exact(fake, gateway, session_id, num_turns=2)


async def test_retries(fake: FakeSGLang, gateway: Gateway, session_id: str) -> None:
    """The SDK retries what is worth it by itself; every failed attempt is counted, none is trained."""
    fake.script(Fault("status", status=500), Fault("error_event"), sampled("hello", seed=1))
    async with gateway.openai(session_id, max_retries=2) as client:
        await client.chat.completions.create(model="policy", messages=[USER])
    assert (await gateway.show(session_id))["failures"] == {"engine_failed": 2}
    await exact(fake, gateway, session_id, num_turns=1)
    fake.script(Fault("wrong_count", reply=sampled("hello")))
    async with gateway.openai(session_id, max_retries=2) as client:
        with pytest.raises(openai.InternalServerError):
            await client.chat.completions.create(model="policy", messages=[USER])
    assert len(fake.requests) == 4  # an engine that contradicts itself is not asked again


async def test_parameters_of_the_sdk(fake: FakeSGLang, client: AsyncOpenAI) -> None:
    await client.chat.completions.create(
        model="policy",
        messages=[USER],
        frequency_penalty=0.5,
        max_completion_tokens=5,
        metadata={"a": "b"},
        n=1,
        parallel_tool_calls=True,
        presence_penalty=0.5,
        reasoning_effort="low",
        response_format={"type": "text"},
        seed=7,
        service_tier="auto",
        stop=["x"],
        store=False,
        temperature=0.5,
        tool_choice="auto",
        tools=TOOLS,
        top_p=0.5,
        user="someone",
    )
    params = fake.requests[0].sampling_params
    assert params == {
        "max_new_tokens": 5,
        "temperature": 0.5,
        "top_p": 0.5,
        "stop": ["x"],
        "frequency_penalty": 0.5,
        "presence_penalty": 0.5,
        "sampling_seed": 7,
    }
