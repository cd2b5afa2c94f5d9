"""The official SDKs' own clients over a transport that stays in this process: no socket, no port.

    AsyncOpenAI, AsyncAnthropic ─▶ AsyncTransport ──────────────────────────▶ InProcess ─▶ gateway
    OpenAI, Anthropic           ─▶ Transport ─▶ the recorder's event loop ──▶┘

What an SDK sends and gets is what the gateway's routes take and answer over HTTP.
"""

import asyncio
import contextlib
import functools
import re
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import httpx2
import msgspec

from tokentape.errors import ConfigError, NotFound, RequestError, TokentapeError
from tokentape.gateway import agents
from tokentape.gateway.api import Answering
from tokentape.gateway.parts import Gateway
from tokentape.gateway.session import Session
from tokentape.gateway.wire import Wire
from tokentape.types import Json

if TYPE_CHECKING:
    from anthropic import Anthropic, AsyncAnthropic
    from openai import AsyncOpenAI, OpenAI

_T = TypeVar("_T")
_URL = "http://in-process"
_JSON = {"content-type": "application/json"}
_EVENTS = {"content-type": "text/event-stream"}


class Pieces:
    """A streamed reply on its way to its one reader; it is delivered when the last piece was taken.

    Pieces wait here until they are taken, so that it is known which one is the last: the SDKs leave without
    asking for another. Closing before the end aborts the turn.
    """

    def __init__(self, answering: AbstractAsyncContextManager[Answering]) -> None:
        self._waiting: deque[bytes] = deque()
        self._is_over = False
        self._error: TokentapeError | None = None
        self._answering: Answering | None = None
        self._news = asyncio.Event()
        self._taken = asyncio.Event()
        self._task = asyncio.ensure_future(self._fill(answering))

    async def begun(self) -> None:
        """Wait for the first piece.

        Raises:
            TokentapeError: there is none.
        """
        while not self._waiting and not self._is_over:
            self._news.clear()
            await self._news.wait()
        if not self._waiting and self._error is not None:
            raise self._error

    async def take(self, timeout_s: float | None) -> bytes:
        """The next piece, b"" at the end.

        Raises:
            TimeoutError: none came in time.
        """
        async with asyncio.timeout(timeout_s):
            await self.begun()
        if not self._waiting:
            return b""
        piece = self._waiting.popleft()
        if not self._waiting and self._is_over and self._answering is not None:
            self._answering.delivered()
            self._taken.set()
        return piece

    async def aclose(self) -> None:
        """Ask for no more."""
        self._task.cancel()
        await asyncio.wait({self._task})

    async def _fill(self, answering: AbstractAsyncContextManager[Answering]) -> None:
        try:
            async with answering as one, contextlib.aclosing(one.pieces()) as pieces:
                async for piece in pieces:
                    self._waiting.append(piece)
                    self._news.set()
                self._answering, self._is_over = one, True
                self._news.set()
                await self._taken.wait()  # until then it is being answered
        except TokentapeError as error:
            self._error = error
        finally:
            self._is_over = True
            self._news.set()


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request is answered with: a whole body, or its pieces."""

    status: int
    headers: Mapping[str, str]
    body: bytes | Pieces


class InProcess:
    """Answers the requests of one session's agent. `open_session` makes the session, or finds it."""

    def __init__(self, gateway: Gateway, open_session: Callable[[], Awaitable[Session]]) -> None:
        self._gateway = gateway
        self._open_session = open_session

    async def answer(self, request: httpx2.Request) -> Answer:
        """The answer to a request whose body has been read; an error is an answer, too.

        Raises:
            TimeoutError: it took longer than the request allows; the turn is aborted.
        """
        headers, path = request.headers, request.url.path
        try:
            async with asyncio.timeout(read_timeout_s(request)):
                return await self._route(request)
        except TimeoutError:
            raise
        except Exception as error:  # the boundary: what a server would answer with
            typed = agents.to_typed(error, self._gateway.metrics, f"{request.method} {path}")
            refusal = agents.Refusal.of(agents.spoken(path, headers), typed)
            return Answer(refusal.status, {**_JSON, **refusal.headers}, refusal.body)

    async def _route(self, request: httpx2.Request) -> Answer:
        method, path = request.method, request.url.path
        for route in agents.ROUTES:
            if route.method == method and (found := _pattern(route.path).fullmatch(path)):
                return await self._ask(request, route.answer, found.groupdict())
        if method == "GET" and path == "/v1/models":
            return _json(agents.list_models(self._gateway))
        if method == "GET" and path.startswith("/v1/models/"):
            return _json(agents.show_model(self._gateway, path.removeprefix("/v1/models/")))
        raise NotFound(f"{method} {path}: Not Found")

    async def _ask(
        self, request: httpx2.Request, answer: Wire | Callable[[agents.Asked], Json], names: Mapping[str, str]
    ) -> Answer:
        session, api = await self._open_session(), self._gateway.api
        if not isinstance(answer, Wire):
            params = request.url.params
            query = {name: ",".join(params.get_list(name)) for name in params}
            asked = agents.Asked(self._gateway, session, request.content, request.headers, names, query)
            return _json(answer(asked))
        decoded = api.decode(answer, session, request.content, request.headers)
        answering = api.answering(session, decoded, request.headers)
        if not decoded.request.stream:
            async with answering as one:
                dones = await one.dones()
                one.delivered()
            return Answer(200, _JSON, decoded.writer.whole(dones))
        pieces = Pieces(answering)
        try:
            await pieces.begun()
        except BaseException:
            await pieces.aclose()
            raise
        return Answer(200, _EVENTS, pieces)


