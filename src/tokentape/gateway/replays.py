"""What a session's agent sends again with every request: the conversation so far, read once.

An agent repeats its whole history in each request. Where the list of messages begins with the very bytes of
an earlier request's, only the rest is read; comparing them costs what copying them does. A history that was
changed, or is of another of the session's lines, is read message by message, each looked up by its bytes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import msgspec
from msgspec import Raw

from tokentape.conversation import Conversation, Known

_MAX_LINES = 4  # an agent and some sub-agents at a time
_LIST = msgspec.json.Decoder(list[Raw])


@dataclass(frozen=True, slots=True)
class Read:
    """A list of messages as it was read: `num_items` of the wire's, `digest` of their bytes."""

    conversation: Conversation
    num_items: int
    digest: bytes


@dataclass(slots=True)
class _Mark:
    """Where an earlier request's list ended, and what it was up to there.

    `hash` has read all of it; None where a later request went on from here.
    """

    end: int
    conversation: Conversation
    num_items: int
    hash: Any


@dataclass(slots=True)
class _Line:
    """A conversation as it was sent last. `raw` is its JSON list without the bracket at the end."""

    head: object
    raw: bytes
    marks: list[_Mark] = field(default_factory=list[_Mark])


class Replays:
    """The last lists of messages of a session."""

    def __init__(self) -> None:
        self._lines: list[_Line] = []  # the one used last stands last

    @property
    def num_bytes(self) -> int:
        """The size of what is kept of the requests."""
        return sum([len(line.raw) for line in self._lines])

    def read(
        self,
        raw: Raw,
        head: tuple[str, Sequence[Known]],
        decode: Callable[[Sequence[Raw], int, Conversation], Sequence[Known]],
    ) -> Read:
        """Read the JSON list `raw`.

        `head` names the wire, and has the messages that stand before the list's. `decode` is given the items
        that are new, the place of the first and the conversation before them.

        Raises:
            msgspec.DecodeError: it is no list.
        """
        text = bytes(raw)
        line, mark = self._find(text, head)
        start = mark.end if mark is not None else 1
        rest = text[start:-1]
        if mark is None:
            items = _LIST.decode(raw)
            mark = _Mark(1, Conversation.of(head[1]), 0, None)
        else:
            items = _LIST.decode(b"[" + rest[1:] + b"]") if rest else []
        conversation = mark.conversation
        if items:
            conversation = conversation.followed_by(decode(items, mark.num_items, conversation))
        state = blake2b(text[:start], digest_size=16) if mark.hash is None else mark.hash.copy()
        state.update(rest)
        read = Read(conversation, mark.num_items + len(items), state.digest())
        self._keep(line, head, text[:-1], mark, _Mark(len(text) - 1, conversation, read.num_items, state))
        return read

    def _find(self, text: bytes, head: object) -> tuple[_Line | None, _Mark | None]:
        """The line that shares most of its beginning with `text`, and where they part."""
        found: tuple[_Line | None, _Mark | None] = None, None
        for line in reversed(self._lines):
            if line.head != head:
                continue
            view = memoryview(line.raw)
            for mark in reversed(line.marks):
                if found[1] is not None and mark.end <= found[1].end:
                    break
                # What follows must be the list's end, or another item.
                if text.startswith(view[: mark.end]) and text[mark.end : mark.end + 1] in (b",", b"]"):
                    found = line, mark
                    break
        return found

    def _keep(self, line: _Line | None, head: object, raw: bytes, mark: _Mark, last: _Mark) -> None:
        """Remember a list; in the place of the one that it goes on from."""
        if line is not None and mark is line.marks[-1]:
            self._lines.remove(line)
            line.raw = raw
            if last.end > mark.end:
                mark.hash = None
                line.marks.append(last)
        else:  # a line of its own: the other may go on, too
            line = _Line(head, raw, [last])
        self._lines.append(line)
        del self._lines[:-_MAX_LINES]
