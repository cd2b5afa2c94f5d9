"""Requests that another process answers: passed on as they are, the answer piece by piece as it comes."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import aiohttp
import msgspec
from aiohttp import web
from prometheus_client.parser import text_string_to_metric_families
from yarl import URL

from tokentape.errors import EngineUnavailable, SessionElsewhere

ELSEWHERE = "X-Tokentape-Elsewhere"
"""The header of a refusal that names who has the session; empty where nobody says so."""
PASSED_ON = {"X-Tokentape-Passed-On": "1"}
"""Says that a replica asks: it gets an answer or learns who has the session, at once."""
ASKS_OTHERS = {"X-Tokentape-Asks-Others": "1"}
"""Says that a front asks: a replica that cannot answer is to say so at once."""
FOR_ALL = frozenset(
    {
        *(("POST", "/pause"), ("POST", "/resume"), ("POST", "/weights")),
        *(("POST", "/workers"), ("DELETE", "/workers")),
    }
)
"""What every process of a gateway does when one is asked."""
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_HOP_BY_HOP = frozenset(
    {
        *("connection", "content-encoding", "content-length", "keep-alive", "te", "trailer"),
        *("transfer-encoding", "upgrade"),
    }
)
_PROBES = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 8000}
_ASK_S = 60.0  # for what all do: one that hangs must not hold up the others for ever


@dataclass(frozen=True, slots=True)
class Peer:
    """Another process of the gateway: how it is asked, and its base URL."""

    client: aiohttp.ClientSession
    url: str


def connector() -> aiohttp.TCPConnector:
    """Connections to peers; one whose machine is gone ends after ten seconds, which it cannot say itself."""
    return aiohttp.TCPConnector(limit=0, socket_factory=_probed)


def _probed(address: tuple[int, int, int, str, object]) -> socket.socket:
    made = socket.socket(*address[:3])
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _PROBES.items():
        if hasattr(socket, name):  # not every system has all of them
            made.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return made


class Named(msgspec.Struct):
    """What a body of `POST /sessions` says of the session's place."""

    session_id: str | None = None


async def asked_for(request: web.Request) -> str | None:
    """The id that a session is to get, where its creator says so."""
    if request.method != "POST":
        return None
    try:
        return msgspec.json.decode(await request.read() or b"{}", type=Named).session_id
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


async def pass_on(
    request: web.Request, peer: Peer, more: Mapping[str, str] | None = None
) -> web.StreamResponse:
    """The peer's answer to a request; `more` are headers for the peer alone.

    Raises:
        EngineUnavailable: the peer is gone; nothing has been answered.
        SessionElsewhere: the peer has not got the session.
    """
    async with _asking(request, peer, more or {}) as answer:
        if ELSEWHERE in answer.headers:
            said = f"{peer.url} has not got the session"
            raise SessionElsewhere(said, url=answer.headers[ELSEWHERE] or None)
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


async def done_by_all(
    request: web.Request,
    handler: Handler,
    peers: Sequence[Peer],
    more: Mapping[str, str] | None = None,
) -> web.StreamResponse:
    """This process's answer, when all were asked; the first refusal where one has not done it.

    Raises:
        EngineUnavailable: one does not answer; the others have done it.
    """
    own, *others = await asyncio.gather(
        handler(request), *(_ask(request, peer, more or {}) for peer in peers), return_exceptions=True
    )
    for error in (own, *others):
        if isinstance(error, BaseException):
            raise error
    for status, body in (other for other in others if isinstance(other, tuple)):
        if status >= 400:
            return web.Response(status=status, body=body, content_type="application/json")
    assert isinstance(own, web.StreamResponse)  # noqa: S101  # it is no error
    return own


async def metrics_of_all(request: web.Request, own: Sequence[str], peers: Sequence[Peer]) -> web.Response:
    """All metrics added up; a process that does not answer is left out. Where all refuse, what one says."""
    asked = await asyncio.gather(*(_ask(request, peer, {}) for peer in peers), return_exceptions=True)
    there = [one for one in asked if not isinstance(one, BaseException)]
    texts = [*own, *(body.decode() for status, body in there if status == 200)]
    if there and not texts:  # a key that is missing or wrong
        status, body = there[0]
        return web.Response(status=status, body=body, content_type="application/json")
    return web.Response(body=summed(texts), content_type="text/plain", charset="utf-8")


def summed(texts: Sequence[str]) -> bytes:
    """Metrics in Prometheus' text format, added sample by sample; of points in time the first one counts."""
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
                if _is_time(sample.name):
                    of_family[key] = min(of_family.get(key, sample.value), sample.value)
                else:
                    of_family[key] = of_family.get(key, 0.0) + sample.value
    lines: list[str] = []
    for name, head in heads.items():
        lines.append(head)
        for (sample, labels), value in values[name].items():
            inside = ",".join(f"{key}={msgspec.json.encode(text).decode()}" for key, text in labels)
            lines.append(f"{sample}{f'{{{inside}}}' if inside else ''} {value}\n")
    return "".join(lines).encode()


def _is_time(sample: str) -> bool:
    return sample.endswith(("_created", "_start_time_seconds"))


def _headers(headers: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(name, value) for name, value in headers if name.lower() not in _HOP_BY_HOP]


@contextlib.asynccontextmanager
async def _asking(
    request: web.Request, peer: Peer, more: Mapping[str, str]
) -> AsyncGenerator[aiohttp.ClientResponse]:
    body, url = await request.read(), URL(f"{peer.url}{request.raw_path}", encoded=True)
    headers = [*_headers(request.headers.items()), *more.items()]
    try:
        async with peer.client.request(
            request.method, url, headers=headers, data=body, allow_redirects=False
        ) as answer:
            yield answer
    except (aiohttp.ClientConnectionError, TimeoutError) as error:
        raise EngineUnavailable(
            f"a process of this gateway does not answer, {peer.url}: {error}; it is started again, try later"
        ) from error


async def _ask(request: web.Request, peer: Peer, more: Mapping[str, str]) -> tuple[int, bytes]:
    try:
        async with asyncio.timeout(_ASK_S), _asking(request, peer, more) as answer:
            return answer.status, await answer.read()
    except (TimeoutError, aiohttp.ClientPayloadError) as error:
        raise EngineUnavailable(f"a process of this gateway does not answer, {peer.url}") from error
