"""TRL's own GRPOTrainer on tapes: the bundled model is trained to use its calculator.

TRL asks its `rollout_func` for completions. That of `tokentape.adapters.trl` takes two functions of ours:

1. `push` has the engine load the trainer's weights under a name of their own, "step-4": TRL's step, and a
   generation is for four of them;
2. `play` lets an ordinary agent on the openai SDK play an episode for a prompt through the gateway, and
   returns its samples. TRL gets their ids, mask and log-probabilities; the tool results between a policy's
   turns are in the completion, and masked. A tape of other weights than those just pushed is an error.

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

from tokentape.adapters.trl import Ask, rollout_func
from tokentape.demo.agent import solve
from tokentape.demo.task import Question, make_question, reward
from tokentape.export import Row
from tokentape.export.trl import recorded_reward
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
    """One generation: the versions on its tapes, and what its episodes earned."""

    versions: Sequence[str]
    rewards: Sequence[float]
    num_trained: int


class Rollouts:
    """Episodes for TRL, whose prompts are the questions, and what they earned."""

    def __init__(
        self,
        config: Config,
        questions: Sequence[Question],
        runner: asyncio.Runner,
        service: Service,
        directory: Path,
    ) -> None:
        self.by_text = {question.text: question for question in questions}
        self.seed, self.service, self.directory = config.seed, service, directory
        self.rollout = rollout_func(self.play, push=self.push, run=runner.run, concurrency=config.concurrency)
        self.reports = list[Report]()

    def __call__(self, prompts: list[str], trainer: GRPOTrainer) -> dict[str, list[Any]]:
        """What TRL calls: completions for the prompts, sampled by the weights of now."""
        made = self.rollout(prompts, trainer)
        self.report(made)
        return made

    async def push(self, trainer: GRPOTrainer, version: str) -> None:
        """Let the engine sample from the weights of now."""
        directory = self.directory / version
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(directory)
        await self.service.load(directory, version)

    async def play(self, ask: Ask) -> list[Row]:
        """One episode, from its session to its samples; its reward is recorded with it."""
        question = self.by_text[ask.prompt]
        seed = random.Random(f"{self.seed} {ask.group_id} {ask.index}").getrandbits(40)
        session = await self.service.call("POST", "/sessions", {"group_id": ask.group_id})
        client = self.service.openai.with_options(base_url=session["base_url"])
        episode = await solve(client, question, seed=seed)
        path = f"/sessions/{session['session_id']}"
        await self.service.call("POST", f"{path}/finish", {"reward": reward(question, episode.answer)})
        return (await self.service.call("GET", f"{path}/samples"))["samples"]

    def report(self, made: dict[str, list[Any]]) -> None:
        """Print the step."""
        versions = sorted({span["version"] for spans in made["weight_versions"] for span in spans})
        rewards, num_trained = made["reward"], sum(map(sum, made["env_mask"]))
        self.reports.append(Report(versions, rewards, num_trained))
        print(
            f"{', '.join(versions):<8} reward {sum(rewards) / len(rewards):.3f}   {len(rewards)} episodes, "
            f"{num_trained:,} trained tokens",
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
    print(
        f"{len(reports)} generations in {time.monotonic() - started:.0f} s, reward {first:.3f} → {last:.3f}"
    )


if __name__ == "__main__":
    main()
