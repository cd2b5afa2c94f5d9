"""AReaL: its own format check, padding, packing and shifted loss take what we give."""

import types
from typing import Any

import pytest
from episodes import forked, single
from packages import own

from tokentape.errors import ConfigError
from tokentape.export import areal


@pytest.fixture
def data() -> Any:
    """AReaL's padding and packing."""
    return own("areal.utils.data")


def test_rows_to_the_letter() -> None:
    first, second = areal.rows(forked(turn_rewards={}))
    assert first == {
        "input_ids": [[100, 101, 102, 6001, 6002, 110, 111, 112, 6001, 6002]],
        "loss_mask": [[0, 0, 0, 0, 0, 0, 0, 0, 1, 1]],
        "logprobs": [[0.0] * 9 + [-0.125]],
        "versions": [[-1] * 8 + [4, 4]],
        "attention_mask": [[True] * 10],
        "rewards": [1.0],
    }
    assert second["versions"] == [[-1, -1, -1, 3, 3, -1, -1, -1, 3, 4, 4, -1, -1, -1, 5]]


def test_rewards_of_turns_are_a_column_of_all() -> None:
    first, second, third = areal.rows([*forked(), *single()])
    assert first["turn_rewards"] == [[0.0] * 10]
    assert second["turn_rewards"] == [[0.0] * 4 + [0.25] + [0.0] * 10]
    assert third["turn_rewards"] == [[0.0] * 7]


def test_versions_that_are_no_numbers_need_a_mapping() -> None:
    [sample] = single()
    named = {**sample, "weight_versions": [{"version": "step-b", "start": 3, "end": 7}]}
    with pytest.raises(ConfigError, match="sample t1: weight version 'step-b' is no number"):
        list(areal.rows([named]))
    [row] = areal.rows([named], versions={"step-a": 0, "step-b": 1})
    assert row["versions"] == [[-1, -1, -1, 1, 1, 1, 1]]
    [row] = areal.rows([sample], versions={"4": 40})  # a mapping wins over the digits
    assert row["versions"] == [[-1, -1, -1, 40, 40, 40, 40]]


def test_what_areal_has_no_place_for_is_an_error() -> None:
    with pytest.raises(ConfigError, match="sample t1 has no reward"):
        list(areal.rows(single(reward=None)))
    with pytest.raises(ConfigError, match="sample t1 has routed experts, and AReaL replays none"):
        list(areal.rows(single(experts=True)))


# -- against AReaL


def test_areal_finds_it_well_formed() -> None:
    executor = own("areal.infra.workflow_executor")
    warned: list[str] = []
    logger = types.SimpleNamespace(warning=warned.append, info=warned.append)
    made = areal.trajectories([*forked(), *single()])
    for one in made:
        assert executor.check_trajectory_format(one, batch_size=1, expected_keys=set(made[0]), logger=logger)
    assert warned == []


@pytest.mark.parametrize("turn_rewards", [{}, {"t1": 0.25}])
def test_areal_pads_packs_and_splits_it_back(data: Any, turn_rewards: dict[str, float]) -> None:
    samples = [*forked(turn_rewards=turn_rewards), *single()]
    made = areal.trajectories(samples)
    batch = data.concat_padded_tensors(made)
    assert batch["input_ids"].shape == (3, 15)
    assert {str(batch[name].dtype) for name in ("input_ids", "loss_mask", "versions")} == {"torch.int32"}
    assert ("turn_rewards" in batch) == bool(turn_rewards)
    assert batch["loss_mask"].sum() == sum(sum(sample["loss_mask"]) for sample in samples)
    for one, back in zip(made, data.split_and_unpad_tensor(batch, 3), strict=True):
        for name, values in one.items():
            assert back[name].dtype == values.dtype, name
            assert back[name].tolist() == values.tolist(), name
    packed = data.pack_tensor_dict(batch)
    assert packed["input_ids"].tolist() == [i for sample in samples for i in sample["token_ids"]]
    assert packed["logprobs"].tolist() == [p or 0.0 for sample in samples for p in sample["logprobs"]]
    assert packed["cu_seqlens"].tolist() == [0, 10, 25, 32]


def test_areal_itself_makes_the_same_of_a_conversation() -> None:
    """Its own record of each turn, joined by its own code, of a session without other branches."""
    types_ = own("areal.experimental.openai.types")
    api = own("areal.api")
    [_, sample] = forked(turn_rewards={})
    [_, ours] = areal.trajectories(forked(turn_rewards={}))
    versions = ours["versions"][0].tolist()
    before: Any = None
    for turn in sample["turns"]:
        start, end = turn["start"], turn["end"]
        before = types_.InteractionWithTokenLogpReward(
            model_response=api.ModelResponse(
                input_tokens=sample["token_ids"][:start],
                output_tokens=sample["token_ids"][start:end],
                output_logprobs=sample["logprobs"][start:end],
                output_versions=versions[start:end],
            ),
            reward=sample["reward"],
            parent=before,
            chat_template_type="concat",
        )
    theirs = before.to_tensor_dict()
    assert set(theirs) == set(ours)
    for name, values in theirs.items():
        assert ours[name].shape == values.shape, name
        assert ours[name].tolist() == values.tolist(), name


def test_areal_trains_the_sampled_tokens(data: Any) -> None:
    """Its actor's own shift puts every log-probability where the model predicts that token."""
    actor = own("areal.trainer.ppo.actor")
    samples = [*forked(turn_rewards={}), *single()]
    trained = object.__new__(actor.PPOActor)
    trained.config = types.SimpleNamespace(
        overlong_reward_penalty=False, use_decoupled_loss=True, recompute_logprob=False
    )
    trained.reward_bias, trained.reward_scaling, trained.reward_clip = 0.0, 1.0, 10.0
    trained.reward_norm = trained.adv_norm = None
    trained.mask_no_eos_with_zero = False
    trained.kl_ctl, trained.discount, trained.gae_lambda = 0.0, 1.0, 1.0
    trained.kl_estimator = lambda old, ref: old - ref
    out = trained._compute_advantages(data.concat_padded_tensors(areal.trajectories(samples)))
    for at, sample in enumerate(samples):
        size = len(sample["token_ids"])
        assert out["loss_mask"][at, : size - 1].tolist() == sample["loss_mask"][1:]
        assert not out["loss_mask"][at, size - 1 :].any()
        assert out["logprobs"][at, : size - 1].tolist() == [p or 0.0 for p in sample["logprobs"][1:]]
        mask = out["loss_mask"][at].bool()
        assert set(out["advantages"][at][mask].tolist()) == {sample["reward"]}
