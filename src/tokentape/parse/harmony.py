"""Harmony, gpt-oss's way to write: all text stands in messages of channels.

    <|channel|>analysis<|message|>A thought.<|end|>
    <|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|>
    <|start|>assistant<|channel|>final<|message|>An answer.<|return|>

The prompt ends with `<|start|>assistant`, so the first message begins behind it. The recipient may stand
before the channel too, as the chat template writes it.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tokentape.parse.events import CallStatus
from tokentape.parse.grammar import Call, Ends, Writer
from tokentape.parse.json_calls import read_arguments
from tokentape.parse.jsonscan import broken
from tokentape.parse.source import Malformed, Source, Steps, marks
from tokentape.types import Json

START, CHANNEL, MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>")
_RECIPIENT = re.compile(r"(?:^|[\s>])to=([^\s<]+)")
_CHANNEL = re.compile(r"<\|channel\|>(\w+)")


@dataclass(frozen=True, slots=True)
class Harmony:
    """The grammar of calls, and of thoughts, which are the messages of `thoughts` channels."""

    thoughts: tuple[str, ...] = ("analysis",)

    @property
    def begins(self) -> tuple[str, ...]:
        """See `Grammar`."""
        return (CHANNEL, START)

    @property
    def at_start(self) -> tuple[str, ...]:
        """See `Grammar`."""
        return (" to=",)

    @property
    def one_call_stop(self) -> str | None:
        """See `Grammar`: a call is the last of its completion anyway."""
        return None

    def rule(self, names: Sequence[str], schema_of: Callable[[str], Json]) -> Json | None:
        """See `Grammar`."""
        del names, schema_of
        return None

    def read(self, src: Source, out: Writer) -> Steps[None]:
        """Read one message, its header first."""
        src.keep()
        header = list[str]()
        found = yield from src.until(marks(MESSAGE, *_ENDS), header.append)
        text = "".join(header)
        recipient, channel = _RECIPIENT.search(text), _CHANNEL.search(text)
        is_thought = channel is not None and channel[1] in self.thoughts
        if recipient and recipient[1] != "assistant" and not is_thought:
            src.rewind()
            if not (yield from out.attempt(_read_call, Ends(_ENDS, (START,), skip=len(START)))):
                out.text(src.take(src.at + 1))
            return
        src.forget()
        if found != MESSAGE:  # a header that no message follows
            out.text(text + src.take_mark(found or ""))
            return
        out.markup(text + src.take_mark(MESSAGE))
        start = src.position
        if is_thought:
            out.begin_thought()
        found = yield from src.until(marks(*_ENDS, START), out.thought if is_thought else out.text)
        if is_thought and recipient and recipient[1] != "assistant" and src.position > start:
            out.called_in_thought(start, _name_of(recipient))
        if is_thought and found is not None:
            out.end_thought()
        if found in _ENDS:
            out.markup(src.take_mark(found))

    def read_channels(self, src: Source, out: Writer) -> Steps[None]:
        """Read a whole completion."""
        if (yield from src.starts(*self.at_start)) is not None:
            yield from self.read(src, out)
        while (yield from src.until(marks(*self.begins), out.text)) is not None:
            yield from self.read(src, out)


def _name_of(recipient: re.Match[str]) -> str:
    return recipient[1].removeprefix("functions.")


def _read_call(src: Source, call: Call) -> Steps[None]:
    header: list[str] = []
    found = yield from src.until(marks(MESSAGE, *_ENDS), header.append)
    recipient = _RECIPIENT.search("".join(header))
    if found is None:
        yield from src.more()
    if recipient is None:
        raise Malformed(CallStatus.NO_NAME, "the call has no recipient")
    call.read_name(_name_of(recipient))
    if found != MESSAGE:
        raise Malformed(CallStatus.MALFORMED, f"{found} stands where the message must begin")
    src.take_mark(MESSAGE)
    yield from src.space()
    if (yield from src.peek()) != "{":
        raise broken("no object follows the header")
    yield from read_arguments(src, call)
    yield from src.space()
    if src.final and src.at == len(src.text):  # the mark is the engine's stop token
        return
    found = yield from src.expect((*_ENDS, START), broken("something follows the object"))
    if found in _ENDS:
        src.take_mark(found)
