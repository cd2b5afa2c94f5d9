"""NeMo-RL: a sample as a `DatumSpec` with its message log, as a rollout leaves it for GRPO.

Read in the public source of NVIDIA-NeMo/RL, `nemo_rl/`: `data/interfaces.py`, `data/llm_message_utils.py`,
`experience/rollouts.py`, `algorithms/grpo.py`. `nemo-rl` on PyPI is an empty placeholder.

- Split: one message for what each turn was given and one for what it sampled; their `token_ids` one after the
  other are the tape.
- `token_ids`, `token_loss_mask`, `generation_logprobs`: parallel, not shifted; NeMo-RL drops the first place
  itself. A log-probability is 0.0 where the mask is 0, and only there. NeMo-RL too fills 0.0 where a message
  has none; that would hide a missing one, so all are written.
- NeMo-RL makes the mask again by role: "assistant" is trained. So a turn that another sample trains has the
  role "environment", as what tools answered has; what a user said has "user".
- `total_reward`: one a sample; NeMo-RL knows no missing one: it is an error. Rewards of turns are
  `extra_env_info["turn_rewards"]`, one a trained turn.
- `truncated`: the last turn was cut by length; NeMo-RL's overlong filtering reads it.
- Groups: NeMo-RL compares samples whose first prompts have the same token ids; `group_id` is in
  `extra_env_info`. With several branches a session counts several times.
- `routed_experts`: a message's rows, `[tokens][layers][experts a token]`. Our N-1 rows of N tokens are
  followed by one of -1, NeMo-RL's own mark for a token without a route.
- `content` is the text, for reading: token ids do not come from it. No padding: NeMo-RL pads right.
"""

from collections.abc import Iterator, Sequence

from tokentape.errors import ConfigError
from tokentape.export.row import Row, checked, experts_of, filled, turns_of
from tokentape.types import Json

CONVENTION = (
    "a message for each prompt part and each turn, whose tokens are the tape; mask and log-probabilities not "
    "shifted, 0.0 where the mask is 0; one reward a sample"
)
_NO_ROUTE = -1


def rows(samples: Sequence[Row], *, experts_per_token: int | None = None) -> Iterator[Json]:
    """Samples as the fields of `DatumSpec`, lists for tensors, one each, with `total_reward` and `truncated`.

    Raises:
        ConfigError: a sample is not sound, has no reward, or has routed experts that `experts_per_token` does
            not fit.
    """
    for index, sample in enumerate(samples):
        checked(sample)
        if sample["reward"] is None:
            raise ConfigError(
                f"sample {sample['sample_id']} has no reward, NeMo-RL takes none without: give one when it "
                "finishes"
            )
        yield {
            "message_log": list(_messages(sample, _routes(sample, experts_per_token))),
            "length": len(sample["token_ids"]),
            "extra_env_info": {
                **{name: sample[name] for name in ("session_id", "sample_id", "group_id")},
                "weight_versions": [dict(span) for span in sample["weight_versions"]],
                "turn_rewards": [turn["reward"] for turn in sample["turns"] if turn["trained"]],
            },
            "loss_multiplier": 1.0,
            "idx": index,
            "total_reward": float(sample["reward"]),
            "truncated": sample["truncated"],
        }


def datums(samples: Sequence[Row], *, experts_per_token: int | None = None) -> list[Json]:
    """Samples as rollouts leave them: ids, mask int64, log-probabilities, reward float32, experts int32.

    Raises:
        ConfigError: as `rows`.
    """
    import torch

    types = {"token_ids": torch.int64, "token_loss_mask": torch.int64, "generation_logprobs": torch.float32}
    types["routed_experts"] = torch.int32
    made = list(rows(samples, experts_per_token=experts_per_token))
    for sample, row in zip(samples, made, strict=True):
        row["total_reward"] = torch.tensor(row["total_reward"], dtype=torch.float32)
        for message in row["message_log"]:
            for name in types.keys() & message.keys():
                message[name] = torch.tensor(message[name], dtype=types[name])
            if "routed_experts" in message:  # a message without tokens has the shape all the same
                num_layers = sample["routed_experts"]["width"] // (experts_per_token or 1)
                shape = len(message["token_ids"]), num_layers, experts_per_token
                message["routed_experts"] = message["routed_experts"].reshape(shape)
    return made


def _routes(sample: Row, experts_per_token: int | None) -> list[list[list[int]]] | None:
    """One row for each of N tokens."""
    experts = experts_of(sample, experts_per_token)
    if experts is None or experts_per_token is None:
        return None
    num_layers = sample["routed_experts"]["width"] // experts_per_token
    return [*experts, [[_NO_ROUTE] * experts_per_token for _ in range(num_layers)]]


def _messages(sample: Row, experts: list[list[list[int]]] | None) -> Iterator[Json]:
    at = 0
    for turn, (given, reply) in zip(sample["turns"], turns_of(sample), strict=True):
        role = "environment" if given and all(message["role"] == "tool" for message in given) else "user"
        text = "\n".join(message["content"] or "" for message in given)
        yield _message(sample, experts, role, text, at, turn["start"])
        role = "assistant" if turn["trained"] else "environment"
        yield _message(sample, experts, role, reply["content"] or "", turn["start"], turn["end"])
        at = turn["end"]


def _message(
    sample: Row, experts: list[list[list[int]]] | None, role: str, content: str, start: int, end: int
) -> Json:
    message: Json = {
        "role": role,
        "content": content,
        "token_ids": sample["token_ids"][start:end],
        "token_loss_mask": sample["loss_mask"][start:end],
        "generation_logprobs": filled(sample["logprobs"][start:end]),
    }
    if experts is not None:
        message["routed_experts"] = experts[start:end]
    return message
