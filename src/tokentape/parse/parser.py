"""The parser: a completion's text in any pieces, what it says in events. No I/O."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tokentape.errors import InternalError
from tokentape.parse.events import (
    DELIVERED,
    REASONING_UNCLOSED,
    ArgumentsDelta,
    CallAttempt,
    CallDelta,
    CallStatus,
    ParseEvent,
    ParseResult,
    Piece,
    PieceKind,
    ReasoningDelta,
    TextDelta,
)
from tokentape.parse.grammar import Call, Ends, Grammar
from tokentape.parse.harmony import Harmony
from tokentape.parse.source import Malformed, NotACall, Source, Steps, marks
from tokentape.parse.text import StopCutter, Trimmed
from tokentape.types import Json, ToolCall

_SPACE_CHARS = " \t\r\n"
_NOT_OFFERED = "a tool call where none was asked for"
_IN_REASONING = "a tool call inside the reasoning"


@dataclass(frozen=True, slots=True)
class ThinkTags:
    """The pair of tags around a thought."""

    open: str = "<think>"
    close: str = "</think>"


@dataclass(frozen=True, slots=True)
class Syntax:
    """How one model family writes. Empty, None: it has no such thing, and text that looks so is content.

    Of several grammars that begin alike, the first that can read a block does.
    """

    calls: tuple[Grammar, ...] = ()
    reasoning: ThinkTags | Harmony | None = None

    @property
    def channels(self) -> Harmony | None:
        """The channels that all text is written in, where the family has them."""
        known = (*self.calls, self.reasoning)
        return next((part for part in known if isinstance(part, Harmony)), None)


class Parser:
    """Parses one completion: `feed` its text as it is decoded, then `finish` once.

    The text has control tokens as text, but not the stop token at its end. `tools` are the schemas of the
    parameters of the tools on offer, by name; without `parse_tools` a call stays content. `reasoning_open`:
    the prompt ended inside a thought; an opening tag at the very start is then swallowed as the same one. The
    text counts up to the first of the `stop` strings, wherever it stands. `new_call_id` names the calls that
    the model did not name.

    Content around delivered calls is joined as it stands, minus the calls; the space at its end is dropped,
    and that at its beginning where a call or a thought came first. Space before text that was shown before
    the first call stays: streaming cannot know yet whether a call will come, and without calls the content is
    exact.
    """

    def __init__(
        self,
        syntax: Syntax,
        *,
        tools: Mapping[str, Json],
        parse_tools: bool,
        reasoning_open: bool,
        stop: tuple[str, ...] = (),
        new_call_id: Callable[[], str],
    ) -> None:
        self._syntax = syntax
        self._tools = tools
        self._parse_tools = parse_tools
        self._reasoning_open = reasoning_open
        self._new_call_id = new_call_id
        self._stop = StopCutter(stop)
        self._src = Source()
        self._events: list[ParseEvent] = []
        self._pieces: list[tuple[PieceKind, list[str]]] = []
        self._content = Trimmed(_SPACE_CHARS)
        self._reasoning: Trimmed | None = None
        self._reasoning_closed = True
        self._thoughts: list[str] = []
        self._thoughts_from = 0  # where the first of them stands
        self._attempts: list[CallAttempt] = []
        self._delivered: list[ToolCall] = []
        self._call_ids = set[str]()
        self._block: list[str] | None = None  # glue of a block of calls, until one of them settles what it is
        self._block_kind: PieceKind | None = None
        self._steps = self._read()
        next(self._steps)

    def feed(self, text: str) -> list[ParseEvent]:
        """Take more of the completion and return what is now certain.

        Raises:
            InternalError: after `finish`.
        """
        if self._src.final:
            raise InternalError("Parser.feed after finish")
        return self._advance(self._stop.feed(text, final=False))

    def finish(self) -> tuple[list[ParseEvent], ParseResult]:
        """The completion is over: the last events, and the whole of it.

        Raises:
            InternalError: when called twice.
        """
        if self._src.final:
            raise InternalError("Parser.finish called twice")
        self._src.final = True
        events = self._advance(self._stop.feed("", final=True))
        if self._reasoning and self._reasoning.parts and not self._reasoning_closed:
            self._emit(ReasoningDelta(self._reasoning.release()))
        if not self._delivered and (self._content.parts or self._reasoning is None):
            self._emit(TextDelta(self._content.release()))
        return events, self._result()

    def _advance(self, text: str) -> list[ParseEvent]:
        self._events = []
        self._src.feed(text)
        next(self._steps, None)
        return self._events

    def _result(self) -> ParseResult:
        attempts = [*self._in_reasoning(), *self._attempts]
        attempts.sort(key=lambda attempt: attempt.start)
        bad = [attempt.status.value for attempt in attempts if attempt.status is not CallStatus.OK]
        content = "".join(self._content.parts)
        return ParseResult(
            content=None if not content and (self._delivered or self._reasoning) else content,
            reasoning="".join(self._reasoning.parts) if self._reasoning else None,
            tool_calls=tuple(self._delivered),
            attempts=tuple(attempts),
            reasoning_closed=self._reasoning_closed,
            status=[*bad, "ok"][0] if self._reasoning_closed else REASONING_UNCLOSED,
            stopped=self._stop.stopped,
            pieces=tuple(Piece(kind, "".join(parts)) for kind, parts in self._pieces),
        )

    # -- what stands where

    def _read(self) -> Steps[None]:
        yield  # started before there is any text
        tags = self._syntax.reasoning
        if self._syntax.channels is not None:
            yield from self._syntax.channels.read_channels(self._src, self)
            return
        if isinstance(tags, ThinkTags):
            yield from self._read_thought(tags)
        yield from self._read_content()

    def _read_thought(self, tags: ThinkTags) -> Steps[None]:
        src = self._src
        if not self._reasoning_open:
            space = yield from src.space()
            opened = yield from src.starts(tags.open)
            if opened is None:
                self._hold(space)
                return
            self.markup(space)
        else:
            opened = yield from src.starts(tags.open)
        self.markup(src.take_mark(opened or ""))
        self.begin_thought("\n")
        if (yield from src.until(marks(tags.close), self.thought)) is not None:
            self.markup(src.take_mark(tags.close))
            self.end_thought()

    def _read_content(self) -> Steps[None]:
        src, calls = self._src, self._syntax.calls
        at_start = tuple(mark for grammar in calls for mark in grammar.at_start)
        if at_start:
            self._hold((yield from src.space()))
            if (yield from src.starts(*at_start)) is not None:
                yield from self._read_block()
        begins = marks(*(mark for grammar in calls for mark in grammar.begins))
        while (yield from src.until(begins, self.text)) is not None:
            yield from self._read_block()

    def _read_block(self) -> Steps[None]:
        """Read the calls that begin here; where no grammar can, the first character is content."""
        src = self._src
        start = src.position
        for grammar in self._syntax.calls:
            if any(src.text.startswith(mark, src.at) for mark in (*grammar.begins, *grammar.at_start)):
                src.keep()
                self._block, self._block_kind = None, None
                try:
                    yield from grammar.read(src, self)
                except NotACall:
                    src.rewind()
                else:
                    self._settle_block(PieceKind.CONTENT)
                src.forget()
                if src.position > start:
                    return
        self.text(src.take(src.at + 1))

    def _in_reasoning(self) -> list[CallAttempt]:
        """The attempts inside the thought, which do not count; a mark without a name is only talk of them."""
        syntax, found = Syntax(self._syntax.calls), list[CallAttempt]()
        if syntax.channels is not None:
            return found
        begins = marks(*(mark for grammar in syntax.calls for mark in grammar.begins))
        text = "".join(self._thoughts)
        if not begins.search(text):
            return found
        parser = Parser(syntax, tools=self._tools, parse_tools=False, reasoning_open=False, new_call_id=str)
        parser.feed(text)
        for attempt in parser.finish()[1].attempts:
            span = (self._thoughts_from + attempt.start, self._thoughts_from + attempt.end)
            error = (attempt.error or "").replace(_NOT_OFFERED, _IN_REASONING)
            status = CallStatus.IN_REASONING
            found.append(CallAttempt(*span, status, attempt.name, attempt.arguments, error))
        return found

    # -- what grammars tell (`grammar.Writer`)

    def text(self, text: str) -> None:
        """Say content."""
        if text:
            self._piece(PieceKind.CONTENT, text)
            trim_left = bool(self._delivered) or self._reasoning is not None
            self._emit(TextDelta(self._content.push(text, trim_left=trim_left)))

    def begin_thought(self, spaces: str = "") -> None:
        """Reasoning begins; of the `spaces` at its edges nothing is said."""
        if self._reasoning is None:
            self._reasoning = Trimmed(spaces)
        self._reasoning_closed = False

    def thought(self, text: str) -> None:
        """Say reasoning."""
        if self._reasoning is None:
            raise InternalError("a thought that did not begin")
        if text:
            self._piece(PieceKind.REASONING, text)
            if not self._thoughts:
                self._thoughts_from = self._src.position - len(text)
            self._thoughts.append(text)
            self._emit(ReasoningDelta(self._reasoning.push(text, trim_left=True)))

    def end_thought(self) -> None:
        """The thought was closed."""
        self._reasoning_closed = True

    def called_in_thought(self, start: int, name: str) -> None:
        """Record a call that was a thought: it stands between position `start` and here."""
        status, end = CallStatus.IN_REASONING, self._src.position
        self._attempts.append(CallAttempt(start, end, status, name, None, _IN_REASONING))

    def markup(self, text: str) -> None:
        """Pass over a tag."""
        self._piece(PieceKind.MARKUP, text)

    def glue(self, text: str) -> None:
        """Pass over what stands around calls: markup if one of them is delivered, else content."""
        if self._block_kind is None:
            self._block = [*(self._block or ()), text]
        elif self._block_kind is PieceKind.CONTENT:
            self.text(text)
        else:
            self.markup(text)

    def attempt(
        self, read: Callable[[Source, Call], Steps[None]], ends: Ends, *, outside: bool = False
    ) -> Steps[bool]:
        """Read one call that begins here; False where it is none, and then nothing was read."""
        src = self._src
        src.keep()
        start = src.position
        call = Call(self._tools, self._on_arguments)
        status, error = CallStatus.OK, None
        try:
            yield from read(src, call)
        except NotACall:
            src.rewind()
            src.forget()
            return False
        except Malformed as failure:
            if call.name is None and not self._parse_tools:  # only talk of calls
                src.rewind()
                src.forget()
                return False
            status, error = failure.status, str(failure)
            closed = yield from self._recover(ends, failure.read)
            if closed and status is CallStatus.UNCLOSED:
                status, error = failure.if_closed, "the call is closed before it is complete"
            if src.position == start:  # the text ended where a call must begin
                if self._block_kind is not None:  # behind another one
                    src.forget()
                    return False
                start -= sum(map(len, self._block or ()))
        if outside and status is CallStatus.OK:
            status, error = CallStatus.OUTSIDE_SECTION, "the call stands outside of the section for calls"
        self._settle(start, call, status, error, src.kept())
        src.forget()
        return True

    # -- what becomes of it

    def _emit(self, event: TextDelta | ReasoningDelta) -> None:
        if event.text:
            self._events.append(event)

    def _piece(self, kind: PieceKind, text: str) -> None:
        if not text:
            return
        if self._pieces and self._pieces[-1][0] is kind and kind is not PieceKind.CALL:
            self._pieces[-1][1].append(text)
        else:
            self._pieces.append((kind, [text]))

    def _hold(self, space: str) -> None:
        """Space at the beginning of the content, if more follows."""
        self._piece(PieceKind.CONTENT, space)
        self._content.held.append(space)

    def _on_arguments(self, name: str, text: str) -> None:
        if self._parse_tools:
            self._events.append(ArgumentsDelta(len(self._delivered), name, text))

    def _settle_block(self, kind: PieceKind) -> None:
        """What the glue of this block is, so far and from here on."""
        if self._block_kind is None:
            self._block_kind = kind
            glue, self._block = self._block or (), None
            for text in glue:
                self.glue(text)

    def _recover(self, ends: Ends, read: int) -> Steps[bool]:
        """Read on to where a failed attempt ends; whether a mark is there that says so."""
        src = self._src
        src.rewind()
        num_sure = max(read - src.position, ends.skip)
        src.take(min(src.at + num_sure, len(src.text)))
        found = yield from src.until(ends.marks, lambda _: None)
        if found is not None and found in ends.behind:
            src.take_mark(found)
        return found is not None

    def _settle(self, start: int, call: Call, status: CallStatus, error: str | None, text: str) -> None:
        """Record the attempt whose text this is, and deliver it, or say it as content."""
        if not self._parse_tools:
            status, error = CallStatus.NOT_OFFERED, _NOT_OFFERED + (f"; {error}" if error else "")
        elif status is CallStatus.OK and call.name not in self._tools:
            status, error = CallStatus.UNKNOWN_TOOL, f"no tool named {call.name!r} was offered"
        end = self._src.position
        self._attempts.append(CallAttempt(start, end, status, call.name, call.arguments, error))
        if status not in DELIVERED or call.name is None or call.arguments is None:
            self._settle_block(PieceKind.CONTENT)
            self.text(text)
            return
        self._settle_block(PieceKind.MARKUP)
        self._piece(PieceKind.CALL, text)
        call_id = call.id if call.id and call.id not in self._call_ids else self._new_call_id()
        self._call_ids.add(call_id)
        if not call.any_argued:
            self._on_arguments(call.name, call.arguments)
        delivered = ToolCall(call_id, call.name, call.arguments)
        self._events.append(CallDelta(len(self._delivered), delivered))
        self._delivered.append(delivered)
