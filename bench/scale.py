"""What a turn costs on SQLite, on PostgreSQL, and with Ray and its front before that: 8k tokens of context.

Latency is one agent's alone, CPU and turns per second those of 32. CPU is the gateway's, or the front's and
the replica's, and the database's beside it.
"""

import asyncio
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import servers
import uvloop
from driver import NEW_TOKENS, Agent, Http, Texts
from rich.console import Console
from rich.table import Table
from servers import Server

sys.path.append(str(Path(__file__).parent.parent / "chaos"))
from postgres import postgres

_SESSIONS, _TURNS, _ALONE, _CONTEXT, _ROUNDS = 32, 10, 40, 8_000, 5


@dataclass(slots=True)
class Way:
    """One way to serve; `gateway` and `database` are the processes' ids. A row of `seen` a round."""

    name: str
    server: Server
    url: str
    gateway: Callable[[], list[int]]
    database: Callable[[], list[int]] = list
    seen: list[tuple[float, float, float, float]] = field(default_factory=list)

    def figures(self) -> list[float]:
        """Latency ms, CPU ms of gateway and database, turns per second; the first round warms up."""
        return [statistics.median(column) for column in zip(*self.seen[1:], strict=True)]


def _titled(title: str) -> list[int]:
    """Processes whose command line begins so."""
    found: list[int] = []
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if (process / "cmdline").read_bytes().startswith(title.encode()):
                found.append(int(process.name))
    return found


async def _agent(way: Way, name: str, texts: Texts, stack: contextlib.ExitStack) -> Agent:
    http = await Http.open(way.url)
    stack.callback(http.close)
    await http.call("POST", "/sessions", msgspec.json.encode({"session_id": name}))
    return Agent(http, name, texts)


async def measure(way: Way, texts: Texts, first: str, round_: int) -> None:
    """One round."""
    with contextlib.ExitStack() as stack:
        alone = await _agent(way, f"r{round_}-alone", texts, stack)
        await alone.open(first)
        times: list[float] = []
        for _ in range(_ALONE):
            began = time.perf_counter()
            await alone.turn()
            times.append(time.perf_counter() - began)
        agents = [await _agent(way, f"r{round_}-{n}", texts, stack) for n in range(_SESSIONS)]
        await asyncio.gather(*(agent.open(first) for agent in agents))
        before = [sum(map(servers.cpu_s, pids())) for pids in (way.gateway, way.database)]
        began = time.perf_counter()

        async def run(agent: Agent) -> None:
            for _ in range(_TURNS):
                await agent.turn()

        await asyncio.gather(*map(run, agents))
        seconds, num_turns = time.perf_counter() - began, _SESSIONS * _TURNS
        after = [sum(map(servers.cpu_s, pids())) for pids in (way.gateway, way.database)]
        gateway, database = (1e3 * (b - a) / num_turns for a, b in zip(before, after, strict=True))
        way.seen.append((1e3 * statistics.median(times), gateway, database, num_turns / seconds))


async def run(console: Console, directory: Path) -> None:
    """All ways, by turns."""
    prepared = servers.prepare(directory)
    model, texts = prepared.model, Texts(prepared.tokenizer)
    first = texts.of(_CONTEXT - NEW_TOKENS * _TURNS // 2, seed=1)
    with contextlib.ExitStack() as stack:
        engine = servers.engine(directory)
        stack.callback(engine.stop)
        engine_url = engine.wait_ready()
        ways: list[Way] = []

        def start(name: str, store: Path | str, *more: str) -> Server:
            server = servers.gateway(store, directory, model, engine_url, *more)
            stack.callback(server.stop)
            ways.append(Way(name, server, server.wait_ready(), lambda: [server.pid]))
            return server

        start("SQLite", directory / "store.sqlite")
        for name, more in (("PostgreSQL", ()), ("Ray, front, PostgreSQL", ("--ray", "--replicas", "1"))):
            database = stack.enter_context(postgres())
            server = start(name, database.dsn, *more)
            ways[-1].database = database.pids
            if more:
                front, replicas = server.pid, _titled("ray::_Actor")
                ways[-1].gateway = lambda front=front, replicas=replicas: [front, *replicas]
        for round_ in range(_ROUNDS):
            for way in ways:
                await measure(way, texts, first, round_)
        table = Table("store", "ms/turn alone", "÷", "CPU ms/turn", "÷", "database's", "turns/s", "÷")
        base = ways[0].figures()
        for way in ways:
            latency, cpu, database_cpu, rate = way.figures()
            table.add_row(
                way.name,
                f"{latency:.2f}",
                f"{latency / base[0]:.2f}",
                f"{cpu:.2f}",
                f"{cpu / base[1]:.2f}",
                f"{database_cpu:.2f}",
                f"{rate:.0f}",
                f"{rate / base[3]:.2f}",
            )
        console.print(table)


def main() -> None:
    """Run."""
    with tempfile.TemporaryDirectory(prefix="tokentape-scale-") as directory:
        uvloop.run(run(Console(width=None if os.isatty(1) else 120), Path(directory)))


if __name__ == "__main__":
    main()
