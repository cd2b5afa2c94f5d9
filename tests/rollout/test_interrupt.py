"""Ctrl-C, and the bar on a terminal."""

import asyncio
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rolloutkit import Served, away, rollouts, until

from tokentape.rollout import Episode
from tokentape.rollout.progress import Watch

DRIVER = """
import asyncio, sys
from rolloutkit import solve, rollouts, turn

async def episode(task, episode):
    await turn(episode)
    print("turn", flush=True)
    await asyncio.sleep(60)

async def main():
    async with rollouts(episode, range(3), sys.argv[1], group_size=2, concurrency=6) as groups:
        async for _ in groups:
            pass

def blocking():
    with rollouts(episode, range(3), sys.argv[1], group_size=2, concurrency=6) as groups:
        for _ in groups:
            pass

asyncio.run(main()) if sys.argv[2] == "async" else blocking()
"""


@pytest.mark.parametrize("how", ["async", "blocking"])
async def test_an_interrupt_leaves_nothing(served: Served, how: str) -> None:
    here = Path(__file__).parent
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        DRIVER,
        served.gateway.url,
        how,
        env={"PYTHONPATH": ":".join(map(str, (here, here.parent, here.parents[1] / "src")))},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    async with asyncio.timeout(30):
        for _ in range(6):
            assert await process.stdout.readline() == b"turn\n"
        process.send_signal(signal.SIGINT)
        _, err = await process.communicate()
    assert process.returncode != 0
    assert err.decode().strip().endswith("KeyboardInterrupt")
    await served.check([])


@pytest.mark.parametrize(("fails", "call"), [(True, "DELETE"), (False, "POST finish")])
async def test_who_leaves_does_not_wait_for_a_gateway_that_is_away(
    fails: bool, call: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tokentape.rollout.attempt._GIVE_UP_S", 0.3)

    async def episode(task: Any, episode: Episode) -> float:
        if fails:
            raise RuntimeError
        return 1.0

    async with away() as (url, asked):
        async with rollouts(episode, [0], url, gateway_timeout_s=60.0):
            await until(lambda: any(one.startswith(call) for one in asked))
            started = time.monotonic()
        assert 0.2 < time.monotonic() - started < 5
    assert "a session may stay open" in caplog.text


async def test_who_leaves_waits_until_a_session_is_deleted(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though not for ever, a call is not cut off at once: the gateway may only be slow."""
    from tokentape.rollout.control import Control

    begun, delete = asyncio.Event(), Control.delete

    async def slow(self: Control, session_id: str, **options: Any) -> None:
        begun.set()
        await asyncio.sleep(0.5)
        await delete(self, session_id, **options)

    async def episode(task: Any, episode: Episode) -> float:
        raise RuntimeError

    monkeypatch.setattr(Control, "delete", slow)
    async with served.rollouts(episode, [0]):
        await begun.wait()
    await served.check([])


@pytest.mark.parametrize("terminal", [True, False])
def test_the_bar_is_for_terminals(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], terminal: bool
) -> None:
    monkeypatch.setenv("FORCE_COLOR" if terminal else "NO_COLOR", "1")
    with Watch(shown=True, total=4) as watch:
        watch.skipped(2)
        watch.failed()
        watch.finished(0.5)
        watch.finished(1.0)
        watch.ready(0)
    said = capsys.readouterr()
    assert said.out == ""
    if terminal:
        assert "4/4" in said.err
        assert "2 groups, mean reward 0.75, 1 attempts failed" in said.err
    else:
        assert said.err == ""
