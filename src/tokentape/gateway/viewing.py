"""The gateway's own sessions as the viewer's source."""

from tokentape.errors import NotFound
from tokentape.gateway.parts import Gateway
from tokentape.gateway.session import Session
from tokentape.gateway.sessions import SESSION_ID
from tokentape.store import SQLiteStore
from tokentape.types import Json
from tokentape.viewer.desk import Desk
from tokentape.viewer.episode import Episode, of_tree, summary_of
from tokentape.viewer.source import Page
from tokentape.viewer.stored import StoreSource, version_of


def desk_of(gateway: Gateway) -> Desk:
    """What the page of a gateway shows."""
    wires = gateway.wires
    return Desk(LiveSource(gateway), gateway.api.config.tokenizer, wire_of=wires.of if wires.is_on else None)


class LiveSource:
    """The sessions of a gateway, also while they grow.

    Those that are not in memory are read in the store: taken into memory to be looked at, they would push out
    sessions that agents use. In a store that replicas share another one may have them in memory, and knows
    more: there they are asked for as agents do.
    """

    kind = "gateway"

    def __init__(self, gateway: Gateway) -> None:
        self.name = gateway.config.model
        self._sessions = gateway.sessions
        self._stored = StoreSource(gateway.store, self.name)
        self._is_alone = isinstance(gateway.store, SQLiteStore)

    async def page(self, *, after: str, limit: int) -> Page:
        """The sessions behind the id `after`."""
        return await self._stored.page(after=after, limit=limit)

    async def version(self, session_id: str) -> str:
        """A text that is another one once anything in the session is."""
        session = await self._in_memory(session_id)
        if session is None:
            return await self._stored.version(session_id)
        return version_of(session.record, len(session.tree), session.failures.total())

    async def summary(self, session_id: str) -> Json:
        """Counts of one session."""
        session = await self._in_memory(session_id)
        if session is None:
            return await self._stored.summary(session_id)
        return await session.read(lambda: summary_of(session.record, session.tree, session.failures))

    async def episode(self, session_id: str) -> Episode:
        """One session with all its turns."""
        session = await self._in_memory(session_id)
        if session is None:
            return await self._stored.episode(session_id)
        return await session.read(lambda: of_tree(session.record, session.tree, session.failures))

    async def _in_memory(self, session_id: str) -> Session | None:
        if not SESSION_ID.fullmatch(session_id):  # no such id was ever given; it may not even be text
            raise NotFound(f"session {session_id!r} does not exist")
        if self._is_alone and not self._sessions.is_here(session_id):
            return None
        return await self._sessions.get(session_id)
