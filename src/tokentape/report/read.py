"""Samples as a report looks at them: sums over tokens are Arrow's, no Python object per token."""

import itertools
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (pyarrow's stubs leave the element types of arrays open)
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tokentape.errors import ConfigError
from tokentape.export.upgrade import schema_version, upgrade
from tokentape.schema import SAMPLES, SCHEMA_VERSION
from tokentape.types import Json

_ROWS = 64
_UNKNOWN = "(not recorded)"
_SCALARS = ("session_id", "sample_id", "group_id", "branch_reason", "label", "reward", "truncated")
_COLUMNS = (*_SCALARS, "num_prompt_tokens", "loss_mask", "logprobs", "weight_versions", "turns")


@dataclass(frozen=True, slots=True)
class Measured:
    """A sample without its tokens.

    `num_trained` of `num_tokens` have mask 1, `num_logprobs` a finite log-probability, with mean
    `mean_logprob` nats (None: there is none). `versions` are those of its spans with their tokens, `turns`
    its entries. `ids` int[num_tokens] only where they were asked for.
    """

    session_id: str
    sample_id: str
    group_id: str | None
    branch_reason: str
    label: str
    reward: float | None
    truncated: bool
    num_prompt_tokens: int
    num_tokens: int
    num_trained: int
    num_logprobs: int
    mean_logprob: float | None
    versions: tuple[tuple[str, int], ...]
    turns: Sequence[Json]
    ids: "array[int] | None"


def measured(path: Path, *, with_ids: bool = False) -> Iterator[Measured]:
    """The samples of a file, a few in memory at a time.

    Raises:
        ConfigError: it is no Parquet file of samples: not one at all, damaged, or a column is missing, of
            another type or null; or its schema version is newer than this tokentape's.
    """
    columns = (*_COLUMNS, "token_ids") if with_ids else _COLUMNS
    try:
        with pq.ParquetFile(path) as file:
            stated = schema_version(str(path), file.schema_arrow)  # a newer one may mean something else
            if stated is not None and stated < SCHEMA_VERSION:
                for batch in _upgraded(path, file):
                    yield from _batch({name: _column(batch, name) for name in columns})
                return
            missing = [name for name in columns if name not in file.schema_arrow.names]
            if missing:
                raise ConfigError(
                    f"{path} is not a Parquet file of samples: it has no column {missing[0]}; a report reads "
                    "what `tokentape export` writes without --format"
                )
            for batch in file.iter_batches(batch_size=_ROWS, columns=[*columns]):
                yield from _batch({name: _column(batch, name) for name in columns})
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ConfigError(
            f"{path} is not a Parquet file of samples: {error}; export it again with `tokentape export`"
        ) from error


def _upgraded(path: Path, file: pq.ParquetFile) -> Iterator[pa.RecordBatch]:
    """Rows of an older version as today's: what nobody wrote down is named so."""
    convert = upgrade(str(path), file.schema_arrow)
    for batch in file.iter_batches(batch_size=_ROWS):
        rows = [dict(convert(row)) for row in batch.to_pylist()]
        for row in rows:
            row["label"] = row["label"] or _UNKNOWN
            row["turns"] = [
                {**turn, "logprob_basis": turn["logprob_basis"] or _UNKNOWN} for turn in row["turns"]
            ]
        yield pa.RecordBatch.from_pylist(rows, schema=SAMPLES)


def _column(batch: pa.RecordBatch, name: str) -> Any:
    """A column of the type that it must have; other writers have wider ones."""
    field = SAMPLES.field(name)
    column: Any = batch.column(batch.schema.get_field_index(name)).cast(field.type)
    if column.null_count and not field.nullable:
        raise ValueError(f"column {name} has a null")
    return column


def _batch(columns: dict[str, Any]) -> Iterator[Measured]:
    mask, logprobs = columns["loss_mask"], columns["logprobs"]
    lengths: list[int] = pc.list_value_length(mask).to_pylist()
    trained = _sums(mask, pc.equal(mask.flatten(), pa.scalar(1, pa.int8())).fill_null(False).cast(pa.int64()))
    values = logprobs.flatten()
    finite = pc.is_finite(values).fill_null(False)
    counts = _sums(logprobs, finite.cast(pa.int64()))
    sums = _sums(logprobs, pc.if_else(finite, values.cast(pa.float64()), 0.0))
    runs = _runs(columns["token_ids"]) if "token_ids" in columns else itertools.repeat(None)
    rest = [columns[name].to_pylist() for name in (*_SCALARS, "num_prompt_tokens")]
    spans, turns = columns["weight_versions"].to_pylist(), columns["turns"].to_pylist()
    if any(turn is None or turn["start"] is None or turn["end"] is None for each in turns for turn in each):
        raise ValueError("a turn has no start or no end")
    if any(span is None or span["start"] is None or span["end"] is None for each in spans for span in each):
        raise ValueError("a version's span has no start or no end")
    for at, (ids, row) in enumerate(zip(runs, zip(*rest, strict=True), strict=False)):
        session_id, sample_id, group_id, reason, label, reward, truncated, num_prompt_tokens = row
        yield Measured(
            session_id=session_id,
            sample_id=sample_id,
            group_id=group_id,
            branch_reason=reason,
            label=label,
            reward=reward,
            truncated=truncated,
            num_prompt_tokens=num_prompt_tokens,
            num_tokens=lengths[at],
            num_trained=trained[at],
            num_logprobs=counts[at],
            mean_logprob=sums[at] / counts[at] if counts[at] else None,
            versions=tuple((str(span["version"]), span["end"] - span["start"]) for span in spans[at]),
            turns=turns[at],
            ids=ids,
        )


def _sums(lists: Any, values: Any) -> list[Any]:
    """The sum of each list's part of `values`, which are all lists' one behind the other."""
    ends = [0, *itertools.accumulate(pc.list_value_length(lists).to_pylist())]
    running = pa.concat_arrays([pa.array([0], values.type), pc.cumulative_sum(values)])
    at_ends: list[Any] = running.take(pa.array(ends, pa.int64())).to_pylist()
    return [after - before for before, after in itertools.pairwise(at_ends)]


def _runs(lists: Any) -> Iterator["array[int]"]:
    values = lists.flatten()
    if values.null_count:
        raise ValueError("column token_ids has a null")
    data = memoryview(values.buffers()[1]).cast("B")[4 * values.offset :] if len(values) else memoryview(b"")
    at = 0
    for length in pc.list_value_length(lists).to_pylist():
        ids: array[int] = array("i")
        ids.frombytes(data[4 * at : 4 * (at + length)])
        at += length
        yield ids
