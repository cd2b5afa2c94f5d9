"""`make chaos`: agents under load, everything killed and spoiled around them, then the account.

The gateway is the real `tokentape serve`; the workers are scripted and write down what they sample. At the
end all sessions are finished and exported, and `check.py` compares the export with what is known to be true.
Exit code 1 on any violation; what was recorded is kept then.
"""

import argparse
import asyncio
import contextlib
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from check import check
from conductor import Conductor, Plan
from players import Agent
from pyarrow import parquet
from report import report
from rich.console import Console
from truth import Account, read_generations
from world import Disk, Gateway, Worker

from tokentape.testing import write_model_dir

FULL = Plan(seconds=210, num_kills=19, fault_s=3.0, full_at_s=100, full_s=4.0)
MINI = Plan(seconds=12, num_kills=2, fault_s=1.5, full_at_s=2, full_s=1.0)
_START_S = 60.0
_LAST_S = 60.0  # for agents to end their sessions once all is well again


async def play(
    directory: Path,
    disk: Disk,
    plan: Plan,
    *,
    num_agents: int,
    num_workers: int,
    seed: str,
    options: Sequence[str],
) -> tuple[Account, Gateway, Conductor, list[Path]]:
    """The run itself, until every agent has ended or is known to be stuck."""
    model = write_model_dir(directory / "model")
    workers = [Worker(f"worker{n}", directory, incremental=n % 2 == 1) for n in range(num_workers)]
    gateway = Gateway(
        directory, model, disk.path / "chaos.sqlite", [worker.url for worker in workers], options
    )
    account = Account(kills=gateway.kills)
    conductor = Conductor(plan, gateway, workers, disk, account, seed)
    playing = True
    agents = [Agent(f"agent{n}", gateway.url, account, lambda: playing, seed) for n in range(num_agents)]
    async with contextlib.AsyncExitStack() as stack:
        for worker in workers:
            await worker.start()
            stack.push_async_callback(worker.kill)
        supervisor = asyncio.create_task(gateway.supervise())
        stack.callback(supervisor.cancel)
        stack.push_async_callback(gateway.stop)
        await asyncio.wait_for(gateway.ready.wait(), _START_S)  # its log says why it never is
        runs = {asyncio.create_task(agent.run()): agent for agent in agents}
        await conductor.play()
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
        code = await gateway.stop()
        if code != 0:
            account.stuck.append(f"the gateway ended with {code} at SIGTERM")
    return account, gateway, conductor, [worker.log for worker in workers]


async def export(store: Path | str, out: Path) -> Sequence[Any]:
    """The rows of `tokentape export`."""
    command = ["-m", "tokentape", "export", "--store", str(store), "--out", str(out)]
    process = await asyncio.create_subprocess_exec(
        sys.executable, *command, stdout=asyncio.subprocess.DEVNULL
    )
    if await process.wait():
        raise RuntimeError("tokentape export failed")
    return parquet.read_table(out).to_pylist()


async def run(options: argparse.Namespace, directory: Path, console: Console) -> int:
    """Play, export, check, report; the exit code."""
    plan = MINI if options.mini else FULL
    started = time.monotonic()
    disk = Disk.make(directory / "disk")
    try:
        console.print(f"chaos: seed {options.seed}; the disk gets full as {disk.kind}")
        account, gateway, conductor, logs = await play(
            directory,
            disk,
            plan,
            num_agents=options.agents,
            num_workers=options.workers,
            seed=options.seed,
            options=options.serve,
        )
        (directory / "account.json").write_bytes(msgspec.json.encode(account))
        rows = await export(disk.path / "chaos.sqlite", directory / "export.parquet")
        generations = read_generations(logs)
        problems = check(rows, generations, account)
        report(console, rows, generations, account, gateway, conductor, problems)
        console.print(f"{time.monotonic() - started:.0f} s")
        if problems:
            for file in disk.path.glob("chaos.sqlite*"):
                shutil.copyfile(file, directory / file.name)
        return 1 if problems else 0
    finally:
        disk.remove()


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mini", action="store_true", help="20 seconds with two kills: does it work?")
    parser.add_argument("--seed", default=str(time.time_ns() % 100_000), help="of all that is drawn")
    parser.add_argument("--agents", type=int, default=32)
    parser.add_argument("--workers", type=int, default=3, help="engine workers")
    parser.add_argument("--keep", type=Path, help="keep all that was recorded in this new directory")
    parser.add_argument("serve", nargs="*", help="options of `tokentape serve`, behind --")
    options = parser.parse_args()
    console = Console(width=120)
    directory = options.keep or Path(tempfile.mkdtemp(prefix="tokentape-chaos-"))
    directory.mkdir(exist_ok=True)
    code = asyncio.run(run(options, directory, console))
    if code or options.keep:
        console.print(f"what was recorded is in {directory}")
    else:
        shutil.rmtree(directory)
    sys.exit(code)


if __name__ == "__main__":
    main()
