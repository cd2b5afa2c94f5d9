"""A simulation of 100,000 concurrent sessions on N replicas and one PostgreSQL, one of the replicas killed.

Every session belongs to a replica, which is one core that does one thing at a time. A turn costs it CPU
before the engine and behind it, then a commit; between turns a tool runs. What a turn costs is given
as measured (`bench/scale.py`, `bench/sessions.py`); engine and tools are drawn from log-normal distributions.
In the middle one replica dies: its sessions are read from the store again by the others.
"""

import argparse
import heapq
import math
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Costs:
    """Milliseconds of a turn: CPU of replica, front and PostgreSQL, a commit's latency; CPU of a restore."""

    turn: float = 2.3
    front: float = 0.6
    database: float = 0.4
    commit: float = 2.0
    restore: float = 12.0


@dataclass(frozen=True, slots=True)
class Load:
    """The agents: sessions, and means in seconds of a generation and of what comes between two turns."""

    sessions: int = 100_000
    engine_s: float = 10.0
    tool_s: float = 10.0

    @property
    def turns_per_s(self) -> float:
        """How many turns a second come from all of them."""
        return self.sessions / (self.engine_s + self.tool_s)


@dataclass(slots=True)
class Seen:
    """What a run was like: added latencies in ms, before and after the kill; CPU seconds of all replicas."""

    before: list[float]
    after: list[float]
    busy_s: float = 0.0
    settled_s: float = 0.0


def simulate(load: Load, costs: Costs, replicas: int, seconds: float, seed: int) -> Seen:
    """One run: warm up for a third, a replica dies after another third."""
    rng = random.Random(seed)
    sigma = 0.8
    shift = sigma * sigma / 2

    def drawn(mean: float) -> float:
        return rng.lognormvariate(math.log(mean) - shift, sigma)

    free = [0.0] * replicas  # when each replica has done what it was given
    place = [rng.randrange(replicas) for _ in range(load.sessions)]
    moved = bytearray(load.sessions)
    half, restore = costs.turn / 2e3, costs.restore / 1e3
    dies_at, dead = 2 * seconds / 3, replicas - 1
    seen = Seen([], [])
    # (time, session, latency so far; below zero: a turn begins)
    events = [(rng.uniform(0, load.engine_s + load.tool_s), n, -1.0) for n in range(load.sessions)]
    heapq.heapify(events)
    while events:
        now, session, latency = heapq.heappop(events)
        if now > seconds:
            break
        work = half
        if now > dies_at and place[session] == dead:
            place[session], moved[session] = rng.randrange(replicas - 1), 1
        if moved[session] == 1:
            work, moved[session] = work + restore, 2
        at = place[session]
        done = max(now, free[at]) + work
        free[at] = done
        seen.busy_s += work
        if latency < 0:
            heapq.heappush(events, (done + drawn(load.engine_s), session, done - now))
            continue
        added = 1e3 * (latency + done - now) + costs.commit
        if seconds / 3 < now <= dies_at:
            seen.before.append(added)
        elif now > dies_at:
            seen.after.append(added)
            if added > 1e3:
                seen.settled_s = now - dies_at
        heapq.heappush(events, (done + costs.commit / 1e3 + drawn(load.tool_s), session, -1.0))
    return seen


def ranked(values: Sequence[float], share: float) -> float:
    """The value below which this share of them is."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", type=int, default=Load().sessions)
    parser.add_argument("--engine-s", type=float, default=Load().engine_s)
    parser.add_argument("--tool-s", type=float, default=Load().tool_s)
    parser.add_argument("--turn-ms", type=float, default=Costs().turn, help="a replica's CPU for one turn")
    parser.add_argument("--seconds", type=float, default=120.0, help="simulated")
    parser.add_argument("--replicas", type=int, nargs="+", default=[13, 14, 16, 20, 24])
    options = parser.parse_args()
    load = Load(options.sessions, options.engine_s, options.tool_s)
    costs = Costs(turn=options.turn_ms)
    rate = load.turns_per_s
    table = Table(
        *("replicas", "busy", "added p50 ms", "p99 ms", "p99 ms after a kill", "until < 1 s"),
        title=f"{load.sessions:,} sessions, {rate:,.0f} turns/s",
    )
    for replicas in options.replicas:
        seen = simulate(load, costs, replicas, options.seconds, seed=1)
        table.add_row(
            str(replicas),
            f"{seen.busy_s / options.seconds / replicas:.0%}",
            f"{ranked(seen.before, 0.5):.1f}",
            f"{ranked(seen.before, 0.99):.1f}",
            f"{ranked(seen.after, 0.99):.0f}",
            f"{seen.settled_s:.1f} s",
        )
    console = Console(width=None if os.isatty(1) else 120)
    console.print(table)
    console.print(
        f"fronts: {rate * costs.front / 1e3:.1f} cores; PostgreSQL: {rate * costs.database / 1e3:.1f} cores, "
        f"{rate:,.0f} commits/s"
    )


if __name__ == "__main__":
    main()
