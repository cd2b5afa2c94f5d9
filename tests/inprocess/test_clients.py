"""Agents written for the SDKs, in this process: their own clients, no socket in between."""

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

import tokentape
from gatewaykit import CLOCK, USER, WEATHER, assert_samples_match, call, sampled, seen_by
from tokentape import errors
from tokentape.testing import FakeEngine, FakeSGLang, Fault

TOOLS: Any = [WEATHER, CLOCK]
CLAUDE_TOOLS: Any = [
    {"name": "weather", "input_schema": WEATHER["function"]["parameters"]},
]


async def exact(fake: FakeSGLang, session: tokentape.RecordedSession, *, num_turns: int) -> None:
    samples = await session.samples()
    assert len(samples) == 1
    assert_samples_match(seen_by(fake), samples, num_turns=num_turns)


async def agent(client: Any, model: Any = "policy") -> str:
    """An agent as frameworks write it: it insists on the SDK's class and streams its turns."""
    assert isinstance(client, openai.AsyncOpenAI)
    messages: list[Any] = [USER]
    for _ in range(5):
        async with client.chat.completions.stream(model=model, messages=messages, tools=TOOLS) as stream:
            completion = await stream.get_final_completion()
        message = completion.choices[0].message
        messages.append(message.model_dump(exclude_none=True))
        if not message.tool_calls:
            return message.content or ""
        messages += [{"role": "tool", "tool_call_id": c.id, "content": "sunny"} for c in message.tool_calls]
    return ""


async def test_an_agent_of_the_sdk(fake: FakeSGLang, tape: tokentape.Recorder) -> None:
    fake.script(
        sampled("<think>\nthe user\n</think>\n\n" + call("weather", {"city": "hello"}), seed=1),
        sampled(call("weather", {"city": "world"}) + call("clock", {}), seed=2),
        sampled("hello world", seed=3),
    )
    session = tape.session()
    assert await agent(session.openai()) == "hello world"
    await exact(fake, session, num_turns=3)
    reply = await session.chat([USER])  # the same session, without the client
    assert reply.turn.branch_reason is not None


async def test_a_client_made_of_the_client(fake: FakeSGLang, tape: tokentape.Recorder) -> None:
    fake.script(sampled("hello", seed=1))
    session = tape.session()
    async with session.openai(max_retries=0).with_options(timeout=5.0) as client:
        raw = await client.chat.completions.with_raw_response.create(model="policy", messages=[USER])
    assert raw.headers["content-type"] == "application/json"
    completion = raw.parse()
    assert (completion.model_extra or {})["tokentape"]["session_id"] == session.session_id


async def test_responses(fake: FakeSGLang, tape: tokentape.Recorder) -> None:
    fake.script(sampled("hello world", seed=1), sampled("the weather", seed=2))
    session = tape.session()
    client = session.openai()
    first = await client.responses.create(model="policy", input="hello")
    assert first.output_text == "hello world"
    stream = await client.responses.create(
        model="policy", input="again", previous_response_id=first.id, stream=True
    )
    kinds = [event.type async for event in stream]
    assert kinds[-1] == "response.completed"
    assert (await client.responses.retrieve(first.id)).output_text == "hello world"
    page = await client.responses.input_items.list(first.id, order="asc")
    assert len(page.data) == 1
    await exact(fake, session, num_turns=2)


async def test_anthropic(fake: FakeSGLang, tape: tokentape.Recorder) -> None:
    fake.script(sampled(call("weather", {"city": "hello"}), seed=1), sampled("hello world", seed=2))
    session = tape.session()
    client = session.anthropic()
    assert isinstance(client, anthropic.AsyncAnthropic)
    messages: list[Any] = [USER]
    count = await client.messages.count_tokens(model="policy", messages=messages, tools=CLAUDE_TOOLS)
    first = await client.messages.create(
        model="policy", messages=messages, tools=CLAUDE_TOOLS, max_tokens=100
    )
    assert first.stop_reason == "tool_use"
    assert count.input_tokens == len(fake.requests[0].input_ids)
    [use] = [block for block in first.content if block.type == "tool_use"]
    messages += [
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use.id, "content": "sunny"}]},
    ]
    async with client.messages.stream(
        model="policy", messages=messages, tools=CLAUDE_TOOLS, max_tokens=100
    ) as stream:
        assert "".join([text async for text in stream.text_stream]) == "hello world"
    await exact(fake, session, num_turns=2)
    with pytest.raises(anthropic.BadRequestError):
        await client.messages.create(model="policy", messages=[], max_tokens=100)
    with pytest.raises(anthropic.NotFoundError):
        await client.beta.files.list()


