"""`tokentape export --dataset`: every finished session once, whatever ends an export and wherever."""

import asyncio
import itertools
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from episodes import forked, rows, single
from objects import BUCKET, Killed, Objects
from recorded import Recorder, record, said, user

from tokentape.cli import main
from tokentape.errors import ConfigError
from tokentape.export import dataset as module
from tokentape.export import export_dataset, read_dataset, read_manifest, read_rows
from tokentape.export import folder as folder_module
from tokentape.export.folder import Folder
from tokentape.export.row import Row
from tokentape.schema import SAMPLES, SCHEMA_VERSION
from tokentape.store import SQLiteStore, Store
from tokentape.tape import LogprobBasis
from tokentape.types import Sampling, VersionSpan


def fill(
    path: Path, session_ids: Sequence[str], *, start: int = 1, version: str = "1", **changes: Any
) -> None:
    """Finished sessions of one turn each; the id of a sample is the session's number."""

    async def put() -> None:
        store = SQLiteStore(path)
        for at, session_id in enumerate(session_ids, start=start):
            recorder = Recorder(names=itertools.count(at), ids=itertools.count(100 * at))
            turn = recorder.run([user(f"u {session_id}")], said("a"), versions=(VersionSpan(version, 0, 2),))
            await store.put_session(record(session_id, **{"state": "finished", **changes}))
            await store.put_turns(session_id, [turn])
            await store.put_version(version, "engine")
        await store.aclose()

    asyncio.run(put())


def add(
    store: Path, uri: Any, session_ids: Sequence[str] = (), **options: Any
) -> tuple[module.Partition, ...]:
    async def run() -> tuple[module.Partition, ...]:
        source = SQLiteStore(store, readonly=True)
        try:
            return await export_dataset(source, uri, session_ids, **options)
        finally:
            await source.aclose()

    return asyncio.run(run())


def held(uri: Any, **options: Any) -> list[str]:
    """The sessions of a dataset, sorted, as often as they are there."""
    return sorted(row["session_id"] for row in read_dataset(uri, **options))


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if not path.name.startswith("_"))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Four finished sessions, s1 to s4."""
    fill(tmp_path / "s.sqlite", ["s1", "s2", "s3", "s4"])
    return tmp_path / "s.sqlite"


# -- what is added


def test_each_export_adds_what_has_finished_since(store: Path, tmp_path: Path) -> None:
    fill(store, ["s0", "s5"], start=5, state="open")
    [first] = add(store, tmp_path / "new" / "data")
    assert (first.sessions, first.rows, first.tokens) == (4, 4, 20)
    assert add(store, tmp_path / "new/data") == ()
    fill(store, ["r1", "t1"], start=7)  # before and behind those that are there
    [second] = add(store, f"file://{tmp_path}/new/data/")
    assert held(tmp_path / "new/data") == ["r1", "s1", "s2", "s3", "s4", "t1"]
    found = json.loads((tmp_path / "new/data/_manifest.json").read_text())
    assert found["schema_version"] == SCHEMA_VERSION
    assert [module.Partition(**one) for one in found["partitions"]] == [first, second]
    assert read_manifest(tmp_path / "new/data").partitions == (first, second)
    assert [p.bytes for p in (first, second)] == [
        (tmp_path / "new/data" / p.file).stat().st_size for p in (first, second)
    ]


def test_rows_are_those_of_a_file(store: Path, tmp_path: Path) -> None:
    """Column by column, and the partitions have the file's schema."""
    out = tmp_path / "rows.parquet"
    assert CliRunner().invoke(main, ["export", "--store", str(store), "--out", str(out)]).exit_code == 0
    partitions = add(store, tmp_path / "data", partition_mb=0)
    assert list(read_dataset(tmp_path / "data")) == list(read_rows(out))
    for partition in partitions:
        assert pq.read_schema(tmp_path / "data" / partition.file).equals(SAMPLES)


