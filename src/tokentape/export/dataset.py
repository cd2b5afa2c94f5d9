"""A dataset: a folder of Parquet files to which every export adds the sessions that have finished since.

What is in a dataset, its partitions say themselves: a session is in it when a partition has its rows, and a
partition is there when it is complete. So nothing is added twice or lost, wherever an export ends. The
manifest sums up; it is written anew from the partitions whenever it differs from them.
"""

import asyncio
import re
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
import msgspec
import pyarrow as pa
import pyarrow.fs as pfs
import pyarrow.parquet as pq

from tokentape.errors import ConfigError
from tokentape.export.folder import Folder
from tokentape.export.row import Row, rows_of
from tokentape.export.samples import stored_samples
from tokentape.export.upgrade import schema_version
from tokentape.schema import SAMPLES, SCHEMA_VERSION
from tokentape.store import Store

MANIFEST = "_manifest.json"
PARTITION_MB = 128
_PARTITION = re.compile(r"part-(\d{6,})-[0-9a-f]{8}\.parquet")
_COUNTS = "tokentape.partition"  # in a partition's metadata: what its footer does not count
_GROUP_BYTES = 16 << 20  # of Arrow, as much as is in memory before it goes into a row group
_READERS = 8


@dataclass(frozen=True, slots=True)
class Partition:
    """One file of a dataset, as the manifest lists it; `created_at` is in seconds since the epoch."""

    file: str
    schema_version: int
    rows: int
    tokens: int
    sessions: int
    bytes: int
    created_at: float


@dataclass(frozen=True, slots=True)
class Manifest:
    """The partitions of a dataset, oldest first, and the newest schema version among them."""

    schema_version: int
    partitions: tuple[Partition, ...]


@dataclass(frozen=True, slots=True)
class _Counts:
    tokens: int
    created_at: float


async def export_dataset(
    store: Store,
    uri: str | Path,
    session_ids: Sequence[str] = (),
    *,
    partition_mb: int = PARTITION_MB,
    max_staleness: int | None = None,
    at_version: str | None = None,
    on_stale: Callable[[str], None] = lambda _: None,
    filesystem: pfs.FileSystem | None = None,
) -> tuple[Partition, ...]:
    """Add to a dataset the finished sessions that it has not yet; the partitions that were added.

    A partition is complete in the dataset before the next is begun, and ends with the session that makes it
    larger than `partition_mb` MiB. In memory are one session and the rows of one row group.

    Args:
        store: is read, beside a gateway that writes it.
        uri: `s3://…`, `gs://…`, `file://…` or a local path; with `filesystem`, a path there.
        session_ids: only of these, which must be finished.
        partition_mb: 0 gives every session a partition.
        max_staleness: as `stored_samples` has it, and so `at_version` and `on_stale`.
        at_version: see there.
        on_stale: see there.
        filesystem: an Arrow filesystem of your own.

    Raises:
        ConfigError: before anything is read of the store: the folder cannot be listed, read or written, is
            another process's, or holds what is no partition, is damaged, or has other columns. Later: it
            cannot be written any more, or another export has taken over; what was added until then is there.
    """
    folder = Folder(uri, filesystem)
    with folder.writing() as still_mine:
        dataset = _Dataset(folder, still_mine, partition_mb << 20)
        batches = stored_samples(
            store,
            tuple(dict.fromkeys(session_ids)),
            finished=True,
            without=dataset.sessions,
            max_staleness=max_staleness,
            at_version=at_version,
            on_stale=on_stale,
        )
        with dataset:
            async for batch in batches:
                if batch.num_rows:  # not in this thread: Ctrl-C would end an upload where Arrow completes it
                    await asyncio.to_thread(dataset.add, batch)
            await asyncio.to_thread(dataset.finish)
        return tuple(dataset.new)


def read_dataset(uri: str | Path, filesystem: pfs.FileSystem | None = None) -> Iterator[Row]:
    """The samples of a dataset, oldest partition first, a few in memory at a time.

    Partitions that an older tokentape wrote are read as today's (`upgrade`).

    Raises:
        ConfigError: the folder cannot be read, is empty or holds what is no partition; a partition is damaged
            or a newer tokentape's.
    """
    folder = Folder(uri, filesystem)
    files = _partition_files(folder)
    if not files:
        raise ConfigError(f"{folder.name} holds no dataset: there is no partition; export into it first")
    for file in files:
        with _opened(folder, file) as parquet:
            yield from rows_of(folder.path_of(file), parquet)


