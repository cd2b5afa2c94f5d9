"""What a session owes to callers that leave, and to memory."""

import asyncio

import pytest

from gatewaykit import Gateway
from tokentape.gateway.sessions import to_the_end
from tokentape.testing import FakeSGLang

USER = {"role": "user", "content": "hello"}


async def test_work_is_carried_to_its_end_however_often_the_caller_is_cancelled() -> None:
    go, done = asyncio.Event(), []

    async def work() -> str:
        await go.wait()
        done.append(True)
        return "result"

    task = asyncio.create_task(to_the_end(work()))
    for _ in range(3):
        await asyncio.sleep(0)
        task.cancel()
    await asyncio.sleep(0)
    assert not task.done()
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(done) == 1
    assert await to_the_end(work()) == "result"  # the negative control: nobody cancelled


async def test_errors_of_the_work_are_its_callers() -> None:
    async def work() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await to_the_end(work())


async def test_finished_sessions_leave_memory_and_can_be_read(fake: FakeSGLang, gateway: Gateway) -> None:
    session_id = await gateway.create()
    await gateway.chat(session_id, [USER])

    async def in_memory() -> bool:
        text = (await gateway.ok("GET", "/metrics")).decode()
        return "tokentape_sessions_in_memory 1.0" in text.splitlines()

    assert await in_memory()
    before = (await gateway.ok("GET", f"/sessions/{session_id}/samples"))["samples"]
    await gateway.ok("POST", f"/sessions/{session_id}/finish", {"reward": 0.5})
    assert not await in_memory()
    after = (await gateway.ok("GET", f"/sessions/{session_id}/samples"))["samples"]
    assert after == [{**row, "reward": 0.5} for row in before]
    assert not await in_memory()
    assert (await gateway.post(session_id, {"messages": [USER]})).status == 409


async def test_the_metadata_key_tokentape_is_taken(gateway: Gateway) -> None:
    answer = await gateway.request("POST", "/sessions", {"metadata": {"tokentape": 1}})
    assert answer.status == 400
    assert "tokentape" in answer.body["error"]["message"]
