"""Reads a completion's text as it streams: reasoning, content and tool calls. No I/O.

What a `Parser` promises:

- The result does not depend on how the text was cut into `feed` calls.
- Nothing is lost. A call that cannot be delivered stays in the content, tags included, where the model wrote
  it, and every attempt is listed with its raw span and what was wrong with it.
- The work is linear in the text, whatever the chunks.

All that is left out, on purpose: the reasoning tags and the newlines at the thought's edges, the space behind
the closing tag, the text of delivered calls, and the space that these leave at the content's edges. Space
means space, tab, CR and LF: what JSON calls whitespace. How calls are written is in `grammars`.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TypeAlias

from tokentape.errors import InternalError
from tokentape.grammars import SPACE, CallStatus, JsonCalls, JsonCallScanner, Reading, skip
from tokentape.types import ToolCall

__all__ = [
    "REASONING_UNCLOSED",
    "CallAttempt",
    "CallDelta",
    "CallStatus",
    "JsonCalls",
    "ParseEvent",
    "ParseResult",
    "Parser",
    "ReasoningDelta",
    "Syntax",
    "TextDelta",
    "ThinkTags",
]

REASONING_UNCLOSED = "reasoning_unclosed"
"""`ParseResult.status` of a completion that ended inside its thought."""

_SPACE_CHARS = " \t\r\n"
_DELIVERED = (CallStatus.OK, CallStatus.UNKNOWN_TOOL)


@dataclass(frozen=True, slots=True)
class CallAttempt:
    """One tool-call attempt. `start:end` are characters of the completion's text, tags included.

    `name` and `arguments` are as far as they could be read; `arguments` is the JSON text of an object exactly
    as sampled, "{}" where the model wrote none. `error` says in words what is wrong, None when nothing is.
    """

    start: int
    end: int
    status: CallStatus
    name: str | None
    arguments: str | None
    error: str | None


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More of the content; never empty."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More of the thought; never empty."""

    text: str


@dataclass(frozen=True, slots=True)
class CallDelta:
    """A complete call. `index` counts the delivered calls of the completion from 0."""

    index: int
    call: ToolCall


ParseEvent: TypeAlias = TextDelta | ReasoningDelta | CallDelta


@dataclass(frozen=True, slots=True)
class ParseResult:
    """What a whole completion says.

    `content` is all `TextDelta`s joined; None when there was nothing but calls or reasoning. `reasoning` is
    all `ReasoningDelta`s joined; None when no thought was opened, "" when it was empty. `tool_calls` are the
    very objects of the `CallDelta`s. `attempts` stand in the text's order. `reasoning_closed` is False when
    the completion ended inside the thought. `status` is `REASONING_UNCLOSED` then, else the status of the
    first attempt that is not "ok", else "ok". `stopped`: a stop string matched.
    """

    content: str | None
    reasoning: str | None
    tool_calls: tuple[ToolCall, ...]
    attempts: tuple[CallAttempt, ...]
    reasoning_closed: bool
    status: str
    stopped: bool


@dataclass(frozen=True, slots=True)
class ThinkTags:
    """The pair of tags around a thought."""

    open: str = "<think>"
    close: str = "</think>"


@dataclass(frozen=True, slots=True)
class Syntax:
    """How one model family writes. None: it has no such thing, and text that looks so is content."""

    calls: JsonCalls | None = None
    reasoning: ThinkTags | None = None


def _num_partial(text: str, mark: str, at: int = 0) -> int:
    """How many characters at the end of `text[at:]` may be the beginning of `mark`, short of all of it."""
    at = max(at, len(text) - len(mark) + 1)
    while (at := text.find(mark[0], at)) >= 0:
        if mark.startswith(text[at:]):
            return len(text) - at
        at += 1
    return 0


