"""`tokentape.open`: the core without HTTP."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import tokentape
from gatewaykit import (
    CLOCK,
    END,
    TOKENIZER,
    USER,
    WEATHER,
    assert_samples_match,
    call,
    cut,
    drifts,
    sampled,
    seen_by,
    split,
)
from tokentape import errors
from tokentape.engines.base import EngineInfo
from tokentape.testing import FakeEngine, FakeSGLang, Fault, Reply

TOOLS: Any = [WEATHER, CLOCK]


async def test_the_store_may_be_shared(fake: FakeSGLang, model_dir: Path, database: str) -> None:
    """A DSN is no path: what one process recorded, another goes on with when the first has ended."""
    fake.responder = lambda asked: sampled("hello", seed=len(asked.input_ids))
    messages: list[Any] = [USER]
    for turn in range(2):
        async with tokentape.open(model=model_dir, engine=fake.url, store=database) as tape:
            session = tape.session("s")
            messages += [(await session.chat(messages)).message, USER]
            [sample] = await session.samples()
            assert len(sample["turns"]) == turn + 1


async def test_a_tool_loop_is_exact(fake: FakeSGLang, tape: tokentape.Recorder) -> None:
    thought = "<think>\nthe user\n</think>\n\n"
    fake.script(
        sampled(thought + call("weather", {"city": "hello"}) + "\n" + call("clock", {}), seed=1),
        sampled("the weather is " + call("weather", {"city": "world"}), seed=2),
        sampled("hello world", seed=3),
    )
    session = tape.session(metadata={"task": "weather"})
    messages: list[Any] = [USER]
    for turn in range(3):
        reply = await session.chat(messages, tools=TOOLS, temperature=0.5)
        messages.append(reply.message)
        calls = reply.message.get("tool_calls", [])
        messages += [{"role": "tool", "tool_call_id": c["id"], "content": "sunny"} for c in calls]
        engine = fake.requests[turn]
        assert reply.prompt_ids == engine.input_ids
        assert reply.completion_ids == engine.output_ids
        assert reply.logprobs == reply.turn.logprobs.tolist()
        assert reply.finish_reason == ("stop" if turn == 2 else "tool_calls")
        assert (reply.usage.num_prompt, reply.usage.num_completion) == (
            len(engine.input_ids),
            len(engine.output_ids),
        )
        assert reply.body["object"] == "chat.completion"
        assert reply.body["tokentape"]["turn_id"] == reply.turn.turn_id
    assert drifts(fake.requests[0].output_ids)
    assert messages[1]["reasoning_content"] == "the user"
    summary = await session.finish(reward=0.5, metadata={"grader": "v1"})
    assert (summary["state"], summary["turns"], summary["reward"]) == ("finished", 3, 0.5)
    samples = await session.samples()
    assert_samples_match(seen_by(fake), samples, num_turns=3)
    assert json.loads(samples[0]["metadata"]) == {"task": "weather", "grader": "v1"}
    assert samples[0]["reward"] == 0.5


async def test_sessions_side_by_side(fake: FakeSGLang, tape: tokentape.Recorder, tmp_path: Path) -> None:
    """Each has its own tape; the export has all of them."""
    fake.responder = lambda request: Reply([*split("hello world", len(request.input_ids)), END], delay_s=0.01)

    async def episode(number: int) -> list[Any]:
        session = tape.session(f"episode-{number}")
        messages: list[Any] = [{"role": "user", "content": f"hello {number}"}]
        for _ in range(4):
            reply = await session.chat(messages)
            messages += [reply.message, USER]
        await session.finish(reward=float(number))
        return await session.samples()

    tapes = await asyncio.gather(*(episode(number) for number in range(12)))
    for samples in tapes:
        assert len(samples) == 1
        assert_samples_match(seen_by(fake), samples, num_turns=4)
    path = tmp_path / "out" / "rollouts.parquet"
    assert await tape.export(path) == 12
    rows: list[Any] = pq.read_table(path).to_pylist()
    assert sorted(row["reward"] for row in rows) == [float(n) for n in range(12)]
    assert {row["session_id"]: row["token_ids"] for row in rows} == {
        samples[0]["session_id"]: samples[0]["token_ids"] for samples in tapes
    }


async def test_the_same_call_side_by_side_is_sampled_each_time(
    fake: FakeSGLang, tape: tokentape.Recorder
) -> None:
    """Nobody retries here: four calls at once are four turns."""
    fake.script(*(sampled(f"hello {n}", seed=n, delay_s=0.01) for n in range(4)))
    session = tape.session()
    replies = await asyncio.gather(*(session.chat([USER]) for _ in range(4)))
    assert len({reply.turn.turn_id for reply in replies}) == 4
    assert_samples_match(seen_by(fake), await session.samples(), num_turns=4)
    fake.script(sampled("hello again"))
    again = await session.chat([USER])
    assert again.turn.branch_reason == "resampled"


async def test_choices(fake: FakeSGLang, tape: tokentape.Recorder) -> None:
    fake.script(*(sampled(f"hello {n}", seed=n) for n in range(3)))
    session = tape.session()
    reply = await session.chat([USER], n=3)
    assert len(reply.turns) == len(reply.body["choices"]) == 3
    assert reply.turn is reply.turns[0]
    assert_samples_match(seen_by(fake), await session.samples(), num_turns=3)


async def test_the_sdks_own_objects(fake: FakeSGLang, tape: tokentape.Recorder) -> None:
    fake.script(sampled(call("clock", {}), seed=1), sampled("hello", seed=2), sampled("world", seed=3))
    session = tape.session()
    first = await session.openai().chat.completions.create(model="policy", messages=[USER], tools=TOOLS)
    message = first.choices[0].message
    assert message.tool_calls is not None
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "noon"}
    reply = await session.chat([USER, message, result], tools=TOOLS)
    await session.chat((USER, message, result, reply.message, USER), tools=tuple(TOOLS))
    samples = await session.samples()
    assert len(samples) == 1
    assert_samples_match(seen_by(fake), samples, num_turns=3)


async def test_labels(fake: FakeSGLang, tape: tokentape.Recorder) -> None:
    fake.script(sampled("hello"))
    session = tape.session()
    reply = await session.chat([USER], label="sub-agent")
    assert reply.turn.origin.label == "sub-agent"
    with pytest.raises(errors.RequestError):
        await session.chat([USER], label="no label")


async def test_settings_of_a_session(fake: FakeSGLang, tape: tokentape.Recorder) -> None:
    fake.script(cut("hello world", seed=1), sampled("hello", seed=2))
    session = tape.session(sampling={"temperature": 0.5, "top_k": 3}, max_turns=2)
    reply = await session.chat([USER], max_tokens=2, temperature=0.25)
    params = fake.requests[0].sampling_params
    assert (params["temperature"], params["top_k"], params["max_new_tokens"]) == (0.25, 3, 2)
    assert reply.finish_reason == "length"
    await session.chat([USER])
    assert fake.requests[1].sampling_params["temperature"] == 0.5
    with pytest.raises(errors.LimitReached):
        await session.chat([USER])
    small = tape.session(max_tokens=3)
    fake.script(sampled("hello world hello", seed=4))
    assert len((await small.chat([USER])).completion_ids) == 3
    with pytest.raises(errors.LimitReached):
        await small.chat([USER])
    fake.script(sampled("hello " * 50, seed=3, delay_s=0.05))
    late = tape.session(deadline_s=0.2)
    with pytest.raises(errors.LimitReached, match="deadline"):
        await late.chat([USER])
    assert (await late.summary())["failures"] == {"limit_reached": 1}


@pytest.mark.parametrize(
    "settings",
    [
        {"max_turns": 0},
        {"max_tokens": -1},
        {"deadline_s": 0},
        {"metadata": {"a": object()}},
        {"metadata": [1]},
    ],
)
async def test_settings_that_cannot_be(tape: tokentape.Recorder, settings: Any) -> None:
    with pytest.raises(errors.RequestError):
        tape.session(**settings)


async def test_settings_that_the_session_refuses(tape: tokentape.Recorder) -> None:
    for settings in ({"session_id": "a b"}, {"sampling": {"model": "x"}}, {"metadata": {"tokentape": 1}}):
        with pytest.raises(errors.RequestError):
            await tape.session(**settings).summary()


async def test_errors_are_typed(fake: FakeSGLang, tape: tokentape.Recorder) -> None:
    session = tape.session()
    for messages, fields in (
        ([], {}),
        ([{"role": "nobody", "content": "x"}], {}),
        ([USER], {"temperature": -1}),
        ([USER], {"stream": True}),
        ([USER], {"metadata": object()}),
        ([{"role": "user", "content": "\ud800"}], {}),
    ):
        with pytest.raises(errors.RequestError):
            await session.chat(messages, **fields)
    with pytest.raises(errors.ContextOverflow):
        await session.chat([{"role": "user", "content": "x" * 9000}])
    fake.script(Fault("status", status=500), Fault("wrong_count", reply=sampled("hello")))
    with pytest.raises(errors.EngineFailed):
        await session.chat([USER])
    with pytest.raises(errors.EngineProtocolError):
        await session.chat([USER])
    summary = await session.summary()
    assert (summary["turns"], summary["failures"]) == (0, {"engine_failed": 1, "engine_protocol_error": 1})
    assert await session.samples() == []


async def test_cancelling_a_call_aborts_the_turn(model_dir: Path) -> None:
    engine = FakeEngine(sampled("hello world " * 20, delay_s=0.05), sampled("hello"))
    async with tokentape.open(model=model_dir, engine=engine) as tape:
        session = tape.session()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(session.chat([USER]), 0.1)
        reply = await session.chat([USER])
        assert engine.aborted == [engine.requests[0].rid]
        assert reply.turn.branch_reason == "root"
        assert (await session.summary())["failures"] == {"client_gone": 1}
    assert not engine.closed  # whoever made it closes it


async def test_closing_aborts_what_runs(model_dir: Path) -> None:
    started = asyncio.Event()

    def respond(_: object) -> Reply:
        started.set()
        return sampled("hello world " * 20, delay_s=0.05)

    engine = FakeEngine(responder=respond)
    async with tokentape.open(model=model_dir, engine=engine) as tape:
        session, unused = tape.session(), tape.session()
        running = asyncio.create_task(session.chat([USER]))
        await started.wait()
    assert engine.aborted == [engine.requests[0].rid]
    with pytest.raises(errors.SessionClosed, match="the recorder is closed"):
        await running
    for late in (session, unused):
        with pytest.raises(errors.SessionClosed, match="the recorder is closed"):
            await late.chat([USER])


async def test_a_store_is_continued(fake: FakeSGLang, model_dir: Path, tmp_path: Path) -> None:
    store = tmp_path / "store.sqlite"
    settings: Any = {"metadata": {"a": 1}, "sampling": {"temperature": 0.5}, "max_turns": 9}
    messages: list[Any] = [USER]
    for turn in range(3):
        fake.script(sampled("hello world", seed=turn))
        async with tokentape.open(model=model_dir, engine=fake.url, store=store) as tape:
            reply = await tape.session("episode", **settings).chat(messages)
        assert (reply.turn.parent_id is None) == (turn == 0)
        messages += [reply.message, USER]
    async with tokentape.open(model=model_dir, engine=fake.url, store=str(store)) as tape:
        with pytest.raises(errors.SessionExists, match="sampling"):
            await tape.session("episode", sampling={"temperature": 0.7}).chat(messages)
        with pytest.raises(errors.SessionExists, match="max_turns"):
            await tape.session("episode", max_turns=3).chat(messages)
        session = tape.session("episode")
        samples = await session.samples()
        assert len(samples) == 1
        assert_samples_match(seen_by(fake), samples, num_turns=3)
        await session.finish(reward=1)
    async with tokentape.open(model=model_dir, engine=fake.url, store=store) as tape:
        session = tape.session("episode", **settings)
        with pytest.raises(errors.SessionClosed):
            await session.chat(messages)
        assert (await session.samples())[0]["reward"] == 1.0
        assert (await session.finish(reward=1))["metadata"] == {"a": 1}
        with pytest.raises(errors.SessionClosed):
            await session.finish(reward=2)
        assert await tape.export(tmp_path / "rollouts.parquet") == 1
        with pytest.raises(errors.ConfigError, match="in use"):
            async with tokentape.open(model=model_dir, engine=fake.url, store=store):
                pass


async def test_without_a_store_nothing_is_kept(
    fake: FakeSGLang, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fake.script(sampled("hello"))
    async with tokentape.open(model=model_dir, engine=fake.url) as tape:
        session = tape.session("episode")
        await session.chat([USER])
        await session.finish()
        assert len(await tape.session("episode").samples()) == 1
    async with tokentape.open(model=model_dir, engine=fake.url) as tape:
        assert await tape.session("episode").samples() == []
    assert os.listdir(tmp_path) == []  # noqa: PTH208


async def test_the_engine_says_how_long_the_context_is(model_dir: Path) -> None:
    """It is asked before the first turn; one that does not answer is asked again later."""
    reply = Reply([*TOKENIZER.encode("hello").ids, END])
    engine = FakeEngine(responder=lambda _: reply, info=EngineInfo("fake", 100, "default"))
    async with tokentape.open(model=model_dir, engine=engine) as tape:
        await tape.session().chat([USER])
        assert engine.requests[0].sampling.max_tokens == 100 - len(engine.requests[0].prompt)
    async with tokentape.open(model=model_dir, engine=engine, context_length=50) as tape:
        await tape.session().chat([USER])
        assert engine.requests[1].sampling.max_tokens == 50 - len(engine.requests[1].prompt)
    async with tokentape.open(model=model_dir, engine="http://127.0.0.1:1") as tape:
        with pytest.raises(errors.EngineUnavailable):
            await tape.session().chat([USER])


async def test_options_that_cannot_be(model_dir: Path, tmp_path: Path) -> None:
    for options in (
        {"engine": "localhost:30000"},
        {"model": tmp_path},
        {"tool_format": "nonsense"},
        {"store": tmp_path / "nowhere" / "s.sqlite"},
        {"volatile": ["("]},
    ):
        with pytest.raises(errors.ConfigError):
            async with tokentape.open(**{"model": model_dir, "engine": FakeEngine(), **options}):
                pass


def test_the_import_costs_nothing() -> None:
    code = "import sys, tokentape; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "tokentape" in loaded
    assert not loaded & {"aiohttp", "pyarrow", "tokenizers", "msgspec", "openai", "httpx2", "asyncio"}
    with pytest.raises(AttributeError):
        tokentape.nothing  # noqa: B018


async def test_nobody_gets_the_answer_of_another_call(model_dir: Path) -> None:
    """Calls of the same words that begin while others are just being answered."""
    engine = FakeEngine(responder=lambda _: Reply([*TOKENIZER.encode("hello").ids, END]))
    turn_ids: list[str] = []
    async with tokentape.open(model=model_dir, engine=engine) as tape:
        session = tape.session()

        async def ask() -> None:
            for _ in range(10):
                turn_ids.append((await session.chat([USER])).turn.turn_id)  # noqa: PERF401

        await asyncio.gather(*(ask() for _ in range(10)))
    assert len(set(turn_ids)) == len(engine.requests) == 100
