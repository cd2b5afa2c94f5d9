"""The official openai SDK: what its own users write, unchanged."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter
from responseskit import CLOCK, PATCH, TEAM, WEATHER, check, prompt_of, results

from gatewaykit import Gateway, call, cut, sampled
from tokentape.testing import FakeSGLang, Fault

TOOLS: Any = [WEATHER, CLOCK, PATCH, TEAM]
THOUGHT = "<think>\nthe user\n</think>\n\n"
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


@pytest.fixture
async def session_id(gateway: Gateway) -> str:
    return await gateway.create()


@pytest.fixture
async def client(gateway: Gateway, session_id: str) -> AsyncIterator[AsyncOpenAI]:
    async with gateway.openai(session_id) as client:
        yield client


@pytest.mark.parametrize("replay", ["object", "dump", "dump without null"])
@pytest.mark.parametrize("stored", [True, False])
async def test_a_tool_loop(
    fake: FakeSGLang, gateway: Gateway, client: AsyncOpenAI, session_id: str, replay: str, stored: bool
) -> None:
    """The output goes back as the SDK's own objects, or as either dump of them."""
    calls = call("weather", {"city": "hello"}) + "\n" + call("apply_patch", {"input": "a\nb"})
    fake.script(
        sampled(THOUGHT + calls, seed=1),
        sampled(THOUGHT + "the weather is " + call("team__ask", {"city": "world"}), seed=2),
        sampled("hello world", seed=3),
    )
    items: list[Any] = [{"role": "user", "content": "hello"}]
    for _ in range(3):
        response = await client.responses.create(
            model="policy",
            input=items,
            tools=TOOLS,
            instructions="the tool",
            store=stored,
            include=["reasoning.encrypted_content"],
        )
        Response.model_validate(response.model_dump())
        for item in response.output:
            dumps: dict[str, Any] = {
                "object": item,
                "dump": item.model_dump(),
                "dump without null": item.model_dump(exclude_none=True),
            }
            items.append(dumps[replay])
        items += results([item.model_dump() for item in response.output])
    assert response.output_text == "hello world"
    await check(fake, gateway, session_id, num_turns=3)


@pytest.mark.parametrize("kind", ["text", "calls", "thought"])
async def test_the_stream_helper(
    fake: FakeSGLang, gateway: Gateway, client: AsyncOpenAI, session_id: str, kind: str
) -> None:
    """`responses.stream` checks and accumulates; every event is also what its model says."""
    text = {
        "text": "hello world",
        "calls": "hello "
        + call("weather", {"city": "x"})
        + call("apply_patch", {"input": "y"})
        + call("team__ask", {}),
        "thought": THOUGHT + "hello",
    }[kind]
    fake.script(sampled(text, seed=2), sampled("world"))
    async with client.responses.stream(
        model="policy", input="hello", tools=TOOLS, reasoning={"summary": "auto"}
    ) as stream:
        events = [event async for event in stream]
        final = await stream.get_final_response()
    assert final.output_text.startswith("hello")
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert deltas[-1].snapshot == final.output_text
    kinds = [event.type for event in events]
    if kind == "calls":
        assert [item.type for item in final.output] == [
            *("message", "function_call", "custom_tool_call", "function_call")
        ]
        assert {"response.function_call_arguments.delta", "response.custom_tool_call_input.delta"} <= set(
            kinds
        )
    if kind == "thought":
        item: Any = final.output[0]
        assert (item.content[0].text, item.summary[0].text) == ("the user", "the user")
        assert kinds.index("response.reasoning_text.done") < kinds.index("response.output_text.delta")
    raw = await client.responses.create(
        model="policy", input="hello", stream=True, previous_response_id=final.id, tools=TOOLS
    )
    for event in [event async for event in raw]:
        EVENT.validate_python(event.model_dump())
    samples = await gateway.samples(session_id)
    assert len(samples) == (2 if kind == "thought" else 1)  # this template drops thoughts behind a user


async def test_structured_output(fake: FakeSGLang, client: AsyncOpenAI) -> None:
    class Weather(BaseModel):
        city: str

    fake.script(*[sampled(THOUGHT + '{"city": "hello"}', seed=3)] * 2)
    parsed = await client.responses.parse(model="policy", input="hello", text_format=Weather)
    assert parsed.output_parsed == Weather(city="hello")
    assert '"city"' in fake.requests[0].sampling_params["structural_tag"]
    async with client.responses.stream(model="policy", input="hello", text_format=Weather) as stream:
        assert (await stream.get_final_response()).output_parsed == Weather(city="hello")


