"""The client of SGLang's native `/generate`: connections, time limits, aborts.

    GenerateRequest ─▶ encode_request ─▶ POST /generate ─▶ one JSON answer, or server-sent events ─┐
    TokenChunk …, GenerateResult ◀─ Completion: every count, id and log-probability is checked ◀───┘

What is sent and what an answer means is `engines/sglang_protocol.py`'s, which does no I/O. The URL may be
sglang-router's (`engines/router.py`).
"""

import asyncio
import io
import logging
import uuid
from collections.abc import AsyncGenerator, Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import aiohttp
import msgspec

from tokentape import errors
from tokentape.addresses import is_http
from tokentape.engines import router, sglang_info
from tokentape.engines import sglang_protocol as protocol
from tokentape.engines.base import EngineInfo, GenerateRequest, GenerateResult, TokenChunk
from tokentape.engines.sglang_errors import error_message, lost, refusal
from tokentape.engines.sglang_score import Scores, decode_scores, encode_score
from tokentape.engines.sse import SSEDecoder

_logger = logging.getLogger(__name__)
_T = TypeVar("_T")
# aiohttp warns that plain bytes beyond 1 MiB block the loop; a file object is written in pieces.
_LARGE_BODY = 1 << 20


@dataclass(frozen=True, slots=True)
class SGLangConfig:
    """How to reach one SGLang server. All times are seconds.

    `first_token_timeout_s` runs from the call to the first token of a stream, waiting for one of the
    `max_connections` and in the engine's own queue included; `token_timeout_s` is the longest gap between two
    events with tokens after that. An answer that is not streamed has no first token to wait for: only
    `total_timeout_s` (None: no limit) bounds it. `control_timeout_s` bounds all that is not a generation.

    `keepalive_s` must stay below the server's own: uvicorn closes an idle connection after 5 s (SGLang's
    default `SGLANG_TIMEOUT_KEEP_ALIVE`), and a request sent at that moment is lost.

    `stream_interval` asks for one event per that many tokens; None leaves it to the server (1). SGLang's
    streams are cumulative unless it runs with `--incremental-streaming-output`: 8,000 tokens one by one are
    about 1.3 GB.
    """

    url: str
    connect_timeout_s: float = 5.0
    first_token_timeout_s: float = 600.0
    token_timeout_s: float = 60.0
    total_timeout_s: float | None = 3600.0
    control_timeout_s: float = 10.0
    keepalive_s: float = 4.0
    max_connections: int = 1024
    stream_interval: int | None = None
    api_key: str | None = field(default=None, repr=False)
    headers: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)

    def __post_init__(self) -> None:
        if not is_http(self.url):
            raise errors.ConfigError(f"engine URL {self.url!r} must look like http://HOST:PORT")


