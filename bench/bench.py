"""`make bench`: what the gateway adds to a turn, against the floor and against rendering everything again.

All servers run at once and take turns being measured, so that a busy machine slows all of them; only ratios
within one run mean something. `--quick` checks that the bench works, in seconds.
"""

import argparse
import asyncio
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import servers
import uvloop
from driver import NEW_TOKENS, Agent, Http, Texts
from goals import Goal, plot, to_table
from mock_engine import Completion
from rich.console import Console
from rich.table import Table
from servers import Server

FLOOR, DISK, MEMORY, RERENDER = "floor", "tokentape", "… on tmpfs", "render all again"
_MEMORY_DIR = Path("/dev/shm")
_BUDGET_S = 18.0  # per plan; on a busy machine there are fewer sessions, not a longer run


@dataclass(frozen=True, slots=True)
class Plan:
    """`sessions` sessions of `turns` measured turns each, centred on `context` tokens.

    The context comes from one long first message, or, if `grown`, from many turns before the measured ones.
    """

    context: int
    turns: int
    sessions: int
    grown: bool = False

    @property
    def num_before(self) -> int:
        """Unmeasured tool turns."""
        return self.context // NEW_TOKENS - self.turns // 2 if self.grown else 0

    @property
    def num_first(self) -> int:
        """Tokens of the first message."""
        return 100 if self.grown else _start(self.context, self.turns)

    @property
    def label(self) -> str:
        """The row's name."""
        return f"{self.context:,}" + (f", {self.num_before} turns" if self.grown else "")


@dataclass(frozen=True, slots=True)
class Load:
    """`rounds` rounds of `sessions` sessions at once, each of `turns` turns centred on `context` tokens."""

    context: int
    turns: int
    sessions: int
    rounds: int


FULL = (
    *(Plan(2_000, 3, 60), Plan(8_000, 6, 30), Plan(32_000, 15, 12), Plan(128_000, 20, 8)),
    *(Plan(32_000, 15, 6, grown=True), Plan(128_000, 40, 2, grown=True)),
)
QUICK = (Plan(2_000, 3, 2), Plan(8_000, 3, 2, grown=True))


