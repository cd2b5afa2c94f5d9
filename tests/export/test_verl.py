"""verl: its own pydantic class takes the rows, and its own agent loop worker pads them to the same batch."""

import types
from typing import Any

import pytest
from episodes import EXPERTS_PER_TOKEN, NUM_LAYERS, as_json, forked, silent, single
from packages import own

from tokentape.errors import ConfigError
from tokentape.export import verl
from tokentape.export.row import Row

PAD, PROMPT, RESPONSE = 99, 5, 16


@pytest.fixture
def agent_loop() -> Any:
    """verl's own module."""
    return own("verl.experimental.agent_loop.agent_loop")


@pytest.fixture
def worker(agent_loop: Any) -> Any:
    """verl's worker without its engine: what its postprocessing reads, and a tokenizer that pads."""
    return without_engine(agent_loop.AgentLoopWorker)


def without_engine(class_: Any) -> Any:
    tokenizers, transformers = own("tokenizers"), own("transformers")
    empty = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"<{i}>": i for i in range(PAD + 1)}))
    made = object.__new__(class_)
    made.tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=empty, pad_token=f"<{PAD}>")
    made.rollout_config = types.SimpleNamespace(prompt_length=PROMPT, response_length=RESPONSE)
    made.processor = None
    made.mm_processor_kwargs = {}
    made.reward_loop_worker_handles = None
    made.distillation_enabled = False
    return made


def test_a_row_to_the_letter() -> None:
    first, second = verl.rows(forked())
    assert first == {
        "prompt_ids": [100, 101, 102],
        "response_ids": [6001, 6002, 110, 111, 112, 6001, 6002],
        "response_mask": [0, 0, 0, 0, 0, 1, 1],
        "response_logprobs": [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -0.125],
        "reward_score": 1.0,
        "num_turns": 4,
        "metrics": {},
        "extra_fields": {
            "turn_scores": [None],
            "tool_rewards": [],
            "reward_extra_info": {},
            "weight_versions": ["4"],
            "session_id": "s1",
            "sample_id": "t3",
            "group_id": "g",
            "min_global_steps": 4,
            "max_global_steps": 4,
        },
    }
    assert second["response_mask"] == [1, 1, 0, 0, 0, 1, 1, 1, 0, 0, 0, 1]
    assert second["extra_fields"]["turn_scores"] == [0.25, None, None]
    assert (second["extra_fields"]["min_global_steps"], second["extra_fields"]["max_global_steps"]) == (3, 5)


def named() -> Row:
    """A sample of weights whose names are not all numbers."""
    spans = [{"version": "3", "start": 3, "end": 4}, {"version": "step-4", "start": 4, "end": 7}]
    return {**single()[0], "weight_versions": spans}


def test_versions_that_are_no_integers_are_not_made_into_steps() -> None:
    [row] = verl.rows([named()])
    assert row["extra_fields"]["weight_versions"] == ["3", "step-4"]
    assert "min_global_steps" not in row["extra_fields"]


def test_an_empty_response_is_empty() -> None:
    [row] = verl.rows(silent())
    assert (row["prompt_ids"], row["response_ids"], row["response_mask"]) == ([100, 101, 102], [], [])


def test_no_reward_is_none() -> None:
    assert [row["reward_score"] for row in verl.rows(forked(reward=None))] == [None, None]


def test_experts_need_their_number() -> None:
    [sample] = single(experts=True)
    with pytest.raises(ConfigError, match="sample t1 has routed experts, 6 a token over all layers: say exp"):
        list(verl.rows([sample]))
    with pytest.raises(ConfigError, match="sample t1: 6 routed experts a token are no multiple of 4"):
        list(verl.rows([sample], experts_per_token=4))
    [row] = verl.rows([sample], experts_per_token=EXPERTS_PER_TOKEN)
    assert [len(row["routed_experts"]), len(row["routed_experts"][0])] == [6, NUM_LAYERS]
    assert [e for token in row["routed_experts"] for layer in token for e in layer] == [
        *sample["routed_experts"]["data"]
    ]
    assert list(verl.rows(as_json([sample]), experts_per_token=EXPERTS_PER_TOKEN)) == [row]


# -- against verl


def test_verl_takes_the_rows(agent_loop: Any) -> None:
    for sample, row in zip(forked(), verl.rows(forked()), strict=True):
        made = agent_loop.AgentLoopOutput(**row)
        assert made.model_dump(exclude_unset=True)["response_ids"] == row["response_ids"]
        assert made.metrics == agent_loop.AgentLoopMetrics()
        out = made.as_dict()
        assert [*out["prompts"].tolist(), *out["responses"].tolist()] == sample["token_ids"]
        assert out["response_mask"].tolist() == sample["loss_mask"][3:]
        assert out["rollout_log_probs"].tolist() == [p or 0.0 for p in sample["logprobs"][3:]]
        assert out["rm_scores"].tolist() == [*[0.0] * (len(row["response_ids"]) - 1), 1.0]


