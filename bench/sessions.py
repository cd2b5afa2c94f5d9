"""Many sessions: start-up behind a large store, listing, and 10,000 open sessions of which 1,000 are at work.

`python bench/sessions.py [--quick] [--postgres]`. The store is filled through its own interface. An SQLite
file is not closed by the process that filled it: the gateway starts behind a crash.
"""

import argparse
import asyncio
import contextlib
import os
import statistics
import sys
import tempfile
import time
from array import array
from collections.abc import Sequence
from pathlib import Path

import msgspec
import servers
import uvloop
from driver import Agent, Http, Texts
from rich.console import Console
from rich.table import Table

from tokentape.store import SessionRecord
from tokentape.stores import is_shared, open_store
from tokentape.tape import BranchReason, LogprobBasis, Origin, Turn
from tokentape.tokenizer import Tokenizer
from tokentape.types import Message, Sampling, TokenRun, VersionSpan

sys.path.append(str(Path(__file__).parent.parent / "chaos"))
from postgres import Postgres, postgres

_BATCH = 500
_AT_ONCE = 64


def made_up(turn_id: str, prompt: TokenRun, text: str) -> Turn:
    """A turn of `prompt` and 64 sampled tokens."""
    return Turn(
        turn_id=turn_id,
        parent_id=None,
        branch_reason=BranchReason.ROOT,
        prompt=prompt,
        completion=TokenRun(range(64)),
        logprobs=array("f", [-0.5] * 64),
        versions=(VersionSpan("1", 0, 64),),
        logprob_basis=LogprobBasis.SAMPLED,
        support=None,
        routed_experts=None,
        finish_reason="stop",
        stop_id=63,
        messages=(Message("user", text),),
        reply=Message("assistant", "hello"),
        in_reasoning=False,
        parse_status="ok",
        attempts=(),
        tools=(),
        arguments={},
        sampling=Sampling(),
        neutralised=(),
        superseded=(),
        origin=Origin("chat", turn_id, turn_id),
        num_cached_tokens=0,
        created_at=0.0,
    )


async def fill(where: Path | str, tokenizer: Tokenizer, texts: Texts, num_sessions: int) -> None:
    """A store with this many open sessions of one turn, about 10 kB each."""
    store = open_store(where, tokenizer=tokenizer.fingerprint)
    text = texts.of(1_000, seed=1)
    prompt = TokenRun(tokenizer.encode(text))
    for start in range(0, num_sessions, _BATCH):
        names = [f"old-{number:06}" for number in range(start, min(start + _BATCH, num_sessions))]
        await asyncio.gather(*(store.put_session(SessionRecord(name, "open", 0.0)) for name in names))
        await asyncio.gather(*(store.put_turns(name, [made_up(f"t-{name}", prompt, text)]) for name in names))

    if is_shared(where):
        await store.aclose()  # or its lease would have to run out first


def size_of(directory: Path) -> int:
    """Bytes of the store's files."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


async def timed(http: Http, path: str) -> float:
    """p50 of ten questions, ms."""
    times: list[float] = []
    for _ in range(10):
        started = time.perf_counter()
        await http.call("GET", path)
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)


async def work(url: str, texts: Texts, sessions: Sequence[str], turns: int) -> list[int]:
    """All sessions take their turns, some at a time; latencies in ns."""
    latencies: list[int] = []
    first = texts.of(2_000, seed=2)
    slots = asyncio.Semaphore(_AT_ONCE)

    async def one(session_id: str) -> None:
        async with slots:
            http = await Http.open(url)
            agent = Agent(http, session_id, texts)
            await agent.open(first)
            for _ in range(turns):
                await agent.turn()
            http.close()
            latencies.extend(agent.latencies_ns)

    await asyncio.gather(*map(one, sessions))
    return latencies


async def run(console: Console, directory: Path, database: Postgres | None, *, quick: bool) -> None:
    """Fill, start, ask, work; print."""
    num_stored, num_open, num_active = (1_000, 200, 50) if quick else (100_000, 10_000, 1_000)
    prepared = servers.prepare(directory)
    model, texts = prepared.model, Texts(prepared.tokenizer)
    files = directory / "store" if database is None else database.directory
    files.mkdir(exist_ok=True)
    store = files / "store.sqlite" if database is None else database.dsn
    started = time.perf_counter()
    await fill(store, Tokenizer(model / "tokenizer.json"), texts, num_stored)
    filled_s, size = time.perf_counter() - started, size_of(files)
    table = Table("what", "figure", title=f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    table.add_row("sessions in the store", f"{num_stored:,}, {size / 2**30:.2f} GB, in {filled_s:.0f} s")
    with contextlib.ExitStack() as stack:
        engine = servers.engine(directory)
        stack.callback(engine.stop)
        engine_url = engine.wait_ready()
        started = time.perf_counter()
        gateway = servers.gateway(store, directory, model, engine_url)
        stack.callback(gateway.stop)
        url = gateway.wait_ready()
        table.add_row(
            "start-up behind them, tokenizer and template included", f"{time.perf_counter() - started:.2f} s"
        )
        empty = gateway.rss()
        table.add_row("memory after start-up", f"{empty / 2**20:.0f} MB")
        http = await Http.open(url)
        for name, path in (
            ("first 100", "/sessions"),
            ("100 from the middle", f"/sessions?after=old-{num_stored // 2:06}"),
            ("finished ones, of which there are none", "/sessions?state=finished"),
        ):
            table.add_row(f"GET /sessions: {name}", f"{await timed(http, path):.1f} ms")
        started = time.perf_counter()
        names = [f"new-{number}" for number in range(num_open)]
        for name in names:
            await http.call("POST", "/sessions", msgspec.json.encode({"session_id": name}))
        table.add_row(f"{num_open:,} sessions created", f"{time.perf_counter() - started:.1f} s")
        before = gateway.rss()
        table.add_row("memory with them", f"{before / 2**20:.0f} MB")
        started = time.perf_counter()
        ranked = sorted(await work(url, texts, names[:num_active], 4))
        seconds = time.perf_counter() - started
        table.add_row(
            f"{num_active:,} of them at work, {_AT_ONCE} at a time, 5 turns each at 2k to 4k tokens",
            f"{len(ranked) / seconds:.0f} turns/s, p50 {ranked[len(ranked) // 2] / 1e6:.0f} ms, "
            f"p99 {ranked[len(ranked) * 99 // 100] / 1e6:.0f} ms",
        )
        table.add_row("memory after that", f"{gateway.rss() / 2**20:.0f} MB")
        started = time.perf_counter()
        for number in range(0, num_stored, num_stored // 100):
            await http.call("GET", f"/sessions/old-{number:06}")
        table.add_row("an old session comes back", f"{10 * (time.perf_counter() - started):.1f} ms")
    console.print(table)


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few sessions: does it work?")
    parser.add_argument("--postgres", action="store_true", help="in PostgreSQL in place of SQLite")
    options = parser.parse_args()
    console = Console(width=None if os.isatty(1) else 120)
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="tokentape-sessions-"))
        database = stack.enter_context(postgres()) if options.postgres else None
        uvloop.run(run(console, Path(directory), database, quick=options.quick))


if __name__ == "__main__":
    main()
