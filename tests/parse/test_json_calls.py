"""Calls written as JSON: which are delivered, which stay text, and why."""

import json

import pytest
from parsekit import PLAIN, SURROGATE, THINK, A, Setting, call, calls_of, check_every_cut, parse

from tokentape.formats import FORMATS
from tokentape.parse import CallStatus
from tokentape.parse.jsonscan import MAX_DEPTH

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
    "no arguments": ('<tool_call>{"name": "ping"}</tool_call>', None, [("ping", "{}")]),
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
    check_every_cut(Setting(), text)


def test_an_unknown_tool_is_delivered_and_typed() -> None:
    result = parse("a" + call(name="g"))
    assert calls_of(result) == [("g", '{"a": 1}')]
    assert (result.content, result.status) == ("a", "unknown_tool")
    assert "'g'" in (result.attempts[0].error or "")


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
    "both arguments and parameters": (
        '{"parameters": {}, "name": "f", "arguments": {"a": 1}}',
        CallStatus.INVALID_JSON,
        "f",
        None,
    ),
    "a repeated key": ('{"name": "f", "arguments": {}, "arguments": {}}', CallStatus.INVALID_JSON, "f", None),
    "another repeated key": ('{"name": "f", "name": "f"}', CallStatus.INVALID_JSON, "f", None),
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
    check_every_cut(Setting(), f"a {raw} b" + call())


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


@pytest.mark.parametrize(("depth", "status"), [(MAX_DEPTH - 1, "ok"), (MAX_DEPTH, "invalid_json")])
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
    text = "a" + call() + "<tool_call> is how </tool_call>" + call(name="g")  # talk of calls is no attempt
    result = parse(text, parse_tools=False)
    assert (result.content, result.tool_calls, result.status) == (text, (), "not_offered")
    spans = [(x.status, x.name, text[x.start : x.end]) for x in result.attempts]
    assert spans == [("not_offered", "f", call()), ("not_offered", "g", call(name="g"))]
    for syntax in (THINK, PLAIN):
        assert parse(text, syntax=syntax).content == text
        assert parse(text, syntax=syntax).attempts == ()


@pytest.mark.parametrize(
    ("syntax", "text", "ids"),
    [
        ("mistral", '[TOOL_CALLS]f[CALL_ID]abc12DEF3[ARGS]{"a": 1}', ["abc12DEF3"]),
        ("mistral", '[TOOL_CALLS]f[CALL_ID]abc[ARGS]{"a": 1}', ["call_0"]),
        ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {}, "id": "abc12DEF3"}]', ["abc12DEF3"]),
        ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {}, "id": "weather:0"}]', ["call_0"]),
        ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {}, "id": 1}]', ["call_0"]),
        (
            "mistral",
            "[TOOL_CALLS]f[CALL_ID]abc12DEF3[ARGS]{}[TOOL_CALLS]f[CALL_ID]abc12DEF3[ARGS]{}",
            ["abc12DEF3", "call_0"],  # no two calls of a turn have one id
        ),
        (
            "kimi-k2",
            "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:3<|tool_call_argument_begin|>{}"
            "<|tool_call_end|><|tool_calls_section_end|>",
            ["functions.f:3"],
        ),
    ],
)
def test_an_id_that_the_model_wrote_is_the_call_s(syntax: str, text: str, ids: list[str]) -> None:
    row = next(row for row in FORMATS if row.name == syntax)
    assert [call.id for call in parse(text, syntax=row.syntax).tool_calls] == ids
