"""`make soak`: full load for half an hour, and whether anything of the gateway grows with it.

Sessions of the bench's agents at about 8,000 tokens, against its mock engine: each takes a few tool turns,
is finished, and another begins. Every ten seconds the gateway's process is looked at. At the end a line is
fitted to each figure: what has grown by more than its limit over the run is not flat, and the exit code is 1.
"""

import argparse
import asyncio
import contextlib
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import uvloop
from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).parent.parent / "bench"))
import servers
from driver import NEW_TOKENS, Agent, Http, Texts

_CONTEXT = 8_000
_TURNS = 7  # of a session, around that context
_WARM_UP = 0.25  # of the run: caches fill, the allocator takes what it will keep
_ROWS = 12  # of the printed table
_PAGE = os.sysconf("SC_PAGE_SIZE")

LIMITS = {
    "RSS MB": (0.05, 8.0),
    "descriptors": (0.0, 2.0),
    "threads": (0.0, 1.0),
    "p50 ms": (0.15, 0.5),
    "p99 ms": (0.50, 5.0),
}
"""What a figure may grow by over the run: this share of its mean, or this much, whichever is more."""


@dataclass(frozen=True, slots=True)
class Seen:
    """The gateway at one time: `figures` by name, and how many turns and sessions it has served by then."""

    at_s: float
    num_turns: int
    num_sessions: int
    store_mb: float
    log_mb: float
    figures: dict[str, float]


class Soak:
    """The load, and what is seen of the gateway under it."""

    def __init__(self, url: str, pid: int, store: Path, log: Path, texts: Texts) -> None:
        self.seen: list[Seen] = []
        self._url = url
        self._pid = pid
        self._store = store
        self._log = log
        self._texts = texts
        self._first = texts.of(max(100, _CONTEXT - 400 - NEW_TOKENS * (_TURNS + 1) // 2), seed=1)
        self._latencies_ms: list[float] = []
        self._num_turns = self._num_sessions = 0
        self._started = time.monotonic()

    async def load(self, number: int, ends: float) -> None:
        """One session after another on one connection."""
        http = await Http.open(self._url)
        with contextlib.closing(http):
            for count in itertools.count():
                session_id = f"soak-{number}-{count}"
                await http.call("POST", "/sessions", msgspec.json.encode({"session_id": session_id}))
                agent = Agent(http, session_id, self._texts)
                await agent.open(self._first)
                for _ in range(_TURNS - 1):
                    await agent.turn()
                await http.call("POST", f"/sessions/{session_id}/finish", b'{"reward":1.0}')
                self._latencies_ms += [latency / 1e6 for latency in agent.latencies_ns]
                self._num_turns += _TURNS
                self._num_sessions += 1
                if time.monotonic() > ends:
                    return

    async def watch(self, ends: float, every_s: float) -> None:
        """Look at the gateway until the end."""
        while time.monotonic() < ends:
            await asyncio.sleep(every_s)
            window, self._latencies_ms = sorted(self._latencies_ms), []
            if not window:
                continue
            process = Path(f"/proc/{self._pid}")
            figures = {
                "RSS MB": int((process / "statm").read_text().split()[1]) * _PAGE / 2**20,
                "descriptors": float(len(list((process / "fd").iterdir()))),
                "threads": float(len(list((process / "task").iterdir()))),
                "p50 ms": window[len(window) // 2],
                "p99 ms": window[len(window) * 99 // 100],
            }
            stored = sum(file.stat().st_size for file in self._store.parent.glob(f"{self._store.name}*"))
            at_s, log = time.monotonic() - self._started, self._log.stat().st_size
            self.seen.append(
                Seen(at_s, self._num_turns, self._num_sessions, stored / 2**20, log / 2**20, figures)
            )


def growth(seen: Sequence[Seen], name: str) -> tuple[float, float]:
    """What a figure has grown by, on the line through its values behind the warm-up; and its mean."""
    kept = seen[int(len(seen) * _WARM_UP) :]
    times = [one.at_s for one in kept]
    values = [one.figures[name] for one in kept]
    slope, _ = statistics.linear_regression(times, values)
    return slope * (times[-1] - times[0]), statistics.fmean(values)


def is_flat(seen: Sequence[Seen], name: str) -> bool:
    """Whether it stays within its limit."""
    share, least = LIMITS[name]
    grown, mean = growth(seen, name)
    return grown <= max(share * mean, least)


def report(console: Console, seen: Sequence[Seen]) -> bool:
    """Print what was seen; whether all of it is flat."""
    table = Table(title="soak")
    names = ["minutes", "sessions", "turns", *LIMITS, "store MB", "log MB"]
    for name in names:
        table.add_column(name, justify="right")
    for one in seen[:: max(1, len(seen) // _ROWS)]:
        figures = [f"{one.figures[name]:.1f}" for name in LIMITS]
        counts = [f"{one.at_s / 60:.1f}", f"{one.num_sessions:,}", f"{one.num_turns:,}"]
        table.add_row(*counts, *figures, f"{one.store_mb:.0f}", f"{one.log_mb:.1f}")
    trend = Table(title=f"trend behind the first {_WARM_UP:.0%} of the run")
    for name in ("figure", "mean", "grown by", "allowed", "verdict"):
        trend.add_column(name, justify="right" if name != "verdict" else "left")
    flat = {name: is_flat(seen, name) for name in LIMITS}
    for name, (share, least) in LIMITS.items():
        grown, mean = growth(seen, name)
        allowed = f"{max(share * mean, least):.1f}"
        trend.add_row(name, f"{mean:.1f}", f"{grown:+.2f}", allowed, "flat" if flat[name] else "GROWS")
    console.print(table, trend)
    return all(flat.values())


async def run(console: Console, directory: Path, options: argparse.Namespace) -> int:
    """Start everything, load it, look at it; the exit code."""
    prepared, minutes = servers.prepare(directory), options.minutes
    console.print(
        f"soak: {options.sessions} sessions, {minutes:g} minutes; tokenizer and template: {prepared.name}"
    )
    store = directory / "soak.sqlite"
    with contextlib.ExitStack() as stack:
        engine = servers.engine(directory)
        stack.callback(engine.stop)
        gateway = servers.gateway(store, directory, prepared.model, engine.wait_ready())
        stack.callback(gateway.stop)
        log = directory / "gateway-soak.log"
        soak = Soak(gateway.wait_ready(), gateway.pid, store, log, Texts(prepared.tokenizer))
        ends = time.monotonic() + minutes * 60
        async with asyncio.TaskGroup() as group:
            group.create_task(soak.watch(ends, min(10.0, minutes * 60 / 12)))
            for number in range(options.sessions):
                group.create_task(soak.load(number, ends))
    return 0 if report(console, soak.seen) else 1


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--sessions", type=int, default=32, help="at a time")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tokentape-soak-") as directory:
        code = uvloop.run(run(Console(width=120), Path(directory), options))
    sys.exit(code)


if __name__ == "__main__":
    main()
