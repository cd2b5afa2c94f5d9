"""`tokentape serve` as a process of its own."""

import asyncio
import contextlib
import sys
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path

START_S = 60.0


@dataclass
class Process:
    """A running command: `url` is what it printed, `stdout` all of it."""

    process: asyncio.subprocess.Process
    url: str
    stdout: list[str]
    log: Path

    async def ended(self) -> int:
        assert self.process.stdout is not None
        self.stdout += [line.decode() async for line in self.process.stdout]
        return await self.process.wait()


async def run(*arguments: str) -> tuple[int, str, str]:
    """A command that ends by itself: its exit code, stdout and stderr."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tokentape", *arguments, stdout=pipe, stderr=pipe
    )
    async with asyncio.timeout(START_S):
        stdout, stderr = await process.communicate()
    assert process.returncode is not None
    return process.returncode, stdout.decode(), stderr.decode()


@contextlib.asynccontextmanager
async def serving(log: Path, *arguments: str) -> AsyncGenerator[Process]:
    """A command that says where it listens; killed on the way out if it still runs."""
    with log.open("ab") as stderr:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tokentape", *arguments, stdout=asyncio.subprocess.PIPE, stderr=stderr
        )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(START_S):
            line = (await process.stdout.readline()).decode()
        assert line.startswith("listening on http://127.0.0.1:"), line
        yield Process(process, line.removeprefix("listening on ").strip(), [line], log)
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()
