"""One base URL before many replicas: a request goes to its session's place, or to whoever is there."""

import asyncio
import contextlib
import itertools
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

import aiohttp
from aiohttp import web

from tokentape.engines.server import serve
from tokentape.errors import EngineUnavailable, SessionElsewhere, TokentapeError, TooLarge
from tokentape.gateway.agents import Refusal, spoken
from tokentape.gateway.passing import ASKS_OTHERS, Peer, asked_for, connector, metrics_of_all, pass_on
from tokentape.gateway.replicas import places

_SESSION = re.compile(r"\A/sessions/([^/]+)")
_RETRY_S = 0.2
_PATIENCE_S = 30.0  # while there is no replica: one is being started


@contextlib.asynccontextmanager
async def front(
    urls: Callable[[], Sequence[str]], host: str, port: int, *, max_body_bytes: int, drain_s: float
) -> AsyncGenerator[str]:
    """Serve the replicas at `urls` under one URL while the context is open; yields it.

    It knows nothing but the replicas' places. One that is gone costs the request another try.
    """
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=3.0)
    async with aiohttp.ClientSession(connector=connector(), timeout=timeout, auto_decompress=False) as client:
        app = web.Application(client_max_size=max_body_bytes, middlewares=[_errors])
        app.router.add_route("*", "/{path:.*}", _Front(urls, client).answer)
        async with serve(app, host, port, drain_s=drain_s) as url:
            yield url


class _Front:
    def __init__(self, urls: Callable[[], Sequence[str]], client: aiohttp.ClientSession) -> None:
        self._urls = urls
        self._client = client
        self._turn = itertools.count()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """The answer of the first replica that gives one."""
        if request.path == "/metrics":
            return await metrics_of_all(request, [], [self._peer(url) for url in self._urls()])
        session_id = await _session_of(request)
        until = time.monotonic() + _PATIENCE_S
        while True:
            for url in self._order(session_id):
                with contextlib.suppress(EngineUnavailable, SessionElsewhere):
                    return await pass_on(request, self._peer(url), ASKS_OTHERS)
            if time.monotonic() > until:
                raise EngineUnavailable("no replica of this gateway can answer; one is being started")
            await asyncio.sleep(_RETRY_S)

    def _order(self, session_id: str | None) -> Sequence[str]:
        urls = self._urls()
        if session_id is not None:
            return places(session_id, urls)
        at = next(self._turn) % max(len(urls), 1)
        return [*urls[at:], *urls[:at]]

    def _peer(self, url: str) -> Peer:
        return Peer(self._client, url)


async def _session_of(request: web.Request) -> str | None:
    """The session that a request seems to name; a wrong guess costs one hop between replicas."""
    if request.path == "/sessions":
        return await asked_for(request)
    if (found := _SESSION.search(request.path)) is not None:
        return found[1]
    if (named := request.headers.get("X-Session-Id")) is not None:
        return named
    bearer = request.headers.get("Authorization", "").partition(" ")[2].strip()
    key = bearer or request.headers.get("x-api-key", "")
    # A session's own key is its id, a dot and a code; without keys the id alone.
    return key.rpartition(".")[0] or key or None if "/v1/" in request.path else None


@web.middleware
async def _errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        return await handler(request)
    except TokentapeError as error:
        refused = error
    except web.HTTPRequestEntityTooLarge:
        refused = TooLarge("the body is larger than this gateway takes (--max-body-mb)")
    refusal = Refusal.of(spoken(request.path, request.headers), refused)
    return web.Response(
        body=refusal.body, status=refusal.status, content_type="application/json", headers=refusal.headers
    )
