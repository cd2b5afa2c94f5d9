"""The demo: engine and gateway as a user starts them, agents over HTTP, then a look at the tapes."""

import asyncio
import contextlib
import math
import random
import sys
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pyarrow.parquet as pq
from openai import APIError, AsyncOpenAI
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from tokentape.demo.agent import solve
from tokentape.demo.task import Question, make_question, reward
from tokentape.engines.local.forward import Forward
from tokentape.errors import ConfigError, InternalError
from tokentape.model import TINY_MODEL
from tokentape.tokenizer import Tokenizer

_START_TIMEOUT_S = 120.0
# log p(recorded) against log p(recomputed): what float32 arithmetic in another order may make of it.
TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class Findings:
    """What the tapes show. `num_drifted` turns would not have survived decoding and encoding."""

    num_samples: int
    num_turns: int
    num_tokens: int
    num_trained: int
    num_drifted: int
    max_difference: float
    parse_statuses: Counter[str]
    rewards: list[float]


async def run_demo(*, episodes: int, concurrency: int, out: Path, seed: int) -> bool:
    """Run the episodes and print the summary; True when none failed and every log-probability held.

    Raises:
        ConfigError: engine or gateway do not start.
    """
    console = Console()
    store, rollouts = _fresh(out)
    rng = random.Random(seed)  # noqa: S311  # questions, not secrets
    questions = [make_question(rng) for _ in range(episodes)]
    async with contextlib.AsyncExitStack() as stack:
        with console.status("starting the embedded engine and the gateway"):
            engine = await stack.enter_async_context(_process("engine", "--port", "0"))
            gateway = await stack.enter_async_context(
                _process(
                    "serve",
                    "--model",
                    str(TINY_MODEL),
                    "--engine",
                    engine,
                    "--port",
                    "0",
                    "--store",
                    str(store),
                )
            )
        console.print(f"engine   {engine}\ngateway  {gateway}")
        failures = await _rollouts(console, gateway, questions, concurrency, seed)
    await _export(store, rollouts)
    rows: list[dict[str, Any]] = pq.read_table(rollouts).to_pylist()  # pyright: ignore[reportUnknownMemberType]
    with console.status("recomputing every log-probability from the file"):
        findings = await asyncio.to_thread(_inspect, rows)
    _print_summary(console, findings, episodes, failures)
    console.print(f"tapes    {rollouts}")
    if rows:
        _print_tape(console, rows)
    return not failures and bool(rows) and findings.max_difference <= TOLERANCE


def _fresh(out: Path) -> tuple[Path, Path]:
    """The paths of store and rollouts, with nothing of an earlier run at them."""
    out.mkdir(parents=True, exist_ok=True)
    store, rollouts = out / "store.sqlite", out / "rollouts.parquet"
    for stale in (rollouts, *out.glob("store.sqlite*")):
        stale.unlink(missing_ok=True)
    return store, rollouts


