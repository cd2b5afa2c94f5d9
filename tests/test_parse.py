"""parse and grammars: what a completion says, whatever its chunks; nothing lost; linear work."""

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokentape.errors import InternalError
from tokentape.grammars import MAX_DEPTH, JsonCallScanner
from tokentape.parse import (
    CallDelta,
    CallStatus,
    JsonCalls,
    ParseEvent,
    Parser,
    ParseResult,
    ReasoningDelta,
    Syntax,
    TextDelta,
    ThinkTags,
)

QWEN = Syntax(JsonCalls(), ThinkTags())
HERMES = Syntax(JsonCalls())
THINK = Syntax(None, ThinkTags())
PLAIN = Syntax()
TOOLS = {"f": {"type": "function"}, "ping": {}}
SPACE = " \t\r\n"
SURROGATE = "\ud800"


@dataclass(frozen=True)
class Setting:
    """Everything a parser is told but the text."""

    syntax: Syntax = QWEN
    parse_tools: bool = True
    reasoning_open: bool = False
    stop: tuple[str, ...] = ()

    def parser(self) -> Parser:
        return Parser(
            self.syntax,
            tools=TOOLS,
            parse_tools=self.parse_tools,
            reasoning_open=self.reasoning_open,
            stop=self.stop,
            new_call_id=map("call_{}".format, itertools.count()).__next__,
        )

    def run(self, *chunks: str) -> tuple[list[ParseEvent], ParseResult]:
        parser = self.parser()
        events = [event for chunk in chunks for event in parser.feed(chunk)]
        last, result = parser.finish()
        return events + last, result


def parse(text: str, **setting: Any) -> ParseResult:
    return Setting(**setting).run(text)[1]


def call(arguments: str = '{"a": 1}', name: str = "f") -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def calls_of(result: ParseResult) -> list[tuple[str, str]]:
    return [(call.name, call.arguments) for call in result.tool_calls]


A = ("f", '{"a": 1}')


# What is delivered -----------------------------------------------------------------------------------

DELIVERED = {
    "one call": (call(), None, [A]),
    "no space": ('<tool_call>{"name":"f","arguments":{"a": 1}}</tool_call>', None, [A]),
    "much space": ('\n <tool_call>\r\n\t {"name":"f","arguments": {"a": 1} }\n\n</tool_call> \n', None, [A]),
    "two calls": (call() + "\n" + call("{}"), None, [A, ("f", "{}")]),
    "text before": ("Sure.\n\n" + call(), "Sure.", [A]),
    "text after": (call() + "\n\nDone. ", "Done.", [A]),
    "text between": (call() + "\nand\n" + call(), "and", [A, A]),
    "text around": ("a\n" + call() + "\nb" + call() + "c", "a\n\nbc", [A, A]),
    "space before shown text": ("\n\na " + call(), "\n\na", [A]),
    "arguments as sampled": (call('{ "b":2,\n"a" : 1.50 }'), None, [("f", '{ "b":2,\n"a" : 1.50 }')]),
    "arguments first": (
        '<tool_call>{"arguments": {"a": 1}, "id": [1, "x"], "name": "f"}</tool_call>',
        None,
        [A],
    ),
    "parameters": ('<tool_call>{"name": "f", "parameters": {"a": 1}}</tool_call>', None, [A]),
    "both": ('<tool_call>{"parameters": {}, "name": "f", "arguments": {"a": 1}}</tool_call>', None, [A]),
    "no arguments": ('<tool_call>{"name": "ping"}</tool_call>', None, [("ping", "{}")]),
    "the last of a repeated key": (
        '<tool_call>{"name": "ping", "name": "f", "arguments": {}, "arguments": {"a": 1}}</tool_call>',
        None,
        [A],
    ),
    "closing tag in a string": (call('{"a": "x</tool_call>\\"</tool_call>"}') + "b", "b", None),
    "opening tag in a string": (call('{"a": "<tool_call>{}"}'), None, None),
    "brackets and escapes in strings": (call(r'{"}]": "\\\"}{[\\"}'), None, None),
    "unicode": ("Ищу… " + call('{"a": "👩‍👩‍👧 ½ \\u00e9 \\ud83d\\ude00"}'), "Ищу…", None),
    "escaped name": ('<tool_call>{"name": "\\u0066", "arguments": {"a": 1}}</tool_call>', None, [A]),
    "closer without opener": ("</tool_call>a" + call(), "</tool_call>a", [A]),
    "a call after a broken one": ("<tool_call>no</tool_call> " + call(), "<tool_call>no</tool_call>", [A]),
    "a call after an unclosed quote": (
        '<tool_call>{"name": "f", "arguments": {"a": "x}}</tool_call>' + call(),
        '<tool_call>{"name": "f", "arguments": {"a": "x}}</tool_call>',
        [A],
    ),
    "an opening that leads to nothing": ("a <tool_cal <tool_call" + call(), "a <tool_cal <tool_call", [A]),
}


