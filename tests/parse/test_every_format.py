"""Every row of FORMATS, fed whatever its grammar might trip over."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parsekit import TOOLS, Setting, check_accounts, check_chunks_agree, marks_of
from writekit import write

from tokentape.formats import FORMATS, Format

SHARED = [
    *(
        '{"name": "f", "arguments": {',
        '"arguments": {"a": ',
        '{"a": 1}',
        '"',
        "'",
        "\\",
        '\\"',
        "}",
        "}}",
        "{",
    ),
    *(
        "[",
        "]",
        "(",
        ")",
        ")]",
        ",",
        ";",
        ":",
        "=",
        " ",
        "\n",
        "\n\n",
        " " * 90,
        "f",
        "f(",
        "a=",
        "1",
        "null",
    ),
    *("é", "漢🙂", "\ud800", "\x00", "\xa0", "\u2028", "STOP", "ST", "OP", "true", 'true">', 'false">'),
]


def fragments(row: Format) -> list[str]:
    """The marks, halves of them, and whole calls with their ends cut off."""
    marks = sorted(marks_of((row.calls, row.reasoning)))
    halves = [half for mark in marks for half in (mark[: len(mark) // 2], mark[len(mark) // 2 :]) if half]
    found = [*marks, *marks, *halves, *SHARED]
    for grammar in row.calls:
        for calls in ([("f", {"a": 1, "b": "x"})], [("g", {}), ("f", {"a": "y\nz"})]):
            text = write(grammar, calls)
            found += [
                text,
                text,
                *(text[: len(text) * part // 8] for part in range(1, 8)),
                text[len(text) // 2 :],
            ]
    return found


def settings_of(row: Format) -> st.SearchStrategy[Setting]:
    tool: Any = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}}
    return st.builds(
        Setting,
        syntax=st.just(row.syntax),
        parse_tools=st.sampled_from([True, True, False]),
        reasoning_open=st.sampled_from([False, False, True]),
        stop=st.sampled_from([(), (), (), ("STOP",), ("STO", "TOP"), ("\n\n",)]),
        tools=st.sampled_from([tuple({**TOOLS, "f": tool}.items()), ()]),
    )


@pytest.mark.parametrize("row", FORMATS, ids=lambda row: row.name)
def test_whatever_the_text(row: Format) -> None:
    pieces = st.one_of(st.sampled_from(fragments(row)), st.text(max_size=4))

    @settings(max_examples=60, deadline=None)
    @given(
        setting=settings_of(row),
        text=st.lists(pieces, max_size=14).map("".join),
        sizes=st.lists(st.integers(1, 12), min_size=1, max_size=8),
    )
    def check(setting: Setting, text: str, sizes: list[int]) -> None:
        check_accounts(setting, text, setting.run(text)[1])
        check_chunks_agree(setting, text, sizes)

    check()


@pytest.mark.parametrize("row", [row for row in FORMATS if row.calls], ids=lambda row: row.name)
def test_cut_anywhere(row: Format) -> None:
    """A call that the completion's end cuts is told as one, and no half of it is lost."""
    for grammar in row.calls:
        whole = write(grammar, [("f", {"a": "x\ny", "b": [1, "}"]}), ("g", {"c": "}"})])
        for opened in (False, True):
            setting = Setting(row.syntax, reasoning_open=opened)
            for end in range(len(whole) + 1):
                _, result = setting.run(whole[:end])
                check_accounts(setting, whole[:end], result)
                check_chunks_agree(setting, whole[:end], [3])
                bad = {x.status for x in result.attempts} - {"ok", "unclosed", "unknown_tool", "in_reasoning"}
                assert not bad, whole[:end]
