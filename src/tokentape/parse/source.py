"""A completion's text while it grows, and how grammars read it.

A grammar is a generator: straight-line code that yields where it needs more text, and is resumed when there
is more. What it reads must not depend on where the text was cut, so each of these readers waits until its
answer is certain; and it must be linear in the text, so each of them consumes what is certain at once.
"""

import re
from collections.abc import Callable, Generator
from functools import cache
from typing import TypeAlias, TypeVar

from tokentape.parse.events import CallStatus

T = TypeVar("T")
Steps: TypeAlias = Generator[None, None, T]
Sink: TypeAlias = Callable[[str], None]

SPACE = re.compile(r"[ \t\r\n]*+")
"""What JSON calls whitespace; nothing else is space to a parser of this project."""


class Malformed(Exception):  # not an error of ours: it becomes a call's status
    """The text cannot be a call. Up to position `read` it was understood: its end is sought behind that.

    `if_closed` is the status where an end is found there of a call that was only unclosed so far.
    """

    def __init__(
        self, status: CallStatus, why: str, *, read: int = 0, if_closed: CallStatus = CallStatus.MALFORMED
    ) -> None:
        super().__init__(why)
        self.status = status
        self.read = read
        self.if_closed = if_closed


class NotACall(Exception):
    """The text only looked like a call's beginning: it is content, and no attempt."""


class Marks:
    """Texts that a reader looks for. None may be the beginning of another: the first would always win."""

    def __init__(self, texts: tuple[str, ...]) -> None:
        self.texts = tuple(dict.fromkeys(text for text in texts if text))
        self._pattern = re.compile("|".join(map(re.escape, self.texts)) or r"(?!)")
        self._longest = max(map(len, self.texts), default=0)
        self._firsts = re.compile("|".join(sorted({re.escape(text[0]) for text in self.texts})) or r"(?!)")

    def search(self, text: str, at: int = 0) -> re.Match[str] | None:
        """The first of them in `text[at:]`."""
        return self._pattern.search(text, at)

    def num_partial(self, text: str, at: int) -> int:
        """How many characters at the end of `text[at:]` may be the beginning of a mark, but not all of it."""
        at = max(at, len(text) - self._longest + 1)
        while found := self._firsts.search(text, at):
            at = found.start()
            tail = text[at:]
            if any(mark.startswith(tail) for mark in self.texts):
                return len(tail)
            at += 1
        return 0


@cache
def marks(*texts: str) -> Marks:
    """The marks of these texts; empty ones are none. Made once."""
    return Marks(texts)


class Source:
    """The text. `text[at:]` is unread; `text` itself is only what is still needed of the whole."""

    def __init__(self) -> None:
        self.text = ""
        self.at = 0
        self.final = False
        self._base = 0  # where `text` begins in the whole
        self._kept: list[str] | None = None  # what was read since `keep`, and is no longer in `text`
        self._kept_from = 0  # where in `text` that goes on

    @property
    def position(self) -> int:
        """How many characters of the whole have been read."""
        return self._base + self.at

    def feed(self, text: str) -> None:
        """Append more of the completion."""
        if self._kept is not None and self.at > self._kept_from:
            self._kept.append(self.text[self._kept_from : self.at])
        self.text = self.text[self.at :] + text
        self._base += self.at
        self.at = self._kept_from = 0

    def keep(self) -> None:
        """Remember what is read from here on."""
        self._kept, self._kept_from = [], self.at

    def kept(self) -> str:
        """What was read since `keep`."""
        return "".join(self._kept or ()) + self.text[self._kept_from : self.at]

    def forget(self) -> None:
        """Remember no longer."""
        self._kept = None

    def rewind(self) -> None:
        """Unread all since `keep`; it is remembered on."""
        if self._kept:  # else all of it still stands in `text`, which may be long: nothing is copied
            before = "".join(self._kept)
            self.text = before + self.text[self._kept_from :]
            self._base -= len(before) - self._kept_from
            self._kept, self._kept_from = [], 0
        self.at = self._kept_from

    def take(self, end: int) -> str:
        """Read up to `text[end]`."""
        text = self.text[self.at : end]
        self.at = end
        return text

    def take_mark(self, mark: str) -> str:
        """Read a mark that is known to stand here."""
        return self.take(self.at + len(mark))

    def more(self, opened: int | None = None, if_closed: CallStatus = CallStatus.MALFORMED) -> Steps[None]:
        """Wait for more text. `opened` is where the string began that stands open here: was it meant to?

        Raises:
            Malformed: there is none.
        """
        if self.final:
            # What was understood is not read again, lest many calls that never close cost their square.
            read = self.position if opened is None else opened
            raise Malformed(
                CallStatus.UNCLOSED, "the completion ended inside the call", read=read, if_closed=if_closed
            )
        yield

    def peek(self) -> Steps[str]:
        """The character that comes next. Nothing is read.

        Raises:
            Malformed: there is none.
        """
        while self.at == len(self.text):
            yield from self.more()
        return self.text[self.at]

    def space(self) -> Steps[str]:
        """Read the space that stands here, all of it."""
        parts: list[str] = []
        while True:
            parts.append(self.take(skip(SPACE, self.text, self.at)))
            if self.at < len(self.text) or self.final:
                return "".join(parts)
            yield

    def starts(self, *texts: str) -> Steps[str | None]:
        """Which of `texts` stands here, None where none does. Nothing is read."""
        while True:
            for text in texts:
                if self.text.startswith(text, self.at):
                    return text
            if self.final or not self.ends_inside(self.at, texts):
                return None
            yield

    def expect(self, texts: tuple[str, ...], error: Malformed) -> Steps[str]:
        """Which of `texts` stands here. Nothing is read.

        Raises:
            Malformed: `error` where none of them does, and that the text ended where it may be half of one.
        """
        found = yield from self.starts(*texts)
        if found is None and self.ends_inside(self.at, texts):
            yield from self.more()
        if found is None:
            raise error
        return found

    def ends_inside(self, at: int, texts: tuple[str, ...]) -> bool:
        """Whether all that is left of the text from `at` on is the beginning of one of `texts`."""
        num_left = len(self.text) - at
        return any(num_left < len(text) and self.text.endswith(text[:num_left]) for text in texts)

    def until(self, marks: Marks, sink: Sink) -> Steps[str | None]:
        """Read on to the first of the marks, which then stands here; None where the text ends without."""
        while True:
            found = marks.search(self.text, self.at)
            if found:
                sink(self.take(found.start()))
                return found[0]
            num_held = 0 if self.final else marks.num_partial(self.text, self.at)
            sink(self.take(len(self.text) - num_held))
            if self.final:
                return None
            yield


def skip(pattern: re.Pattern[str], text: str, at: int) -> int:
    """The index behind what `pattern` matches at `text[at]`, `at` itself where it matches nothing."""
    found = pattern.match(text, at)
    return found.end() if found else at
