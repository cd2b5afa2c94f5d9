"""GRPO on tapes, in plain torch: the bundled model learns to use its calculator.

One step of the loop:

1. the trainer's weights go to the engine under a name of their own, "step-7";
2. an ordinary agent on the openai SDK plays `group` episodes of each of `questions` questions through the
   gateway;
3. their tapes are read: token ids, loss mask, log-probabilities as they were sampled, weight versions.
   Nothing is rendered, encoded or computed again;
4. each episode is compared with its group, and Adam takes `updates` steps on the clipped loss.

    pip install 'tokentape[train]'
    python examples/grpo.py --seeds 0 1 2      # or: make train-demo
"""

import argparse
import asyncio
import contextlib
import itertools
import random
import signal
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import torch
from curves import Curves, report
from openai import AsyncOpenAI
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from tokentape.demo.agent import solve
from tokentape.demo.task import Question, make_question, reward
from tokentape.model import TINY_MODEL


@dataclass(frozen=True, slots=True)
class Config:
    """One run. A step plays `questions` x `group` episodes and takes `updates` steps of Adam over them.

    `held_out` questions, never trained on, are asked every `evaluate_every` steps, before the first and after
    the last. `concurrency` episodes run at a time.
    """

    seed: int = 0
    steps: int = 12
    questions: int = 24
    group: int = 8
    updates: int = 4
    learning_rate: float = 2.5e-4
    warm_up: int = 8
    clip_low: float = 0.2
    clip_high: float = 0.28
    held_out: int = 300
    evaluate_every: int = 6
    concurrency: int = 48


@dataclass(frozen=True, slots=True)
class Row:
    """One episode as the trainer needs it; arrays are parallel to `token_ids`, and `logprobs` are nats.

    `sample` is the tape that it was taken from.
    """

    token_ids: list[int]
    num_prompt_tokens: int
    mask: list[int]
    logprobs: list[float | None]
    versions: set[str]
    reward: float
    sample: dict[str, Any] = field(repr=False)


Group = Sequence[Row]  # the episodes of one question: they begin with the same prompt


# --- the mathematics ----------------------------------------------------------------------------------------


def group_advantages(rewards: Sequence[float]) -> list[float]:
    """How far each reward of a group is above their mean, in standard deviations of the group.

    Where all earned the same there is nothing to compare, and every advantage is 0.
    """
    mean = sum(rewards) / len(rewards)
    spread = (sum((r - mean) ** 2 for r in rewards) / len(rewards)) ** 0.5
    return [(r - mean) / spread if spread else 0.0 for r in rewards]


def clipped_loss(new: Tensor, old: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """PPO's clipped objective, negated and summed over tokens. float[T] each, of sampled tokens alone.

    `new` are log-probabilities (nats) under the weights of now, `old` under those that sampled.
    """
    ratio = (new - old).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages).sum()


def logprobs_of(model: Any, group: Group) -> Tensor:
    """float[T] nats: log-probabilities of the group's sampled tokens, in order, under the weights of now.

    The prompt, the larger part, runs once; its keys and values serve all episodes, and carry their gradients.
    """
    num_prompt = group[0].num_prompt_tokens
    rests = [row.token_ids[num_prompt:] for row in group]
    ids, mask = torch.zeros(2, len(group), max(map(len, rests)), dtype=torch.long)
    for i, row in enumerate(group):  # padded on the right: no token looks at what comes after it
        ids[i, : len(rests[i])] = torch.tensor(rests[i])
        mask[i, : len(rests[i])] = torch.tensor(row.mask[num_prompt:])
    prompt = model.model(input_ids=torch.tensor([group[0].token_ids[:num_prompt]]), use_cache=True)
    prompt.past_key_values.batch_repeat_interleave(len(group))
    hidden = model.model(input_ids=ids[:, :-1], past_key_values=prompt.past_key_values).last_hidden_state
    first = prompt.last_hidden_state[:, -1:].expand(len(group), -1, -1)
    hidden = torch.cat([first, hidden], dim=1)[mask.bool()]  # position i says what token i is
    return model.lm_head(hidden).log_softmax(-1).gather(1, ids[mask.bool()][:, None])[:, 0]


def recorded_logprobs(group: Group) -> Tensor:
    """float[T] nats: the same tokens' log-probabilities, as the tapes have them."""
    return torch.tensor([row.logprobs[i] for row in group for i, sampled in enumerate(row.mask) if sampled])


