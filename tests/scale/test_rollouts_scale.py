"""1,000 episodes of the bundled model through `tokentape.rollouts`; the driver is killed twice (kill -9)."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

pytest.importorskip("torch", reason="the bundled model needs the extra `local`")

from tokentape.invariants import check_samples
from tokentape.model import TINY_MODEL
from tokentape.rollout.names import read

GROUP_SIZE = 4
START_S, RUN_S = 120.0, 600.0
HERE = Path(__file__).parent


@contextlib.contextmanager
def command(*arguments: str) -> Generator[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tokentape", *arguments, "--port", "0", "--log-level", "error"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip().removeprefix("listening on ")
    finally:
        process.terminate()
        process.wait(timeout=60)
        process.stdout.close()


@contextlib.contextmanager
def driver(gateway: str, directory: Path, num_groups: int, on: str) -> Generator["subprocess.Popen[bytes]"]:
    words = [gateway, directory / "journal.jsonl", directory / "notes", num_groups, GROUP_SIZE, on]
    process = subprocess.Popen([sys.executable, str(HERE / "rollouts_driver.py"), *map(str, words)])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def noted(directory: Path) -> list[dict[str, Any]]:
    path = directory / "notes"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def until_killed(gateway: str, directory: Path, num_groups: int, on: str, behind: int) -> None:
    with driver(gateway, directory, num_groups, on) as process:
        until = time.monotonic() + RUN_S
        while len(noted(directory)) < behind:
            assert process.poll() is None, "the driver ended before it was killed"
            assert time.monotonic() < until
            time.sleep(0.02)
        os.kill(process.pid, 9)


@pytest.mark.parametrize(
    ("on", "num_groups", "killed_behind"),
    [("local", 250, (80, 170)), ("ray", 12, (4, 8))],
    ids=["a thousand here", "forty-eight on Ray"],
)
def test_two_dead_drivers(tmp_path: Path, on: str, num_groups: int, killed_behind: tuple[int, ...]) -> None:
    if on == "ray":
        pytest.importorskip("ray", reason="needs the extra `ray`")
    store, out = tmp_path / "store.sqlite", tmp_path / "rollouts.parquet"
    started = time.monotonic()
    with (
        command("engine") as engine,
        command("serve", "--model", str(TINY_MODEL), "--engine", engine, "--store", str(store)) as gateway,
    ):
        taken = [0]
        for behind in killed_behind:
            until_killed(gateway, tmp_path, num_groups, on, behind)
            taken.append(len(noted(tmp_path)))
        with driver(gateway, tmp_path, num_groups, on) as last:
            assert last.wait(timeout=RUN_S) == 0
    print(  # noqa: T201
        f"\n{num_groups * GROUP_SIZE} episodes, driver killed behind {taken[1:]} groups: "
        f"{time.monotonic() - started:.0f} s"
    )

    notes = noted(tmp_path)
    for note in notes:
        assert note["complete"], note
        assert len(note["sessions"]) == GROUP_SIZE
        assert note["in_table"] == note["sessions"]
        assert note["trained"] > 0
    # Every group was delivered once; only the one in hand when a driver died came again, and is the same.
    by_group = {note["group"]: note for note in notes}
    assert len(by_group) == num_groups
    twice = [group for group, count in Counter(note["group"] for note in notes).items() if count > 1]
    assert len(notes) <= num_groups + len(killed_behind)
    assert set(twice) <= {notes[end - 1]["group"] for end in taken[1:]}
    assert all(note["sessions"] == by_group[note["group"]]["sessions"] for note in notes)

    # The data set on disk has each episode once, and nothing that is half done.
    export = [sys.executable, "-m", "tokentape", "export", "--store", str(store), "--out", str(out)]
    subprocess.run(export, check=True, stdout=subprocess.DEVNULL)
    rows = pq.read_table(out).to_pylist()
    exported = {row["session_id"] for row in rows}
    assert exported == {session for note in notes for session in note["sessions"]}
    places = Counter(read("scale", session) for session in exported)
    assert places == Counter((task, member) for task in range(num_groups) for member in range(GROUP_SIZE))
    assert all(row["reward"] is not None for row in rows)
    assert len({row["sample_id"] for row in rows}) == len(rows)
    assert check_samples(rows) == []
