"""One gateway in several processes: each session belongs to one of them, whichever is asked.

A process answers for its own sessions and passes other requests on over the owner's unix socket. What
concerns all of them is done by all.
"""

import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import aiohttp
from aiohttp import web

from tokentape.gateway.passing import FOR_ALL, Handler, Peer, asked_for, done_by_all, metrics_of_all, pass_on
from tokentape.gateway.sessions import new_session_id


@dataclass(frozen=True, slots=True)
class Place:
    """This process: number `index` of `count`; `directory` has everybody's socket."""

    index: int
    count: int
    directory: Path

    def owner(self, session_id: str) -> int:
        """Whose session this is: the same in every process, and after every restart."""
        digest = blake2b(session_id.encode(errors="surrogateescape"), digest_size=8).digest()
        return int.from_bytes(digest) % self.count

    def socket_of(self, index: int) -> str:
        """Where a process listens to the others."""
        return str(self.directory / f"{index}.sock")

    def new_session_id(self) -> str:
        """An id of this process that cannot be guessed."""
        while self.owner(session_id := new_session_id()) != self.index:
            pass
        return session_id


@contextlib.asynccontextmanager
async def pinning(
    place: Place, named: Callable[[web.Request], str | None]
) -> AsyncGenerator[tuple[Callable[[web.Request, Handler], Awaitable[web.StreamResponse]], list[Peer]]]:
    """A middleware that passes on what is another's, and the others; `named` is a request's session."""
    async with contextlib.AsyncExitStack() as stack:
        peers: dict[int, Peer] = {}
        for index in range(place.count):
            connector = aiohttp.UnixConnector(place.socket_of(index), limit=0)
            timeout = aiohttp.ClientTimeout(total=None)
            client = aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False)
            peers[index] = Peer(await stack.enter_async_context(client), f"http://process-{index}")
        others = [peer for index, peer in peers.items() if index != place.index]

        @web.middleware
        async def pinned(request: web.Request, handler: Handler) -> web.StreamResponse:
            if _is_from_peer(request):
                return await handler(request)
            if request.path == "/metrics":
                return await metrics_of_all(request, [await _text(handler, request)], others)
            if (request.method, request.path) in FOR_ALL:
                return await done_by_all(request, handler, others)
            session_id = await asked_for(request) if request.path == "/sessions" else named(request)
            owner = place.index if session_id is None else place.owner(session_id)
            return await handler(request) if owner == place.index else await pass_on(request, peers[owner])

        yield pinned, others


def _is_from_peer(request: web.Request) -> bool:
    """Whether it came over the unix socket: it is not passed on again."""
    transport = request.transport
    return transport is not None and not isinstance(transport.get_extra_info("sockname"), tuple)


async def _text(handler: Handler, request: web.Request) -> str:
    own = await handler(request)
    return own.body.decode() if isinstance(own, web.Response) and isinstance(own.body, bytes) else ""
