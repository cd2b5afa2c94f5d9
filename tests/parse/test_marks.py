"""Marks that are not where they must be: typed, kept, and never made into a call."""

import pytest
from parsekit import parse

from tokentape.formats import FORMATS

ROW = {row.name: row.syntax for row in FORMATS}
KIMI = "<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{}<|tool_call_end|>"
KIMI_SECTION = ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>")
QWEN = "<function=f>\n<parameter=a>\n1\n</parameter>\n</function>"


@pytest.mark.parametrize(
    ("row", "call", "section"),
    [("kimi-k2", KIMI, KIMI_SECTION), ("qwen3-coder", QWEN, ("<tool_call>", "</tool_call>"))],
)
def test_a_call_outside_its_section(row: str, call: str, section: tuple[str, str]) -> None:
    result = parse(f"So: {call}", syntax=ROW[row])
    assert (result.content, result.tool_calls, result.status) == (f"So: {call}", (), "outside_section")
    assert [(attempt.name, attempt.start) for attempt in result.attempts] == [("f", 4)]
    inside = parse(f"So: {section[0]}{call}{section[1]}", syntax=ROW[row])
    assert (inside.content, inside.status) == ("So:", "ok")
    assert [call.name for call in inside.tool_calls] == ["f"]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (
            "qwen3-coder",
            "<tool_call><function=f><parameter=a>1</parameter><parameter=a>2</parameter></function></tool_call>",
        ),
        (
            "glm",
            "<tool_call>f<arg_key>a</arg_key><arg_value>1</arg_value><arg_key>a</arg_key><arg_value>2</arg_value>"
            "</tool_call>",
        ),
        ("qwen3-coder", "<tool_call><function=f>x<parameter=a>1</parameter></function></tool_call>"),
        ("qwen3-coder", "<tool_call><function=f><parameter=>1</parameter></function></tool_call>"),
        ("qwen3-coder", "<tool_call><function=f g></function></tool_call>"),
        ("glm", '<tool_call>{"name": "f", "arguments": {}}</tool_call>'),  # another family's
        ("minimax", '<minimax:tool_call><invoke name="f">1</invoke></minimax:tool_call>'),
        ("deepseek-v3.1", "<｜tool▁calls▁begin｜>f{}<｜tool▁calls▁end｜>"),  # noqa: RUF001
    ],
)
def test_what_is_no_call_stays_text(row: str, text: str) -> None:
    result = parse(f"{text} So.", syntax=ROW[row])
    assert (result.content, result.tool_calls, result.status) == (f"{text} So.", (), "malformed")
    assert all(attempt.error for attempt in result.attempts)


def test_a_call_in_a_thought_channel_is_told_and_not_delivered() -> None:
    text = '<|channel|>analysis to=functions.f<|message|>{"a": 1}<|end|>'
    text += "<|start|>assistant<|channel|>final<|message|>So."
    result = parse(text, syntax=ROW["gpt-oss"])
    assert (result.reasoning, result.content, result.tool_calls) == ('{"a": 1}', "So.", ())
    assert result.status == "in_reasoning"
    [attempt] = result.attempts
    assert (attempt.name, text[attempt.start : attempt.end]) == ("f", '{"a": 1}')
