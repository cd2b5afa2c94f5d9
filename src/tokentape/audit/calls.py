"""Does the parser read back what the template writes? Typed arguments, odd texts, several calls."""

import itertools
import json
import os.path
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokentape.audit.cases import tool
from tokentape.audit.oracle import Judge, text_of
from tokentape.audit.report import ReadBack, Thinking
from tokentape.errors import TemplateRefused
from tokentape.formats import Format
from tokentape.parse import Harmony, Parser, ThinkTags
from tokentape.render import Frame
from tokentape.types import Json, Message, ToolCall

_SHOWN = 300  # characters of what the template wrote


@dataclass(frozen=True, slots=True)
class _Probe:
    """Calls to `record` with one argument, `value`, of the schema `schema` each."""

    name: str
    schema: Json
    values: tuple[Any, ...]


_STRING: Json = {"type": "string"}
PROBES: tuple[_Probe, ...] = (
    _Probe("string", _STRING, ("plain words",)),
    _Probe("integer", {"type": "integer"}, (42,)),
    _Probe("number", {"type": "number"}, (2.5,)),
    _Probe("boolean", {"type": "boolean"}, (True,)),
    _Probe("null", {"type": ["string", "null"]}, (None,)),
    _Probe("array", {"type": "array", "items": {"type": "integer"}}, ([1, 2, 3],)),
    _Probe("array of strings", {"type": "array", "items": _STRING}, (["a b", "it's", 'say "x"'],)),
    _Probe("object", {"type": "object"}, ({"deep": {"flag": False, "none": None, "n": [1.5]}},)),
    _Probe("unicode", _STRING, ("naïve Łódź 日本語 👩‍👧",)),
    _Probe("several lines", _STRING, ("def f():\n    return 1\n\nprint(f())",)),
    _Probe("quotes and backslashes", _STRING, ('He said "no" \\ it\'s C:\\new',)),
    _Probe("text like a number", _STRING, ("007",)),
    _Probe("text like true", _STRING, ("true",)),
    _Probe("text like JSON", _STRING, ('{"a": [1, null]}',)),
    _Probe("empty text", _STRING, ("",)),
    _Probe("two calls", _STRING, ("first one", "second one")),
)
_NO_ARGUMENTS = _Probe("no arguments", {}, ())


def read_back(judge: Judge, row: Format) -> tuple[ReadBack, ...]:
    """Write calls with the template, read them with the row's grammars, compare."""
    return tuple(_read_back(judge, row, probe) for probe in (*PROBES, _NO_ARGUMENTS))


def _read_back(judge: Judge, row: Format, probe: _Probe) -> ReadBack:
    arguments: list[Json] = [{"value": value} for value in probe.values] or [{}]
    calls = tuple(
        ToolCall(id=f"call0000{n}", name="record", arguments=json.dumps(each, ensure_ascii=False))
        for n, each in enumerate(arguments)
    )
    record = tool("record", value=probe.schema) if probe.values else tool("record")
    expected = tuple({"name": "record", "arguments": each} for each in arguments)
    wrote = _written(judge, row, Frame((record,), judge.arguments), calls)
    if wrote is None:
        return ReadBack(probe.name, ok=False, wrote=None, expected=expected, read=None)
    read = _read(judge, row, wrote, record["function"]["parameters"])
    ok = json.dumps(read) == json.dumps(expected)  # in JSON, 1 is not true and not 1.0
    return ReadBack(probe.name, ok=ok, wrote=wrote[:_SHOWN], expected=expected, read=read)


def _written(judge: Judge, row: Format, frame: Frame, calls: tuple[ToolCall, ...]) -> str | None:
    """The completion that the template writes for a turn of these calls, without its stop token."""
    user = Message(role="user", content="Go on.")
    thought = "Hm." if judge.thinking is Thinking.OPENED else None
    turn = Message(role="assistant", reasoning=thought, tool_calls=calls)
    try:
        prompt = text_of(judge.renderer, frame, [user])
        whole = text_of(judge.renderer, frame, [user, turn], go_on=False)
    except TemplateRefused:
        return None
    if whole.startswith(prompt):
        text = whole[len(prompt) :]
    else:  # the prompt's thought is not there: go back to before the mark that differs
        end = len(os.path.commonprefix([prompt, whole]))  # noqa: RUF071  # of texts
        text = whole[max(whole.rfind(mark, 0, end) + len(mark) for mark in (">", "]", "\n")) :]
        if isinstance(row.reasoning, ThinkTags) and row.reasoning.close in text:
            text = text.partition(row.reasoning.close)[2]
    stop = judge.stops.calls
    return text[: text.rindex(stop)] if stop and stop in text else text


def _read(judge: Judge, row: Format, wrote: str, schema: Mapping[str, Any]) -> tuple[Json, ...]:
    ids = itertools.count()
    opened = judge.thinking is Thinking.OPENED and not isinstance(row.reasoning, Harmony)
    closes = isinstance(row.reasoning, ThinkTags) and row.reasoning.close in wrote
    parser = Parser(
        row.syntax,
        tools={"record": dict(schema)},
        parse_tools=True,
        reasoning_open=opened and closes,
        new_call_id=lambda: f"new{next(ids)}",
    )
    parser.feed(wrote)
    _, result = parser.finish()
    return tuple({"name": call.name, "arguments": _loads(call.arguments)} for call in result.tool_calls)


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