# --- gateway and engine -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Service:
    """`tokentape engine` and `tokentape serve`, and what it takes to talk to them."""

    engine: str
    gateway: str
    http: aiohttp.ClientSession
    openai: AsyncOpenAI

    async def call(self, method: str, path: str, body: Any = None) -> Any:
        """One request to the gateway's control side."""
        async with self.http.request(method, self.gateway + path, json=body) as response:
            return await response.json()

    async def load(self, directory: Path, version: str) -> None:
        """Have the engine load weights, under this name."""
        body = {"model_path": str(directory), "weight_version": version}
        async with self.http.post(f"{self.engine}/update_weights_from_disk", json=body) as response:
            await response.read()


@contextlib.asynccontextmanager
async def started(*arguments: str) -> AsyncGenerator[str]:
    """Run a tokentape command on a free port while the context is open; yields its URL."""
    command = [sys.executable, "-m", "tokentape", *arguments, "--port", "0", "--log-level", "error"]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    try:
        line = (await process.stdout.readline()).decode() if process.stdout else ""
        if not line.startswith("listening on "):
            raise SystemExit(f"`tokentape {arguments[0]}` did not start; its message is above")
        yield line.removeprefix("listening on ").strip()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()


@contextlib.asynccontextmanager
async def serving(directory: Path) -> AsyncGenerator[Service]:
    """An engine and a gateway of this run's own."""
    model, store = str(TINY_MODEL), str(directory / "store.sqlite")
    async with (
        started("engine", "--model", model) as engine,
        started("serve", "--model", model, "--engine", engine, "--store", store) as gateway,
        aiohttp.ClientSession(raise_for_status=True) as http,
        AsyncOpenAI(base_url=gateway, api_key="not-needed") as openai,
    ):
        yield Service(engine, gateway, http, openai)


# --- the loop -----------------------------------------------------------------------------------------------


class Loop:
    """Policy, optimizer and questions of one run."""

    def __init__(self, config: Config, service: Service, directory: Path) -> None:
        self.config, self.service, self.directory = config, service, directory
        self.model: Any = AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype=torch.float32)
        self.optimizer = torch.optim.Adam(self.model.parameters(), config.learning_rate, betas=(0.9, 0.99))
        num_updates = config.steps * config.updates
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda n: min((n + 1) / config.warm_up, 1 - n / num_updates)
        )
        self.held_out = [make_question(random.Random(f"held out {i}")) for i in range(config.held_out)]
        self.rng = random.Random(config.seed)
        self.slots = asyncio.Semaphore(config.concurrency)
        self.version = "none yet"

    async def push(self, version: str) -> None:
        """Let the engine sample from the weights of now."""
        directory = self.directory / version
        self.model.save_pretrained(directory)
        await self.service.load(directory, version)
        self.version = version

    async def play(self, question: Question, group_id: str, seed: int) -> Row:
        """One episode, from its session to its tape."""
        async with self.slots:
            session = await self.service.call("POST", "/sessions", {"group_id": group_id})
            client = self.service.openai.with_options(base_url=session["base_url"])
            episode = await solve(client, question, seed=seed)
            path = f"/sessions/{session['session_id']}"
            await self.service.call("POST", f"{path}/finish", {"reward": reward(question, episode.answer)})
            # One sample: an agent that only appends to its messages makes one branch.
            [sample] = (await self.service.call("GET", f"{path}/samples"))["samples"]
        return Row(
            token_ids=sample["token_ids"],
            num_prompt_tokens=sample["num_prompt_tokens"],
            mask=sample["loss_mask"],
            logprobs=sample["logprobs"],
            versions={span["version"] for span in sample["weight_versions"]},
            reward=sample["reward"],
            sample=sample,
        )

    async def rollouts(self) -> list[Group]:
        """A step's episodes, by question; every token of them was sampled by the weights last pushed."""
        held_out = {question.text for question in self.held_out}
        drawn = (make_question(self.rng) for _ in itertools.count())
        unseen = (question for question in drawn if question.text not in held_out)
        questions = list(itertools.islice(unseen, self.config.questions))
        episodes = [
            [self.play(q, f"{self.version}/{i}", self.rng.getrandbits(40)) for _ in range(self.config.group)]
            for i, q in enumerate(questions)
        ]
        groups = await asyncio.gather(*(asyncio.gather(*group) for group in episodes))
        found = set[str]().union(*(row.versions for group in groups for row in group))
        if found != {self.version}:
            raise RuntimeError(f"pushed {self.version}, but the tapes say {sorted(found)}")
        return groups

    async def evaluate(self) -> float:
        """The share of held-out questions that are answered right, at temperature 1 as in training."""
        episodes = (self.play(q, "held out", seed=1000 * i) for i, q in enumerate(self.held_out))
        rows = await asyncio.gather(*episodes)
        return sum(row.reward for row in rows) / len(rows)

    def old_logprobs(self, groups: list[Group]) -> list[Tensor]:
        """What the ratio is taken against, one float[T] a group: the tapes have it."""
        return [recorded_logprobs(group) for group in groups]

    def learn(self, groups: list[Group]) -> Tensor:
        """All updates of a step; float[T] |old - new| (nats) of the first one's tokens, before it.

        Groups whose episodes all earned the same are left out: their gradient is zero.
        """
        useful = [group for group in groups if len({row.reward for row in group}) > 1]
        if not useful:
            with torch.no_grad():
                return (logprobs_of(self.model, groups[0]) - self.old_logprobs(groups[:1])[0]).abs()
        batch = list(zip(useful, self.old_logprobs(useful), strict=True))
        self.rng.shuffle(batch)
        parts = [batch[k :: self.config.updates] for k in range(min(self.config.updates, len(batch)))]
        differences = [self.update(part) for part in parts]
        return differences[0]

    def update(self, batch: list[tuple[Group, Tensor]]) -> Tensor:
        """One step of Adam on the mean over all sampled tokens; float[T] |old - new| (nats) before it."""
        num_tokens = sum(len(old) for _, old in batch)
        differences = list[Tensor]()
        self.optimizer.zero_grad()
        for group, old in batch:
            new = logprobs_of(self.model, group)
            per_episode = torch.tensor(group_advantages([row.reward for row in group]))
            advantages = per_episode.repeat_interleave(torch.tensor([sum(row.mask) for row in group]))
            loss = clipped_loss(new, old, advantages, self.config.clip_low, self.config.clip_high)
            (loss / num_tokens).backward()
            differences.append((new.detach() - old).abs())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        return torch.cat(differences)


