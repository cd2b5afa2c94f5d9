"""Hugging Face datasets: a sample as a row that transformers' collators pad, with what RL needs beside it.

Read in datasets 5.2.0 (`Features`) and transformers 5, `data/data_collator.py`.

- No split: `input_ids`, `attention_mask` (all 1) and `labels` are over the whole tape of N tokens, not
  shifted: transformers' models shift. `labels` are the token ids where the mask is 1, else -100, which
  transformers' losses leave out. `num_prompt_tokens` says where the first turn's prompt ends.
- `logprobs` and `weight_versions` are over the tape too, null where the mask is 0 and only there: Arrow has
  nulls. A collator that makes tensors of `logprobs` must fill them itself: where `labels` is -100.
- A turn that another sample trains is context: labels -100. A sample may have no other labels, if all its
  turns are trained elsewhere or sampled nothing; a loss that averages over such a batch alone is NaN.
- `reward`: one a sample, null where there is none. Turns are parallel columns, one entry a turn, context or
  not: `turn_starts`, `turn_ends` (of the sampled span), `turn_trained`, `turn_rewards` (null where none).
- `group_id` is what group-relative advantages go by, null where a session has none.
- `sampling_logprobs`, `support`, `routed_experts` (`[N-1][layers][experts a token]`): null where there are
  none.
- No padding. `messages`, `tools`, `metadata` are JSON texts. The sample's label is `agent`: collators take a
  column `label` for a class.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# pyright: reportMissingImports=false, reportMissingTypeStubs=false, reportUnknownVariableType=false, reportUnknownMemberType=false
from tokentape.export.row import Row, checked, experts_of, read_rows, versions_of
from tokentape.types import Json

CONVENTION = (
    "the whole tape; labels -100, log-probabilities and weight versions null where the mask is 0, not "
    "shifted; one reward a sample, and one a turn"
)
IGNORED = -100
"""The label that transformers' losses leave out."""

_SAME = (
    "session_id", "sample_id", "group_id", "branch_reason", "reward", "truncated", "num_prompt_tokens",
    "messages", "tools", "metadata",
)  # fmt: skip


def rows(samples: Sequence[Row], *, experts_per_token: int | None = None) -> Iterator[Json]:
    """Samples as plain rows, one each: `datasets.Dataset.from_list(list(rows(samples)), features())`.

    Raises:
        ConfigError: a sample is not sound, or has routed experts that `experts_per_token` does not fit.
    """
    for sample in samples:
        checked(sample)
        ids, mask, turns = sample["token_ids"], sample["loss_mask"], sample["turns"]
        support = sample["support"]
        yield {
            "input_ids": list(ids),
            "attention_mask": [1] * len(ids),
            "labels": [token if trained else IGNORED for token, trained in zip(ids, mask, strict=True)],
            "logprobs": list(sample["logprobs"]),
            "weight_versions": versions_of(sample),
            **{name: sample[name] for name in _SAME},
            "agent": sample["label"],
            "turn_starts": [turn["start"] for turn in turns],
            "turn_ends": [turn["end"] for turn in turns],
            "turn_trained": [turn["trained"] for turn in turns],
            "turn_rewards": [turn["reward"] for turn in turns],
            "sampling_logprobs": _copied(sample["sampling_logprobs"]),
            "support": None if support is None else [_copied(kept) for kept in support],
            "routed_experts": experts_of(sample, experts_per_token),
        }


def features() -> Any:
    """The columns' types, as `datasets.Features`: int32 ids and labels, float32 log-probabilities."""
    import datasets

    def many(kind: str) -> Any:
        return datasets.List(datasets.Value(kind))

    texts = ("session_id", "sample_id", "group_id", "branch_reason", "messages", "tools", "metadata", "agent")
    return datasets.Features(
        {
            **{name: many("int32") for name in ("input_ids", "labels", "turn_starts", "turn_ends")},
            "attention_mask": many("int8"),
            **{name: many("float32") for name in ("logprobs", "sampling_logprobs")},
            "weight_versions": many("string"),
            **{name: datasets.Value("string") for name in texts},
            "reward": datasets.Value("float64"),
            "truncated": datasets.Value("bool"),
            "num_prompt_tokens": datasets.Value("int32"),
            "turn_trained": many("bool"),
            "turn_rewards": many("float64"),
            "support": datasets.List(many("int32")),
            "routed_experts": datasets.List(datasets.List(many("int32"))),
        }
    )


def dataset(samples: Sequence[Row] | str | Path, *, experts_per_token: int | None = None) -> Any:
    """Samples, or those of a Parquet file of samples, as a `datasets.Dataset` in memory, in their order.

    Raises:
        ConfigError: as `rows`, or it is no file of samples.
    """
    import datasets

    given = list(read_rows(samples)) if isinstance(samples, (str, Path)) else samples
    return datasets.Dataset.from_list(
        list(rows(given, experts_per_token=experts_per_token)), features=features()
    )


def _copied(values: Sequence[Any] | None) -> list[Any] | None:
    return None if values is None else list(values)
