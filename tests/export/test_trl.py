"""TRL: its own GRPOTrainer pads, masks, compares and trains what a `rollout_func` returns of our samples."""

import itertools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from episodes import forked, silent, single
from packages import own
from recorded import Recorder, record, said, user

from tokentape.adapters.trl import Ask, rollout_func
from tokentape.errors import ConfigError
from tokentape.export import trl
from tokentape.export.row import Row
from tokentape.export.samples import samples
from tokentape.model import TINY_MODEL
from tokentape.types import VersionSpan

OF_TRL = pytest.mark.filterwarnings("ignore")  # what TRL and its dependencies warn of is not ours


def test_rows_to_the_letter() -> None:
    first, second, third = trl.rows([*forked(), *single()])
    assert first == {
        "prompt_ids": [100, 101, 102],
        "completion_ids": [6001, 6002, 110, 111, 112, 6001, 6002],
        "logprobs": [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -0.125],
        "env_mask": [0, 0, 0, 0, 0, 1, 1],
        "reward": 1.0,
        "turn_rewards": [None],
        "truncated": True,
        "weight_versions": [{"version": "4", "start": 8, "end": 10}],
        "session_id": "s1",
        "sample_id": "t3",
        "group_id": "g",
    }
    assert second["env_mask"] == [1, 1, 0, 0, 0, 1, 1, 1, 0, 0, 0, 1]
    assert second["turn_rewards"] == [0.25, None, None]
    assert (third["reward"], third["truncated"], third["env_mask"]) == (-0.5, True, [1, 1, 1, 1])


def test_a_rewardless_sample_has_none() -> None:
    """TRL knows a missing reward, so that nothing is made up."""
    [row] = trl.rows(single(reward=None))
    assert row["reward"] is None
    assert trl.recorded_reward(reward=[None, 1.0], prompts=["a", "b"]) == [None, 1.0]


def test_what_trl_does_not_take() -> None:
    with pytest.raises(ConfigError, match="sample t1 has no completion"):
        list(trl.rows(silent()))
    with pytest.raises(ConfigError, match="routed experts"):
        list(trl.rows(single(experts=True)))


# -- one completion a prompt


def test_an_output_has_an_entry_for_each_prompt() -> None:
    episodes = [single("s1"), single("s2", reward=1.0)]
    made = trl.rollout_output(["a", "b"], episodes)
    assert made == {
        name: [row[name] for row in trl.rows([*episodes[0], *episodes[1]])]
        for name in next(trl.rows(single()))
    }
    assert (made["session_id"], made["reward"]) == (["s1", "s2"], [-0.5, 1.0])


@pytest.mark.parametrize(
    ("num_prompts", "episodes"), [(0, []), (1, []), (2, [single()]), (1, [single(), single()])]
)
def test_as_many_episodes_as_prompts(num_prompts: int, episodes: list[list[Row]]) -> None:
    with pytest.raises(ConfigError, match=f"{num_prompts} prompts and {len(episodes)} episodes"):
        trl.rollout_output(["a"] * num_prompts, episodes)


def test_several_samples_need_a_choice() -> None:
    first, second = forked()
    labelled = [{**first, "label": "subagent"}, {**second, "label": "main"}]
    with pytest.raises(ConfigError, match=r"episode 1, session s1, has 2 samples \(subagent, main\)"):
        trl.rollout_output(["a", "b"], [single(), labelled])
    assert trl.rollout_output(["a"], [labelled], label="main")["sample_id"] == [second["sample_id"]]
    assert trl.rollout_output(["a"], [labelled], label="subagent")["sample_id"] == [first["sample_id"]]
    with pytest.raises(ConfigError, match="2 samples with label 'main'"):
        trl.rollout_output(["a"], [forked()], label="main")
    with pytest.raises(ConfigError, match="0 samples with label 'auxiliary'"):
        trl.rollout_output(["a"], [labelled], label="auxiliary")
    for label in (None, "main"):
        with pytest.raises(ConfigError, match="episode 0 has no sample"):
            trl.rollout_output(["a"], [[]], label=label)


# -- in TRL


