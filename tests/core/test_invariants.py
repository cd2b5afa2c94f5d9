"""The checker of samples: silent on good rows; for each rule one corruption that it alone reports."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
from recorded import TOOLS, Recorder, call, result, said, user

from tokentape.invariants import check_samples
from tokentape.types import Json, VersionSpan

Rows = list[dict[str, Any]]


def rows() -> Rows:
    """Session s: t1 → (t2 → t4, t3). Samples, 3 prompt and 2 sampled tokens a turn: t3 (10), t4 (15)."""
    recorder = Recorder()
    first = said(None, call(), reasoning="r")
    recorder.run([user("u")], first, TOOLS, versions=(VersionSpan("v1", 0, 1), VersionSpan("v2", 1, 2)))
    recorder.run([user("u"), first, result("x")], said("b"), TOOLS)
    recorder.run([user("u"), first, result("y")], said("c"), TOOLS, finish_reason="length")
    recorder.run([user("u"), first, result("x"), said("b"), user("v")], said("d"), TOOLS)
    return recorder.rows(reward=0.0, metadata={"task": "t"})


def test_the_rows_are_what_the_corruptions_say() -> None:
    short, long = rows()
    assert [t["turn_id"] for t in short["turns"]] == ["t1", "t3"]
    assert [t["turn_id"] for t in long["turns"]] == ["t1", "t2", "t4"]
    assert short["loss_mask"] == [0, 0, 0, 0, 0, 0, 0, 0, 1, 1]
    assert long["loss_mask"] == [0, 0, 0, 1, 1] * 3
    assert long["weight_versions"][:2] == [
        {"version": "v1", "start": 3, "end": 4},
        {"version": "v2", "start": 4, "end": 5},
    ]


def test_good_rows() -> None:
    assert check_samples([]) == []
    assert check_samples(rows()) == []
    other = rows()
    for row in other:
        row["session_id"] = "s2"  # the same ids in another session are other turns
    assert check_samples([*rows(), *other]) == []
    captured = rows()
    _capture(0)(captured)
    captured[0]["routed_experts"] = {"data": bytes(36), "dtype": "uint16", "width": 2}
    captured[1]["routed_experts"] = {"data": "AAAA" * 14, "dtype": "uint8", "width": 3}  # as JSON has it
    assert check_samples(captured) == []
    for reward in (None, 1, -2.5):
        changed = rows()
        changed[0]["reward"] = changed[1]["reward"] = reward
        assert check_samples(changed) == []


def _set(row: int, column: str, value: Any, *at: Any) -> Callable[[Rows], None]:
    def corrupt(rows: Rows) -> None:
        target: Any = rows[row]
        for step in (column, *at)[:-1]:
            target = target[step]
        target[(column, *at)[-1]] = value

    return corrupt


def _drop(row: int, column: str, *at: Any) -> Callable[[Rows], None]:
    def corrupt(rows: Rows) -> None:
        target: Any = rows[row]
        for step in (column, *at)[:-1]:
            target = target[step]
        del target[(column, *at)[-1]]

    return corrupt


def _train(row: int, turn: int, trained: bool) -> Callable[[Rows], None]:
    """Let a row train a turn, or not, with everything that belongs to it."""

    def corrupt(rows: Rows) -> None:
        target = rows[row]
        span = target["turns"][turn]
        span["trained"] = trained
        for at in range(span["start"], span["end"]):
            target["loss_mask"][at] = int(trained)
            target["logprobs"][at] = -0.5 if trained else None
        spans = [v for v in target["weight_versions"] if not span["start"] <= v["start"] < span["end"]]
        spans += [{"version": "v", "start": span["start"], "end": span["end"]}] * trained
        target["weight_versions"] = sorted(spans, key=lambda v: v["start"])

    return corrupt


def _capture(row: int) -> Callable[[Rows], None]:
    """Let a row have a support for each of its trained tokens."""

    def corrupt(rows: Rows) -> None:
        ids, mask = rows[row]["token_ids"], rows[row]["loss_mask"]
        rows[row]["support"] = [[i, 0] if m else None for i, m in zip(ids, mask, strict=True)]
        rows[row]["sampling_logprobs"] = [-0.25 if m else None for m in mask]

    return corrupt


def _also(*corruptions: Callable[[Rows], None]) -> Callable[[Rows], None]:
    def corrupt(rows: Rows) -> None:
        for one in corruptions:
            one(rows)

    return corrupt


SPAN = {"version": "v", "start": 3, "end": 5}
CORRUPTIONS: dict[str, tuple[Callable[[Rows], None], str]] = {
    # columns
    "a column is missing": (_drop(0, "sampling"), "sample t3: column sampling is missing"),
    "a column is null": (_set(0, "branch_reason", None), "sample t3: branch_reason is a NoneType"),
    "a number is a bool": (_set(0, "num_prompt_tokens", True), "sample t3: num_prompt_tokens is a bool"),
    "a struct is none": (_set(0, "turns", 3, 1), "sample t3: turns[1] is a int"),
    "a field of a turn is missing": (
        _drop(0, "turns", 1, "parse_status"),
        "sample t3: turns[1].parse_status is not a str",
    ),
    "a field of a span is wrong": (
        _set(1, "weight_versions", 2, 0, "version"),
        "sample t4: weight_versions[0].version is not a str",
    ),
    "no turn at all": (_set(0, "turns", []), "sample t3: there is no turn"),
    # labels
    "a label is null": (_set(0, "label", None), "sample t3: label is a NoneType"),
    "a label of a turn is missing": (
        _drop(0, "turns", 1, "label"),
        "sample t3: turns[1].label is not a str",
    ),
    "another label than the last turn's": (
        _set(0, "label", "auxiliary"),
        "sample t3: label is 'auxiliary', the last turn's 'main'",
    ),
    "nobody says so": (_set(0, "label_by", ""), "sample t3: label or label_by is empty"),
    "a turn of another label is trained": (
        _set(1, "turns", "auxiliary", 1, "label"),
        "sample t4: turn t2 is trained here, but its label is 'auxiliary'",
    ),
    # arrays
    "a token lost": (
        _drop(0, "token_ids", 9),
        "sample t3: arrays of different lengths: token_ids 9, loss_mask 10, logprobs 10",
    ),
    "a mask lost": (
        _drop(0, "loss_mask", 9),
        "sample t3: arrays of different lengths: token_ids 10, loss_mask 9, logprobs 10",
    ),
    "a log-probability lost": (
        _drop(0, "logprobs", 0),
        "sample t3: arrays of different lengths: token_ids 10, loss_mask 10, logprobs 9",
    ),
    "a negative id": (_set(0, "token_ids", -1, 9), "sample t3: token_ids holds -1"),
    "an id beyond int32": (_set(0, "token_ids", 2**31, 9), "sample t3: token_ids holds 2147483648"),
    "an id that is none": (_set(0, "token_ids", 5.0, 9), "sample t3: token_ids holds 5.0"),
    "a mask of 2": (_set(0, "loss_mask", 2, 9), "sample t3: loss_mask holds 2, not 0 or 1"),
    "a mask of True": (_set(0, "loss_mask", True, 9), "sample t3: loss_mask holds True, not 0 or 1"),
    # provenance
    "a mask flipped on in a prompt": (
        _set(0, "loss_mask", 1, 0),
        "sample t3: token 0: mask 1 outside every turn's completion",
    ),
    "a mask flipped on in a bridge": (
        _set(0, "loss_mask", 1, 6),
        "sample t3: token 6: mask 1 outside every turn's completion",
    ),
    "a mask flipped off": (
        _set(0, "loss_mask", 0, 8),
        "sample t3: turn t3: trained, but its mask is not all 1",
    ),
    "a mask in a turn that is not trained": (
        _set(0, "loss_mask", 1, 4),
        "sample t3: turn t1: not trained, but has mask 1",
    ),
    "0.0 for null": (
        _set(0, "logprobs", 0.0, 0),
        "sample t3: token 0: mask 0 with log-probability 0.0, not null",
    ),
    "null for a log-probability": (
        _set(0, "logprobs", None, 9),
        "sample t3: token 9: mask 1 without a log-probability",
    ),
    "NaN": (_set(0, "logprobs", math.nan, 9), "sample t3: token 9: nan is no log-probability"),
    "minus infinity": (_set(0, "logprobs", -math.inf, 9), "sample t3: token 9: -inf is no log-probability"),
    "above 0": (_set(0, "logprobs", 0.01, 9), "sample t3: token 9: 0.01 is no log-probability"),
    "a text": (_set(0, "logprobs", "-1", 9), "sample t3: token 9: '-1' is no log-probability"),
    # versions
    "a span lost": (_drop(1, "weight_versions", 2), "sample t4: token 8: mask 1 without a version"),
    "a span too short": (
        _set(0, "weight_versions", 9, 0, "end"),
        "sample t3: token 9: mask 1 without a version",
    ),
    "a span too long": (
        _set(0, "weight_versions", 7, 0, "start"),
        "sample t3: token 7: mask 0 with a version",
    ),
    "a span of a turn that is not trained": (
        _set(0, "weight_versions", [SPAN, {"version": "v", "start": 8, "end": 10}]),
        "sample t3: token 3: mask 0 with a version",
    ),
    "a span outside": (
        _set(0, "weight_versions", 11, 0, "end"),
        "sample t3: version span 8:11 is empty or outside the tape",
    ),
    "an empty span": (
        _set(1, "weight_versions", 3, 0, "end"),
        "sample t4: version span 3:3 is empty or outside the tape",
    ),
    "overlapping spans": (
        _set(1, "weight_versions", 5, 0, "end"),
        "sample t4: version span 4:5 overlaps the one before or is out of order",
    ),
    "spans out of order": (
        lambda rows: rows[1]["weight_versions"].reverse(),
        "sample t4: version span 8:10 overlaps the one before or is out of order",
    ),
    # turns
    "turns out of order": (
        lambda rows: rows[0]["turns"].reverse(),
        "sample t3: turn t1: span 3:5 overlaps or is out of order",
    ),
    "overlapping turns": (
        _set(0, "turns", 4, 1, "start"),
        "sample t3: turn t3: span 4:10 overlaps or is out of order",
    ),
    "a turn outside": (_set(0, "turns", 11, 1, "end"), "sample t3: turn t3: span 8:11 is outside the tape"),
    "a turn that ends before it starts": (
        _set(0, "turns", 7, 1, "end"),
        "sample t3: turn t3: span 8:7 is outside the tape",
    ),
    "tokens after the last turn": (
        _set(0, "turns", 9, 1, "end"),
        "sample t3: 1 tokens follow the last turn's completion",
    ),
    "a turn twice": (_set(0, "turns", "t3", 0, "turn_id"), "sample t3: turn t3 is there twice"),
    # captured
    "supports without log-probabilities": (
        _set(0, "support", [None] * 10),
        "sample t3: one of support and sampling_logprobs is null",
    ),
    "a support too short": (
        _also(_set(0, "support", [None] * 9), _set(0, "sampling_logprobs", [None] * 10)),
        "sample t3: support 9, sampling_logprobs 10, token_ids 10",
    ),
    "a support where nothing was sampled": (
        _also(_capture(0), _set(0, "support", [1], 0), _set(0, "sampling_logprobs", -0.5, 0)),
        "sample t3: token 0: mask 0 with a support",
    ),
    "a support without its token": (
        _also(_capture(0), _set(0, "support", [0], 9)),
        "sample t3: token 9: it is not in its own support",
    ),
    "a support without its log-probability": (
        _also(_capture(0), _set(0, "sampling_logprobs", None, 9)),
        "sample t3: token 9: one of its support and its sampling_logprob is null",
    ),
    "a log-probability in a support": (
        _also(_capture(0), _set(0, "sampling_logprobs", 0.5, 9)),
        "sample t3: token 9: 0.5 is no log-probability (sampling_logprobs)",
    ),
    "routed experts of a token too few": (
        _set(0, "routed_experts", {"data": bytes(16), "dtype": "uint8", "width": 2}),
        "sample t3: routed_experts is not of 9 tokens",
    ),
    "routed experts of another type": (
        _set(0, "routed_experts", {"data": bytes(18), "dtype": "int8", "width": 2}),
        "sample t3: routed_experts is not of 9 tokens",
    ),
    "a basis that is none": (
        _set(0, "turns", "maybe", 1, "logprob_basis"),
        "sample t3: turn t3: logprob_basis is 'maybe'",
    ),
    "a turn's reward that is none": (
        _set(0, "turns", math.inf, 1, "reward"),
        "sample t3: turn t3: reward is inf",
    ),
    "a turn's reward of another type": (
        _set(0, "turns", "high", 1, "reward"),
        "sample t3: turns[1].reward is not a float",
    ),
    "a group that is a number": (_set(0, "group_id", 7), "sample t3: group_id is a int"),
    # what the row says of itself
    "another prompt length": (
        _set(0, "num_prompt_tokens", 4),
        "sample t3: num_prompt_tokens is 4, the first turn starts at 3",
    ),
    "another sample id": (_set(0, "sample_id", "t1"), "sample t1: sample_id is not the last turn's id t3"),
    "truncated, and it is not": (
        _set(1, "truncated", True),
        "sample t4: truncated is True, the last turn's finish_reason 'stop'",
    ),
    "not truncated, and it is": (
        _set(0, "truncated", False),
        "sample t3: truncated is False, the last turn's finish_reason 'length'",
    ),
    "a reward that is none": (_set(0, "reward", math.nan), "sample t3: reward is nan"),
    "metadata that is no JSON": (
        _set(0, "metadata", "x"),
        "sample t3: metadata is not JSON: Expecting value: line 1 column 1 (char 0)",
    ),
    "NaN in metadata": (
        _set(0, "metadata", '{"a": NaN}'),
        "sample t3: metadata is not JSON: NaN is not JSON",
    ),
    "metadata of another shape": (_set(0, "metadata", "[]"), "sample t3: metadata is no JSON object"),
    "messages of another shape": (_set(0, "messages", "{}"), "sample t3: messages is no JSON array"),
    "tools of another shape": (_set(0, "tools", "null"), "sample t3: tools is no JSON array"),
    "sampling of another shape": (_set(0, "sampling", "1"), "sample t3: sampling is no JSON array"),
    # a session's rows
    "trained twice": (_train(0, 0, True), "session s: turn t1 is trained 2 times"),
    "never trained": (_train(1, 1, False), "session s: turn t2 is trained 0 times"),
    "a sample lost": (lambda rows: rows.pop(), "session s: turn t1 is trained 0 times"),
    "a sample twice": (
        lambda rows: rows.append(copy.deepcopy(rows[0])),
        "session s: sample t3 is there twice",
    ),
    "another prompt before a shared turn": (
        _set(0, "token_ids", 9, 1),
        "session s: turn t1 differs between samples t3 and t4",
    ),
    "another id in a shared turn": (
        _set(1, "token_ids", 9, 4),
        "session s: turn t1 differs between samples t3 and t4",
    ),
    "another outcome of a shared turn": (
        _set(1, "turns", "length", 0, "finish_reason"),
        "session s: turn t1 differs between samples t3 and t4",
    ),
    "another parse of a shared turn": (
        _set(1, "turns", "malformed", 0, "parse_status"),
        "session s: turn t1 differs between samples t3 and t4",
    ),
}


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_each_corruption_is_reported_and_nothing_else(corruption: str) -> None:
    corrupt, words = CORRUPTIONS[corruption]
    corrupted = rows()
    corrupt(corrupted)
    assert check_samples(corrupted) == [words]


def test_a_flipped_mask_with_everything_that_belongs_to_it_is_still_seen() -> None:
    """Nothing of the row betrays a token that was never sampled, but that it is part of no turn."""
    corrupted = rows()
    _also(
        _set(0, "loss_mask", 1, 7),
        _set(0, "logprobs", -0.5, 7),
        _set(0, "weight_versions", 7, 0, "start"),
    )(corrupted)
    assert check_samples(corrupted) == ["sample t3: token 7: mask 1 outside every turn's completion"]


def test_faults_that_have_nothing_in_common_are_all_reported() -> None:
    corrupted = rows()
    _also(
        _set(0, "logprobs", None, 9),
        _set(0, "tools", "x"),
        _set(1, "truncated", True),
        _set(1, "num_prompt_tokens", 0),
        _train(1, 1, False),
    )(corrupted)
    problems = check_samples(corrupted)
    assert len(problems) == 5
    assert [p.split(":")[0] for p in problems] == [
        "sample t3",
        "sample t3",
        "sample t4",
        "sample t4",
        "session s",
    ]


@pytest.mark.parametrize("row", [{}, {"turns": None}, {"session_id": 3, "turns": [None]}])
def test_rows_that_are_none_are_reported_and_not_raised(row: Json) -> None:
    assert check_samples([row])
    assert check_samples([*rows(), row])
