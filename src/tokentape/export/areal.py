"""AReaL: a sample as the trajectory that a workflow's `arun_episode` returns, a dict of tensors [1, N].

Read in areal 1.0.4, `areal/workflow/rlvr.py`, `areal/experimental/openai/types.py`, `areal/utils/data.py`,
`areal/trainer/ppo/actor.py`.

- No split: `input_ids`, `loss_mask`, `logprobs`, `versions` are over the whole tape of N tokens, not shifted;
  AReaL rolls mask and log-probabilities by one itself. `logprobs` is 0.0 where the mask is 0, and only there.
- A turn that another sample trains is context: mask 0. AReaL's own export of a tree trains it in each branch.
- `versions`: an integer for each trained token, -1 elsewhere. Ours are texts: a version of decimal digits is
  its number; for others give `versions`, a number for each name. One without a number is an error.
- `rewards`: one a sample; AReaL puts it where the last token is predicted. It makes a missing one 0.0, here
  it is an error. Where any turn has a reward all samples get `turn_rewards`, one a token, at the turn's last:
  AReaL pads, packs and carries it along, and its own losses do not read it.
- `attention_mask`: all true. Padding is AReaL's own, right, with zeros.
- Groups: AReaL's group norms go by place. Concatenate the trajectories of a group to one of [G, N]; with
  several branches a session has several rows in it.
- Routed experts: AReaL's trainer replays none, and a trajectory has no place for them: they are an error.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tokentape.errors import ConfigError
from tokentape.export.row import Row, checked, filled, turn_rewards_of, versions_of
from tokentape.types import Json

CONVENTION = (
    "the whole tape as [1, N]; mask, log-probabilities and integer versions over it, not shifted, 0.0 and -1 "
    "where the mask is 0; one reward a sample"
)
_NO_VERSION = -1


def rows(samples: Sequence[Row], *, versions: Mapping[str, int] | None = None) -> Iterator[Json]:
    """Samples as the entries of a trajectory, lists for tensors, one each.

    Raises:
        ConfigError: a sample is not sound, has no reward or has routed experts, or one of its versions is no
            number and `versions` has none for it.
    """
    with_turn_rewards = any(
        turn["trained"] and turn["reward"] is not None for sample in samples for turn in sample["turns"]
    )
    for sample in samples:
        checked(sample)
        _refuse(sample)
        row: Json = {
            "input_ids": [list(sample["token_ids"])],
            "loss_mask": [list(sample["loss_mask"])],
            "logprobs": [filled(sample["logprobs"])],
            "versions": [_numbers(sample, versions or {})],
            "attention_mask": [[True] * len(sample["token_ids"])],
            "rewards": [float(sample["reward"])],
        }
        if with_turn_rewards:
            row["turn_rewards"] = [turn_rewards_of(sample)]
        yield row


def trajectories(
    samples: Sequence[Row], *, versions: Mapping[str, int] | None = None
) -> list[dict[str, Any]]:
    """Samples as AReaL's own trajectories; `areal.utils.data.concat_padded_tensors` makes a batch of them.

    int32 ids, mask and versions, float32 log-probabilities and rewards, bool attention mask.

    Raises:
        ConfigError: as `rows`.
    """
    import torch

    types = {"attention_mask": torch.bool, "logprobs": torch.float32, "rewards": torch.float32}
    types["turn_rewards"] = torch.float32
    return [
        {name: torch.tensor(values, dtype=types.get(name, torch.int32)) for name, values in row.items()}
        for row in rows(samples, versions=versions)
    ]


def _refuse(sample: Row) -> None:
    name = f"sample {sample['sample_id']}"
    if sample["reward"] is None:
        raise ConfigError(f"{name} has no reward, AReaL takes none without: give one when it finishes")
    if sample["routed_experts"] is not None:
        raise ConfigError(
            f"{name} has routed experts, and AReaL replays none: set the column routed_experts to None to "
            "train without"
        )


def _numbers(sample: Row, numbers: Mapping[str, int]) -> list[int]:
    out: list[int] = []
    for version in versions_of(sample):
        if version is None:
            out.append(_NO_VERSION)
        elif version in numbers:
            out.append(numbers[version])
        elif version.isdecimal():
            out.append(int(version))
        else:
            raise ConfigError(
                f"sample {sample['sample_id']}: weight version {version!r} is no number, which AReaL needs: "
                "give `versions`, a number for each"
            )
    return out
