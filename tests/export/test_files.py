"""`tokentape export --format`: the file, of either kind, holds the trainer's rows and nothing else."""

import asyncio
import itertools
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from episodes import EXPERTS_PER_TOKEN, Captured, as_json
from recorded import TOOLS, Recorder, call, record, result, said, user

from tokentape.cli import main
from tokentape.errors import ConfigError
from tokentape.export import TRAINERS, FileSamples, read_exported, read_rows, write_rows
from tokentape.export.row import Row
from tokentape.store import SQLiteStore
from tokentape.types import Json, Message, VersionSpan

ENDINGS = ("parquet", "jsonl")


def stored(path: Path, *, experts: bool = False, **changes: Any) -> Path:
    """A store of three sessions: two of a group, one of these with two branches, and one by itself."""
    sessions = [
        ("s1", {"group_id": "g", "reward": 1.0, "metadata": {"n": 1}}),
        ("s2", {"group_id": "g", "reward": 0.0, "metadata": {"n": "two", "more": [1, None]}}),
        ("s3", {"reward": -0.5}),
    ]

    async def fill() -> None:
        store = SQLiteStore(path)
        for at, (session_id, values) in enumerate(sessions):
            recorder = Recorder(names=itertools.count(10 * at + 1))
            captured, first = Captured(recorder, experts), said("look", call())
            start: list[Message] = [user(f"u {session_id}")]
            spans = (VersionSpan("3", 0, 2),)
            made = [captured.run(start, first, TOOLS, versions=spans, num_rows_before=0)]
            made.append(captured.run([*start, first, result("x")], said("b"), TOOLS, versions=spans))
            if session_id == "s1":
                made.append(captured.run([*start, first, result("z")], said("c"), TOOLS, versions=spans))
            await store.put_session(record(session_id, **{**values, **changes}))
            await store.put_turns(session_id, made)
        await store.aclose()

    asyncio.run(fill())
    return path


def exported(store: Path, out: Path, *more: str) -> str:
    done = CliRunner().invoke(main, ["export", "--store", str(store), "--out", str(out), *more])
    assert done.exit_code == 0, done.output
    return done.output


def refused(store: Path, out: Path, *more: str) -> str:
    done = CliRunner().invoke(main, ["export", "--store", str(store), "--out", str(out), *more])
    assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.output
    assert not out.exists()
    assert list(out.parent.glob(".*")) == []
    return done.stderr


def samples_of(store: Path) -> list[Row]:
    out = store.with_name("samples.parquet")
    exported(store, out)
    return list(read_rows(out))


# -- the command


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("name", TRAINERS)
def test_the_file_holds_the_trainers_rows(name: str, ending: str, tmp_path: Path) -> None:
    """All samples are one batch: groups and sessions are numbered over the file, as in a list."""
    store, out = stored(tmp_path / "s.sqlite"), tmp_path / "new" / f"rows.{ending}"
    samples = samples_of(store)
    assert exported(store, out, "--format", name) == f"4 samples in {out}\n"
    assert list(read_exported(out)) == list(TRAINERS[name].rows(samples))
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    assert [list(row) for row in read_exported(out)] == [list(row) for row in TRAINERS[name].rows(samples)]


def test_one_session_and_none(tmp_path: Path) -> None:
    store, out = stored(tmp_path / "s.sqlite"), tmp_path / "rows.parquet"
    assert exported(store, out, "--format", "verl", "--session", "s2").startswith("1 samples")
    [row] = read_exported(out)
    assert row["extra_fields"]["session_id"] == "s2"
    asyncio.run(SQLiteStore(tmp_path / "empty.sqlite").aclose())
    for ending in ENDINGS:
        nothing = tmp_path / f"nothing.{ending}"
        exported(tmp_path / "empty.sqlite", nothing, "--format", "slime")
        assert list(read_exported(nothing)) == []


