"""A turn costs what is new in it, however many roots, frames and summaries the session has: calls counted."""

import sys
from collections.abc import Callable
from functools import partial
from types import FrameType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded import TOOLS, Recorder, call, record, result, said, turn, user

from tokentape.gateway.session import Session
from tokentape.labels import Summaries
from tokentape.tape import Origin
from tokentape.types import Json, Message

SYSTEM = Message("system", "You are an agent.")
COMPACT = user("You are performing a CONTEXT CHECKPOINT COMPACTION.")


def calls_in(work: Callable[[], object]) -> int:
    """How often functions, of Python and C, are called or resumed."""
    count = 0

    def tally(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(tally)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def summary(index: int) -> str:
    return f"1. Primary request and intent:\n   The user asked for file number {index}, and it is written."


def auxiliary(recorder: Recorder, index: int) -> None:
    """A prompt of its own, with the words that all replies begin with."""
    prompt = f"{index}: answer as in {summary(index)[:45]}."
    recorder.run([SYSTEM, user(prompt)], said(summary(index)))


def changing_tools(recorder: Recorder, index: int) -> None:
    """The same conversation in other tools each time: the turns of all these frames end in one place."""

    def tools(number: int) -> tuple[Json, ...]:
        return ({"type": "function", "function": {"name": "t", "description": f"{number}"}},)

    opening = [SYSTEM, user("u")]
    recorder.run(opening, said(None, call()), tools(index))
    messages = [*opening, said(None, call()), result("r"), user("v")]
    assert recorder.plan(messages, tools(-1))[2] == "tools_changed"


def compacted(recorder: Recorder, index: int) -> None:
    """Each line begins with the summary of the one before."""
    opening = [SYSTEM, user(f"Goes on: {summary(index - 1)}" if index else "task")]
    reason = recorder.plan(opening, TOOLS)[2]
    assert reason == ("compacted" if index else "root")
    recorder.run(opening, said("a"), TOOLS)
    recorder.run([*opening, said("a"), COMPACT], said(summary(index)), TOOLS)


def ended(recorder: Recorder, index: int) -> None:
    """As `compacted`, but no rule knows the prompt, and sub-agents have nothing in common."""
    opening = [user(f"Goes on: {summary(index - 1)}" if index else "task")]
    assert recorder.run(opening, said(summary(index))).branch_reason == ("compacted" if index else "root")


def called(recorder: Recorder, index: int) -> None:
    """One line whose caller gives each turn another label. Only committed: a request brings all of it."""
    before = {"parent_id": f"t{index - 1}", "branch_reason": None} if index else {}
    label = Origin("chat", "d", "r", f"l{index}")
    recorder.tree.commit(turn(f"t{index}", messages=(user(f"u{index}"),), origin=label, **before))


def seen(recorder: Recorder) -> None:
    """What `GET /sessions/{id}` asks."""
    Session(record(), recorder.tree).summary()


SESSIONS = {f.__name__: f for f in (auxiliary, changing_tools, compacted, ended, called)}


@pytest.mark.parametrize("kind", SESSIONS)
def test_a_turn_costs_what_is_new_in_it(kind: str) -> None:
    add = SESSIONS[kind]
    recorder, counts = Recorder(), list[int]()
    for index in range(501):
        if index in (50, 500):
            counts.append(calls_in(partial(add, recorder, index)))
        else:
            add(recorder, index)
    assert 0 < counts[1] <= 1.1 * counts[0] + 20


@pytest.mark.parametrize("kind", SESSIONS)
def test_what_is_asked_of_a_session_is_linear(kind: str) -> None:
    recorder, counts = Recorder(), list[int]()
    for index in range(400):
        SESSIONS[kind](recorder, index)
        if index in (99, 399):
            counts.append(calls_in(partial(seen, recorder)))
    assert 0 < counts[1] <= 4.4 * counts[0] + 20


# -- which summaries a text holds

BLOCKS = st.lists(st.sampled_from(["a" * 7, "b" * 13, "ab" * 20, "a" * 64, "c", "cab"]), max_size=12)
TEXT = st.builds("".join, BLOCKS)


@settings(deadline=None, max_examples=300)
@given(st.lists(TEXT.filter(lambda text: len(text) >= 40), max_size=8), TEXT, st.data())
def test_the_summaries_in_a_text(texts: list[str], text: str, data: st.DataObject) -> None:
    """As one look for each of them finds."""
    summaries = Summaries()
    kept = {each: summaries.get(each) for each in texts}
    assert all(summaries.get(each) is found for each, found in kept.items())
    if texts and data.draw(st.booleans()):
        text += data.draw(st.sampled_from(texts)) + data.draw(TEXT)
    found = set(summaries.in_text(text))
    assert found == {summary for each, summary in kept.items() if each in text}


@pytest.mark.parametrize("size", [40, 41, 79, 80, 81, 119, 120, 121, 279, 280, 281, 5000])
def test_a_summary_is_found_wherever_it_stands(size: int) -> None:
    text = "".join(f"{number:05}" for number in range(size // 5 + 1))[:size]
    summaries = Summaries()
    kept = summaries.get(text)
    for before in range(45):
        assert list(summaries.in_text("x" * before + text)) == [kept]
        assert list(summaries.in_text("x" * before + text + "y" * 9)) == [kept]
        assert list(summaries.in_text("x" * before + text[:-1] + "y")) == []
        assert list(summaries.in_text("x" * before + text[1:])) == []


def test_summaries_of_one_beginning_are_told_apart_at_once() -> None:
    counts: list[int] = []
    for size in (10, 1000):
        summaries = Summaries()
        for index in range(size):
            summaries.get(summary(index))
        text = f"x {summary(7)} y {summary(size)}"
        assert list(summaries.in_text(text)) == [summaries.get(summary(7))]
        counts.append(calls_in(lambda text=text, of=summaries: list(of.in_text(text))))
    assert 0 < counts[1] <= 2 * counts[0]
