"""What goes wrong, and when: a schedule drawn from a seed, played on the processes of `world.py`."""

import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from truth import Account
from worker import GARBAGE, LOSSES
from world import Disk, Gateway, Worker

_FAULTS = (*GARBAGE, *LOSSES, "slow", "kill", "hang", "new weights")
_LONGEST_FULL_S = 40.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What goes wrong in `seconds`: `num_kills` of the gateway, a worker's fault every `fault_s` or so.

    `full_at_s` the disk gets full: until `full_s` seconds after that is felt, with one kill more.
    """

    seconds: float
    num_kills: int
    fault_s: float
    full_at_s: float
    full_s: float


class Conductor:
    """Plays a plan. `num_faults` counts what was done, by kind."""

    def __init__(
        self,
        plan: Plan,
        gateway: Gateway,
        workers: Sequence[Worker],
        disk: Disk,
        account: Account,
        seed: str,
    ) -> None:
        self.num_faults: Counter[str] = Counter()
        self._plan = plan
        self._gateway = gateway
        self._workers = workers
        self._disk = disk
        self._account = account
        self._is_full = False
        self._seed = seed
        self._num_versions = 0

    async def play(self) -> None:
        """All of it; afterwards everything is well again."""
        ends = time.monotonic() + self._plan.seconds
        async with asyncio.TaskGroup() as group:
            group.create_task(self._kill_gateways(ends))
            group.create_task(self._fill_disk())
            for number, worker in enumerate(self._workers):
                rng = random.Random(f"{self._seed} worker {number}")
                group.create_task(self._spoil(worker, rng, ends))

    async def _kill_gateways(self, ends: float) -> None:
        """At random instants; about every third one comes while the gateway still starts."""
        rng = random.Random(f"{self._seed} gateway")
        left = self._plan.num_kills
        while left:
            if rng.random() < 0.35 and left < self._plan.num_kills:
                await asyncio.sleep(rng.uniform(0.15, 1.0))
            else:
                await asyncio.sleep(rng.uniform(0.2, 1.8) * max(0.0, ends - time.monotonic()) / left)
                await self._gateway.ready.wait()
            was_ready = self._gateway.ready.is_set()
            if self._gateway.kill():
                left -= 1
                self.num_faults["gateway killed" if was_ready else "gateway killed in its start"] += 1

    async def _fill_disk(self) -> None:
        """Until that is felt, and then for a while, in the middle of which the gateway is killed.

        SQLite has room in its log at first, so it takes some seconds.
        """
        await asyncio.sleep(self._plan.full_at_s)
        since = time.monotonic()
        self._is_full = True
        filling = asyncio.create_task(self._keep_full())
        while not self._is_felt(since) and time.monotonic() < since + _LONGEST_FULL_S:
            await asyncio.sleep(0.1)
        self.num_faults["disk full" if self._is_felt(since) else "disk full, and nobody felt it"] += 1
        await asyncio.sleep(self._plan.full_s / 2)
        if self._gateway.kill():
            self.num_faults["gateway killed while the disk was full"] += 1
        await asyncio.sleep(self._plan.full_s / 2)
        self._is_full = False
        await filling
        self._disk.free(self._gateway.pid)

    async def _keep_full(self) -> None:
        """Take what the gateway lets go of, too; and where a limit stands for the disk, each new one's.

        Under such a limit none could start: it holds for those that have.
        """
        while self._is_full:
            pid = self._gateway.pid if self._gateway.ready.is_set() else None
            await asyncio.to_thread(self._disk.fill, pid)
            await asyncio.sleep(0.1)

    def _is_felt(self, since: float) -> bool:
        return any(retry.at > since and "store" in retry.why for retry in reversed(self._account.retries))

    async def _spoil(self, worker: Worker, rng: random.Random, ends: float) -> None:
        """One fault of a worker after another, each kind once before any comes again."""
        faults: list[str] = []
        while True:
            pause_s = self._plan.fault_s * len(self._workers) * rng.uniform(0.4, 1.6)
            if time.monotonic() + pause_s > ends:
                return
            await asyncio.sleep(pause_s)
            faults = faults or rng.sample(_FAULTS, len(_FAULTS))
            fault = faults.pop()
            self.num_faults[f"engine: {fault}"] += 1
            await self._do(worker, fault, rng)

    async def _do(self, worker: Worker, fault: str, rng: random.Random) -> None:
        if fault in ("kill", "new weights"):
            await worker.kill()
            await asyncio.sleep(rng.uniform(0.1, 2.5))
            if fault == "new weights":
                self._num_versions += 1
                worker.version = f"v{self._num_versions}"
            await worker.start()
        elif fault == "hang":
            worker.signal(signal.SIGSTOP)
            await asyncio.sleep(rng.uniform(2, 6))
            worker.signal(signal.SIGCONT)
        else:
            worker.tell(fault, rng.choice((0.3, 0.7, 1.0)))
            await asyncio.sleep(rng.uniform(1, 3))
            worker.tell("none", 0.0)
