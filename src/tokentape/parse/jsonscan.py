"""One JSON value in growing text: where it ends, found at the speed of regular expressions.

Only what tells the end is checked on the way: strings, brackets, and that no character stands outside of
strings that JSON does not have there. Whoever uses the value decodes it, and learns whether it is JSON.
"""

import re

import msgspec

from tokentape.parse.events import CallStatus
from tokentape.parse.source import Malformed, Sink, Source, Steps, skip

MAX_DEPTH = 256
"""Brackets that a call's JSON may nest: fixed, lest the verdict depend on the interpreter's stack."""

MAX_DIGITS = 4300
"""Digits that a number may have: more of them Python's own JSON does not read."""

_LONG_NUMBER = re.compile(rf"(?<!\d)\d{{{MAX_DIGITS + 1}}}")
_TOKEN = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{}]|\d++', re.DOTALL)
# Outside its strings, JSON has no characters but these and the brackets. Whole strings are skipped in one go.
_PLAIN = re.compile(
    r"""[ \t\r\n,:0-9+\-.eEtrufalsn]*+
    (?:"[^"\\\x00-\x1f]*+(?:\\.[^"\\\x00-\x1f]*+)*+"[ \t\r\n,:0-9+\-.eEtrufalsn]*+)*+""",
    re.DOTALL | re.VERBOSE,
)
_STRING = re.compile(r'[^"\\\x00-\x1f]*+(?:\\.[^"\\\x00-\x1f]*+)*+', re.DOTALL)
_SCALAR = re.compile(r"[0-9+\-.eEtrufalsn]*+")

decode_string = msgspec.json.Decoder(str).decode


def broken(why: str) -> Malformed:
    """That the text is not JSON, and why."""
    return Malformed(CallStatus.INVALID_JSON, f"the call is not JSON: {why}")


def is_readable(text: str) -> bool:
    """Whether Python reads this JSON: it does not nest too deep, and has no number that is too long."""
    if text.count("[") + text.count("{") <= MAX_DEPTH and not _LONG_NUMBER.search(text):
        return True
    depth = 0
    for found in _TOKEN.finditer(text):
        first = found[0][0]
        depth += (first in "[{") - (first in "]}")
        if depth > MAX_DEPTH or (first.isdigit() and len(found[0]) > MAX_DIGITS):
            return False
    return True


def scan_value(src: Source, sink: Sink) -> Steps[None]:
    """Read one JSON value that begins here.

    Raises:
        Malformed: it cannot be JSON, nests too deep, or the text ends inside it.
    """
    char = yield from src.peek()
    if char in "{[":
        yield from _scan_brackets(src, sink)
    elif char == '"':
        yield from _scan_string(src, sink)
    else:
        yield from _scan_scalar(src, sink)


def read_string(text: str) -> str:
    """What a JSON string stands for.

    Raises:
        Malformed: it is none.
    """
    try:
        return decode_string(text.encode("utf-8", "surrogatepass"))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise broken(str(error)) from None


def _scan_string(src: Source, sink: Sink) -> Steps[None]:
    opened = src.position
    sink(src.take_mark('"'))
    while True:
        text, at = src.text, skip(_STRING, src.text, src.at)
        if text.startswith('"', at):
            sink(src.take(at + 1))
            return
        sink(src.take(at))
        if at < len(text) and text[at] != "\\":  # a backslash stops it only where the text ends behind it
            raise broken(f"{text[at]!r} inside a string")
        yield from src.more(opened, CallStatus.INVALID_JSON)


def _scan_scalar(src: Source, sink: Sink) -> Steps[None]:
    while True:
        at = skip(_SCALAR, src.text, src.at)
        if at < len(src.text) and src.text[at] not in ",]} \t\r\n":
            raise broken(f"unexpected {src.text[at]!r}")
        sink(src.take(at))
        if at < len(src.text):
            return
        yield from src.more()


def _scan_brackets(src: Source, sink: Sink) -> Steps[None]:
    depth, in_string, opened = 0, False, 0
    while True:
        text, at = src.text, src.at
        while (at := skip(_STRING if in_string else _PLAIN, text, at)) < len(text):
            char = text[at]
            if in_string and char == "\\":  # the text ends behind it: the pattern takes a whole escape
                break
            if char == '"':
                in_string, opened = not in_string, src.position + at - src.at
            elif not in_string and char in "{[" and depth < MAX_DEPTH:
                depth += 1
            elif not in_string and char in "]}":
                depth -= 1
            else:
                sink(src.take(at))  # what is said does not depend on how the text was cut
                raise broken(_what_is_wrong(char, in_string=in_string))
            at += 1
            if not depth:
                sink(src.take(at))
                return
        sink(src.take(at))
        yield from src.more(opened if in_string else None, CallStatus.INVALID_JSON)


def _what_is_wrong(char: str, *, in_string: bool) -> str:
    if in_string:
        return f"{char!r} inside a string"
    return f"nested deeper than {MAX_DEPTH}" if char in "{[" else f"unexpected {char!r}"
