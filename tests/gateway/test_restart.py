"""A session survives the gateway: stopped in order, or killed in the middle of a turn."""

import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from gatewaykit import (
    USER,
    WEATHER,
    Agent,
    Gateway,
    assert_samples_match,
    call,
    drifts,
    gateway_for,
    sampled,
    seen_by,
)
from serving import serving
from tokentape.testing import FakeSGLang


async def test_a_gateway_for_every_turn(fake: FakeSGLang, model_dir: Path, store: Path) -> None:
    async with gateway_for(fake.url, model_dir, store) as gateway:
        sampling = {"temperature": 0.5}
        session_id = await gateway.create(metadata={"a": 1}, sampling=sampling, max_turns=7)
    agent = Agent(gateway, session_id, {"tools": [WEATHER]})
    new: list[Any] = [USER]
    samples: list[Any] = []
    for turn in range(6):
        text = call("weather", {"city": "hello", "n": turn}) if turn % 2 == 0 else "the weather is hello"
        fake.script(sampled(text, seed=turn))
        async with gateway_for(fake.url, model_dir, store) as agent.gateway:
            before = await agent.gateway.show(session_id)
            assert before["turns"] == turn
            assert await agent.gateway.samples(session_id) == samples
            reply = await agent.turn(*new)
            assert (reply["tokentape"]["parent_turn_id"] is None) == (turn == 0)
            samples = await agent.gateway.samples(session_id)
        new = agent.results() if turn % 2 == 0 else [USER]
    assert any(drifts(r.output_ids) for r in fake.requests)
    assert fake.requests[-1].sampling_params["temperature"] == 0.5
    async with gateway_for(fake.url, model_dir, store) as agent.gateway:
        assert_samples_match(seen_by(fake), await agent.gateway.samples(session_id), num_turns=6)
        await agent.turn(USER)
        answer = await agent.gateway.post(session_id, {"messages": [USER]})
        assert answer.error["code"] == "limit_reached"
        summary = await agent.gateway.ok("POST", f"/sessions/{session_id}/finish", {"reward": 0.5})
        assert summary["metadata"] == {"a": 1}
    async with gateway_for(fake.url, model_dir, store) as gateway:
        assert await gateway.show(session_id) == summary
        assert (await gateway.post(session_id, {"messages": [USER]})).status == 409
        assert (await gateway.request("POST", "/sessions", {"session_id": session_id})).status == 409


async def test_branches_and_failures_survive(fake: FakeSGLang, model_dir: Path, store: Path) -> None:
    fake.script(*(sampled("the weather is", seed=n) for n in range(3)))
    async with gateway_for(fake.url, model_dir, store) as gateway:
        agent = Agent(gateway, await gateway.create())
        await agent.turn(USER)
        await agent.turn(USER)
        again = await gateway.chat(agent.session_id, [USER])
        assert again["tokentape"]["branch_reason"] == "resampled"
        await fake.aclose()
        await gateway.post(agent.session_id, {"messages": [USER]})
        summary, samples = await gateway.show(agent.session_id), await gateway.samples(agent.session_id)
        assert summary["failures"] == {"engine_unavailable": 1}
    await fake.start()
    async with gateway_for(fake.url, model_dir, store) as agent.gateway:
        assert await agent.gateway.show(agent.session_id) == summary
        assert await agent.gateway.samples(agent.session_id) == samples
        # Nobody can know whether the last answer to this one was received: it is given once more, then anew.
        reply = await agent.gateway.chat(agent.session_id, [USER])
        assert reply["tokentape"] == again["tokentape"]
        reply = await agent.gateway.chat(agent.session_id, [USER])
        assert reply["tokentape"]["branch_reason"] == "resampled"
        assert_samples_match(
            seen_by(fake)[: len(fake.requests)], await agent.gateway.samples(agent.session_id), num_turns=4
        )


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_kill_9(fake: FakeSGLang, model_dir: Path, store: Path, tmp_path: Path, stream: bool) -> None:
    """Killed between two turns, and in the middle of one: what was answered is there, and nothing else."""
    arguments = (
        "serve",
        "--model",
        str(model_dir),
        "--engine",
        fake.url,
        "--port",
        "0",
        "--store",
        str(store),
    )
    log = tmp_path / "log"
    async with aiohttp.ClientSession() as http, contextlib.AsyncExitStack() as stack:

        async def start() -> tuple[Any, Gateway]:
            process = await stack.enter_async_context(serving(log, *arguments))
            return process, Gateway(process.url, http)

        process, gateway = await start()
        agent = Agent(gateway, await gateway.create(), {"tools": [WEATHER], "stream": stream})
        fake.script(sampled(call("weather", {"city": "hello"}), seed=1), sampled("the weather is", seed=2))
        await agent.turn(USER)
        process.process.kill()
        await process.ended()

        process, agent.gateway = await start()
        await agent.turn(*agent.results())
        samples = await agent.gateway.samples(agent.session_id)
        assert len(samples) == 1
        assert_samples_match(seen_by(fake), samples, num_turns=2)

        fake.script(sampled("hello world " * 20, seed=3, delay_s=0.05), sampled("hello", seed=4))
        lost = asyncio.create_task(
            agent.gateway.chat(agent.session_id, [*agent.messages, USER], stream=stream)
        )
        await fake.until(
            lambda: len(fake.requests) == 3 and len(fake.requests[2].output_ids) >= (3 if stream else 0)
        )
        process.process.kill()
        await process.ended()
        with pytest.raises(aiohttp.ClientError):
            await lost

        process, agent.gateway = await start()
        assert await agent.gateway.samples(agent.session_id) == samples
        reply = await agent.turn(USER)
        assert reply["tokentape"]["branch_reason"] is None
        samples = await agent.gateway.samples(agent.session_id)
        assert len(samples) == 1
        assert_samples_match(seen_by(fake), samples, num_turns=3)
        assert json.loads(samples[0]["messages"]) == agent.messages