def test_numbers_go_over_the_whole_file(tmp_path: Path) -> None:
    """What a call for each session would get wrong."""
    store, out = stored(tmp_path / "s.sqlite"), tmp_path / "rows.parquet"
    exported(store, out, "--format", "slime")
    found = [(row["group_index"], row["index"], row["rollout_id"]) for row in read_exported(out)]
    assert found == [(0, 0, 0), (0, 1, 0), (0, 2, 1), (1, 3, 2)]


def test_samples_as_json_lines(tmp_path: Path) -> None:
    """As the control API answers them."""
    store, out = stored(tmp_path / "s.sqlite", experts=True), tmp_path / "samples.jsonl"
    exported(store, out)
    assert list(read_exported(out)) == as_json(samples_of(store))


@pytest.mark.parametrize("ending", ENDINGS)
def test_experts(ending: str, tmp_path: Path) -> None:
    store, out = stored(tmp_path / "s.sqlite", experts=True), tmp_path / f"rows.{ending}"
    assert "experts_per_token" in refused(store, out, "--format", "verl")
    exported(store, out, "--format", "verl", "--experts-per-token", str(EXPERTS_PER_TOKEN))
    expected = TRAINERS["verl"].rows(samples_of(store), experts_per_token=EXPERTS_PER_TOKEN)
    assert list(read_exported(out)) == list(expected)


@pytest.mark.parametrize("ending", ENDINGS)
def test_rewards_that_are_not_there(ending: str, tmp_path: Path) -> None:
    """A column of nothing but nulls stays one; a trainer that needs rewards refuses, and leaves no file."""
    store, out = stored(tmp_path / "s.sqlite", reward=None), tmp_path / f"rows.{ending}"
    assert "sample t2 has no reward" in refused(store, out, "--format", "skyrl")
    exported(store, out, "--format", "verl")
    assert [row["reward_score"] for row in read_exported(out)] == [None] * 4


def test_wrong_formats(tmp_path: Path) -> None:
    store, out = stored(tmp_path / "s.sqlite"), tmp_path / "rows.parquet"
    said_of = refused(store, out, "--format", "verI")
    assert all(name in said_of for name in ("verI", *TRAINERS))
    for wrong in ((), ("--format", "areal")):
        assert "verl" in refused(store, out, "--experts-per-token", "2", *wrong)
    assert "s9" in refused(store, out, "--format", "verl", "--session", "s9")


# -- rows in files


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize(
    "rows",
    [
        [{"a": None, "b": [], "c": {}, "d": ""}, {"a": None, "b": [], "c": {}, "d": ""}],
        [{"a": None, "b": []}, {"a": 0.5, "b": [1, 2]}, {"a": None, "b": []}],
        [{"a": [[], []]}, {"a": []}, {"a": [[1], []]}, {"a": [[None]]}, {"a": None}],
        [{"a": 1}, {"a": 0.5}, {"a": 2}],
        [{"a": [[True]]}, {"a": [[False], []]}],
        [{"a": {"x": 1}}, {"a": {"y": [None]}}, {"a": None}, {"a": [{"z": "w"}]}],
        [{"a": [None, {"x": "\ud800 é"}]}, {"a": []}],
        [{"a": "é\n"}, {"a": None}],
        [{"a": 1.5, "b": n, "c": -1e-30} for n in range(200)],
    ],
)
def test_what_is_written_is_read(rows: list[Json], ending: str, tmp_path: Path) -> None:
    out = tmp_path / f"rows.{ending}"
    assert write_rows(out, lambda: iter(rows)) == len(rows)
    assert list(read_exported(out)) == rows


def test_a_name_that_only_some_have_is_null_in_the_others(tmp_path: Path) -> None:
    out = tmp_path / "rows.parquet"
    write_rows(out, lambda: iter([{"a": 1}, {"a": 2, "b": [3]}, {"c": {}}]))
    a, b, c = read_exported(out)
    assert (a, b) == ({"a": 1, "b": None, "c": None}, {"a": 2, "b": [3], "c": None})
    assert c == {"a": None, "b": None, "c": {}}


