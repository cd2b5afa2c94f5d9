"""A router in front of the engines: generations go through it, all else to each of its servers."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path

import pytest

from gatewaykit import (
    END,
    TOKENIZER,
    USER,
    WEATHER,
    Agent,
    Gateway,
    assert_samples_match,
    gateway_for,
    sampled,
    seen_by,
    split,
)
from routerkit import FakeRouter, routing
from tokentape.engines.base import EngineInfo, GenerateRequest
from tokentape.engines.router import check_passes, joined_info
from tokentape.engines.sglang import SGLangConfig, SGLangEngine
from tokentape.errors import EngineError, EngineRejected, EngineTimeout, EngineUnavailable
from tokentape.invariants import check_samples
from tokentape.testing import FakeSGLang, Fault, Reply
from tokentape.types import Prompt, Sampling


@dataclass
class Routed:
    """A gateway, the router that is its only engine, and the router's servers."""

    gateway: Gateway
    router: FakeRouter
    a: FakeSGLang
    b: FakeSGLang


@pytest.fixture
async def routed(tmp_path: Path, model_dir: Path) -> AsyncGenerator[Routed]:
    async with contextlib.AsyncExitStack() as stack:
        a, b = [
            await stack.enter_async_context(FakeSGLang(TOKENIZER, context_length=length))
            for length in (8192, 4096)
        ]
        router = await stack.enter_async_context(routing([a.url, b.url]))
        gateway = await stack.enter_async_context(gateway_for(router.url, model_dir, tmp_path / "s.sqlite"))
        yield Routed(gateway, router, a, b)


async def test_sessions_stay_with_their_server(routed: Routed) -> None:
    routed.a.responder = routed.b.responder = lambda r: sampled("hello world", seed=len(r.input_ids))
    sessions = [await routed.gateway.create() for _ in range(4)]
    for number, session_id in enumerate(sessions):
        agent = Agent(routed.gateway, session_id)
        for turn in range(3):
            await agent.turn(USER, stream=(number + turn) % 2 == 0)
        fake = {routed.a.url: routed.a, routed.b.url: routed.b}[routed.router.of_session[session_id]]
        samples = await routed.gateway.samples(session_id)
        assert check_samples(samples) == []
        assert_samples_match(seen_by(fake), samples, num_turns=3)
    assert (len(routed.a.requests), len(routed.b.requests)) == (6, 6)


async def test_the_servers_are_asked_what_they_are(routed: Routed) -> None:
    """The router tells neither a context length nor a name of weights that would hold for all."""
    assert (await routed.gateway.ok("GET", "/readyz"))["engine"]["context_length"] == 4096
    (worker,) = (await routed.gateway.ok("GET", "/workers"))["workers"]
    assert (worker["url"], worker["weight_version"]) == (routed.router.url, "default")
    assert worker["servers"] == {routed.a.url: "default", routed.b.url: "default"}
    await routed.a.kill()  # a router lists its dead for a while
    (worker,) = (await routed.gateway.ok("GET", "/workers"))["workers"]
    assert worker["servers"] == {routed.b.url: "default"}


async def test_a_stream_whose_server_dies_goes_on_at_another(routed: Routed) -> None:
    text = split("hello world", seed=1)
    await routed.gateway.ok("GET", "/readyz")
    session_id = await routed.gateway.create()
    routed.router.of_session[session_id] = routed.a.url
    routed.a.weight_version, routed.b.weight_version = "1", "2"
    routed.a.script(Fault("cut", after=3, reply=Reply([*text, END])))
    routed.a.responder = lambda _: Fault("disconnect", reply=Reply([END]))  # until the router gives it up
    routed.b.script(Reply([*text[3:], END]))
    reply = await routed.gateway.chat(session_id, [USER], stream=True)
    assert reply["choices"][0]["message"]["content"] == "hello world"
    (sample,) = await routed.gateway.samples(session_id)
    assert check_samples([sample]) == []
    start = sample["num_prompt_tokens"]
    assert sample["token_ids"][start:] == [*text, END]
    spans = [(v["version"], v["start"] - start, v["end"] - start) for v in sample["weight_versions"]]
    assert spans == [("1", 0, 3), ("2", 3, len(text) + 1)]
    assert len({r.rid for r in [*routed.a.requests, *routed.b.requests]}) == len(routed.a.requests) + 1
    assert (await routed.gateway.show(session_id))["failures"] == {}


async def test_a_turn_is_not_lost_with_its_server(routed: Routed) -> None:
    await routed.gateway.ok("GET", "/readyz")
    session_id = await routed.gateway.create()
    routed.router.of_session[session_id] = routed.a.url
    routed.b.script(sampled("hello"))
    await routed.a.kill()
    reply = await routed.gateway.chat(session_id, [USER])
    assert reply["choices"][0]["message"]["content"] == "hello"
    assert (await routed.gateway.show(session_id))["failures"] == {}


async def test_no_server_is_left(routed: Routed) -> None:
    await routed.gateway.ok("GET", "/readyz")
    routed.router.urls.clear()
    session_id = await routed.gateway.create()
    answer = await routed.gateway.post(session_id, {"model": "policy", "messages": [USER]})
    assert (answer.status, answer.error["code"]) == (502, "engine_failed")
    assert (await routed.gateway.request("GET", "/readyz")).status == 503