class _StopCutter:
    """Passes text on up to the stop string whose last character comes first: that one stopped the engine."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held: str = ""
        self.stopped = False

    def feed(self, text: str, *, final: bool) -> str:
        if self.stopped or not self._stops:
            return "" if self.stopped else text
        text = self._held + text
        matches = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if matches:
            self.stopped = True
            return text[: min(matches)[1]]
        end = len(text) - (0 if final else max(_num_partial(text, stop) for stop in self._stops))
        self._held = text[end:]
        return text[:end]


@dataclass(slots=True)
class _Trimmed:
    """Text whose last spaces are held until it is known that more follows."""

    spaces: str
    parts: list[str] = field(default_factory=list[str])
    held: list[str] = field(default_factory=list[str])

    def push(self, text: str, *, trim_left: bool) -> str:
        """Take `text`, return what may be shown. `trim_left`: spaces at the very beginning do not count."""
        body = text.rstrip(self.spaces)
        if not body:
            self.held.append(text)
            return ""
        shown = "".join(self.held) + body
        if trim_left and not self.parts:
            shown = shown.lstrip(self.spaces)
        self.held = [text[len(body) :]]
        self.parts.append(shown)
        return shown

    def release(self) -> str:
        """Show the held spaces too: nothing follows, and they belong to the text."""
        shown = "".join(self.held)
        self.held = []
        self.parts.append(shown)
        return shown


class _Phase(Enum):
    START = auto()  # is there an opening reasoning tag?
    REASONING = auto()
    CONTENT = auto()
    CALL = auto()


class Parser:
    """Parses one completion: `feed` its text as it is decoded, then `finish` once.

    The text has control tokens as text, but not the stop token at its end. `tools` are the names on offer;
    without `parse_tools` a call stays content. `reasoning_open`: the prompt ended inside a thought; an
    opening tag at the very start is then swallowed as the same one. The text counts up to the first of the
    `stop` strings, wherever it stands.

    Content around delivered calls is joined as it stands, minus the calls; the space at its end is dropped,
    and that at its beginning where a call or a thought came first. Space before text that was shown before
    the first call stays: streaming cannot know yet whether a call will come, and without calls the content is
    exact.
    """

    def __init__(
        self,
        syntax: Syntax,
        *,
        tools: Collection[str],
        parse_tools: bool,
        reasoning_open: bool,
        stop: tuple[str, ...] = (),
        new_call_id: Callable[[], str],
    ) -> None:
        self._syntax = syntax
        self._calls = syntax.calls if parse_tools else None
        self._tools = frozenset(tools)
        self._reasoning_open = reasoning_open
        self._new_call_id = new_call_id
        self._stop = _StopCutter(stop)
        self._raw: list[str] = []
        self._window = (
            ""  # text not yet decided on from `_at` on; it begins at character `_base` of the whole
        )
        self._at = 0
        self._base = 0
        self._phase = _Phase.START
        self._final = False
        self._events: list[ParseEvent] = []
        self._content = _Trimmed(_SPACE_CHARS)
        self._reasoning: _Trimmed | None = None
        self._reasoning_span = (0, 0)
        self._attempts: list[CallAttempt] = []
        self._delivered: list[ToolCall] = []
        self._attempt_start = 0
        self._scanner: JsonCallScanner | None = None

    def feed(self, text: str) -> list[ParseEvent]:
        """Take more of the completion and return what is now certain.

        Raises:
            InternalError: after `finish`.
        """
        if self._final:
            raise InternalError("Parser.feed after finish")
        return self._advance(self._stop.feed(text, final=False))

    def finish(self) -> tuple[list[ParseEvent], ParseResult]:
        """The completion is over: the last events, and the whole of it.

        Raises:
            InternalError: when called twice.
        """
        if self._final:
            raise InternalError("Parser.finish called twice")
        self._final = True
        events = self._advance(self._stop.feed("", final=True))
        closed = self._phase is not _Phase.REASONING
        if self._reasoning and self._reasoning.parts and not closed:
            self._emit(ReasoningDelta(self._reasoning.release()))
        if not self._delivered and (self._content.parts or self._reasoning is None):
            self._emit(TextDelta(self._content.release()))
        return events, self._result(closed)

    def _result(self, closed: bool) -> ParseResult:
        raw = "".join(self._raw)
        attempts = self._sightings(raw, *self._reasoning_span, CallStatus.IN_REASONING)
        attempts += self._attempts
        if self._calls is None:
            attempts += self._sightings(raw, self._reasoning_span[1], len(raw), CallStatus.NOT_OFFERED)
        bad = [attempt.status.value for attempt in attempts if attempt.status is not CallStatus.OK]
        content = "".join(self._content.parts)
        return ParseResult(
            content=None if not content and (self._delivered or self._reasoning) else content,
            reasoning="".join(self._reasoning.parts) if self._reasoning else None,
            tool_calls=tuple(self._delivered),
            attempts=tuple(attempts),
            reasoning_closed=closed,
            status=[*bad, "ok"][0] if closed else REASONING_UNCLOSED,
            stopped=self._stop.stopped,
        )

    def _advance(self, text: str) -> list[ParseEvent]:
        self._raw.append(text)
        self._window += text
        self._events = []
        while self._step():
            pass
        self._window = self._window[self._at :]
        self._base += self._at
        self._at = 0
        return self._events

    def _step(self) -> bool:
        """Take from the window what is certain in this phase; True when the phase changed: step again."""
        match self._phase:
            case _Phase.START:
                return self._start()
            case _Phase.REASONING:
                return self._think()
            case _Phase.CONTENT:
                return self._tell()
            case _Phase.CALL:
                return self._call()

    def _emit(self, event: TextDelta | ReasoningDelta) -> None:
        if event.text:
            self._events.append(event)

    def _take(self, end: int) -> str:
        text = self._window[self._at : end]
        self._at = end
        return text

    def _take_before(self, mark: str) -> tuple[str, bool]:
        """Take what stands before `mark` and `mark` itself, or all that is certain not to belong to it."""
        end = self._window.find(mark, self._at)
        if end >= 0:
            text = self._take(end)
            self._take(end + len(mark))
            return text, True
        num_held = 0 if self._final else _num_partial(self._window, mark, self._at)
        return self._take(len(self._window) - num_held), False

    def _start(self) -> bool:
        tags = self._syntax.reasoning
        self._phase = _Phase.CONTENT
        if tags is None:
            return True
        if not self._reasoning_open:
            self._content.held.append(self._take(skip(SPACE, self._window, self._at)))
        opened = self._window.startswith(tags.open, self._at)
        if not opened and not self._final and tags.open.startswith(self._window[self._at :]):
            self._phase = _Phase.START
            return False
        if opened:
            self._take(self._at + len(tags.open))
        if opened or self._reasoning_open:
            self._reasoning = _Trimmed("\n")
            self._reasoning_span = (self._base + self._at, self._base + self._at)
            self._phase = _Phase.REASONING
        return True

    def _think(self) -> bool:
        tags, reasoning = self._syntax.reasoning, self._reasoning
        if tags is None or reasoning is None:
            raise InternalError("a thought without its tags")
        text, closed = self._take_before(tags.close)
        self._emit(ReasoningDelta(reasoning.push(text, trim_left=True)))
        end = self._base + self._at - (len(tags.close) if closed else 0)
        self._reasoning_span = (self._reasoning_span[0], end)
        if closed:
            self._phase = _Phase.CONTENT
        return closed

    def _tell(self) -> bool:
        if self._calls is None:
            self._say(self._take(len(self._window)))
            return False
        text, called = self._take_before(self._calls.open)
        self._say(text)
        if called:
            self._attempt_start = self._base + self._at - len(self._calls.open)
            self._scanner = self._calls.scanner()
            self._phase = _Phase.CALL
        return called

    def _say(self, text: str) -> None:
        trim_left = bool(self._delivered) or self._reasoning is not None
        self._emit(TextDelta(self._content.push(text, trim_left=trim_left)))

    def _call(self) -> bool:
        if self._calls is None or self._scanner is None:
            raise InternalError("a call without its grammar")
        end = self._scanner.feed(self._window, self._at)
        if end is None:
            self._at = len(self._window)
            if not self._final:
                return False
            end = self._scanner.finish()
        stop = self._attempt_start + len(self._calls.open) + end.length
        self._window, self._at, self._base = end.text, end.at, stop - end.at
        self._phase = _Phase.CONTENT
        self._settle(stop, end.reading, self._calls.open + end.text[end.at - end.length : end.at])
        return True

    def _settle(self, stop: int, read: Reading, text: str) -> None:
        """Record the attempt that ends at `stop`, and deliver it, or say it as content."""
        status, error = read.status, read.error
        if status is CallStatus.OK and read.name not in self._tools:
            status, error = CallStatus.UNKNOWN_TOOL, f"no tool named {read.name!r} was offered"
        attempt = CallAttempt(self._attempt_start, stop, status, read.name, read.arguments, error)
        self._attempts.append(attempt)
        if status not in _DELIVERED or read.name is None or read.arguments is None:
            self._say(text)
            return
        call = ToolCall(self._new_call_id(), read.name, read.arguments)
        self._events.append(CallDelta(len(self._delivered), call))
        self._delivered.append(call)

    def _sightings(self, raw: str, first: int, last: int, status: CallStatus) -> list[CallAttempt]:
        """Attempts where calls do not count. A tag that no object follows is only talk about calling."""
        grammar, attempts = self._syntax.calls, list[CallAttempt]()
        if grammar is None:
            return attempts
        why = "inside the reasoning" if status is CallStatus.IN_REASONING else "where none was asked for"
        text, at = raw[first:last], 0
        while (start := text.find(grammar.open, at)) >= 0:
            at = start + len(grammar.open)
            if text.startswith("{", skip(SPACE, text, at)):
                scanner = grammar.scanner()
                end = scanner.feed(text, at) or scanner.finish()
                read, at = end.reading, at + end.length
                error = f"a tool call {why}" + (f"; {read.error}" if read.error else "")
                span = (first + start, first + at)
                attempts.append(CallAttempt(*span, status, read.name, read.arguments, error))
        return attempts
