"""Calls written as JSON: an object with the name in it, or a name and then an object."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from tokentape.parse.events import CallStatus
from tokentape.parse.grammar import Call, Ends, Section, Writer, read_section, section_rule
from tokentape.parse.jsonscan import broken, is_readable, read_string, scan_value
from tokentape.parse.source import Malformed, NotACall, Sink, Source, Steps, marks
from tokentape.types import Json

_ARGUMENTS = ("arguments", "parameters")
_KEYS = ("name", "type", "id", *_ARGUMENTS)
_JSON_TYPES = {'"': "a string", "[": "a list", "n": "null", "t": "a boolean", "f": "a boolean"}


class _Body(msgspec.Struct):
    """A call as JSON; other keys are ignored."""

    name: Any = None
    id: Any = None
    arguments: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    parameters: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


_decode_body = msgspec.json.Decoder(_Body).decode
_check = msgspec.json.Decoder(msgspec.Raw).decode


@dataclass(frozen=True, slots=True)
class JsonCalls:
    """Each call is `{"name": …, "arguments": {…}}` between `open` and `close`; `parameters` will do as well.

    Hermes, Qwen. With a `separator` (Llama 3) a call may stand bare where the content begins, and more of
    them behind it. `list_open` is what stands before a JSON list of calls (Mistral Nemo), `list_close` behind
    it.
    """

    open: str = "<tool_call>"
    close: str = "</tool_call>"
    separator: str = ""
    list_open: str = ""
    list_close: str = ""

    @property
    def begins(self) -> tuple[str, ...]:
        """See `Grammar`."""
        return tuple(mark for mark in (self.open, self.list_open) if mark)

    @property
    def at_start(self) -> tuple[str, ...]:
        """See `Grammar`."""
        return ("{",) if self.separator else ()

    @property
    def one_call_stop(self) -> str | None:
        """See `Grammar`."""
        return self.close or None

    def read(self, src: Source, out: Writer) -> Steps[None]:
        """See `Grammar`."""
        if self.list_open and src.text.startswith(self.list_open, src.at):
            yield from self._read_list(src, out)
        elif self.separator:
            yield from self._read_bare(src, out)
        else:
            yield from out.attempt(self._read_tagged, Ends((self.close,)))

    def rule(self, names: Sequence[str], schema_of: Callable[[str], Json]) -> Json | None:
        """See `Grammar`."""
        before, key, after = f"{self.open}\n", "arguments", f"\n{self.close}"
        if self.separator:  # bare
            before, key, after = "", "parameters", ""
        elif not (self.open and self.close):
            return None
        tags: list[Json] = [
            {
                "type": "tag",
                "begin": f'{before}{{"name": {json.dumps(name, ensure_ascii=False)}, "{key}": ',
                "content": schema_of(name),
                "end": f"}}{after}",
            }
            for name in names
        ]
        return section_rule(None, tags, separator=self.separator or "\n")

    def _read_tagged(self, src: Source, call: Call) -> Steps[None]:
        src.take_mark(self.open)
        yield from src.space()
        yield from _read_object(src, call, bare=False)
        yield from close_call(src, self.close)

    def _read_bare(self, src: Source, out: Writer) -> Steps[None]:
        """`<|python_tag|>{…};{…}`: the mark may be missing where the content begins."""
        tagged = bool(self.open) and src.text.startswith(self.open, src.at)
        if tagged:
            out.glue(src.take_mark(self.open))
            out.glue((yield from src.space()))

        def read(src: Source, call: Call) -> Steps[None]:
            return _read_object(src, call, bare=not tagged)

        while (yield from out.attempt(read, Ends(before=(self.separator, self.open)))):
            out.glue((yield from src.space()))
            if (yield from src.starts(self.separator)) is None:
                break
            out.glue(src.take_mark(self.separator))
            out.glue((yield from src.space()))
            if (yield from src.starts("{")) is None:
                break

    def _read_list(self, src: Source, out: Writer) -> Steps[None]:
        out.glue(src.take_mark(self.list_open))
        out.glue((yield from src.space()))
        if (yield from src.starts("[")) is None:
            raise NotACall
        mark: str | None = "["
        while mark in ("[", ","):
            out.glue(src.take_mark(mark))
            out.glue((yield from src.space()))
            yield from out.attempt(_read_item, Ends(before=(self.list_open, self.list_close)))
            out.glue((yield from src.space()))
            mark = yield from src.starts(",", "]")
        if mark == "]":
            out.glue(src.take_mark(mark))
            if self.list_close:
                out.glue((yield from src.space()))
                if (yield from src.starts(self.list_close)) is not None:
                    out.glue(src.take_mark(self.list_close))


@dataclass(frozen=True, slots=True)
class NamedCalls:
    """A name, then the arguments as JSON: `open NAME name_end {…} close`, with space wherever one likes.

    DeepSeek, Kimi, Mistral. `id_begin` stands between the name and the call's id, where the model writes one
    (Mistral). `numbered` names are `functions.NAME:INDEX`, which is the call's id as well (Kimi).
    """

    open: str
    name_end: str
    close: str = ""
    section: Section | None = None
    id_begin: str = ""
    numbered: bool = False

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
        return self.close or None

    def read(self, src: Source, out: Writer) -> Steps[None]:
        """See `Grammar`."""
        if self.section is not None and src.text.startswith(self.section.open, src.at):
            yield from read_section(src, out, self.section, self.open, self.close, self._read_call)
            return
        behind = (self.close.strip(),) if self.close else ()
        before = () if self.close else (self.open,)
        ends = Ends(behind, before, skip=len(self.open))
        outside = self.section is not None and not self.section.optional
        yield from out.attempt(self._read_call, ends, outside=outside)

    def rule(self, names: Sequence[str], schema_of: Callable[[str], Json]) -> Json | None:
        """See `Grammar`."""
        if not self.close:  # a tag must end with something
            return None
        head, ahead = self.name_end, list[Json]()
        if self.numbered:
            head = ":"
            ahead = [
                {"type": "regex", "pattern": "[0-9]{1,4}"},
                {"type": "const_string", "value": self.name_end},
            ]
        tags: list[Json] = [
            {
                "type": "tag",
                "begin": f"{self.open}{'functions.' if self.numbered else ''}{name}{head}",
                "content": {"type": "sequence", "elements": [*ahead, schema_of(name)]}
                if ahead
                else schema_of(name),
                "end": self.close,
            }
            for name in names
        ]
        return section_rule(self.section, tags, separator="")

    def _read_call(self, src: Source, call: Call) -> Steps[None]:
        src.take_mark(self.open)
        yield from self._read_head(src, call)
        yield from src.space()
        if (yield from src.peek()) != "{":
            raise broken("no object follows the name")
        yield from read_arguments(src, call)
        yield from close_call(src, self.close)

    def _read_head(self, src: Source, call: Call) -> Steps[None]:
        """Read up to the mark behind the name, and an id where there is one."""
        parts: list[str] = []
        name_end = self.name_end.strip()
        ends = marks(name_end, self.id_begin, self.open, self.close.strip(), "{")
        found = yield from src.until(ends, parts.append)
        name = "".join(parts).strip()
        if self.id_begin and found == self.id_begin:
            src.take_mark(self.id_begin)
            parts.clear()
            found = yield from src.until(marks(name_end, self.open, "{"), parts.append)
            call.id = _sampled_id("".join(parts).strip())
        if found is None:
            yield from src.more()
        if found != name_end:
            raise Malformed(CallStatus.MALFORMED, f"{name_end} does not follow the name")
        if self.numbered:
            numbered = _NUMBERED.fullmatch(name)
            if numbered is None:
                raise Malformed(CallStatus.NO_NAME, "the call is not named functions.NAME:INDEX")
            call.id, name = name, numbered[1]
        call.read_name(name)
        src.take_mark(name_end)


_ID = re.compile(r"[A-Za-z0-9]{9}")
_NUMBERED = re.compile(r"(?:functions\.)?(.+):\d+", re.DOTALL)


def _sampled_id(value: object) -> str | None:
    """An id that the model gave a call, if it is one that Mistral's templates take back."""
    return value if isinstance(value, str) and _ID.fullmatch(value) else None


