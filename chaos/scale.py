"""`make scale`: replicas on several machines, agents under load, machines and the store failing around them.

Three nodes in network namespaces with Ray, three replicas, PostgreSQL, scripted engines that write down what
they sample. A replica and a node are killed, PostgreSQL is restarted, a replica is cut off from the store
while it samples, the cluster grows and shrinks. Then `check.py` compares the export with the truth.
Needs root, for the namespaces. Exit code 1 on any violation; what was recorded is kept then.
"""

import argparse
import asyncio
import contextlib
import itertools
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import ray
from check import check
from nodes import Network, Node, ray_cluster
from players import Agent
from postgres import Postgres, postgres
from rich.console import Console
from rich.table import Table
from run import export
from truth import Account, Acknowledged, Episode, read_generations
from world import Worker

from tokentape.engines.pool import PoolConfig
from tokentape.engines.sglang import SGLangConfig
from tokentape.gateway.passing import PASSED_ON
from tokentape.gateway.replicas import places
from tokentape.gateway.service import ServiceConfig
from tokentape.scale import Cluster, ScaleConfig
from tokentape.testing import write_model_dir

LEASE_S = 4.0
_LAST_S = 90.0
_WITNESSES = 6
ACTS = ("kill_replica", "restart_database", "cut_off", "grow_and_shrink", "kill_node")


class Scene:
    """All that takes part. `log` is what was done, with the seconds at which."""

    def __init__(
        self,
        network: Network,
        database: Postgres,
        cluster: Cluster,
        account: Account,
        workers: Sequence[Worker],
    ) -> None:
        self.network = network
        self.database = database
        self.cluster = cluster
        self.account = account
        self.workers = workers
        self.log: list[str] = []
        self.fenced: Counter[str] = Counter()
        self._began = time.monotonic()

    def note(self, text: str) -> None:
        """Write down what happens now."""
        self.log.append(f"{time.monotonic() - self._began:5.1f} s  {text}")

    def node_of(self, url: str) -> Node:
        """The machine on which a replica is."""
        return next(node for node in self.network.nodes if f"//{node.address}:" in url)

    async def there(self, count: int) -> None:
        """Wait for so many replicas."""
        async with asyncio.timeout(60):
            while len(self.cluster.replicas) != count:
                await asyncio.sleep(0.1)

    async def kill_replica(self) -> None:
        """Kill the process of one, as the kernel does when memory is out."""
        node = self.node_of(self.cluster.replicas[0].url)
        before = {one.url for one in self.cluster.replicas}
        killed = node.kill("ray::_Actor")
        self.account.kills.append(time.monotonic())
        self.note(f"{killed} replica killed on {node.address}")
        await self._replaced(before)

    async def kill_node(self) -> None:
        """Kill all that runs on a machine."""
        node = self.node_of(self.cluster.replicas[-1].url)
        before = {one.url for one in self.cluster.replicas}
        self.account.kills.append(time.monotonic())
        self.note(f"node {node.address} killed, {node.kill()} processes")
        await self._replaced(before)

    async def _replaced(self, before: set[str]) -> None:
        began = time.monotonic()
        async with asyncio.timeout(90):
            while len(now := {one.url for one in self.cluster.replicas}) < len(before) or now == before:
                await asyncio.sleep(0.1)
        self.note(f"replaced after {time.monotonic() - began:.1f} s")

    async def restart_database(self) -> None:
        """A crash of PostgreSQL, longer than a lease."""
        await asyncio.to_thread(self.database.stop)
        self.note("PostgreSQL killed")
        await asyncio.sleep(1.5 * LEASE_S)
        await asyncio.to_thread(self.database.start)
        self.note("PostgreSQL is there again")

    async def cut_off(self) -> None:
        """A replica loses the store while it samples: others take its sessions, it cannot commit."""
        replica = self.cluster.replicas[0]
        node = self.node_of(replica.url)
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as http:
            urls = [one.url for one in self.cluster.replicas]
            names = (f"witness-{n}" for n in itertools.count())
            its_own = (name for name in names if places(name, urls)[0] == replica.url)
            witnesses = [
                await _Witness.made(name, http, replica.url, self.cluster.url, self.account)
                for name in itertools.islice(its_own, _WITNESSES)
            ]
            node.cut()
            self.note(f"{node.address} is cut off from the store")
            late = [asyncio.ensure_future(one.ask(replica.url)) for one in witnesses]
            await asyncio.sleep(2 * LEASE_S)
            for one in witnesses:  # the agents try again, through the front
                await one.go_on()
            self.note(f"{len(witnesses)} of its sessions went on elsewhere")
            node.mend()
            self.note("the cable is in again")
            for answer in await asyncio.gather(*late):
                self.fenced[answer] += 1
            self.note(f"what it had sampled meanwhile: {dict(self.fenced)}")
            for one in witnesses:
                await one.finish()

    async def grow_and_shrink(self) -> None:
        """One replica more, then two fewer, while agents are served."""
        for count in (4, 2, 3):
            self.cluster.scale(count)
            await self.there(count)
            self.note(f"{count} replicas")
            await asyncio.sleep(3)


