"""Calls written with a mark around each parameter: Qwen3-Coder, Nemotron, GLM, MiniMax, DeepSeek V3.2."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tokentape.parse.events import CallStatus
from tokentape.parse.grammar import Call, Ends, Section, Writer, read_section, section_rule
from tokentape.parse.source import SPACE, Malformed, Sink, Source, Steps, marks, skip
from tokentape.parse.values import TEXT, Typing, quote, types_of
from tokentape.types import Json

_MAX_GAP = 80  # characters that a mark behind a value is waited for: templates write a newline at most


@dataclass(frozen=True, slots=True)
class XmlCalls:
    """`open NAME name_end`, `key_open KEY key_end value_open VALUE value_end` for each parameter, `close`.

    Where `name_end` is empty, the name goes on to the first parameter, or to `close`. Where `key_end` is
    `" string="`, the model says itself whether a value is a string (`kind_end` follows `true` or `false`).
    `newlines`: one newline at each edge of a value belongs to the marks. `typing` is how a value's text is
    read. `style` is xgrammar's name for parameters written this way; without one no call can be demanded.

    A value may hold any text, the marks' own included: it ends where its closing mark is followed by what
    can follow it, another parameter or `close`. It cannot hold the end of the call.
    """

    open: str
    name_end: str
    key_open: str
    key_end: str
    value_end: str
    close: str
    value_open: str = ""
    kind_end: str = ""
    section: Section | None = None
    newlines: bool = False
    typing: Typing = TEXT
    style: str = ""

    @property
    def begins(self) -> tuple[str, ...]:
        """See `Grammar`."""
        return (self.open,) if self.section is None else (self.section.open, self.open)

    @property
    def at_start(self) -> tuple[str, ...]:
        """See `Grammar`."""
        return ()

    @property
    def one_call_stop(self) -> str | None:
        """See `Grammar`."""
        return self.close

    def read(self, src: Source, out: Writer) -> Steps[None]:
        """See `Grammar`."""
        if self.section is not None and src.text.startswith(self.section.open, src.at):
            yield from read_section(src, out, self.section, self.open, self.close, self._read_call)
        else:
            outside = self.section is not None and not self.section.optional
            yield from out.attempt(self._read_call, Ends((self.close,)), outside=outside)

    def rule(self, names: Sequence[str], schema_of: Callable[[str], Json]) -> Json | None:
        """See `Grammar`."""
        if not self.style:
            return None
        space = "\n" if self.newlines else ""
        tags: list[Json] = [
            {
                "type": "tag",
                "begin": f"{self.open}{name}{self.name_end}{space}",
                "content": {**schema_of(name), "style": self.style},
                "end": space + self.close,
            }
            for name in names
        ]
        return section_rule(self.section, tags, separator=space, space=space)

    def _read_call(self, src: Source, call: Call) -> Steps[None]:
        src.take_mark(self.open)
        yield from self._read_name(src, call)
        parts: list[str] = []

        def say(text: str) -> None:
            parts.append(text)
            call.argue(text)

        say("{")
        keys = set[str]()
        while (yield from self._another(src, call)):
            key = yield from self._read_key(src)
            if key in keys:
                raise Malformed(CallStatus.MALFORMED, f"the parameter {key!r} stands twice")
            say((", " if keys else "") + quote(key) + ": ")
            keys.add(key)
            yield from self._read_value(src, types_of(call.schema, key), say)
        src.take_mark(self.close)
        say("}")
        call.arguments = "".join(parts)

    def _read_name(self, src: Source, call: Call) -> Steps[None]:
        parts: list[str] = []
        found = yield from src.until(marks(self.name_end, self.key_open, self.close, self.open), parts.append)
        if found is None:
            yield from src.more()
        if found not in ((self.name_end,) if self.name_end else (self.key_open, self.close)):
            raise Malformed(CallStatus.MALFORMED, f"{found} stands where the tool's name must end")
        call.read_name("".join(parts).strip())
        src.take_mark(self.name_end)

    def _another(self, src: Source, call: Call) -> Steps[bool]:
        """Whether another parameter begins here, and not the end of the call."""
        yield from src.space()
        error = f"something stands between the parameters of {call.name!r}"
        found = yield from src.expect((self.key_open, self.close), Malformed(CallStatus.MALFORMED, error))
        return found == self.key_open

    def _read_key(self, src: Source) -> Steps[str]:
        src.take_mark(self.key_open)
        parts: list[str] = []
        found = yield from src.until(marks(self.key_end, self.value_end, self.close), parts.append)
        if found is None:
            yield from src.more()
        key = "".join(parts).strip()
        if found != self.key_end or not key:
            raise Malformed(CallStatus.MALFORMED, "a parameter has no name")
        src.take_mark(self.key_end)
        if self.value_open:
            yield from src.space()
            error = Malformed(CallStatus.MALFORMED, f"the parameter {key!r} has no value")
            src.take_mark((yield from src.expect((self.value_open,), error)))
        return key

    def _read_value(self, src: Source, types: frozenset[str], say: Sink) -> Steps[None]:
        if self.kind_end:
            error = Malformed(CallStatus.MALFORMED, "a parameter does not say whether it is a string")
            kind = yield from src.expect((f"true{self.kind_end}", f"false{self.kind_end}"), error)
            src.take_mark(kind)
            types = frozenset({"string"}) if kind.startswith("true") else frozenset()
        if self.typing.is_text(types):
            say('"')
            yield from self._scan_value(src, lambda text: say(quote(text)[1:-1]))
            say('"')
        else:
            parts: list[str] = []
            yield from self._scan_value(src, parts.append)
            say(self.typing.to_json("".join(parts), types))

    def _scan_value(self, src: Source, sink: Sink) -> Steps[None]:
        if self.newlines:
            sink = _Newlines(sink)
        ends = marks(self.value_end, self.close)
        while (found := (yield from src.until(ends, sink))) is not None:
            if found == self.value_end:
                if (yield from _is_followed(src, found, self.key_open, self.close)):
                    src.take_mark(found)
                    return
            elif self.section is None or (yield from _is_followed(src, found, self.section.close, self.open)):
                raise Malformed(CallStatus.MALFORMED, f"{self.value_end} is missing")
            sink(src.take_mark(found))
        yield from src.more()


def _is_followed(src: Source, mark: str, *texts: str) -> Steps[bool]:
    """Whether one of `texts` stands behind the mark that stands here, with little space between."""
    while True:
        at = src.at + len(mark)
        behind = skip(SPACE, src.text, at)
        if behind - at > _MAX_GAP:
            return False
        if src.text.startswith(texts, behind):
            return True
        if src.final or not src.ends_inside(behind, texts):
            return False
        yield


class _Newlines:
    """Passes a value on without one newline at each edge."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._begun = False
        self._held = ""

    def __call__(self, text: str) -> None:
        if text and not self._begun:
            self._begun = True
            text = text.removeprefix("\n")
        if text:
            text, self._held = self._held + text, ""
            if text.endswith("\n"):
                text, self._held = text[:-1], "\n"
            if text:
                self._sink(text)
