"""A request's messages, each with its identity; a request that goes on from an earlier one costs what is new.

Messages are told apart by digests that leave out what agents change without meaning it: the order of JSON
keys, None for "", the numbering of tool calls, spaces around what the assistant said, reasoning that is not
replayed, volatile text.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, TypeAlias, cast

import msgspec

from tokentape.types import Json, Message
from tokentape.volatile import NOTHING, Volatile, without

Digest: TypeAlias = bytes


@dataclass(slots=True)
class MessageKey:
    """One message's identity in its place. Not to be changed.

    `base` is its meaning without reasoning, `reasoning` a digest of that, None without. `ordinal` is the call
    that a tool result answers: its index among the calls of the assistant message before, -1 for none. Of
    calls that share an id (as where ids are dropped) it is the first without an answer. `message` and
    `turn_id`, the turn that the request names as its origin, are no part of the identity.
    """

    base: Digest
    ordinal: int
    reasoning: Digest | None
    message: Message = field(compare=False)
    turn_id: str | None = field(default=None, compare=False)

    @property
    def by_assistant(self) -> bool:
        """Whether the assistant said it."""
        return self.message.role == "assistant"


@dataclass(frozen=True, slots=True)
class Known:
    """A message with the digests that do not depend on its neighbours; made once per distinct message.

    `volatile`: it has text that does not count. `turn_id` is the turn that said it, where that is known.
    """

    message: Message
    base: Digest
    reasoning: Digest | None
    volatile: bool = False
    turn_id: str | None = None


def know(message: Message, volatile: Volatile = NOTHING) -> Known:
    """The digests of one message."""
    content: str | list[str | int] = message.content or ""
    pieces = volatile.pieces(message)
    if pieces:
        content = without(message.content or "", pieces)
    elif message.role == "assistant":
        content = (message.content or "").strip()
    calls = [(call.name, _canonical(call.arguments)) for call in message.tool_calls]
    reasoning = (message.reasoning or "").strip() if message.role == "assistant" else ""
    base = digest((message.role, content, calls, message.name))
    return Known(message, base, digest(reasoning) if reasoning else None, bool(pieces))


def keys_of(known: Sequence[Known], *, after: Message | None = None) -> list[MessageKey]:
    """The keys of consecutive messages; `after` is the assistant message before them, if there is one."""
    return _keys(known, _ids(after) if after is not None else [])


def frame_key(tools: Sequence[Json], arguments: Mapping[str, Any]) -> tuple[Digest, Digest]:
    """The identity of what is rendered around the messages: tools, template arguments."""
    return digest(_sorted(list(tools))), digest(_sorted(dict(arguments)))


class Conversation:
    """The messages of one request, and what a tree has found out about them.

    Immutable to its readers. Conversations that go on from each other share their lists: each knows how many
    entries are its own, and only where a list has gone on another way is it copied. `walk` is how far the
    tree that it was attached to knows these messages, or those that they go on from: that tree's own note.
    """

    __slots__ = ("_call_ids", "_keys", "_known", "_num", "_waiting", "is_volatile", "walk")

    def __init__(self) -> None:
        self.walk: Any = None
        self.is_volatile = False
        self._keys: list[MessageKey] = []
        self._known: list[Known] = []
        self._num = 0
        self._waiting: list[str | None] = []
        self._call_ids: dict[str, int] = {}

    @classmethod
    def of(cls, known: Sequence[Known]) -> "Conversation":
        """The conversation of these messages."""
        return cls().followed_by(known)

    def __len__(self) -> int:
        return self._num

    def followed_by(self, new: Sequence[Known]) -> "Conversation":
        """The conversation that goes on with `new`; takes time in proportion to that."""
        out = Conversation()
        out.walk = self.walk
        out.is_volatile = self.is_volatile or any(item.volatile for item in new)
        shared = len(self._known) == self._num
        out._known = self._known if shared else self._known[: self._num]
        out._keys = self._keys if shared else self._keys[: self._num]
        ids = self._call_ids
        out._call_ids = ids if shared else {id_: at for id_, at in ids.items() if at < self._num}
        out._waiting = list(self._waiting)
        out._keys += _keys(new, out._waiting)
        for item in new:
            for call in item.message.tool_calls:
                out._call_ids.setdefault(call.id, len(out._known))
            out._known.append(item)
        out._num = len(out._known)
        return out

    def known(self, start: int = 0, end: int | None = None) -> list[Known]:
        """The messages from `start` to `end`."""
        return self._known[start : self._num if end is None else end]

    def has_call(self, call_id: str | None) -> bool:
        """Whether one of the messages makes a call of this id."""
        return self._call_ids.get(call_id or "", self._num) < self._num

    def keys_from(self, start: int) -> list[MessageKey]:
        """The keys of the messages from `start` on."""
        return self._keys[start : self._num]


def _keys(known: Sequence[Known], waiting: list[str | None]) -> list[MessageKey]:
    """Keys of messages; `waiting` are the ids of the calls without an answer, brought up to date."""
    keys: list[MessageKey] = []
    for item in known:
        message, ordinal = item.message, -1
        if message.role == "assistant":
            waiting[:] = _ids(message)
        elif message.role == "tool" and (message.tool_call_id or "") in waiting:
            ordinal = waiting.index(message.tool_call_id or "")
            waiting[ordinal] = None
        keys.append(MessageKey(item.base, ordinal, item.reasoning, message, item.turn_id))
    return keys


def _ids(message: Message) -> list[str | None]:
    """The ids of the calls of an assistant message, to be crossed out as they are answered."""
    return [call.id for call in message.tool_calls]


def digest(value: object) -> Digest:
    """What tells one JSON value from another."""
    return blake2b(msgspec.json.encode(value), digest_size=16).digest()


def _canonical(arguments: str) -> str:
    """JSON text in one form: keys sorted, 1.0 as 1 (as JavaScript writes it); other text as it is."""
    try:
        return json.dumps(_sorted(json.loads(arguments, parse_float=_number)), ensure_ascii=True)
    except (ValueError, RecursionError):
        return arguments


def _number(text: str) -> float | int:
    value = float(text)
    return int(value) if value.is_integer() else value


def _sorted(value: Any) -> Any:
    """Plain JSON data with the keys of every object in order."""
    if isinstance(value, dict):
        object_ = cast("dict[str, Any]", value)
        return {key: _sorted(object_[key]) for key in sorted(object_)}
    if isinstance(value, list | tuple):
        return [_sorted(item) for item in cast("Sequence[Any]", value)]
    return value
