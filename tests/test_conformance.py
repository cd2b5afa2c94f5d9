"""SGLang's own answers for the JSON grammar and `<think>`, and where this project differs on purpose."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tokentape.parse import CallStatus, JsonCalls, Parser, ParseResult, Syntax, ThinkTags

CASES = Path(__file__).parents[2] / "shared" / "conformance" / "parsing.jsonl"
TOOL_FAMILIES = ("qwen25", "hermes")
THINK_FAMILIES = ("qwen3", "qwen3-thinking", "deepseek-r1")
ALWAYS_OPEN = (
    "qwen3-thinking",
    "deepseek-r1",
)  # their parsers take the thought as opened when nobody says otherwise
DIFFERENT = {
    # SGLang looks for the tag anywhere once the text is whole (its own streaming answer differs). What was
    # shown cannot be taken back, so a tag that is not at the start is content.
    "qwen3-reasoning-26efd9628307": "a tag behind text opens no thought",
}

pytestmark = pytest.mark.shared


def cases() -> Iterator[Any]:
    if not CASES.exists():
        yield pytest.param(None, marks=pytest.mark.skip(reason=f"no conformance data at {CASES}"))
        return
    for line in CASES.read_text(encoding="utf-8").splitlines():
        case = json.loads(line)
        families = TOOL_FAMILIES if case["kind"] == "tool" else THINK_FAMILIES
        if case["family"] in families:
            yield pytest.param(case, id=case["id"])


def parse(case: dict[str, Any], size: int = 10**9) -> ParseResult:
    calls = JsonCalls() if case["tool_parser"] in TOOL_FAMILIES else None
    force = case["force_reasoning"]
    parser = Parser(
        Syntax(calls, ThinkTags() if case["reasoning_parser"] else None),
        tools={tool["function"]["name"] for tool in case["tools"] or []},
        parse_tools=calls is not None,
        reasoning_open=case["family"] in ALWAYS_OPEN if force is None else force,
        new_call_id=map(str, itertools.count()).__next__,
    )
    for at in range(0, len(case["text"]), size):
        parser.feed(case["text"][at : at + size])
    return parser.finish()[1]


@pytest.mark.parametrize("case", list(cases()))
def test_sglang_agrees(case: dict[str, Any]) -> None:
    result = parse(case)
    for size in (1, 7):
        assert parse(case, size) == result
    check_nothing_lost(case["text"], result)
    if not case["strict"] or case["id"] in DIFFERENT:
        return
    expected = case["expected"]
    assert (result.reasoning or "").strip() == (expected["reasoning"] or "").strip()
    if case["tool_parser"] not in (*TOOL_FAMILIES, None) and expected["tool_calls"]:
        return  # another grammar's calls: only the thought is read here
    calls = [{"name": call.name, "arguments": json.loads(call.arguments)} for call in result.tool_calls]
    assert calls == expected["tool_calls"]
    if not case["content_lossy"]:
        assert (result.content or "").strip() == (expected["content"] or "").strip()


def check_nothing_lost(text: str, result: ParseResult) -> None:
    """What is neither delivered, reasoning nor content is tags and space."""
    for attempt in reversed(result.attempts):
        if attempt.status in (CallStatus.OK, CallStatus.UNKNOWN_TOOL):
            text = text[: attempt.start] + text[attempt.end :]
    told = (result.reasoning or "") + (result.content or "")
    missing = len("".join(text.split())) - len("".join(told.split()))
    if result.reasoning is None:
        assert missing == 0
    else:
        assert missing in (0, len("<think>"), len("</think>"), len("<think></think>"))


def test_every_difference_is_real() -> None:
    if not CASES.exists():
        pytest.skip(f"no conformance data at {CASES}")
    lines = map(json.loads, CASES.read_text(encoding="utf-8").splitlines())
    different = [case for case in lines if case["id"] in DIFFERENT]
    assert {case["id"] for case in different} == set(DIFFERENT)
    for case in different:
        assert case["strict"]
        assert (parse(case).reasoning or "").strip() != case["expected"]["reasoning"].strip()


def test_the_check_can_fail() -> None:
    result = ParseResult("a", None, (), (), True, "ok", False)
    check_nothing_lost("a", result)
    with pytest.raises(AssertionError):
        check_nothing_lost("ab", result)
