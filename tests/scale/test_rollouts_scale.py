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

GROUPS, GROUP_SIZE = 250, 4
KILLED_BEHIND = (80, 170)  # groups
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
def driver(gateway: str, directory: Path) -> Generator["subprocess.Popen[bytes]"]:
    words = [gateway, directory / "journal.jsonl", directory / "notes", GROUPS, GROUP_SIZE]
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


def until_killed(gateway: str, directory: Path, behind: int) -> None:
    with driver(gateway, directory) as process:
        until = time.monotonic() + RUN_S
        while len(noted(directory)) < behind:
            assert process.poll() is None, "the driver ended before it was killed"
            assert time.monotonic() < until
            time.sleep(0.02)
        os.kill(process.pid, 9)


def test_a_thousand_episodes_and_two_dead_drivers(tmp_path: Path) -> None:
    store, out = tmp_path / "store.sqlite", tmp_path / "rollouts.parquet"
    started = time.monotonic()
    with (
        command("engine") as engine,
        command("serve", "--model", str(TINY_MODEL), "--engine", engine, "--store", str(store)) as gateway,
    ):
        taken = [0]
        for behind in KILLED_BEHIND:
            until_killed(gateway, tmp_path, behind)
            taken.append(len(noted(tmp_path)))
        with driver(gateway, tmp_path) as last:
            assert last.wait(timeout=RUN_S) == 0
    print(  # noqa: T201
        f"\n{GROUPS * GROUP_SIZE} episodes, driver killed behind {taken[1:]} groups: "
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
    assert len(by_group) == GROUPS
    twice = [group for group, count in Counter(note["group"] for note in notes).items() if count > 1]
    assert len(notes) <= GROUPS + len(KILLED_BEHIND)
    assert set(twice) <= {notes[end - 1]["group"] for end in taken[1:]}
    assert all(note["sessions"] == by_group[note["group"]]["sessions"] for note in notes)

    # The data set on disk has each episode once, and nothing that is half done.
    export = [sys.executable, "-m", "tokentape", "export", "--store", str(store), "--out", str(out)]
    subprocess.run(export, check=True, stdout=subprocess.DEVNULL)
    rows = pq.read_table(out).to_pylist()
    exported = {row["session_id"] for row in rows}
    assert exported == {session for note in notes for session in note["sessions"]}
    places = Counter(read("scale", session) for session in exported)
    assert places == Counter((task, member) for task in range(GROUPS) for member in range(GROUP_SIZE))
    assert all(row["reward"] is not None for row in rows)
    assert len({row["sample_id"] for row in rows}) == len(rows)
    assert check_samples(rows) == []
