"""How tool calls are written: one grammar per class, each with a scanner that finds where an attempt ends.

A grammar is a frozen dataclass with its opening mark, `open`, and a `scanner()` for one attempt. A scanner is
fed what follows that mark, in any pieces, and answers with an `AttemptEnd` as soon as it is certain. It knows
nothing of the text around, of the tools on offer, or of streaming events: that is `parse.Parser`.
"""

import re
from dataclasses import dataclass
from enum import Enum, StrEnum, auto
from typing import Any

import msgspec

MAX_DEPTH = 256
"""Brackets that a call's JSON may nest: fixed, lest the verdict depend on the interpreter's stack."""

SPACE = re.compile(r"[ \t\r\n]*+")
"""What JSON calls whitespace; nothing else is space to a parser of this project."""

# Outside its strings, JSON has no characters but these and the brackets. Whole strings are skipped in one go.
_PLAIN = re.compile(
    r"""[ \t\r\n,:0-9+\-.eEtrufalsn]*+
    (?:"[^"\\\x00-\x1f]*+(?:\\.[^"\\\x00-\x1f]*+)*+"[ \t\r\n,:0-9+\-.eEtrufalsn]*+)*+""",
    re.DOTALL | re.VERBOSE,
)
_STRING = re.compile(r'[^"\\\x00-\x1f]*+(?:\\.[^"\\\x00-\x1f]*+)*+', re.DOTALL)
_NAME = re.compile(
    r'[ \t\r\n]*+\{[ \t\r\n]*+"name"[ \t\r\n]*+:[ \t\r\n]*+("[^"\\]*+(?:\\.[^"\\]*+)*+")', re.DOTALL
)
_JSON_TYPES = {'"': "a string", "[": "a list", "n": "null", "t": "a boolean", "f": "a boolean"}


class CallStatus(StrEnum):
    """What became of one tool-call attempt. `OK` and `UNKNOWN_TOOL` are delivered, the others stay text."""

    OK = "ok"
    UNKNOWN_TOOL = "unknown_tool"
    """Well formed, but no such tool was offered: the agent answers with an error and the policy learns."""
    INVALID_JSON = "invalid_json"
    """Not one JSON object between the tags."""
    UNCLOSED = "unclosed"
    """Right so far, but the completion ended before the closing tag."""
    NO_NAME = "no_name"
    """`name` is missing, empty or not a string."""
    BAD_ARGUMENTS = "bad_arguments"
    """`arguments` is there and not an object."""
    IN_REASONING = "in_reasoning"
    """Written inside the thought: never executed."""
    NOT_OFFERED = "not_offered"
    """Written in a turn that offered no tools, or forbade calls."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What a call's text says, whether or not that tool was offered. Fields as in `parse.CallAttempt`."""

    status: CallStatus
    name: str | None = None
    arguments: str | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class AttemptEnd:
    """An attempt ends at `text[at]`, `length` characters behind its opening tag. What follows is unread."""

    text: str
    at: int
    length: int
    reading: Reading


@dataclass(frozen=True, slots=True)
class JsonCalls:
    """The Hermes grammar: each call is `{"name": …, "arguments": {…}}` between tags of its own."""

    open: str = "<tool_call>"
    close: str = "</tool_call>"

    def scanner(self) -> "JsonCallScanner":
        """A scanner for one attempt, to be fed what follows the opening tag."""
        return JsonCallScanner(self.close)


class _Body(msgspec.Struct):
    """A call as JSON. Other keys are ignored; of a repeated key the last counts, as in `json.loads`."""

    name: Any = None
    arguments: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    parameters: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


_decode_body = msgspec.json.Decoder(_Body).decode
_decode_name = msgspec.json.Decoder(str).decode


