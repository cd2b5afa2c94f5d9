"""OpenRLHF: its own code makes of our dicts the experiences that we make, and places masks and rewards."""

import sys
import types
from typing import Any

import pytest
from episodes import forked, silent, single
from packages import own

from tokentape.errors import ConfigError
from tokentape.export import openrlhf

MAX = 64
TENSORS = (
    "sequences", "attention_mask", "action_mask", "rollout_log_probs", "rewards", "scores", "response_length",
    "truncated", "total_length",
)  # fmt: skip


@pytest.fixture
def generator(monkeypatch: pytest.MonkeyPatch) -> Any:
    """OpenRLHF's way from `execute`'s dict to an `Experience`.

    Its module imports vLLM for the engines alone: two names that this way does not use stand in for it.
    """
    own("openrlhf.trainer.ppo_utils.experience")
    own("ray")
    names: dict[str, dict[str, Any]] = {
        "vllm": {"SamplingParams": object},
        "openrlhf.trainer.ray": {"__path__": []},
        "openrlhf.trainer.ray.vllm_engine": {"batch_vllm_engine_call": None},
    }
    for name, values in names.items():
        module = types.ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "openrlhf.trainer.ppo_utils.samples_generator", raising=False)
    made = own("openrlhf.trainer.ppo_utils.samples_generator")
    yield made.SamplesGenerator._process_response_into_experience
    sys.modules.pop("openrlhf.trainer.ppo_utils.samples_generator", None)


def test_a_row_to_the_letter() -> None:
    first, second = openrlhf.rows(forked())
    assert first == {
        "prompt": '[{"role":"system","content":"s"},{"role":"user","content":"u"}]',
        "label": "",
        "images": None,
        "mm_train_inputs": None,
        "reward": 1.0,
        "scores": 1.0,
        "observation_tokens": [100, 101, 102, 6001, 6002, 110, 111, 112, 6001, 6002],
        "action_ranges": [[8, 10]],
        "rollout_log_probs": [0.0] * 9 + [-0.125],
        "truncated": True,
        "extra_logs": {},
        "turn_rewards": [None],
        "weight_versions": [{"version": "4", "start": 8, "end": 10}],
        "session_id": "s1",
        "sample_id": "t3",
        "group_id": "g",
    }
    assert second["action_ranges"] == [[3, 5], [8, 11], [14, 15]]
    assert second["turn_rewards"] == [0.25, None, None]


def test_what_openrlhf_would_cut_off_or_drop_is_an_error() -> None:
    with pytest.raises(ConfigError, match="2 samples, OpenRLHF takes one"):
        openrlhf.output(forked(), prompt="p", label="l", max_length=MAX)
    with pytest.raises(ConfigError, match="sample t1 has 7 tokens, max_length is 6"):
        openrlhf.output(single(), prompt="p", label="l", max_length=6)
    with pytest.raises(ConfigError, match="sample t1 trains nothing"):
        openrlhf.output(silent(), prompt="p", label="l", max_length=MAX)
    with pytest.raises(ConfigError, match="sample t1 has routed experts"):
        list(openrlhf.rows(single(experts=True)))


def test_a_mask_that_is_not_of_turns_is_an_error() -> None:
    [sample] = single()
    mask, logprobs = list(sample["loss_mask"]), list(sample["logprobs"])
    mask[-1], logprobs[-1] = 0, None
    with pytest.raises(ConfigError, match="sample t1: its mask is not that of its trained turns"):
        list(openrlhf.rows([{**sample, "loss_mask": mask, "logprobs": logprobs}]))


# -- against OpenRLHF


@pytest.mark.parametrize("reward", [0.5, None])
def test_openrlhf_makes_the_same_experiences(generator: Any, reward: float | None) -> None:
    """Of each of our dicts; the same tensors with the same types, whatever OpenRLHF reads."""
    torch = own("torch")
    samples = [*forked(reward=reward, turn_rewards={}), *single(reward=reward)]
    ours = openrlhf.experiences(samples, max_length=MAX)
    for sample, found, row in zip(samples, ours, openrlhf.rows(samples), strict=True):
        expected = generator(None, row, max_len=MAX)
        assert type(found) is type(expected)
        for name in TENSORS:
            theirs, mine = getattr(expected, name), getattr(found, name)
            if theirs is None:
                assert mine is None
                continue
            assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape), name
            assert torch.equal(mine, theirs), name
        assert found.info == expected.info
        assert (found.prompts, found.labels) == (expected.prompts, expected.labels)
        assert found.sequences[0].tolist() == sample["token_ids"]
        assert found.action_mask[0].tolist() == sample["loss_mask"][1:]
        assert found.rollout_log_probs[0].tolist() == [p or 0.0 for p in sample["logprobs"][1:]]


def test_a_sample_that_fills_the_length_counts_as_clipped(generator: Any) -> None:
    for max_length, clipped in ((7, True), (8, False)):
        [found] = openrlhf.experiences(single(), max_length=max_length)
        [row] = openrlhf.rows(single())
        assert found.info == generator(None, row, max_len=max_length).info
        assert found.info["response_clip_ratio"].tolist() == [clipped]


def test_what_execute_returns_has_the_keys_that_openrlhf_gives(generator: Any) -> None:
    made = openrlhf.output(single(), prompt="p", label="l", max_length=MAX)
    assert (made["prompt"], made["label"], made["action_ranges"]) == ("p", "l", [(3, 7)])
    assert set(made) == {
        "prompt", "label", "images", "mm_train_inputs", "reward", "scores", "observation_tokens",
        "action_ranges", "rollout_log_probs", "truncated", "extra_logs",
    }  # fmt: skip
    assert generator(None, made, max_len=MAX).action_mask[0].tolist() == [0, 0, 1, 1, 1, 1]


def test_openrlhf_batches_and_splits_them() -> None:
    """Its padding is right, and what it takes apart again is what we gave."""
    module = own("openrlhf.trainer.ppo_utils.experience")
    samples = [*forked(), *single()]
    joined = module.Experience.concat_experiences(openrlhf.experiences(samples, max_length=MAX), 99)
    width = max(len(sample["token_ids"]) for sample in samples)
    for at, sample in enumerate(samples):
        pad = width - len(sample["token_ids"])
        assert joined.sequences[at].tolist() == sample["token_ids"] + [99] * pad
        assert joined.attention_mask[at].tolist() == [1] * len(sample["token_ids"]) + [0] * pad
        assert joined.action_mask[at].tolist() == sample["loss_mask"][1:] + [0] * pad
        assert joined.rewards[at] == sample["reward"]
    parts = module.split_experience_batch(joined)
    again = module.make_experience_batch(parts)
    assert again.action_mask.tolist() == joined.action_mask.tolist()
    assert again.sequences.tolist() == joined.sequences.tolist()
