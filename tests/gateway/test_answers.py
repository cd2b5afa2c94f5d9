"""One answer a request, whoever asks again: what is lost, what is held, what is being stopped."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path

import pytest

from gatewaykit import END, USER, Gateway, Json, sampled
from tokentape.engines.base import EngineInfo, GenerateRequest, GenerateResult, TokenChunk
from tokentape.errors import InternalError
from tokentape.gateway import chat, memory
from tokentape.gateway.api import Answering
from tokentape.gateway.credit import Credit
from tokentape.gateway.memory import Memo
from tokentape.gateway.parts import Gateway as Parts
from tokentape.gateway.parts import PartsConfig, parts
from tokentape.gateway.session import Session
from tokentape.testing import FakeEngine, FakeSGLang, Reply

FIRST = {"x-stainless-retry-count": "0"}
RETRY = {"x-stainless-retry-count": "1"}
BODY = json.dumps({"messages": [USER]}).encode()


@contextlib.asynccontextmanager
async def without_http(model_dir: Path, engine: FakeEngine) -> AsyncGenerator[tuple[Parts, Session]]:
    async with parts(PartsConfig(model=str(model_dir), engine=engine, store=None)) as gateway:
        yield gateway, await gateway.sessions.create()


def ask(
    gateway: Parts, session: Session, headers: Mapping[str, str]
) -> contextlib.AbstractAsyncContextManager[Answering]:
    decoded = gateway.api.decode(chat.WIRE, session, BODY, headers)
    return gateway.api.answering(session, decoded, headers)


async def turn_of(answering: Answering) -> str:
    return (await answering.dones())[0].turn.turn_id


async def test_each_lost_answer_is_given_once(model_dir: Path) -> None:
    """Two connections asked the same and both lost their replies: their retries get both turns."""
    async with without_http(model_dir, FakeEngine(responder=lambda _: Reply([END]))) as (gateway, session):
        async with ask(gateway, session, FIRST) as a, ask(gateway, session, FIRST) as b:
            made = {await turn_of(a), await turn_of(b)}
        assert len(made) == 2
        async with ask(gateway, session, RETRY) as a, ask(gateway, session, RETRY) as b:
            assert {await turn_of(a), await turn_of(b)} == made
            a.delivered()
            b.delivered()
        assert len(session.tree) == 2


async def test_each_answer_that_was_lost_behind_us_is_given_once(model_dir: Path) -> None:
    """Something in between took both replies and lost them: nobody here can know."""
    async with without_http(model_dir, FakeEngine(responder=lambda _: Reply([END]))) as (gateway, session):
        made: list[str] = []
        for headers in (FIRST, FIRST, RETRY, RETRY, RETRY):
            async with ask(gateway, session, headers) as one:
                made.append(await turn_of(one))
                one.delivered()
        assert made[0] != made[1]
        assert made[2:] == [made[1], made[0], made[1]]


async def test_an_answer_that_is_being_sent_is_not_lost(model_dir: Path) -> None:
    async with without_http(model_dir, FakeEngine(responder=lambda _: Reply([END]))) as (gateway, session):
        async with ask(gateway, session, FIRST) as one:
            first = await turn_of(one)
            async with ask(gateway, session, FIRST) as two:
                second = await turn_of(two)
                two.delivered()
        assert first != second
        async with ask(gateway, session, FIRST) as again:  # the first one's was never delivered
            assert await turn_of(again) == first


async def test_who_continues_one_answer_has_not_received_the_other(model_dir: Path) -> None:
    engine = FakeEngine(responder=lambda _: Reply([END]))
    async with without_http(model_dir, engine) as (gateway, session):
        async with ask(gateway, session, FIRST) as one:
            first = (await one.dones())[0].turn
            one.delivered()
        async with ask(gateway, session, FIRST) as two:
            second = await turn_of(two)
        session.answers.received(first.origin.request_id)
        async with ask(gateway, session, RETRY) as retry:
            assert await turn_of(retry) == second


async def test_nothing_is_kept_for_answers_that_nobody_holds(model_dir: Path) -> None:
    """Their prompts would make the memory of a session quadratic."""
    async with without_http(model_dir, FakeEngine(responder=lambda _: Reply([END]))) as (gateway, session):
        async with ask(gateway, session, FIRST) as one:
            [done] = await one.dones()
        async with ask(gateway, session, RETRY) as again:
            [copy] = await again.dones()
        assert copy is not done
        assert (copy.turn, copy.prompt.to_list()) == (done.turn, done.prompt.to_list())


class SlowToStop(FakeEngine):
    """An engine whose abort takes a moment."""

    def __init__(self) -> None:
        super().__init__()
        self.started = asyncio.Event()
        self.num_stopped = 0

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk | GenerateResult]:
        self.started.set()
        try:
            await asyncio.sleep(100)
            yield TokenChunk([END], [-1.0])
        finally:
            await asyncio.sleep(0.05)
            self.num_stopped += 1


async def test_a_second_stop_does_not_disturb_the_first(model_dir: Path) -> None:
    engine = SlowToStop()
    async with without_http(model_dir, engine) as (gateway, session):

        async def leave() -> None:
            async with ask(gateway, session, FIRST) as answering:
                await answering.dones()

        task = asyncio.create_task(leave())
        await engine.started.wait()
        task.cancel()
        await asyncio.sleep(0.01)
        await gateway.sessions.finish(session, Credit())
        assert engine.num_stopped == 1
        assert sum(session.failures.values()) == 1


class OutOfTime(FakeEngine):
    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk | GenerateResult]:
        raise TimeoutError("the engine's own")
        yield TokenChunk([END], [-1.0])

    async def info(self) -> EngineInfo:
        return EngineInfo(None, None, None)


async def test_an_engines_own_timeout_is_no_deadline(model_dir: Path) -> None:
    async with (
        without_http(model_dir, OutOfTime()) as (gateway, session),
        ask(gateway, session, FIRST) as answering,
    ):
        with pytest.raises(InternalError, match="the engine's own"):
            await answering.dones()


async def test_finish_does_not_bring_a_deleted_session_back(fake: FakeSGLang, gateway: Gateway) -> None:
    for number in range(20):
        session_id = await gateway.create(session_id=f"x{number}")
        await asyncio.gather(
            gateway.request("DELETE", f"/sessions/{session_id}"),
            gateway.request("POST", f"/sessions/{session_id}/finish", {"reward": 1}),
        )
        assert (await gateway.request("GET", f"/sessions/{session_id}")).status == 404


async def test_the_label_is_part_of_the_request(fake: FakeSGLang, gateway: Gateway) -> None:
    """The same words from another role are another request."""
    session_id = await gateway.create()
    fake.script(sampled("hello world", seed=1, delay_s=0.02), sampled("hello", seed=2))
    body: Json = {"messages": [USER]}
    await asyncio.gather(
        gateway.post(session_id, body, {"X-Tokentape-Label": "main"}),
        gateway.post(session_id, body, {"X-Tokentape-Label": "subagent/a"}),
    )
    assert (await gateway.show(session_id))["labels"] == {"main": 1, "subagent/a": 1}


def test_the_memo_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is only ever refused must not fill the machine."""
    monkeypatch.setattr(memory, "_MEMO_BYTES", 100)
    memo = Memo()
    asked: list[int] = []

    def decode(number: int) -> int:
        asked.append(number)
        return number

    for _ in range(2):
        for number in range(5):
            assert memo.get("chat", b"%30d" % number, lambda number=number: decode(number)) == number
    assert asked == [0, 1, 2, 3, 4] * 2  # three fit: the oldest is always the next to be asked
    assert memo.get("chat", b"%30d" % 4, lambda: decode(4)) == 4
    assert memo.get("messages", b"%30d" % 4, lambda: decode(-4)) == -4
    assert asked[10:] == [-4]
