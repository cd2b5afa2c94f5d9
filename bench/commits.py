"""What a store carries: commits of one session behind each other, and of 64 side by side, by a turn's size.

A turn has a prompt of 200 new tokens and so many sampled ones; experts are 48 layers of 8, one byte each.
"""

import asyncio
import contextlib
import dataclasses
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import uvloop
from rich.console import Console
from rich.table import Table
from sessions import made_up

from tokentape.store import SessionRecord, Store
from tokentape.stores import open_store
from tokentape.tape import Turn
from tokentape.types import RoutedExperts, TokenRun

sys.path.append(str(Path(__file__).parent.parent / "chaos"))
from postgres import postgres

_EXPERTS = 48 * 8
_WRITERS, _EACH = 64, 20
_SIZES = {
    "200": (200, False),
    "2,000": (2_000, False),
    "16,000": (16_000, False),
    "2,000, experts": (2_000, True),
}


def a_turn(name: str, num_tokens: int, *, experts: bool) -> Turn:
    """One of this size."""
    turn = made_up(name, TokenRun(range(200)), "hello " * 40)
    routed = RoutedExperts(os.urandom(num_tokens * _EXPERTS), "uint8", _EXPERTS) if experts else None
    ids = TokenRun(range(num_tokens))
    logprobs = turn.logprobs[:1] * num_tokens
    return dataclasses.replace(turn, completion=ids, logprobs=logprobs, routed_experts=routed)


async def measure(store: Store, size: str) -> tuple[float, float, float]:
    """A commit's ms alone; commits per second, and MB per second, of all writers."""
    num_tokens, experts = _SIZES[size]
    names = [f"{size}-{n}" for n in range(_WRITERS)]
    for name in names:
        await store.put_session(SessionRecord(name, "open", 0.0))
    alone: list[float] = []
    for n in range(100):
        turn = a_turn(f"{size}-a{n}", num_tokens, experts=experts)
        began = time.perf_counter()
        await store.put_turns(names[0], [turn])
        alone.append(time.perf_counter() - began)
    turns = {
        name: [a_turn(f"{name}-{n}", num_tokens, experts=experts) for n in range(_EACH)] for name in names
    }

    async def write(name: str) -> None:
        for turn in turns[name]:
            await store.put_turns(name, [turn])

    began = time.perf_counter()
    await asyncio.gather(*map(write, names))
    rate = _WRITERS * _EACH / (time.perf_counter() - began)
    num_bytes = num_tokens * (8 + (_EXPERTS if experts else 0))
    return 1e3 * statistics.median(alone), rate, rate * num_bytes / 2**20


async def run(console: Console, directory: Path) -> None:
    """Both stores."""
    table = Table("store", "sampled tokens", "ms alone", "commits/s by 64", "MB/s")
    with contextlib.ExitStack() as stack:
        database = stack.enter_context(postgres())
        for name, where in (("SQLite", directory / "store.sqlite"), ("PostgreSQL", database.dsn)):
            store = open_store(where)
            for size in _SIZES:
                alone, rate, volume = await measure(store, size)
                table.add_row(name, size, f"{alone:.2f}", f"{rate:.0f}", f"{volume:.1f}")
            await store.aclose()
    console.print(table)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="tokentape-commits-") as temporary:
        uvloop.run(run(Console(width=None if os.isatty(1) else 120), Path(temporary)))
