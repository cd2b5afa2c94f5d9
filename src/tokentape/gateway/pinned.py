"""One gateway in several processes: each session belongs to one of them, whichever is asked.

A process answers for its own sessions and passes other requests on over the owner's unix socket. What
concerns all of them is done by all.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import aiohttp
import msgspec
from aiohttp import web
from prometheus_client.parser import text_string_to_metric_families
from yarl import URL

from tokentape.errors import EngineUnavailable
from tokentape.gateway.sessions import new_session_id

_HOP_BY_HOP = frozenset(
    {
        *("connection", "content-encoding", "content-length", "keep-alive", "te", "trailer"),
        *("transfer-encoding", "upgrade"),
    }
)
_FOR_ALL = frozenset(
    {
        *(("POST", "/pause"), ("POST", "/resume"), ("POST", "/weights")),
        *(("POST", "/workers"), ("DELETE", "/workers")),
    }
)
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


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
) -> AsyncGenerator[Callable[[web.Request, _Handler], Awaitable[web.StreamResponse]]]:
    """A middleware that passes on what is another's; `named` is the session that a request names."""
    async with contextlib.AsyncExitStack() as stack:
        peers: dict[int, aiohttp.ClientSession] = {}
        for index in range(place.count):
            connector = aiohttp.UnixConnector(place.socket_of(index), limit=0)
            timeout = aiohttp.ClientTimeout(total=None)
            client = aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False)
            peers[index] = await stack.enter_async_context(client)
        del peers[place.index]

        @web.middleware
        async def pinned(request: web.Request, handler: _Handler) -> web.StreamResponse:
            if _is_from_peer(request):
                return await handler(request)
            if request.path == "/metrics":
                return await _summed(request, handler, peers)
            if (request.method, request.path) in _FOR_ALL:
                return await _by_all(request, handler, peers)
            session_id = await _asked_for(request) if request.path == "/sessions" else named(request)
            owner = place.index if session_id is None else place.owner(session_id)
            return await handler(request) if owner == place.index else await _passed_on(request, peers[owner])

        yield pinned


def _is_from_peer(request: web.Request) -> bool:
    """Whether it came over the unix socket: it is not passed on again."""
    transport = request.transport
    return transport is not None and not isinstance(transport.get_extra_info("sockname"), tuple)


class _Asked(msgspec.Struct):
    session_id: str | None = None


async def _asked_for(request: web.Request) -> str | None:
    """The id that a session is to get, where the caller says so."""
    if request.method != "POST":
        return None
    try:
        return msgspec.json.decode(await request.read() or b"{}", type=_Asked).session_id
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _headers(headers: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(name, value) for name, value in headers if name.lower() not in _HOP_BY_HOP]


@contextlib.asynccontextmanager
async def _asking(
    request: web.Request, peer: aiohttp.ClientSession
) -> AsyncGenerator[aiohttp.ClientResponse]:
    body, url = await request.read(), URL(f"http://peer{request.raw_path}", encoded=True)
    headers = _headers(request.headers.items())
    try:
        async with peer.request(
            request.method, url, headers=headers, data=body, allow_redirects=False
        ) as answer:
            yield answer
    except aiohttp.ClientConnectionError as error:
        raise EngineUnavailable(f"the gateway's process for this is being restarted: {error}") from error


async def _passed_on(request: web.Request, peer: aiohttp.ClientSession) -> web.StreamResponse:
    """The owner's answer, piece by piece as it comes."""
    async with _asking(request, peer) as answer:
        response = web.StreamResponse(status=answer.status)
        response.headers.extend(_headers(answer.headers.items()))
        if answer.content_length is not None:
            response.content_length = answer.content_length
        with contextlib.suppress(ConnectionResetError):  # the client has left: so do we
            await response.prepare(request)
            try:
                async for piece in answer.content.iter_any():
                    await response.write(piece)
            except aiohttp.ClientError:  # its process is gone: a reply that ends here must not look whole
                if request.transport is not None:
                    request.transport.abort()
                return response
            await response.write_eof()
        return response


async def _ask(request: web.Request, peer: aiohttp.ClientSession) -> tuple[int, bytes]:
    async with _asking(request, peer) as answer:
        return answer.status, await answer.read()


async def _by_all(
    request: web.Request, handler: _Handler, peers: Mapping[int, aiohttp.ClientSession]
) -> web.StreamResponse:
    """This process's answer, when all have done it; the first refusal where one has not."""
    response = await handler(request)
    for status, body in await asyncio.gather(*(_ask(request, peer) for peer in peers.values())):
        if status >= 400:
            return web.Response(status=status, body=body, content_type="application/json")
    return response


async def _summed(
    request: web.Request, handler: _Handler, peers: Mapping[int, aiohttp.ClientSession]
) -> web.StreamResponse:
    """All processes' metrics added up; a process that is being restarted is left out."""
    own = await handler(request)
    texts = [own.body.decode()] if isinstance(own, web.Response) and isinstance(own.body, bytes) else []
    asked = await asyncio.gather(*(_ask(request, peer) for peer in peers.values()), return_exceptions=True)
    texts += [one[1].decode() for one in asked if not isinstance(one, BaseException) and one[0] == 200]
    return web.Response(body=summed(texts), content_type="text/plain", charset="utf-8")


def summed(texts: Sequence[str]) -> bytes:
    """Metrics in Prometheus' text format, added sample by sample."""
    heads: dict[str, str] = {}
    values: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
    for text in texts:
        for family in text_string_to_metric_families(text):
            suffix = "_total" if family.type == "counter" else ""
            heads[family.name] = (
                f"# HELP {family.name}{suffix} {family.documentation}\n"
                f"# TYPE {family.name}{suffix} {family.type}\n"
            )
            of_family = values.setdefault(family.name, {})
            for sample in family.samples:
                key = sample.name, tuple(sample.labels.items())
                of_family[key] = of_family.get(key, 0.0) + sample.value
    lines: list[str] = []
    for name, head in heads.items():
        lines.append(head)
        for (sample, labels), value in values[name].items():
            inside = ",".join(f"{key}={msgspec.json.encode(text).decode()}" for key, text in labels)
            lines.append(f"{sample}{f'{{{inside}}}' if inside else ''} {value}\n")
    return "".join(lines).encode()
