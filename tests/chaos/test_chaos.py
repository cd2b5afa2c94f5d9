"""A small chaos of some 20 seconds, and that its check sees each kind of damage."""

import copy
import math
import subprocess
import sys
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
from check import check
from pyarrow import parquet
from truth import Account, Generation, Retry, read_generations

ROOT = Path(__file__).parents[2]


@dataclass
class Recorded:
    """What a run left behind. `row` is a whole session, of an agent that never went back."""

    rows: list[dict[str, Any]]
    generations: list[Generation]
    account: Account

    @property
    def row(self) -> dict[str, Any]:
        num_rows = Counter(row["session_id"] for row in self.rows)
        linear = {episode.session_id for episode in self.account.episodes if episode.is_linear}
        return next(r for r in self.rows if num_rows[r["session_id"]] == 1 and r["session_id"] in linear)

    @property
    def turn_id(self) -> str:
        return self.row["turns"][1]["turn_id"]

    @property
    def at(self) -> int:
        """A sampled token of `row`: the first of that turn."""
        return self.row["turns"][1]["start"]

    def check(self) -> list[str]:
        return check(self.rows, self.generations, self.account)


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """One run, and all that it recorded."""
    directory = tmp_path_factory.mktemp("chaos") / "kept"
    command = [sys.executable, str(ROOT / "chaos" / "run.py"), "--mini", "--agents", "8", "--seed", "1"]
    run = subprocess.run(
        [*command, "--keep", str(directory)], capture_output=True, text=True, timeout=180, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "nothing lost, nothing invented" in run.stdout
    account = msgspec.json.decode((directory / "account.json").read_bytes(), type=Account)
    rows = parquet.read_table(directory / "export.parquet").to_pylist()
    return Recorded(rows, read_generations(sorted(directory.glob("*.jsonl"))), account)


@pytest.fixture
def recorded(played: Recorded) -> Recorded:
    """A copy to damage."""
    return copy.deepcopy(played)


def test_gateways_were_killed_and_nothing_was_lost(recorded: Recorded) -> None:
    assert len(recorded.account.kills) >= 2
    assert any(retry.why == "connection" for retry in recorded.account.retries)
    assert len(recorded.account.acknowledged) > 30
    assert any(generation.mode != "none" for generation in recorded.generations)
    assert recorded.check() == []


def other_id(recorded: Recorded) -> str:
    recorded.row["token_ids"][recorded.at] ^= 1
    return f"turn {recorded.turn_id}: its tokens are not what the workers sampled"


def other_logprob(recorded: Recorded) -> str:
    logprobs = recorded.row["logprobs"]
    as_int = array("i", array("f", [logprobs[recorded.at]]).tobytes())
    as_int[0] += 1  # the next float32
    logprobs[recorded.at] = array("f", as_int.tobytes())[0]
    assert math.isfinite(logprobs[recorded.at])
    return f"turn {recorded.turn_id}: other tokens are exported than were acknowledged"


def other_version(recorded: Recorded) -> str:
    recorded.row["weight_versions"][0]["version"] += "?"
    return f"turn {recorded.row['turns'][0]['turn_id']}: its tokens are not what the workers sampled"


def other_prompt(recorded: Recorded) -> str:
    """A token of the bridge, between two turns."""
    recorded.row["token_ids"][recorded.at - 1] ^= 1
    return f"turn {recorded.turn_id}: no worker was ever sent its prompt"


def lost_session(recorded: Recorded) -> str:
    turn_id = recorded.turn_id
    recorded.rows.remove(recorded.row)
    return f"turn {turn_id} was acknowledged and is not exported"


def trained_twice(recorded: Recorded) -> str:
    turn_id, end = recorded.turn_id, recorded.row["turns"][1]["end"]
    again = copy.deepcopy(recorded.row)
    for name in ("token_ids", "loss_mask", "logprobs"):
        again[name] = again[name][:end]
    again["turns"] = again["turns"][:2]
    again["weight_versions"] = [
        {**span, "end": min(span["end"], end)} for span in again["weight_versions"] if span["start"] < end
    ]
    again |= {"sample_id": turn_id, "truncated": again["turns"][-1]["finish_reason"] == "length"}
    recorded.rows.append(again)
    return f"turn {turn_id} is trained 2 times"


def never_sampled(recorded: Recorded) -> str:
    recorded.generations = [g for g in recorded.generations if g.turn_id != recorded.turn_id]
    return f"turn {recorded.turn_id}: no worker was ever sent its prompt"


def falsified(recorded: Recorded) -> str:
    """The worker says that what it sent of this turn was not what it had sampled."""
    recorded.generations = [
        msgspec.structs.replace(g, num_sound=0) if g.turn_id == recorded.turn_id else g
        for g in recorded.generations
    ]
    return f"turn {recorded.turn_id}: its tokens are not what the workers sampled"


def never_told(recorded: Recorded) -> str:
    told = recorded.account.acknowledged
    recorded.account.acknowledged = [one for one in told if one.turn_id != recorded.turn_id]
    return f"turn {recorded.turn_id} is trained, and its agent was never told of it"


def told_twice(recorded: Recorded) -> str:
    told = recorded.account.acknowledged
    told += [one for one in told if one.turn_id == recorded.turn_id]
    return f"turn {recorded.turn_id} answered 2 requests"


def unfinished(recorded: Recorded) -> str:
    recorded.account.episodes[0].summary = None
    return f"session {recorded.account.episodes[0].session_id} was not finished"


def other_reward(recorded: Recorded) -> str:
    recorded.row["reward"] += 1
    return f"session {recorded.row['session_id']}: reward"


def lost_two_requests(recorded: Recorded) -> str:
    at = max(recorded.account.kills) + 1e-3
    recorded.account.retries += [Retry("agent0", number, at, "connection") for number in (10_001, 10_002)]
    return "agent0: "


DAMAGES = [
    *(other_id, other_logprob, other_version, other_prompt, lost_session, trained_twice, never_sampled),
    *(falsified, never_told, told_twice, unfinished, other_reward, lost_two_requests),
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_seen(recorded: Recorded, damage: Callable[[Recorded], str]) -> None:
    expected = damage(recorded)
    problems = recorded.check()
    assert any(expected in problem for problem in problems), problems
