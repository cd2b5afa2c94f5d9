"""SkyRL: its own validation, collation and advantages take what we give."""

import sys
import types
import typing
from typing import Any

import pytest
from episodes import EXPERTS_PER_TOKEN, NUM_LAYERS, forked, silent, single
from packages import own

from tokentape.errors import ConfigError
from tokentape.export import skyrl

PAD = 99


@pytest.fixture
def trainer_module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """SkyRL's trainer, with its utilities.

    skyrl 0.3.0 says Python 3.11 and gives pydantic a `typing.TypedDict`, which pydantic refuses before 3.12;
    with the one that pydantic asks for it imports.
    """
    if sys.version_info < (3, 12):
        monkeypatch.setattr(typing, "TypedDict", own("typing_extensions").TypedDict)
    return own("skyrl.train.trainer")


@pytest.fixture
def preprocess() -> Any:
    """SkyRL's collation."""
    return own("skyrl.train.dataset.preprocess")


def collated(preprocess: Any, output: Any) -> tuple[Any, ...]:
    tokenizer = types.SimpleNamespace(pad_token_id=PAD)
    names = ("prompt_token_ids", "response_ids", "rewards", "loss_masks", "rollout_logprobs")
    return preprocess.convert_prompts_responses_to_batch_tensors(
        tokenizer, *(output[name] for name in names), output["rollout_expert_indices"]
    )


def test_rows_to_the_letter() -> None:
    first, second = skyrl.rows(forked(turn_rewards={}))
    assert first == {
        "prompt_token_ids": [100, 101, 102],
        "response_ids": [6001, 6002, 110, 111, 112, 6001, 6002],
        "rewards": 1.0,
        "loss_masks": [0, 0, 0, 0, 0, 1, 1],
        "stop_reasons": "length",
        "rollout_logprobs": [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -0.125],
        "trajectory_ids": {"instance_id": "g", "repetition_id": 0},
        "is_last_step": False,
    }
    assert (second["stop_reasons"], second["is_last_step"]) == ("stop", True)


def test_rewards_of_turns_make_rewards_of_tokens_for_all() -> None:
    first, second, third = skyrl.rows([*forked(), *single()])
    assert first["rewards"] == [0.0] * 6 + [1.0]
    assert second["rewards"] == [0.0, 0.25] + [0.0] * 9 + [1.0]
    assert third["rewards"] == [0.0, 0.0, 0.0, -0.5]


def test_sessions_are_trajectories_of_their_group() -> None:
    made = skyrl.rows([*forked("s1"), *single("s2"), *single("s3", group_id=None)])
    assert [(*row["trajectory_ids"].values(), row["is_last_step"]) for row in made] == [
        ("g", 0, False),
        ("g", 0, True),
        ("g", 1, True),
        ("s3", 0, True),
    ]


def test_what_skyrl_would_ignore_is_an_error() -> None:
    first, second = forked()
    with pytest.raises(ConfigError, match="sample t4: its reward is not that of sample t3 in session s1"):
        list(skyrl.rows(forked(branch_rewards={"t3": 0.5})))
    with pytest.raises(ConfigError, match="t4 has a turn with a reward and is not the last of session s1"):
        list(skyrl.rows([second, first]))
    with pytest.raises(ConfigError, match="sample t4: the samples of session s1 are not next to each other"):
        list(skyrl.rows([first, *single(), second]))
    with pytest.raises(ConfigError, match="sample t1 has no reward"):
        list(skyrl.rows(single(reward=None)))
    with pytest.raises(ConfigError, match="sample t1 has no response"):
        list(skyrl.rows(silent()))
    with pytest.raises(ConfigError, match="only some samples have routed experts"):
        list(skyrl.rows([*forked(experts=True), *single()], experts_per_token=EXPERTS_PER_TOKEN))


# -- against SkyRL


