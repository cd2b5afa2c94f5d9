"""verl: a sample as `AgentLoopOutput`, what a custom agent loop returns, and samples as a padded `DataProto`.

Read in verl 0.9.1, `verl/experimental/agent_loop/agent_loop.py`.

- Split: `prompt_ids` is the first turn's prompt, `response_ids` all that follows, tool results included. The
  cut is counted from the front: verl's own `[-len(response_mask):]` takes everything when the mask is empty.
- `response_mask`, `response_logprobs`: parallel to `response_ids`, not shifted. A log-probability is 0.0
  where the mask is 0, and only there: verl has no null, and multiplies by the mask.
- A turn that another sample trains is context: mask 0.
- `reward_score`: one a sample, None where there is none (verl's reward loop then computes one); verl puts it
  on the last response token. Rewards of turns are `extra_fields["turn_scores"]`, one a trained turn, None
  where it has none; verl carries them along and does not train on them by itself.
- `num_turns` counts as verl's tool agent does: each generation, each bridge, the first prompt.
- `min_global_steps`, `max_global_steps` are the oldest and newest weights, where all versions are integers
  as verl's are; the versions as they are stand in `extra_fields["weight_versions"]`.
- `routed_experts`: our N-1 rows of N tokens as `[N-1][layers][experts a token]`, from the first prompt token
  on; verl fills the last token's row with zeros and does not replay it.
- Padding (`batch`): prompts left, responses right, with the pad id; masks and log-probabilities 0.
- A session of several branches is several outputs. verl's queue-based loop (`trainer/ppo/v1`) takes such a
  list from one run, gives all of them the last one's reward, and cannot store an empty response with one.
"""

from collections.abc import Iterator, Sequence
from typing import Any

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportMissingImports=false
# pyright: reportUnknownArgumentType=false
from tokentape.errors import ConfigError
from tokentape.export.row import Row, experts_of, filled, split
from tokentape.types import Json

CONVENTION = (
    "split behind the first prompt; mask and log-probabilities over the response, not shifted, 0.0 where the "
    "mask is 0; one reward a sample"
)


def rows(samples: Sequence[Row], *, experts_per_token: int | None = None) -> Iterator[Json]:
    """Samples as the fields of `AgentLoopOutput`, one each: `AgentLoopOutput(**row)`.

    Raises:
        ConfigError: a sample is not sound, or has routed experts and `experts_per_token` does not fit them.
    """
    for sample in samples:
        cut = split(sample)
        row: Json = {
            "prompt_ids": cut.prompt_ids,
            "response_ids": cut.response_ids,
            "response_mask": cut.response_mask,
            "response_logprobs": filled(cut.response_logprobs),
            "reward_score": sample["reward"],
            "num_turns": 2 * len(sample["turns"]),
            "metrics": {},
            "extra_fields": _extra(sample),
        }
        if (experts := experts_of(sample, experts_per_token)) is not None:
            row["routed_experts"] = experts
        yield row


def outputs(samples: Sequence[Row], *, experts_per_token: int | None = None) -> list[Any]:
    """Samples as verl's own `AgentLoopOutput`s, for a custom agent loop to return; experts as int16 arrays.

    Raises:
        ConfigError: as `rows`.
    """
    import numpy as np
    from verl.experimental.agent_loop.agent_loop import AgentLoopOutput

    made: list[Any] = []
    for row in rows(samples, experts_per_token=experts_per_token):
        if "routed_experts" in row:
            row["routed_experts"] = np.asarray(row["routed_experts"], dtype=np.int16)
        made.append(AgentLoopOutput(**row))
    return made


