"""prime-rl and verifiers: verifiers' own branches read back; rows by prime-rl's public source."""

import json
from typing import Any

import pytest
from episodes import EXPERTS_PER_TOKEN, NUM_LAYERS, forked, silent, single
from packages import own

from tokentape.errors import ConfigError
from tokentape.export import verifiers


@pytest.fixture
def trace() -> Any:
    """verifiers' own traces."""
    return own("verifiers.v1.trace")


def tempered(sample: Any, *temperatures: float | None) -> Any:
    sampling = [{} if value is None else {"temperature": value} for value in temperatures]
    return {**sample, "sampling": json.dumps(sampling)}


def test_a_row_to_the_letter() -> None:
    sample, _ = forked()
    [first] = verifiers.rows([tempered(sample, None, 0.7)], env_name="e")
    assert first == {
        "token_ids": [100, 101, 102, 6001, 6002, 110, 111, 112, 6001, 6002],
        "mask": [False] * 8 + [True] * 2,
        "logprobs": [0.0] * 9 + [-0.125],
        "temperatures": [1.0] * 8 + [0.7] * 2,
        "env_name": "e",
        "reward": 1.0,
        "trace_id": "s1",
        "branch_index": 0,
        "turn_rewards": [None],
        "weight_versions": [{"version": "4", "start": 8, "end": 10}],
        "sample_id": "t3",
        "group_id": "g",
        "truncated": True,
    }


def test_branches_are_counted_within_their_session() -> None:
    made = verifiers.rows([*forked("a"), *single("b"), *forked("c")])
    assert [(row["trace_id"], row["branch_index"]) for row in made] == [
        ("a", 0), ("a", 1), ("b", 0), ("c", 0), ("c", 1),
    ]  # fmt: skip


def test_a_temperature_that_was_not_given_is_not_made_up() -> None:
    sample, _ = forked()
    [row] = verifiers.rows([tempered(sample, 0.7, None)])
    assert row["temperatures"] == []


# -- against verifiers


def test_verifiers_reads_the_samples_back(trace: Any) -> None:
    """Its own joining of nodes gives ids, mask and log-probabilities of each sample, to the token."""
    samples = [*forked(), *single(), *silent()]
    made = verifiers.branches(samples)
    for branch, sample in zip(made, samples, strict=True):
        assert isinstance(branch, trace.Branch)
        assert branch.index == (sample["sample_id"] == "t4")  # the second of its session
        assert branch.token_ids == sample["token_ids"]
        assert branch.sampled_mask == [*map(bool, sample["loss_mask"])]
        assert branch.logprobs == [p or 0.0 for p in sample["logprobs"]]
        assert [m.role for m in branch.messages] == [m["role"] for m in json.loads(sample["messages"])]
        assert sum(node.sampled for node in branch.nodes) == len(sample["turns"])
        assert branch.routed_experts is None
        assert trace.Branch.model_validate(branch.model_dump()).token_ids == sample["token_ids"]
    calls = next(m.tool_calls for m in made[0].messages if m.role == "assistant")
    expected = next(m["tool_calls"] for m in json.loads(samples[0]["messages"]) if m.get("tool_calls"))
    assert [(c.id, c.name, c.arguments) for c in calls] == [
        (c["id"], c["function"]["name"], c["function"]["arguments"]) for c in expected
    ]


def test_a_shared_turn_is_trained_in_one_branch(trace: Any) -> None:
    assert trace is not None
    made = verifiers.branches(forked())
    shared = [next(node for node in branch.nodes if node.sampled) for branch in made]
    assert [node.token_ids for node in shared] == [[6001, 6002]] * 2
    assert sorted(any(node.mask) for node in shared) == [False, True]
    assert sum(sum(branch.sampled_mask) for branch in made) == 2 + 3 + 2 + 1


def test_verifiers_joins_the_experts(trace: Any) -> None:
    assert trace is not None
    samples = forked(experts=True)
    for branch, sample in zip(
        verifiers.branches(samples, experts_per_token=EXPERTS_PER_TOKEN), samples, strict=True
    ):
        experts = branch.routed_experts
        assert experts.shape == (len(sample["token_ids"]), NUM_LAYERS, EXPERTS_PER_TOKEN)
        assert experts[:-1].flatten().tolist() == [*sample["routed_experts"]["data"]]
        assert not experts[-1].any()


def test_what_verifiers_cannot_hold_is_an_error(trace: Any) -> None:
    assert trace is not None
    [sample] = single()
    messages = json.loads(sample["messages"])
    messages[0] = {"role": "critic", "content": "c"}
    with pytest.raises(ConfigError, match="sample t1: verifiers has no such message of 'critic'"):
        verifiers.branches([{**sample, "messages": json.dumps(messages)}])
    short = [{**turn, "end": turn["end"] - 1} for turn in sample["turns"]]
    with pytest.raises(ConfigError, match="sample t1: its last turn ends at 6, its tape does not"):
        verifiers.branches([{**sample, "turns": short}])
    size = 6 * (len(sample["token_ids"]) - 1)
    wide = {"data": (300).to_bytes(2, "little") * size, "dtype": "uint16", "width": 6}
    with pytest.raises(ConfigError, match="sample t1: verifiers' experts are uint8, 300 is not"):
        verifiers.branches([{**sample, "routed_experts": wide}], experts_per_token=2)
