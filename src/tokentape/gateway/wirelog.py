"""What the last turns looked like on the wire, in memory and no larger than it may be: for the viewer."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from tokentape.types import Json

_OVERHEAD = 500  # bytes of objects


@dataclass(frozen=True, slots=True)
class Exchanged:
    """One request and its reply, as bytes; a stream's are all its events."""

    path: str
    request: bytes
    reply: bytes

    @property
    def num_bytes(self) -> int:
        """What it takes in memory."""
        return len(self.request) + len(self.reply) + _OVERHEAD


class WireLog:
    """The last exchanges, by the turns that they made; the oldest make room. Headers are not kept."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[tuple[str, ...], Exchanged] = OrderedDict()
        self._by_turn: dict[str, tuple[str, ...]] = {}
        self.num_bytes = 0

    @property
    def is_on(self) -> bool:
        """Whether anything is kept at all."""
        return self._max_bytes > 0

    def keep(self, turn_ids: Sequence[str], exchanged: Exchanged) -> None:
        """Keep an exchange; a retry's takes the place of the first one's."""
        key = tuple(turn_ids)
        self._forget(key)
        if exchanged.num_bytes > self._max_bytes:
            return
        self._kept[key] = exchanged
        self._by_turn.update(dict.fromkeys(key, key))
        self.num_bytes += exchanged.num_bytes
        while self.num_bytes > self._max_bytes:
            self._forget(next(iter(self._kept)))

    def of(self, turn_id: str) -> Json | None:
        """A turn's request and reply as text, None where they are not kept."""
        key = self._by_turn.get(turn_id)
        if key is None:
            return None
        found = self._kept[key]
        request, reply = (data.decode(errors="backslashreplace") for data in (found.request, found.reply))
        return {"path": found.path, "request": request, "reply": reply}

    def _forget(self, key: tuple[str, ...]) -> None:
        found = self._kept.pop(key, None)
        if found is not None:
            self.num_bytes -= found.num_bytes
            for turn_id in key:
                self._by_turn.pop(turn_id, None)