@dataclass(slots=True)
class Measured:
    """What was measured of one system in one place; `rates` are turns per second, one a round."""

    added_ms: list[float] = field(default_factory=list[float])
    cpu_s: float = 0.0
    num_turns: int = 0
    rates: list[float] = field(default_factory=list[float])

    @property
    def cpu_ms(self) -> float:
        """CPU per turn."""
        return 1e3 * self.cpu_s / max(self.num_turns, 1)

    def percentile(self, percent: int) -> float:
        """Of the added latency, ms."""
        ranked = sorted(self.added_ms)
        return ranked[min(len(ranked) - 1, len(ranked) * percent // 100)]


@dataclass(slots=True)
class System:
    """One measured server. `extends`: every prompt began with the prompt before and what was sampled."""

    name: str
    server: Server
    url: str
    http: Http
    extends: bool = True
    single: dict[str, Measured] = field(default_factory=dict[str, Measured])
    loaded: Measured = field(default_factory=Measured)


class Bench:
    """The measurements. `engine` is a connection to the mock engine."""

    def __init__(self, engine: Http, texts: Texts, completion: Completion) -> None:
        self._engine = engine
        self._texts = texts
        self._sampled = msgspec.json.encode(completion.ids)[1:-1]
        self._firsts: dict[int, str] = {}
        self._num_sessions = 0

    async def check(self, system: System) -> None:
        """Warm up, and see whether each prompt extends the one before token by token."""
        agent = await self._agent(system, system.http)
        await agent.open(self._first(1_000))
        before = await self._engine.call("GET", "/last")
        for _ in range(20):
            await agent.turn()
            now = await self._engine.call("GET", "/last")
            system.extends &= now.startswith(before[:-1] + b"," + self._sampled + b",")
            before = now

    async def single(self, systems: Sequence[System], plan: Plan) -> None:
        """One session at a time, the systems by turns."""
        ends = time.monotonic() + _BUDGET_S
        for session in range(plan.sessions):
            if session and time.monotonic() > ends:
                break
            for system in systems:
                if system.name == RERENDER and (session % 10 or plan.grown):
                    continue  # it takes long, and all messages cost it alike
                turns = min(plan.turns, 8) if system.name == RERENDER else plan.turns
                measured = system.single.setdefault(plan.label, Measured())
                agent = await self._agent(system, system.http)
                await agent.open(self._first(plan.num_first))
                await _turns(agent, plan.num_before)
                await self._engine.call("GET", "/times")
                agent.latencies_ns.clear()
                cpu_s = system.server.cpu_s()
                await _turns(agent, turns)
                measured.cpu_s += system.server.cpu_s() - cpu_s
                measured.num_turns += turns
                own_ns: list[int] = msgspec.json.decode(await self._engine.call("GET", "/times"))
                pairs = zip(agent.latencies_ns, own_ns, strict=True)
                measured.added_ms += [(latency - own) / 1e6 for latency, own in pairs]

    async def memory(self, system: System, sessions: int, context: int) -> float:
        """Bytes that the server keeps for a token of a session's tree, all it keeps of a session included."""
        agents = [await self._agent(system, system.http) for _ in range(sessions)]
        num_tokens, before = 0, system.server.rss()
        for agent in agents:
            await agent.open(self._first(context))
            await _turns(agent, 2)
            num_tokens += (await self._engine.call("GET", "/last")).count(b",") + len(
                self._sampled.split(b",")
            )
        await self._engine.call("GET", "/times")
        return (system.server.rss() - before) / num_tokens

    async def stall(self, system: System, context: int) -> tuple[float, float]:
        """The longest that a question waits, in ms: while nothing happens, and while a long session opens."""
        beside = await Http.open(system.url)
        worst: list[float] = []
        for busy in (False, True):
            agent = await self._agent(system, system.http)
            opening = asyncio.create_task(agent.open(self._first(context)) if busy else asyncio.sleep(0.2))
            longest = 0.0
            while not opening.done():
                started = time.perf_counter()
                await beside.call("GET", "/healthz")
                longest = max(longest, time.perf_counter() - started)
                await asyncio.sleep(0.001)
            await opening
            worst.append(1e3 * longest)
        beside.close()
        await self._engine.call("GET", "/times")
        return worst[0], worst[1]

    async def load(self, systems: Sequence[System], load: Load) -> None:
        """Many sessions at once."""
        ends = time.monotonic() + _BUDGET_S
        for number in range(load.rounds):
            if number and time.monotonic() > ends:
                break
            for system in systems:
                if system.name == RERENDER and number:
                    continue
                turns = 2 if system.name == RERENDER else load.turns  # it takes long
                first = self._first(_start(load.context, turns))
                async with contextlib.AsyncExitStack() as stack:
                    agents: list[Agent] = []
                    for _ in range(load.sessions):
                        http = await Http.open(system.url)
                        stack.callback(http.close)
                        agents.append(await self._agent(system, http))
                    await asyncio.gather(*(agent.open(first) for agent in agents))
                    cpu_s, started = system.server.cpu_s(), time.perf_counter()
                    await asyncio.gather(*(_turns(agent, turns) for agent in agents))
                    num_turns = load.sessions * turns
                    system.loaded.rates.append(num_turns / (time.perf_counter() - started))
                    system.loaded.cpu_s += system.server.cpu_s() - cpu_s
                    system.loaded.num_turns += num_turns
        await self._engine.call("GET", "/times")

    async def _agent(self, system: System, http: Http) -> Agent:
        self._num_sessions += 1
        session_id = f"bench-{self._num_sessions}"
        if system.name in (DISK, MEMORY):
            await http.call("POST", "/sessions", msgspec.json.encode({"session_id": session_id}))
        return Agent(http, session_id, self._texts)

    def _first(self, num_tokens: int) -> str:
        if num_tokens not in self._firsts:
            self._firsts[num_tokens] = self._texts.of(num_tokens, seed=num_tokens)
        return self._firsts[num_tokens]


async def _turns(agent: Agent, num_turns: int) -> None:
    for _ in range(num_turns):
        await agent.turn()


def _start(context: int, num_turns: int) -> int:
    """The length of a first message after which the measured turns lie around `context`."""
    return max(100, context - 400 - NEW_TOKENS * (num_turns + 1) // 2)


def _single_table(systems: Sequence[System]) -> Table:
    table = Table(title="one session: added latency, and the server's CPU, per turn")
    table.add_column("context", justify="right")
    table.add_column("system")
    for name in ("p10 ms", "÷ floor", "p50 ms", "÷ floor", "p99 ms", "CPU ms", "÷ floor", "turns"):
        table.add_column(name, justify="right")
    for label, floor in systems[0].single.items():
        measured = [system for system in systems if label in system.single]
        for system in measured:
            of = system.single[label]
            table.add_row(
                label if system is systems[0] else "",
                system.name,
                f"{of.percentile(10):.2f}",
                f"{of.percentile(10) / floor.percentile(10):.1f}",
                f"{of.percentile(50):.2f}",
                f"{of.percentile(50) / floor.percentile(50):.1f}",
                f"{of.percentile(99):.2f}",
                f"{of.cpu_ms:.2f}",
                f"{of.cpu_ms / floor.cpu_ms:.1f}",
                str(of.num_turns),
                end_section=system is measured[-1],
            )
    return table


def _load_table(systems: Sequence[System], load: Load) -> Table:
    table = Table(title=f"{load.sessions} sessions at once, {load.context:,} tokens")
    table.add_column("system")
    for name in ("turns/s", "of the floor's", "CPU ms/turn", "CPU ÷ floor"):
        table.add_column(name, justify="right")
    table.add_column("extends sampled ids")
    floor = systems[0].loaded
    for system in systems:
        rate = statistics.median(system.loaded.rates)
        table.add_row(
            system.name,
            f"{rate:.0f}",
            f"{rate / statistics.median(floor.rates):.0%}",
            f"{system.loaded.cpu_ms:.2f}",
            f"{system.loaded.cpu_ms / floor.cpu_ms:.1f}",
            "yes" if system.extends else "no",
        )
    return table


def _goals(systems: Sequence[System], bytes_per_token: float, stall_ms: float) -> list[Goal]:
    of = {system.name: system for system in systems}
    floor, ours, again = of[FLOOR], of[DISK], of[RERENDER]
    goals = [
        Goal(
            f"added latency at {label}, ÷ floor",
            here.percentile(50) / floor.single[label].percentile(50),
            most=2,
        )
        for label, here in ours.single.items()
    ]
    small, large = "8,000", "128,000"
    rates = [statistics.median(one.loaded.rates) for one in (ours, floor)]
    goals.append(Goal("turns per second, 32 sessions at 8k, of the floor's", rates[0] / rates[1], least=0.5))
    if large in ours.single:
        growth = [one.single[large].cpu_ms / one.single[small].cpu_ms for one in (ours, floor)]
        goals.append(Goal("growth of CPU from 8k to 128k, ÷ floor's", growth[0] / growth[1], most=1))
        less = again.single["32,000"].cpu_ms / ours.single["32,000"].cpu_ms
        goals.append(Goal("CPU of rendering all again at 32k, ÷ tokentape", less, least=20))
    goals.append(Goal("memory of a session, per token", bytes_per_token, " bytes", most=16))
    goals.append(Goal("longest pause of the event loop, 128k tokens at once", stall_ms, " ms", most=20))
    return goals


def _sync_ms(directory: Path) -> float:
    """What one durable write of a turn's size costs here: p50 of 50."""
    times: list[float] = []
    with (directory / "sync").open("wb", buffering=0) as file:
        for _ in range(50):
            file.write(bytes(8192))
            started = time.perf_counter()
            os.fdatasync(file.fileno())
            times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)


async def run(
    console: Console,
    directory: Path,
    memory: Path | None,
    chosen: Path | None,
    quick: bool,
    picture: Path | None,
) -> None:
    """Start everything, measure, print."""
    prepared = servers.prepare(directory, chosen)
    model, tokenizer, completion = prepared.model, prepared.tokenizer, prepared.completion
    plans = QUICK if quick else FULL
    load = Load(8_000, 3, 4, 1) if quick else Load(8_000, 10, 32, 3)
    cores = f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    console.print(
        f"tokenizer and template: {prepared.name}; {cores}; fdatasync here: {_sync_ms(directory):.2f} ms"
    )
    with contextlib.ExitStack() as stack:
        engine = servers.engine(directory)
        stack.callback(engine.stop)
        engine_url = engine.wait_ready()
        started = {
            FLOOR: servers.baseline("floor", directory, model, engine_url),
            DISK: servers.gateway(directory / "disk.sqlite", directory, model, engine_url),
            RERENDER: servers.baseline("rerender", directory, model, engine_url),
        }
        if memory is not None:
            started[MEMORY] = servers.gateway(memory / "memory.sqlite", directory, model, engine_url)
        for server in started.values():
            stack.callback(server.stop)
        systems = [
            System(name, started[name], url, await Http.open(url))
            for name in (FLOOR, DISK, MEMORY, RERENDER)
            if name in started
            for url in [started[name].wait_ready()]
        ]
        bench = Bench(await Http.open(engine_url), Texts(tokenizer), completion)
        for system in systems:
            await bench.check(system)
        for plan in plans:
            await bench.single(systems, plan)
        await bench.load(systems, load)
        ours = next(system for system in systems if system.name == DISK)
        bytes_per_token = await bench.memory(ours, *((2, 2_000) if quick else (24, 32_000)))
        idle_ms, stall_ms = await bench.stall(ours, 2_000 if quick else 128_000)
    console.print(_single_table(systems), _load_table(systems, load))
    console.print(to_table(_goals(systems, bytes_per_token, stall_ms)))
    console.print(f"longest answer to a question while nothing happens: {idle_ms:.1f} ms")
    if picture is not None:
        shown = [system for system in systems if system.name != MEMORY]
        latencies = {
            system.name: {
                plan.context: system.single[plan.label].percentile(50) for plan in plans if not plan.grown
            }
            for system in shown
        }
        rates = {system.name: statistics.median(system.loaded.rates) for system in shown}
        plot(picture, latencies, rates, f"{datetime.now(UTC):%Y-%m-%d}, {cores}")


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few turns: does the bench work?")
    parser.add_argument("--model", type=Path, help="a model directory (ChatML with tools, as Qwen's)")
    parser.add_argument("--plot", type=Path, help="write a picture of it")
    options = parser.parse_args()
    console = Console(width=None if os.isatty(1) else 120)
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tokentape-bench-")))
        memory = None
        if _MEMORY_DIR.is_dir():
            memory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=_MEMORY_DIR)))
        uvloop.run(run(console, directory, memory, options.model, options.quick, options.plot))
    console.print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