def read_json_call(text: str) -> Reading:
    r"""Read a call's JSON object; the status is `OK`, `INVALID_JSON`, `BAD_ARGUMENTS` or `NO_NAME`.

    `parameters` counts where `arguments` is missing, as models trained on Llama's grammar write; with neither
    they are "{}", as SGLang has it. JSON is RFC 8259's, with neither NaN nor a lone `\ud800`, and nothing is
    repaired: a string that contains an object is not an object (SGLang forwards it, encoded twice).
    """
    try:
        body = _decode_body(text.encode("utf-8", "surrogatepass"))
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        return Reading(CallStatus.INVALID_JSON, _name_in(text), error=f"the call is not JSON: {e}")
    name: str | None = body.name if isinstance(body.name, str) and body.name else None
    raw = body.parameters if body.arguments is msgspec.UNSET else body.arguments
    arguments = "{}" if raw is msgspec.UNSET else bytes(raw).decode("utf-8", "surrogatepass")
    if not arguments.startswith("{"):
        error = f"the call's arguments are {_JSON_TYPES.get(arguments[0], 'a number')}, not an object"
        return Reading(CallStatus.BAD_ARGUMENTS, name, error=error)
    if name is None:
        return Reading(CallStatus.NO_NAME, None, arguments, "the call has no name")
    return Reading(CallStatus.OK, name, arguments)


def _name_in(text: str) -> str | None:
    """The tool's name in a call that is no JSON, where it can still be read."""
    found = _NAME.match(text)
    if found is None:
        return None
    try:
        return _decode_name(found[1].encode("utf-8", "surrogatepass")) or None
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def skip(pattern: re.Pattern[str], text: str, at: int) -> int:
    """The index behind what `pattern` matches at `text[at]`, `at` itself where it matches nothing."""
    found = pattern.match(text, at)
    return found.end() if found else at


class _Stage(Enum):
    BEFORE = auto()  # space between the opening tag and the object
    OBJECT = auto()
    AFTER = auto()  # the object is read; space, then the closing tag
    BROKEN = auto()  # looking for the closing tag, whatever stands before it


