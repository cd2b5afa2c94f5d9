"""Where the viewer's sessions come from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from tokentape.types import Json
from tokentape.viewer.episode import Episode


@dataclass(frozen=True, slots=True)
class Page:
    """Some sessions in the order of their ids: what is known of them without reading their turns."""

    sessions: Sequence[Json]
    has_more: bool


class Source(Protocol):
    """Sessions to look at. `kind` is "gateway", "store" or "file"; `name` says which."""

    kind: str
    name: str

    async def page(self, *, after: str, limit: int) -> Page:
        """The sessions behind the id `after`."""
        ...

    async def version(self, session_id: str) -> str:
        """A text that is another one once anything in the session is; cheap to ask for.

        Raises:
            NotFound: there is no such session.
        """
        ...

    async def summary(self, session_id: str) -> Json:
        """Counts of one session, as `episode.summary_of` makes them; raises as `version`."""
        ...

    async def episode(self, session_id: str) -> Episode:
        """One session with all its turns; raises as `version`."""
        ...
