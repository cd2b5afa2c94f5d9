"""Gateways as Ray actors, wherever Ray puts them, and the front that makes one of them all.

The process that makes the cluster has the front and looks after the replicas: one that dies is replaced, and
its sessions are free at once; as the load changes, replicas come and go. What replicas owe each other they
settle through the store: a supervisor that is wrong, or dead, costs time and never a token.
"""

# Ray's own types are unknown in many places.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportMissingTypeStubs=false
import asyncio
import contextlib
import logging
import math
import signal
import threading
from collections.abc import AsyncGenerator, Coroutine
from dataclasses import dataclass, replace
from typing import Any, Self

import ray
import uvloop
from ray.exceptions import RayActorError, RayError

from tokentape.errors import ConfigError, StoreError
from tokentape.gateway.service import ServiceConfig, started, tune
from tokentape.scale.config import ScaleConfig
from tokentape.scale.front import front
from tokentape.shared import SharedStore
from tokentape.stores import is_shared, open_store

log = logging.getLogger(__name__)

_OLDEST = (2, 49)
_PATIENCE = 3  # looks that a replica may miss
_START_S = 300.0  # Ray may have to wait for a machine
_CALM = 10  # looks in a row with too little load before a replica goes


@dataclass(frozen=True, slots=True)
class ReplicaInfo:
    """A replica as the supervisor knows it: `load` is the requests that it answers or keeps waiting."""

    replica_id: str
    url: str
    node: str
    load: int


class _Actor:
    """A gateway inside a Ray actor."""

    def __init__(self) -> None:
        self._open = contextlib.AsyncExitStack()

    async def start(self, config: ServiceConfig) -> tuple[str, str, str]:
        """Run the gateway; its replica's id, its URL, and its node."""
        tune()
        here = replace(config, host=ray.util.get_node_ip_address(), port=0)
        url, self._gateway = await self._open.enter_async_context(started(here))
        store: Any = self._gateway.store
        return store.replica_id, url, ray.get_runtime_context().get_node_id()

    async def load(self) -> int:
        """How many requests it is answering, or keeps waiting."""
        return self._gateway.api.admission.load

    async def stop(self) -> None:
        """Give all sessions to the others, and finish what is being answered."""
        await self._open.aclose()


class _Supervisor:
    """Keeps as many replicas as there are to be."""

    def __init__(self, service: ServiceConfig, scale: ScaleConfig, store: SharedStore) -> None:
        self._service = service
        self._scale = scale
        self._store = store
        remote: Any = ray.remote
        self._make = remote(num_cpus=scale.num_cpus, max_concurrency=10_000, scheduling_strategy="SPREAD")(
            _Actor
        )
        self._there: dict[str, tuple[Any, ReplicaInfo]] = {}  # by URL
        self._missed: dict[str, int] = {}
        self._starting: set[asyncio.Task[None]] = set()
        self._stopping: set[asyncio.Task[None]] = set()
        self._calm = 0
        self.wanted = scale.replicas

    @property
    def urls(self) -> list[str]:
        """Where the replicas are."""
        return list(self._there)

    @property
    def replicas(self) -> list[ReplicaInfo]:
        """The replicas that are there."""
        return [info for _, info in self._there.values()]

    async def start_one(self) -> None:
        """Start a replica.

        Raises:
            ConfigError: it says that its options are wrong.
        """
        actor = self._make.remote()
        try:
            async with asyncio.timeout(_START_S):
                replica_id, url, node = await asyncio.wrap_future(actor.start.remote(self._service).future())
        except BaseException as error:
            ray.kill(actor)
            cause = getattr(error, "cause", None)  # Ray wraps what an actor raises
            if isinstance(cause, ConfigError):
                raise cause from None
            raise
        self._there[url] = actor, ReplicaInfo(replica_id, url, node, 0)
        log.info("replica %s: %s", replica_id, url)

    async def watch(self) -> None:
        """Replace what died, start and stop as the load says; for ever."""
        while True:
            await asyncio.sleep(self._scale.look_s)
            await asyncio.gather(*(self._look(url) for url in self.urls))
            self._decide()
            self._settle()

    async def stop(self) -> None:
        """Stop all replicas, each with its answers finished."""
        for task in self._starting:
            task.cancel()
        await asyncio.gather(*self._starting, *self._stopping, return_exceptions=True)
        await asyncio.gather(*(self._stop(url) for url in self.urls))

    def _settle(self) -> None:
        """Start what is missing, stop what is too much: the youngest."""
        for _ in range(self.wanted - len(self._there) - len(self._starting)):
            _keep(self._starting, self._start())
        for url in self.urls[max(self.wanted, 0) :]:
            _keep(self._stopping, self._stop(url))

    async def _start(self) -> None:
        try:
            await self.start_one()
        except (ConfigError, RayError, TimeoutError) as error:
            log.warning("a replica does not start: %s", " ".join(str(error).split())[:500])
            await asyncio.sleep(self._scale.look_s)

    async def _stop(self, url: str) -> None:
        actor, info = self._there.pop(url)  # from now on the front asks the others
        log.info("replica %s: stopping", info.replica_id)
        with contextlib.suppress(RayError, TimeoutError):
            async with asyncio.timeout(2 * self._service.drain_s + self._service.lease_s):
                await asyncio.wrap_future(actor.stop.remote().future())
        ray.kill(actor)

    async def _look(self, url: str) -> None:
        actor, info = self._there[url]
        try:
            async with asyncio.timeout(max(self._scale.look_s, 1.0)):
                load = await asyncio.wrap_future(actor.load.remote().future())
        except RayActorError:
            await self._bury(url)
        except (RayError, TimeoutError):
            self._missed[url] = self._missed.get(url, 0) + 1
            if self._missed[url] >= _PATIENCE:
                ray.kill(actor)
                await self._bury(url)
        else:
            self._missed.pop(url, None)
            if url in self._there:
                self._there[url] = actor, replace(info, load=load)

    async def _bury(self, url: str) -> None:
        """A replica is dead: whoever is asked for its sessions may take them now."""
        self._missed.pop(url, None)
        if (found := self._there.pop(url, None)) is None:
            return
        log.warning("replica %s: dead", found[1].replica_id)
        try:
            await self._store.dismiss(found[1].replica_id)
        except StoreError as error:  # its lease runs out by itself
            log.warning("replica %s: %s", found[1].replica_id, error)

    def _decide(self) -> None:
        """As many replicas as the load asks for: more at once, fewer when it has been so for a while."""
        load = sum(info.load for info in self.replicas)
        asked = min(max(math.ceil(load / self._scale.turns_per_replica), self._scale.least), self._scale.most)
        if self._scale.least == self._scale.most:
            return
        self._calm = self._calm + 1 if asked < self.wanted else 0
        if asked > self.wanted or self._calm >= _CALM:
            log.info("load %d: %d replicas", load, asked)
            self.wanted, self._calm = asked, 0