def episode(name: str, ids: Sequence[int], reward: float | None, version: str = "v") -> list[Row]:
    """Two turns with a tool's answer between, in ids that the bundled model has."""
    recorder, first = Recorder(), said("look")
    middle = len(ids) // 2
    start = [user("u")]
    for history, reply, part in (
        (start, first, ids[:middle]),
        ([*start, first, user("x")], said("b"), ids[middle:]),
    ):
        spans = (VersionSpan(version, 0, len(part)),)
        recorder.run(history, reply, completion=list(part), versions=spans)
    return samples(record(name, reward=reward), recorder.tree.tapes()).to_pylist()


EPISODES = [
    episode("s1", [10, 11, 12, 13], 1.0),
    episode("s2", [20, 21], 0.0),
    episode("s3", [30, 31, 32, 33, 34, 35, 36], 0.5),
    episode("s4", [40, 41, 42], None),
    episode("s5", [50, 51], 0.5),
    episode("s6", [60, 61], 0.25),
]

Make = Callable[..., Any]


@pytest.fixture
def make_trainer(tmp_path: Path) -> Make:
    """TRL's trainer on the bundled model, three completions a prompt: 'a' and 'b' are its questions."""
    own("trl")
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    def make(rollout_func: Any, reward_func: Any = trl.recorded_reward, **changes: Any) -> Any:
        arguments = GRPOConfig(
            output_dir=str(tmp_path), max_steps=1, num_generations=3, per_device_train_batch_size=6,
            gradient_checkpointing=False, bf16=False, use_cpu=True, shuffle_dataset=False, report_to=[],
            logging_strategy="no", save_strategy="no", disable_tqdm=True, learning_rate=1e-3, **changes,
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return GRPOTrainer(
                AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype=torch.float32),
                reward_funcs=[reward_func],
                args=arguments,
                train_dataset=Dataset.from_dict({"prompt": ["a", "b"], "session_id": ["the", "dataset's"]}),
                processing_class=AutoTokenizer.from_pretrained(TINY_MODEL),
                rollout_func=rollout_func,
            )

    return make


def batch_of(trainer: Any) -> dict[str, Any]:
    """What TRL makes of one generation, in the order of the prompts."""
    inputs = [{"prompt": text, "session_id": "the dataset's"} for text in "aaabbb"]
    return trainer._generate_and_score_completions(inputs)


@OF_TRL
def test_trl_asks_for_each_completion_and_trains(make_trainer: Make) -> None:
    """Its prompts come `num_generations` times, next to each other; a step of it changes the weights."""
    asked: list[list[str]] = []
    rewarded: list[dict[str, Any]] = []

    def rollout(prompts: list[str], _: Any) -> Any:
        asked.append(prompts)
        return trl.rollout_output(prompts, EPISODES)

    def reward(**columns: Any) -> Any:
        rewarded.append(columns)
        return trl.recorded_reward(**columns)

    trainer = make_trainer(rollout, reward)
    before = [weight.detach().clone() for weight in trainer.model.parameters()]
    trainer.train()
    assert asked == [["a", "a", "a", "b", "b", "b"]]
    assert any((old != new).any() for old, new in zip(before, trainer.model.parameters(), strict=True))
    [columns] = rewarded
    assert columns["session_id"] == ["s1", "s2", "s3", "s4", "s5", "s6"]  # ours, over the dataset's
    assert columns["reward"] == [1.0, 0.0, 0.5, None, 0.5, 0.25]
    assert columns["weight_versions"][1] == EPISODES[1][0]["weight_versions"]
    assert columns["turn_rewards"][0] == [None, None]


@OF_TRL
def test_the_batch_is_ours(make_trainer: Make) -> None:
    """Every sampled token is trained at its place, with its log-probability, and no other is."""
    batch = batch_of(make_trainer(lambda prompts, _: trl.rollout_output(prompts, EPISODES)))
    trained = batch["completion_mask"] * batch["tool_mask"]
    for index, [sample] in enumerate(EPISODES):
        at, end = sample["num_prompt_tokens"], len(sample["token_ids"])
        prompt = batch["prompt_ids"][index][batch["prompt_mask"][index].bool()]
        completion = batch["completion_ids"][index][batch["completion_mask"][index].bool()]
        assert prompt.tolist() + completion.tolist() == sample["token_ids"]
        assert trained[index].tolist()[: end - at] == sample["loss_mask"][at:]
        assert trained[index].sum() == sum(sample["loss_mask"])
        expected = [p or 0.0 for p in sample["logprobs"][at:]]
        assert batch["sampling_per_token_logps"][index].tolist()[: end - at] == expected
    assert batch["num_items_in_batch"] == sum(sum(sample["loss_mask"]) for [sample] in EPISODES) == 20


