"""Calls that are written the family's way are read back exactly, whatever their values hold."""

import json
import re
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from parsekit import SPACE, Setting, check_accounts, check_chunks_agree, marks_of
from writekit import Wanted, dumped, text_of, tool_of, write

from tokentape.formats import FORMATS, Format
from tokentape.parse import PythonicCalls, XmlCalls

ROWS = [row for row in FORMATS if row.calls]
NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,12}", fullmatch=True)


def texts(row: Format) -> st.SearchStrategy[str]:
    pieces = st.sampled_from(
        [*sorted(marks_of(row.calls)), "\n", '"', "'", "\\", "}", "]", ")", ",", "null", "é漢🙂"]
    )
    return st.lists(
        st.one_of(pieces, st.text(st.characters(exclude_categories=["Cs"]), max_size=6)), max_size=6
    ).map("".join)


def values(row: Format) -> st.SearchStrategy[Any]:
    text = texts(row)
    scalars = st.one_of(
        text, st.integers(-(2**53), 2**53), st.floats(allow_nan=False, allow_infinity=False), st.booleans()
    )
    inner = st.one_of(scalars, st.none())
    deep = st.recursive(
        inner, lambda of: st.one_of(st.lists(of, max_size=3), st.dictionaries(text, of, max_size=3))
    )
    return st.one_of(text, scalars, st.lists(deep, max_size=3), st.dictionaries(text, deep, max_size=3))


def can_be_written(row: Format, calls: list[Wanted]) -> bool:
    """Whether the grammar has a way to write these values: bare text cannot hold what ends it."""
    for grammar in row.calls:
        if isinstance(grammar, PythonicCalls):
            return not any(re.search("[\ud800-\udfff]", str(call)) for call in calls)
        if not isinstance(grammar, XmlCalls):
            continue
        space = f"[{SPACE}]*"
        ends = [
            re.escape(grammar.value_end)
            + space
            + f"(?:{re.escape(grammar.key_open)}|{re.escape(grammar.close)})"
        ]
        if grammar.section is None:
            ends.append(re.escape(grammar.close))
        else:
            behind = f"(?:{re.escape(grammar.section.close)}|{re.escape(grammar.open)})"
            ends.append(re.escape(grammar.close) + space + behind)
        for _, arguments in calls:
            for value in arguments.values():
                text = text_of(value)
                if text.strip().lower() in grammar.typing.nulls:
                    return False
                # Behind the value stand its closing mark and what follows that.
                if any(re.search(end, text + grammar.value_end[:-1]) for end in ends):
                    return False
    return True


@st.composite
def blocks(draw: st.DrawFn, row: Format) -> list[Wanted]:
    """Calls to tools of different names, so that each has a schema of its own."""
    names = draw(st.lists(NAMES, min_size=1, max_size=3, unique=True))
    return [(name, draw(st.dictionaries(NAMES, values(row), max_size=3))) for name in names]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_calls_are_read_back(row: Format) -> None:
    @settings(max_examples=25, deadline=None)
    @given(calls=blocks(row), sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5))
    def check(calls: list[Wanted], sizes: list[int]) -> None:
        assume(can_be_written(row, calls))
        tools = tuple((name, tool_of(arguments)) for name, arguments in calls)
        for grammar in row.calls:
            setting = Setting(row.syntax, tools=tools)
            text = write(grammar, calls)
            _, result = setting.run(text)
            read = [(call.name, json.loads(call.arguments)) for call in result.tool_calls]
            assert dumped(read) == dumped(calls)  # in Python, True is 1 and the order of keys is nothing
            assert (result.content, result.status) == (None, "ok")
            check_accounts(setting, text, result)
            check_chunks_agree(setting, text, sizes)

    check()
