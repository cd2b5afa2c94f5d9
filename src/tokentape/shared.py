"""What a store has besides where gateways on several machines share it: who is there, and until when."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from tokentape.store import Store


@dataclass(frozen=True, slots=True)
class Replica:
    """A gateway among others, reached at `url`. Who is leaving gets no session, but is told what all are."""

    replica_id: str
    url: str
    is_leaving: bool


class SharedStore(Store, Protocol):
    """A store of several gateways, each of which holds the sessions that it writes.

    `lease_s` seconds after a replica was last heard of, the others may take its sessions.
    """

    replica_id: str
    lease_s: float

    @property
    def is_leased(self) -> bool:
        """Whether this replica's lease holds, as far as it knows: nobody else can have its sessions."""
        ...

    @property
    def num_lapses(self) -> int:
        """How often others may have taken this replica's sessions."""
        ...

    async def advertise(self, url: str | None, *, is_leaving: bool = False) -> None:
        """Say where the others reach this replica; None: it is no longer reached."""
        ...

    async def replicas(self) -> Sequence[Replica]:
        """The replicas that are reached."""
        ...

    async def release_all(self, busy: Collection[str]) -> None:
        """Give back all sessions but those `busy`: also the ones that are in no memory."""
        ...

    async def dismiss(self, replica_id: str) -> None:
        """Take a replica's lease away, because it is known to be dead: its sessions are anybody's at once."""
        ...
