"""Which turn a request continues, why it starts a branch otherwise, and who trains what is shared."""

import json
from array import array
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded import TOOLS, Recorder, call, result, said, turn, user

from tokentape.conversation import Conversation, frame_key, keys_of, know
from tokentape.errors import InternalError
from tokentape.invariants import check_samples
from tokentape.outline import STAND_IN, Outline
from tokentape.tree import BranchReason, Tree
from tokentape.types import Json, Message, ToolCall

LOST = '{"q": "a'  # arguments that are not JSON: a model's malformed call, replayed as it is


def continues(recorded: Message, replayed: Message) -> bool:
    """Whether a recorded reply is found behind its replay."""
    recorder = Recorder()
    made = recorder.run([user("u")], recorded)
    parent, num_matched, _ = recorder.plan([user("u"), replayed, user("next")])
    assert (parent, num_matched) in ((made, 2), (None, 0))
    return parent is made


def arguments(text: str) -> Message:
    return said(None, call(arguments=text))


# -- what a difference means

HARMLESS = {
    "the same": (said("a", call(), reasoning="r"), said("a", call(), reasoning="r")),
    "None for empty": (said(None, call()), said("", call())),
    "empty for None": (said("", call()), said(None, call())),
    "space around what the assistant said": (said("\n\n a b\n"), said("a b")),
    "space instead of nothing": (said(None, call()), said("\n\n", call())),
    "reasoning dropped": (said("a", reasoning="r"), said("a")),
    "reasoning emptied": (said("a", reasoning="r"), said("a", reasoning="")),
    "space around reasoning": (said("a", reasoning="\nr\n"), said("a", reasoning="r")),
    "empty reasoning dropped": (said("a", reasoning=""), said("a")),
    "ids renumbered": (
        said(None, call(id="c1"), call("b", id="c2")),
        said(None, call(id="x"), call("b", id="y")),
    ),
    "ids dropped": (said(None, call(id="c1"), call(id="c2")), said(None, call(id=""), call(id=""))),
    "key order": (arguments('{"a": 1, "b": 2}'), arguments('{"b": 2, "a": 1}')),
    "nested key order": (
        arguments('{"a": [{"x": 1, "y": {"p": 0, "q": 1}}]}'),
        arguments('{"a": [{"y": {"q": 1, "p": 0}, "x": 1}]}'),
    ),
    "space in JSON": (arguments('{"a":[1,2]}'), arguments('{\n  "a" : [ 1, 2 ]\n}')),
    "1.0 for 1": (arguments('{"a": 1}'), arguments('{"a": 1.0}')),
    "1 for 1.0, nested": (arguments('{"a": [{"b": -3.0}]}'), arguments('{"a": [{"b": -3}]}')),
    "1e2 for 100": (arguments('{"a": 100}'), arguments('{"a": 1e2}')),
    "0.10 for 0.1": (arguments('{"a": 0.1}'), arguments('{"a": 0.10}')),
    "escapes": (arguments('{"a": "é😀/"}'), arguments('{"a": "\\u00e9\\ud83d\\ude00\\/"}')),
    "half a surrogate pair": (arguments('{"a": "\\ud800"}'), arguments('{ "a": "\\uD800"}')),
    "a number beyond float": (arguments('{"a": 1e999}'), arguments('{"a":1e999}')),
    "text that is no JSON": (arguments(LOST), arguments(LOST)),
    "JSON too deep to read": (arguments("[" * 100_000), arguments("[" * 100_000)),
}