@pytest.mark.parametrize("case", DELIVERED)
def test_delivered_calls(case: str) -> None:
    text, content, calls = DELIVERED[case]
    result = parse(text)
    assert result.content == content
    if calls is None:
        calls = [("f", text[text.index('"arguments": ') + 13 : text.rindex("}\n</tool_call>")])]
        json.loads(calls[0][1])
    assert calls_of(result) == calls
    ok = [attempt for attempt in result.attempts if attempt.status is CallStatus.OK]
    assert len(ok) == len(calls)
    for attempt in ok:
        assert text[attempt.start : attempt.end].startswith("<tool_call>")
        assert text[attempt.start : attempt.end].endswith("</tool_call>")
        assert attempt.error is None
    check_accounts_for(text, result)


def test_an_unknown_tool_is_delivered_and_typed() -> None:
    result = parse("a" + call(name="g"))
    assert calls_of(result) == [("g", '{"a": 1}')]
    assert (result.content, result.status) == ("a", "unknown_tool")
    assert "'g'" in (result.attempts[0].error or "")


# What stays text -------------------------------------------------------------------------------------

BODIES: dict[str, tuple[str, CallStatus, str | None, str | None]] = {
    "not JSON": ("not json", CallStatus.INVALID_JSON, None, None),
    "nothing": ("", CallStatus.INVALID_JSON, None, None),
    "a list": ('[{"name": "f", "arguments": {}}]', CallStatus.INVALID_JSON, None, None),
    "single quotes": ("{'name': 'f', 'arguments': {}}", CallStatus.INVALID_JSON, None, None),
    "Python's None": ('{"name": "f", "arguments": {"a": None}}', CallStatus.INVALID_JSON, "f", None),
    "NaN": ('{"name": "f", "arguments": {"a": NaN}}', CallStatus.INVALID_JSON, "f", None),
    "a comma too many": ('{"name": "f", "arguments": {"a": 1,}}', CallStatus.INVALID_JSON, "f", None),
    "a bracket too few": ('{"name": "f", "arguments": {"a": 1}', CallStatus.INVALID_JSON, "f", None),
    "a bracket too many": (
        '{"name": "f", "arguments": {"a": 1}}}',
        CallStatus.INVALID_JSON,
        "f",
        '{"a": 1}',
    ),
    "wrong brackets": ('{"name": "f", "arguments": {"a": [1}]}', CallStatus.INVALID_JSON, "f", None),
    "raw newline in a string": (
        '{"name": "f", "arguments": {"a": "x\ny"}}',
        CallStatus.INVALID_JSON,
        "f",
        None,
    ),
    "unclosed string": ('{"name": "f", "arguments": {"a": "x}}', CallStatus.INVALID_JSON, "f", None),
    "bad escape": (r'{"name": "f", "arguments": {"a": "\x"}}', CallStatus.INVALID_JSON, "f", None),
    "lone surrogate": (r'{"name": "f", "arguments": {"a": "\ud800"}}', CallStatus.INVALID_JSON, "f", None),
    "lone surrogate in the name": (r'{"name": "\ud800"}', CallStatus.INVALID_JSON, None, None),
    "junk after": ('{"name": "f", "arguments": {}} x', CallStatus.INVALID_JSON, "f", "{}"),
    "junk after a closing tag in a string": (
        '{"name": "f", "arguments": {"a": "</tool_call>"}} x',
        CallStatus.INVALID_JSON,
        "f",
        '{"a": "</tool_call>"}',
    ),
    "half a closing tag": ('{"name": "f"}</tool', CallStatus.INVALID_JSON, "f", "{}"),
    "a space in the closing tag": ('{"name": "f"}</tool _call>', CallStatus.INVALID_JSON, "f", "{}"),
    "space before broken JSON": ('\n {"name": "f", "arguments": {1}}', CallStatus.INVALID_JSON, "f", None),
    "two objects": ('{"name": "f"}\n{"name": "f"}', CallStatus.INVALID_JSON, "f", "{}"),
    "nested tag": ('<tool_call>{"name": "f"}', CallStatus.INVALID_JSON, None, None),
    "name cut": ('{"name": "f', CallStatus.INVALID_JSON, None, None),
    "no name": ('{"arguments": {"a": 1}}', CallStatus.NO_NAME, None, '{"a": 1}'),
    "empty name": ('{"name": "", "arguments": {}}', CallStatus.NO_NAME, None, "{}"),
    "name is no string": ('{"name": 1, "arguments": {}}', CallStatus.NO_NAME, None, "{}"),
    "arguments null": ('{"name": "f", "arguments": null}', CallStatus.BAD_ARGUMENTS, "f", None),
    "arguments list": ('{"name": "f", "arguments": [1]}', CallStatus.BAD_ARGUMENTS, "f", None),
    "arguments number": ('{"name": "f", "arguments": -1}', CallStatus.BAD_ARGUMENTS, "f", None),
    "arguments boolean": ('{"name": "g", "arguments": true}', CallStatus.BAD_ARGUMENTS, "g", None),
    "arguments encoded twice": (
        '{"name": "f", "arguments": "{\\"a\\": 1}"}',
        CallStatus.BAD_ARGUMENTS,
        "f",
        None,
    ),
}


