"""slime and miles: plain values, by the rules that their sources check; their class is not on PyPI."""

import itertools
from array import array
from typing import Any

import pytest
from episodes import EXPERTS_PER_TOKEN, forked, rows, silent, single
from packages import own
from recorded import Recorder, said, user

from tokentape.errors import ConfigError
from tokentape.export import slime
from tokentape.types import Message, Support


@pytest.fixture
def sample_class() -> Any:
    """slime's own class, where somebody has installed it from source."""
    return own("slime.utils.types", "it is not on PyPI, install it from source").Sample


def test_a_row_to_the_letter() -> None:
    [first, second] = slime.rows(forked(metadata={"task": "t"}))
    assert first == {
        "group_index": 0,
        "index": 0,
        "rollout_id": 0,
        "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
        "tokens": [100, 101, 102, 6001, 6002, 110, 111, 112, 6001, 6002],
        "response_length": 7,
        "reward": 1.0,
        "loss_mask": [0, 0, 0, 0, 0, 1, 1],
        "weight_versions": ["4"],
        "rollout_log_probs": [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -0.125],
        "status": "truncated",
        "metadata": {
            "task": "t",
            "tokentape": {
                "session_id": "s1",
                "sample_id": "t3",
                "group_id": "g",
                "branch_reason": "forked",
                "label": "main",
                "turn_rewards": [None],
                "messages": first["metadata"]["tokentape"]["messages"],
            },
        },
    }
    assert [m["role"] for m in first["metadata"]["tokentape"]["messages"]] == [
        "system", "user", "assistant", "tool", "assistant",
    ]  # fmt: skip
    assert (second["index"], second["rollout_id"], second["status"]) == (1, 0, "completed")
    assert second["weight_versions"] == ["3", "3", "4", "5"]
    assert second["metadata"]["tokentape"]["turn_rewards"] == [0.25, None, None]


@pytest.mark.parametrize("support", [False, True])
def test_what_slime_and_miles_check(support: bool) -> None:
    """The lengths that miles' `validate` and slime's conversion to train data hold a sample to."""
    samples = [*forked(experts=True, support=support), *single(experts=True)]
    for row in slime.rows(samples, experts_per_token=EXPERTS_PER_TOKEN):
        assert 0 <= row["response_length"] <= len(row["tokens"])
        assert len(row["loss_mask"]) == len(row["rollout_log_probs"]) == row["response_length"]
        assert len(row["rollout_routed_experts"]) == len(row["tokens"]) - 1
        if "rollout_top_p_token_ids" in row:
            offsets = row["rollout_top_p_token_offsets"]
            assert len(offsets) == row["response_length"] + 1
            assert (offsets[0], offsets[-1]) == (0, len(row["rollout_top_p_token_ids"]))
            assert offsets == sorted(offsets)


def test_experts_are_not_shifted() -> None:
    [sample] = single(experts=True)
    [row] = slime.rows([sample], experts_per_token=EXPERTS_PER_TOKEN)
    flat = [e for token in row["rollout_routed_experts"] for layer in token for e in layer]
    assert flat == [*sample["routed_experts"]["data"]]


def test_a_captured_support_is_replayed() -> None:
    [_, row] = slime.rows(forked(support=True))
    offsets = row["rollout_top_p_token_offsets"]
    kept = [row["rollout_top_p_token_ids"][a:b] for a, b in itertools.pairwise(offsets)]
    assert kept == [[6001], [6002, 6003], [], [], [], [7001], [7002, 7003], [7003], [], [], [], [7004]]
    assert row["rollout_log_probs"] == [
        0.0,
        -1 / 16,
        0.0,
        0.0,
        0.0,
        0.0,
        -1 / 16,
        -2 / 16,
        0.0,
        0.0,
        0.0,
        0.0,
    ]


def test_half_a_support_is_an_error() -> None:
    recorder = Recorder()
    recorder.run([user("u")], said("a"))
    support = Support(
        array("i", [1, 1]).tobytes(), array("i", [108, 109]).tobytes(), array("f", [0, 0]).tobytes()
    )
    recorder.run([user("u"), said("a"), user("v")], said("b"), completion=[108, 109], support=support)
    with pytest.raises(ConfigError, match="sample t2: token 3 is trained and has no support, others have"):
        list(slime.rows(rows(recorder)))


def test_groups_are_lists_of_samples() -> None:
    """Two sessions of one question, one of another, one without a group: three groups, four rollouts."""
    samples = [
        *forked("s1"),
        *single("s2", group_id="h"),
        *single("s3"),
        *silent("g", group_id=None),  # a session's name is no group's
    ]
    made = slime.groups(samples)
    found = [[(row["group_index"], row["rollout_id"], row["index"]) for row in group] for group in made]
    assert found == [[(0, 0, 0), (0, 0, 1), (0, 2, 3)], [(1, 1, 2)], [(2, 3, 4)]]


def test_an_empty_response_is_empty() -> None:
    [row] = slime.rows(silent())
    assert (row["response_length"], row["loss_mask"], row["rollout_log_probs"]) == (0, [], [])


def test_an_imported_history_belongs_to_the_first_prompt() -> None:
    recorder = Recorder()
    given = [user("a"), Message("assistant", "given"), user("b")]
    recorder.run(given, said("first"))
    recorder.run([*given, said("first"), user("c")], said("second"))
    [row] = slime.rows(rows(recorder))
    assert [m["content"] for m in row["prompt"]] == ["a", "given", "b"]


def test_the_class_takes_the_rows(sample_class: Any) -> None:
    for row in slime.rows(forked(experts=True, support=True), experts_per_token=EXPERTS_PER_TOKEN):
        made = sample_class.from_dict(row)
        assert made.status.value == row["status"]
        assert made.effective_response_length == sum(row["loss_mask"])
