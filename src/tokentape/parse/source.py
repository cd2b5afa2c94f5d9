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
    """The text cannot be a call. `read` characters of it were understood: its end is sought behind them."""

    def __init__(self, status: CallStatus, why: str, *, read: int = 0) -> None:
        super().__init__(why)
        self.status = status
        self.read = read


class NotACall(Exception):
    """The text only looked like a call's beginning: it is content, and no attempt."""


class Marks:
    """Texts that a reader looks for. None may be the beginning of another: the first would always win."""

    def __init__(self, texts: tuple[str, ...]) -> None:
        self.texts = tuple(dict.fromkeys(text for text in texts if text))
        self.pattern = re.compile("|".join(map(re.escape, self.texts)) or r"(?!)")
        self._longest = max(map(len, self.texts), default=0)
        self._firsts = re.compile("|".join(sorted({re.escape(text[0]) for text in self.texts})) or r"(?!)")

    def num_partial(self, text: str, at: int) -> int:
        """How many characters at the end of `text[at:]` may be the beginning of a mark, short of all of it."""
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
        before = "".join(self._kept or ())
        self.text = before + self.text[self._kept_from :]
        self._base -= len(before) - self._kept_from
        self._kept, self._kept_from, self.at = [], 0, 0

    def take(self, end: int) -> str:
        """Read up to `text[end]`."""
        text = self.text[self.at : end]
        self.at = end
        return text

    def take_mark(self, mark: str) -> str:
        """Read a mark that is known to stand here."""
        return self.take(self.at + len(mark))

    def more(self) -> Steps[None]:
        """Wait for more text.

        Raises:
            Malformed: there is none.
        """
        if self.final:
            raise Malformed(CallStatus.UNCLOSED, "the completion ended inside the call")
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
            rest = self.text[self.at :]
            if self.final or not any(text.startswith(rest) for text in texts):
                return None
            yield

    def until(self, marks: Marks, sink: Sink) -> Steps[str | None]:
        """Read on to the first of the marks, which then stands here; None where the text ends without."""
        while True:
            found = marks.pattern.search(self.text, self.at)
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