class SGLangEngine:
    """SGLang, or a router, behind `engines.base.Engine`; one pooled HTTP client, used from one event loop.

    `vocab_size` is the number of ids that the model knows. An id outside of it kills the whole server (seen
    four times), so none is ever sent, and a sampled one is an `EngineProtocolError`.

    Nothing is retried here. Beyond the errors that `Engine` names, a request that must not be sent raises
    `InternalError` (the prompt is ours) or `RequestError` (the sampling parameters are the caller's).
    """

    def __init__(self, config: SGLangConfig, *, vocab_size: int) -> None:
        self.config = config
        self.vocab_size = vocab_size
        self._url = config.url.rstrip("/")
        self._client: aiohttp.ClientSession | None = None
        # Not the connector's own limit: aborts and questions must pass when generations fill it.
        self._slots = asyncio.Semaphore(config.max_connections)
        self._running: set[str] = set()
        self._streams: set[aiohttp.ClientResponse] = set()
        self._aborts: set[asyncio.Task[None]] = set()
        self._closed = False
        self._routed: bool | None = None  # not known yet

    @property
    def routed(self) -> bool:
        """Whether the URL is known to be a router's: what fails there may go on at another of its servers."""
        return self._routed is True

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk | GenerateResult]:
        """Yield the sampled tokens, then one `GenerateResult`; see `engines.base.Engine.generate`.

        Closing the generator, or cancelling the task that awaits it, closes the connection and aborts on the
        engine in the background. Use `contextlib.aclosing` when you may leave early.

        Raises:
            ContextOverflow: prompt, or prompt plus `max_tokens`, exceeds the context.
            EngineError: every other failure, with the number of tokens received before it.
            InternalError: the prompt is empty or has an id outside the vocabulary; nothing was sent.
            RequestError: a sampling parameter that SGLang must not be sent, or that a router would drop
                (nothing was sent), or a constraint that it refused.
        """
        await self._check_passes(request)
        rid = protocol.wire_rid(request.rid)
        body = protocol.encode_request(request, rid, self.vocab_size, self.config.stream_interval)
        completion = protocol.Completion(request, self.vocab_size)
        patience = _Patience(self.config, request.stream)
        response: aiohttp.ClientResponse | None = None
        await patience.slot(self._slots)
        self._running.add(rid)
        try:
            response, whole = await patience.wait(self._ask(body, request), 0)
            if response.status != 200:
                completion.settled = True
                raise completion.refused(response.status, error_message(whole))
            if request.stream:
                _check_is_stream(response)
                self._streams.add(response)
                decoder = SSEDecoder()
                while not completion.done:
                    data = await patience.wait(response.content.readany(), completion.num_tokens)
                    if not data:
                        raise lost("the stream ended before [DONE]", completion.num_tokens)
                    for payload in decoder.feed(data):
                        if (chunk := completion.feed(payload)) is not None:
                            yield chunk
                            patience.restart()
                # The last, empty HTTP chunk often comes alone; only a connection read to its end is reused.
                await patience.wait(response.content.read(), completion.num_tokens)
            elif (chunk := completion.feed(whole)) is not None:
                yield chunk
        except aiohttp.ClientConnectorError as error:
            completion.settled = True  # nothing was sent
            raise errors.EngineUnavailable(
                f"no connection to {self._url}: {error}; is SGLang running there?"
            ) from error
        except aiohttp.ConnectionTimeoutError as error:
            completion.settled = True
            limit = f"{self.config.connect_timeout_s:g} s (connect_timeout_s)"
            raise errors.EngineUnavailable(
                f"no connection to {self._url} within {limit}; is SGLang running there?"
            ) from error
        except (aiohttp.ClientError, OSError) as error:
            raise lost(f"connection to {self._url} lost: {_name(error)}", completion.num_tokens) from error
        finally:
            if response is not None:
                self._streams.discard(response)
                response.close()  # gives a connection read to its end back to the pool, closes any other
            self._slots.release()
            self._running.discard(rid)
            if not completion.settled and not self._closed:
                self._abort_soon(rid)
        yield completion.result()  # out here, so that a consumer who is busy with it holds no connection

    async def score(self, ids: Sequence[int], start: int, temperature: float = 1.0) -> Scores:
        """The log-probability of each of `ids[start:]` behind all that precede it, by one prefill.

        SGLang knows no temperature here: look at the one that the answer has.

        Raises:
            ContextOverflow: the engine takes only sequences that leave room for one more token.
            EngineError: every other failure.
            RequestError: there is nothing to score, or an id is outside the vocabulary; nothing was sent.
        """
        rid = protocol.wire_rid(uuid.uuid4().hex)
        body = encode_score(ids, start, rid, self.vocab_size, temperature)
        patience = _Patience(self.config, stream=False)
        await patience.slot(self._slots)
        try:
            async with await patience.wait(self._post("/generate", body), 0) as response:
                payload = await patience.wait(response.read(), 0)
        except (aiohttp.ClientError, OSError) as error:
            raise errors.EngineUnavailable(f"connection to {self._url} lost: {_name(error)}") from error
        finally:
            self._slots.release()
        if response.status != 200:
            raise refusal(response.status, error_message(payload))
        return decode_scores(payload, ids, start, self.vocab_size)

    async def interrupt(self) -> None:
        """End all generations under way: each yields the tokens it has, and a result that says "abort"."""
        if running := tuple(self._running):
            servers = await self._servers_to_tell()
            await asyncio.gather(*(self._abort(rid, servers) for rid in running))

    async def info(self) -> EngineInfo:
        """Ask the engine who it is, or each server behind the router; None for what it does not say.

        Raises:
            EngineError: `EngineUnavailable` when it is down, else what its answer means.
        """
        servers = await self._servers()
        if not self._routed:
            return await self._info_of(self._url)
        said = await asyncio.gather(*map(self._info_of, servers), return_exceptions=True)
        return router.joined_info(dict(zip(servers, said, strict=True)))

    async def _info_of(self, server: str) -> EngineInfo:
        """What one server says of itself.

        The context length in force is `/v1/models`' `max_model_len`; `/get_server_info` knows only one that
        was set on the command line.
        """
        model = await self._get("/model_info", sglang_info.ModelInfo, server)
        if model is None:  # the older name, deprecated since
            model = await self._get("/get_model_info", sglang_info.ModelInfo, server)
        if model is None:
            raise refusal(404, "neither /model_info nor /get_model_info exists")
        cards = await self._get("/v1/models", sglang_info.Models, server)
        length = (
            next((card.max_model_len for card in cards.data if card.max_model_len), None) if cards else None
        )
        if length is None:
            about = await self._get("/get_server_info", sglang_info.ServerInfo, server)
            length = about.context_length if about else None
        return EngineInfo(
            model=model.model_path,
            context_length=length,
            weight_version=model.weight_version,
            sampling=model.sampling(),
        )

    async def dtype(self) -> str | None:
        """The type that the engine computes in, as "float32"; None where it does not say.

        Raises:
            EngineError: as `info`.
        """
        about = await self.about()
        return about.dtype if about is not None and about.dtype not in (None, "auto") else None

    async def about(self) -> sglang_info.ServerInfo | None:
        """What the server, or a router's first one, says of how it was started; None where it does not.

        Raises:
            EngineError: as `info`.
        """
        server = next(iter(await self._servers()), self._url)
        about = await self._get("/server_info", sglang_info.ServerInfo, server)
        if about is None:  # the older name
            about = await self._get("/get_server_info", sglang_info.ServerInfo, server)
        return about

    async def tokenize(self, text: str) -> list[int] | None:
        """The ids that the engine's own tokenizer makes of a text; None where it does not say.

        Raises:
            EngineError: as `info`.
        """
        server = next(iter(await self._servers()), self._url)
        body = msgspec.json.encode({"prompt": text})
        said = await self._get("/tokenize", sglang_info.Tokenized, server, body)
        return None if said is None else said.tokens

    async def ill(self, timeout_s: float) -> str | None:
        """What is wrong with the server, None where it answers `/health` in time. Nothing is generated."""
        try:
            async with asyncio.timeout(timeout_s):
                async with self._session().get(self._url + "/health", allow_redirects=False) as response:
                    await response.read()
        except TimeoutError:
            return f"no answer to /health within {timeout_s:g} s"
        except (aiohttp.ClientError, OSError) as error:
            return _name(error)
        return None if response.status in (200, 404) else f"/health answered {response.status}"

    async def drop(self) -> None:
        """Close all connections: what runs fails as lost, and is not waited for. The client stays usable."""
        client, self._client = self._client, None
        for response in tuple(self._streams):
            response.close()
        if client is not None:
            await client.close()

    async def aclose(self) -> None:
        """Abort the generations under way, wait for aborts already sent, close the connections."""
        if self._closed:
            return
        self._closed = True
        for rid in self._running:
            self._abort_soon(rid)
        if self._aborts:
            await asyncio.wait(self._aborts)
        if self._client is not None:
            await self._client.close()

    def _session(self) -> aiohttp.ClientSession:
        if self._client is None:
            headers = {
                "Content-Type": "application/json",
                "Accept-Encoding": "identity",
                **self.config.headers,
            }
            if self.config.api_key is not None:
                headers["Authorization"] = f"Bearer {self.config.api_key}"
            self._client = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=self.config.keepalive_s),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=self.config.connect_timeout_s),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers=headers,
                read_bufsize=1 << 20,
            )
        return self._client

    async def _ask(self, body: bytes, request: GenerateRequest) -> tuple[aiohttp.ClientResponse, bytes]:
        """The answer to `/generate` and its body; b"" of a stream that begins well."""
        # (source) sglang-router keeps what has one routing key on one worker.
        headers = {"X-SMG-Routing-Key": request.session} if request.session else None
        response = await self._post("/generate", body, headers)
        if request.stream and response.status == 200:
            return response, b""
        try:
            return response, await response.read()
        except BaseException:
            response.close()
            raise

    async def _post(
        self, path: str, body: bytes, headers: Mapping[str, str] | None = None
    ) -> aiohttp.ClientResponse:
        if self._closed:
            raise errors.InternalError("generate() was called on a closed engine client")
        data = body if len(body) <= _LARGE_BODY else io.BytesIO(body)
        return await self._session().post(self._url + path, data=data, headers=headers, allow_redirects=False)

    def _abort_soon(self, rid: str) -> None:
        task = asyncio.get_running_loop().create_task(self._abort_anywhere(rid))
        self._aborts.add(task)  # the loop itself keeps only a weak reference
        task.add_done_callback(self._aborts.discard)

    async def _abort_anywhere(self, rid: str) -> None:
        await self._abort(rid, await self._servers_to_tell())

    async def _abort(self, rid: str, servers: Sequence[str]) -> None:
        """Abort at each of `servers`: nobody says which of them has it, and the others do not mind."""
        body = msgspec.json.encode({"rid": rid})
        await asyncio.gather(*(self._abort_at(server, rid, body) for server in servers))

    async def _abort_at(self, server: str, rid: str, body: bytes) -> None:
        try:
            async with asyncio.timeout(self.config.control_timeout_s):
                async with self._session().post(
                    server + "/abort_request", data=body, allow_redirects=False
                ) as response:
                    await response.read()
        except (aiohttp.ClientError, OSError) as error:
            # Not raised: the failure that led here is being raised already, and a live server also notices
            # the closed connection.
            _logger.warning("abort of %s on %s failed: %s", rid, server, _name(error))

    async def _check_passes(self, request: GenerateRequest) -> None:
        """Ask whether the URL is a router's only where its answer would matter."""
        try:
            router.check_passes(request)
        except errors.TokentapeError:
            await self._servers()
            if self._routed:
                raise

    async def _servers_to_tell(self) -> tuple[str, ...]:
        """As `_servers`, for what is not worth an error: the URL itself where they cannot be known."""
        try:
            return await self._servers()
        except errors.EngineError as error:
            _logger.warning("whether %s is a router is not known: %s", self._url, error)
            return (self._url,)

    async def _servers(self) -> tuple[str, ...]:
        """Where all goes that is not a generation: this server, or those that the router has now.

        Raises:
            EngineError: it does not answer.
        """
        if self._routed is not False:
            try:
                listing = await self._get("/workers", router.Listing)
            except (errors.EngineRejected, errors.EngineProtocolError):  # a proxy's words, before SGLang
                if self._routed:
                    raise
                listing = None
            self._routed = listing is not None
            if listing is not None:
                return tuple(worker.url.rstrip("/") for worker in listing.workers)
        return (self._url,)

    async def _get(
        self, path: str, answer: type[_T], server: str | None = None, body_of_post: bytes | None = None
    ) -> _T | None:
        """The decoded answer to a GET, or to a POST with a body; None where the server lacks the route."""
        url, method = (server or self._url) + path, "GET" if body_of_post is None else "POST"
        try:
            async with asyncio.timeout(self.config.control_timeout_s):
                async with self._session().request(
                    method, url, data=body_of_post, allow_redirects=False
                ) as response:
                    body = await response.read()
        except TimeoutError as error:
            raise errors.EngineTimeout(f"{url}: no answer in time: {_name(error)}") from error
        except (aiohttp.ClientError, OSError) as error:
            raise errors.EngineUnavailable(f"{url}: {_name(error)}; is SGLang running there?") from error
        if response.status in (404, 405):
            return None
        if response.status != 200:
            raise refusal(response.status, error_message(body))
        try:
            return msgspec.json.decode(body, type=answer)
        except msgspec.MsgspecError as error:
            raise errors.EngineProtocolError(f"{url}: {error}; is it the URL of SGLang itself?") from error