@OF_TRL
def test_the_control_without_a_mask_what_tools_said_is_trained(make_trainer: Make) -> None:
    def unmasked(prompts: list[str], _: Any) -> Any:
        made = trl.rollout_output(prompts, EPISODES)
        del made["env_mask"]
        return made

    batch = batch_of(make_trainer(unmasked))
    assert "tool_mask" not in batch
    assert batch["num_items_in_batch"] == 20 + 3 * len(EPISODES)


@OF_TRL
def test_rewards_are_compared_by_place_and_a_missing_one_is_left_out(make_trainer: Make) -> None:
    trainer = make_trainer(lambda prompts, _: trl.rollout_output(prompts, EPISODES), scale_rewards="none")
    assert batch_of(trainer)["advantages"].tolist() == [0.5, -0.5, 0.0, 0.0, 0.125, -0.125]


@OF_TRL
def test_the_loss_does_not_see_what_tools_said(make_trainer: Make) -> None:
    """The gradient of the logits is zero where the mask is: nothing of a tool's answer is learnt."""
    import torch

    trainer = make_trainer(lambda prompts, _: trl.rollout_output(prompts, EPISODES))
    batch = batch_of(trainer)
    logps = torch.randn(batch["completion_ids"].shape, requires_grad=True)
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logps, torch.zeros_like(logps), None)
    trainer.compute_loss(trainer.model, batch).backward()
    assert logps.grad is not None
    compared = batch["advantages"][:, None].ne(0)
    assert (logps.grad != 0).equal((batch["completion_mask"] * batch["tool_mask"]).bool() & compared)


@OF_TRL
def test_trl_calls_what_the_adapter_makes(make_trainer: Make) -> None:
    """A step between two evaluations: weights are pushed where they are new, groups are TRL's own."""
    pushed: list[tuple[Any, str]] = []
    asks: list[Ask] = []

    async def push(trainer: Any, version: str) -> None:
        pushed.append((trainer, version))

    async def play(ask: Ask) -> list[Row]:
        asks.append(ask)
        return episode(f"s{len(asks)}", [10, 11, 12 + ask.index], float(ask.index), ask.version)

    trainer = make_trainer(
        rollout_func(play, push=push), num_generations_eval=2, per_device_eval_batch_size=4
    )
    trainer.evaluate(trainer.train_dataset)
    trainer.train()
    trainer.evaluate(trainer.train_dataset)
    assert pushed == [(trainer, "step-0"), (trainer, "step-1")]
    groups = [list(group) for _, group in itertools.groupby(asks, lambda ask: ask.group_id)]
    assert [(group[0].version, group[0].prompt, len(group)) for group in groups] == [
        ("step-0", "a", 2), ("step-0", "b", 2),
        ("step-0", "a", 3), ("step-0", "b", 3),
        ("step-1", "a", 2), ("step-1", "b", 2),
    ]  # fmt: skip
    assert len({group[0].group_id for group in groups}) == 6


# -- the example


@OF_TRL
def test_the_example_takes_a_step() -> None:
    """Real processes: what TRL computes of the tapes' tokens is what the engine said when it sampled them."""
    own("trl")
    from trl_grpo import Config, training

    made: list[dict[str, Any]] = []
    with training(Config(steps=2, questions=2, group=2, updates=2)) as (trainer, rollouts):
        plain = trainer._generate_and_score_completions
        trainer._generate_and_score_completions = lambda inputs: made.append(plain(inputs)) or made[-1]
        # Whatever they earned: the weights move, so that a step sampled by those of before would be seen.
        trainer.reward_funcs = [lambda completions, **_: [float(at % 2) for at in range(len(completions))]]
        trainer.train()
    assert [report.versions for report in rollouts.reports] == [["step-0"], ["step-2"]]
    assert [len(report.rewards) for report in rollouts.reports] == [4, 4]
    for batch, report in zip(made, rollouts.reports, strict=True):
        trained = (batch["completion_mask"] * batch["tool_mask"]).bool()
        assert trained.sum() == report.num_trained > 0
        difference = (batch["old_per_token_logps"] - batch["sampling_per_token_logps"])[trained].abs()
        assert difference.max() < 1e-3