@pytest.mark.parametrize("case", BODIES)
def test_a_call_that_is_not_delivered_stays_in_the_content(case: str) -> None:
    body, status, name, arguments = BODIES[case]
    raw = f"<tool_call>{body}</tool_call>"
    result = parse(f" a {raw} b ")
    assert result.content == f" a {raw} b "
    assert result.tool_calls == ()
    assert result.status == status
    (attempt,) = result.attempts
    assert (attempt.start, attempt.end) == (3, 3 + len(raw))
    assert (attempt.status, attempt.name, attempt.arguments) == (status, name, arguments)
    assert attempt.error
    assert parse(raw + call()).content == raw
    assert calls_of(parse(raw + call())) == [A]


@pytest.mark.parametrize("end", range(1, len(call(name="f"))))
def test_a_cut_call_is_unclosed(end: int) -> None:
    text = "a\n" + call()[:end]
    result = parse(text)
    assert (result.content, result.tool_calls) == (text, ())
    if end < len("<tool_call>"):
        assert result.attempts == ()
        assert result.status == "ok"
    else:
        assert [(x.status, x.start, x.end) for x in result.attempts] == [(CallStatus.UNCLOSED, 2, len(text))]
        assert result.status == "unclosed"
        assert result.attempts[0].name == ("f" if '"f"' in text else None)
        assert result.attempts[0].arguments == (A[1] if "}}" in text else None)


def test_broken_json_that_never_closes_is_broken() -> None:
    text = "<tool_call>I would rather not. <tool_call> twice"
    result = parse(text)
    assert (result.content, result.status) == (text, "invalid_json")
    assert [(x.start, x.end) for x in result.attempts] == [(0, len(text))]