class JsonCallScanner:
    """Finds the end of one `JsonCalls` attempt; strings may contain the closing tag.

    As soon as it is certain that the text cannot be such a call, the attempt ends at the first closing tag
    there is: behind the opening tag when the JSON is broken, behind the object when something follows it.
    What comes later is read afresh. That stays linear: an attempt that begins inside a string of a broken one
    reads the quotes the other way round, so one of the two breaks before the next closing tag, and no
    character is scanned a third time.
    """

    def __init__(self, close: str) -> None:
        self._close = close
        self._stage = _Stage.BEFORE
        self._held: list[str] = []  # what was fed, from the opening tag on
        self._num_held = 0
        self._depth = 0
        self._in_string = False
        self._escaped = False  # the fed text ended between a backslash and its character
        self._begin = 0  # of the object, counted from the opening tag; likewise below
        self._seek_from = 0
        self._tail = ""  # the end of the fed text that may be the beginning of the closing tag
        self._error = ""
        self._reading = Reading(CallStatus.UNCLOSED)

    def feed(self, text: str, at: int = 0) -> AttemptEnd | None:
        """Scan `text[at:]`, which follows what was fed before; None while the attempt goes on."""
        start = at
        at = self._enter(text, at)
        at = self._scan(text, start, at)
        end = self._expect_close(text, start, at) or self._seek_close(text, start)
        if end is None:
            self._held.append(text[start:])
            self._num_held += len(text) - start
        return end

    def finish(self) -> AttemptEnd:
        """The attempt's end when nothing more comes."""
        text = "".join(self._held)
        if self._stage is _Stage.OBJECT and (at := text.find(self._close)) >= 0:
            self._break("a string or bracket is never closed")
            return self._broken(text, 0, at + len(self._close))
        if self._stage is _Stage.BROKEN:
            return self._broken(text, 0, len(text))
        name = self._reading.name or _name_in(text)
        error = "the completion ended inside the call"
        reading = Reading(CallStatus.UNCLOSED, name, self._reading.arguments, error)
        return AttemptEnd(text, len(text), len(text), reading)

    def _break(self, why: str) -> None:
        self._stage = _Stage.BROKEN
        self._error = f"the call is not JSON: {why}"

    def _enter(self, text: str, at: int) -> int:
        if self._stage is not _Stage.BEFORE:
            return at
        begin = skip(SPACE, text, at)
        self._begin = self._num_held + begin - at
        if text.startswith("{", begin):
            self._stage = _Stage.OBJECT
        elif begin < len(text):
            self._break("no object follows the opening tag")
        return begin

    def _scan(self, text: str, start: int, at: int) -> int:
        """Go on to the object's end, the text's end, or the first character that JSON cannot have there."""
        if self._stage is not _Stage.OBJECT:
            return at
        if self._escaped and at < len(text):
            self._escaped = False
            at += 1
        while (at := skip(_STRING if self._in_string else _PLAIN, text, at)) < len(text):
            char = text[at]
            at += 1
            if char == '"':
                self._in_string = not self._in_string
            elif self._in_string and char == "\\":  # the text ends here: the pattern takes a whole escape
                self._escaped = True
            elif self._in_string:
                return self._derail(f"{char!r} inside a string", at)
            elif char in "{[" and self._depth < MAX_DEPTH:
                self._depth += 1
            elif char in "]}":
                self._depth -= 1
                if not self._depth:
                    self._read(text, start, self._num_held + at - start)
                    return at
            elif char in "{[":
                return self._derail(f"nested deeper than {MAX_DEPTH}", at)
            else:
                return self._derail(f"unexpected {char!r}", at)
        return at

    def _derail(self, why: str, at: int) -> int:
        self._break(why)
        return at

    def _whole(self, text: str, start: int) -> tuple[str, int]:
        """The text that holds the attempt so far, and where in it the opening tag ends."""
        return ("".join(self._held) + text[start:], 0) if self._held else (text, start)

    def _read(self, text: str, start: int, end: int) -> None:
        whole, origin = self._whole(text, start)
        self._reading = read_json_call(whole[origin + self._begin : origin + end])
        if self._reading.status is CallStatus.INVALID_JSON:
            self._stage, self._error = _Stage.BROKEN, self._reading.error or ""
        else:
            self._stage, self._seek_from = _Stage.AFTER, end

    def _expect_close(self, text: str, start: int, at: int) -> AttemptEnd | None:
        if self._stage is not _Stage.AFTER:
            return None
        if not self._tail:
            at = skip(SPACE, text, at)
        end = at + len(self._close) - len(self._tail)
        self._tail += text[at:end]
        if self._tail == self._close:
            whole, origin = self._whole(text, start)
            length = self._num_held + end - start
            return AttemptEnd(whole, origin + length, length, self._reading)
        if not self._close.startswith(self._tail):
            self._tail = ""
            self._break("something follows the object")
        return None

    def _seek_close(self, text: str, start: int) -> AttemptEnd | None:
        if self._stage is not _Stage.BROKEN:
            return None
        if not self._tail:  # the first look: the closing tag may have been fed long ago, as part of a string
            whole, origin = self._whole(text, start)
            at = whole.find(self._close, origin + self._seek_from)
            if at >= 0:
                return self._broken(whole, origin, at + len(self._close) - origin)
            self._tail = whole[max(origin + self._seek_from, len(whole) - len(self._close) + 1) :]
            return None
        num_before = self._num_held - len(self._tail)
        window = self._tail + text[start:]
        at = window.find(self._close)
        if at >= 0:
            return self._broken(*self._whole(text, start), num_before + at + len(self._close))
        self._tail = window[-len(self._close) + 1 :]
        return None

    def _broken(self, whole: str, origin: int, length: int) -> AttemptEnd:
        name = self._reading.name or _name_in(whole[origin : origin + length])
        reading = Reading(CallStatus.INVALID_JSON, name, self._reading.arguments, self._error)
        return AttemptEnd(whole, origin + length, length, reading)