HARMFUL = {
    "other text": (said("a b"), said("a c")),
    "space inside the text": (said("a b"), said("a  b")),
    "case": (said("a"), said("A")),
    "text removed": (said("a", call()), said(None, call())),
    "other reasoning": (said("a", reasoning="r"), said("a", reasoning="s")),
    "reasoning invented": (said("a"), said("a", reasoning="s")),
    "other tool": (said(None, call("search")), said(None, call("Search"))),
    "call removed": (said("a", call()), said("a")),
    "call added": (said(None, call()), said(None, call(), call(id="c2"))),
    "calls in another order": (said(None, call("a"), call("b")), said(None, call("b"), call("a"))),
    "other value": (arguments('{"a": 1}'), arguments('{"a": 2}')),
    "1 for true": (arguments('{"a": true}'), arguments('{"a": 1}')),
    "text for a number": (arguments('{"a": 1}'), arguments('{"a": "1"}')),
    "null for absent": (arguments('{"a": 1}'), arguments('{"a": 1, "b": null}')),
    "array order": (arguments('{"a": [1, 2]}'), arguments('{"a": [2, 1]}')),
    "space inside a JSON text": (arguments('{"a": "x y"}'), arguments('{"a": "x  y"}')),
    "repaired JSON": (arguments(LOST), arguments(LOST + '"}')),
    "space in what is no JSON": (arguments(LOST), arguments(LOST + " ")),
    "other role": (said("a"), user("a")),
}


@pytest.mark.parametrize("difference", HARMLESS)
def test_a_harmless_difference_continues_the_turn(difference: str) -> None:
    recorded, replayed = HARMLESS[difference]
    assert continues(recorded, replayed)


@pytest.mark.parametrize("difference", HARMFUL)
def test_a_difference_in_meaning_does_not(difference: str) -> None:
    recorded, replayed = HARMFUL[difference]
    assert not continues(recorded, replayed)


@pytest.mark.parametrize(
    ("recorded", "replayed", "same"),
    [
        (user("a b"), user("a b"), True),
        (user("a b"), user("a b "), False),
        (user("a b"), user("a  b"), False),
        (Message("user", None), user(""), True),
        (Message("system", "s"), Message("system", "s\n"), False),
        (Message("system", "s"), user("s"), False),
        (Message("user", "a", name="n"), Message("user", "a", name="m"), False),
        (Message("user", "a", reasoning="r"), user("a"), True),  # only assistants think
    ],
)
def test_what_others_said_is_compared_to_the_letter(recorded: Message, replayed: Message, same: bool) -> None:
    recorder = Recorder()
    made = recorder.run([recorded], said("a"))
    assert (recorder.plan([replayed, said("a"), user("next")])[0] is made) is same


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.text(max_size=4)
    | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def _reversed(value: object) -> object:
    if isinstance(value, dict):
        return {k: _reversed(value[k]) for k in reversed(value)}
    return [_reversed(v) for v in value] if isinstance(value, list) else value


@settings(deadline=None)
@given(st.dictionaries(st.text(max_size=3), JSON, max_size=3), st.sampled_from([None, 1]), st.booleans())
def test_arguments_match_however_they_are_written(value: Json, indent: int | None, ascii_only: bool) -> None:
    one = arguments(json.dumps(value))
    other = arguments(json.dumps(_reversed(value), indent=indent, ensure_ascii=ascii_only))
    assert know(one).base == know(other).base


# -- tool results

TWO = said(None, call("a", id="c1"), call("b", id="c2"))


@pytest.mark.parametrize(
    ("replayed", "num_matched"),
    [
        ([TWO, result("x", "c1"), result("y", "c2")], 5),
        ([TWO, result("y", "c1"), result("x", "c2")], 2),  # swapped texts
        ([TWO, result("x", "c2"), result("y", "c1")], 2),  # swapped ids
        ([TWO, result("x", "c1")], 2),
        ([TWO, result("x", "c1"), result("y", "c1")], 2),
        ([TWO, result("x", "c1"), result("y", "zz")], 2),
        ([said(None, call("a", id="7"), call("b", id="9")), result("x", "7"), result("y", "9")], 5),
        ([said(None, call("a", id="9"), call("b", id="7")), result("x", "9"), result("y", "7")], 5),
        ([said(None, call("a", id="c2"), call("b", id="c1")), result("x", "c1"), result("y", "c2")], 2),
        ([said(None, call("a", id=""), call("b", id="")), result("x", ""), result("y", "")], 5),
        ([said(None, call("a", id=""), call("b", id="")), result("x", None), result("y", None)], 5),
        ([said(None, call("a", id="k"), call("b", id="k")), result("x", "k"), result("y", "k")], 5),
        ([said(None, call("a", id=""), call("b", id="")), result("y", ""), result("x", "")], 2),
    ],
)
def test_a_result_belongs_to_its_call_not_to_its_id(replayed: list[Message], num_matched: int) -> None:
    recorder = Recorder()
    recorder.run([user("u")], TWO)
    recorder.run([user("u"), TWO, result("x", "c1"), result("y", "c2")], said("done"))
    assert recorder.plan([user("u"), *replayed, said("done"), user("next")])[1] == num_matched