class _Witness:
    """A session at one replica, whose agent asks that one first and then the front."""

    def __init__(self, name: str, http: aiohttp.ClientSession, front: str, account: Account) -> None:
        self._name = name
        self._http = http
        self._front = front
        self._account = account
        self._messages: list[Any] = [{"role": "user", "content": "hello"}]
        self._episode = Episode(name, name, is_linear=True)

    @classmethod
    async def made(
        cls, name: str, http: aiohttp.ClientSession, url: str, front: str, account: Account
    ) -> "_Witness":
        """A session with one turn that this replica has."""
        one = cls(name, http, front, account)
        account.episodes.append(one._episode)
        async with http.post(f"{url}/sessions", json={"session_id": name}) as answer:
            answer.raise_for_status()
        assert await one.ask(url) == "200"
        return one

    async def ask(self, url: str) -> str:
        """A turn; what came of it: a status, with the error's code."""
        path = f"{url}/sessions/{self._name}/v1/chat/completions"
        body = {"messages": self._messages, "max_tokens": 100, "return_token_ids": True}
        headers = {} if url == self._front else PASSED_ON
        async with self._http.post(path, json=body, headers=headers) as answer:
            said = await answer.json()
            if answer.status != 200:
                return f"{answer.status} {said['error']['code']}"
        tape = said["tokentape"]
        self._account.acknowledged.append(
            Acknowledged(
                self._name,
                len(self._messages),
                self._name,
                *(tape[k] for k in ("turn_id", "parent_turn_id", "branch_reason")),
                *(tape[k] for k in ("prompt_ids", "completion_ids", "logprobs")),
                time.monotonic(),
            )
        )
        message = {k: v for k, v in said["choices"][0]["message"].items() if v is not None or k == "content"}
        self._messages += [message, {"role": "user", "content": "go on"}]
        return "200"

    async def go_on(self) -> None:
        """The same turn again, asked of the front, until it is answered."""
        async with asyncio.timeout(60):
            while await self.ask(self._front) != "200":
                await asyncio.sleep(0.2)

    async def finish(self) -> None:
        """End the session."""
        path = f"{self._front}/sessions/{self._name}/finish"
        async with self._http.post(path, json={"reward": 1.0}) as answer:
            self._episode.summary = await answer.json()


@contextlib.asynccontextmanager
async def scene(directory: Path, num_nodes: int, account: Account) -> AsyncGenerator[Scene]:
    """Everything, running."""
    async with contextlib.AsyncExitStack() as stack:
        network, address = stack.enter_context(ray_cluster(directory, num_nodes))
        database = stack.enter_context(postgres(host=network.store))
        workers = [
            Worker(f"worker{n}", directory, incremental=n % 2 == 1, host=network.address) for n in range(2)
        ]
        for worker in workers:
            await worker.start()
            stack.push_async_callback(worker.kill)
        service = ServiceConfig(
            model=str(write_model_dir(directory / "model")),
            engine=SGLangConfig(workers[0].url, token_timeout_s=10.0, first_token_timeout_s=15.0),
            pool=PoolConfig(more=tuple(worker.url for worker in workers[1:])),
            store=database.dsn,
            lease_s=LEASE_S,
            drain_s=5.0,
        )
        stack.callback(ray.shutdown)
        cluster = Cluster(service, ScaleConfig(replicas=3, address=address, num_cpus=1.0))
        await asyncio.to_thread(cluster.__enter__)
        stack.push_async_callback(asyncio.to_thread, cluster.__exit__)
        yield Scene(network, database, cluster, account, workers)


