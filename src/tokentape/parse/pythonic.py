"""Calls written as Python: `[get_weather(city="Paris", days=2), get_time(tz="CET")]`. Gemma, Llama 4."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tokentape.parse import literals
from tokentape.parse.events import CallStatus
from tokentape.parse.grammar import Call, Ends, Writer
from tokentape.parse.jsonscan import is_readable
from tokentape.parse.source import Malformed, NotACall, Sink, Source, Steps, skip
from tokentape.parse.values import quote
from tokentape.types import Json

_NAME = re.compile(r"[A-Za-z_][\w.\-]*+")
_BARE = re.compile(r"[^'\"()\[\]{},]++")
_IN_BRACKETS = re.compile(r"[^'\"()\[\]{}]++")
_QUOTES = ("'''", '"""', "'", '"')
_IN_QUOTES = {
    quote: re.compile(rf"[^\\{quote[0]}]*+(?:\\.[^\\{quote[0]}]*+)*+", re.DOTALL) for quote in _QUOTES
}
_MAX_NAME = 256


@dataclass(frozen=True, slots=True)
class PythonicCalls:
    """A list of calls with keyword arguments. `open` and `close` may stand around it (Llama 4)."""

    open: str = ""
    close: str = ""

    @property
    def begins(self) -> tuple[str, ...]:
        """See `Grammar`."""
        return (self.open, "[") if self.open else ("[",)

    @property
    def at_start(self) -> tuple[str, ...]:
        """See `Grammar`."""
        return ()

    @property
    def one_call_stop(self) -> str | None:
        """See `Grammar`."""
        return None

    def rule(self, names: Sequence[str], schema_of: Callable[[str], Json]) -> Json | None:
        """See `Grammar`."""
        del names, schema_of
        return None

    def read(self, src: Source, out: Writer) -> Steps[None]:
        """See `Grammar`."""
        opened = bool(self.open) and src.text.startswith(self.open, src.at)
        if opened:
            src.take_mark(self.open)
            yield from src.space()
            if (yield from src.starts("[")) is None:
                raise NotACall
        yield from _check_head(src)
        src.rewind()
        if opened:
            out.glue(src.take_mark(self.open))
            out.glue((yield from src.space()))
        mark: str | None = "["
        while mark in ("[", ","):
            out.glue(src.take_mark(mark))
            out.glue((yield from src.space()))
            if not (yield from out.attempt(_read_call, Ends((")]",)))):
                break
            out.glue((yield from src.space()))
            mark = yield from src.starts(",", "]")
        if mark == "]" and (yield from src.starts("]")) is not None:
            out.glue(src.take_mark(mark))
        if opened and (yield from src.starts(self.close)) is not None:
            out.glue(src.take_mark(self.close))


def _check_head(src: Source) -> Steps[None]:
    """Read `[name(key=` or `[name()`.

    Raises:
        NotACall: something else stands here: a list, a link, an index.
    """
    try:
        src.take_mark("[")
        yield from src.space()
        yield from _read_name(src)
        if (yield from src.peek()) != "(":
            raise NotACall
        src.take_mark("(")
        yield from src.space()
        if (yield from src.peek()) == ")":
            return
        yield from _read_name(src)
        yield from src.space()
        if (yield from src.peek()) != "=":
            raise NotACall
    except Malformed:
        raise NotACall from None


def _read_call(src: Source, call: Call) -> Steps[None]:
    call.name = yield from _read_name(src)
    if (yield from src.peek()) != "(":
        raise Malformed(CallStatus.MALFORMED, "no bracket follows the name")
    src.take_mark("(")
    parts: list[str] = []

    def say(text: str) -> None:
        parts.append(text)
        call.argue(text)

    say("{")
    keys = set[str]()
    while (yield from _skip_to(src)) != ")":
        if keys:
            if src.text[src.at] != ",":
                raise Malformed(CallStatus.MALFORMED, "a comma is missing between the arguments")
            src.take_mark(",")
            if (yield from _skip_to(src)) == ")":
                break
        key = yield from _read_name(src)
        if key in keys:
            raise Malformed(CallStatus.MALFORMED, f"the argument {key!r} stands twice")
        if (yield from _skip_to(src)) != "=":
            raise Malformed(CallStatus.BAD_ARGUMENTS, "an argument has no name")
        src.take_mark("=")
        say((", " if keys else "") + quote(key) + ": ")
        keys.add(key)
        value: list[str] = []
        yield from _scan_value(src, value.append)
        try:
            found = literals.to_json("".join(value))
        except ValueError as error:
            raise Malformed(CallStatus.BAD_ARGUMENTS, f"the argument {key!r}: {error}") from None
        if not is_readable(found):
            raise Malformed(CallStatus.BAD_ARGUMENTS, f"the argument {key!r}: a number is too long")
        say(found)
    src.take_mark(")")
    say("}")
    call.arguments = "".join(parts)


def _skip_to(src: Source) -> Steps[str]:
    yield from src.space()
    return (yield from src.peek())


def _read_name(src: Source) -> Steps[str]:
    while True:
        end = skip(_NAME, src.text, src.at)
        if end < len(src.text) or src.final or end - src.at > _MAX_NAME:
            break
        if end == src.at and src.at < len(src.text):
            break
        yield
    if end == src.at:
        yield from src.peek()
        raise Malformed(CallStatus.MALFORMED, f"no name stands at {src.text[src.at]!r}")
    return src.take(end)


def _scan_value(src: Source, sink: Sink) -> Steps[None]:
    """Read a Python expression up to the comma or bracket that ends it; strings may contain these."""
    depth = 0
    while True:
        sink(src.take(skip(_IN_BRACKETS if depth else _BARE, src.text, src.at)))
        char = yield from src.peek()
        if char in "'\"":
            yield from _scan_string(src, sink)
        elif char in "([{":
            depth += 1
            sink(src.take_mark(char))
        elif char in ")]}," and not depth:
            return
        elif char in ")]}":
            depth -= 1
            sink(src.take_mark(char))


def _scan_string(src: Source, sink: Sink) -> Steps[None]:
    # Two quotes are an empty string, three open a long one: the third decides.
    while len(src.text) - src.at < len("'''") and not src.final:
        yield
    mark = next(quote for quote in _QUOTES if src.text.startswith(quote, src.at))
    opened = src.position
    sink(src.take_mark(mark))
    while True:
        sink(src.take(skip(_IN_QUOTES[mark], src.text, src.at)))
        while src.ends_inside(src.at, ("\\?", mark)):
            yield from src.more(opened)
        if src.text.startswith(mark, src.at):
            sink(src.take_mark(mark))
            return
        if src.text[src.at] == mark[0]:
            sink(src.take(src.at + 1))
