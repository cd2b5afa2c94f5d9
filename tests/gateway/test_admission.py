"""Who may begin a turn, who waits, who is turned away: fair between sessions, and bounded."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from gatewaykit import END, USER, Gateway, gateway_for, sampled, split
from tokentape.errors import LimitReached, Overloaded, TurnTimeout
from tokentape.gateway.admission import Admission, AdmissionLimits, Deadline
from tokentape.metrics import Metrics
from tokentape.testing import FakeSGLang, Reply

SLOW = Reply([*split("hello world", seed=1), END], delay_s=0.05)


class OfSession:
    """What a deadline asks of a session."""

    def __init__(self, session_id: str, left_s: float | None = None) -> None:
        self.session_id = session_id
        self.left_s = left_s

    def seconds_left(self) -> float | None:
        return self.left_s


def deadline(timeout_s: float | None = None, left_s: float | None = None) -> Deadline:
    session: Any = OfSession("s", left_s)
    return Deadline(session, timeout_s)


def admission(max_running: int = 1, max_waiting: int = 100, **limits: Any) -> Admission:
    return Admission(AdmissionLimits(max_running, max_waiting, **limits), Metrics())


async def in_order(one: Admission, sessions: str) -> str:
    """The sessions in the order in which they get a place that each gives back at once."""
    got: list[str] = []

    async def turn(session: str) -> None:
        await one.enter(session, deadline())
        got.append(session)
        await asyncio.sleep(0)
        one.leave()

    await one.enter("first", deadline())
    tasks = [asyncio.create_task(turn(session)) for session in sessions]
    await asyncio.sleep(0)
    one.leave()
    await asyncio.gather(*tasks)
    return "".join(got)


async def test_places_go_to_the_sessions_in_turn() -> None:
    assert await in_order(admission(), "aaaabbc") == "abcabaa"


async def test_no_place_is_lost_or_given_twice() -> None:
    one = admission(max_running=3, max_waiting=20)
    running = most = 0

    async def turn(number: int) -> None:
        nonlocal running, most
        await one.enter(f"s{number % 4}", deadline(0.02 if number % 5 == 0 else None))
        running += 1
        most = max(most, running)
        try:
            await asyncio.sleep(0.001 * (number % 7))
        finally:
            running -= 1
            one.leave()

    tasks = [asyncio.create_task(turn(number)) for number in range(60)]
    await asyncio.sleep(0.004)
    for task in tasks[::6]:
        task.cancel()
    done = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(one) for one in done} <= {type(None), Overloaded, TurnTimeout, asyncio.CancelledError}
    assert any(isinstance(one, Overloaded) for one in done)
    assert (most, running) == (3, 0)
    assert (one._num_running, one._num_waiting, one._queue) == (0, 0, {})


async def test_a_full_queue_turns_away_whoever_has_most_in_it() -> None:
    one = admission(max_waiting=3)
    await one.enter("a", deadline())
    greedy = [asyncio.create_task(one.enter("greedy", deadline())) for _ in range(3)]
    await asyncio.sleep(0)
    modest = asyncio.create_task(one.enter("modest", deadline()))
    await asyncio.sleep(0)
    with pytest.raises(Overloaded) as refused:  # the newest of the greedy one's
        await greedy[-1]
    assert refused.value.retry_after_s >= 1
    with pytest.raises(Overloaded):
        await one.enter("greedy", deadline())
    assert [task.done() for task in (*greedy, modest)] == [False, False, True, False]
    for _ in range(3):
        one.leave()
        await asyncio.sleep(0)
    assert all(task.done() for task in (*greedy, modest))


async def test_waiting_counts_for_the_deadline() -> None:
    one = admission()
    await one.enter("a", deadline())
    with pytest.raises(TurnTimeout):
        await one.enter("b", deadline(0.01))
    with pytest.raises(LimitReached):
        await one.enter("b", deadline(5.0, left_s=0.01))
    one.leave()
    await one.enter("b", deadline(0.01))  # the negative control: there is room


async def test_bodies_are_bounded_together() -> None:
    one = admission(max_request_bytes=100)
    with one.reading(1000), pytest.raises(Overloaded), one.reading(1):  # alone it may be larger than all
        pass
    with one.reading(60), one.reading(40), pytest.raises(Overloaded), one.reading(1):
        pass
    with one.reading(100):
        pass


@contextlib.asynccontextmanager
async def narrow(
    fake: FakeSGLang, model_dir: Path, store: Path, *limits: int, **more: Any
) -> AsyncGenerator[Gateway]:
    fake.responder = lambda _: SLOW
    admission = AdmissionLimits(*limits, **more)
    async with gateway_for(fake.url, model_dir, store, admission=admission) as gateway:
        yield gateway


async def test_a_429_says_when_to_come_again(fake: FakeSGLang, model_dir: Path, store: Path) -> None:
    async with narrow(fake, model_dir, store, 1, 1) as gateway:
        sessions = [await gateway.create() for _ in range(3)]
        body = {"model": "policy", "messages": [USER]}
        tasks = [asyncio.create_task(gateway.post(sessions[0], body))]
        await fake.until(lambda: bool(fake.requests))
        tasks.append(asyncio.create_task(gateway.post(sessions[1], body)))
        await asyncio.sleep(0.05)
        answer = await gateway.post(sessions[2], body)
        assert (answer.status, answer.headers["x-should-retry"]) == (429, "true")
        assert int(answer.headers["Retry-After"]) >= 1
        url = f"{gateway.url}/sessions/{sessions[2]}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="x", max_retries=0) as client:
            with pytest.raises(openai.RateLimitError, match="try again later"):
                await client.chat.completions.create(
                    model="policy", messages=[{"role": "user", "content": "u"}]
                )
        async with anthropic.AsyncAnthropic(base_url=url, api_key="x", max_retries=0) as claude:
            with pytest.raises(anthropic.RateLimitError):
                await claude.messages.create(
                    model="policy", max_tokens=9, messages=[{"role": "user", "content": "u"}]
                )
        assert [answer.status for answer in await asyncio.gather(*tasks)] == [200, 200]
        assert (await gateway.show(sessions[2]))["failures"] == {}  # nothing of it had begun
        assert (await gateway.post(sessions[2], body)).status == 200


async def test_an_sdk_that_is_turned_away_comes_again(fake: FakeSGLang, model_dir: Path, store: Path) -> None:
    async with narrow(fake, model_dir, store, 1, 0) as gateway:
        one, two = await gateway.create(), await gateway.create()
        first = asyncio.create_task(gateway.chat(one, [USER]))
        await fake.until(lambda: bool(fake.requests))
        async with gateway.openai(two, max_retries=4) as client:
            reply = await client.chat.completions.create(model="policy", messages=[USER])  # type: ignore[list-item]
        assert reply.choices[0].message.content == "hello world"
        await first
        assert (await gateway.show(two))["turns"] == 1


async def test_a_client_that_leaves_the_queue_frees_its_place(
    fake: FakeSGLang, model_dir: Path, store: Path
) -> None:
    async with narrow(fake, model_dir, store, 1, 1) as gateway:
        sessions = [await gateway.create() for _ in range(3)]
        body = {"model": "policy", "messages": [USER]}
        first = asyncio.create_task(gateway.post(sessions[0], body))
        await fake.until(lambda: bool(fake.requests))
        leaving = asyncio.create_task(gateway.post(sessions[1], body))
        await asyncio.sleep(0.05)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        await asyncio.sleep(0.05)
        assert (await gateway.post(sessions[2], body)).status == 200
        assert (await first).status == 200
        assert len(fake.requests) == 2


@pytest.mark.parametrize("stream", [False, True])
async def test_a_turn_has_its_time(fake: FakeSGLang, model_dir: Path, store: Path, stream: bool) -> None:
    async with narrow(fake, model_dir, store, turn_timeout_s=0.25) as gateway:
        fake.responder = None
        fake.script(Reply([*split("hello world " * 9, seed=1), END], delay_s=0.05), sampled("hello"))
        session_id = await gateway.create()
        body = {"model": "policy", "messages": [USER], "stream": stream}
        answer = await gateway.post(session_id, body)
        if stream:
            assert b"turn_timeout" in answer.body
        else:
            assert (answer.status, answer.body["error"]["code"]) == (504, "turn_timeout")
        assert (await gateway.show(session_id))["failures"] == {"turn_timeout": 1}
        await fake.until(lambda: bool(fake.aborts))
        assert (await gateway.chat(session_id, [USER]))["choices"][0]["message"]["content"] == "hello"
