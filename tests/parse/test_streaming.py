"""What a parser says does not depend on how the text was cut, comes early, and leaves nothing out."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parsekit import (
    HERMES,
    PLAIN,
    QWEN,
    SPACE,
    SURROGATE,
    THINK,
    A,
    Setting,
    call,
    calls_of,
    check_accounts,
    check_chunks_agree,
    cut_at_stop,
    parse,
)

from tokentape.errors import InternalError
from tokentape.parse import (
    ArgumentsDelta,
    CallDelta,
    CallStatus,
    ParseEvent,
    ParseResult,
    PieceKind,
    ReasoningDelta,
    TextDelta,
)


def test_events_come_as_soon_as_they_are_certain() -> None:
    parser = Setting().parser()
    steps: list[tuple[str, list[ParseEvent]]] = [
        ("<thi", []),
        ("nk>\n", []),
        ("Hm", [ReasoningDelta("Hm")]),
        (".\n", [ReasoningDelta(".")]),
        ("</think>\n\n", []),
        ("Yes. ", [TextDelta("Yes.")]),
        ("a <too", [TextDelta(" a")]),
        ("thing", [TextDelta(" <toothing")]),
        (call()[:39], []),
        (call()[39:44], [ArgumentsDelta(0, "f", '{"a":')]),
        (call()[44:-1], [ArgumentsDelta(0, "f", " 1}")]),
    ]
    for text, events in steps:
        assert parser.feed(text) == events
    (delta,) = parser.feed(">")
    assert isinstance(delta, CallDelta)
    assert (delta.index, delta.call.id, delta.call.name) == (0, "call_0", "f")
    assert parser.feed("\n") == []
    assert parser.feed("<tool_call>no</tool_call> ") == [TextDelta("\n<tool_call>no</tool_call>")]
    arguments, second, text = parser.feed(call() + "b")
    assert arguments == ArgumentsDelta(1, "f", A[1])
    assert isinstance(second, CallDelta)
    assert (second.index, text) == (1, TextDelta(" b"))
    events, result = parser.finish()
    assert events == []
    assert result.tool_calls == (delta.call, second.call)
    assert result.tool_calls[0] is delta.call
    with pytest.raises(InternalError):
        parser.feed("")
    with pytest.raises(InternalError):
        parser.finish()


def test_hopeless_calls_are_shown_at_their_closing_tag() -> None:
    parser = Setting().parser()
    assert parser.feed('<tool_call>{"a": \'</tool_call>') == [TextDelta('<tool_call>{"a": \'</tool_call>')]
    assert parser.feed('<tool_call>{"a": "</tool_call>') == []
    (text,) = parser.feed("\n")  # no string goes on behind a newline: now it is certain
    assert text == TextDelta('<tool_call>{"a": "</tool_call>')


FRAGMENTS = [
    *("<tool_call>", "</tool_call>", "<think>", "</think>", "<tool_", "call>", "</tool_call", "</thi", "<"),
    *('{"name": "f", "arguments": {', '{"name": "g"', '"arguments": "x"', '"a": "', '"', "\\", '\\"', "}}"),
    *("{", "}", "[", "]", ":", ",", "'", " ", "\n", "\n\n", "\t", "a", "é", SURROGATE, "\x00", "1", "null"),
    *(call(), call("[]"), call(name="g"), '"}}\n</tool_call>', '<tool_call>{"', "STOP", "ST", "OP"),
]
texts = st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=5)), max_size=25).map("".join)
chunkings = st.lists(st.integers(1, 12), min_size=1, max_size=12)
anything = st.builds(
    Setting,
    syntax=st.sampled_from([QWEN, QWEN, HERMES, THINK, PLAIN]),
    parse_tools=st.sampled_from([True, True, True, False]),
    reasoning_open=st.sampled_from([False, False, True]),
    stop=st.sampled_from([(), (), ("STOP",), ("STO", "TOP"), ("</tool_call>",), ("\n\n", "f")]),
)


@settings(max_examples=600, deadline=None)
@given(setting=anything, text=texts, sizes=chunkings)
def test_every_chunking_equals_the_whole(setting: Setting, text: str, sizes: list[int]) -> None:
    check_chunks_agree(setting, text, sizes)


def check_accounts_for(
    text: str, result: ParseResult, *, reasoning_open: bool = False, stop: tuple[str, ...] = ()
) -> None:
    """Every character of `text` is in content, reasoning or a delivered call, or is a tag or space."""
    text = cut_at_stop(text, stop)
    behind = 0  # where the content begins
    if result.reasoning is not None:
        opening = 0 if reasoning_open else len(text) - len(text.lstrip(SPACE))
        if text.startswith("<think>", opening):
            opening += len("<think>")
        else:
            assert reasoning_open
        end = text.find("</think>", opening)
        assert (end >= 0) == result.reasoning_closed
        if end >= 0:
            assert text[opening:end].strip("\n") == result.reasoning
            behind = end + len("</think>")
        else:
            assert text[opening:].lstrip("\n") == result.reasoning
            behind = len(text)
    delivered = [x for x in result.attempts if x.status in (CallStatus.OK, CallStatus.UNKNOWN_TOOL)]
    assert [(x.name, x.arguments) for x in delivered] == calls_of(result)
    kept, at = list[str](), behind
    for x in delivered:
        assert x.start >= at
        raw = text[x.start : x.end]
        body = json.loads(raw.removeprefix("<tool_call>").removesuffix("</tool_call>"))
        assert body["name"] == x.name
        assert (x.arguments or "") in raw or x.arguments == "{}"
        kept.append(text[at : x.start])
        at = x.end
    kept.append(text[at:])
    expected = "".join(kept)
    if result.reasoning is not None or (delivered and not kept[0].strip(SPACE)):
        expected = expected.lstrip(SPACE)
    if delivered:
        expected = expected.rstrip(SPACE)
    assert (result.content or "") == expected
    assert (result.content is None) == (not expected and bool(delivered or result.reasoning is not None))
    for x in result.attempts:
        raw = text[x.start : x.end]
        assert raw.startswith("<tool_call>")
        if x not in delivered:
            assert x.error
            where = result.reasoning if x.status is CallStatus.IN_REASONING else result.content
            assert raw.strip(SPACE) in (where or "")
    spans = [(x.start, x.end) for x in result.attempts]
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))


@settings(max_examples=600, deadline=None)
@given(setting=anything, text=texts)
def test_nothing_is_lost(setting: Setting, text: str) -> None:
    _, result = setting.run(text)
    check_accounts(setting, text, result)
    check_accounts_for(text, result, reasoning_open=setting.reasoning_open, stop=setting.stop)


WRONG: dict[str, Callable[[ParseResult], ParseResult]] = {
    "content": lambda r: replace(r, content=(r.content or "")[:-1]),
    "content without the broken call": lambda r: replace(
        r, content=(r.content or "").replace("<tool_call>no</tool_call>", "")
    ),
    "no content": lambda r: replace(r, content=None),
    "reasoning": lambda r: replace(r, reasoning="Hm"),
    "no reasoning": lambda r: replace(r, reasoning=None),
    "reasoning not closed": lambda r: replace(r, reasoning_closed=False),
    "no calls": lambda r: replace(r, tool_calls=()),
    "an attempt too few": lambda r: replace(r, attempts=r.attempts[1:]),
    "a short span": lambda r: with_attempt(r, 0, end=r.attempts[0].end - 1),
    "other arguments": lambda r: with_attempt(r, 0, arguments='{"a": 2}'),
    "spans that overlap": lambda r: with_attempt(r, 1, start=r.attempts[0].end - 1),
}


def with_attempt(result: ParseResult, index: int, **changes: Any) -> ParseResult:
    attempts = list(result.attempts)
    attempts[index] = replace(attempts[index], **changes)
    return replace(result, attempts=tuple(attempts))


@pytest.mark.parametrize("case", WRONG)
def test_the_checks_can_fail(case: str) -> None:
    text = "<think>\nHm.\n</think>\n\na\n" + call() + "<tool_call>no</tool_call>b"
    result = parse(text)
    check_accounts_for(text, result)
    check_accounts(Setting(), text, result)
    wrong = WRONG[case](result)
    with pytest.raises((AssertionError, json.JSONDecodeError)):
        check_accounts_for(text, wrong)
    with pytest.raises((AssertionError, json.JSONDecodeError)):
        check_accounts(Setting(), text, wrong)


def test_the_check_of_pieces_can_fail() -> None:
    text = "<think>Hm.</think>a" + call()
    result = parse(text)
    for index, piece in enumerate(result.pieces):
        for other in (
            replace(piece, text=piece.text[:-1]),
            *(replace(piece, kind=kind) for kind in PieceKind),
        ):
            if other == piece:
                continue
            pieces = (*result.pieces[:index], other, *result.pieces[index + 1 :])
            with pytest.raises((AssertionError, json.JSONDecodeError)):
                check_accounts(Setting(), text, replace(result, pieces=pieces))


def test_the_chunk_check_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    check_chunks_agree(Setting(), "a" + call(), [3])
    monkeypatch.setattr("tokentape.parse.source.Marks.num_partial", lambda *_: 0)
    with pytest.raises(AssertionError):
        check_chunks_agree(Setting(), "a" + call(), [3])
