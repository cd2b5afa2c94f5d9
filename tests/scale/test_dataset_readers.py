"""Ten million tokens go to an S3-compatible server in bounded memory, and four readers find each one there.

`make scale` installs all that this needs; in `make test` what is not installed is skipped.
"""

import asyncio
import itertools
import json
import subprocess
import sys
import threading
import urllib.request
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pfs
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "core"))
from recorded import record, turn, user

from tokentape.errors import ConfigError
from tokentape.export import export_dataset, read_dataset, stored_samples
from tokentape.store import SQLiteStore
from tokentape.tape import Turn
from tokentape.types import VersionSpan

pytestmark = pytest.mark.filterwarnings("ignore")  # the readers' own

NUM_SESSIONS, NUM_TURNS, TURN_TOKENS = 500, 4, 5000
COLUMNS = ["sample_id", "token_ids", "loss_mask", "logprobs"]
MB = 1 << 20


@dataclass(frozen=True)
class Server:
    """moto, on a port of its own; `bucket` is there and may be written."""

    endpoint: str
    bucket: str = "tapes"

    def uri(self, path: str, bucket: str = "tapes") -> str:
        return f"s3://{bucket}/{path}?endpoint_override={self.endpoint}&scheme=http&region=us-east-1"

    def filesystem(self) -> pfs.FileSystem:
        return pfs.FileSystem.from_uri(self.uri("x"))[0]

    def send(self, method: str, path: str, body: bytes | None = None) -> None:
        headers = {"Content-Type": "text/plain"}
        request = urllib.request.Request(f"http://{self.endpoint}/{path}", body, headers, method=method)
        urllib.request.urlopen(request).read()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    moto = pytest.importorskip("moto.server")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (
            ("AWS_ACCESS_KEY_ID", "key"),
            ("AWS_SECRET_ACCESS_KEY", "secret"),
            ("AWS_EC2_METADATA_DISABLED", "true"),
        ):
            patch.setenv(name, value)
        running = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        running.start()
        host, port = running.get_host_and_port()
        found = Server(f"{host}:{port}")
        found.send("PUT", found.bucket)
        yield found
        running.stop()


