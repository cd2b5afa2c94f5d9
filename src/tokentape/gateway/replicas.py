"""A gateway among others on one store: whichever is asked, a session is answered by the one that holds it.

Every session has its place among the replicas that are there, the same for whoever works it out. A request
for another's session is passed on; one for a session whose holder has died waits until its lease is over, and
takes it. A replica that is leaving, or that others have joined, gives back the sessions that nobody is using.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from hashlib import blake2b
from typing import cast

import aiohttp
from aiohttp import web

from tokentape.errors import EngineUnavailable, SessionElsewhere, StoreError, TokentapeError
from tokentape.gateway.catchup import catch_up, orders
from tokentape.gateway.parts import Gateway
from tokentape.gateway.passing import (
    ASKS_OTHERS,
    FOR_ALL,
    PASSED_ON,
    Handler,
    Peer,
    asked_for,
    connector,
    done_by_all,
    pass_on,
)
from tokentape.gateway.sessions import new_session_id
from tokentape.shared import SharedStore

log = logging.getLogger(__name__)

_ASK_OTHERS = {*PASSED_ON, *ASKS_OTHERS}
_PATIENCE_S = 30.0  # for a store that is being restarted
_RETRY_S = 0.2
_LOOK_S = 0.1


def places(session_id: str, urls: Sequence[str]) -> list[str]:
    """The replicas in a session's own order: where one comes or goes, few sessions get another first one."""

    def weight(url: str) -> bytes:
        return blake2b(f"{session_id} {url}".encode(errors="surrogateescape"), digest_size=8).digest()

    return sorted(urls, key=weight)


def _elsewhere(session_ids: Iterable[str], urls: Sequence[str], own: str) -> set[str]:
    return {one for one in session_ids if next(iter(places(one, urls)), own) != own}