@pytest.mark.parametrize("experts", [False, True])
def test_skyrl_collates_what_was_sampled(trainer_module: Any, preprocess: Any, experts: bool) -> None:
    """SkyRL's own padded tensors hold each sample's ids, mask and log-probabilities, at the right places."""
    samples = [*forked(experts=experts), *single(experts=experts)]
    output = skyrl.generator_output(samples, experts_per_token=EXPERTS_PER_TOKEN if experts else None)
    ids, attention, action, rewards, mask, logprobs, routed = collated(preprocess, output)
    assert trainer_module is not None
    for at, sample in enumerate(samples):
        size, start = len(sample["token_ids"]), sample["num_prompt_tokens"]
        number = size - start
        assert ids[at, -size:].tolist() == sample["token_ids"]
        assert attention[at].tolist() == [0] * (ids.shape[1] - size) + [1] * size
        assert action[at].tolist() == [0] * (action.shape[1] - number) + [1] * number
        assert mask[at, -number:].tolist() == sample["loss_mask"][start:]
        assert mask[at].sum() == sum(sample["loss_mask"])
        assert logprobs[at, -number:].tolist() == [p or 0.0 for p in sample["logprobs"][start:]]
        assert rewards[at].sum() == sample["reward"] + (0.25 if at == 1 else 0.0)
        if experts:
            rows = routed[at, ids.shape[1] - size :]
            assert rows.shape[1:] == (NUM_LAYERS, EXPERTS_PER_TOKEN)
            assert rows[:-1].flatten().tolist() == [*sample["routed_experts"]["data"]]
            assert not rows[-1].any()
    assert (routed is not None) == experts


@pytest.mark.parametrize("turn_rewards", [{}, {"t1": 0.25}])
def test_skyrl_finds_it_valid(trainer_module: Any, turn_rewards: dict[str, float]) -> None:
    output = skyrl.generator_output([*forked(turn_rewards=turn_rewards), *single()])
    validate = sys.modules["skyrl.train.utils.trainer_utils"].validate_generator_output
    assert set(output) == set(sys.modules["skyrl.train.generators.base"].GeneratorOutput.__annotations__)
    validate(2, output, step_wise=True)
    validate(1, skyrl.generator_output(single()))
    utils = sys.modules["skyrl.train.generators.utils"]
    joined = utils.concatenate_generator_outputs(
        [
            skyrl.generator_output(forked(turn_rewards=turn_rewards)),
            skyrl.generator_output(single(group_id="h", turn_rewards={"t1": 1.0} if turn_rewards else {})),
        ],
        step_wise=True,
    )
    assert joined["response_ids"] == output["response_ids"]
    assert trainer_module is not None


def test_the_control_skyrl_refuses_steps_out_of_order(trainer_module: Any) -> None:
    output = skyrl.generator_output([*forked(), *single()])
    output["is_last_step"] = [True, True, True]
    with pytest.raises(AssertionError, match="is_last_step"):
        trainer_module.validate_generator_output(2, output, step_wise=True)


def test_skyrl_puts_one_advantage_on_all_branches_of_a_session(trainer_module: Any, preprocess: Any) -> None:
    """Its own postprocessing and GRPO: the group's mean is over sessions, not over branches."""
    output = skyrl.generator_output([*forked(turn_rewards={}), *single()])
    config = {
        "generator.step_wise_trajectories": True, "generator.merge_stepwise_output": False,
        "generator.n_samples_per_prompt": 2, "trainer.algorithm.zero_variance_filter": False,
        "trainer.algorithm.advantage_estimator": "grpo", "trainer.algorithm.gamma": 1.0,
        "trainer.algorithm.lambd": 1.0, "trainer.algorithm.grpo_norm_by_std": False,
    }  # fmt: skip
    trainer = object.__new__(trainer_module.RayPPOTrainer)
    trainer.cfg, trainer.all_metrics = nested(config), {}
    uids = [each.instance_id for each in output["trajectory_ids"]]
    output, uids = trainer.postprocess_generator_output(output, uids)
    ids, attention, action, rewards, mask, logprobs, _ = collated(preprocess, output)
    data = trainer_module.TrainingInputBatch(
        {"sequences": ids, "attention_mask": attention, "response_mask": action, "rewards": rewards,
         "loss_mask": mask, "rollout_logprobs": logprobs, "values": None}
    )  # fmt: skip
    lengths = [len(each) for each in output["response_ids"]]
    data.metadata = {
        "uids": uids,
        "is_last_step": output["is_last_step"],
        "avg_response_length": sum(lengths) / len(lengths),
    }
    advantages = trainer.compute_advantages_and_returns(data)["advantages"]
    for row, trained, expected in zip(advantages, action, (0.75, 0.75, -0.75), strict=True):
        assert set(row[trained.bool()].tolist()) == {expected}


def nested(flat: dict[str, Any]) -> Any:
    """A configuration of attributes, from dotted names."""
    root = types.SimpleNamespace()
    for path, value in flat.items():
        *parents, name = path.split(".")
        at = root
        for parent in parents:
            if not hasattr(at, parent):
                setattr(at, parent, types.SimpleNamespace())
            at = getattr(at, parent)
        setattr(at, name, value)
    return root
