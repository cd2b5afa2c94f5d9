"""Thoughts, and stop strings: what is reasoning, what is content, where the text ends."""

import pytest
from parsekit import HERMES, A, Setting, call, calls_of, check_every_cut, cut_at_stop, parse

from tokentape.parse import CallStatus, TextDelta

REASONING = {  # text, reasoning_open → reasoning, content, closed
    "a thought": ("<think>\nHm.\n</think>\n\nYes.", False, "Hm.", "Yes.", True),
    "on one line": ("<think>Hm. </think>Yes.", False, "Hm. ", "Yes.", True),
    "space before": (" \n<think>Hm.</think> \nYes.\n", False, "Hm.", "Yes.\n", True),
    "opened by the prompt": ("Hm.\n</think>\n\nYes.", True, "Hm.", "Yes.", True),
    "opened twice": ("<think>\nHm.</think>Yes.", True, "Hm.", "Yes.", True),
    "opened twice, later": ("\n<think>Hm.</think>Yes.", True, "<think>Hm.", "Yes.", True),
    "empty": ("<think>\n\n</think>\n\nYes.", False, "", "Yes.", True),
    "closed at once": ("</think>Yes.", True, "", "Yes.", True),
    "nothing after": ("<think>Hm.</think>\n", False, "Hm.", None, True),
    "inner newlines": ("<think>\n\na\n\nb\n\n</think>c\n", False, "a\n\nb", "c\n", True),
    "cut": ("<think>\nHm.\n", False, "Hm.\n", None, False),
    "cut at once": ("<think>\n", False, "", None, False),
    "cut in the tag": ("<think>a</thi", False, "a</thi", None, False),
    "opened by the prompt and cut": ("Hm.", True, "Hm.", None, False),
    "opened by the prompt, nothing came": ("", True, "", None, False),
    "half an opening": ("<thi", False, None, "<thi", True),
    "half an opening in a thought": ("<thi", True, "<thi", None, False),
    "late": ("a<think>b</think>c", False, None, "a<think>b</think>c", True),
    "twice": ("<think>a</think>b<think>c</think>", False, "a", "b<think>c</think>", True),
    "nested": ("<think>a<think>b</think>c</think>", False, "a<think>b", "c</think>", True),
    "never opened": ("a</think>b", False, None, "a</think>b", True),
    "none": (" a\n", False, None, " a\n", True),
    "nothing": ("", False, None, "", True),
    "only space": (" \n", False, None, " \n", True),
}


@pytest.mark.parametrize("case", REASONING)
def test_reasoning(case: str) -> None:
    text, opened, reasoning, content, closed = REASONING[case]
    result = parse(text, reasoning_open=opened)
    assert (result.reasoning, result.content, result.reasoning_closed) == (reasoning, content, closed)
    assert result.status == ("ok" if closed else "reasoning_unclosed")
    for opened in (False, True):
        check_every_cut(Setting(reasoning_open=opened), text)


def test_without_reasoning_tags_a_thought_is_content() -> None:
    text = "<think>\nHm.\n</think>\n\nYes."
    assert parse(text, syntax=HERMES).content == text
    assert parse(text, syntax=HERMES).reasoning is None
    assert parse("<think>Hm.</think>" + call(), syntax=HERMES).content == "<think>Hm.</think>"


def test_a_thought_and_a_call() -> None:
    result = parse("<think>\nHm.\n</think>\n\n" + call())
    assert (result.reasoning, result.content, calls_of(result)) == ("Hm.", None, [A])
    result = parse("<think>\nHm.\n</think>\n\n" + call() + "\n\na")
    assert (result.reasoning, result.content, calls_of(result)) == ("Hm.", "a", [A])


def test_calls_in_the_thought_are_not_executed() -> None:
    talk = "With <tool_call> tags. "
    text = f"<think>{talk}{call()}{call(name='g')}<tool_call>{{</think>{call()}"
    result = parse(text)
    assert calls_of(result) == [A]
    assert result.reasoning == f"{talk}{call()}{call(name='g')}<tool_call>{{"
    assert [(x.status.value, x.name) for x in result.attempts] == [
        ("in_reasoning", "f"),
        ("in_reasoning", "g"),
        ("ok", "f"),
    ]
    assert [text[x.start : x.end] for x in result.attempts] == [
        call(),
        call(name="g"),
        call(),
    ]
    assert result.status == "in_reasoning"
    cut = parse(f"{call()} and", reasoning_open=True)
    assert (cut.reasoning, cut.tool_calls, cut.status) == (f"{call()} and", (), "reasoning_unclosed")
    assert [x.status for x in cut.attempts] == [CallStatus.IN_REASONING]


def test_the_end_of_the_thought_ends_a_call_in_it() -> None:
    text = '<think><tool_call>{"name": "f", "arguments": {"a": "</think>b"}}</tool_call>'
    result = parse(text)
    assert result.reasoning == '<tool_call>{"name": "f", "arguments": {"a": "'
    assert result.content == 'b"}}</tool_call>'
    assert [(x.status, x.end) for x in result.attempts] == [(CallStatus.IN_REASONING, text.index("</think>"))]


STOPS = {
    "in the content": ("a STOP b", ("STOP",), None, "a ", ()),
    "none": ("a STO", ("STOP",), None, "a STO", ()),
    "in the thought": ("<think>a STOP</think>b", ("STOP",), "a ", None, ()),
    "in a call": ("a" + call('{"a": "STOP"}'), ("STOP",), None, "a" + call('{"a": "')[:-16], ()),
    "in a tag": ("a" + call(), ("</tool",), None, "a" + call()[: -len("</tool_call>")], ()),
    "after a call": (call() + "STOP" + call(), ("STOP",), None, None, (A,)),
    "at the start": ("STOP", ("STOP",), None, "", ()),
    "the first of several": ("a 1 b 2", ("2", "1"), None, "a ", ()),
    "the first to be complete": ("abcd", ("abcd", "bc"), None, "a", ()),
    "the longest of those": ("abc", ("c", "bc"), None, "a", ()),
    "empty ones are none": ("a", ("",), None, "a", ()),
}


@pytest.mark.parametrize("case", STOPS)
def test_stop_strings_cut_the_text(case: str) -> None:
    text, stop, reasoning, content, calls = STOPS[case]
    for opened in (False, True):
        check_every_cut(Setting(stop=stop, reasoning_open=opened), text)
    for chunks in ([text], list(text)):
        _, result = Setting(stop=stop).run(*chunks)
        assert (result.reasoning, tuple(calls_of(result))) == (reasoning, calls)
        if case != "in a call":
            assert result.content == content
        assert result.stopped == (cut_at_stop(text, stop) != text)
        assert all(attempt.end <= len(cut_at_stop(text, stop)) for attempt in result.attempts)


def test_stop_strings_are_not_shown_while_streaming() -> None:
    parser = Setting(stop=("STOP",)).parser()
    assert parser.feed("a ST") == [TextDelta("a")]
    assert parser.feed("OR") == [TextDelta(" STOR")]
    assert parser.feed("STO") == []
    assert parser.feed("P and more") == []
    assert parser.feed("and more") == []
    assert parser.finish()[1].content == "a STOR"
