"""Texts made to break a parser: it says what they are, loses nothing, raises nothing."""

import itertools
import json

import pytest
from parsekit import A, Setting, call, calls_of, check_accounts, check_chunks_agree, marks_of, parse
from writekit import text_of, tool_of, write

from tokentape.formats import FORMATS, Format
from tokentape.parse import Harmony, NamedCalls, XmlCalls
from tokentape.parse.jsonscan import MAX_DEPTH

ROWS = [row for row in FORMATS if row.calls]
each_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


def check(setting: Setting, text: str) -> None:
    check_accounts(setting, text, setting.run(text)[1])
    check_chunks_agree(setting, text, [7])


@each_row
@pytest.mark.parametrize("opening", ["[", '{"a":', "(", "{'a':", "-", "[[1], "])
def test_endless_nesting(row: Format, opening: str) -> None:
    deep = opening * 600
    for grammar in row.calls:
        for value in ("@@", ["@@"]):
            text = write(grammar, [("f", {"a": value})])
            for old in ('"@@"', "'@@'", "@@"):
                for kind in ("object", "array", "string"):
                    tool = {"type": "object", "properties": {"a": {"type": kind}}}
                    check(Setting(row.syntax, tools=(("f", tool),)), text.replace(old, deep))


@each_row
def test_a_megabyte(row: Format) -> None:
    for grammar in row.calls:
        wanted = [("f", {"a": "one line,\tand «more»\n" * 50_000, "b": 1})]
        setting = Setting(row.syntax, tools=(("f", tool_of(wanted[0][1])),))
        text = write(grammar, wanted)
        for chunks in ([text], [text[at : at + 1000] for at in range(0, len(text), 1000)]):
            _, result = setting.run(*chunks)
            assert [(call.name, json.loads(call.arguments)) for call in result.tool_calls] == wanted
            assert "".join(piece.text for piece in result.pieces) == text


@each_row
@pytest.mark.parametrize("odd", ["\ud800", "\x00", "\u2028", "\x1c"])
def test_odd_characters(row: Format, odd: str) -> None:
    for grammar in row.calls:
        whole = write(grammar, [("f", {"a": "@", "b": ["@"]})])
        for at in range(0, len(whole), 9):
            check(Setting(row.syntax), whole[:at] + odd + whole[at:])
        for text in (odd, f"a{odd}{whole}{odd}", whole.replace("@", odd), whole.replace("f", odd)):
            check(Setting(row.syntax), text)


@each_row
def test_thousands_of_openings(row: Format) -> None:
    for grammar in row.calls:
        for mark in sorted(marks_of(grammar)):
            for setting in (Setting(row.syntax), Setting(row.syntax, parse_tools=False)):
                check(setting, mark * 400)
                check(setting, f"{mark}\n" * 400)
                check(setting, mark[:-1] * 400)


@each_row
def test_a_call_behind_broken_ones_is_read(row: Format) -> None:
    """Whatever a broken call is, the right one behind its end is not lost with it."""
    for grammar in row.calls:
        if isinstance(grammar, Harmony):
            continue  # a broken message may say anything
        good = write(grammar, [("f", {"a": 1})])
        broken = good.replace("1", "@" if isinstance(grammar, XmlCalls) else "nope,,")
        if isinstance(grammar, XmlCalls):
            broken = broken.replace(grammar.value_end, "")
        if isinstance(grammar, NamedCalls) and not grammar.close:
            broken += " "
        setting = Setting(row.syntax, tools=(("f", tool_of({"a": 1})),))
        _, result = setting.run(f"{broken}\n{good}")
        assert [x.status == "ok" for x in result.attempts][-1], result
        assert [(call.name, json.loads(call.arguments)) for call in result.tool_calls] == [("f", {"a": 1})]
        assert broken.strip() in (result.content or "")


@each_row
def test_a_row_reads_no_other_family_s_calls(row: Format) -> None:
    """What one family's grammar makes of another's call is text or that call, never another one."""
    wanted = [("f", {"path": "x", "count": 2})]
    tools = (("f", tool_of(wanted[0][1])),)
    for other in ROWS:
        for grammar in other.calls:
            text = write(grammar, wanted)
            _, result = Setting(row.syntax, tools=tools).run(text)
            check_accounts(Setting(row.syntax, tools=tools), text, result)
            read = [(call.name, json.loads(call.arguments)) for call in result.tool_calls]
            told = [(name, {k: text_of(v).strip() for k, v in arguments.items()}) for name, arguments in read]
            assert told in ([], [("f", {"path": "x", "count": "2"})], [("f", {})])


def test_the_model_s_own_ids_are_kept_and_stay_unique() -> None:
    kimi = next(row for row in FORMATS if row.name == "kimi-k2")
    text = write(kimi.calls[0], [("f", {}), ("f", {})]).replace("f:1", "f:0")
    _, result = Setting(kimi.syntax).run(text)
    assert [call.id for call in result.tool_calls] == ["functions.f:0", "call_0"]


@each_row
@pytest.mark.parametrize("number", ["1" * 5_000, "-" + "9" * 5_000, "0x" + "f" * 6_000, "1." + "0" * 5_000])
def test_numbers_that_python_does_not_read(row: Format, number: str) -> None:
    for grammar, kind in itertools.product(row.calls, ("integer", "number", "string", "array")):
        text = write(grammar, [("f", {"a": "@@"})])
        tool = {"type": "object", "properties": {"a": {"type": kind}}}
        for old in ('"@@"', "'@@'", "@@"):
            setting, changed = Setting(row.syntax, tools=(("f", tool),)), text.replace(old, number)
            check_accounts(setting, changed, setting.run(changed)[1])


def test_nesting_at_the_limit() -> None:
    for depth, status in ((MAX_DEPTH - 1, "ok"), (MAX_DEPTH, "invalid_json")):
        assert parse(call('{"a": ' + "[" * depth + "]" * depth + "}")).status == status


def test_a_closing_mark_in_a_string_that_never_ends() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": "x</tool_call> and more'
    for behind, status in (("", "invalid_json"), ('"}', "unclosed")):
        result = parse(text + behind)
        assert (result.content, result.status) == (text + behind, status)
        end = text.index("</tool_call>") + len("</tool_call>") if not behind else len(text + behind)
        assert [(x.start, x.end) for x in result.attempts] == [(0, end)]


def test_misuse_is_the_only_error() -> None:
    marks = sorted(marks_of(tuple(row.calls for row in FORMATS)))
    for row, (first, second) in itertools.product(FORMATS, itertools.pairwise(marks)):
        check_accounts(Setting(row.syntax), first + second, Setting(row.syntax).run(first + second)[1])
    assert calls_of(parse(call())) == [A]