def _keep(tasks: "set[asyncio.Task[None]]", work: Coroutine[Any, Any, None]) -> None:
    """Have a task done, and hold it until it is."""
    task = asyncio.ensure_future(work)
    tasks.add(task)
    task.add_done_callback(tasks.discard)


@contextlib.asynccontextmanager
async def clustered(service: ServiceConfig, scale: ScaleConfig) -> AsyncGenerator[tuple[str, _Supervisor]]:
    """Run replicas on Ray behind one URL while the context is open; yields it.

    Raises:
        ConfigError: the store is no PostgreSQL, Ray cannot be used, or a replica's options are wrong.
    """
    if not is_shared(service.store):
        raise ConfigError("replicas share a store: give --store postgresql://…")
    if service.advertise is not None:
        raise ConfigError("--advertise is one gateway's: on Ray each says where it is by itself")
    await asyncio.to_thread(_connect, scale.address)
    _take_signals_back()
    store: Any = await asyncio.to_thread(open_store, service.store)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(store.aclose)
        supervisor = _Supervisor(service, scale, store)
        stack.push_async_callback(supervisor.stop)
        await supervisor.start_one()  # alone: what is wrong is said once
        await asyncio.gather(*(supervisor.start_one() for _ in range(scale.replicas - 1)))
        url = await stack.enter_async_context(
            front(
                lambda: supervisor.urls,
                service.host,
                service.port,
                max_body_bytes=service.http.max_body_bytes,
                drain_s=service.drain_s,
            )
        )
        watching = asyncio.ensure_future(supervisor.watch())
        try:
            yield url, supervisor
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)


def _connect(address: str | None) -> None:
    found = tuple(int(part) for part in ray.__version__.split(".")[:2])
    if found < _OLDEST:
        needed = ".".join(map(str, _OLDEST))
        raise ConfigError(f"Ray {ray.__version__} is too old: install {needed} or newer")
    if ray.is_initialized():
        return
    try:
        ray.init(address=address, log_to_driver=False, include_dashboard=False if address is None else None)
    except (RuntimeError, OSError, ValueError) as error:  # no such cluster, or one of another version
        raise ConfigError(f"Ray at {address or 'this machine'}: {' '.join(str(error).split())}") from error


def _take_signals_back() -> None:
    """Ray has put handlers of its own over Python's, which abort the process where it should finish."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            if (handler := signal.getsignal(number)) is not None:
                signal.signal(number, handler)


class Cluster:
    """Gateways on Ray behind one `url`, for as long as the context is open.

        with Cluster(ServiceConfig(model=…, engine=…, store="postgresql://…"), ScaleConfig(replicas=3)) as c:
            c.url

    It has a thread of its own, and may be used from any.

    Raises:
        ConfigError: as `clustered`, when the context opens.
    """

    def __init__(self, service: ServiceConfig, scale: ScaleConfig | None = None) -> None:
        self._config = service, scale or ScaleConfig()
        self._loop = uvloop.new_event_loop()
        self._open = contextlib.AsyncExitStack()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tokentape-scale", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            self.url, self._supervisor = self._do(self._open.enter_async_context(clustered(*self._config)))
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *raised: object) -> None:
        try:
            self._do(self._open.aclose())
        finally:
            self._end()

    @property
    def replicas(self) -> list[ReplicaInfo]:
        """The replicas that are there."""
        return self._supervisor.replicas

    def scale(self, replicas: int) -> None:
        """Have so many replicas from now on; they come and go while agents are served.

        Where the load decides (`max_replicas`), it decides again at the next look.

        Raises:
            ConfigError: a cluster has at least one.
        """
        if replicas < 1:
            raise ConfigError("a cluster has at least one replica")
        self._supervisor.wanted = replicas

    def _do(self, work: "Coroutine[Any, Any, Any]") -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
