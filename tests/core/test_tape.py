"""Turns and tapes: arrays of one length, the mask where this tape trains, exact extension."""

import itertools
import math
from array import array
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded import turn

from tokentape.errors import InternalError
from tokentape.labels import labels
from tokentape.tape import Turn, lay_out
from tokentape.types import Prompt, TokenRun, VersionSpan

IDS = st.lists(st.integers(0, 2**31 - 1), max_size=12)


@st.composite
def paths(draw: st.DrawFn) -> list[Turn]:
    """A root and what follows it; completions may be empty, versions may change inside one."""
    path: list[Turn] = []
    for index in range(draw(st.integers(1, 5))):
        completion = draw(IDS)
        size = len(completion)
        cuts = sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=3))}) if size else []
        made = turn(
            f"t{index}",
            parent_id=path[-1].turn_id if path else None,
            prompt=draw(IDS),
            completion=completion,
            logprobs=array("f", draw(st.lists(st.floats(-50, 0, width=32), min_size=size, max_size=size))),
            versions=tuple(VersionSpan(f"v{a}", a, b) for a, b in itertools.pairwise(cuts)),
        )
        made.verify()
        path.append(made)
    return path


@settings(deadline=None)
@given(paths(), st.data())
def test_a_tape_is_its_turns_one_after_the_other(path: list[Turn], data: st.DataObject) -> None:
    trained = set(data.draw(st.lists(st.sampled_from([t.turn_id for t in path]))))
    tape = lay_out(path, trained, labels(path))
    ids: list[int] = []
    mask: list[int] = []
    logprobs: list[float] = []
    versions: list[str | None] = []
    for t in path:  # one token at a time, as nobody would write it
        ids += [*t.prompt.ids, *t.completion.ids]
        mine = t.turn_id in trained
        mask += [0] * len(t.prompt) + [int(mine)] * len(t.completion)
        logprobs += [0.0] * len(t.prompt) + (list(t.logprobs) if mine else [0.0] * len(t.completion))
        versions += [None] * len(t.prompt)
        for span in t.versions:
            versions += [span.version if mine else None] * (span.end - span.start)
    assert list(tape.token_ids) == ids
    assert list(tape.loss_mask) == mask
    assert list(tape.logprobs) == logprobs
    at: list[str | None] = [None] * len(tape)
    for span in tape.versions:
        assert at[span.start : span.end] == [None] * (span.end - span.start)
        at[span.start : span.end] = [span.version] * (span.end - span.start)
    assert at == versions
    assert (tape.token_ids.typecode, tape.loss_mask.typecode, tape.logprobs.typecode) == ("i", "b", "f")
    assert tape.num_prompt_tokens == len(path[0].prompt)
    assert [s.trained for s in tape.turns] == [t.turn_id in trained for t in path]
    assert [list(tape.token_ids[s.start : s.end]) for s in tape.turns] == [
        list(t.completion.ids) for t in path
    ]


def prompt_after(path: list[Turn], bridge: TokenRun) -> Prompt:
    prompt = Prompt()
    for one in path:
        prompt = prompt.followed_by(one.prompt).followed_by(one.completion)
    return prompt.followed_by(bridge)


@settings(deadline=None)
@given(paths(), IDS)
def test_a_prompt_extends_what_was_sent_and_sampled(path: list[Turn], bridge: list[int]) -> None:
    prompt = prompt_after(path, TokenRun(bridge))
    assert prompt.to_list() == [*lay_out(path, (), labels(path)).token_ids, *bridge]
    assert len(prompt) == len(prompt.to_list())
    assert prompt.max_id == max(prompt.to_list(), default=-1)
    assert prompt.to_json() == b"[" + ",".join(map(str, prompt.to_list())).encode() + b"]"
    for index in range(len(path)):  # every earlier prompt, with what it sampled, is its beginning
        earlier = [*prompt_after(path[:index], path[index].prompt).to_list(), *path[index].completion.ids]
        assert prompt.to_list()[: len(earlier)] == earlier


def test_the_prompt_of_nothing() -> None:
    assert (len(Prompt()), Prompt().to_json(), Prompt().max_id) == (0, b"[]", -1)
    assert Prompt.of([]).to_json() == b"[]"


def test_a_negative_id_is_no_token() -> None:
    with pytest.raises(ValueError, match="negative token id -1"):
        TokenRun([3, -1])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"logprobs": array("f", [-1.0])}, "2 sampled ids, 1 log-probabilities"),
        ({"logprobs": array("f", [-1.0, -1.0, -1.0])}, "2 sampled ids, 3 log-probabilities"),
        ({"logprobs": array("f", [-1.0, math.nan])}, "not finite"),
        ({"logprobs": array("f", [-1.0, -math.inf])}, "not finite"),
        ({"versions": ()}, "end at 0 of 2"),
        ({"versions": (VersionSpan("v", 0, 1),)}, "end at 1 of 2"),
        ({"versions": (VersionSpan("v", 0, 3),)}, "end at 3 of 2"),
        ({"versions": (VersionSpan("v", 1, 2),)}, "gap or overlap at 0"),
        ({"versions": (VersionSpan("v", 0, 2), VersionSpan("w", 1, 2))}, "gap or overlap at 2"),
        ({"versions": (VersionSpan("v", 0, 0), VersionSpan("w", 0, 2))}, "gap or overlap at 0"),
        ({"stop_id": 7}, "stop token is not the last"),
        ({"stop_id": 7, "completion": TokenRun([]), "logprobs": array("f"), "versions": ()}, "stop token"),
    ],
)
def test_a_turn_that_disagrees_with_itself_is_refused(changes: dict[str, object], words: str) -> None:
    good = turn(stop_id=8)
    good.verify()
    with pytest.raises(InternalError, match=words):
        replace(good, **changes).verify()
