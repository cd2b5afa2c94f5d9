"""SGLang's own answers for the JSON grammar and `<think>`, and where this project differs on purpose."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tokentape.formats import FORMATS
from tokentape.parse import Parser, ParseResult, PieceKind, Syntax

CASES = Path(__file__).parents[2] / "shared" / "conformance" / "parsing.jsonl"
TOOL_ROWS = {  # SGLang's parser → our row
    "deepseekv3": "deepseek-v3",
    "deepseekv31": "deepseek-v3.1",
    "deepseekv32": "deepseek-v3.2",
    "glm45": "glm",
    "glm47": "glm",
    "gpt-oss": "gpt-oss",
    "hermes": "hermes",
    "hunyuan": "hunyuan",
    "kimi_k2": "kimi-k2",
    "llama3": "llama3",
    "mimo": "mimo",
    "minimax-m2": "minimax",
    "mistral": "mistral",
    "pythonic": "llama4",
    "qwen25": "hermes",
    "qwen3_coder": "qwen3-coder",
    "step3": "step3",
}
REASONING_ROWS = {"gpt-oss": "gpt-oss", "mistral": "mistral", "minimax-append-think": "plain"}  # others: <think>
# Their parsers take the thought as opened when nobody says otherwise.
ALWAYS_OPEN = ("qwen3-thinking", "deepseek-r1", "minimax")
ROWS = {row.name: row for row in FORMATS}
DIFFERENT = {
}

pytestmark = pytest.mark.shared


def cases() -> Iterator[Any]:
    if not CASES.exists():
        yield pytest.param(None, marks=pytest.mark.skip(reason=f"no conformance data at {CASES}"))
        return
    for line in CASES.read_text(encoding="utf-8").splitlines():
        case = json.loads(line)
        yield pytest.param(case, id=case["id"])


def parse(case: dict[str, Any], size: int = 10**9) -> ParseResult:
    calls = ROWS[TOOL_ROWS[case["tool_parser"]]].calls if case["tool_parser"] else ()
    reasoning = None
    if case["reasoning_parser"]:
        reasoning = ROWS[REASONING_ROWS.get(case["reasoning_parser"], "qwen3")].reasoning
    force = case["force_reasoning"]
    parser = Parser(
        Syntax(calls, reasoning),
        tools={tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in case["tools"] or []},
        parse_tools=bool(calls),
        reasoning_open=case["family"] in ALWAYS_OPEN if force is None else force,
        new_call_id=map(str, itertools.count()).__next__,
    )
    for at in range(0, len(case["text"]), size):
        parser.feed(case["text"][at : at + size])
    return parser.finish()[1]


def differs(case: dict[str, Any], result: ParseResult) -> str | None:
    """What SGLang says otherwise."""
    expected = case["expected"]
    if case["reasoning_parser"] and (result.reasoning or "").strip() != (expected["reasoning"] or "").strip():
        return "reasoning"
    calls = [{"name": call.name, "arguments": json.loads(call.arguments)} for call in result.tool_calls]
    if calls != expected["tool_calls"]:
        return "calls"
    content = result.content or ""
    if case["reasoning_parser"] == "minimax-append-think":  # it puts the tag in front that the prompt had
        content = "<think>" + content
    if not case["content_lossy"] and content.strip() != (expected["content"] or "").strip():
        return "content"
    return None


@pytest.mark.parametrize("case", list(cases()))
def test_sglang_agrees(case: dict[str, Any]) -> None:
    result = parse(case)
    for size in (1, 7):
        assert parse(case, size) == result
    assert "".join(piece.text for piece in result.pieces) == case["text"]
    check_nothing_lost(case["text"], result)
    if case["strict"] and case["id"] not in DIFFERENT:
        assert differs(case, result) is None


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