@contextlib.asynccontextmanager
async def _process(*arguments: str) -> AsyncGenerator[str]:
    """Run a tokentape command while the context is open; yields the URL that it prints."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tokentape", *arguments, "--log-level", "error", stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None  # noqa: S101  # it is a pipe
    try:
        line = (await asyncio.wait_for(process.stdout.readline(), _START_TIMEOUT_S)).decode().strip()
        if not line.startswith("listening on "):
            raise ConfigError(f"`tokentape {arguments[0]}` did not start; its message is above")
        yield line.removeprefix("listening on ")
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()


async def _rollouts(
    console: Console, gateway: str, questions: Sequence[Question], concurrency: int, seed: int
) -> Counter[str]:
    """Run all episodes, `concurrency` at a time; returns failed ones by error."""
    failures: Counter[str] = Counter()
    slots = asyncio.Semaphore(concurrency)
    columns = (
        TextColumn("episodes"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(questions))
        earned: list[float] = []

        async def run(http: aiohttp.ClientSession, index: int, question: Question) -> None:
            async with slots:
                try:
                    earned.append(
                        await _episode(http, gateway, question, seed=1000 * (seed * len(questions) + index))
                    )
                except (
                    APIError,
                    aiohttp.ClientError,
                ) as error:  # a bad rollout is data: it is counted, the others go on
                    failures[type(error).__name__] += 1
                mean = sum(earned) / len(earned) if earned else 0.0
                progress.update(task, advance=1, description=f"mean reward {mean:.2f}")

        async with aiohttp.ClientSession(raise_for_status=True) as http, asyncio.TaskGroup() as group:
            for index, question in enumerate(questions):
                group.create_task(run(http, index, question))
    return failures


async def _episode(http: aiohttp.ClientSession, gateway: str, question: Question, *, seed: int) -> float:
    """One session from its creation to its reward."""
    body = {"metadata": {"question": question.text, "answer": question.answer}}
    async with http.post(f"{gateway}/sessions", json=body) as response:
        session = await response.json()
    async with AsyncOpenAI(base_url=session["base_url"], api_key="not-needed") as client:
        episode = await solve(client, question, seed=seed)
    earned = reward(question, episode.answer)
    async with http.post(
        f"{gateway}/sessions/{session['session_id']}/finish", json={"reward": earned}
    ) as response:
        await response.read()
    return earned


async def _export(store: Path, rollouts: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tokentape",
        "export",
        "--store",
        str(store),
        "--out",
        str(rollouts),
        stdout=asyncio.subprocess.DEVNULL,
    )
    if await process.wait():
        raise ConfigError("`tokentape export` failed; its message is above")


def _inspect(rows: Sequence[dict[str, Any]]) -> Findings:
    """Read the file as a trainer would; recompute every trained token's log-probability."""
    forward = Forward(TINY_MODEL)
    tokenizer = Tokenizer(TINY_MODEL / "tokenizer.json")
    worst, drifted = 0.0, 0
    for row in rows:
        ids, mask, logprobs = row["token_ids"], row["loss_mask"], row["logprobs"]
        if not len(ids) == len(mask) == len(logprobs):
            raise InternalError(f"sample {row['sample_id']}: arrays of different lengths")
        again = [0.0, *forward.logprobs(ids)]
        differences = [abs(logprobs[i] - again[i]) for i, m in enumerate(mask) if m]
        worst = max([worst, *(d if math.isfinite(d) else math.inf for d in differences)])
        for turn in row["turns"]:
            sampled = ids[turn["start"] : turn["end"]]
            drifts = tokenizer.encode(tokenizer.decode(sampled)).tolist() != sampled
            drifted += drifts and turn["trained"]
    turns = [turn for row in rows for turn in row["turns"] if turn["trained"]]
    return Findings(
        num_samples=len(rows),
        num_turns=len(turns),
        num_tokens=sum(len(row["token_ids"]) for row in rows),
        num_trained=sum(sum(row["loss_mask"]) for row in rows),
        num_drifted=drifted,
        max_difference=worst,
        parse_statuses=Counter(turn["parse_status"] for turn in turns),
        rewards=[row["reward"] for row in rows if row["reward"] is not None],
    )


def _print_summary(console: Console, findings: Findings, episodes: int, failures: Counter[str]) -> None:
    table = Table(title="What was recorded", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column(style="dim")
    rewards = findings.rewards
    statuses = ", ".join(f"{count} {status}" for status, count in findings.parse_statuses.most_common())
    share = 100 * findings.num_drifted / max(findings.num_turns, 1)
    rows: list[tuple[str, str, str]] = [
        ("episodes", str(episodes), f"{sum(failures.values())} failed {dict(failures) if failures else ''}"),
        ("samples", str(findings.num_samples), "one a branch"),
        ("turns", str(findings.num_turns), "engine generations"),
        ("tokens", f"{findings.num_tokens:,}", "in all tapes"),
        ("trained tokens", f"{findings.num_trained:,}", "sampled by the policy: loss mask 1"),
        ("mean reward", f"{sum(rewards) / max(len(rewards), 1):.2f}", "share of right answers"),
        ("parsed", statuses, "tool calls and text"),
        (
            "would have drifted",
            f"{findings.num_drifted} ({share:.0f} %)",
            "turns whose text encodes to other ids",
        ),
        (
            "largest difference",
            f"{findings.max_difference:.1e}",
            f"of log-probabilities, recorded against recomputed from the file (at most {TOLERANCE:g})",
        ),
    ]
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _print_tape(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    """One tape in colour, the one with the most turns."""
    row = max(rows, key=lambda r: (len(r["turns"]), r["reward"] or 0.0))
    tokenizer = Tokenizer(TINY_MODEL / "tokenizer.json")
    text = Text()
    at = 0
    for turn in row["turns"]:
        style = "cyan" if at == 0 else "yellow"
        text.append(tokenizer.decode(row["token_ids"][at : turn["start"]]), style=style)
        text.append(tokenizer.decode(row["token_ids"][turn["start"] : turn["end"]]), style="black on green")
        at = turn["end"]
    console.print()
    console.print(
        Text.assemble(
            "One tape: ",
            ("prompt", "cyan"),
            ", ",
            ("sampled (trained)", "black on green"),
            ", ",
            ("glue and tool results (never trained)", "yellow"),
            f", reward {row['reward']}",
        )
    )
    console.print(text, highlight=False)
