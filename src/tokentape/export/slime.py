"""slime and miles: a sample as the fields of their `Sample`; groups of them, as a rollout function returns.

Read in the public source of THUDM/slime (`slime/utils/types.py`, `slime/ray/rollout.py`) and radixark/miles
(the same names); neither is on PyPI. Rows are plain: `Sample.from_dict(row)` makes the object, turns `status`
into the enumeration, and keeps a field that an older `Sample` does not have as an attribute.

- Split: `tokens` is the whole tape, `response_length` R how much of its end is the response: all behind the
  first turn's prompt, tool results included.
- `loss_mask`, `rollout_log_probs`: R entries, over the response, not shifted. A log-probability is 0.0 where
  the mask is 0, and only there. slime itself writes 0.0 for a trained token without one; here it is an error.
- A turn that another sample trains is context: mask 0.
- `reward`: one a sample, None where there is none (slime then asks its reward model). Rewards of turns are in
  `metadata["tokentape"]["turn_rewards"]`, one a trained turn: slime has no place for them.
- `group_index` counts the groups from 0 (`group_id`; a session without one is its own group), `index` the
  samples; samples of one session have one `rollout_id`, so that slime weighs it once however many branches
  it has. Where groups have unequal numbers of samples slime normalises rewards over all of them as one group:
  give `--custom-reward-post-process-path` a function that goes by `group_index`.
- `weight_versions`: one a span, in order, trained tokens only. miles' staleness wants integers.
- `rollout_routed_experts`: our N-1 rows of N tokens as they are, `[N-1][layers][experts a token]`.
- Where truncation's support was captured: `rollout_top_p_token_ids` and `_offsets` (R + 1), empty where the
  mask is 0, and `rollout_log_probs` are those of the truncated distribution that slime then replays.
- `prompt` is the first turn's messages. `response`, the decoded text, is left out: nothing here decodes.
- No padding: slime packs.
"""

from collections.abc import Iterator, Sequence

from tokentape.errors import ConfigError
from tokentape.export.row import Row, experts_of, filled, messages_of, metadata_of, split, turns_of
from tokentape.types import Json

CONVENTION = (
    "the whole tape and the response's length; mask and log-probabilities over the response, not shifted, "
    "0.0 where the mask is 0; one reward a sample"
)


def rows(samples: Sequence[Row], *, experts_per_token: int | None = None) -> Iterator[Json]:
    """Samples as the fields of `Sample`, one each: `Sample.from_dict(row)`.

    Raises:
        ConfigError: a sample is not sound, has routed experts that `experts_per_token` does not fit, or has a
            support for some of its trained tokens only.
    """
    group_indices: dict[str, int] = {}
    rollout_ids: dict[str, int] = {}
    for index, sample in enumerate(samples):
        cut = split(sample)
        row: Json = {
            "group_index": group_indices.setdefault(_group(sample), len(group_indices)),
            "index": index,
            "rollout_id": rollout_ids.setdefault(sample["session_id"], len(rollout_ids)),
            "prompt": turns_of(sample)[0][0],
            "tokens": list(sample["token_ids"]),
            "response_length": len(cut.response_ids),
            "reward": sample["reward"],
            "loss_mask": cut.response_mask,
            "weight_versions": [span["version"] for span in sample["weight_versions"]],
            "rollout_log_probs": filled(cut.response_logprobs),
            "status": "truncated" if sample["truncated"] else "completed",
            "metadata": _metadata(sample),
        }
        if sample["support"] is not None:
            row |= _top_p(sample, cut.response_mask)
        if (experts := experts_of(sample, experts_per_token)) is not None:
            row["rollout_routed_experts"] = experts
        yield row


def groups(samples: Sequence[Row], *, experts_per_token: int | None = None) -> list[list[Json]]:
    """The rows of each group, in the order of the groups' first samples: what a rollout function returns.

    Raises:
        ConfigError: as `rows`.
    """
    out: dict[int, list[Json]] = {}
    for row in rows(samples, experts_per_token=experts_per_token):
        out.setdefault(row["group_index"], []).append(row)
    return list(out.values())


def _group(sample: Row) -> str:
    """A key that a group's name and a session's cannot share by accident."""
    return (
        f"group {sample['group_id']}" if sample["group_id"] is not None else f"session {sample['session_id']}"
    )


def _metadata(sample: Row) -> Json:
    metadata = metadata_of(sample)
    metadata["tokentape"] = {
        **metadata.get("tokentape", {}),
        **{name: sample[name] for name in ("session_id", "sample_id", "group_id", "branch_reason", "label")},
        "turn_rewards": [turn["reward"] for turn in sample["turns"] if turn["trained"]],
        "messages": messages_of(sample),
    }
    return metadata


def _top_p(sample: Row, response_mask: Sequence[int]) -> Json:
    start = sample["num_prompt_tokens"]
    kept, logprobs = sample["support"][start:], sample["sampling_logprobs"][start:]
    ids, offsets = list[int](), [0]
    for at, (trained, support, logprob) in enumerate(
        zip(response_mask, kept, logprobs, strict=True), start=start
    ):
        if trained and (support is None or logprob is None):
            raise ConfigError(
                f"sample {sample['sample_id']}: token {at} is trained and has no support, others have; slime "
                "replays truncation for all of a sample's tokens or for none: sample all turns alike"
            )
        if trained:
            ids += support
        offsets.append(len(ids))
    return {
        "rollout_log_probs": filled(logprobs),
        "rollout_top_p_token_ids": ids,
        "rollout_top_p_token_offsets": offsets,
    }