def fill(path: Path, num_sessions: int) -> Path:
    """Finished sessions of `NUM_TURNS` turns; half of each turn's tokens are sampled."""
    random, ids = Random(7), itertools.count(1)

    def values(kind: str) -> "array[Any]":
        drawn = array("H", random.randbytes(TURN_TOKENS))
        return array("i", drawn) if kind == "i" else array("f", [-value / 8192 for value in drawn])

    async def put() -> None:
        store = SQLiteStore(path)
        for number in range(num_sessions):
            turns = list[Turn]()
            for at in range(NUM_TURNS):
                made = turn(
                    f"t{next(ids):05d}",
                    parent_id=turns[-1].turn_id if turns else None,
                    branch_reason=None if turns else "root",
                    prompt=values("i"),
                    completion=values("i"),
                    logprobs=values("f"),
                    versions=(VersionSpan("1", 0, TURN_TOKENS // 2),),
                    messages=(user(f"u {number} {at}"),),
                )
                turns.append(made)
            session_id = f"s{number:04d}"
            await store.put_session(record(session_id, state="finished", reward=1.0))
            await store.put_turns(session_id, turns)
        await store.aclose()

    asyncio.run(put())
    return path


_MEASURED = """
import asyncio, json, sys
from pathlib import Path
from tokentape.export import export_dataset
from tokentape.store import SQLiteStore

def kilobytes(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))

async def run():
    store = SQLiteStore(Path(sys.argv[1]), readonly=True)
    added = await export_dataset(store, sys.argv[2], partition_mb=int(sys.argv[3]))
    await store.aclose()
    return added

before = kilobytes("VmRSS")
added = asyncio.run(run())
print(json.dumps([(kilobytes("VmHWM") - before) / 1024, len(added), sum(p.tokens for p in added)]))
"""


def export(store: Path, uri: str, partition_mb: int = 8) -> tuple[float, int, int]:
    """In a process of its own: by how many MiB its memory grew, the number of partitions and of tokens."""
    words = [sys.executable, "-c", _MEASURED, str(store), uri, str(partition_mb)]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE)
    growth_mb, num_partitions, num_tokens = json.loads(done.stdout)
    return growth_mb, num_partitions, num_tokens


@dataclass(frozen=True)
class Exported:
    """What is in the bucket under `path`, and what must be."""

    server: Server
    path: str
    expected: pa.Table
    growth_mb: float


@pytest.fixture(scope="module")
def exported(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    store = fill(tmp_path_factory.mktemp("large") / "s.sqlite", NUM_SESSIONS)
    growth_mb, num_partitions, num_tokens = export(store, server.uri("large/data"))
    assert num_tokens == NUM_SESSIONS * NUM_TURNS * TURN_TOKENS == 10_000_000
    assert num_partitions > 2

    async def samples() -> list[pa.RecordBatch]:
        source = SQLiteStore(store, readonly=True)
        found = [batch async for batch in stored_samples(source)]
        await source.aclose()
        return found

    expected = pa.Table.from_batches(asyncio.run(samples())).select(COLUMNS)
    return Exported(server, "tapes/large/data", alike(expected, expected.schema), growth_mb)


def alike(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The rows in one order and of one type, so that two tables are equal where their values are."""
    nullable = pa.schema([field.with_nullable(True) for field in schema])
    table = table.select(COLUMNS).replace_schema_metadata(None).cast(nullable.remove_metadata())
    return table.sort_by("sample_id").combine_chunks()


def test_memory_is_bounded(
    exported: Exported, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Four times the tokens take no more of it, beyond what allocators keep."""
    small = fill(tmp_path / "s.sqlite", NUM_SESSIONS // 4)
    growth_mb, _, _ = export(small, exported.server.uri("small"))
    record_property("growth_mb of 2.5 and of 10 million tokens", [growth_mb, exported.growth_mb])
    assert exported.growth_mb < 400
    assert exported.growth_mb < growth_mb + 60


def test_tokentape_reads_it(exported: Exported) -> None:
    num_tokens = 0
    expected = zip(*(exported.expected.column(name).to_pylist() for name in COLUMNS), strict=True)
    by_id = {row[0]: row[1:] for row in expected}
    for row in read_dataset(exported.server.uri("large/data")):
        assert (row["token_ids"], row["loss_mask"], row["logprobs"]) == by_id.pop(row["sample_id"])
        num_tokens += len(row["token_ids"])
    assert (num_tokens, by_id) == (10_000_000, {})


def test_polars_reads_it(exported: Exported) -> None:
    polars = pytest.importorskip("polars")
    options = {
        "aws_endpoint_url": f"http://{exported.server.endpoint}",
        "aws_allow_http": "true",
        "aws_region": "us-east-1",
    }
    frame = polars.scan_parquet(f"s3://{exported.path}/*.parquet", storage_options=options)
    found = frame.select(COLUMNS).collect().to_arrow()
    assert alike(found, exported.expected.schema).equals(exported.expected)


class OnePlaceAThread:
    """A file to read in which each thread has a place of its own.

    DuckDB 2.0.1 seeks and reads in one Python file from several threads (`async_threads`, eight of them also
    where `threads` is 1): 4 of 15 queries of three files ended in "ZSTD Decompression failure" and the like.
    """

    def __init__(self, file: Any) -> None:
        self._file = file
        self._place = threading.local()

    def seek(self, at: int, whence: int = 0) -> int:
        assert whence == 0
        self._place.at = at
        return at

    def tell(self) -> int:
        return getattr(self._place, "at", 0)

    def read(self, size: int) -> bytes:
        content = self._file.stream.read_at(size, self.tell())
        self._place.at = self.tell() + len(content)
        return content

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def through_arrow(server: Server, seen: Callable[[Any], Any] = lambda file: file) -> Any:
    """An fsspec filesystem over Arrow's: in place of s3fs, and of an extension that DuckDB downloads."""
    arrow = pytest.importorskip("fsspec.implementations.arrow")

    class S3(arrow.ArrowFSWrapper):
        protocol = "s3"
        cachable = False

        def __init__(self, **options: Any) -> None:
            super().__init__(server.filesystem(), **options)

        def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
            return seen(super()._open(path, mode, **options))

    return S3


def test_duckdb_reads_it(exported: Exported) -> None:
    duckdb = pytest.importorskip("duckdb")
    with duckdb.connect() as connection:
        connection.register_filesystem(through_arrow(exported.server, OnePlaceAThread)())
        query = f"SELECT {', '.join(COLUMNS)} FROM read_parquet('s3://{exported.path}/*.parquet')"
        found = connection.sql(query).to_arrow_table()
    assert alike(found, exported.expected.schema).equals(exported.expected)


def test_datasets_reads_it(exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    fsspec = pytest.importorskip("fsspec")
    known = fsspec.registry.get("s3")
    fsspec.register_implementation("s3", through_arrow(exported.server), clobber=True)
    try:
        read = datasets.load_dataset(
            "parquet", data_files=f"s3://{exported.path}/*.parquet", split="train", cache_dir=str(tmp_path)
        )
        found = read.select_columns(COLUMNS).with_format("arrow")[:]
    finally:
        if known is not None:
            fsspec.register_implementation("s3", known, clobber=True)
    assert alike(found, exported.expected.schema).equals(exported.expected)


def test_ray_reads_it(exported: Exported) -> None:
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    ray.init(num_cpus=1, include_dashboard=False, object_store_memory=400 * MB, log_to_driver=False)
    try:
        read = ray.data.read_parquet(exported.path, filesystem=exported.server.filesystem())
        batches = read.select_columns(COLUMNS).iter_batches(batch_format="pyarrow", batch_size=None)
        found = pa.concat_tables(list(batches))
    finally:
        ray.shutdown()
    assert alike(found, exported.expected.schema).equals(exported.expected)


def test_a_lost_token_would_be_seen(exported: Exported) -> None:
    """The comparison itself: one null in ten million values, or one row fewer."""
    logprobs = exported.expected.column("logprobs").combine_chunks()
    mask = pa.array([at == 7_654_321 for at in range(len(logprobs.values))])
    spoiled = pa.ListArray.from_arrays(logprobs.offsets, pc.if_else(mask, None, logprobs.values))
    at = exported.expected.schema.get_field_index("logprobs")
    for other in (exported.expected.set_column(at, "logprobs", spoiled), exported.expected.slice(1)):
        assert not alike(other, exported.expected.schema).equals(exported.expected)


# -- a bucket that is not ours


def refused(uri: str, tmp_path: Path) -> str:
    store = fill(tmp_path / "s.sqlite", 1)

    async def run() -> str:
        source = SQLiteStore(store, readonly=True)
        try:
            with pytest.raises(ConfigError) as caught:
                await export_dataset(source, uri)
        finally:
            await source.aclose()
        return str(caught.value)

    return asyncio.run(run())


def test_no_such_bucket(server: Server, tmp_path: Path) -> None:
    text = refused(server.uri("data", bucket="absent"), tmp_path)
    assert text.startswith("s3://absent/data cannot be")
    assert "\n" not in text


def test_a_bucket_without_rights(server: Server, tmp_path: Path) -> None:
    """moto takes no key from now on; afterwards nothing is there."""
    server.send("POST", "moto-api/reset-auth", b"0")
    try:
        text = refused(server.uri("denied/data"), tmp_path)
    finally:
        server.send("POST", "moto-api/reset-auth", b"inf")
    assert text.startswith("s3://tapes/denied/data cannot be")
    assert "\n" not in text
    selector = pfs.FileSelector("tapes/denied", recursive=True, allow_not_found=True)
    assert server.filesystem().get_file_info(selector) == []


def test_an_upload_that_is_cut(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of its parts is refused for good: no object is left, and the next export adds everything."""
    models = pytest.importorskip("moto.s3.models")
    whole = models.FakeMultipart.set_part

    def fail(upload: Any, part_id: int, value: bytes) -> Any:
        if int(part_id) > 1:
            raise OSError("no room")
        return whole(upload, part_id, value)

    store = fill(tmp_path / "s.sqlite", 250)
    uri = server.uri("cut/data")
    with monkeypatch.context() as patch:
        patch.setattr(models.FakeMultipart, "set_part", fail)
        done = subprocess.run(
            [sys.executable, "-m", "tokentape", "export", "--store", str(store), "--dataset", uri],
            check=False,
            capture_output=True,
            text=True,
        )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "s3://tapes/cut/data cannot take part-000001" in done.stderr
    names = [info.base_name for info in server.filesystem().get_file_info(pfs.FileSelector("tapes/cut/data"))]
    assert names == ["_writer"]
    assert export(store, uri)[2] == 250 * NUM_TURNS * TURN_TOKENS