def test_verl_aligns_the_experts_as_we_say(agent_loop: Any) -> None:
    [sample] = single(experts=True)
    [made] = verl.outputs([sample], experts_per_token=EXPERTS_PER_TOKEN)
    assert made.routed_experts.dtype == "int16"
    routed = made.as_dict()["routed_experts"]
    assert routed.shape == (7, NUM_LAYERS, EXPERTS_PER_TOKEN)
    assert routed[:6].flatten().tolist() == [*sample["routed_experts"]["data"]]
    assert not routed[6].any()


@pytest.mark.parametrize("experts", [False, True])
async def test_the_batch_is_what_verl_itself_pads(worker: Any, experts: bool) -> None:
    """Every tensor of ours is verl's own, of the same type; and so are the fields beside them."""
    given = [*forked(experts=experts), *single(experts=experts)]
    number = EXPERTS_PER_TOKEN if experts else None
    padded = [
        await worker._agent_loop_postprocess(output, False, raw_prompt=None)
        for output in verl.outputs(given, experts_per_token=number)
    ]
    theirs = worker._postprocess(padded)
    ours = verl.batch(
        given, pad_token_id=PAD, prompt_length=PROMPT, response_length=RESPONSE, experts_per_token=number
    )
    assert set(ours.batch.keys()) == set(theirs.batch.keys())
    assert ("routed_experts" in ours.batch.keys()) == experts  # noqa: SIM118
    for name, values in theirs.batch.items():
        assert ours.batch[name].dtype == values.dtype, name
        assert ours.batch[name].tolist() == values.tolist(), name
    for name, values in theirs.non_tensor_batch.items():
        if name not in ("raw_prompt", "multi_modal_inputs"):  # what only a run has, and what has no images
            assert list(ours.non_tensor_batch[name]) == list(values), name
    assert list(ours.non_tensor_batch["uid"]) == ["g", "g", "g"]


async def test_every_batch_has_the_fields_that_verl_concatenates(worker: Any) -> None:
    given = [named(), *single()]
    padded = [
        await worker._agent_loop_postprocess(output, False, raw_prompt=None) for output in verl.outputs(given)
    ]
    theirs = worker._postprocess(padded).non_tensor_batch
    ours = verl.batch(given, pad_token_id=PAD, prompt_length=PROMPT, response_length=RESPONSE)
    for name in ("min_global_steps", "max_global_steps", "extras"):
        assert list(ours.non_tensor_batch[name]) == list(theirs[name])


async def test_a_batch_without_all_rewards_has_no_scores(worker: Any) -> None:
    given = [*forked(), *single(reward=None)]
    padded = [
        await worker._agent_loop_postprocess(output, False, raw_prompt=None) for output in verl.outputs(given)
    ]
    ours = verl.batch(given, pad_token_id=PAD, prompt_length=PROMPT, response_length=RESPONSE)
    assert "rm_scores" not in worker._postprocess(padded).batch.keys()  # noqa: SIM118
    assert "rm_scores" not in ours.batch.keys()  # noqa: SIM118


async def test_verls_queue_takes_the_branches_of_a_session(
    agent_loop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its newer trainer stores: one entry a branch, the mask as loss mask, the versions as tags."""
    module = own("verl.trainer.ppo.v1.agent_loop_tq")
    stored: dict[str, Any] = {}

    async def put(**given: Any) -> None:
        stored.update(given)

    monkeypatch.setattr(module.tq, "async_kv_batch_put", put)
    given, made = forked(), verl.outputs(forked())
    run = {"uid": "u", "session_id": 0, "global_steps": 6, "raw_prompt": []}
    actor = module.AgentLoopWorkerTQ.__ray_metadata__.modified_class  # the class inside Ray's
    await without_engine(actor)._agent_loop_postprocess(made, False, **run)
    assert stored["keys"] == ["u_0_0", "u_0_1"]
    assert [(tag["min_global_steps"], tag["max_global_steps"]) for tag in stored["tags"]] == [(4, 4), (3, 5)]
    names = ("input_ids", "loss_mask", "rollout_log_probs", "rm_scores")
    columns = (stored["fields"][name] for name in names)
    for sample, ids, mask, logprobs, scores in zip(given, *columns, strict=True):
        assert ids.tolist() == sample["token_ids"]
        assert mask.tolist() == sample["loss_mask"][3:]
        assert logprobs.tolist() == [p or 0.0 for p in sample["logprobs"][3:]]
        assert scores.sum() == sample["reward"]


def test_nothing_is_cut_off_or_mixed(agent_loop: Any) -> None:
    lengths = {"pad_token_id": PAD, "prompt_length": PROMPT, "response_length": RESPONSE}
    with pytest.raises(ConfigError, match="sample t4: its response has 12 tokens, response_length is 11"):
        verl.batch(forked(), **lengths | {"response_length": 11})
    with pytest.raises(ConfigError, match="sample t3: its prompt has 3 tokens, prompt_length is 2"):
        verl.batch(forked(), **lengths | {"prompt_length": 2})
    with pytest.raises(ConfigError, match="only some samples have routed experts"):
        verl.batch([*forked(experts=True), *single()], **lengths, experts_per_token=2)
    with pytest.raises(ConfigError, match="a batch needs a sample"):
        verl.batch([], **lengths)
