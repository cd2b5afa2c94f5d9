"""What sessions, turns and branches earn."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import msgspec

from tokentape.errors import RequestError
from tokentape.store import SessionRecord
from tokentape.tree import Tree
from tokentape.types import Json


class Credit(msgspec.Struct, forbid_unknown_fields=True):
    """What a session, its turns and its branches earned: `POST /sessions/{id}/rewards`, and with `/finish`.

    `reward` is the session's; `turn_rewards` are by the turn's id, `branch_rewards` by the id of the branch's
    last turn and stand in the session's place there. What is given replaces what was there, null removes it
    (a session's `reward` stays). `metadata` is added.
    """

    reward: float | None = None
    turn_rewards: dict[str, float | None] = msgspec.field(default_factory=dict[str, "float | None"])
    branch_rewards: dict[str, float | None] = msgspec.field(default_factory=dict[str, "float | None"])
    metadata: Json = msgspec.field(default_factory=dict[str, Any])


def credited(record: SessionRecord, tree: Tree, credit: Credit, *, last: bool = False) -> SessionRecord:
    """A session's record with a credit added; `last`: every rewarded branch must be one.

    Raises:
        RequestError: a reward is not finite, or for a turn or a branch that is not there.
    """
    check_metadata(credit.metadata)
    turn_rewards = _merged(record.turn_rewards, credit.turn_rewards)
    branch_rewards = _merged(record.branch_rewards, credit.branch_rewards)
    given = {**turn_rewards, **branch_rewards, "reward": credit.reward or 0.0}
    if wrong := next((name for name, value in given.items() if not math.isfinite(value)), None):
        raise RequestError(f"the reward of {wrong} is not a finite number", param="reward")
    if turn_id := next((turn_id for turn_id in turn_rewards if turn_id not in tree), None):
        raise RequestError(f"turn_rewards: the session has no turn {turn_id!r}", param="turn_rewards")
    asked = branch_rewards if last else _merged({}, credit.branch_rewards)
    if asked:
        ends = tree.ends(tree.labels())
        if other := next((key for key in asked if key not in ends), None):
            raise RequestError(
                f"branch_rewards: no branch ends with turn {other!r}; those of the session end with "
                f"{', '.join(ends)}. A branch that has gone on is named by its new end; null takes back",
                param="branch_rewards",
            )
    return replace(
        record,
        reward=record.reward if credit.reward is None else credit.reward,
        turn_rewards=turn_rewards,
        branch_rewards=branch_rewards,
        metadata={**record.metadata, **credit.metadata},
    )


def _merged(old: Mapping[str, float], new: Mapping[str, float | None]) -> dict[str, float]:
    both = {**old, **new}
    return {key: value for key, value in both.items() if value is not None}


def check_metadata(metadata: Mapping[str, Any]) -> None:
    """Raise `RequestError` where it has a key of the gateway's own."""
    if "tokentape" in metadata:
        raise RequestError(
            "the metadata key `tokentape` is the gateway's own, use another", param="metadata.tokentape"
        )