def _json(value: Json) -> Answer:
    return Answer(200, _JSON, msgspec.json.encode(value))


@functools.cache
def _pattern(path: str) -> "re.Pattern[str]":
    return re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", path))


def read_timeout_s(request: httpx2.Request) -> float | None:
    """How long the SDK waits for an answer, or for the next piece of one."""
    return request.extensions.get("timeout", {}).get("read")


class AsyncTransport(httpx2.AsyncBaseTransport):
    """For clients on the recorder's event loop."""

    def __init__(self, agent: InProcess) -> None:
        self._agent = agent

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Answer a request; see `InProcess.answer`."""
        await request.aread()
        try:
            answer = await self._agent.answer(request)
        except TimeoutError:
            raise httpx2.ReadTimeout("no answer in time", request=request) from None
        if isinstance(answer.body, Pieces):
            stream = _AsyncStream(answer.body, request)
            return httpx2.Response(answer.status, headers=dict(answer.headers), stream=stream)
        return httpx2.Response(answer.status, headers=dict(answer.headers), content=answer.body)


class _AsyncStream(httpx2.AsyncByteStream):
    def __init__(self, pieces: Pieces, request: httpx2.Request) -> None:
        self._pieces = pieces
        self._request = request

    async def __aiter__(self) -> AsyncIterator[bytes]:
        timeout_s = read_timeout_s(self._request)
        try:
            while piece := await self._pieces.take(timeout_s):
                yield piece
        except TimeoutError:
            raise httpx2.ReadTimeout("no further token in time", request=self._request) from None

    async def aclose(self) -> None:
        await self._pieces.aclose()


class Transport(httpx2.BaseTransport):
    """For clients in other threads: the turns run on the recorder's event loop, and the thread waits."""

    def __init__(self, agent: InProcess, loop: asyncio.AbstractEventLoop) -> None:
        self._agent = agent
        self._loop = loop

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        """Answer a request; see `InProcess.answer`."""
        if _is_running(self._loop):  # the loop would wait for itself
            error = RequestError(
                "this client blocks the event loop that is to answer it: run the agent in another thread "
                "(asyncio.to_thread), or use the asynchronous client"
            )
            wire = agents.spoken(request.url.path, request.headers)
            refusal = agents.Refusal.of(wire, error)
            headers = {**_JSON, **refusal.headers}
            return httpx2.Response(refusal.status, headers=headers, content=refusal.body)
        request.read()
        try:
            answer = _wait(self._loop, self._agent.answer(request))
        except TimeoutError:
            raise httpx2.ReadTimeout("no answer in time", request=request) from None
        if isinstance(answer.body, Pieces):
            stream = _Stream(answer.body, request, self._loop)
            return httpx2.Response(answer.status, headers=dict(answer.headers), stream=stream)
        return httpx2.Response(answer.status, headers=dict(answer.headers), content=answer.body)


class _Stream(httpx2.SyncByteStream):
    def __init__(self, pieces: Pieces, request: httpx2.Request, loop: asyncio.AbstractEventLoop) -> None:
        self._pieces = pieces
        self._request = request
        self._loop = loop

    def __iter__(self) -> Iterator[bytes]:
        timeout_s = read_timeout_s(self._request)
        try:
            while piece := _wait(self._loop, self._pieces.take(timeout_s)):
                yield piece
        except TimeoutError:
            raise httpx2.ReadTimeout("no further token in time", request=self._request) from None

    def close(self) -> None:
        _wait(self._loop, self._pieces.aclose())


def _wait(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, _T]) -> _T:
    return asyncio.run_coroutine_threadsafe(work, loop).result()


def _is_running(loop: asyncio.AbstractEventLoop) -> bool:
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False


def async_openai(agent: InProcess, options: Json) -> "AsyncOpenAI":
    """OpenAI's client for the recorder's event loop."""
    from openai import AsyncOpenAI

    http = httpx2.AsyncClient(transport=AsyncTransport(agent))
    return AsyncOpenAI(**_given(f"{_URL}/v1", http, options))


def sync_openai(agent: InProcess, loop: asyncio.AbstractEventLoop, options: Json) -> "OpenAI":
    """OpenAI's client for another thread."""
    from openai import OpenAI

    http = httpx2.Client(transport=Transport(agent, loop))
    return OpenAI(**_given(f"{_URL}/v1", http, options))


def async_anthropic(agent: InProcess, options: Json) -> "AsyncAnthropic":
    """Anthropic's client for the recorder's event loop."""
    from anthropic import AsyncAnthropic

    http = httpx2.AsyncClient(transport=AsyncTransport(agent))
    return AsyncAnthropic(**_given(_URL, http, options))


def sync_anthropic(agent: InProcess, loop: asyncio.AbstractEventLoop, options: Json) -> "Anthropic":
    """Anthropic's client for another thread."""
    from anthropic import Anthropic

    http = httpx2.Client(transport=Transport(agent, loop))
    return Anthropic(**_given(_URL, http, options))


def _given(url: str, http: httpx2.AsyncClient | httpx2.Client, options: Json) -> Json:
    for name in options.keys() & {"base_url", "http_client"}:
        raise ConfigError(f"`{name}` is this client's own: it stays in the process")
    return {"api_key": "not-needed", **options, "base_url": url, "http_client": http}
