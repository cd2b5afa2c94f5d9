"""Samples of real trees for the exporters' tests: branches, a shared prefix, a length cut, turns' rewards."""

import sys
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

sys.path.insert(0, str(Path(__file__).parents[1] / "core"))
from recorded import TOOLS, Recorder, call, record, result, said, user

from tokentape.export.row import Row
from tokentape.export.samples import samples
from tokentape.tape import Turn
from tokentape.types import Message, RoutedExperts, Support, VersionSpan

EXPERTS_PER_TOKEN, NUM_LAYERS = 2, 3


def forked(
    session_id: str = "s1", *, experts: bool = False, support: bool = False, **changes: Any
) -> list[Row]:
    """A session of two branches, t1 → t3, cut by length, and t1 → t2 → t4, which trains t1.

    Weights change inside t2. Rewards: 1.0 for the session, 0.25 for t1, none for the others' turns.
    """
    recorder, first, second = Recorder(), said("look", call()), said("b")
    start = [Message("system", "s"), user("u")]
    captured = Captured(recorder, experts, support)
    captured.run(start, first, TOOLS, versions=(VersionSpan("3", 0, 2),), num_rows_before=0)
    captured.run(
        [*start, first, result("x")],
        second,
        TOOLS,
        completion=[7001, 7002, 7003],
        versions=(VersionSpan("3", 0, 1), VersionSpan("4", 1, 3)),
    )
    captured.run(
        [*start, first, result("z")],
        said("cut"),
        TOOLS,
        versions=(VersionSpan("4", 0, 2),),
        finish_reason="length",
    )
    captured.run(
        [*start, first, result("x"), second, user("go on")],
        said("c"),
        TOOLS,
        completion=[7004],
        versions=(VersionSpan("5", 0, 1),),
    )
    values: dict[str, Any] = {"reward": 1.0, "turn_rewards": {"t1": 0.25}, "group_id": "g", **changes}
    return rows(recorder, session_id=session_id, **values)


def single(session_id: str = "s2", *, experts: bool = False, **changes: Any) -> list[Row]:
    """A session of one turn, cut by length."""
    recorder = Recorder()
    Captured(recorder, experts).run(
        [user("u")],
        said("cut"),
        completion=[8001, 8002, 8003, 8004],
        versions=(VersionSpan("4", 0, 4),),
        finish_reason="length",
        num_rows_before=0,
    )
    return rows(recorder, session_id=session_id, **{"reward": -0.5, "group_id": "g", **changes})


def silent(session_id: str = "s3", **changes: Any) -> list[Row]:
    """A session whose only turn sampled nothing."""
    recorder = Recorder()
    recorder.run([user("u")], said(None), completion=[], finish_reason="length")
    return rows(recorder, session_id=session_id, **{"reward": 0.0, **changes})


def rows(recorder: Recorder, **changes: Any) -> list[Row]:
    """As `pyarrow.parquet.read_table(…).to_pylist()` gives them."""
    return samples(record(**changes), recorder.tree.tapes()).to_pylist()


def as_json(given: Sequence[Row]) -> list[Row]:
    """As the control API answers them: bytes are base64."""
    return msgspec.json.decode(msgspec.json.encode(given))


class Captured:
    """A recorder whose engine reports experts, or what truncation kept."""

    def __init__(self, recorder: Recorder, experts: bool = False, support: bool = False) -> None:
        self.recorder, self.experts, self.support = recorder, experts, support

    def run(self, *request: Any, num_rows_before: int = 1, **changes: Any) -> Turn:
        """Commit a turn; its experts are of its tokens but the last, and of the token before its own."""
        num_sampled = len(changes.setdefault("completion", [6001, 6002]))
        if self.experts:
            num_rows = 3 + num_sampled - 1 + num_rows_before
            width = EXPERTS_PER_TOKEN * NUM_LAYERS
            data = bytes((7 * at + num_sampled) % 251 for at in range(num_rows * width))
            changes["routed_experts"] = RoutedExperts(data, "uint8", width)
        if self.support:
            kept = [[token, token + 1][: 1 + at % 2] for at, token in enumerate(changes["completion"])]
            changes["support"] = Support(
                array("i", [len(ids) for ids in kept]).tobytes(),
                array("i", [i for ids in kept for i in ids]).tobytes(),
                array("f", [-at / 16 for at in range(num_sampled)]).tobytes(),
            )
        return self.recorder.run(*request, **changes)