def test_results_may_come_in_another_order_than_their_calls() -> None:
    recorder = Recorder()
    recorder.run([user("u")], TWO)
    messages = [user("u"), TWO, result("y", "c2"), result("x", "c1")]
    late = recorder.run(messages, said("done"))
    assert recorder.plan([*messages, said("done")])[:2] == (late, 5)
    assert recorder.plan([*messages[:2], messages[3], messages[2], said("done")])[1] == 2


def test_an_ordinal_is_the_call_of_the_assistant_message_before() -> None:
    known = [know(m) for m in (user("u"), TWO, result("x", "c2"), said("a"), result("y", "c2"), user("v"))]
    assert [key.ordinal for key in keys_of(known)] == [-1, -1, 1, -1, -1, -1]
    assert [key.ordinal for key in keys_of([know(result("x", "c2")), know(user("v"))], after=TWO)] == [1, -1]
    no_ids = said(None, call(id=""))
    assert [key.ordinal for key in keys_of([know(user("not a result"))], after=no_ids)] == [-1]


# -- the longest prefix


def test_a_request_is_attached_to_its_longest_recorded_prefix() -> None:
    recorder = Recorder()
    messages: list[Message] = []
    for index in range(6):
        messages.append(user(f"u{index}"))
        made = recorder.run(messages, said(f"a{index}"))
        messages.append(made.reply)
        assert made.branch_reason == (None if index else "root")
    for size in range(1, len(messages) + 1):
        parent, num_matched, _ = recorder.plan(messages[:size])
        assert num_matched == size // 2 * 2
        assert (parent.reply.content if parent else None) == (f"a{size // 2 - 1}" if size > 1 else None)


def test_without_its_reasoning_a_reply_is_the_latest_of_its_words() -> None:
    recorder = Recorder()
    first = recorder.run([user("u")], said("ok", reasoning="one"))
    second = recorder.run([user("u")], said("ok", reasoning="two"))
    assert recorder.plan([user("u"), said("ok"), user("v")])[0] is second
    assert recorder.plan([user("u"), said("ok", reasoning="one"), user("v")])[0] is first


def test_the_longest_prefix_is_found_behind_an_earlier_thought() -> None:
    """A retry gave the same words for other reasons; the agent went on from the first and drops reasoning."""
    recorder = Recorder()
    recorder.run([user("u")], said("ok", reasoning="one"))
    longer = recorder.run([user("u"), said("ok", reasoning="one"), user("v")], said("fine"))
    recorder.run([user("u")], said("ok", reasoning="two"))
    assert recorder.plan([user("u"), said("ok"), user("v"), said("fine"), user("w")])[:2] == (longer, 4)


def test_of_equal_prefixes_the_latest_turn_is_continued() -> None:
    recorder = Recorder()
    recorder.run([user("u")], said("ok", reasoning="one"))
    recorder.run([user("u")], said("ok", reasoning="two"))
    for reasoning in ("two", "one"):  # the latest is not behind the latest thought
        latest = recorder.run([user("u"), said("ok", reasoning=reasoning), user("v")], said("fine"))
        assert recorder.plan([user("u"), said("ok"), user("v"), said("fine")])[0] is latest


def test_turns_that_say_the_same_keep_their_own_children() -> None:
    recorder = Recorder()
    first = recorder.run([user("u")], said("ok"))
    child = recorder.run([user("u"), said("ok"), user("v")], said("fine"))
    again = recorder.run([user("u")], said("ok"))
    assert child.parent_id == first.turn_id
    assert recorder.plan([user("u"), said("ok"), user("v"), said("fine"), user("w")])[0] is child
    assert recorder.plan([user("u"), said("ok"), user("other")])[0] is again