def test_the_status_is_the_first_that_is_not_ok() -> None:
    assert parse(call() + "<tool_call>x</tool_call>" + call(name="g")).status == "invalid_json"
    assert parse(call() + call(name="g") + "<tool_call>x</tool_call>").status == "unknown_tool"
    assert parse(call() + call()).status == "ok"


@pytest.mark.parametrize(("depth", "status"), [(MAX_DEPTH - 2, "ok"), (MAX_DEPTH - 1, "invalid_json")])
def test_nesting_is_limited(depth: int, status: str) -> None:
    assert parse(call('{"a": ' + "[" * (depth) + "]" * (depth) + "}")).status == status


@pytest.mark.parametrize("bracket", ["[", '{"a":'])
def test_endless_nesting_does_not_recurse(bracket: str) -> None:
    text = call('{"a": ' + bracket * 10_000 + "}")
    assert parse(text).status == "invalid_json"
    assert parse(text[:-20]).content == text[:-20]


@pytest.mark.parametrize("odd", [SURROGATE, "\x00", "\ufffd", "\u2028", "\x85", "\xa0", "\x1c", "\ufeff"])
def test_odd_characters_pass(odd: str) -> None:
    assert parse(odd).content == odd
    assert parse(f"{odd}<tool_call>{odd}").content == f"{odd}<tool_call>{odd}"
    result = parse(f"<think>{odd}</think>{odd}" + call() + odd)
    assert (result.reasoning, result.content, calls_of(result)) == (odd, odd + odd, [A])
    in_call = parse(call(f'{{"a": "{odd}"}}'))
    assert in_call.status == ("invalid_json" if odd < " " else "ok")
    named = parse(call("{}", name=odd))
    assert named.status == ("invalid_json" if odd < " " or odd == SURROGATE else "unknown_tool")


def test_without_tools_a_call_is_content() -> None:
    text = "a" + call() + "<tool_call> is how" + call(name="g")
    result = parse(text, parse_tools=False)
    assert (result.content, result.tool_calls, result.status) == (text, (), "not_offered")
    spans = [(x.status, x.name, text[x.start : x.end]) for x in result.attempts]
    assert spans == [("not_offered", "f", call()), ("not_offered", "g", call(name="g"))]
    for syntax in (THINK, PLAIN):
        assert parse(text, syntax=syntax).content == text
        assert parse(text, syntax=syntax).attempts == ()


# Reasoning -------------------------------------------------------------------------------------------

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
    check_accounts_for(text, result, reasoning_open=opened)


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
        ("in_reasoning", None),
        ("ok", "f"),
    ]
    assert [text[x.start : x.end] for x in result.attempts] == [
        call(),
        call(name="g"),
        "<tool_call>{",
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


# Stop strings ----------------------------------------------------------------------------------------

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


# Streaming -------------------------------------------------------------------------------------------


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
        (call()[:-1], []),
    ]
    for text, events in steps:
        assert parser.feed(text) == events
    (delta,) = parser.feed(">")
    assert isinstance(delta, CallDelta)
    assert (delta.index, delta.call.id, delta.call.name) == (0, "call_0", "f")
    assert parser.feed("\n") == []
    assert parser.feed("<tool_call>no</tool_call> ") == [TextDelta("\n<tool_call>no</tool_call>")]
    second, text = parser.feed(call() + "b")
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


def pieces(text: str, sizes: Sequence[int]) -> Iterable[str]:
    at = 0
    for size in itertools.cycle(sizes):
        if at >= len(text):
            return
        yield text[at : at + size]
        at += size


def merged(events: Iterable[ParseEvent]) -> list[tuple[str, str]]:
    """Events with deltas of one kind that follow each other joined."""
    runs: list[tuple[str, str]] = []
    for event in events:
        kind, text = type(event).__name__, "" if isinstance(event, CallDelta) else event.text
        if isinstance(event, CallDelta):
            runs.append((kind, f"{event.index} {event.call}"))
        elif runs and runs[-1][0] == kind:
            runs[-1] = (kind, runs[-1][1] + text)
        else:
            runs.append((kind, text))
    return runs