class Replicas:
    """This replica and the others. `named` is the session that a request names."""

    def __init__(
        self,
        gateway: Gateway,
        client: aiohttp.ClientSession,
        named: Callable[[web.Request], str | None],
    ) -> None:
        self._gateway = gateway
        self._store = cast("SharedStore", gateway.store)
        self._sessions = gateway.sessions
        self._client = client
        self._named = named
        self._url = ""
        self._urls: list[str] = []
        self._leaving_urls: list[str] = []
        self._leaving = False
        self._looked_at: list[str] = []
        self._at_home: set[str] = set()  # sessions whose place among these is here
        self._knows = asyncio.Event()
        self._seen_lapses = -1  # of the lease: what the others were told before them is known here
        gateway.sessions.new_id = self._new_id
        gateway.engine.is_current = self._is_current

    async def arrive(self, url: str) -> None:
        """Say that this replica is there, reached at `url`; return when it knows what the others know."""
        await self._store.advertise(url)
        self._url = url
        await self._knows.wait()

    async def stay_current(self) -> None:
        """Learn what the others were told while this replica was not there for them; for ever."""
        before = orders(self._gateway)
        while True:
            await asyncio.sleep(_LOOK_S)
            if not (self._url and self._store.is_leased) or self._is_current():
                before = orders(self._gateway)
                continue
            try:
                lapses = self._store.num_lapses
                await self._look()
                await catch_up(self._gateway, self._others(), before)
                self._seen_lapses = lapses
                self._knows.set()
            except TokentapeError as error:
                log.warning("replicas: %s", error)

    def _is_current(self) -> bool:
        """Whether this replica has been told all that the others were: they have always seen it."""
        return self._store.is_leased and self._seen_lapses == self._store.num_lapses

    async def leave(self, until: float) -> None:
        """Give every session to the others as soon as nobody is using it; `until` is in the loop's time."""
        self._leaving = True
        if not self._url:  # it never came
            return
        with contextlib.suppress(StoreError, TimeoutError):  # its lease runs out by itself
            async with asyncio.timeout_at(until):
                await self._store.advertise(self._url, is_leaving=True)
                await self._look()
                held: set[str] | None = None
                while held is None or held:
                    for session_id in self._sessions.open_ids():
                        await self._sessions.release(session_id)
                    busy = set(self._sessions.open_ids())
                    if busy != held:  # finished ones, and those that left memory, are given back here
                        await self._store.release_all(busy)
                    held = busy
                    await asyncio.sleep(_LOOK_S if busy else 0.0)
                await self._store.advertise(None)

    async def watch(self) -> None:
        """See who comes and goes, and give the sessions back that belong to others now; for ever."""
        while True:
            await asyncio.sleep(self._store.lease_s / 5)
            try:
                await self._look()
                if not self._leaving:
                    for session_id in await self._foreign():
                        await self._sessions.release(session_id)
            except TokentapeError as error:
                log.warning("replicas: %s", error)

    async def _foreign(self) -> list[str]:
        """The open sessions here whose place is another; those that were at home are not looked at again."""
        if self._urls != self._looked_at:
            self._looked_at, self._at_home = self._urls, set()
        ids, urls = set(self._sessions.open_ids()), self._urls
        self._at_home &= ids
        unknown = ids - self._at_home
        foreign = await asyncio.to_thread(_elsewhere, unknown, urls, self._url)  # many, where one has come
        self._at_home |= unknown - foreign
        return sorted(foreign)

    @web.middleware
    async def answered(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """A middleware: the answer of whoever has the session."""
        is_passed_on = bool(PASSED_ON.keys() & request.headers.keys())
        if is_passed_on and (request.method, request.path) in FOR_ALL:
            return await handler(request)
        if (request.method, request.path) in FOR_ALL:
            return await self._by_all(request, handler)
        session_id = await asked_for(request) if request.path == "/sessions" else self._named(request)
        if session_id is None and request.path != "/readyz":
            return await handler(request)
        if not self._store.is_leased:  # others may have it by now, and nobody here can look
            await self._wait_for_a_lease(0.0 if _ASK_OTHERS & request.headers.keys() else _PATIENCE_S)
        if is_passed_on or session_id is None:
            return await handler(request)
        return await self._by_its_holder(request, handler, session_id)

    async def _by_all(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Look again when it is done: who came meanwhile, and asked before it was done, is told now."""
        await self._look()
        told = self._others()
        answer = await done_by_all(request, handler, told, PASSED_ON)

        async def done(_: web.Request) -> web.StreamResponse:
            return answer

        await self._look()
        return await done_by_all(request, done, [one for one in self._others() if one not in told], PASSED_ON)

    async def _wait_for_a_lease(self, within_s: float) -> None:
        """Wait for the store to come back; who can ask others is told so at once."""
        until = time.monotonic() + within_s
        while not self._store.is_leased:
            if time.monotonic() >= until:
                raise SessionElsewhere("this replica is cut off from its store; ask another one", url=None)
            await asyncio.sleep(_RETRY_S)

    async def _by_its_holder(
        self, request: web.Request, handler: Handler, session_id: str
    ) -> web.StreamResponse:
        """Ask its place, then whoever is said to have it, until one answers or a lease must be over."""
        until = time.monotonic() + 2 * self._store.lease_s
        at = self._url if self._sessions.is_here(session_id) else self._place(session_id)
        while True:
            try:
                if at in ("", self._url):
                    return await handler(request)
                return await pass_on(request, self._peer(at), PASSED_ON)
            except (EngineUnavailable, SessionElsewhere) as error:
                is_here, is_gone = at in ("", self._url), isinstance(error, EngineUnavailable)
                if (is_here and is_gone) or time.monotonic() > until:  # the engine's own, or too late
                    raise
                url = error.url if isinstance(error, SessionElsewhere) else None
                if url is not None and url != at:
                    at = url
                    continue
                await asyncio.sleep(_RETRY_S)  # nobody reaches it: its lease must run out first
                await self._look()
                at = self._url if is_here or is_gone else self._place(session_id)

    async def _look(self) -> None:
        replicas = await self._store.replicas()
        self._urls = [replica.url for replica in replicas if not replica.is_leaving]
        self._leaving_urls = [replica.url for replica in replicas if replica.is_leaving]

    def _place(self, session_id: str) -> str:
        return next(iter(places(session_id, self._urls)), self._url)

    def _others(self) -> list[Peer]:
        """Who is told what all are told."""
        return [self._peer(url) for url in (*self._urls, *self._leaving_urls) if url != self._url]

    def _peer(self, url: str) -> Peer:
        return Peer(self._client, url)

    def _new_id(self) -> str:
        """An id of this replica that cannot be guessed."""
        while self._place(session_id := new_session_id()) != self._url and self._url in self._urls:
            pass
        return session_id


@contextlib.asynccontextmanager
async def replicated(
    gateway: Gateway, named: Callable[[web.Request], str | None]
) -> AsyncGenerator[Replicas]:
    """This replica while the context is open; it is there when it `arrive`s."""
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=3.0)
    async with aiohttp.ClientSession(connector=connector(), timeout=timeout, auto_decompress=False) as client:
        replicas = Replicas(gateway, client, named)
        tasks = [asyncio.ensure_future(replicas.watch()), asyncio.ensure_future(replicas.stay_current())]
        try:
            yield replicas
        finally:
            for task in tasks:
                task.cancel()