def test_reasoning_replayed_here_and_dropped_there() -> None:
    recorder = Recorder()
    messages: list[Message] = []
    for index in range(4):
        messages.append(user(f"u{index}"))
        messages.append(recorder.run(messages, said("same", reasoning=f"r{index}")).reply)
    for kept in range(16):
        replay = [
            replace_reasoning(m) if m.role == "assistant" and not kept >> (i // 2) & 1 else m
            for i, m in enumerate(messages)
        ]
        assert recorder.plan([*replay, user("next")])[1] == 8


def replace_reasoning(message: Message) -> Message:
    return Message("assistant", message.content, None, message.tool_calls)


# -- frames

OTHER_TOOLS: tuple[Json, ...] = ({"type": "function", "function": {"name": "search"}},)


@pytest.mark.parametrize(
    ("tools", "arguments", "same"),
    [
        (TOOLS, {"a": 1, "b": {"x": 1, "y": 2}}, True),
        (TOOLS, {"b": {"y": 2, "x": 1}, "a": 1}, True),
        (({"function": {"parameters": {"type": "object"}, "name": "search"}, "type": "function"},),
         {"a": 1, "b": {"x": 1, "y": 2}}, True),
        (OTHER_TOOLS, {"a": 1, "b": {"x": 1, "y": 2}}, False),
        ((), {"a": 1, "b": {"x": 1, "y": 2}}, False),
        ((*TOOLS, *OTHER_TOOLS), {"a": 1, "b": {"x": 1, "y": 2}}, False),
        (TOOLS, {"a": 1, "b": {"x": 1}}, False),
        (TOOLS, {"a": 1, "b": {"x": 1, "y": 3}}, False),
        (TOOLS, {"a": True, "b": {"x": 1, "y": 2}}, False),
        (TOOLS, {}, False),
    ],
)  # fmt: skip
def test_tools_and_template_arguments_are_part_of_the_prefix(
    tools: tuple[Json, ...], arguments: Json, same: bool
) -> None:
    recorder = Recorder()
    made = recorder.run([user("u")], said("a"), TOOLS, {"a": 1, "b": {"x": 1, "y": 2}})
    assert (recorder.plan([user("u"), said("a"), user("v")], tools, arguments)[0] is made) is same


def test_tools_in_another_order_are_another_prompt() -> None:
    assert frame_key((*TOOLS, *OTHER_TOOLS), {}) != frame_key((*OTHER_TOOLS, *TOOLS), {})
    assert frame_key((), {"a": 1}) != frame_key(({"a": 1},), {})


# -- why a branch starts

U, A = user("u"), said("a")
SUMMARY = "1. The user asked for u. 2. It is done: a."
REASONS: dict[str, tuple[Sequence[Message], tuple[Json, ...], Json, str | None]] = {
    "goes on": ([U, A, user("v"), said("b"), user("w")], TOOLS, {}, None),
    "goes on with words put into its mouth": (
        [U, A, user("v"), said("b"), user("x"), said("made up"), user("w")],
        TOOLS,
        {},
        None,
    ),
    "the same first request": ([U], TOOLS, {}, BranchReason.RESAMPLED),
    "the same later request": ([U, A, user("v")], TOOLS, {}, BranchReason.RESAMPLED),
    "another way on": ([U, A, user("other")], TOOLS, {}, BranchReason.FORKED),
    "another way on, at once": ([U, A], TOOLS, {}, BranchReason.FORKED),
    "a later reply edited": (
        [U, A, user("v"), said("edited"), user("w")],
        TOOLS,
        {},
        BranchReason.EDITED_HISTORY,
    ),
    "the first reply edited": ([U, said("edited"), user("v")], TOOLS, {}, BranchReason.EDITED_HISTORY),
    "the first question edited": ([user("x"), A, user("v")], TOOLS, {}, BranchReason.EDITED_HISTORY),
    "a question that was never asked": ([user("title?")], TOOLS, {}, BranchReason.NEW_CONVERSATION),
    "that question under other tools": ([user("title?")], (), {}, BranchReason.NEW_CONVERSATION),
    "other tools": ([U, A, user("v")], OTHER_TOOLS, {}, BranchReason.TOOLS_CHANGED),
    "no tools": ([U, A, user("v"), said("b"), user("w")], (), {}, BranchReason.TOOLS_CHANGED),
    "other arguments": ([U, A, user("v")], TOOLS, {"enable_thinking": False}, BranchReason.ARGUMENTS_CHANGED),
    "both": ([U, A, user("v")], (), {"enable_thinking": False}, BranchReason.TOOLS_CHANGED),
    "a summary in the place of the history": (
        [user(f"Goes on.\n\n{SUMMARY}"), said("ok"), U],
        TOOLS,
        {},
        BranchReason.COMPACTED,
    ),
    "a summary in a request of other tools": (
        [user(SUMMARY)],
        OTHER_TOOLS,
        {},
        BranchReason.NEW_CONVERSATION,
    ),
    "a summary behind a new system prompt": (
        [Message("system", "title!"), user(SUMMARY)],
        TOOLS,
        {},
        BranchReason.NEW_CONVERSATION,
    ),
    "a summary among the results": (
        [user("x"), said(None, call()), result(SUMMARY)],
        TOOLS,
        {},
        BranchReason.EDITED_HISTORY,
    ),
    "half a summary": ([user(SUMMARY[:-1])], TOOLS, {}, BranchReason.NEW_CONVERSATION),
    "other tools, other history": ([U, said("edited")], (), {}, BranchReason.EDITED_HISTORY),
}


@pytest.mark.parametrize("case", REASONS)
def test_a_branch_says_why_it_starts(case: str) -> None:
    messages, tools, arguments, reason = REASONS[case]
    recorder = Recorder()
    assert recorder.plan(messages, tools, arguments)[2] == BranchReason.ROOT
    recorder.run([U], A, TOOLS)
    recorder.run([U, A, user("v")], said("b"), TOOLS)
    recorder.run([user("sum up")], said(f"<analysis>hm</analysis><summary>\n{SUMMARY}\n</summary>"), TOOLS)
    assert recorder.plan(messages, tools, arguments)[2] == reason
    recorder.run(messages, said("new"), tools, arguments)
    rows = recorder.rows()
    assert rows[-1]["branch_reason"] == (reason or BranchReason.ROOT)
    assert check_samples(rows) == []


def test_a_reply_that_was_gone_on_from_is_no_summary() -> None:
    recorder = Recorder()
    recorder.run([U], said(SUMMARY))
    assert recorder.plan([user(SUMMARY)])[2] == BranchReason.COMPACTED
    recorder.run([U, said(SUMMARY), user("v")], said("b"))
    assert recorder.plan([user(SUMMARY)])[2] == BranchReason.NEW_CONVERSATION


def test_every_reason_is_covered() -> None:
    elsewhere = {BranchReason.ROOT, BranchReason.CHOICE, BranchReason.LABEL_CHANGED}
    assert {reason for *_, reason in REASONS.values()} == {None, *BranchReason} - elsewhere


def test_what_changed_is_told_from_the_nearest_frame() -> None:
    """Tools changed long ago; now the arguments do."""
    recorder = Recorder()
    recorder.run([U], A, TOOLS)
    recorder.run([U, A, user("v")], said("b"), ())
    replay = [U, A, user("v"), said("b"), user("w")]
    assert recorder.plan(replay, (), {"x": 1})[2] == BranchReason.ARGUMENTS_CHANGED
    assert recorder.plan([U, A, user("v")], TOOLS, {"x": 1})[2] == BranchReason.ARGUMENTS_CHANGED


def test_a_request_resampled_without_its_reasoning() -> None:
    recorder = Recorder()
    for thought in ("one", "two"):
        recorder.run([U], said("a", reasoning=thought))
    recorder.run([U, said("a", reasoning="one"), user("v")], said("b"))
    few_shot = [user("q"), said("shot"), U]
    assert recorder.run(few_shot, said("x")).branch_reason == BranchReason.EDITED_HISTORY
    assert recorder.plan(few_shot)[2] == BranchReason.RESAMPLED


# -- commit


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"turn_id": "t1"}, "committed already"),
        ({"parent_id": "t9"}, "its parent t9 is not in this session"),
        ({"logprobs": array("f")}, "0 log-probabilities"),
    ],
)
def test_an_illegal_commit_raises_and_nothing_happens(changes: Json, words: str) -> None:
    recorder = Recorder()
    recorder.run([U], A)
    before = recorder.rows(), recorder.plan([U, A, user("v")])
    bad = turn(**{"turn_id": "t2", "parent_id": "t1", "branch_reason": None, **changes})
    with pytest.raises(InternalError, match=words):
        recorder.tree.commit(bad)
    assert (recorder.rows(), recorder.plan([U, A, user("v")])) == before
    assert len(recorder.tree) == 1


