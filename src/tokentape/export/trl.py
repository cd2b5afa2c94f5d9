"""TRL: a sample as one completion, and episodes as the dict that a `rollout_func` of `GRPOTrainer` returns.

Read in trl 1.16.0, `trl/trainer/grpo_trainer.py`.

- Split: `prompt_ids` is the first turn's prompt, `completion_ids` all that follows, tool results included.
- `env_mask`, `logprobs`: parallel to `completion_ids`, not shifted. A log-probability is 0.0 where the mask
  is 0, and only there. TRL reads a None as "unknown, no correction"; that would hide a missing one.
- `env_mask` is what TRL calls `tool_mask` inside. A trainer with `tools` ignores it and runs them itself:
  give `GRPOTrainer` none. Padding is TRL's own: prompts left, completions right.
- A turn that another sample trains is context: mask 0.
- TRL hands a `rollout_func` each prompt as often as it wants completions of it, `num_generations` times in a
  row, and compares them by place: one completion for each, in that order (its docstring says otherwise). An
  episode of several samples does not fit: it is an error, or the one of a `label` is taken.
- `reward` and all other entries reach reward functions as keywords, over columns of the dataset of the same
  name: `recorded_reward` returns the rewards. TRL leaves a completion without one out of its group's mean.
  Rewards of turns are `turn_rewards`, one a trained turn; TRL does nothing with them by itself.
- `logprobs` are read only with `use_vllm` or an `off_policy_mask_threshold`. Else TRL takes what it computes
  itself for what was sampled: push the weights before each generation. They are of the tempered
  distribution: `GRPOConfig(temperature=…)` must be the one that sampled.
- An empty completion is an error: TRL looks at its last token.
- Routed experts: TRL replays none: they are an error.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from tokentape.errors import ConfigError
from tokentape.export.row import Row, filled, split
from tokentape.types import Json

CONVENTION = (
    "split behind the first prompt; mask (`env_mask`) and log-probabilities over the completion, not "
    "shifted, 0.0 where the mask is 0; one reward a sample, for reward functions"
)


def rows(samples: Sequence[Row]) -> Iterator[Json]:
    """Samples as entries of what a `rollout_func` returns, one each.

    Raises:
        ConfigError: a sample is not sound, has no completion or has routed experts.
    """
    for sample in samples:
        cut, name = split(sample), f"sample {sample['sample_id']}"
        if not cut.response_ids:
            raise ConfigError(f"{name} has no completion, TRL takes none without: play the episode again")
        if sample["routed_experts"] is not None:
            raise ConfigError(
                f"{name} has routed experts, and TRL replays none: set the column routed_experts to None to "
                "train without"
            )
        yield {
            "prompt_ids": cut.prompt_ids,
            "completion_ids": cut.response_ids,
            "logprobs": filled(cut.response_logprobs),
            "env_mask": cut.response_mask,
            "reward": sample["reward"],
            "turn_rewards": [turn["reward"] for turn in sample["turns"] if turn["trained"]],
            "truncated": sample["truncated"],
            "weight_versions": [dict(span) for span in sample["weight_versions"]],
            **{key: sample[key] for key in ("session_id", "sample_id", "group_id")},
        }


def rollout_output(
    prompts: Sequence[Any], episodes: Sequence[Sequence[Row]], *, label: str | None = None
) -> dict[str, list[Any]]:
    """What a `rollout_func` returns: lists with an entry for each prompt, in their order.

    `prompts` are those that TRL gave, `episodes[i]` the samples of the session that was played for
    `prompts[i]`. A session of several samples fits only with a `label`: its one sample with it ("main", say)
    is taken, and the tokens that its others train are not trained.

    Raises:
        ConfigError: as `rows`; there is not one episode for each prompt, or not one sample for an episode.
    """
    if not prompts or len(prompts) != len(episodes):
        raise ConfigError(f"{len(prompts)} prompts and {len(episodes)} episodes: TRL takes one for each")
    chosen = [_chosen(f"episode {index}", episode, label) for index, episode in enumerate(episodes)]
    made = list(rows(chosen))
    return {name: [row[name] for row in made] for name in made[0]}


def recorded_reward(*, reward: Sequence[float | None], **_: object) -> list[float | None]:
    """The reward that each session was finished with, as a reward function of `GRPOTrainer`."""
    return list(reward)


def _chosen(name: str, episode: Sequence[Row], label: str | None) -> Row:
    found = [sample for sample in episode if label is None or sample["label"] == label]
    if len(found) == 1:
        return found[0]
    if not episode:
        raise ConfigError(f"{name} has no sample: was its session played?")
    session = f"{name}, session {episode[0]['session_id']},"
    if label is None:
        labels = ", ".join(sample["label"] for sample in episode)
        raise ConfigError(
            f"{session} has {len(episode)} samples ({labels}), TRL takes one completion a prompt: choose "
            'one, with label="main" say, which leaves the others untrained'
        )
    raise ConfigError(
        f"{session} has {len(found)} samples with label {label!r}, TRL takes one; "
        "choose another label, or leave the episode out"
    )