def read_arguments(src: Source, call: Call) -> Steps[None]:
    """Read a call's arguments, a JSON value that begins here.

    Raises:
        Malformed: it is not JSON.
    """
    parts: list[str] = []

    def argue(text: str) -> None:
        parts.append(text)
        call.argue(text)

    yield from scan_value(src, argue)
    arguments = "".join(parts)
    check_json(arguments)
    call.arguments = arguments


def check_json(text: str) -> None:
    """Check that a text is JSON that Python reads.

    Raises:
        Malformed: it is not.
    """
    if not is_readable(text):
        raise broken("a number is too long")
    try:
        _check(text.encode("utf-8", "surrogatepass"))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise broken(str(error)) from None


def close_call(src: Source, close: str) -> Steps[None]:
    """Read space and the mark that ends a call; an empty mark is always there.

    Raises:
        Malformed: something else stands there.
    """
    if not close:
        return
    close, read = close.strip(), src.position
    yield from src.space()
    error = "the call is not JSON: something follows the object"
    src.take_mark((yield from src.expect((close,), Malformed(CallStatus.INVALID_JSON, error, read=read))))


def _read_item(src: Source, call: Call) -> Steps[None]:
    yield from _read_object(src, call, bare=False)


def _read_object(src: Source, call: Call, *, bare: bool) -> Steps[None]:
    """Read `{"name": …, "arguments": {…}}`; with `bare`, an object of other keys is no call at all.

    RFC 8259's JSON, with neither NaN nor a lone surrogate, and no key twice: a call has one meaning. Nothing
    is repaired: a string that contains an object is not an object (SGLang forwards it, encoded twice).
    """
    whole: list[str] = []
    put = whole.append
    if (yield from src.peek()) != "{":
        raise broken("no object stands where the call begins")
    mark, seen = "{", set[str]()
    while mark != "}":
        put(src.take_mark(mark))
        put((yield from src.space()))
        if (yield from src.peek()) != '"':
            if src.text[src.at] == "}" and not seen:
                break
            raise broken("a key is missing")
        key = yield from _read_key(src, put)
        if bare and not seen and key not in _KEYS:
            raise NotACall
        if key in seen or {key, *seen}.issuperset(_ARGUMENTS):
            raise broken(f"{key!r} is one key too many")
        seen.add(key)
        yield from _read_member(src, call, key, put)
        put((yield from src.space()))
        mark = yield from src.peek()
        if mark not in ",}":
            raise broken(f"unexpected {mark!r}")
    put(src.take_mark("}"))
    _settle(call, "".join(whole), bare=bare)