async def test_models(tape: tokentape.Recorder) -> None:
    client = tape.session().openai()
    assert [model.id async for model in await client.models.list()] == ["policy"]
    assert (await client.models.retrieve("policy")).id == "policy"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("gpt/4")


async def test_errors_are_the_sdks(fake: FakeSGLang, tape: tokentape.Recorder) -> None:
    session = tape.session()
    client = session.openai(max_retries=0)
    create: Callable[..., Any] = client.chat.completions.create
    with pytest.raises(openai.BadRequestError) as raised:
        await create(model="policy", messages=[USER], temperature=-1)
    assert raised.value.param == "temperature"
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as raised:
            await create(model="policy", messages=[{"role": "user", "content": "x" * 9000}], stream=stream)
        assert raised.value.code == "context_length_exceeded"
        fake.script(Fault("status", status=500))
        with pytest.raises(openai.InternalServerError) as failed:
            await create(model="policy", messages=[USER], stream=stream)
        assert failed.value.response.headers["x-should-retry"] == "true"
    with pytest.raises(openai.NotFoundError):
        await client.embeddings.create(model="policy", input="x")
    fake.script(Fault("disconnect", after=3, reply=sampled("hello world hello world")))
    events = await create(model="policy", messages=[USER], stream=True)
    with pytest.raises(openai.APIError):
        async for _ in events:
            pass
    await session.finish()
    with pytest.raises(openai.ConflictError) as closed:
        await create(model="policy", messages=[USER])
    assert closed.value.response.headers["x-should-retry"] == "false"


async def test_a_bug_is_an_internal_error(
    tape: tokentape.Recorder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(tape.gateway.api, "decode", broken)
    client = tape.session().openai(max_retries=0)
    with pytest.raises(openai.InternalServerError) as raised:
        await client.chat.completions.create(model="policy", messages=[USER])
    assert "secret" not in str(raised.value)
    assert "ZeroDivisionError" in caplog.text


async def test_retries_of_the_sdk(fake: FakeSGLang, tape: tokentape.Recorder) -> None:
    fake.script(Fault("status", status=500), sampled("hello", seed=1))
    session = tape.session()
    await session.openai().chat.completions.create(model="policy", messages=[USER])
    assert (await session.summary())["failures"] == {"engine_failed": 1}
    await exact(fake, session, num_turns=1)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_the_sdks_timeout_aborts_the_turn(model_dir: Path, stream: bool) -> None:
    engine = FakeEngine(sampled("hello world", delay_s=0.3), sampled("hello"))
    async with tokentape.open(model=model_dir, engine=engine) as tape:
        session = tape.session()
        client = session.openai(timeout=0.1, max_retries=0)
        with pytest.raises(openai.APITimeoutError):
            await client.chat.completions.create(model="policy", messages=[USER], stream=stream)
        await session.chat([USER])
        assert engine.aborted == [engine.requests[0].rid]
        assert (await session.summary())["turns"] == 1


async def test_a_gap_in_a_stream_times_out(model_dir: Path) -> None:
    engine = FakeEngine(sampled("hello world " * 5, delay_s=0.03))
    async with tokentape.open(model=model_dir, engine=engine) as tape:
        session = tape.session()
        client = session.openai(timeout=5.0, max_retries=0)
        stream = await client.chat.completions.create(model="policy", messages=[USER], stream=True)
        stream.response.request.extensions["timeout"]["read"] = 0.001
        with pytest.raises(openai.APITimeoutError):
            async for _ in stream:
                pass
        await stream.close()
        assert engine.aborted == [engine.requests[0].rid]


async def test_leaving_a_stream_aborts_the_turn(model_dir: Path) -> None:
    engine = FakeEngine(sampled("hello world " * 20, delay_s=0.01), sampled("hello"))
    async with tokentape.open(model=model_dir, engine=engine) as tape:
        session = tape.session()
        client = session.openai()
        stream = await client.chat.completions.create(model="policy", messages=[USER], stream=True)
        async for _ in stream:
            break
        await stream.close()
        await session.chat([USER])
        assert engine.aborted == [engine.requests[0].rid]
        summary = await session.summary()
        assert (summary["turns"], summary["failures"]) == (1, {"client_gone": 1})


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_who_asks_again_gets_another_answer(
    fake: FakeSGLang, tape: tokentape.Recorder, stream: bool
) -> None:
    """Also after a stream, whose reader leaves right at its end; a stream never read is answered again."""
    session = tape.session()
    create: Callable[..., Any] = session.openai().chat.completions.create
    fake.script(*(sampled(f"hello {n}", seed=n) for n in range(3)))
    ids: list[str] = []
    for _ in range(2):
        reply = await create(model="policy", messages=[USER], stream=stream)
        ids.append([chunk.id async for chunk in reply][-1] if stream else reply.id)
    assert len(set(ids)) == 2
    if stream:
        unread = await create(model="policy", messages=[USER], stream=True)
        tree = (await tape.gateway.sessions.get(session.session_id)).tree
        await fake.until(lambda: len(tree) == 3)
        await unread.close()
        again = await create(model="policy", messages=[USER], stream=True)
        async for _ in again:
            pass
    assert len(fake.requests) == (3 if stream else 2)


async def test_agents_in_other_threads(fake: FakeSGLang, tape: tokentape.Recorder) -> None:
    fake.script(sampled("hello", seed=1), sampled("world", seed=2), sampled("hello world", seed=3))
    session = tape.session()

    def talk() -> list[Any]:
        client = session.openai_sync(max_retries=0)
        assert isinstance(client, openai.OpenAI)
        messages: list[Any] = [USER]
        first = client.chat.completions.create(model="policy", messages=messages)
        messages += [first.choices[0].message, USER]
        with client.chat.completions.create(model="policy", messages=messages, stream=True) as stream:
            text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="policy", messages=[])
        messages += [{"role": "assistant", "content": text}, USER]
        last = session.anthropic_sync().messages.create(model="policy", messages=messages, max_tokens=9)
        return [first.choices[0].message.content, text, last.content]

    first, second, last = await asyncio.to_thread(talk)
    assert (first, second, last[0].text) == ("hello", "world", "hello world")
    await exact(fake, session, num_turns=3)


