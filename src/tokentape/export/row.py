"""A sample as exporters read it: the columns of a row, and the few ways in which trainers cut it up."""

import base64
import contextlib
import math
import sys
from array import array
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
import msgspec
import pyarrow.parquet as pq

from tokentape.errors import ConfigError
from tokentape.export.upgrade import upgrade
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


_ROWS = 64
_AGAIN = "; export it again, and let `tokentape verify` say what else is wrong"
_EXPERT_CODES: Mapping[str, str] = {"uint8": "B", "uint16": "H", "int32": "i"}


def checked(row: Row) -> Row:
    """The sample itself, if a trainer may have it: arrays of one length, log-probabilities where it trains.

    Every exporter reads through this: what is missing is said here, and never filled.

    Raises:
        ConfigError: the arrays disagree, a trained token has no finite log-probability, another has one, or
            the first prompt or a first token is trained.
    """
    name, mask, logprobs = f"sample {row['sample_id']}", row["loss_mask"], row["logprobs"]
    if not len(row["token_ids"]) == len(mask) == len(logprobs):
        raise ConfigError(f"{name}: token_ids, loss_mask and logprobs are not of one length{_AGAIN}")
    for at, (trained, logprob) in enumerate(zip(mask, logprobs, strict=True)):
        if trained not in (0, 1):
            raise ConfigError(f"{name}: loss_mask[{at}] is {trained!r}, not 0 or 1{_AGAIN}")
        if trained and (logprob is None or not math.isfinite(logprob)):
            raise ConfigError(f"{name}: token {at} is trained, its log-probability is {logprob!r}{_AGAIN}")
        if not trained and logprob is not None:
            raise ConfigError(f"{name}: token {at} is not trained, but has a log-probability{_AGAIN}")
    if not 0 <= row["num_prompt_tokens"] <= len(mask) or any(mask[: row["num_prompt_tokens"]]):
        raise ConfigError(
            f"{name}: num_prompt_tokens {row['num_prompt_tokens']} does not fit the mask{_AGAIN}"
        )
    if mask and mask[0]:
        raise ConfigError(f"{name}: its first token is trained, and no model predicts a first token")
    return row


def split(row: Row) -> Split:
    """Cut a sample behind its first turn's prompt; what later turns were given is in the response.

    Raises:
        ConfigError: the sample is not sound (`checked`).
    """
    checked(row)
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


def experts_of(row: Row, experts_per_token: int | None) -> list[list[list[int]]] | None:
    """The experts of all tokens but the last, `int[N-1][layers][experts_per_token]`; None where not captured.

    A sample holds one flat row a token, and how many experts a token has is not in it.

    Raises:
        ConfigError: `experts_per_token` is not given or does not divide the row, or there are not N-1 rows.
    """
    routed = row["routed_experts"]
    if routed is None:
        return None
    name, width = f"sample {row['sample_id']}", routed["width"]
    if experts_per_token is None:
        raise ConfigError(
            f"{name} has routed experts, {width} a token over all layers: say experts_per_token, the experts "
            "that a token is sent to in each layer"
        )
    if width < 1 or experts_per_token < 1 or width % experts_per_token:
        raise ConfigError(f"{name}: {width} routed experts a token are no multiple of {experts_per_token}")
    if routed["dtype"] not in _EXPERT_CODES:
        raise ConfigError(f"{name}: routed_experts is of {routed['dtype']}, not one of {[*_EXPERT_CODES]}")
    data = routed["data"]
    values = array(_EXPERT_CODES[routed["dtype"]], base64.b64decode(data) if isinstance(data, str) else data)
    if sys.byteorder == "big":
        values.byteswap()
    if len(values) != (len(row["token_ids"]) - 1) * width:
        raise ConfigError(f"{name}: routed_experts is not of {len(row['token_ids']) - 1} tokens")
    flat, step = values.tolist(), experts_per_token
    return [
        [flat[at : at + step] for at in range(start, start + width, step)]
        for start in range(0, len(flat), width)
    ]


def messages_of(row: Row) -> list[Json]:
    """The conversation as the agent saw it, in OpenAI's shape."""
    return cast("list[Json]", msgspec.json.decode(row["messages"]))


def turns_of(row: Row) -> list[tuple[list[Json], Json]]:
    """What each turn was given and what it said, as texts; all of them together are `messages_of`.

    A row keeps no cut between turns' messages: an assistant's words that no turn sampled (few-shot examples,
    an imported history) are taken for the first prompt's. Token ids do not depend on it.
    """
    messages, out = messages_of(row), list[tuple[list[Json], Json]]()
    end = len(messages)
    for index in reversed(range(len(row["turns"]))):
        reply = end - 1
        before = 0
        if index:
            before = next(at for at in reversed(range(reply)) if messages[at]["role"] == "assistant") + 1
        out.append((messages[before:reply], messages[reply]))
        end = before
    return out[::-1]


def metadata_of(row: Row) -> Json:
    """What the caller knows of the session."""
    return cast("Json", msgspec.json.decode(row["metadata"]))


def sessions_in(path: str | Path) -> Counter[str]:
    """How many samples each session has in a Parquet file.

    Raises:
        ConfigError: as `read_rows`.
    """
    with _opened(path) as file:
        names = file.read(columns=["session_id"]).column("session_id").to_pylist()
    return Counter(map(str, names))


def read_rows(path: str | Path) -> Iterator[Row]:
    """The samples of a Parquet file, a few in memory at a time; an older tokentape's as today's (`upgrade`).

    Raises:
        ConfigError: it is no Parquet file, is damaged, is not one of samples, or a newer tokentape wrote it.
    """
    with _opened(path) as file:
        yield from rows_of(str(path), file)


def rows_of(name: str, file: Any) -> Iterator[Row]:
    """The samples of an open `pyarrow.parquet.ParquetFile`, as `read_rows`; `name` is for errors.

    Raises:
        ConfigError: an older version's cannot be read as today's, or a newer tokentape wrote them.
    """
    upgraded = upgrade(name, file.schema_arrow)
    for batch in file.iter_batches(batch_size=_ROWS):  # others write row groups of any size
        yield from map(upgraded, batch.to_pylist())


@contextlib.contextmanager
def _opened(path: str | Path) -> Generator[Any]:
    try:
        with pq.ParquetFile(path) as file:
            for name in ("session_id", "token_ids"):
                if name not in file.schema_arrow.names:
                    raise ConfigError(
                        f"{path} is not a Parquet file of samples: it has no column {name}; "
                        "`tokentape export` without --format writes one"
                    )
            yield file
    except (OSError, ValueError) as error:  # pyarrow's own errors are both
        raise ConfigError(
            f"{path} is not a Parquet file of samples: {error}; `tokentape export` writes one"
        ) from error
