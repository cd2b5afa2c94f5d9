"""Every trainer in the table: its rows, read back, are what the samples said, each token trained once.

A new trainer needs one function in `BACK`, from its rows to ids, mask and log-probabilities.
"""

import json
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from episodes import as_json, forked, rows, single
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded import Recorder, new_messages, said, turn, user

from tokentape.errors import ConfigError, RequestError
from tokentape.export import TRAINERS
from tokentape.export.row import Row
from tokentape.invariants import check_samples
from tokentape.types import Json, VersionSpan

Read = tuple[list[int], list[int], list[float | None]]
"""ids, mask, log-probabilities: None where the mask is 0."""


def read(ids: Sequence[int], mask: Sequence[int], logprobs: Sequence[float]) -> Read:
    """Of a trainer without nulls: what it is given where the mask is 0 is nothing."""
    nulled = [p if trained else None for trained, p in zip(mask, logprobs, strict=True)]
    return list(ids), list(mask), nulled


def joined(
    prompt: Sequence[int], response: Sequence[int], mask: Sequence[int], logprobs: Sequence[float]
) -> Read:
    """Of a split: nothing of the prompt is trained."""
    num_prompt = len(prompt)
    return read([*prompt, *response], [0] * num_prompt + [*mask], [0.0] * num_prompt + [*logprobs])


def back_verl(row: Json) -> Read:
    return joined(row["prompt_ids"], row["response_ids"], row["response_mask"], row["response_logprobs"])


def back_slime(row: Json) -> Read:
    at = len(row["tokens"]) - row["response_length"]
    return joined(row["tokens"][:at], row["tokens"][at:], row["loss_mask"], row["rollout_log_probs"])


def back_skyrl(row: Json) -> Read:
    return joined(row["prompt_token_ids"], row["response_ids"], row["loss_masks"], row["rollout_logprobs"])


def back_trl(row: Json) -> Read:
    return joined(row["prompt_ids"], row["completion_ids"], row["env_mask"], row["logprobs"])


def back_areal(row: Json) -> Read:
    [ids], [mask], [logprobs] = row["input_ids"], row["loss_mask"], row["logprobs"]
    return read(ids, mask, logprobs)


def back_tinker(row: Json) -> Read:
    inputs = row["loss_fn_inputs"]
    ids = [*row["model_input"], inputs["target_tokens"][-1]]
    assert ids[1:] == inputs["target_tokens"]
    return read(ids, [0, *(int(trained) for trained in inputs["mask"])], [0.0, *inputs["logprobs"]])


def back_datasets(row: Json) -> Read:
    """Arrow has nulls: nothing is put in the place of a missing log-probability."""
    mask = [int(label != -100) for label in row["labels"]]
    assert all(label in (-100, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))
    return row["input_ids"], mask, row["logprobs"]


def back_openrlhf(row: Json) -> Read:
    mask = [0] * len(row["observation_tokens"])
    for start, end in row["action_ranges"]:
        mask[start:end] = [1] * (end - start)
    return read(row["observation_tokens"], mask, row["rollout_log_probs"])


def back_prime_rl(row: Json) -> Read:
    return read(row["token_ids"], [int(trained) for trained in row["mask"]], row["logprobs"])


def back_nemo_rl(row: Json) -> Read:
    names = ("token_ids", "token_loss_mask", "generation_logprobs")
    ids, mask, logprobs = ([v for m in row["message_log"] for v in m[name]] for name in names)
    return read(ids, mask, logprobs)


BACK: dict[str, Callable[[Json], Read]] = {
    "areal": back_areal,
    "datasets": back_datasets,
    "nemo-rl": back_nemo_rl,
    "openrlhf": back_openrlhf,
    "prime-rl": back_prime_rl,
    "skyrl": back_skyrl,
    "slime": back_slime,
    "tinker": back_tinker,
    "trl": back_trl,
    "verl": back_verl,
}


