"""The gateway's own sessions as the viewer's source."""

from tokentape.gateway.parts import Gateway
from tokentape.types import Json
from tokentape.viewer.desk import Desk
from tokentape.viewer.episode import Episode, of_tree, row_of, summary_of
from tokentape.viewer.source import Page
from tokentape.viewer.stored import version_of


def desk_of(gateway: Gateway) -> Desk:
    """What the page of a gateway shows."""
    wires = gateway.wires
    return Desk(LiveSource(gateway), gateway.api.config.tokenizer, wire_of=wires.of if wires.is_on else None)


class LiveSource:
    """The sessions of a gateway, also while they grow."""

    kind = "gateway"

    def __init__(self, gateway: Gateway) -> None:
        self.name = gateway.config.model
        self._sessions = gateway.sessions

    async def page(self, *, after: str, limit: int) -> Page:
        """The sessions behind the id `after`."""
        records = await self._sessions.list_sessions(state=None, after=after, limit=limit + 1)
        return Page([row_of(record) for record in records[:limit]], len(records) > limit)

    async def version(self, session_id: str) -> str:
        """A text that is another one once anything in the session is."""
        session = await self._sessions.get(session_id)
        return version_of(session.record, len(session.tree), session.failures.total())

    async def summary(self, session_id: str) -> Json:
        """Counts of one session."""
        session = await self._sessions.get(session_id)
        return await session.read(lambda: summary_of(session.record, session.tree, session.failures))

    async def episode(self, session_id: str) -> Episode:
        """One session with all its turns."""
        session = await self._sessions.get(session_id)
        return await session.read(lambda: of_tree(session.record, session.tree, session.failures))