async def test_a_pause_and_an_abort_reach_every_server(routed: Routed) -> None:
    text = split("hello world hello world", seed=1)
    fakes = [routed.a, routed.b]
    for fake in fakes:
        fake.script(Reply([*text, END], delay_s=0.03))
        fake.responder = lambda _: Reply([END])
    sessions = [await routed.gateway.create() for _ in fakes]
    turns = [asyncio.create_task(routed.gateway.chat(s, [USER], stream=True)) for s in sessions]
    for fake in fakes:
        await fake.until(lambda fake=fake: bool(fake.requests and fake.requests[0].output_ids))
    assert await routed.gateway.ok("POST", "/pause") == {"paused": True, "interrupted": 2}
    for fake in fakes:
        assert fake.requests[0].rid in fake.aborts
        assert 0 < len(fake.requests[0].output_ids) < len(text)
    assert not any(turn.done() for turn in turns)
    assert await routed.gateway.ok("POST", "/resume") == {"paused": False}
    await asyncio.gather(*turns)
    for session_id in sessions:
        assert check_samples(await routed.gateway.samples(session_id)) == []


async def test_a_client_that_leaves_aborts_wherever_it_was(routed: Routed) -> None:
    routed.a.responder = routed.b.responder = lambda _: Reply([*split("hello world"), END], delay_s=0.2)
    session_id = await routed.gateway.create()
    turn = asyncio.create_task(routed.gateway.chat(session_id, [USER]))
    await routed.a.until(lambda: bool(routed.a.requests or routed.b.requests))
    turn.cancel()
    (received,) = [*routed.a.requests, *routed.b.requests]
    for fake in (routed.a, routed.b):  # nobody says which of them has it
        await fake.until(lambda fake=fake: received.rid in fake.aborts)


async def test_weights_need_one_name_at_all_servers(routed: Routed) -> None:
    routed.a.weight_version = "7"
    answer = await routed.gateway.request("POST", "/weights", {"version": "7"})
    assert (answer.status, answer.error["code"]) == (409, "weights_differ")
    assert f"{routed.b.url}: default" in answer.error["message"]
    state = await routed.gateway.ok("GET", "/weights")
    assert (state["version"], state["said_by"]) == (None, "engine")
    assert state["servers"] == {routed.a.url: "7", routed.b.url: "default"}
    # Whichever server a turn hits, its tokens have that server's name.
    for fake in (routed.a, routed.b):
        fake.responder = lambda _: sampled("hello")
        session_id = await routed.gateway.create()
        routed.router.of_session[session_id] = fake.url
        await routed.gateway.chat(session_id, [USER])
        (sample,) = await routed.gateway.samples(session_id)
        assert [v["version"] for v in sample["weight_versions"]] == [fake.weight_version]
    routed.b.weight_version = "7"
    state = await routed.gateway.ok("POST", "/weights", {"version": "7"})
    assert (state["version"], state["said_by"]) == ("7", "engine")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"tools": [WEATHER], "tool_choice": "required"}, "response_format"),
    ],
)
async def test_what_the_router_drops_is_refused(
    routed: Routed, fields: dict[str, object], param: str
) -> None:
    session_id = await routed.gateway.create()
    body = {"model": "policy", "messages": [USER], **fields}
    answer = await routed.gateway.post(session_id, body)
    assert (answer.status, answer.error["param"]) == (400, param)
    assert "sglang-router drops" in answer.error["message"]
    assert routed.a.requests == routed.b.requests == []


def asking(**fields: object) -> GenerateRequest:
    return GenerateRequest("r", Prompt.of([1, 2]), Sampling(max_tokens=2), **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "fields", [{"capture_support": True}, {"experts_from": 0}], ids=["support", "experts"]
)
async def test_what_the_operator_captures_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(EngineRejected, match="drops return_"):
        check_passes(asking(**fields))
    check_passes(asking())
    async with FakeSGLang() as fake:  # no router: nothing is refused
        engine = SGLangEngine(SGLangConfig(fake.url), vocab_size=fake.vocab_size)
        with contextlib.suppress(EngineError):
            async for _ in engine.generate(asking(**fields)):
                pass
        await engine.aclose()
        assert len(fake.requests) == 1
        assert not engine.routed


def test_one_word_of_many_servers() -> None:
    one, other = EngineInfo("m", 50, "7"), EngineInfo("m", 40, "7")
    gone = EngineTimeout("no answer")
    assert joined_info({"a": one}) is one
    joined = joined_info({"a": gone, "b": one, "c": other})
    assert (joined.context_length, joined.weight_version, joined.differs) == (40, "7", False)
    assert joined.weight_versions == {"b": "7", "c": "7"}
    nested = joined_info({"r": joined, "d": EngineInfo("m", None, "6")})
    assert (nested.weight_version, nested.differs) == (None, True)
    assert nested.weight_versions == {"b": "7", "c": "7", "d": "6"}
    with pytest.raises(EngineTimeout):
        joined_info({"a": gone})
    with pytest.raises(EngineUnavailable):
        joined_info({})