def check_chunks_agree(setting: Setting, text: str, sizes: Sequence[int]) -> None:
    events, whole = setting.run(text)
    for chunks in (list(text), list(pieces(text, sizes))):
        chunked, result = setting.run(*chunks)
        assert result == whole
        assert merged(chunked) == merged(events)
        shown = "".join(event.text for event in chunked if isinstance(event, TextDelta))
        assert shown == (result.content or "")
        thought = "".join(event.text for event in chunked if isinstance(event, ReasoningDelta))
        assert thought == (result.reasoning or "")
        assert all(event.text for event in chunked if not isinstance(event, CallDelta))
        calls = [event for event in chunked if isinstance(event, CallDelta)]
        assert [event.index for event in calls] == list(range(len(calls)))
        assert tuple(event.call for event in calls) == result.tool_calls


@settings(max_examples=600, deadline=None)
@given(setting=anything, text=texts, sizes=chunkings)
def test_every_chunking_equals_the_whole(setting: Setting, text: str, sizes: list[int]) -> None:
    check_chunks_agree(setting, text, sizes)


@pytest.mark.parametrize("case", [*DELIVERED, *BODIES, *REASONING, *STOPS])
def test_every_cut_in_two_equals_the_whole(case: str) -> None:
    stop: tuple[str, ...] = ()
    if case in BODIES:
        text = f"a <tool_call>{BODIES[case][0]}</tool_call> b" + call()
    elif case in STOPS:
        text, stop = STOPS[case][:2]
    else:
        text = {**DELIVERED, **REASONING}[case][0]
    for opened in (False, True):
        setting = Setting(reasoning_open=opened, stop=stop)
        events, whole = setting.run(text)
        for cut in range(len(text) + 1):
            chunked, result = setting.run(text[:cut], "", text[cut:])
            assert result == whole
            assert merged(chunked) == merged(events)


# Nothing is lost -------------------------------------------------------------------------------------


def cut_at_stop(text: str, stops: tuple[str, ...]) -> str:
    """`text` up to the stop string that a reader of one character after another would see first."""
    for end in range(len(text) + 1):
        seen = [len(stop) for stop in stops if stop and text[:end].endswith(stop)]
        if seen:
            return text[: end - max(seen)]
    return text


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
    check_accounts_for(text, result, reasoning_open=setting.reasoning_open, stop=setting.stop)


def test_the_check_can_fail() -> None:
    text = "<think>\nHm.\n</think>\n\na\n" + call() + "<tool_call>no</tool_call>b"
    result = parse(text)
    check_accounts_for(text, result)
    assert result.content is not None
    first = result.attempts[0]
    for wrong in (
        replace(result, content=result.content[:-1]),
        replace(result, content=result.content.replace("<tool_call>no</tool_call>", "")),
        replace(result, content=None),
        replace(result, reasoning="Hm"),
        replace(result, reasoning=None),
        replace(result, reasoning_closed=False),
        replace(result, tool_calls=()),
        replace(result, attempts=result.attempts[1:]),
        replace(result, attempts=(replace(first, end=first.end - 1), *result.attempts[1:])),
        replace(result, attempts=(replace(first, arguments='{"a": 2}'), *result.attempts[1:])),
        replace(result, attempts=(first, replace(result.attempts[1], start=first.end + 1))),
    ):
        with pytest.raises((AssertionError, json.JSONDecodeError)):
            check_accounts_for(text, wrong)


def test_the_chunk_check_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokentape.parse._num_partial", lambda *_: 0)
    with pytest.raises(AssertionError):
        check_chunks_agree(Setting(), "a" + call(), [3])


# Work is linear --------------------------------------------------------------------------------------


