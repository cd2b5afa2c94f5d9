"""TRL's own GRPOTrainer on tapes: the bundled model is trained to use its calculator.

TRL asks its `rollout_func` for completions; this one

1. pushes the trainer's weights to the engine under a name of their own, "step-3";
2. lets an ordinary agent on the openai SDK play an episode for each prompt through the gateway;
3. returns the episodes' samples as TRL wants them: ids, mask, log-probabilities. The tool results between a
   policy's turns are in the completion, and masked.

Advantages, loss and optimizer are TRL's.

    pip install 'tokentape[train]' trl accelerate datasets
    python examples/trl_grpo.py       # or: make trl-demo
"""

import argparse
import asyncio
import contextlib
import random
import tempfile
import time
import warnings
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from grpo import Service, serving
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from transformers.utils import logging as transformers_logging
from trl import GRPOConfig, GRPOTrainer

from tokentape.demo.agent import solve
from tokentape.demo.task import Question, make_question, reward
from tokentape.export import Row
from tokentape.export.trl import recorded_reward, rollout_output
from tokentape.model import TINY_MODEL


@dataclass(frozen=True, slots=True)
class Config:
    """One run. A step plays `questions` x `group` episodes and takes `updates` steps of Adam over them."""

    seed: int = 0
    steps: int = 6
    questions: int = 12
    group: int = 8
    updates: int = 4
    learning_rate: float = 2e-4
    concurrency: int = 48


@dataclass(frozen=True, slots=True)
class Report:
    """One step: the version that was pushed, those on the tapes, and what the episodes earned."""

    version: str
    versions: frozenset[str]
    rewards: Sequence[float]
    num_trained: int


class Rollouts:
    """A `rollout_func`: from TRL's prompts, which are questions, to recorded episodes."""

    def __init__(
        self,
        config: Config,
        questions: Sequence[Question],
        runner: asyncio.Runner,
        service: Service,
        directory: Path,
    ) -> None:
        self.by_text = {question.text: question for question in questions}
        self.runner, self.service, self.directory = runner, service, directory
        self.slots = asyncio.Semaphore(config.concurrency)
        self.rng = random.Random(config.seed)
        self.reports = list[Report]()

    def __call__(self, prompts: list[str], trainer: GRPOTrainer) -> dict[str, list[Any]]:
        """Completions for TRL, one for each prompt, sampled by the weights of now."""
        version = f"step-{len(self.reports)}"
        directory = self.directory / version
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(directory)
        episodes = self.runner.run(self.rollouts(directory, version, prompts))
        self.report(version, [sample for episode in episodes for sample in episode])
        return rollout_output(prompts, episodes)

    async def rollouts(self, directory: Path, version: str, prompts: list[str]) -> list[list[Row]]:
        """Have the engine load the weights, and play an episode for each prompt with them."""
        await self.service.load(directory, version)
        seeds = [self.rng.getrandbits(40) for _ in prompts]
        played = (
            self.play(self.by_text[prompt], f"{version}/{prompt}", seed)
            for prompt, seed in zip(prompts, seeds, strict=True)
        )
        return await asyncio.gather(*played)

    async def play(self, question: Question, group_id: str, seed: int) -> list[Row]:
        """One episode, from its session to its samples; its reward is recorded with it."""
        async with self.slots:
            session = await self.service.call("POST", "/sessions", {"group_id": group_id})
            client = self.service.openai.with_options(base_url=session["base_url"])
            episode = await solve(client, question, seed=seed)
            path = f"/sessions/{session['session_id']}"
            await self.service.call("POST", f"{path}/finish", {"reward": reward(question, episode.answer)})
            return (await self.service.call("GET", f"{path}/samples"))["samples"]

    def report(self, version: str, samples: Sequence[Row]) -> None:
        """Print the step; every token must have been sampled by the weights that were pushed for it."""
        found = frozenset(span["version"] for sample in samples for span in sample["weight_versions"])
        rewards, num_trained = [s["reward"] for s in samples], sum(sum(s["loss_mask"]) for s in samples)
        if found != {version}:
            raise RuntimeError(f"pushed {version}, but the tapes say {sorted(found)}")
        self.reports.append(Report(version, found, rewards, num_trained))
        print(
            f"{version:<8} reward {sum(rewards) / len(rewards):.3f}   {len(samples)} episodes, "
            f"{num_trained:,} trained tokens, every tape says {version}",
            flush=True,
        )


def make_trainer(config: Config, rollouts: Any, questions: list[Question], directory: Path) -> GRPOTrainer:
    """TRL's trainer for the bundled model on this CPU. Its dataset has the questions, each once."""
    batch_size = config.questions * config.group
    arguments = GRPOConfig(
        output_dir=str(directory / "trl"),
        max_steps=config.steps * config.updates,
        num_generations=config.group,
        generation_batch_size=batch_size,
        per_device_train_batch_size=batch_size // config.updates,
        gradient_accumulation_steps=1,
        learning_rate=config.learning_rate,
        adam_beta2=0.99,
        temperature=1.0,  # the agent's: the log-probabilities on the tapes are of this distribution
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        seed=config.seed,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You are using 'rollout_func'")  # that it may change
        trainer = GRPOTrainer(
            AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype=torch.float32),
            reward_funcs=[recorded_reward],
            args=arguments,
            train_dataset=Dataset.from_dict({"prompt": [question.text for question in questions]}),
            processing_class=AutoTokenizer.from_pretrained(TINY_MODEL),
            rollout_func=rollouts,
        )
    trainer.remove_callback(PrinterCallback)
    return trainer


@contextlib.contextmanager
def training(config: Config) -> Generator[tuple[GRPOTrainer, Rollouts]]:
    """A trainer, and the engine and gateway that it plays with while the context is open."""
    rng = random.Random(config.seed)
    drawn = {q.text: q for q in (make_question(rng) for _ in range(2 * config.steps * config.questions))}
    questions = list(drawn.values())[: config.steps * config.questions]
    with tempfile.TemporaryDirectory() as name, asyncio.Runner() as runner:
        stack = contextlib.AsyncExitStack()
        try:
            service = runner.run(stack.enter_async_context(serving(Path(name))))
            rollouts = Rollouts(config, questions, runner, service, Path(name))
            yield make_trainer(config, rollouts, questions, Path(name)), rollouts
        finally:
            runner.run(stack.aclose())


def run(config: Config) -> list[Report]:
    """Train, and return a report for each step."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with training(config) as (trainer, rollouts):
        trainer.train()
        return rollouts.reports


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=Config().seed)
    parser.add_argument("--steps", type=int, default=Config().steps)
    options = parser.parse_args()
    torch.set_num_threads(1)  # a small model's operations are too short to be shared out
    started = time.monotonic()
    reports = run(Config(seed=options.seed, steps=options.steps))
    first, last = (sum(report.rewards) / len(report.rewards) for report in (reports[0], reports[-1]))
    print(f"{len(reports)} steps in {time.monotonic() - started:.0f} s, reward {first:.3f} → {last:.3f}")


if __name__ == "__main__":
    main()
