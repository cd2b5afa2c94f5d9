"""The demo as a user runs it, only shorter; and that its own checks can fail."""

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

pytest.importorskip("torch", reason="the demo needs the extra `demo`")

from tokentape.demo import run
from tokentape.invariants import check_samples


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "tokentape", "demo", "--episodes", "6", "--out", str(out), "--seed", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


@pytest.fixture
def rows(demo: tuple[Path, str]) -> list[dict[str, Any]]:
    return pq.read_table(demo[0] / "rollouts.parquet").to_pylist()


def test_the_tapes_are_whole(rows: list[dict[str, Any]]) -> None:
    assert len({row["session_id"] for row in rows}) == 6
    assert check_samples(rows) == []
    assert all(row["reward"] in (0.0, 1.0) for row in rows)
    assert max(len(row["turns"]) for row in rows) >= 2


def test_the_summary_says_what_a_person_wants_to_know(demo: tuple[Path, str]) -> None:
    for words in (
        "episodes",
        "trained tokens",
        "mean reward",
        "would have drifted",
        "largest difference",
        "One tape",
    ):
        assert words in demo[1]


def test_recomputing_notices_a_wrong_log_probability(rows: list[dict[str, Any]]) -> None:
    assert run._inspect(rows).max_difference <= run.TOLERANCE
    at = rows[0]["turns"][0]["start"]
    rows[0]["logprobs"][at] += 0.01
    assert run._inspect(rows).max_difference > run.TOLERANCE


def test_recomputing_notices_a_swapped_token(rows: list[dict[str, Any]]) -> None:
    ids, at = rows[0]["token_ids"], rows[0]["turns"][0]["start"]
    ids[at], ids[at + 1] = ids[at + 1], ids[at]
    assert run._inspect(rows).max_difference > run.TOLERANCE


async def test_a_command_that_does_not_start_is_said(tmp_path: Path) -> None:
    with pytest.raises(run.ConfigError, match="did not start"):
        async with run._process("serve", "--model", str(tmp_path), "--engine", "http://127.0.0.1:1"):
            await asyncio.sleep(0)