async def play(directory: Path, options: argparse.Namespace, console: Console) -> tuple[Scene, Sequence[Any]]:
    """The run itself, and what was exported."""
    account, playing = Account(), True
    async with scene(directory, options.nodes, account) as stage:
        url = stage.cluster.url
        stage.note(f"{options.agents} agents at {url}")
        agents = [
            Agent(f"agent{n}", url, account, lambda: playing, options.seed) for n in range(options.agents)
        ]
        runs = {asyncio.create_task(agent.run()): agent for agent in agents}
        for act in options.acts:
            await asyncio.sleep(options.pause)
            await getattr(stage, act)()
            console.print(stage.log[-1], highlight=False)
        await asyncio.sleep(options.pause)
        playing = False
        _, stuck = await asyncio.wait(runs, timeout=_LAST_S)
        account.stuck += [f"{runs[task].name} did not end" for task in stuck]
        for task in stuck:
            task.cancel()
        ended = await asyncio.gather(*runs, return_exceptions=True)
        account.stuck += [
            f"{agent.name}: {error!r}"
            for agent, error in zip(agents, ended, strict=True)
            if isinstance(error, Exception)
        ]
        stage.note("all agents have ended")
        return stage, await export(stage.database.dsn, directory / "export.parquet")


def report(console: Console, stage: Scene, rows: Sequence[Any], problems: Sequence[str]) -> None:
    """Print what was done, what came of it, and the verdict."""
    account = stage.account
    for line in stage.log:
        console.print(line, highlight=False)
    exported = {turn["turn_id"] for row in rows for turn in row["turns"]}
    told = {one.turn_id for one in account.acknowledged}
    finished = sum(episode.summary is not None for episode in account.episodes)
    table = Table(title="scale", show_header=False)
    table.add_row("sessions", f"{len(account.episodes)}, {finished} finished")
    lost = len(told - exported)
    table.add_row("turns", f"{len(exported)} exported, {len(told)} acknowledged, {lost} of them missing")
    table.add_row("tokens", f"{sum(sum(row['loss_mask']) for row in rows):,} trained")
    retries = Counter(retry.why for retry in account.retries)
    table.add_row("tries again", ", ".join(f"{n} {why}" for why, n in sorted(retries.items())) or "none")
    table.add_row("fenced", ", ".join(f"{n} commits: {answer}" for answer, n in stage.fenced.items()))
    well = "nothing lost, nothing invented, nothing twice"
    table.add_row("verdict", f"{len(problems)} VIOLATIONS" if problems else well)
    console.print(table)
    for problem in problems[:20]:
        console.print(f"  {problem}", markup=False, highlight=False)


async def run(options: argparse.Namespace, directory: Path, console: Console) -> int:
    """Play, export, check, report; the exit code."""
    stage, rows = await play(directory, options, console)
    generations = read_generations([worker.log for worker in stage.workers])
    (directory / "account.json").write_bytes(msgspec.json.encode(stage.account))
    # The front's connections end with a replica's: how many an agent may lose is not this check's.
    account = msgspec.structs.replace(stage.account, retries=[])
    problems = check(rows, generations, account)
    if "cut_off" in options.acts and stage.fenced != {"503 lease_lost": _WITNESSES}:
        problems.append(f"a replica that had lost its sessions was answered {dict(stage.fenced)}")
    report(console, stage, rows, problems)
    return 1 if problems else 0


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", default=str(time.time_ns() % 100_000), help="of all that is drawn")
    parser.add_argument("--agents", type=int, default=64)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--pause", type=float, default=5.0, help="seconds between two acts")
    parser.add_argument("--acts", nargs="+", default=ACTS, choices=ACTS, help="what happens, in order")
    parser.add_argument("--keep", type=Path, help="keep all that was recorded in this new directory")
    options = parser.parse_args()
    console = Console(width=120)
    if os.getuid():
        console.print("scale: network namespaces need root")
        sys.exit(2)
    directory = options.keep or Path(tempfile.mkdtemp(prefix="tokentape-scale-"))
    directory.mkdir(exist_ok=True)
    directory.chmod(0o755)
    code = asyncio.run(run(options, directory, console))
    if code or options.keep:
        console.print(f"what was recorded is in {directory}")
    else:
        shutil.rmtree(directory)
    sys.exit(code)


if __name__ == "__main__":
    main()