def read_manifest(uri: str | Path, filesystem: pfs.FileSystem | None = None) -> Manifest:
    """What the partitions of a dataset hold, as they say themselves: the manifest may be a partition behind.

    Raises:
        ConfigError: as `read_dataset`.
    """
    folder = Folder(uri, filesystem)
    return _manifest(list(_contents(folder)))


class _Dataset:
    """A dataset that this process writes: the sessions in it, and the partition that is being made."""

    def __init__(self, folder: Folder, still_mine: Callable[[], bool], limit: int) -> None:
        contents = _contents(folder, appending=True)
        self.sessions = frozenset[str]().union(*contents.values())
        self.new: list[Partition] = []
        self._folder = folder
        self._still_mine = still_mine
        self._limit = limit
        self._partitions = list(contents)
        self._part: _Part | None = None
        if self._partitions:
            self._sum_up()

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        if self._part is not None:
            self._part.drop()

    def add(self, batch: pa.RecordBatch) -> None:
        """Take the rows of a session."""
        if self._part is None:
            number = 1 + max((_number(partition.file) for partition in self._partitions), default=0)
            file = f"part-{number:06d}-{uuid.uuid4().hex[:8]}.parquet"
            self._part = _Part(self._folder, file, min(_GROUP_BYTES, self._limit))
        self._part.add(batch)
        if self._part.num_bytes >= self._limit:
            self.finish()

    def finish(self) -> None:
        """Let the partition that is being made appear, then the manifest that lists it."""
        if self._part is None:
            return
        part, self._part = self._part, None
        try:
            partition = part.close()
            self._check()
            self._folder.put(part.file, part.path)
        finally:
            part.drop()
        with ExitStack() as undo:
            # Who takes over lists the partitions after that: either it saw this one, or we see it here.
            undo.callback(self._folder.remove, part.file)
            self._check()
            undo.pop_all()
        self._partitions.append(partition)
        self.new.append(partition)
        self._sum_up()

    def _check(self) -> None:
        if not self._still_mine():
            raise ConfigError(
                f"another export has taken over {self._folder.name}: what this one has not added yet, "
                "the next will"
            )

    def _sum_up(self) -> None:
        """Write the manifest, where it does not say what is there."""
        content = msgspec.json.format(msgspec.json.encode(_manifest(self._partitions)))
        if MANIFEST in self._folder.files():
            with self._folder.opened(MANIFEST) as file:
                if file.read() == content:
                    return
        self._folder.put_bytes(MANIFEST, content)


class _Part:
    """A partition on its way: a local file that grows by row groups."""

    def __init__(self, folder: Folder, file: str, group_bytes: int) -> None:
        self.file = file
        self._name = folder.path_of(file)
        self._group_bytes = group_bytes
        self._waiting: list[pa.RecordBatch] = []
        self._waiting_bytes = self._num_rows = self._tokens = self._num_sessions = 0
        with ExitStack() as stack, _written(self._name):
            self.path = stack.enter_context(folder.scratch(file))
            self._sink = stack.enter_context(pa.OSFile(str(self.path), "wb"))
            self._writer = pq.ParquetWriter(self._sink, SAMPLES, compression="zstd")
            self._open = stack.pop_all()

    @property
    def num_bytes(self) -> int:
        """What is written; not what waits for a row group."""
        return self._sink.tell()

    def add(self, batch: pa.RecordBatch) -> None:
        """Take the rows of one session."""
        self._waiting.append(batch)
        self._waiting_bytes += batch.nbytes
        self._num_rows += batch.num_rows
        self._num_sessions += 1
        self._tokens += len(cast("pa.ListArray[Any]", batch.column("token_ids")).flatten())
        if self._waiting_bytes >= self._group_bytes:
            self._write_group()

    def close(self) -> Partition:
        """Complete the local file."""
        counts = _Counts(self._tokens, time.time())
        if self._waiting:
            self._write_group()
        with _written(self._name):
            self._writer.add_key_value_metadata({_COUNTS: msgspec.json.encode(counts).decode()})
            self._writer.close()
            self._sink.close()
            size = self.path.stat().st_size
        return Partition(
            self.file,
            SCHEMA_VERSION,
            self._num_rows,
            counts.tokens,
            self._num_sessions,
            size,
            counts.created_at,
        )

    def drop(self) -> None:
        """Let go of the local file."""
        with suppress(OSError, ValueError):  # a disk that is full does not take the footer either
            self._writer.close()
        self._open.close()

    def _write_group(self) -> None:
        with _written(self._name):
            self._writer.write_table(pa.Table.from_batches(self._waiting))
        self._waiting, self._waiting_bytes = [], 0


