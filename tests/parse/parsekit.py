"""What the parser's tests share: a setting, what it makes of a text, and checks of any result."""

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from tokentape.parse import (
    ArgumentsDelta,
    CallDelta,
    CallStatus,
    Harmony,
    JsonCalls,
    ParseEvent,
    Parser,
    ParseResult,
    PieceKind,
    ReasoningDelta,
    Syntax,
    TextDelta,
    ThinkTags,
)

QWEN = Syntax((JsonCalls(),), ThinkTags())
HERMES = Syntax((JsonCalls(),))
THINK = Syntax((), ThinkTags())
PLAIN = Syntax()
TOOLS: dict[str, Any] = {"f": {"type": "object"}, "ping": {}}
SPACE = " \t\r\n"
SURROGATE = "\ud800"
DELIVERED = (CallStatus.OK, CallStatus.UNKNOWN_TOOL)
A = ("f", '{"a": 1}')


@dataclass(frozen=True)
class Setting:
    """Everything a parser is told but the text."""

    syntax: Syntax = QWEN
    parse_tools: bool = True
    reasoning_open: bool = False
    stop: tuple[str, ...] = ()
    tools: tuple[tuple[str, Any], ...] = tuple(TOOLS.items())

    def parser(self) -> Parser:
        return Parser(
            self.syntax,
            tools=dict(self.tools),
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


def chunks_of(text: str, sizes: Sequence[int]) -> Iterator[str]:
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
        if isinstance(event, CallDelta):
            runs.append(("CallDelta", f"{event.index} {event.call}"))
            continue
        kind = type(event).__name__
        if isinstance(event, ArgumentsDelta):
            kind += f" {event.index} {event.name}"
        if runs and runs[-1][0] == kind:
            runs[-1] = (kind, runs[-1][1] + event.text)
        else:
            runs.append((kind, event.text))
    return runs


def check_chunks_agree(setting: Setting, text: str, sizes: Sequence[int]) -> None:
    events, whole = setting.run(text)
    check_events(events, whole)
    for chunks in (list(text), list(chunks_of(text, sizes))):
        chunked, result = setting.run(*chunks)
        assert result == whole
        assert merged(chunked) == merged(events)


def check_every_cut(setting: Setting, text: str) -> None:
    events, whole = setting.run(text)
    check_accounts(setting, text, whole)
    for cut in range(len(text) + 1):
        chunked, result = setting.run(text[:cut], "", text[cut:])
        assert result == whole
        assert merged(chunked) == merged(events)


def check_events(events: Sequence[ParseEvent], result: ParseResult) -> None:
    """The events say what the result says, and the arguments that streamed are those of the call."""
    assert all(event.text for event in events if not isinstance(event, CallDelta))
    assert "".join(e.text for e in events if isinstance(e, TextDelta)) == (result.content or "")
    assert "".join(e.text for e in events if isinstance(e, ReasoningDelta)) == (result.reasoning or "")
    calls = [event for event in events if isinstance(event, CallDelta)]
    assert [event.index for event in calls] == list(range(len(calls)))
    assert tuple(event.call for event in calls) == result.tool_calls
    assert len({event.call.id for event in calls}) == len(calls)
    runs = merged(events)
    for before, (kind, said) in zip([("", ""), *runs], runs, strict=False):
        if kind == "CallDelta":
            index = int(said.split()[0])
            assert before == (f"ArgumentsDelta {index} {calls[index].call.name}", calls[index].call.arguments)


def marks_of(part: Any) -> set[str]:
    """Every mark that a grammar, or a syntax, is written with."""
    if isinstance(part, str):
        return {part, part.strip()} - {""}
    if isinstance(part, Harmony):
        return {"<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>", " to="}
    if isinstance(part, tuple):
        return {mark for each in part for mark in marks_of(each)}
    if is_dataclass(part) and type(part).__name__ != "Typing":
        return {mark for field in fields(part) for mark in marks_of(getattr(part, field.name))}
    return set()


def check_accounts(setting: Setting, text: str, result: ParseResult) -> None:
    """Every character of `text` is a piece, and the pieces are what the result says, whatever the grammar."""
    text = cut_at_stop(text, setting.stop)
    assert "".join(piece.text for piece in result.pieces) == text
    of = {kind: [piece.text for piece in result.pieces if piece.kind is kind] for kind in PieceKind}
    check_told(result, "".join(of[PieceKind.CONTENT]), "".join(of[PieceKind.REASONING]))
    if setting.syntax.channels is None:  # whose headers may say anything
        marks = marks_of((setting.syntax.calls, setting.syntax.reasoning))
        for markup in of[PieceKind.MARKUP]:
            for mark in sorted(marks, key=len, reverse=True):
                markup = markup.replace(mark, "")
            assert not markup.strip(SPACE + "[],;")
    delivered = [x for x in result.attempts if x.status in DELIVERED]
    assert [(x.name, x.arguments) for x in delivered] == calls_of(result)
    assert [text[x.start : x.end] for x in delivered] == of[PieceKind.CALL]
    for x in delivered:
        assert isinstance(json.loads(x.arguments or ""), dict)
    check_attempts(text, result)
    if not setting.parse_tools:
        assert not result.tool_calls
        if setting.syntax.reasoning is None:
            assert (result.content, of[PieceKind.MARKUP]) == (text, [])


def check_told(result: ParseResult, content: str, reasoning: str) -> None:
    told = result.content or ""
    if result.reasoning is None and not result.tool_calls:
        assert told == content
    else:
        assert (told in content, told.strip(SPACE)) == (True, content.strip(SPACE))
        assert not result.tool_calls or told == told.rstrip(SPACE)
    assert (result.content is None) == (not told and bool(result.tool_calls or result.reasoning is not None))
    assert (result.reasoning or "") in reasoning
    assert (result.reasoning or "").strip("\n") == reasoning.strip("\n")


def check_attempts(text: str, result: ParseResult) -> None:
    spans = [(x.start, x.end) for x in result.attempts]
    assert all(0 <= start < end <= len(text) for start, end in spans)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
    for x in result.attempts:
        assert (x.error is None) == (x.status is CallStatus.OK)
        if x.status not in DELIVERED:
            where = result.reasoning if x.status is CallStatus.IN_REASONING else result.content
            assert text[x.start : x.end].strip(SPACE) in (where or "")
    bad = [x.status.value for x in result.attempts if x.status is not CallStatus.OK]
    assert result.status == ([*bad, "ok"][0] if result.reasoning_closed else "reasoning_unclosed")


def cut_at_stop(text: str, stops: tuple[str, ...]) -> str:
    """`text` up to the stop string that a reader of one character after another would see first."""
    for end in range(len(text) + 1 if any(stops) else 0):
        seen = [len(stop) for stop in stops if stop and text[:end].endswith(stop)]
        if seen:
            return text[: end - max(seen)]
    return text
