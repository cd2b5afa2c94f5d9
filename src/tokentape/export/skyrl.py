"""SkyRL: samples as one `GeneratorOutput`, a dict of lists with an entry a sample; rows are its entries.

Read in skyrl 0.3.0, `skyrl/train/`: `generators/base.py`, `trainer.py`, `dataset/preprocess.py`.

- Split: `prompt_token_ids` is the first turn's prompt, `response_ids` all that follows, tool results too.
- `loss_masks`, `rollout_logprobs`: parallel to `response_ids`, not shifted. A log-probability is 0.0 where
  the mask is 0, and only there.
- A turn that another sample trains is context: mask 0.
- `rewards`: one a sample, which SkyRL puts on the last response token; where any turn has a reward, one a
  response token for all samples: a turn's at its last token, the sample's own added at the sample's last.
  SkyRL knows no missing reward: it is an error.
- A session is a trajectory and its samples are its steps: one `trajectory_ids` entry, `is_last_step` at the
  last. `instance_id` is the group (`group_id`, else the session), `repetition_id` counts the sessions of a
  group in one call: give all sessions of a group to one call. With more samples than sessions set
  `generator.step_wise_trajectories`. SkyRL then gives every step the last step's advantage and ignores other
  steps' rewards, so that these are an error here: branches of one session with different rewards, a turn's
  reward in a sample that is not its session's last.
- `stop_reasons`: the last turn's, "stop" or "length".
- `rollout_expert_indices`: our N-1 rows of N tokens, `[N-1][layers][experts a token]`, from the first prompt
  token on; SkyRL fills the last token's row with zeros, and all of a sample without rows: all or none.
- Padding is SkyRL's own: left, prompt and response as one block; per-token columns are right-aligned.
"""

from collections.abc import Iterator, Sequence
from typing import Any

# pyright: reportUnknownVariableType=false, reportMissingImports=false
from tokentape.errors import ConfigError
from tokentape.export.row import Row, experts_of, filled, split, turn_rewards_of
from tokentape.types import Json

CONVENTION = (
    "split behind the first prompt; mask and log-probabilities over the response, not shifted, 0.0 where the "
    "mask is 0; one reward a sample, or one a token where turns have rewards; branches are a session's steps"
)


def rows(samples: Sequence[Row], *, experts_per_token: int | None = None) -> Iterator[Json]:
    """Samples as entries of a `GeneratorOutput`, one each; `trajectory_ids` are the fields of `TrajectoryID`.

    Raises:
        ConfigError: a sample is not sound, has no response or no reward, has routed experts that
            `experts_per_token` does not fit or that others do not have; a session's samples are not adjacent,
            or have rewards that SkyRL would ignore.
    """
    last_of = {sample["session_id"]: index for index, sample in enumerate(samples)}
    _check(samples, last_of)
    per_token = any(_has_turn_rewards(sample) for sample in samples)
    repetitions: dict[str, dict[str, int]] = {}
    for index, sample in enumerate(samples):
        cut = split(sample)
        instance = sample["session_id"] if sample["group_id"] is None else sample["group_id"]
        sessions = repetitions.setdefault(instance, {})
        row: Json = {
            "prompt_token_ids": cut.prompt_ids,
            "response_ids": cut.response_ids,
            "rewards": _token_rewards(sample) if per_token else float(sample["reward"]),
            "loss_masks": cut.response_mask,
            "stop_reasons": sample["turns"][-1]["finish_reason"],
            "rollout_logprobs": filled(cut.response_logprobs),
            "trajectory_ids": {
                "instance_id": instance,
                "repetition_id": sessions.setdefault(sample["session_id"], len(sessions)),
            },
            "is_last_step": last_of[sample["session_id"]] == index,
        }
        if (experts := experts_of(sample, experts_per_token)) is not None:
            row["rollout_expert_indices"] = experts
        yield row


def generator_output(samples: Sequence[Row], *, experts_per_token: int | None = None) -> Json:
    """Samples as the `GeneratorOutput` that a generator's `generate` returns, in their order.

    Raises:
        ConfigError: as `rows`, or there is no sample.
    """
    from skyrl.train.generators.base import TrajectoryID

    made = list(rows(samples, experts_per_token=experts_per_token))
    if not made:
        raise ConfigError("a GeneratorOutput needs a sample, there is none: were the sessions exported?")
    out: dict[str, Any] = {name: [row[name] for row in made] for name in made[0]}
    out["trajectory_ids"] = [TrajectoryID(**fields) for fields in out["trajectory_ids"]]
    absent = (
        "rollout_metrics", "trajectory_generation_times", "env_metrics", "pixel_values", "image_grid_thw",
        "rollout_expert_indices",
    )  # fmt: skip
    return dict.fromkeys(absent) | out


def _check(samples: Sequence[Row], last_of: dict[str, int]) -> None:
    if len({sample["routed_experts"] is None for sample in samples}) > 1:
        raise ConfigError(
            "only some samples have routed experts: SkyRL would fill the others' with zeros; "
            "capture them for all, or set the column routed_experts to None"
        )
    before: Row | None = None
    seen: set[str] = set()
    for index, sample in enumerate(samples):
        name, session_id = f"sample {sample['sample_id']}", sample["session_id"]
        if sample["reward"] is None:
            raise ConfigError(f"{name} has no reward, SkyRL takes none without: give one when it finishes")
        if len(sample["token_ids"]) == sample["num_prompt_tokens"]:
            raise ConfigError(f"{name} has no response, SkyRL takes none without: leave it out")
        if before is None or before["session_id"] != session_id:
            if session_id in seen:
                raise ConfigError(
                    f"{name}: the samples of session {session_id} are not next to each other; "
                    "sort them by session"
                )
            seen.add(session_id)
        elif before["reward"] != sample["reward"]:
            raise ConfigError(
                f"{name}: its reward is not that of sample {before['sample_id']} in session {session_id}; "
                "SkyRL gives all branches of a session the last one's"
            )
        if last_of[session_id] != index and _has_turn_rewards(sample):
            raise ConfigError(
                f"{name} has a turn with a reward and is not the last of session {session_id}; SkyRL would "
                "ignore it: put this sample behind the session's others"
            )
        before = sample


def _has_turn_rewards(sample: Row) -> bool:
    return any(turn["trained"] and turn["reward"] is not None for turn in sample["turns"])


def _token_rewards(sample: Row) -> list[float]:
    out = turn_rewards_of(sample)[sample["num_prompt_tokens"] :]
    out[-1] += sample["reward"]
    return out
