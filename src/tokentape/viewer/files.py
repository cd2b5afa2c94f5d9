"""A Parquet file of samples as the viewer's source: an index in memory, tokens read on demand."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (pyarrow's stubs leave the element types of arrays open)
import asyncio
from bisect import bisect_right
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from tokentape.errors import ConfigError, NotFound
from tokentape.export.row import Row
from tokentape.schema import SAMPLES
from tokentape.types import Json
from tokentape.viewer.episode import Episode, of_rows, summary_of_rows
from tokentape.viewer.source import Page

_LONG = (
    "token_ids",
    "loss_mask",
    "logprobs",
    "sampling_logprobs",
    "support",
    "routed_experts",
    "tools",
    "messages",
)
_SHOWN = ("sampling_logprobs", "support", "routed_experts")  # of these nothing is shown


class FileSource:
    """The sessions of a file, which does not change.

    Raises:
        ConfigError: it is not a Parquet file of samples.
    """

    kind = "file"

    def __init__(self, path: Path) -> None:
        self.name = path.name
        try:
            self._file = pq.ParquetFile(path)
            names = set(self._file.schema_arrow.names)
            if missing := [name for name in SAMPLES.names if name not in names and name not in _SHOWN]:
                raise ConfigError(
                    f"{path} is not a Parquet file of samples: it has no column {', '.join(missing)}"
                )
            self._starts = [0]
            for group in range(self._file.num_row_groups):
                self._starts.append(self._starts[-1] + self._file.metadata.row_group(group).num_rows)
            self._places: dict[str, list[int]] = defaultdict(list)
            short: dict[str, list[Row]] = defaultdict(list)
            for at, row in enumerate(self._rows([name for name in SAMPLES.names if name not in _LONG])):
                self._places[row["session_id"]].append(at)
                short[row["session_id"]].append(row)
        except (OSError, ValueError) as error:  # pyarrow's own errors are both
            raise ConfigError(f"{path} is not a Parquet file of samples: {error}") from error
        self._summaries = {session_id: summary_of_rows(rows) for session_id, rows in sorted(short.items())}
        self._ids = list(self._summaries)

    async def page(self, *, after: str, limit: int) -> Page:
        """The sessions behind the id `after`."""
        start = bisect_right(self._ids, after)
        ids = self._ids[start : start + limit]
        return Page([self._summaries[session_id] for session_id in ids], start + limit < len(self._ids))

    async def version(self, session_id: str) -> str:
        """Always the same."""
        await self.summary(session_id)
        return "1"

    async def summary(self, session_id: str) -> Json:
        """Counts of one session."""
        if session_id not in self._summaries:
            raise NotFound(f"session {session_id!r} is not in {self.name}")
        return self._summaries[session_id]

    async def episode(self, session_id: str) -> Episode:
        """One session with all its turns."""
        await self.summary(session_id)
        return await asyncio.to_thread(lambda: of_rows(self._of(session_id)))

    def _rows(self, columns: list[str]) -> Any:
        for batch in self._file.iter_batches(batch_size=256, columns=columns):
            yield from batch.to_pylist()

    def _of(self, session_id: str) -> list[Row]:
        columns = [name for name in SAMPLES.names if name not in _SHOWN]
        rows: list[Row] = []
        groups: dict[int, list[int]] = defaultdict(list)
        for place in self._places[session_id]:
            group = bisect_right(self._starts, place) - 1
            groups[group].append(place - self._starts[group])
        for group, places in groups.items():
            rows += self._file.read_row_group(group, columns=columns).take(places).to_pylist()
        return rows