Make = Callable[[Config, Service, Path], Loop]


async def run(config: Config, progress: Progress, make: Make = Loop) -> Curves:
    """One seed from the bundled weights to the last evaluation."""
    started_at, curves = time.monotonic(), Curves(config.seed)
    bar = progress.add_task(f"seed {config.seed}", total=config.steps)
    with tempfile.TemporaryDirectory() as directory:
        async with serving(Path(directory)) as service:
            loop = make(config, service, Path(directory))
            for step in range(config.steps + 1):
                await loop.push(f"step-{step}")
                if step % config.evaluate_every == 0 or step == config.steps:
                    curves.held_out.append((step, await loop.evaluate()))
                if step < config.steps:
                    groups = await loop.rollouts()
                    mismatch = loop.learn(groups)
                    rewards = [row.reward for group in groups for row in group]
                    curves.rewards.append(sum(rewards) / len(rewards))
                    curves.mismatch_max.append(mismatch.max().item())
                    curves.mismatch_mean.append(mismatch.mean().item())
                    rate = f"held out {curves.held_out[-1][1]:.1%}, trained on {curves.rewards[-1]:.1%}"
                    progress.update(bar, advance=1, description=f"seed {config.seed}: {rate}")
    curves.seconds = time.monotonic() - started_at
    return curves


async def run_all(configs: Sequence[Config], make: Make = Loop) -> list[Curves]:
    """One run after the other."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)  # a small model's operations are too short to be shared out
    text = TextColumn("{task.description:<52}")
    with Progress(text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()) as progress:
        return [await run(config, progress, make) for config in configs]


def main() -> None:
    """Train, report, and exit with 1 where a seed has not reached the goal."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=Config().steps)
    parser.add_argument("--out", type=Path, default=Path("runs/train"))
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as at Ctrl-C: engine and gateway too
    configs = [Config(seed=seed, steps=options.steps) for seed in options.seeds]
    runs = asyncio.run(run_all(configs))
    sys.exit(0 if report(runs, options.out, Console()) else 1)


if __name__ == "__main__":
    main()
