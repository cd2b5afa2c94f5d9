"""Ctrl-C, and the bar on a terminal."""

import asyncio
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rolloutkit import Served

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