def test_text_that_cannot_be_encoded_leaves_the_tree_as_it_was() -> None:
    recorder = Recorder()
    recorder.run([U], A)
    bad = turn("t2", parent_id="t1", reply=said(None, call("\ud800")))
    with pytest.raises(UnicodeEncodeError):
        recorder.tree.commit(bad)
    assert recorder.plan([U, A, user("v")])[2] is None  # t1 has no child
    assert [row["sample_id"] for row in recorder.rows()] == ["t1"]


# -- who trains


def shape(recorder: Recorder) -> dict[str, list[str]]:
    """What each sample trains."""
    return {row["sample_id"]: [t["turn_id"] for t in row["turns"] if t["trained"]] for row in recorder.rows()}


def test_the_longest_branch_trains_what_is_shared() -> None:
    recorder = Recorder()
    recorder.run([U], A)  # t1
    recorder.run([U, A, user("short")], said("b"))  # t2
    recorder.run([U, A, user("long")], said("c"))  # t3
    assert shape(recorder) == {"t2": ["t1", "t2"], "t3": ["t3"]}  # the earliest of equals
    recorder.run([U, A, user("long"), said("c"), user("longer")], said("d"))  # t4
    assert shape(recorder) == {"t2": ["t2"], "t4": ["t1", "t3", "t4"]}
    recorder.run([user("other")], said("e"))  # t5
    assert shape(recorder) == {"t2": ["t2"], "t4": ["t1", "t3", "t4"], "t5": ["t5"]}
    assert check_samples(recorder.rows()) == []