def batch(
    samples: Sequence[Row],
    *,
    pad_token_id: int,
    prompt_length: int,
    response_length: int,
    experts_per_token: int | None = None,
) -> Any:
    """Samples as the `DataProto` that verl's trainers read: B samples, P prompt_length, R response_length.

    `prompts` int64[B, P], `responses`, `response_mask` int64[B, R], `rollout_log_probs` float32[B, R],
    `input_ids`, `attention_mask`, `position_ids` int64[B, P + R]; `rm_scores` float32[B, R] where every
    sample has a reward. `non_tensor_batch["uid"]` is the group that advantages are relative to:
    `group_id`, else the session's id.

    Raises:
        ConfigError: as `rows`; there is no sample, one is longer than the lengths allow (nothing is cut off),
            or only some have routed experts.
    """
    import numpy as np
    import torch
    from tensordict import TensorDict
    from verl import DataProto

    made = list(rows(samples, experts_per_token=experts_per_token))
    _check(samples, made, prompt_length, response_length)
    tensors: dict[str, list[Any]] = {}
    for row in made:
        for name, values in _padded(row, pad_token_id, prompt_length, response_length).items():
            tensors.setdefault(name, []).append(values)
    columns: dict[str, Any] = {
        name: torch.tensor(values, dtype=torch.float32 if name == "rollout_log_probs" else torch.int64)
        for name, values in tensors.items()
    }
    if "routed_experts" in made[0]:
        columns["routed_experts"] = _experts(made, prompt_length, response_length)
    if all(row["reward_score"] is not None for row in made):
        scores = torch.zeros((len(made), response_length), dtype=torch.float32)
        for index, row in enumerate(made):
            scores[index, len(row["response_ids"]) - 1] = row["reward_score"]
        columns["rm_scores"] = scores
    others: dict[str, list[Any]] = {
        "uid": [sample["group_id"] or sample["session_id"] for sample in samples],
        "__num_turns__": [row["num_turns"] for row in made],
    }
    for name in sorted({"min_global_steps", "max_global_steps", "extras"} | set(made[0]["extra_fields"])):
        others[name] = [row["extra_fields"].get(name) for row in made]
    return DataProto(
        batch=TensorDict(columns, batch_size=len(made)),
        non_tensor_batch={name: _objects(np, values) for name, values in others.items()},
        meta_info={"metrics": [row["metrics"] for row in made], "reward_extra_keys": []},
    )


def _extra(sample: Row) -> Json:
    versions = [span["version"] for span in sample["weight_versions"]]
    extra: Json = {
        "turn_scores": [turn["reward"] for turn in sample["turns"] if turn["trained"]],
        "tool_rewards": [],
        "reward_extra_info": {},
        "weight_versions": versions,
        "session_id": sample["session_id"],
        "sample_id": sample["sample_id"],
        "group_id": sample["group_id"],
    }
    if versions and all(version.isdecimal() for version in versions):
        steps = [int(version) for version in versions]
        extra |= {"min_global_steps": min(steps), "max_global_steps": max(steps)}
    return extra


def _check(samples: Sequence[Row], made: Sequence[Json], prompt_length: int, response_length: int) -> None:
    if not made:
        raise ConfigError("a batch needs a sample, there is none: were the sessions exported?")
    if len({"routed_experts" in row for row in made}) > 1:
        raise ConfigError(
            "only some samples have routed experts: a batch takes them from all or from none; "
            "capture them for all, or set the column routed_experts to None"
        )
    for sample, row in zip(samples, made, strict=True):
        for name, limit in (("prompt", prompt_length), ("response", response_length)):
            if len(row[f"{name}_ids"]) > limit:
                raise ConfigError(
                    f"sample {sample['sample_id']}: its {name} has {len(row[f'{name}_ids'])} tokens, "
                    f"{name}_length is {limit}; raise it, or leave the sample out"
                )


def _padded(row: Json, pad_token_id: int, prompt_length: int, response_length: int) -> dict[str, list[Any]]:
    prompt, response = row["prompt_ids"], row["response_ids"]
    left, right = prompt_length - len(prompt), response_length - len(response)
    attention = [0] * left + [1] * (len(prompt) + len(response)) + [0] * right
    return {
        "prompts": [pad_token_id] * left + prompt,
        "responses": response + [pad_token_id] * right,
        "response_mask": row["response_mask"] + [0] * right,
        "rollout_log_probs": row["response_logprobs"] + [0.0] * right,
        "input_ids": [pad_token_id] * left + prompt + response + [pad_token_id] * right,
        "attention_mask": attention,
        "position_ids": _positions(attention),
    }


def _positions(attention: Sequence[int]) -> list[int]:
    """As verl counts: from 0 at the first token, 0 before it, and on through the padding behind."""
    out: list[int] = []
    seen = 0
    for attended in attention:
        seen += attended
        out.append(max(seen - 1, 0))
    return out


def _experts(made: Sequence[Json], prompt_length: int, response_length: int) -> Any:
    """int16[B, P + R, layers, experts a token], from each sample's first token on; the rest zero."""
    import torch

    size = (len(made), prompt_length + response_length)
    parts = [torch.tensor(row["routed_experts"], dtype=torch.int16) for row in made]
    out = torch.zeros((*size, *parts[0].shape[1:]), dtype=torch.int16)
    for index, (row, part) in enumerate(zip(made, parts, strict=True)):
        start = prompt_length - len(row["prompt_ids"])
        out[index, start : start + len(part)] = part
    return out


def _objects(np: Any, values: list[Any]) -> Any:
    out = np.empty(len(values), dtype=object)
    out[:] = values
    return out