async def test_a_pydantic_tool(fake: FakeSGLang, client: AsyncOpenAI) -> None:
    class Weather(BaseModel):
        city: str

    fake.script(sampled(call("Weather", {"city": "hello"})))
    tool: Any = openai.pydantic_function_tool(Weather)["function"]
    parsed = await client.responses.parse(model="policy", input="hello", tools=[{"type": "function", **tool}])
    [item] = parsed.output
    assert item.type == "function_call"
    assert item.parsed_arguments == {"city": "hello"}
    assert (await client.responses.retrieve(parsed.id)).tools[0].model_dump()["strict"] is True


async def test_incomplete(fake: FakeSGLang, client: AsyncOpenAI) -> None:
    fake.script(cut("the weather is hel"), cut("the weather is hel"))
    response = await client.responses.create(model="policy", input="hello", max_output_tokens=50)
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    stream = await client.responses.create(model="policy", input="hello", stream=True)
    last = [event async for event in stream][-1]
    assert last.type == "response.incomplete"
    assert last.response.status == "incomplete"


async def test_by_id(fake: FakeSGLang, client: AsyncOpenAI) -> None:
    fake.script(sampled("hello"), sampled("world"))
    first = await client.responses.create(model="policy", input="hello")
    second = await client.responses.create(model="policy", input="the", previous_response_id=first.id)
    again = await client.responses.retrieve(second.id)
    assert again.output == second.output
    assert again.previous_response_id == first.id
    said = [item async for item in await client.responses.input_items.list(second.id, order="asc", limit=1)]
    assert [item.type for item in said] == ["message"] * 3
    assert said[1].id == first.output[0].id  # type: ignore[union-attr]
    counted = await client.responses.input_tokens.count(input="the", previous_response_id=first.id)
    assert second.usage is not None
    assert counted.input_tokens == second.usage.input_tokens
    with pytest.raises(openai.BadRequestError):
        await client.responses.delete(second.id)
    with pytest.raises(openai.BadRequestError, match="Cannot cancel"):
        await client.responses.cancel(second.id)
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve("resp_123")


async def test_errors(fake: FakeSGLang, gateway: Gateway, client: AsyncOpenAI, session_id: str) -> None:
    with pytest.raises(openai.BadRequestError, match="Remove it") as refused:
        await client.responses.create(model="policy", input="hello", tools=[{"type": "web_search"}])
    assert refused.value.param == "tools[0].type"
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="exceeds the context window") as long:
            await client.responses.create(model="policy", input="hello world " * 5000, stream=stream)
        assert (long.value.code, long.value.param) == ("context_length_exceeded", "input")
    with pytest.raises(openai.NotFoundError):
        await client.responses.create(model="policy", input="a", previous_response_id="resp_1")
    fake.script(Fault("status", status=500))
    with pytest.raises(openai.InternalServerError):
        await client.responses.create(model="policy", input="hello")
    assert (await gateway.show(session_id))["turns"] == 0


async def test_a_stream_that_fails(
    fake: FakeSGLang, gateway: Gateway, client: AsyncOpenAI, session_id: str
) -> None:
    """A failed response for those who read events, and an error that the SDK raises."""
    fake.script(Fault("error_event", after=2, reply=sampled("hello world the weather")))
    stream = await client.responses.create(model="policy", input="hello", stream=True)
    kinds: list[str] = []

    async def read() -> None:
        nonlocal kinds
        async for event in stream:
            kinds += [event.type]

    with pytest.raises(openai.APIError):
        await read()
    assert kinds[-1] == "response.failed"
    assert kinds[0] == "response.created"
    assert (await gateway.show(session_id))["turns"] == 0


async def test_max_output_tokens_is_an_upper_bound(fake: FakeSGLang, client: AsyncOpenAI) -> None:
    """The context may end the turn before it, as with OpenAI."""
    fake.script(sampled("hello"))
    response = await client.responses.create(model="policy", input="hello", max_output_tokens=100_000)
    asked = fake.requests[0].sampling_params["max_new_tokens"]
    assert response.usage is not None
    assert asked == 8192 - response.usage.input_tokens


async def test_a_retry_of_one_that_left(fake: FakeSGLang, gateway: Gateway, session_id: str) -> None:
    """The same request again, its volatile fields in another order: one turn."""
    fake.script(sampled("hello " * 20, delay_s=0.02), sampled("world"))
    path = f"{gateway.url}/sessions/{session_id}/v1/responses"

    async def ask(**more: Any) -> Any:
        async with gateway.http.post(path, json={"input": "hello", **more}) as response:
            return await response.json()

    one = asyncio.create_task(ask(client_metadata={"a": "1", "b": "2"}))
    await asyncio.sleep(0.1)
    two = await ask(client_metadata={"b": "3"})
    assert (await one)["id"] == two["id"]
    assert len(fake.requests) == 1
    assert "hello" in prompt_of(fake)