def test_a_fork_inside_a_fork() -> None:
    recorder = Recorder()
    chain: list[Message] = []
    for index in range(4):
        chain += [user(f"u{index}"), said(f"a{index}")]
        recorder.run(chain[:-1], chain[-1])
    for depth in (3, 2, 1):
        recorder.run([*chain[: 2 * depth], user("fork")], said("f"))
        recorder.run([*chain[: 2 * depth], user("fork"), said("f"), user("on")], said("g"))
    rows = recorder.rows()
    assert [[t["turn_id"] for t in row["turns"]] for row in rows] == [
        ["t1", "t2", "t3", "t4"],
        ["t1", "t2", "t3", "t5", "t6"],
        ["t1", "t2", "t7", "t8"],
        ["t1", "t9", "t10"],
    ]
    assert shape(recorder) == {
        "t4": ["t4"],
        "t6": ["t1", "t2", "t3", "t5", "t6"],
        "t8": ["t7", "t8"],
        "t10": ["t9", "t10"],
    }
    assert check_samples(rows) == []


def test_turns_without_a_token_are_turns() -> None:
    recorder = Recorder()
    recorder.run([U], said(""), completion=[])
    recorder.run([U, said(""), user("v")], said("b"))
    recorder.run([U, said(""), user("w")], said(""), completion=[])
    assert check_samples(recorder.rows()) == []
    assert [row["loss_mask"] for row in recorder.rows()] == [[0, 0, 0, 0, 0, 0, 1, 1], [0] * 6]


def test_an_empty_tree() -> None:
    tree = Tree(())
    assert (len(tree), tree.branches(), tree.tapes(), list(tree.turns())) == (0, [], [], [])
    assert tree.attach(frame_key((), {}), Conversation()).turn is None


def test_a_turn_holds_what_it_added() -> None:
    recorder = Recorder()
    messages: list[Message] = []
    for index in range(50):
        messages.append(user(f"u{index}"))
        messages.append(recorder.run(messages, said(f"a{index}")).reply)
    turns = list(recorder.tree.turns())
    assert {len(t.prompt) + len(t.completion) for t in turns} == {5}
    assert {len(t.messages) for t in turns} == {1}
    [tape] = recorder.tree.tapes()
    assert len(tape) == 250


# -- outlines: what a branch's beginning looks like to a template

