"""Weights that change under a gateway: their names, their order, the pause in which they are exchanged."""

import asyncio
import logging
from collections.abc import Collection, Iterable

from tokentape.engines.base import EngineInfo
from tokentape.engines.resume import UNNAMED, ResumingEngine
from tokentape.errors import NotPaused, WeightsDiffer
from tokentape.store import Store
from tokentape.tape import version_order
from tokentape.types import Json

log = logging.getLogger(__name__)


class Weights:
    """What the engine samples with, now and before.

    A version is a name. The engine's own report wins; what a caller announces names weights that the engine
    has no name for.
    """

    def __init__(self, engine: ResumingEngine, store: Store) -> None:
        self._engine = engine
        self._store = store
        self._versions: dict[str, None] = {}
        self._loading = asyncio.Lock()
        self.num_pauses = 0  # and resumes: how often somebody has said so

    async def load(self) -> None:
        """Read what the store knows; a name that a caller gave last still holds.

        Others on the store may have put versions, and their order is the store's.
        """
        async with self._loading:  # else an older answer may come last
            known = await self._store.versions()
            was = next(reversed(self._versions), None)
            self._versions = {version: None for version, _ in known}
            if known:
                version, said_by = known[-1]
                if version != was and said_by == "caller":
                    self._engine.version = version
                    self._engine.doubt()

    async def saw(self, versions: Iterable[str]) -> None:
        """Remember versions that the engine named, in the order of their coming.

        Raises:
            StoreError: they could not be made durable.
        """
        if new := [version for version in versions if version not in self._versions]:
            for version in new:
                await self._store.put_version(version, "engine")
            await self.load()

    async def oldest(self, versions: Collection[str]) -> str | None:
        """The oldest of these versions, None of none.

        Raises:
            StoreError: one is another gateway's, and its place cannot be read.
        """
        if not self._versions.keys() >= set(versions):
            await self.load()
        order = version_order(self._versions)
        return min(versions, key=lambda version: order.get(version, len(order)), default=None)

    async def announce(self, version: str) -> Json:
        """Take note that the engine has new weights of this name; what is in force then.

        Raises:
            EngineError: the engine does not answer.
            NotPaused: the engine has no name for its weights, and they are sampling.
            WeightsDiffer: the engine is several servers, and they name different weights.
        """
        info = await self._engine.reported()
        if info.differs:
            each = ", ".join(f"{url}: {name}" for url, name in info.weight_versions.items())
            raise WeightsDiffer(
                f"the engine's servers sample with different weights ({each}); each token has its own "
                "server's name. Give the update to those that missed it, or take them away",
                param="version",
            )
        said = info.weight_version
        if said not in (None, UNNAMED):
            await self.saw([said])
            if said != version:
                log.warning("weights: announced as %r, the engine says %r: that holds", version, said)
            return self._state(info, said, "engine")
        if self._engine.num_running:
            raise NotPaused(
                f"the engine does not name its weights, and {self._engine.num_running} generations are under "
                "way: POST /pause first, exchange the weights, announce them, then POST /resume",
                param="version",
            )
        await self._store.put_version(version, "caller")
        await self.load()
        self._engine.version = version
        return self._state(info, version, "caller")

    async def pause(self) -> Json:
        """Interrupt what is being sampled and hold it, with all that comes, until `resume`.

        Raises:
            EngineError: the engine does not answer; the gateway is paused all the same.
        """
        self.num_pauses += 1
        num_running = self._engine.num_running
        await self._engine.pause()
        return {"paused": self._engine.paused, "interrupted": num_running}

    def resume(self) -> Json:
        """Let everything go on."""
        self.num_pauses += 1
        self._engine.resume()
        return {"paused": self._engine.paused}

    async def state(self) -> Json:
        """What is in force: `version` is null where several servers differ, `servers` has the name at each.

        Raises:
            EngineError: the engine does not answer.
        """
        info = await self._engine.reported()
        said = info.weight_version
        if said in (None, UNNAMED) and self._engine.version is not None and not info.differs:
            return self._state(info, self._engine.version, "caller")
        return self._state(info, said, "engine")

    def _state(self, info: EngineInfo, version: str | None, said_by: str) -> Json:
        order = version_order(self._versions)
        return {
            "version": version,
            "said_by": said_by,
            "servers": dict(info.weight_versions),
            "versions": sorted(order, key=order.__getitem__),
            "paused": self._engine.paused,
            "running": self._engine.num_running,
        }
