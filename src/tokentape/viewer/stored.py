"""A store as the viewer's source, beside whoever writes it."""

import asyncio
import time
from collections import Counter
from dataclasses import dataclass

import msgspec

from tokentape.errors import NotFound
from tokentape.store import SessionRecord, Store, StoredSession
from tokentape.tree import Tree
from tokentape.types import Json
from tokentape.viewer.episode import Episode, of_tree, row_of, summary_of
from tokentape.viewer.source import Page

_FRESH_S = 0.5  # a session that was read a moment ago is not read again
_KEPT = 4


def version_of(record: SessionRecord, num_turns: int, num_failures: int) -> str:
    """Another text for every change of a session; a later session of the same id has another one, too."""
    credit = msgspec.json.encode((record.reward, record.turn_rewards, record.branch_rewards, record.metadata))
    return f"{record.created_at!r}-{record.state}-{num_turns}-{num_failures}-{hash(credit):x}"


@dataclass(frozen=True, slots=True)
class _Read:
    at: float
    session: StoredSession


class StoreSource:
    """The sessions of a store; it is read again for every question, so that a running session grows."""

    kind = "store"

    def __init__(self, store: Store, name: str) -> None:
        self.name = name
        self._store = store
        self._read: dict[str, _Read] = {}

    async def page(self, *, after: str, limit: int) -> Page:
        """The sessions behind the id `after`."""
        records = await self._store.list_sessions(state=None, after=after, limit=limit + 1)
        return Page([row_of(record) for record in records[:limit]], len(records) > limit)

    async def version(self, session_id: str) -> str:
        """A text that is another one once anything in the session is."""
        stored = await self._load(session_id)
        return version_of(stored.record, len(stored.turns), len(stored.failures))

    async def summary(self, session_id: str) -> Json:
        """Counts of one session."""
        stored = await self._load(session_id)
        return await asyncio.to_thread(lambda: summary_of(stored.record, _tree(stored), _failures(stored)))

    async def episode(self, session_id: str) -> Episode:
        """One session with all its turns."""
        stored = await self._load(session_id)
        return await asyncio.to_thread(lambda: of_tree(stored.record, _tree(stored), _failures(stored)))

    async def _load(self, session_id: str) -> StoredSession:
        read = self._read.get(session_id)
        if read is None or time.monotonic() - read.at > _FRESH_S:
            stored = await self._store.read(session_id)
            if stored is None:
                raise NotFound(f"session {session_id!r} does not exist")
            read = _Read(time.monotonic(), stored)
            self._read.pop(session_id, None)
            self._read[session_id] = read
            while len(self._read) > _KEPT:
                del self._read[next(iter(self._read))]
        return read.session


def _tree(stored: StoredSession) -> Tree:
    tree = Tree(())
    for turn in stored.turns:
        tree.commit(turn)
    return tree


def _failures(stored: StoredSession) -> Counter[str]:
    return Counter(failure.kind for failure in stored.failures)