@contextmanager
def _written(name: str) -> Generator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot make {name}: {' '.join(str(error).split())}") from error


@contextmanager
def _opened(folder: Folder, file: str) -> Generator[pq.ParquetFile]:
    with folder.opened(file) as source, pq.ParquetFile(source) as parquet:
        yield parquet


def _partition_files(folder: Folder) -> dict[str, int]:
    """The partitions' files and sizes, oldest first; what is no Parquet file is nobody's business.

    Raises:
        ConfigError: the folder cannot be listed; readers would take other Parquet files for partitions.
    """
    found = {file: size for file, size in folder.files().items() if file.endswith(".parquet")}
    if strange := sorted(file for file in found if not _PARTITION.fullmatch(file)):
        raise ConfigError(
            f"{folder.path_of(strange[0])} is no partition of a dataset: use a folder of its own"
        )
    return dict(sorted(found.items(), key=lambda item: (_number(item[0]), item[0])))


def _number(file: str) -> int:
    return int(file.split("-")[1])


def _contents(folder: Folder, *, appending: bool = False) -> dict[Partition, frozenset[str]]:
    """The partitions, oldest first, and the sessions of each: only footers and one column are read.

    Raises:
        ConfigError: as `export_dataset`; a session is in two partitions.
    """

    def content(item: tuple[str, int]) -> tuple[Partition, frozenset[str]]:
        file, size = item
        with _opened(folder, file) as parquet:
            if appending and not parquet.schema_arrow.equals(SAMPLES):
                raise ConfigError(_other_columns(folder, file, parquet))
            version = schema_version(folder.path_of(file), parquet.schema_arrow)
            metadata = parquet.metadata
            counts = _counts(metadata.metadata or {})
            if version is None or counts is None:
                raise ConfigError(f"{folder.path_of(file)} is no partition of a dataset: it lacks its counts")
            ids = frozenset(map(str, parquet.read(columns=["session_id"]).column("session_id").to_pylist()))
        made = Partition(file, version, metadata.num_rows, counts.tokens, len(ids), size, counts.created_at)
        return made, ids

    with ThreadPoolExecutor(_READERS, "tokentape-partitions") as pool:
        contents = dict(pool.map(content, _partition_files(folder).items()))
    holders: dict[str, str] = {}
    for partition, ids in contents.items():
        for session_id in ids:
            if (other := holders.setdefault(session_id, partition.file)) != partition.file:
                raise ConfigError(
                    f"{folder.name} has session {session_id} twice, in {other} and {partition.file}, as two "
                    "exports wrote at the same time: remove one, and what only it had is exported again"
                )
    return contents


def _other_columns(folder: Folder, file: str, parquet: pq.ParquetFile) -> str:
    version = schema_version(folder.path_of(file), parquet.schema_arrow)  # a newer one says so itself
    return (
        f"{folder.path_of(file)} has other columns, of schema version {version}, and most readers want all "
        "partitions alike: export to a new folder"
    )


def _counts(metadata: dict[bytes, bytes]) -> _Counts | None:
    try:
        return msgspec.json.decode(metadata.get(_COUNTS.encode(), b""), type=_Counts)
    except msgspec.DecodeError:
        return None


def _manifest(partitions: Sequence[Partition]) -> Manifest:
    newest = max((partition.schema_version for partition in partitions), default=SCHEMA_VERSION)
    return Manifest(newest, tuple(partitions))