def test_partitions_and_row_groups_end_with_sessions(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [p.sessions for p in add(store, tmp_path / "each", partition_mb=0)] == [1, 1, 1, 1]
    assert [name[:12] for name in names(tmp_path / "each")] == [f"part-00000{n}-" for n in (1, 2, 3, 4)]
    monkeypatch.setattr(module, "_GROUP_BYTES", 1)
    [one] = add(store, tmp_path / "one")
    assert pq.ParquetFile(tmp_path / "one" / one.file).num_row_groups == 4


def test_chosen_sessions(store: Path, tmp_path: Path) -> None:
    fill(store, ["s5"], start=5, state="open")
    fill(store, ["s6"], start=6, version="3")
    assert [p.sessions for p in add(store, tmp_path / "d", ["s2", "s2", "s1"])] == [2]
    assert [p.sessions for p in add(store, tmp_path / "d", ["s2", "s3"])] == [1]
    for wrong, words in (("s5", "s5 is open"), ("s9", "no such session")):
        with pytest.raises(ConfigError, match=words):
            add(store, tmp_path / "d", ["s4", wrong])
    assert held(tmp_path / "d") == ["s1", "s2", "s3"]
    stale: list[str] = []
    add(store, tmp_path / "d", max_staleness=0, on_stale=stale.append)
    assert (held(tmp_path / "d"), stale) == (["s1", "s2", "s3", "s6"], ["s4"])
    add(store, tmp_path / "d")
    assert held(tmp_path / "d") == ["s1", "s2", "s3", "s4", "s6"]


def test_a_session_that_is_deleted_meanwhile(store: Path, tmp_path: Path) -> None:
    class Deleting(SQLiteStore):
        async def read(self, session_id: str) -> Any:
            return None if session_id == "s2" else await super().read(session_id)

    async def run() -> None:
        source = Deleting(store, readonly=True)
        await export_dataset(source, tmp_path / "d")
        await source.aclose()

    asyncio.run(run())
    assert held(tmp_path / "d") == ["s1", "s3", "s4"]


# -- crashes: at every step, before and after it has had its effect


def at_step(number: int, do: Callable[[], None]) -> Callable[[int, str], None]:
    def hook(at: int, _: str) -> None:
        if at == number:
            do()

    return hook


def kill() -> None:
    raise Killed


def num_steps(store: Path, objects: Objects) -> int:
    """Of an undisturbed export to a copy of these objects."""
    client = Objects(dict(objects.stored)).client()
    add(store, BUCKET, filesystem=client.filesystem, partition_mb=0)
    assert {step.split()[0] for step in client.steps} == {"list", "create", "write", "close", "stat", "read"}
    return len(client.steps)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_at_any_step_on_an_object_store(store: Path, moment: str) -> None:
    begun = Objects()
    add(store, BUCKET, ["s1"], filesystem=begun.client().filesystem)
    add_two = {"session_ids": ["s1", "s2", "s3"], "partition_mb": 0}
    for number in range(num_steps(store, begun)):
        objects = Objects(dict(begun.stored))
        client = objects.client(**{moment: at_step(number, kill)})
        with pytest.raises((Killed, ConfigError, OSError)):
            add(store, BUCKET, filesystem=client.filesystem, partition_mb=0)
        assert client.dead
        between = held(BUCKET, filesystem=objects.client().filesystem)
        assert set(Counter(between).values()) == {1}, client.steps[-1]  # readers see no half of anything
        add(store, BUCKET, filesystem=objects.client().filesystem, **add_two)
        add(store, BUCKET, filesystem=objects.client().filesystem)
        fs = objects.client().filesystem
        assert held(BUCKET, filesystem=fs) == ["s1", "s2", "s3", "s4"], client.steps[-1]
        kept = json.loads(objects.stored[f"{BUCKET}/_manifest.json"])
        assert [p["file"] for p in kept["partitions"]] == [
            n for n in objects.names() if n.startswith("part-")
        ]


_DYING = """
import asyncio, itertools, os, sys
from pathlib import Path
from tokentape.export import export_dataset
from tokentape.store import SQLiteStore

def dying(uri, number):
    seen = itertools.count(1)

    def hook(event, args):
        if event in ("os.rename", "os.remove", "open", "os.mkdir", "fcntl.flock") and uri in str(args):
            if next(seen) == number:
                os._exit(9)

    async def run():
        source = SQLiteStore(Path("s.sqlite"), readonly=True)
        await export_dataset(source, uri, partition_mb=0)

    sys.addaudithook(hook)
    asyncio.run(run())
    os._exit(0)

for number in itertools.count(1):
    pid = os.fork()
    if pid == 0:
        dying(f"data-{number:02d}", number)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code != 9:
        sys.exit(code)
"""


def test_killed_at_any_step_in_a_local_folder(tmp_path: Path) -> None:
    """A real process that is gone at once, whenever a file of the dataset is opened, renamed or removed."""
    fill(tmp_path / "s.sqlite", ["s1", "s2"])
    subprocess.run([sys.executable, "-c", _DYING], check=True, cwd=tmp_path)
    left = sorted(tmp_path.glob("data-*"))
    assert len(left) > 12
    for uri in left:
        assert all(name.endswith((".parquet", ".partial")) for name in names(uri))
        if any(name.endswith(".parquet") for name in names(uri)):
            assert set(Counter(held(uri)).values()) == {1}
        add(tmp_path / "s.sqlite", uri)
        assert held(uri) == ["s1", "s2"], uri.name
        assert [path.name for path in uri.glob(".*")] == []
        found = json.loads((uri / "_manifest.json").read_text())["partitions"]
        assert read_manifest(uri).partitions == tuple(module.Partition(**one) for one in found)


@pytest.mark.parametrize("content", [None, b"", b"{", b'{"schema_version": 9, "partitions": []}'])
def test_the_manifest_is_made_anew(content: bytes | None, store: Path, tmp_path: Path) -> None:
    add(store, tmp_path / "d")
    manifest = tmp_path / "d/_manifest.json"
    said_before = manifest.read_bytes()
    if content is None:
        manifest.unlink()
    else:
        manifest.write_bytes(content)
    assert held(tmp_path / "d") == ["s1", "s2", "s3", "s4"]
    assert add(store, tmp_path / "d") == ()
    assert manifest.read_bytes() == said_before


# -- two at a time


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_second_export_at_any_step_gives_no_duplicates(store: Path, moment: str) -> None:
    """On an object store it takes over: the first ends with an error, or was done already."""
    outcomes: Counter[str] = Counter()
    for number in range(num_steps(store, Objects())):
        objects = Objects()

        def second(objects: Objects = objects) -> None:
            with ThreadPoolExecutor(1) as pool:  # the first one's loop is in this thread
                pool.submit(add, store, BUCKET, filesystem=objects.client().filesystem).result()

        client = objects.client(**{moment: at_step(number, second)})
        ending = "done"
        try:
            add(store, BUCKET, filesystem=client.filesystem, partition_mb=0)
        except ConfigError as error:
            ending = str(error).partition(":")[0]
        outcomes[ending] += 1
        between = held(BUCKET, filesystem=objects.client().filesystem)
        assert set(Counter(between).values()) == {1}, client.steps[number]
        add(store, BUCKET, filesystem=objects.client().filesystem)
        assert held(BUCKET, filesystem=objects.client().filesystem) == ["s1", "s2", "s3", "s4"]
    assert set(outcomes) == {"done", "another export has taken over bucket/data"}
    assert min(outcomes.values()) > 2


def test_duplicates_are_seen(store: Path, tmp_path: Path) -> None:
    """What the last test would find, and an object store cannot rule out, is an error that says so."""
    add(store, tmp_path / "a")
    add(store, tmp_path / "b", ["s2"])
    [copied] = names(tmp_path / "b")
    (tmp_path / "b" / copied).rename(tmp_path / "a" / copied)
    assert held(tmp_path / "a").count("s2") == 2
    with pytest.raises(
        ConfigError, match=r"session s2 twice, in part-000001-\w+\.parquet and part-000001-\w+"
    ):
        add(store, tmp_path / "a")


def test_a_second_export_to_a_local_folder_is_refused(store: Path, tmp_path: Path) -> None:
    with Folder(tmp_path / "d").writing(), pytest.raises(ConfigError, match="another process"):
        add(store, tmp_path / "d")
    add(store, tmp_path / "d")
    assert held(tmp_path / "d") == ["s1", "s2", "s3", "s4"]


# -- no rights, no room


class Unread(SQLiteStore):
    """A store that is not to be asked for anything."""

    async def list_sessions(self, **_: Any) -> Any:
        raise AssertionError

    async def read(self, session_id: str) -> Any:
        raise AssertionError


def refused(uri: Any, tmp_path: Path, **options: Any) -> str:
    """The error of an export that ends before it has read anything of the store."""

    async def run() -> str:
        source: Store = Unread(tmp_path / "unread.sqlite")
        try:
            with pytest.raises(ConfigError) as caught:
                await export_dataset(source, uri, **options)
        finally:
            await source.aclose()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return asyncio.run(run())


@pytest.mark.parametrize("right", ["list", "create", "close", "read"])
def test_without_a_right_nothing_is_written(right: str, tmp_path: Path) -> None:
    objects = Objects({"bucket/other": b""})

    def forbid(_: int, step: str) -> None:
        if step.startswith(right):
            raise PermissionError("ACCESS_DENIED")

    client = objects.client(before=forbid)
    assert "ACCESS_DENIED" in refused(BUCKET, tmp_path, filesystem=client.filesystem)
    assert list(objects.stored) == ["bucket/other"]


@pytest.mark.parametrize(
    "uri", ["foo://key:secret@bucket/x", "s3://", "s3://bucket/x?nope=1", "/proc/none", "file://host/x", ""]
)
def test_no_such_place(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "absolute", lambda path: Path("/") if not str(path).strip(".") else path)
    assert "secret" not in refused(uri, tmp_path)


def test_keys_in_a_uri_are_not_shown(tmp_path: Path) -> None:
    assert refused("s3://key:secret@bucket/x?nope=1", tmp_path).startswith("s3://bucket/x names no folder")
    assert refused("hdfs://host:x/@", tmp_path).startswith("hdfs://host:x/@ names no folder")


@pytest.mark.parametrize(
    "uri",
    [
        "s3://KEY:sec/ret@bucket/x",
        "s3://KEY:sec?ret@bucket/x",
        "s3://KEY:sec#ret@bucket/x",
        "s3://KEY:sec@ret@bucket/x",
        "s3://KEY:s@ec/ret@bucket/x",
        "s3://KEY:12/sec@bucket/x",
        "s3://KEY:sec%ret@bucket/x",
        "s3://KEY:secret/x",
        "s3://KEY:secret",
        "gs://KEY:[sec/ret@bucket/x",
        "abfs://:sec/ret@account/x",
    ],
)
def test_keys_that_are_written_wrong_are_not_shown(uri: str, tmp_path: Path) -> None:
    """An unescaped character ends them too soon: Arrow takes a piece for the host or the path."""
    said = refused(uri, tmp_path)
    assert not any(piece in said.replace("KEY:SECRET@", "") for piece in ("KEY", "sec", "ret", "12"))


@pytest.mark.parametrize("failing", ["write", "close", "stat"])
def test_an_upload_that_fails_leaves_nothing(
    failing: str, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where Arrow completes what was sent so far, because the stream is closed."""
    monkeypatch.setattr(folder_module, "_UPLOAD_BYTES", 1000)
    objects = Objects()
    failed: list[str] = []

    def fail(number: int, step: str) -> None:
        part = "part-" in step or (step == "stat" and number > 6)
        if step.startswith(failing) and part and len(failed) < 1 and (failing != "write" or number > 12):
            failed.append(step)
            raise OSError("connection reset")

    with pytest.raises(ConfigError, match=r"cannot take part-000001-.*connection reset"):
        add(store, BUCKET, filesystem=objects.client(before=fail).filesystem)
    assert failed
    assert objects.names() == ["_writer"]
    add(store, BUCKET, filesystem=objects.client().filesystem)
    assert len(held(BUCKET, filesystem=objects.client().filesystem)) == 4


def test_an_upload_that_arrives_short_leaves_nothing(store: Path) -> None:
    objects = Objects()

    def cut(_: int, step: str) -> None:
        path = step.partition(" ")[2]
        if step.startswith("close") and "part-" in step:
            objects.stored[path] = objects.stored[path][:-1]

    with pytest.raises(ConfigError, match="bytes have arrived of"):
        add(store, BUCKET, filesystem=objects.client(after=cut).filesystem)
    assert objects.names() == ["_writer"]


def test_a_full_disk(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the partition is made, and when it is to appear."""

    def full(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    for place, name in ((pq.ParquetWriter, "write_table"), (folder_module.os, "fsync")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, full)
            with pytest.raises(ConfigError, match="No space left"):
                add(store, tmp_path / "d")
        assert names(tmp_path / "d") == []
    add(store, tmp_path / "d")
    assert held(tmp_path / "d") == ["s1", "s2", "s3", "s4"]


# -- what else is in the folder


def test_other_files_are_left_alone(store: Path, tmp_path: Path) -> None:
    for name in ("README", "_notes.parquet.txt", ".part-000001-00000000.parquet.partial"):
        (tmp_path / "d" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "d" / name).write_bytes(b"garbage")
    (tmp_path / "d" / "more.parquet").mkdir()
    add(store, tmp_path / "d")
    assert held(tmp_path / "d") == ["s1", "s2", "s3", "s4"]
    assert {"README", "more.parquet"} < set(names(tmp_path / "d"))
    assert not list((tmp_path / "d").glob(".*"))  # what a killed export left


@pytest.mark.parametrize("name", ["rollouts.parquet", "_part.parquet", "part-1-00000000.parquet"])
def test_parquet_files_that_readers_would_take_for_partitions(name: str, store: Path, tmp_path: Path) -> None:
    add(store, tmp_path / "d")
    pq.write_table(SAMPLES.empty_table(), tmp_path / "d" / name)
    assert f"d/{name} is no partition" in refused(tmp_path / "d", tmp_path)
    with pytest.raises(ConfigError, match=name):
        held(tmp_path / "d")


def test_damaged_partitions(store: Path, tmp_path: Path) -> None:
    [partition] = add(store, tmp_path / "d")
    path = tmp_path / "d" / partition.file
    whole = path.read_bytes()
    for content in (b"", b"garbage", whole[:-10], whole[: len(whole) // 2]):
        path.write_bytes(content)
        assert partition.file in refused(tmp_path / "d", tmp_path)
        with pytest.raises(ConfigError, match=partition.file):
            held(tmp_path / "d")
    pq.write_table(pq.read_table(pa.BufferReader(whole)), path)
    assert "lacks its counts" in refused(tmp_path / "d", tmp_path)
    path.unlink()
    add(store, tmp_path / "d")
    assert held(tmp_path / "d") == ["s1", "s2", "s3", "s4"]


def test_no_dataset(tmp_path: Path) -> None:
    for uri in (tmp_path / "absent", tmp_path):
        with pytest.raises(ConfigError, match="no partition"):
            held(uri)
    assert read_manifest(tmp_path).partitions == ()
    (tmp_path / "file").write_bytes(b"")
    assert "file" in refused(tmp_path / "file", tmp_path)


# -- older schema versions

_OLD_TURN = [
    ("turn_id", pa.string()),
    ("start", pa.int32()),
    ("end", pa.int32()),
    ("finish_reason", pa.string()),
    ("trained", pa.bool_()),
    ("parse_status", pa.string()),
]
_SPAN = pa.struct([("version", pa.string()), ("start", pa.int32()), ("end", pa.int32())])
_LABELS = [pa.field("label", pa.string(), nullable=False), pa.field("label_by", pa.string(), nullable=False)]


def old_schema(version: int, *, labels: bool) -> pa.Schema:
    """What version 1, and 2 at first, wrote; with labels, version 2 in the end. To the letter."""
    turn = [*_OLD_TURN, ("label", pa.string())] if labels else _OLD_TURN
    fields = [
        pa.field("session_id", pa.string(), nullable=False),
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("branch_reason", pa.string(), nullable=False),
        *(_LABELS if labels else []),
        pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("loss_mask", pa.list_(pa.int8()), nullable=False),
        pa.field("logprobs", pa.list_(pa.float32()), nullable=False),
        pa.field("weight_versions", pa.list_(_SPAN), nullable=False),
        pa.field("num_prompt_tokens", pa.int32(), nullable=False),
        pa.field("turns", pa.list_(pa.struct(turn)), nullable=False),
        pa.field("reward", pa.float64()),
        pa.field("truncated", pa.bool_(), nullable=False),
        pa.field("messages", pa.string(), nullable=False),
        pa.field("tools", pa.string(), nullable=False),
        pa.field("sampling", pa.string(), nullable=False),
        pa.field("metadata", pa.string(), nullable=False),
    ]
    return pa.schema(fields, metadata={"tokentape.schema_version": str(version)})


def sampled_in_three_ways() -> list[Row]:
    """Today's rows: a turn of each basis, a fork, rewards of turns."""
    made, start = Recorder(), [user("u")]
    for messages, answer, sampling in (
        (start, "a", Sampling(temperature=1.0)),
        ([*start, said("a"), user("v")], "b", Sampling(top_p=0.5)),
        ([*start, said("a"), user("w")], "c", Sampling(temperature=0.0)),
    ):
        basis = LogprobBasis.of(sampling).value
        made.run(messages, said(answer), sampling=sampling, logprob_basis=basis)
    return rows(made, session_id="s0", reward=0.5)


OLD = [(1, False), (2, False), (2, True)]


def write_old(path: Path, made: Sequence[Row], version: int, *, labels: bool, **counts: Any) -> None:
    schema = old_schema(version, labels=labels)
    names_of_turn = [field.name for field in schema.field("turns").type.value_type]
    columns = {
        name: [
            [{n: turn[n] for n in names_of_turn} for turn in row["turns"]] if name == "turns" else row[name]
            for row in made
        ]
        for name in schema.names
    }
    with pq.ParquetWriter(path, schema) as writer:
        writer.write_table(pa.table(columns, schema=schema))
        if counts:
            writer.add_key_value_metadata({"tokentape.partition": json.dumps(counts)})


def as_upgraded(row: Row, *, labels: bool) -> Row:
    """A row of today without what older versions had not."""
    if labels:
        return row
    turns = [{**turn, "label": None} for turn in row["turns"]]
    return {**row, "label": None, "label_by": None, "turns": turns}


@pytest.mark.parametrize(("version", "labels"), OLD)
def test_older_files_are_read_as_todays(version: int, labels: bool, tmp_path: Path) -> None:
    made = [*sampled_in_three_ways(), *single(group_id=None)]
    write_old(tmp_path / "old.parquet", made, version, labels=labels)
    found = list(read_rows(tmp_path / "old.parquet"))
    assert found == [as_upgraded(row, labels=labels) for row in made]
    assert [list(row) for row in found] == [SAMPLES.names] * len(made)
    assert [set(turn) for turn in found[0]["turns"]] == [set(made[0]["turns"][0])] * 2
    bases = {turn["logprob_basis"] for row in found for turn in row["turns"]}
    assert bases == {"sampled", "untruncated", "greedy"}


def test_what_older_files_did_not_say_is_null(tmp_path: Path) -> None:
    made = [{**row, "sampling": sampling} for row, sampling in zip(forked(), ["[]", "{"], strict=True)]
    write_old(tmp_path / "old.parquet", made, 1, labels=False)
    for row in read_rows(tmp_path / "old.parquet"):
        assert row["group_id"] is None
        assert {(t["label"], t["logprob_basis"], t["reward"]) for t in row["turns"]} == {(None, None, None)}


def test_what_cannot_be_read_as_todays(tmp_path: Path) -> None:
    path = tmp_path / "old.parquet"
    write_old(path, single(), 1, labels=False)
    whole = pq.read_table(path)
    turns = pa.array([json.dumps(value) for value in whole.column("turns").to_pylist()])
    for table, lacking in (
        (whole.drop_columns(["loss_mask", "tools"]), "no loss_mask, tools"),
        (whole.drop_columns(["turns"]).append_column("turns", turns), r"no turns\.end"),
    ):
        pq.write_table(table, path)
        with pytest.raises(ConfigError, match=lacking):
            list(read_rows(path))


@pytest.mark.parametrize(("version", "words"), [(SCHEMA_VERSION + 1, "use a newer tokentape"), ("x", "'x'")])
def test_versions_that_are_not_known(version: Any, words: str, store: Path, tmp_path: Path) -> None:
    [partition] = add(store, tmp_path / "d")
    path = tmp_path / "d" / partition.file
    schema = SAMPLES.with_metadata({"tokentape.schema_version": str(version)})
    table = pq.read_table(path).cast(schema).append_column("new", pa.array([1, 2, 3, 4]))
    pq.write_table(table.replace_schema_metadata(schema.metadata), path)
    for read in (read_rows(path), read_dataset(tmp_path / "d")):
        with pytest.raises(ConfigError, match=words):
            list(read)
    assert words in refused(tmp_path / "d", tmp_path)


@pytest.mark.parametrize(("version", "labels"), OLD)
def test_a_dataset_of_several_versions(version: int, labels: bool, store: Path, tmp_path: Path) -> None:
    """It is read; nothing is added, as other readers want one schema."""
    [partition] = add(store, tmp_path / "d")
    made = sampled_in_three_ways()
    old = "part-000000-00000000.parquet"
    write_old(tmp_path / "d" / old, made, version, labels=labels, tokens=30, created_at=1.5)
    found = list(read_dataset(tmp_path / "d"))
    assert found[:2] == [as_upgraded(row, labels=labels) for row in made]
    assert [row["session_id"] for row in found[2:]] == ["s1", "s2", "s3", "s4"]
    assert f"{old} has other columns, of schema version {version}" in refused(tmp_path / "d", tmp_path)
    manifest = read_manifest(tmp_path / "d")
    size = (tmp_path / "d" / old).stat().st_size
    expected = replace(
        partition, file=old, schema_version=version, rows=2, tokens=30, sessions=1, bytes=size, created_at=1.5
    )
    assert (manifest.schema_version, manifest.partitions) == (SCHEMA_VERSION, (expected, partition))


def test_files_without_a_version_are_read_as_they_are(tmp_path: Path) -> None:
    table = pa.table({"session_id": ["s"], "token_ids": [[1]], "more": [1]})
    pq.write_table(table, tmp_path / "other.parquet")
    assert list(read_rows(tmp_path / "other.parquet")) == table.to_pylist()


# -- the command


def command(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(main, ["export", *words])
    return done.exit_code, done.output


def test_the_command(store: Path, tmp_path: Path) -> None:
    fill(store, ["s5"], start=5, version="3")
    to = ("--store", str(store), "--dataset", str(tmp_path / "d"))
    assert command(*to, "--session", "s1") == (0, "1 samples of 1 sessions added in 1 partitions\n")
    code, output = command(*to, "--max-staleness", "0", "--partition-mb", "1")
    assert (code, output) == (
        0,
        "1 samples of 1 sessions added in 1 partitions, 3 sessions left out: too stale\n",
    )
    assert command(*to)[1].startswith("3 samples")
    assert command(*to)[1].startswith("0 samples")
    assert held(tmp_path / "d") == ["s1", "s2", "s3", "s4", "s5"]


@pytest.mark.parametrize(
    ("words", "said_of"),
    [
        ([], "either --out FILE or --dataset URI"),
        (["--out", "x.parquet", "--dataset", "d"], "either --out FILE or --dataset URI"),
        (["--out", "x.parquet", "--partition-mb", "1"], "--partition-mb needs --dataset"),
        (["--dataset", "d", "--format", "verl"], "--format needs --out"),
        (["--dataset", "d", "--session", "s9"], "no such session"),
    ],
)
def test_wrong_words(
    words: list[str], said_of: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, output = command("--store", str(store), *words)
    assert (code, output.count("\n")) == (2, 1)
    assert said_of in output
