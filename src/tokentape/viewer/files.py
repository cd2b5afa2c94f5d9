"""A Parquet file of samples as the viewer's source: an index in memory, tokens read on demand."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (pyarrow's stubs leave the element types of arrays open)
import asyncio
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq

from tokentape.errors import ConfigError, NotFound
from tokentape.export.row import Row
from tokentape.export.upgrade import upgrade
from tokentape.schema import SAMPLES
from tokentape.types import Json
from tokentape.viewer.episode import Episode, of_rows, summary_of_rows
from tokentape.viewer.source import Page

_UNSEEN = frozenset(
    ("sampling_logprobs", "support", "routed_experts", "tools")
)  # the page does not show them
_LONG = frozenset(("token_ids", "loss_mask", "logprobs", "messages")) | _UNSEEN


class FileSource:
    """The sessions of a file, which does not change; an older tokentape's are read as today's.

    Raises:
        ConfigError: it is not a Parquet file of samples, or a newer tokentape wrote it.
    """

    kind = "file"

    def __init__(self, path: Path) -> None:
        self.name = path.name
        try:
            said = path.stat()
            self._version = f"{said.st_mtime_ns}-{said.st_size}"
            self._file = pq.ParquetFile(path)
            self._upgraded = upgrade(str(path), self._file.schema_arrow)
            self._names = [name for name in SAMPLES.names if name in self._file.schema_arrow.names]
            self._starts = [0]
            for group in range(self._file.num_row_groups):
                self._starts.append(self._starts[-1] + self._file.metadata.row_group(group).num_rows)
            self._places: dict[str, list[int]] = defaultdict(list)
            short: dict[str, list[Row]] = defaultdict(list)
            for at, row in enumerate(self._short_rows()):
                self._places[row["session_id"]].append(at)
                short[row["session_id"]].append(row)
            summaries = {session_id: summary_of_rows(rows) for session_id, rows in sorted(short.items())}
        except (OSError, ValueError) as error:  # pyarrow's own errors are both
            raise ConfigError(f"{path} is not a Parquet file of samples: {error}") from error
        except KeyError as error:
            raise ConfigError(f"{path} is not a Parquet file of samples: it has no column {error}") from error
        self._summaries = summaries
        self._ids = list(summaries)

    async def page(self, *, after: str, limit: int) -> Page:
        """The sessions behind the id `after`."""
        start = bisect_right(self._ids, after)
        ids = self._ids[start : start + limit]
        return Page([self._summaries[session_id] for session_id in ids], start + limit < len(self._ids))

    async def version(self, session_id: str) -> str:
        """Always the same; another file's, which the same page may be shown later, is another one."""
        await self.summary(session_id)
        return self._version

    async def summary(self, session_id: str) -> Json:
        """Counts of one session."""
        if session_id not in self._summaries:
            raise NotFound(f"session {session_id!r} is not in {self.name}")
        return self._summaries[session_id]

    async def episode(self, session_id: str) -> Episode:
        """One session with all its turns."""
        await self.summary(session_id)
        return await asyncio.to_thread(lambda: of_rows(self._of(session_id)))

    def _short_rows(self) -> Iterator[Row]:
        columns = [name for name in self._names if name not in _LONG]
        for batch in self._file.iter_batches(batch_size=256, columns=columns):
            yield from map(self._upgraded, batch.to_pylist())

    def _of(self, session_id: str) -> list[Row]:
        columns = [name for name in self._names if name not in _UNSEEN]
        rows: list[Row] = []
        groups: dict[int, list[int]] = defaultdict(list)
        for place in self._places[session_id]:
            group = bisect_right(self._starts, place) - 1
            groups[group].append(place - self._starts[group])
        for group, places in groups.items():
            table = self._file.read_row_group(group, columns=columns)
            rows += map(self._upgraded, table.take(places).to_pylist())
        return rows