@pytest.fixture(params=sorted(TRAINERS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


# -- samples


@st.composite
def sessions(draw: st.DrawFn, session_id: str = "s") -> list[Row]:
    """The samples of a random tree: forks, shared prefixes, empty turns and bridges, weights that change."""
    recorder, histories = Recorder(), [[]]  # a turn continues one of these
    for index in range(draw(st.integers(1, 6))):
        history = draw(st.sampled_from(histories))
        messages = [*history, user(f"u{index}")]
        parent, num_matched, reason = recorder.plan(messages)
        size = draw(st.integers(0 if history else 1, 4))
        cut = draw(st.integers(0, size))
        versions = [VersionSpan("3", 0, cut), VersionSpan(draw(st.sampled_from("34")), cut, size)]
        made = turn(
            f"t{index}",
            parent_id=parent.turn_id if parent is not None else None,
            branch_reason=reason,
            prompt=draw(st.lists(TOKENS, min_size=0 if history else 1, max_size=3)),
            completion=draw(st.lists(TOKENS, min_size=size, max_size=size)),
            logprobs=array("f", draw(st.lists(LOGPROBS, min_size=size, max_size=size))),
            versions=tuple(span for span in versions if span.start < span.end),
            messages=new_messages(messages, num_matched, parent),
            reply=said(f"r{index}"),
            finish_reason=draw(st.sampled_from(["stop", "length"])),
        )
        recorder.tree.commit(made)
        histories.append([*messages, made.reply])
    group_id = draw(st.sampled_from([None, "g", "h"]))
    return rows(
        recorder, session_id=session_id, reward=draw(st.sampled_from([0.0, 1.0, -0.5])), group_id=group_id
    )


TOKENS = st.integers(0, 2**31 - 1)
LOGPROBS = st.floats(-(2.0**100), 0.0, width=32, allow_subnormal=False)


@settings(deadline=None, max_examples=100)
@given(first=sessions("s1"), second=sessions("s2"))
def test_what_goes_in_comes_back(first: list[Row], second: list[Row]) -> None:
    """All trainers on the same samples; the sum of trained tokens is that of all sampled ones."""
    samples = [*first, *second]
    assert check_samples(samples) == []
    num_sampled = sum(
        {(s["session_id"], t["turn_id"]): t["end"] - t["start"] for s in samples for t in s["turns"]}.values()
    )
    expected = [(s["token_ids"], s["loss_mask"], s["logprobs"]) for s in samples]
    for trainer in TRAINERS.values():
        made = list(trainer.rows(samples))
        found = [BACK[trainer.name](row) for row in made]
        assert found == expected, trainer.name
        assert sum(sum(mask) for _, mask, _ in found) == num_sampled, trainer.name
        assert json.loads(json.dumps(made, allow_nan=False)) == made, trainer.name  # plain values
        assert list(trainer.rows(as_json(samples))) == made, trainer.name


def test_every_trainer_is_read_back() -> None:
    assert sorted(BACK) == sorted(TRAINERS), "give each trainer a function in BACK"
    assert all(trainer.convention for trainer in TRAINERS.values())


@settings(deadline=None, max_examples=50)
@given(sessions(), st.sampled_from([None, float("nan"), float("-inf")]), st.data())
def test_a_missing_log_probability_is_an_error(samples: list[Row], missing: Any, data: st.DataObject) -> None:
    """At any trained token of any sample; never filled."""
    places = [(i, at) for i, s in enumerate(samples) for at, m in enumerate(s["loss_mask"]) if m]
    index, at = data.draw(st.sampled_from(places))
    broken = list(samples)
    broken[index] = replaced(samples[index], "logprobs", at, missing)
    for trainer in TRAINERS.values():
        with pytest.raises((ConfigError, RequestError), match=f"{samples[index]['sample_id']}.* {at}"):
            list(trainer.rows(broken))


@pytest.mark.parametrize(
    "change",
    [
        lambda s: replaced(s, "logprobs", 0, -1.0),
        lambda s: replaced(s, "loss_mask", 0, 1),
        lambda s: replaced(s, "loss_mask", -1, 2),
        lambda s: {**s, "loss_mask": s["loss_mask"][:-1]},
        lambda s: {**s, "num_prompt_tokens": s["num_prompt_tokens"] + 1},
        lambda s: {**s, "num_prompt_tokens": -1},
        lambda s: {**s, "num_prompt_tokens": 0, "loss_mask": [1] * 7, "logprobs": [-1.0] * 7},
    ],
)
def test_a_sample_that_contradicts_itself_is_an_error(name: str, change: Callable[[Row], Row]) -> None:
    [sample] = single()
    with pytest.raises((ConfigError, RequestError), match="sample t1"):
        list(TRAINERS[name].rows([change(sample)]))


def test_rows_do_not_change_the_samples(name: str) -> None:
    samples = [*forked(turn_rewards={}), *single()]
    before = json.dumps(as_json(samples))
    made = list(TRAINERS[name].rows(samples))
    first = json.dumps(made)
    for row in made:
        wiped(row)
    assert json.dumps(as_json(samples)) == before
    assert json.dumps(list(TRAINERS[name].rows(samples))) == first


def test_the_control_a_shifted_mask_is_seen() -> None:
    """The comparison above can fail."""
    [sample] = single()
    [row] = TRAINERS["verl"].rows([sample])
    row["response_mask"] = [0, *row["response_mask"][:-1]]
    assert back_verl(row) != (sample["token_ids"], sample["loss_mask"], sample["logprobs"])


def replaced(sample: Row, column: str, at: int, value: Any) -> Row:
    values = list(sample[column])
    values[at] = value
    return {**sample, column: values}


def wiped(value: Any) -> None:
    """Empty every list and object in a row, so that one that is shared with the sample is seen."""
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        wiped(inner)
    if isinstance(value, (list, dict)):
        value.clear()