async def test_a_thread_that_leaves(model_dir: Path) -> None:
    engine = FakeEngine(
        sampled("hello world " * 20, delay_s=0.01), sampled("hello world " * 20, delay_s=0.01)
    )
    async with tokentape.open(model=model_dir, engine=engine) as tape:
        session = tape.session()

        def talk() -> None:
            client = session.openai_sync(max_retries=0)
            with client.chat.completions.create(model="policy", messages=[USER], stream=True) as stream:
                next(stream)
            with pytest.raises(openai.APITimeoutError):
                client.chat.completions.create(model="policy", messages=[USER], timeout=0.05)

        await asyncio.to_thread(talk)
        await asyncio.sleep(0.05)
        assert engine.aborted == [request.rid for request in engine.requests]
        assert (await session.summary())["turns"] == 0


async def test_a_blocking_client_on_the_loop_itself_is_refused(tape: tokentape.Recorder) -> None:
    client = tape.session().openai_sync()
    with pytest.raises(openai.BadRequestError, match="another thread"):
        client.chat.completions.create(model="policy", messages=[USER])


async def test_closing_ends_streams(model_dir: Path) -> None:
    engine = FakeEngine(sampled("hello world " * 20, delay_s=0.05))
    async with tokentape.open(model=model_dir, engine=engine) as tape:
        client = tape.session().openai(max_retries=0)
        stream = await client.chat.completions.create(model="policy", messages=[USER], stream=True)
    with pytest.raises(openai.APIError, match="the recorder is closed"):
        async for _ in stream:
            pass
    with pytest.raises(openai.ConflictError):
        await client.chat.completions.create(model="policy", messages=[USER])


async def test_options_that_cannot_be(tape: tokentape.Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(errors.ConfigError, match="base_url"):
        tape.session().openai(base_url="http://elsewhere")
    monkeypatch.setitem(sys.modules, "anthropic", None)
    with pytest.raises(errors.ConfigError, match="tokentape\\[clients\\]"):
        tape.session().anthropic()
