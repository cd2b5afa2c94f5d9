"""OpenRLHF: a sample as what an agent executor's `execute` returns, and as the `Experience` made of it.

Read in openrlhf 0.11.2, `openrlhf/utils/agent.py`, `trainer/ppo_utils/samples_generator.py` and
`experience.py`.

- No split: `observation_tokens` and `rollout_log_probs` are over the whole tape of N tokens, not shifted;
  OpenRLHF drops the first entry of mask and log-probabilities itself. A log-probability is 0.0 where the mask
  is 0, and only there. OpenRLHF reads them only with `is_correction_level` on.
- `action_ranges`: (start, end) of each turn that this sample trains and that sampled something; OpenRLHF
  makes the mask of it. A turn that another sample trains is in none: context.
- `reward`: one a sample, at the last trained token; OpenRLHF asks its reward model where it is None.
  `scores` is the same number, what dynamic filtering goes by. Rewards of turns are not read by OpenRLHF:
  `turn_rewards`, one a trained turn, stand beside, as do `weight_versions` (spans) and the ids.
- `extra_logs` are numbers for logging. They are empty.
- `prompt` is the first turn's messages as JSON text and `label` empty: OpenRLHF hands both on to logs. Give
  the ones it called `execute` with.
- Groups go by place: `execute` is called `n_samples_per_prompt` times a prompt and returns one dict each. A
  session of several samples does not fit (`output` says so); rows carry `group_id`.
- OpenRLHF cuts off what is longer than `max_len`, without a word: here it is an error. A mask of zeros makes
  its means NaN: also an error, of `output` and `experiences`.
- Padding is OpenRLHF's own, right. Routed experts: it replays none: they are an error.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

# pyright: reportMissingImports=false, reportUnknownVariableType=false, reportUnknownMemberType=false
from tokentape.errors import ConfigError
from tokentape.export.row import Row, checked, filled, turns_of
from tokentape.types import Json

CONVENTION = (
    "the whole tape, and ranges of the turns it trains; log-probabilities over the tape, not shifted, 0.0 "
    "where nothing is trained; one reward a sample"
)
_BESIDE = ("turn_rewards", "weight_versions", "session_id", "sample_id", "group_id")
"""What a row has and OpenRLHF's own dicts have not."""


def rows(samples: Sequence[Row]) -> Iterator[Json]:
    """Samples as what `execute` returns, one each; ranges as lists of two.

    Raises:
        ConfigError: a sample is not sound, its mask is not that of its trained turns, or it has routed
            experts.
    """
    for sample in samples:
        checked(sample)
        _refuse(sample)
        yield {
            "prompt": msgspec.json.encode(turns_of(sample)[0][0]).decode(),
            "label": "",
            "images": None,
            "mm_train_inputs": None,
            "reward": sample["reward"],
            "scores": sample["reward"],
            "observation_tokens": list(sample["token_ids"]),
            "action_ranges": _ranges(sample),
            "rollout_log_probs": filled(sample["logprobs"]),
            "truncated": sample["truncated"],
            "extra_logs": {},
            "turn_rewards": [turn["reward"] for turn in sample["turns"] if turn["trained"]],
            "weight_versions": [dict(span) for span in sample["weight_versions"]],
            **{key: sample[key] for key in ("session_id", "sample_id", "group_id")},
        }


def output(
    samples: Sequence[Row], *, prompt: str, label: Any, max_length: int, images: Any = None
) -> dict[str, Any]:
    """What an agent executor's `execute` returns for one session: `prompt` … as it was called with them.

    Raises:
        ConfigError: as `rows`; the session has not one sample, or it is longer than `max_length`, which
            OpenRLHF would cut off, or trains nothing.
    """
    if len(samples) != 1:
        raise ConfigError(
            f"{len(samples)} samples, OpenRLHF takes one for each call of `execute`: an agent that forks its "
            "history does not fit"
        )
    [row] = rows(samples)
    _fits(row, max_length)
    made = {name: value for name, value in row.items() if name not in _BESIDE}
    ranges = [(start, end) for start, end in row["action_ranges"]]
    return made | {"prompt": prompt, "label": label, "images": images, "action_ranges": ranges}


def experiences(samples: Sequence[Row], *, max_length: int) -> list[Any]:
    """Samples as OpenRLHF's own `Experience`s, [1, N] each, as it makes them of `execute`'s dicts.

    `sequences`, `attention_mask` int64[1, N]; `action_mask` int64[1, N-1], `rollout_log_probs`
    float32[1, N-1], entry i of token i + 1; `rewards` and `scores` float32[1], None where there is no reward.

    Raises:
        ConfigError: as `rows`; one is longer than `max_length`, or trains nothing.
    """
    import torch
    from openrlhf.trainer.ppo_utils.experience import Experience

    made: list[Any] = []
    for row in rows(samples):
        _fits(row, max_length)
        size, reward = len(row["observation_tokens"]), row["reward"]
        mask = torch.zeros(size, dtype=torch.int64)
        for start, end in row["action_ranges"]:
            mask[start:end] = 1
        ranges = row["action_ranges"]
        info = {"response_clip_ratio": torch.tensor([size >= max_length])}
        if reward is not None:
            info |= {name: torch.tensor([reward], dtype=torch.float32) for name in ("reward", "score")}
        made.append(
            Experience(
                sequences=torch.tensor([row["observation_tokens"]], dtype=torch.int64),
                attention_mask=torch.ones((1, size), dtype=torch.int64),
                action_mask=mask[1:].unsqueeze(0),
                rollout_log_probs=torch.tensor([row["rollout_log_probs"][1:]], dtype=torch.float32),
                prompts=[row["prompt"]],
                labels=[row["label"]],
                images=[None],
                mm_train_inputs=[None],
                rewards=info.get("reward"),
                scores=info.get("score"),
                response_length=torch.tensor([ranges[-1][1] - ranges[0][0]]),
                truncated=torch.tensor([row["truncated"]]),
                total_length=torch.tensor([float(size)]),
                info=info,
            )
        )
    return made


def _ranges(sample: Row) -> list[list[int]]:
    ranges = [
        [turn["start"], turn["end"]]
        for turn in sample["turns"]
        if turn["trained"] and turn["end"] > turn["start"]
    ]
    mask = [0] * len(sample["token_ids"])
    for start, end in ranges:
        mask[start:end] = [1] * (end - start)
    if mask != list(sample["loss_mask"]):
        raise ConfigError(
            f"sample {sample['sample_id']}: its mask is not that of its trained turns, and OpenRLHF takes "
            "turns: say trained: false of a turn whose mask you cleared"
        )
    return ranges


def _fits(row: Json, max_length: int) -> None:
    name, size = f"sample {row['sample_id']}", len(row["observation_tokens"])
    if size > max_length:
        raise ConfigError(f"{name} has {size} tokens, max_length is {max_length}: OpenRLHF would cut it off")
    if not row["action_ranges"]:
        raise ConfigError(f"{name} trains nothing, and OpenRLHF's means over it are NaN: leave it out")


def _refuse(sample: Row) -> None:
    if sample["routed_experts"] is not None:
        raise ConfigError(
            f"sample {sample['sample_id']} has routed experts, and OpenRLHF replays none: set the column "
            "routed_experts to None to train without"
        )