@pytest.mark.parametrize(
    "rows",
    [
        [{"a": 1}, {"a": "one"}],
        [{"a": [1, "one"]}],
        [{"a": [1]}, {"a": 1}],
        [{"a": True}, {"a": 1}],
        [{"a": 2**70}],
        [{"a": 0.5}, {"a": 2**53 + 1}],
        [{"a": [1, {}]}],
        [{"a": "\ud800"}],
    ],
)
def test_what_parquet_does_not_hold(rows: list[Json], tmp_path: Path) -> None:
    """An error that names the column and the way out, which holds it."""
    out = tmp_path / "rows.parquet"
    with pytest.raises(ConfigError, match=r"column a .*rows\.jsonl"):
        write_rows(out, lambda: iter(rows))
    assert list(tmp_path.iterdir()) == []
    lines = tmp_path / "rows.jsonl"
    write_rows(lines, lambda: iter(rows))
    assert list(read_exported(lines)) == rows


@pytest.mark.parametrize("value", [float("nan"), float("inf"), b"bytes", {1, 2}])
def test_what_no_file_holds(value: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="JSON"):
        write_rows(tmp_path / "rows.jsonl", lambda: iter([{"a": value}]))
    with pytest.raises(ConfigError, match="JSON"):
        write_rows(tmp_path / "rows.parquet", lambda: iter([{"a": {"b": value}}]))
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_read_from_another_file(tmp_path: Path) -> None:
    for ending in ENDINGS:
        path = tmp_path / f"garbage.{ending}"
        path.write_bytes(b"garbage")
        for wrong in (path, tmp_path / f"absent.{ending}"):
            with pytest.raises(ConfigError, match=wrong.name):
                list(read_exported(wrong))


def test_samples_of_a_file_are_a_sequence(tmp_path: Path) -> None:
    samples = samples_of(stored(tmp_path / "s.sqlite"))
    kept = FileSamples(tmp_path / "samples.parquet")
    assert (len(kept), list(kept), list(kept)) == (4, samples, samples)
    assert (kept[1], kept[-1], kept[1:3]) == (samples[1], samples[-1], samples[1:3])
    with pytest.raises(IndexError):
        kept[4]


@pytest.mark.parametrize("ending", ENDINGS)
def test_few_rows_are_in_memory_at_a_time(ending: str, tmp_path: Path) -> None:
    alive: list[int] = [0, 0]  # now, at most

    class Counted(dict[str, Any]):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            alive[0] += 1
            alive[1] = max(alive)

        def __del__(self) -> None:
            alive[0] -= 1

    def make() -> Iterator[Json]:
        return (Counted({"a": at, "b": [{}]}) for at in range(1000))

    assert write_rows(tmp_path / f"rows.{ending}", make) == 1000
    assert 0 < alive[1] <= 130


def test_json_columns_are_named(tmp_path: Path) -> None:
    """So that a reader without this package knows which texts to decode."""
    out = tmp_path / "rows.parquet"
    exported(stored(tmp_path / "s.sqlite"), out, "--format", "verl")
    schema = pq.read_schema(out)
    assert json.loads(schema.metadata[b"tokentape.json_columns"]) == ["extra_fields", "metrics"]
    assert msgspec.json.decode(pq.read_table(out).to_pylist()[0]["metrics"]) == {}


def test_devices_and_links_stay_what_they_are(tmp_path: Path) -> None:
    store = stored(tmp_path / "s.sqlite")
    folder, device, elsewhere = tmp_path / "f", tmp_path / "f" / "pipe", tmp_path / "real.jsonl"
    folder.mkdir()
    (folder / "link.jsonl").symlink_to(elsewhere)
    for _ in range(2):  # also where the file is there
        exported(store, folder / "link.jsonl")
        assert (folder / "link.jsonl").is_symlink()
        assert len(elsewhere.read_text().splitlines()) == 4
    os.mkfifo(device)
    read = list[bytes]()
    reader = threading.Thread(target=lambda: read.append(device.read_bytes()))
    reader.start()
    exported(store, device, "--format", "slime")
    reader.join(10)
    assert read[0].startswith(b"PAR1")
    assert device.is_fifo()
    assert sorted(path.name for path in folder.iterdir()) == ["link.jsonl", "pipe"]
