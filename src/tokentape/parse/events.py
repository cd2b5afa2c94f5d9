"""What a parser says: events while the text comes, the whole of it at the end."""

from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

from tokentape.types import ToolCall

REASONING_UNCLOSED = "reasoning_unclosed"
"""`ParseResult.status` of a completion that ended inside its thought."""


class CallStatus(StrEnum):
    """What became of one tool-call attempt. `OK` and `UNKNOWN_TOOL` are delivered, the others stay text."""

    OK = "ok"
    UNKNOWN_TOOL = "unknown_tool"
    """Well formed, but no such tool was offered: the agent answers with an error and the policy learns."""
    INVALID_JSON = "invalid_json"
    """Not one JSON object where the grammar has one."""
    MALFORMED = "malformed"
    """The grammar's own marks are not where they must be."""
    UNCLOSED = "unclosed"
    """Right so far, but the completion ended before the call did."""
    NO_NAME = "no_name"
    """The tool's name is missing, empty or not a string."""
    BAD_ARGUMENTS = "bad_arguments"
    """The arguments are there and not an object."""
    OUTSIDE_SECTION = "outside_section"
    """Well formed, but not between the marks that calls must stand between."""
    IN_REASONING = "in_reasoning"
    """Written inside the thought: never executed."""
    NOT_OFFERED = "not_offered"
    """Written in a turn that offered no tools, or forbade calls."""


DELIVERED = (CallStatus.OK, CallStatus.UNKNOWN_TOOL)


@dataclass(frozen=True, slots=True)
class CallAttempt:
    """One tool-call attempt. `start:end` are characters of the completion's text, the call's marks included.

    `name` and `arguments` are as far as they could be read; `arguments` is the JSON text of an object: as
    sampled where the grammar writes JSON, "{}" where the model wrote none. `error` says in words what is
    wrong, None when nothing is.
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
class ArgumentsDelta:
    """More of the arguments of a call that is still being written; never empty.

    A promise of nothing: the call may yet turn out malformed, and then its text follows as a `TextDelta`.
    Where the `CallDelta` of this `index` follows, the deltas since the last event of another kind are its
    arguments, all of them.
    """

    index: int
    name: str
    text: str


@dataclass(frozen=True, slots=True)
class CallDelta:
    """A complete call. `index` counts the delivered calls of the completion from 0."""

    index: int
    call: ToolCall


SaidEvent: TypeAlias = TextDelta | ReasoningDelta | CallDelta
"""What is certain: it is never taken back."""
ParseEvent: TypeAlias = SaidEvent | ArgumentsDelta


class PieceKind(StrEnum):
    """What a run of a completion's text is."""

    REASONING = "reasoning"
    CONTENT = "content"
    CALL = "call"
    """One delivered call, its marks included."""
    MARKUP = "markup"
    """Tags of thoughts, marks of sections and channels, and the space beside them."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of a completion's text. All pieces joined are the text, character by character."""

    kind: PieceKind
    text: str


@dataclass(frozen=True, slots=True)
class ParseResult:
    """What a whole completion says.

    `content` is all `TextDelta`s joined; None when there was nothing but calls or reasoning. `reasoning` is
    all `ReasoningDelta`s joined; None when no thought was opened, "" when it was empty. `tool_calls` are the
    very objects of the `CallDelta`s. `attempts` stand in the text's order. `reasoning_closed` is False when
    the completion ended inside the thought. `status` is `REASONING_UNCLOSED` then, else the status of the
    first attempt that is not "ok", else "ok". `stopped`: a stop string matched. `pieces` joined are the text
    up to it.
    """

    content: str | None
    reasoning: str | None
    tool_calls: tuple[ToolCall, ...]
    attempts: tuple[CallAttempt, ...]
    reasoning_closed: bool
    status: str
    stopped: bool
    pieces: tuple[Piece, ...]
