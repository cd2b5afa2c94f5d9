"""`--workers 2` against one process: CPU per turn of all processes together, 32 sessions at 8k tokens.

The goal is 1.3. Turns per second say little where two cores also run the mock engine and the agents.
"""

import asyncio
import contextlib
import os
import tempfile
import time
from pathlib import Path

import msgspec
import servers
import uvloop
from driver import NEW_TOKENS, Agent, Http, Texts
from rich.console import Console
from rich.table import Table
from servers import Server

_SESSIONS, _TURNS, _CONTEXT, _ROUNDS = 32, 10, 8_000, 6


async def load(server: Server, url: str, texts: Texts, first: str, round_: int) -> tuple[float, float]:
    """CPU ms a turn, and turns per second."""
    async with contextlib.AsyncExitStack() as stack:
        agents: list[Agent] = []
        for number in range(_SESSIONS):
            http = await Http.open(url)
            stack.callback(http.close)
            name = f"r{round_}-{number}"
            # Over a connection of its own: the agent's belongs to the session's process from its first byte.
            control = await Http.open(url)
            await control.call("POST", "/sessions", msgspec.json.encode({"session_id": name}))
            control.close()
            agents.append(Agent(http, name, texts))
        await asyncio.gather(*(agent.open(first) for agent in agents))
        cpu_s, started = server.cpu_s(), time.perf_counter()

        async def run(agent: Agent) -> None:
            for _ in range(_TURNS):
                await agent.turn()

        await asyncio.gather(*map(run, agents))
        num_turns = _SESSIONS * _TURNS
        seconds = time.perf_counter() - started
        return 1e3 * (server.cpu_s() - cpu_s) / num_turns, num_turns / seconds


async def run(console: Console, directory: Path) -> None:
    """Both by turns."""
    prepared = servers.prepare(directory)
    model, texts = prepared.model, Texts(prepared.tokenizer)
    first = texts.of(_CONTEXT - NEW_TOKENS * _TURNS // 2, seed=1)
    with contextlib.ExitStack() as stack:
        engine = servers.engine(directory)
        stack.callback(engine.stop)
        engine_url = engine.wait_ready()
        started: dict[int, tuple[Server, str]] = {}
        for count in (1, 2):
            store = directory / f"store{count}.sqlite"
            server = servers.gateway(store, directory, model, engine_url, "--workers", str(count))
            stack.callback(server.stop)
            started[count] = server, server.wait_ready()
        measured: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
        for round_ in range(_ROUNDS):
            for count, (server, url) in started.items():
                measured[count].append(await load(server, url, texts, first, round_))
    table = Table("workers", "CPU ms/turn", "÷ one", "turns/s", title=f"{os.cpu_count()} cores")
    cpu = {count: sum(one[0] for one in rows[1:]) / (_ROUNDS - 1) for count, rows in measured.items()}
    for count, rows in measured.items():  # the first round warms up
        rate = sum(one[1] for one in rows[1:]) / (_ROUNDS - 1)
        table.add_row(str(count), f"{cpu[count]:.2f}", f"{cpu[count] / cpu[1]:.2f}", f"{rate:.0f}")
    console.print(table)


def main() -> None:
    """Run."""
    with tempfile.TemporaryDirectory(prefix="tokentape-workers-") as directory:
        uvloop.run(run(Console(width=None if os.isatty(1) else 120), Path(directory)))


if __name__ == "__main__":
    main()