def _read_key(src: Source, put: Sink) -> Steps[str]:
    """Read a key, its colon, and the space around that."""
    parts: list[str] = []
    yield from scan_value(src, parts.append)
    key = "".join(parts)
    put(key)
    put((yield from src.space()))
    if (yield from src.peek()) != ":":
        raise broken("a colon is missing")
    put(src.take_mark(":"))
    put((yield from src.space()))
    return read_string(key)


def _read_member(src: Source, call: Call, key: str, put: Sink) -> Steps[None]:
    """Read one value of the call's object, and tell the call what it means."""
    parts: list[str] = []
    if key not in _ARGUMENTS or (yield from src.peek()) != "{":
        yield from scan_value(src, parts.append)
    else:

        def argue(text: str) -> None:
            parts.append(text)
            call.argue(text)

        yield from scan_value(src, argue)
    value = "".join(parts)
    put(value)
    if key == "name" and value.startswith('"'):
        call.name = read_string(value) or None


def _settle(call: Call, text: str, *, bare: bool) -> None:
    """Decode the call, whose object has ended.

    Raises:
        Malformed: it is not JSON, or no call.
    """
    try:
        body = _decode_body(text.encode("utf-8", "surrogatepass"))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise broken(str(error)) from None
    raw = body.parameters if body.arguments is msgspec.UNSET else body.arguments
    arguments = "{}" if raw is msgspec.UNSET else bytes(raw).decode("utf-8", "surrogatepass")
    if not arguments.startswith("{"):
        what = _JSON_TYPES.get(arguments[0], "a number")
        raise Malformed(CallStatus.BAD_ARGUMENTS, f"the call's arguments are {what}, not an object")
    check_json(arguments)
    call.arguments = arguments
    call.id = _sampled_id(body.id)
    if bare and (call.name is None or raw is msgspec.UNSET):
        raise NotACall
    if call.name is None:
        raise Malformed(CallStatus.NO_NAME, "the call has no name")