class Counted(str):
    """Text that counts the characters which are copied from it or searched in it."""

    __slots__ = ()
    work = 0

    def __radd__(self, other: str) -> "Counted":
        Counted.work += len(other) + len(self)
        return Counted(str(other) + str(self))

    def __add__(self, other: str) -> "Counted":
        Counted.work += len(other) + len(self)
        return Counted(str(self) + str(other))

    def __getitem__(self, key: Any) -> "Counted":
        part = Counted(str(self)[key])
        Counted.work += len(part)
        return part

    def find(self, sub: str, start: Any = 0, end: Any = None) -> int:
        at = str(self).find(sub, start)
        Counted.work += (len(self) if at < 0 else at) - start
        return at


def work_of(text: str, size: int, monkeypatch: pytest.MonkeyPatch, setting: Setting) -> int:
    """Characters copied, searched and joined to parse `text` in chunks of `size`."""
    joined = 0
    whole = JsonCallScanner._whole

    def counted(self: JsonCallScanner, text: str, start: int) -> tuple[str, int]:
        nonlocal joined
        joined += self._num_held
        return whole(self, text, start)

    with monkeypatch.context() as patch:
        patch.setattr(JsonCallScanner, "_whole", counted)
        Counted.work = 0
        setting.run(*(Counted(text[at : at + size]) for at in range(0, len(text), size)))
    return Counted.work + joined


HEAVY = {
    "a long argument": lambda n: call('{"a": "' + "x" * n + '"}'),
    "many escapes": lambda n: call('{"a": "' + r"\n\"" * (n // 4) + '"}'),
    "many values": lambda n: call('{"a": [' + "1, " * (n // 3) + "1]}"),
    "many calls": lambda n: call() * (n // len(call())),
    "many broken calls": lambda n: "<tool_call>no</tool_call>" * (n // 25),
    "many open quotes": lambda n: '<tool_call>{"name": "</tool_call>' * (n // 33),
    "open quotes that go on": lambda n: '<tool_call>{":1,"</tool_call>' * (n // 29),
    "one open quote": lambda n: '<tool_call>{"' + '</tool_call><tool_call>{\\"' * (n // 26),
    "many openings": lambda n: "<tool_call>" * (n // 11),
    "many openings of objects": lambda n: "<tool_call>{" * (n // 12),
    "hopeless": lambda n: "<tool_call>'" + "<" * n,
    "half tags": lambda n: "<tool_call" * (n // 10),
    "spaces": lambda n: "a" + " " * n + "b",
    "spaces at the start": lambda n: " " * n + "<think>",
    "spaces in a call": lambda n: "<tool_call>" + " " * n + "{}" + " " * n + "</tool_call>",
    "text": lambda n: "some words, " * (n // 12),
    "a thought": lambda n: "<think>" + "some words.\n" * (n // 12),
    "calls in a thought": lambda n: "<think>" + '<tool_call>{"name": "f"}' * (n // 24),
    "newlines in a thought": lambda n: "<think>a" + "\n" * n + "</think>",
    "nearly stopped": lambda n: "STO" * (n // 3),
}


@pytest.mark.parametrize("size", [4, 10**9], ids=["chunks", "whole"])
@pytest.mark.parametrize("case", HEAVY)
def test_work_is_linear(case: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for setting in (Setting(stop=("STOP",)), Setting(parse_tools=False)):
        small, large = (work_of(HEAVY[case](n), size, monkeypatch, setting) for n in (4_000, 32_000))
        assert large <= 10 * small + 1_000  # 8 times the text; quadratic work would be 64 times as much
        assert large <= 60 * 32_000


def test_the_work_check_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(self: JsonCallScanner, text: str, at: int = 0) -> Any:
        self._held = ["".join(self._held) + text[at:]]
        self._whole(text, at)  # looks at all of the call whenever more of it comes
        self._num_held += len(text) - at

    monkeypatch.setattr(JsonCallScanner, "feed", forgetful)
    small, large = (work_of(HEAVY["a long argument"](n), 4, monkeypatch, Setting()) for n in (4_000, 32_000))
    assert large > 30 * small