TALK = st.lists(
    st.builds(
        Message,
        role=st.sampled_from(["system", "user", "assistant", "tool"]),
        content=st.sampled_from([None, "", "x", "long " * 30, "has <think> in it"]),
        reasoning=st.sampled_from([None, "", "r"]),
        tool_calls=st.sampled_from([(), (ToolCall("c1", "f", "{}"),)]),
    ),
    max_size=40,
)


@settings(deadline=None)
@given(TALK, st.integers(0, 40))
def test_an_outline_keeps_every_transition_and_no_length(talk: list[Message], cut: int) -> None:
    # A result's kind hangs on the turn before it, which is never cut off from it.
    kinds = [Outline().followed_by(talk[: n + 1], ("<think>",)).kinds[-1] for n in range(len(talk))]
    outline = Outline().followed_by(talk, ("<think>",))
    assert set(pairwise(outline.kinds)) == set(pairwise(kinds))
    assert len(outline.messages) == len(outline.kinds)
    assert outline.kinds[:1] == tuple(kinds[:1])
    assert outline.kinds[-1:] == tuple(kinds[-1:])
    assert Outline().followed_by(talk[:cut], ("<think>",)).followed_by(talk[cut:], ("<think>",)) == outline
    many = Outline().followed_by(talk * 5, ("<think>",))
    assert len(many.messages) == len(Outline().followed_by(talk * 9, ("<think>",)).messages)


def test_the_reply_of_a_turn_is_not_in_its_outline() -> None:
    recorder = Recorder()
    recorder.run([U], said("a", reasoning="r"))
    recorder.run([U, A, result("x", None)], said("b"))
    found = recorder.tree.attach(
        frame_key((), {}), Conversation.of([know(m) for m in (U, A, result("x", None), said("b"))])
    )
    assert [m.role for m in found.before.messages] == ["user", "assistant", "tool"]
    assert found.before.messages[1].reasoning == STAND_IN  # what was recorded, not what was replayed


def test_a_checker_that_cannot_fail_proves_nothing() -> None:
    """The control: a tree that trains a shared turn in both branches is reported."""

    class TrainsTwice(Tree):
        def tapes(self) -> list[object]:  # pyright: ignore[reportIncompatibleMethodOverride]
            return [
                replace(tape, turns=tuple(replace(s, trained=True) for s in tape.turns))
                for tape in super().tapes()
            ]

    recorder = Recorder(TrainsTwice(()))
    recorder.run([U], A)
    recorder.run([U, A, user("v")], said("b"))
    assert check_samples(recorder.rows()) == []
    recorder.run([U, A, user("w")], said("c"))
    assert any("trained 2 times" in problem for problem in check_samples(recorder.rows()))


def test_a_child_has_its_parents_frame() -> None:
    tree = Tree(())
    tree.commit(turn("a"))
    tree.commit(turn("b", parent_id="a", branch_reason=None))  # the negative control
    with pytest.raises(InternalError, match="parent's"):
        tree.commit(turn("c", parent_id="a", branch_reason="forked", tools=({"type": "function"},)))


def test_a_root_has_a_reason() -> None:
    with pytest.raises(InternalError, match="without a reason"):
        Tree(()).commit(turn("a", branch_reason=None))


def test_of_equal_replies_the_one_whose_calls_are_named_goes_on() -> None:
    """Choices of one request may say the same in other tokens: the ids tell which of them the agent took."""
    recorder = Recorder()
    first = recorder.run([user("u")], said(None, call(id="c1")))
    second = recorder.run([user("u")], said(None, call(id="c2")))
    for named, taken in (("c1", first), ("c2", second), ("x", second)):
        history = [user("u"), said(None, call(id=named)), result("r", named)]
        assert recorder.plan(history)[:2] == (taken, 2)


def test_of_equal_replies_the_named_one_goes_on() -> None:
    recorder = Recorder()
    first = recorder.run([user("u")], said("a"))
    second = recorder.run([user("u")], said("a"))
    for named, taken in ((first.turn_id, first), (second.turn_id, second), (None, second), ("x", second)):
        history = [know(user("u")), replace(know(said("a")), turn_id=named), know(user("v"))]
        attached = recorder.tree.attach(frame_key((), {}), Conversation.of(history))
        assert attached.turn is taken
