"""A sample as exporters read it: the columns of a row, and the few ways in which trainers cut it up."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
import msgspec
import pyarrow.parquet as pq

from tokentape.errors import ConfigError
from tokentape.types import Json

Row: TypeAlias = Mapping[str, Any]
"""A sample as `pyarrow.parquet.read_table(…).to_pylist()` and `GET /sessions/{id}/samples` give it."""


@dataclass(frozen=True, slots=True)
class Split:
    """A sample as prompt and response: P tokens that began it, then R of which some were sampled.

    `prompt_ids` int[P]; `response_ids` int[R], `response_mask` int[R] (1: sampled and trained),
    `response_logprobs` float[R] nats, None where the mask is 0.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    response_mask: list[int]
    response_logprobs: list[float | None]


def split(row: Row) -> Split:
    """Cut a sample behind its first turn's prompt; what later turns were given is in the response."""
    at = row["num_prompt_tokens"]
    return Split(row["token_ids"][:at], row["token_ids"][at:], row["loss_mask"][at:], row["logprobs"][at:])


def filled(logprobs: Sequence[float | None], value: float = 0.0) -> list[float]:
    """Log-probabilities for a trainer that has no null: `value` where the mask is 0, and only there."""
    return [value if logprob is None else logprob for logprob in logprobs]


def versions_of(row: Row) -> list[str | None]:
    """The weights that sampled each of the sample's N tokens, None where the mask is 0."""
    out: list[str | None] = [None] * len(row["token_ids"])
    for span in row["weight_versions"]:
        out[span["start"] : span["end"]] = [span["version"]] * (span["end"] - span["start"])
    return out


def turn_rewards_of(row: Row) -> list[float]:
    """A reward for each of the sample's N tokens: a turn's own at its last sampled token, 0.0 elsewhere.

    The sample's own reward is not in it.
    """
    out = [0.0] * len(row["token_ids"])
    for turn in row["turns"]:
        if turn["trained"] and turn["reward"] is not None and turn["end"] > turn["start"]:
            out[turn["end"] - 1] += turn["reward"]
    return out


def messages_of(row: Row) -> list[Json]:
    """The conversation as the agent saw it, in OpenAI's shape."""
    return cast("list[Json]", msgspec.json.decode(row["messages"]))


def metadata_of(row: Row) -> Json:
    """What the caller knows of the session."""
    return cast("Json", msgspec.json.decode(row["metadata"]))


def read_rows(path: str | Path) -> Iterator[Row]:
    """The samples of a Parquet file, one row group in memory at a time.

    Raises:
        ConfigError: it is no Parquet file, or not one of samples.
    """
    try:
        file = pq.ParquetFile(path)
    except (OSError, ValueError) as error:  # pyarrow's own errors are both
        raise ConfigError(f"{path} is not a Parquet file of samples: {error}") from error
    with file:
        if "token_ids" not in file.schema_arrow.names:
            raise ConfigError(f"{path} is not a Parquet file of samples: it has no column token_ids")
        for index in range(file.num_row_groups):
            yield from file.read_row_group(index).to_pylist()
