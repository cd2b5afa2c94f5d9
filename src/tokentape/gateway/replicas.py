"""A gateway among others on one store: whichever is asked, a session is answered by the one that holds it.

Every session has its place among the replicas that are there, the same for whoever works it out. A request
for another's session is passed on; one for a session whose holder has died waits until its lease is over, and
takes it. A replica that is leaving, or that others have joined, gives back the sessions that nobody is using.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from hashlib import blake2b
from typing import cast

import aiohttp
from aiohttp import web

from tokentape.errors import EngineUnavailable, SessionElsewhere, StoreError, TokentapeError
from tokentape.gateway.catchup import catch_up
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
from tokentape.store import SharedStore

log = logging.getLogger(__name__)

_ASK_OTHERS = {*PASSED_ON, *ASKS_OTHERS}
_PATIENCE_S = 30.0  # for a store that is being restarted
_RETRY_S = 0.2
_LEAVE_S = 0.1


def places(session_id: str, urls: Sequence[str]) -> list[str]:
    """The replicas in a session's own order: where one comes or goes, few sessions get another first one."""

    def weight(url: str) -> bytes:
        return blake2b(f"{session_id} {url}".encode(errors="surrogateescape"), digest_size=8).digest()

    return sorted(urls, key=weight)


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
        self._leaving = False
        gateway.sessions.new_id = self._new_id

    async def arrive(self, url: str) -> None:
        """Say that this replica is there, reached at `url`."""
        self._url = url
        await self._store.advertise(url)
        await self._look()
        await catch_up(self._gateway, self._others())

    async def leave(self, within_s: float) -> None:
        """Give every session to the others as soon as nobody is using it."""
        self._leaving = True
        with contextlib.suppress(StoreError):  # its lease runs out by itself
            await self._store.advertise(None)
            until = time.monotonic() + within_s
            while (ids := self._sessions.open_ids()) and time.monotonic() < until:
                for session_id in ids:
                    await self._sessions.release(session_id)
                await asyncio.sleep(_LEAVE_S)

    async def watch(self) -> None:
        """See who comes and goes, and give the sessions back that belong to others now; for ever."""
        while True:
            await asyncio.sleep(self._store.lease_s / 5)
            try:
                await self._look()
                if not self._leaving:
                    for session_id in self._sessions.open_ids():
                        if self._place(session_id) != self._url:
                            await self._sessions.release(session_id)
            except TokentapeError as error:
                log.warning("replicas: %s", error)

    @web.middleware
    async def answered(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """A middleware: the answer of whoever has the session."""
        is_passed_on = bool(PASSED_ON.keys() & request.headers.keys())
        if is_passed_on and (request.method, request.path) in FOR_ALL:
            return await handler(request)
        if (request.method, request.path) in FOR_ALL:
            await self._look()
            return await done_by_all(request, handler, self._others(), PASSED_ON)
        session_id = await asked_for(request) if request.path == "/sessions" else self._named(request)
        if session_id is None and request.path != "/readyz":
            return await handler(request)
        if not self._store.is_leased:  # others may have it by now, and nobody here can look
            await self._wait_for_a_lease(0.0 if _ASK_OTHERS & request.headers.keys() else _PATIENCE_S)
        if is_passed_on or session_id is None:
            return await handler(request)
        return await self._by_its_holder(request, handler, session_id)

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
                if url not in (None, at):
                    at = url
                    continue
                await asyncio.sleep(_RETRY_S)  # nobody reaches it: its lease must run out first
                await self._look()
                at = self._url if is_here or is_gone else self._place(session_id)

    async def _look(self) -> None:
        self._urls = [replica.url for replica in await self._store.replicas()]

    def _place(self, session_id: str) -> str:
        return next(iter(places(session_id, self._urls)), self._url)

    def _others(self) -> list[Peer]:
        return [self._peer(url) for url in self._urls if url != self._url]

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
        watching = asyncio.ensure_future(replicas.watch())
        try:
            yield replicas
        finally:
            watching.cancel()
