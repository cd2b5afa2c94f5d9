"""Episodes on this process's own event loop."""

from collections.abc import Sequence
from typing import Any, Protocol

import pyarrow as pa

from tokentape.rollout.attempt import perform, settle
from tokentape.rollout.control import Control
from tokentape.rollout.records import Attempt, EpisodeFailure, Finished, Settings


class Runner(Protocol):
    """Where attempts run. `samples` of what is finished is whatever `resolve` makes tables of."""

    async def run(self, attempt: Attempt) -> Finished | EpisodeFailure:
        """Run an attempt to its end (`attempt.perform`)."""
        ...

    async def recover(self, session_id: str) -> Finished | None:
        """What became of an attempt of an earlier driver (`attempt.settle`)."""
        ...

    def resolve(self, samples: Sequence[Any]) -> Sequence[pa.Table]:
        """The samples as tables."""
        ...


class Local:
    """The runner that needs nothing."""

    def __init__(self, control: Control, settings: Settings) -> None:
        self._control = control
        self._settings = settings

    async def run(self, attempt: Attempt) -> Finished | EpisodeFailure:
        """Run an attempt here."""
        return await perform(self._control, self._settings, attempt)

    async def recover(self, session_id: str) -> Finished | None:
        """Fetch it here."""
        return await settle(self._control, session_id)

    def resolve(self, samples: Sequence[Any]) -> Sequence[pa.Table]:
        """They are tables."""
        return samples
