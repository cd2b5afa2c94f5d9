"""TRL: a `rollout_func` for `GRPOTrainer` from an agent's episode and a way to push weights.

    GRPOTrainer ─▶ rollout_func(prompts, trainer) ─▶ push(trainer, "step-4")      once a step of the trainer
        ▲                                         └▶ play(Ask(prompt, …)) each     side by side, on your loop
        └── prompt_ids, completion_ids, logprobs, env_mask, reward, … ◀── samples

Written for trl 1.16, which it does not import. What TRL does with the entries: `tokentape.export.trl`.
"""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from tokentape.errors import ConfigError
from tokentape.export.row import Row
from tokentape.export.trl import rollout_output

Play: TypeAlias = "Callable[[Ask], Coroutine[Any, Any, Sequence[Row]]]"
"""Plays one episode, with its reward, and returns its session's samples."""
Push: TypeAlias = Callable[[Any, str], Coroutine[Any, Any, None]]
"""Has the engine load the weights of this trainer under this name."""
RolloutFunc: TypeAlias = Callable[[list[Any], Any], dict[str, list[Any]]]
"""What `GRPOTrainer(rollout_func=…)` takes."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One completion that TRL asks for.

    `prompt` is the dataset's, a text or messages. `group_id` names the completions that TRL compares with
    each other, unlike those of any other call; `index` counts them. `version` is what was pushed.
    """

    prompt: Any
    group_id: str
    index: int
    version: str


def rollout_func(
    play: Play,
    *,
    push: Push,
    run: Callable[[Coroutine[Any, Any, Any]], Any] = asyncio.run,
    label: str | None = None,
    concurrency: int | None = None,
) -> RolloutFunc:
    """What `GRPOTrainer(rollout_func=…)` takes: weights first, then an episode for each completion it wants.

    `run` runs a coroutine to its end from TRL's thread. With a recorder it must use the event loop that
    opened it: `asyncio.Runner().run`, of the runner in which `tokentape.open` was entered. `label` chooses
    the sample of episodes that have several (`export.trl.rollout_output`); at most `concurrency` episodes run
    at a time. Where one fails the others are cancelled, and its error is raised.

    With several processes TRL calls it in each: `push` in the main one alone, and wait there for it
    (`trainer.accelerator`). Each process must get whole groups.

    Calling it raises:
        ConfigError: as `rollout_output`; TRL does not ask for whole groups in a row; a tape was sampled by
            other weights than those that were pushed.
    """
    return _Rollouts(play, push, run, label, concurrency)


class _Rollouts:
    def __init__(
        self,
        play: Play,
        push: Push,
        run: Callable[[Coroutine[Any, Any, Any]], Any],
        label: str | None,
        concurrency: int | None,
    ) -> None:
        self._play, self._push, self._run = play, push, run
        self._label, self._concurrency = label, concurrency
        self._pushed: str | None = None
        self._num_groups = 0

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
        asks = self._asks(prompts, trainer)
        episodes = self._run(self._episodes(asks, trainer))
        made = rollout_output(prompts, episodes, label=self._label)
        for session_id, spans in zip(made["session_id"], made["weight_versions"], strict=True):
            versions = {span["version"] for span in spans}
            if not versions <= {self._pushed}:
                raise ConfigError(
                    f"pushed {self._pushed}, but session {session_id} was sampled by {sorted(versions)}: "
                    "`push` must return when the engine has the weights under the name it is given"
                )
        return made

    def _asks(self, prompts: list[Any], trainer: Any) -> list[Ask]:
        """TRL compares by place, in groups of equal prompts: another order would mix groups up unseen."""
        size = trainer.num_generations if trainer.model.training else trainer.num_generations_eval
        groups = [prompts[at : at + size] for at in range(0, len(prompts), size)]
        if any(group != [group[0]] * size for group in groups):
            raise ConfigError(
                f"TRL asks for {len(prompts)} completions that are not groups of {size} of one prompt: let "
                "each process's batch be a multiple of num_generations (trl 1.16 gives each prompt so often)"
            )
        version = f"step-{trainer.state.global_step}"
        prefix = f"{version}/{trainer.accelerator.process_index}"
        first, self._num_groups = self._num_groups, self._num_groups + len(groups)
        return [
            Ask(prompt, f"{prefix}-{number}", index, version)
            for number, group in enumerate(groups, first)
            for index, prompt in enumerate(group)
        ]

    async def _episodes(self, asks: list[Ask], trainer: Any) -> list[Sequence[Row]]:
        if asks and self._pushed != asks[0].version:  # an evaluation has many batches, and the same weights
            await self._push(trainer, asks[0].version)
            self._pushed = asks[0].version
        slots = asyncio.Semaphore(self._concurrency or len(asks))
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._played(ask, slots)) for ask in asks]
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from errors
        return [task.result() for task in tasks]

    async def _played(self, ask: Ask, slots: asyncio.Semaphore) -> Sequence[Row]:
        async with slots:
            return await self._play(ask)