class _Patience:
    """Which time limit holds now; every wait for the engine goes through `wait`.

    The limits never run while the consumer holds a chunk, except the total.
    """

    __slots__ = ("_config", "_loop", "_mark", "_start", "_stream")

    def __init__(self, config: SGLangConfig, stream: bool) -> None:
        self._config = config
        self._stream = stream
        self._loop = asyncio.get_running_loop()
        self._start = self._mark = self._loop.time()

    def restart(self) -> None:
        """A token came, and the consumer is done with it."""
        self._mark = self._loop.time()

    async def slot(self, slots: asyncio.Semaphore) -> None:
        """Take one of `slots`: without a timer where one is free."""
        if slots.locked():
            await self.wait(slots.acquire(), 0)
        else:
            await slots.acquire()

    async def wait(self, step: Awaitable[_T], num_tokens: int) -> _T:
        limits: list[tuple[float, str]] = []
        if self._config.total_timeout_s is not None:
            total_s = self._config.total_timeout_s
            limits.append(
                (self._start + total_s, f"the answer did not end within {total_s:g} s (total_timeout_s)")
            )
        if self._stream and num_tokens:
            gap_s = self._config.token_timeout_s
            limits.append((self._mark + gap_s, f"no further token within {gap_s:g} s (token_timeout_s)"))
        elif self._stream:
            first_s = self._config.first_token_timeout_s
            limits.append((self._start + first_s, f"no token within {first_s:g} s (first_token_timeout_s)"))
        when, what = min(limits, default=(None, ""))
        try:
            async with asyncio.timeout_at(when):
                return await step
        except aiohttp.ConnectionTimeoutError:
            raise  # a TimeoutError too, but of the connection
        except TimeoutError as error:
            raise errors.EngineTimeout(what, num_tokens=num_tokens) from error


def _check_is_stream(response: aiohttp.ClientResponse) -> None:
    if response.content_type != "text/event-stream":
        what = f"a stream was asked for, the engine answered {response.content_type}"
        raise errors.EngineProtocolError(f"{what}: does the URL name SGLang's own server?")


def _name(error: BaseException) -> str:
    return f"{type(error).__name__} {error}".rstrip()
