"""What is in memory: sessions, of which the least recently used idle ones leave, and what bytes mean."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Generic, Protocol, TypeVar
from weakref import WeakValueDictionary

from msgspec import Raw

from tokentape.tape import Turn
from tokentape.types import Message

_TURN_BYTES = 6_000  # of objects, whatever the turn says
_MESSAGE_BYTES = 600
_TOKEN_BYTES = 11  # an int32, and the text of one more that an engine is sent
_MEMO_BYTES = 32 * 2**20
_MAX_BUSY = 16  # sessions in use that are passed over at a time: the next look goes on behind them


@dataclass(frozen=True, slots=True)
class MemoryLimits:
    """How many sessions stay in memory, and how many bytes of them. Those in use count, and stay."""

    max_sessions: int = 10_000
    max_bytes: int = 4 * 2**30


class Kept(Protocol):
    """What `Memory` keeps. `num_bytes` is roughly its size; one that is not `idle` stays."""

    @property
    def session_id(self) -> str:
        """Its name."""
        ...

    @property
    def num_bytes(self) -> int:
        """Roughly what it takes."""
        ...

    @property
    def idle(self) -> bool:
        """Whether nothing is being done with it."""
        ...


K = TypeVar("K", bound=Kept)
_T = TypeVar("_T")


class Memo:
    """What replayed bytes mean, decoded once; the oldest is forgotten beyond `_MEMO_BYTES`."""

    def __init__(self) -> None:
        self._kept: dict[bytes, tuple[Any, int]] = {}
        self.num_bytes = 0

    def get(self, kind: str, raw: Raw | bytes, decode: Callable[[], _T]) -> _T:
        """The meaning of `raw`; `decode` is asked where it is not known."""
        key = blake2b(raw, digest_size=16, person=kind.encode()).digest()
        if (found := self._kept.get(key)) is not None:
            return found[0]
        meaning, num_bytes = decode(), len(bytes(raw))
        self._kept[key] = meaning, num_bytes
        self.num_bytes += num_bytes
        while self.num_bytes > _MEMO_BYTES and len(self._kept) > 1:
            self.num_bytes -= self._kept.pop(next(iter(self._kept)))[1]
        return meaning


class Memory(Generic[K]):
    """The sessions in memory. There is never more than one of an id.

    Who has got a session may use it as long as it likes: one that has left is found again while anybody has
    it, so that nobody makes a second one beside it. `on_leave` is told of each that leaves for want of room.
    """

    def __init__(self, limits: MemoryLimits, on_leave: Callable[[K], None]) -> None:
        self._limits = limits
        self._on_leave = on_leave
        self._kept: OrderedDict[str, tuple[K, int]] = OrderedDict()  # with the size that is counted
        self._alive: WeakValueDictionary[str, K] = WeakValueDictionary()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, session_id: str) -> K | None:
        """The session of this id, if anybody has it."""
        return self._alive.get(session_id)

    def all(self) -> list[K]:
        """All that anybody has."""
        return list(self._alive.values())

    def see(self, one: K) -> None:
        """Find it while anybody has it, and no longer."""
        self._alive[one.session_id] = one

    def use(self, one: K) -> None:
        """Keep it: it was used just now, and has the size that it has now."""
        num_bytes, before = one.num_bytes, self._kept.get(one.session_id)
        self._kept[one.session_id] = one, num_bytes
        if before is None:
            self.see(one)
            self.num_bytes += num_bytes
        else:
            self._kept.move_to_end(one.session_id)
            self.num_bytes += num_bytes - before[1]
        if self._is_full():
            self._shrink(one)

    def let_go(self, one: K) -> None:
        """Keep it no longer."""
        kept = self._kept.get(one.session_id)
        if kept is not None and kept[0] is one:
            del self._kept[one.session_id]
            self.num_bytes -= kept[1]

    def forget(self, one: K) -> None:
        """Find it no more, whoever has it: another may have its id."""
        self.let_go(one)
        if self._alive.get(one.session_id) is one:
            del self._alive[one.session_id]

    def _is_full(self) -> bool:
        return len(self._kept) > self._limits.max_sessions or self.num_bytes > self._limits.max_bytes

    def _shrink(self, newest: K) -> None:
        num_busy = 0
        while self._is_full() and num_busy < _MAX_BUSY:
            one, _ = next(iter(self._kept.values()))
            if one is newest:
                return
            if one.idle:
                self.let_go(one)
                self._on_leave(one)
            else:
                self._kept.move_to_end(one.session_id)
                self._kept.move_to_end(newest.session_id)
                num_busy += 1


def size_of(turn: Turn) -> int:
    """Roughly what a turn takes in memory, in bytes: its ids, its texts, and its place in the tree."""
    num_bytes = (
        _TURN_BYTES + _TOKEN_BYTES * (len(turn.prompt) + len(turn.completion)) + 4 * len(turn.logprobs)
    )
    num_bytes += sum(_text_bytes(message) for message in turn.messages) + _text_bytes(turn.reply)
    if turn.support is not None:
        num_bytes += len(turn.support.ids) + len(turn.support.logprobs) + len(turn.support.lengths)
    if turn.routed_experts is not None:
        num_bytes += len(turn.routed_experts.data)
    return num_bytes


def _text_bytes(message: Message) -> int:
    calls = sum(len(call.arguments) + len(call.name) for call in message.tool_calls)
    return _MESSAGE_BYTES + len(message.content or "") + len(message.reasoning or "") + calls
