"""Tinker: its own `Datum`s are those that its cookbook makes of the same trajectories."""

import math
from typing import Any

import pytest
from episodes import forked, silent, single
from packages import own

from tokentape.errors import ConfigError
from tokentape.export import tinker
from tokentape.export.row import Row

NAMES = ("target_tokens", "logprobs", "advantages", "mask")


@pytest.fixture
def package() -> Any:
    """Tinker's own package."""
    return own("tinker")


@pytest.fixture
def cookbook(package: Any) -> Any:
    """The cookbook's way from trajectories to datums."""
    assert package is not None
    return own("tinker_cookbook.rl.data_processing")


def test_a_row_to_the_letter() -> None:
    first, second = tinker.rows(forked(), advantages={"t3": -0.5, "t4": 2.0})
    assert first == {
        "model_input": [100, 101, 102, 6001, 6002, 110, 111, 112, 6001],
        "loss_fn_inputs": {
            "target_tokens": [101, 102, 6001, 6002, 110, 111, 112, 6001, 6002],
            "logprobs": [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -0.125],
            "mask": [0.0] * 7 + [1.0] * 2,
            "advantages": [0.0] * 7 + [-0.5] * 2,
        },
        "reward": 1.0,
        "turn_rewards": [None],
        "weight_versions": [{"version": "4", "start": 8, "end": 10}],
        "session_id": "s1",
        "sample_id": "t3",
        "group_id": "g",
    }
    assert second["turn_rewards"] == [0.25, None, None]


def test_without_advantages_a_row_has_none() -> None:
    [row] = tinker.rows(single())
    assert sorted(row["loss_fn_inputs"]) == ["logprobs", "mask", "target_tokens"]


@pytest.mark.parametrize("given", [{}, {"t1": None}, {"t1": math.nan}, {"t2": 1.0}])
def test_a_missing_advantage_is_an_error(given: Any) -> None:
    with pytest.raises(ConfigError, match="sample t1 of session s2: its advantage is"):
        list(tinker.rows(single(), advantages=given))


def test_one_sample_id_in_two_sessions_needs_both_names() -> None:
    samples = [*single("a"), *single("b")]
    with pytest.raises(ConfigError, match=r"sessions \['a', 'b'\] have one of that id.*'a/t1'"):
        list(tinker.rows(samples, advantages={"t1": 1.0}))
    first, second = tinker.rows(samples, advantages={"a/t1": 1.0, "b/t1": -1.0})
    assert (first["loss_fn_inputs"]["advantages"][-1], second["loss_fn_inputs"]["advantages"][-1]) == (1, -1)


def test_what_tinker_cannot_take_is_an_error() -> None:
    with pytest.raises(ConfigError, match="sample t1 has routed experts"):
        list(tinker.rows(single(experts=True)))
    [sample] = silent()
    one = {"token_ids": [1], "loss_mask": [0], "logprobs": [None], "num_prompt_tokens": 1}
    with pytest.raises(ConfigError, match="sample t1 has fewer than two tokens"):
        list(tinker.rows([{**sample, **one}]))


# -- against Tinker


def test_tinker_makes_datums_of_them(package: Any) -> None:
    samples = [*forked(), *single()]
    made = tinker.datums(samples, {"t3": 1.0, "t4": 2.0, "t1": 3.0})
    for sample, datum, advantage in zip(samples, made, (1.0, 2.0, 3.0), strict=True):
        assert isinstance(datum, package.Datum)
        assert datum.model_input.to_ints() == sample["token_ids"][:-1]
        columns = datum.loss_fn_inputs
        assert {name: column.dtype for name, column in columns.items()} == {
            "target_tokens": "int64",
            **dict.fromkeys(("logprobs", "advantages", "mask"), "float32"),
        }
        assert columns["target_tokens"].tolist() == sample["token_ids"][1:]
        assert columns["mask"].tolist() == sample["loss_mask"][1:]
        assert columns["advantages"].tolist() == [advantage * m for m in sample["loss_mask"][1:]]
        assert columns["logprobs"].tolist() == [p or 0.0 for p in sample["logprobs"][1:]]


def trajectory(package: Any, sample: Row) -> Any:
    """The sample as the cookbook would have recorded it; a turn that another sample trains is masked."""
    types, completers = own("tinker_cookbook.rl.types"), own("tinker_cookbook.completers")
    return types.Trajectory(
        transitions=[
            types.Transition(
                ob=package.ModelInput.from_ints(sample["token_ids"][: turn["start"]]),
                ac=completers.TokensWithLogprobs(
                    tokens=sample["token_ids"][turn["start"] : turn["end"]],
                    maybe_logprobs=[p or 0.0 for p in sample["logprobs"][turn["start"] : turn["end"]]],
                ),
                reward=0.0,
                episode_done=turn is sample["turns"][-1],
                metrics={} if turn["trained"] else {types.PARSE_ERROR_MASKED_METRIC_KEY: 1.0},
            )
            for turn in sample["turns"]
        ],
        final_ob=package.ModelInput.empty(),
    )


def test_they_are_what_the_cookbook_makes(package: Any, cookbook: Any) -> None:
    """Same input, targets, log-probabilities, advantages and mask, with the same types and shapes."""
    for sample in [*forked(), *single()]:
        [expected] = cookbook.trajectory_to_data(trajectory(package, sample), 0.75)
        [found] = tinker.datums([sample], {sample["sample_id"]: 0.75})
        assert found.model_input.to_ints() == expected.model_input.to_ints()
        assert set(found.loss_fn_inputs) == set(expected.loss_fn_inputs) == set(NAMES)
        for name in NAMES:
            ours, theirs = found.loss_fn_inputs[name], expected.loss_fn_inputs[name]
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
            assert ours.tolist() == theirs.tolist(), name


def test_the_cookbook_sends_them_without_the_mask(package: Any) -> None:
    remove = own("tinker_cookbook.rl.train")._remove_mask  # what it does before forward_backward
    [datum] = tinker.datums(single(), {"t1": 1.0})
    sent = remove(datum)
    assert isinstance(sent, package.Datum)
    assert sorted(sent.loss_fn_inputs) == ["advantages", "logprobs", "target_tokens"]
