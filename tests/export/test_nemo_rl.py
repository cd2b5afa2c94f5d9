"""NeMo-RL: plain values, by the rules of its source; `nemo-rl` on PyPI is an empty placeholder."""

from typing import Any

import pytest
from episodes import EXPERTS_PER_TOKEN, NUM_LAYERS, Captured, forked, rows, silent, single
from packages import own
from recorded import Recorder, call, result, said, user

from tokentape.errors import ConfigError
from tokentape.export import nemo_rl


@pytest.fixture
def message_utils() -> Any:
    """NeMo-RL's own flattening and padding, where somebody has installed it from source."""
    return own("nemo_rl.data.llm_message_utils", "on PyPI it is an empty placeholder, install it from source")


def test_a_row_to_the_letter() -> None:
    first, second = nemo_rl.rows(forked())
    assert first == {
        "message_log": [
            {
                "role": "user",
                "content": "s\nu",
                "token_ids": [100, 101, 102],
                "token_loss_mask": [0, 0, 0],
                "generation_logprobs": [0.0, 0.0, 0.0],
            },
            {  # t1, which the other sample trains
                "role": "environment",
                "content": "look",
                "token_ids": [6001, 6002],
                "token_loss_mask": [0, 0],
                "generation_logprobs": [0.0, 0.0],
            },
            {
                "role": "environment",
                "content": "z",
                "token_ids": [110, 111, 112],
                "token_loss_mask": [0, 0, 0],
                "generation_logprobs": [0.0, 0.0, 0.0],
            },
            {
                "role": "assistant",
                "content": "cut",
                "token_ids": [6001, 6002],
                "token_loss_mask": [1, 1],
                "generation_logprobs": [0.0, -0.125],
            },
        ],
        "length": 10,
        "extra_env_info": {
            "session_id": "s1",
            "sample_id": "t3",
            "group_id": "g",
            "weight_versions": [{"version": "4", "start": 8, "end": 10}],
            "turn_rewards": [None],
        },
        "loss_multiplier": 1.0,
        "idx": 0,
        "total_reward": 1.0,
        "truncated": True,
    }
    assert [(m["role"], m["content"]) for m in second["message_log"]] == [
        ("user", "s\nu"),
        ("assistant", "look"),
        ("environment", "x"),
        ("assistant", "b"),
        ("user", "go on"),
        ("assistant", "c"),
    ]
    assert (second["idx"], second["truncated"], second["extra_env_info"]["turn_rewards"]) == (
        1, False, [0.25, None, None],
    )  # fmt: skip


@pytest.mark.parametrize("experts", [False, True])
def test_messages_are_the_tape_and_roles_are_the_mask(experts: bool) -> None:
    """NeMo-RL makes the mask of the role: it must come out as ours."""
    samples = [*forked(experts=experts), *single(experts=experts)]
    number = EXPERTS_PER_TOKEN if experts else None
    for sample, row in zip(samples, nemo_rl.rows(samples, experts_per_token=number), strict=True):
        log = row["message_log"]
        assert [i for m in log for i in m["token_ids"]] == sample["token_ids"]
        by_role = [int(m["role"] == "assistant") for m in log for _ in m["token_ids"]]
        assert by_role == sample["loss_mask"] == [i for m in log for i in m["token_loss_mask"]]
        assert [p for m in log for p in m["generation_logprobs"]] == [p or 0.0 for p in sample["logprobs"]]
        if experts:
            flat = [e for m in log for token in m["routed_experts"] for layer in token for e in layer]
            width = NUM_LAYERS * EXPERTS_PER_TOKEN
            assert flat == [*sample["routed_experts"]["data"], *[-1] * width]
            assert all(len(m["routed_experts"]) == len(m["token_ids"]) for m in log)


def test_all_that_a_turn_was_given_is_its_message() -> None:
    recorder = Recorder()
    first = said(None, call(id="c1"), call(id="c2"))
    recorder.run([user("u")], first)
    recorder.run([user("u"), first, result("x", "c1"), result("y", "c2")], said("b"))
    [row] = nemo_rl.rows(rows(recorder, reward=1.0))
    assert [(m["role"], m["content"]) for m in row["message_log"]] == [
        ("user", "u"),
        ("assistant", ""),
        ("environment", "x\ny"),
        ("assistant", "b"),
    ]


def test_a_turn_without_tokens_is_an_empty_message() -> None:
    [row] = nemo_rl.rows(silent())
    assert [m["token_ids"] for m in row["message_log"]] == [[100, 101, 102], []]


def test_no_reward_is_an_error() -> None:
    with pytest.raises(ConfigError, match="sample t1 has no reward"):
        list(nemo_rl.rows(single(reward=None)))


def test_tensors_have_one_type_a_name() -> None:
    """NeMo-RL concatenates the messages of a log, empty ones too, and refuses types that differ."""
    torch = own("torch")
    recorder = Recorder()
    captured = Captured(recorder, experts=True)
    captured.run([user("u")], said("a"), completion=[], num_rows_before=0)
    captured.run([user("u"), said("a"), user("v")], said("b"))
    assert rows(recorder)[0]["routed_experts"] is not None
    for samples in (forked(experts=True), rows(recorder, reward=1.0)):
        for sample, row in zip(samples, nemo_rl.datums(samples, experts_per_token=2), strict=True):
            log = row["message_log"]
            for name in log[0].keys() - {"role", "content"}:
                assert len({(m[name].dtype, m[name].shape[1:]) for m in log}) == 1, name
                assert torch.cat([m[name] for m in log]).shape[0] == len(sample["token_ids"]), name
            assert torch.cat([m["token_ids"] for m in log]).tolist() == sample["token_ids"]


def test_nemo_rl_flattens_them_to_the_tape(message_utils: Any) -> None:
    samples = [*forked(), *single()]
    flat, lengths = message_utils.batched_message_log_to_flat_message(
        [row["message_log"] for row in nemo_rl.datums(samples)]
    )
    for at, sample in enumerate(samples):
        assert lengths[at] == len(sample["token_ids"])
        assert flat["token_ids"][at, : lengths[at]].tolist() == sample["token_ids"]
        assert flat["token_loss_mask"][at, : lengths[at]].tolist() == sample["loss_mask"]
