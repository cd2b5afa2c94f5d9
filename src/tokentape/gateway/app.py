"""HTTP: routes, who may call them, and one place where an error becomes a status."""

import asyncio
import contextlib
import hmac
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import msgspec
from aiohttp import web
from msgspec import Meta, Raw

from tokentape import __version__
from tokentape.engines.base import Engine, EngineInfo
from tokentape.errors import (
    ClientGone,
    EngineError,
    InternalError,
    NotFound,
    RequestError,
    TokentapeError,
    TooLarge,
    Unauthorized,
)
from tokentape.export import samples, to_arrow_stream, to_json_rows
from tokentape.gateway import chat
from tokentape.gateway.api import AgentApi
from tokentape.gateway.chat.request import session_sampling
from tokentape.gateway.sessions import Session, Sessions
from tokentape.gateway.turn import Turns
from tokentape.gateway.wire import Decoded, Wire
from tokentape.metrics import Metrics
from tokentape.types import Json

log = logging.getLogger(__name__)

ARROW_STREAM = "application/vnd.apache.arrow.stream"
_OPEN_ROUTES = frozenset({"/healthz", "/readyz"})
_SESSION = web.RequestKey("session", str)  # whose key the caller has
_Limit = Annotated[int, Meta(ge=1, le=2**53)] | None


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """How the gateway answers. `model` is the name it answers to; `max_body_bytes` bounds a request.

    `context_length` in tokens, None to ask the engine.
    """

    model: str
    api_key: str | None = None
    strict: bool = False
    max_body_bytes: int = 64 * 2**20
    context_length: int | None = None


@dataclass(frozen=True, slots=True)
class Gateway:
    """The parts that the routes need."""

    config: GatewayConfig
    engine: Engine
    sessions: Sessions
    turns: Turns
    api: AgentApi
    metrics: Metrics


class _Create(msgspec.Struct, forbid_unknown_fields=True):
    session_id: str | None = None
    metadata: Json = msgspec.field(default_factory=dict[str, Any])
    sampling: dict[str, Raw] | None = None
    max_turns: _Limit = None
    max_tokens: _Limit = None
    deadline_s: Annotated[float, Meta(gt=0, le=10**9)] | None = None


class _Finish(msgspec.Struct, forbid_unknown_fields=True):
    reward: float | None = None
    metadata: Json = msgspec.field(default_factory=dict[str, Any])


def make_app(gateway: Gateway) -> web.Application:
    """The gateway as an aiohttp application. It does not own the gateway's parts: close them after it."""
    app = web.Application(middlewares=[_boundary(gateway)], client_max_size=gateway.config.max_body_bytes)
    routes = _Routes(gateway)
    app.router.add_routes(
        [
            web.post("/sessions", routes.create),
            web.get("/sessions", routes.list),
            web.get("/sessions/{session_id}", routes.show),
            web.delete("/sessions/{session_id}", routes.delete),
            web.get("/sessions/{session_id}/samples", routes.samples),
            web.post("/sessions/{session_id}/finish", routes.finish),
            web.get("/healthz", routes.healthz),
            web.get("/readyz", routes.readyz),
            web.get("/metrics", routes.metrics),
            *(
                route
                for prefix in ("", "/sessions/{session_id}")
                for route in (
                    web.post(f"{prefix}/v1/chat/completions", routes.agent(chat.WIRE)),
                    web.get(f"{prefix}/v1/models", routes.models),
                )
            ),
        ]
    )
    app.cleanup_ctx.append(routes.learn_context_length)
    return app


def _boundary(gateway: Gateway) -> Any:
    """Every error leaves as JSON in OpenAI's shape; a caller without the key comes no further."""

    @web.middleware
    async def boundary(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        try:
            if gateway.config.api_key is not None and request.path not in _OPEN_ROUTES:
                _authorise(request, gateway.config.api_key)
            return await handler(request)
        except TokentapeError as error:
            if not isinstance(error, EngineError | ClientGone):  # these are counted as failed turns
                gateway.metrics.refusals.labels(error.kind).inc()
            return _error(error)
        except web.HTTPRequestEntityTooLarge:
            return _error(TooLarge(f"the body is larger than {gateway.config.max_body_bytes} bytes"))
        except web.HTTPException as error:
            text = f"{request.method} {request.path}: {error.reason}"
            return _error(NotFound(text) if error.status == 404 else RequestError(text), status=error.status)
        except Exception:
            log.exception("%s %s", request.method, request.path)
            return _error(InternalError("an internal error of tokentape; its log has the details"))

    return boundary


def _error(error: TokentapeError, *, status: int | None = None) -> web.Response:
    # OpenAI's and Anthropic's SDKs retry 409 and 5xx on their own; the header tells them what is worth it.
    headers = {"x-should-retry": "true" if error.retryable else "false"}
    return web.Response(
        body=msgspec.json.encode(chat.WIRE.error_body(error)),
        status=status or error.status,
        content_type="application/json",
        headers=headers,
    )


def _credential(request: web.Request) -> str | None:
    authorization = request.headers.get("Authorization", "")
    if authorization.lower().startswith("bearer "):
        return authorization[7:].strip()
    return request.headers.get("x-api-key")


def session_key(session_id: str, api_key: str) -> str:
    """The key of one session's agent: it opens that session's agent routes and nothing else."""
    mac = hmac.new(api_key.encode(), session_id.encode(), "sha256").hexdigest()
    return f"{session_id}.{mac[:32]}"


def _authorise(request: web.Request, api_key: str) -> None:
    """Let in who has the gateway's key; on the agents' routes also who has the session's own."""
    given = _credential(request) or ""
    if _equal(given, api_key):
        return
    session_id = given.rpartition(".")[0]
    if "/v1/" in request.path and session_id and _equal(given, session_key(session_id, api_key)):
        if request.match_info.get("session_id", session_id) == session_id:
            request[_SESSION] = session_id
            return
    raise Unauthorized("a valid API key is required: send it as `Authorization: Bearer KEY` or `x-api-key`")


def _equal(given: str, key: str) -> bool:
    return hmac.compare_digest(given.encode(errors="surrogateescape"), key.encode(errors="surrogateescape"))


_T = TypeVar("_T")


async def _body(request: web.Request, type_: type[_T]) -> _T:
    """A JSON body of the control API; an empty one is an empty object."""
    try:
        return msgspec.json.decode(await request.read() or b"{}", type=type_)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"the body is not what this route takes: {error}") from None


def _json(value: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")


class _Routes:
    """One method a route."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._config = gateway.config
        self._sessions = gateway.sessions

    # -- control side

    async def create(self, request: web.Request) -> web.Response:
        body = await _body(request, _Create)
        session = await self._sessions.create(
            body.session_id,
            metadata=body.metadata,
            sampling=session_sampling(body.sampling or {}),
            max_turns=body.max_turns,
            max_tokens=body.max_tokens,
            deadline_s=body.deadline_s,
        )
        base_url = f"{request.scheme}://{request.host}/sessions/{session.session_id}/v1"
        out = {"session_id": session.session_id, "base_url": base_url}
        if self._config.api_key is not None:
            out["api_key"] = session_key(session.session_id, self._config.api_key)
        return _json(out)

    async def list(self, request: web.Request) -> web.Response:
        try:
            limit = int(request.query.get("limit", "100"))
        except ValueError:
            raise RequestError("`limit` must be a number", param="limit") from None
        if not 1 <= limit <= 1000:
            raise RequestError("`limit` must be from 1 to 1000", param="limit")
        state = request.query.get("state")
        if state not in (None, "open", "finished", "sealed"):
            raise RequestError("`state` must be open, finished or sealed", param="state")
        records = await self._sessions.list_sessions(
            state=state, after=request.query.get("after", ""), limit=limit + 1
        )
        rows = [
            {k: getattr(r, k) for k in ("session_id", "state", "created_at", "reward", "metadata")}
            for r in records[:limit]
        ]
        return _json({"sessions": rows, "has_more": len(records) > limit})

    async def show(self, request: web.Request) -> web.Response:
        session = await self._sessions.get(request.match_info["session_id"])
        return _json(session.summary())

    async def samples(self, request: web.Request) -> web.Response:
        session = await self._sessions.get(request.match_info["session_id"])
        batch = samples(session.record, session.tree.tapes())
        if ARROW_STREAM in request.headers.get("Accept", ""):
            return web.Response(
                body=await asyncio.to_thread(to_arrow_stream, batch), content_type=ARROW_STREAM
            )
        rows = await asyncio.to_thread(to_json_rows, batch)
        return web.Response(body=b'{"samples":' + rows + b"}", content_type="application/json")

    async def finish(self, request: web.Request) -> web.Response:
        body = await _body(request, _Finish)
        session = await self._sessions.get(request.match_info["session_id"])
        await self._sessions.finish(session, body.reward, body.metadata)
        return _json(session.summary())

    async def delete(self, request: web.Request) -> web.Response:
        session_id = request.match_info["session_id"]
        await self._sessions.delete(session_id)
        return _json({"session_id": session_id, "deleted": True})

    async def healthz(self, request: web.Request) -> web.Response:
        del request
        return _json({"status": "ok", "version": __version__})

    async def readyz(self, request: web.Request) -> web.Response:
        del request
        info = await self._gateway.engine.info()
        return _json({"status": "ready", "engine": _info_json(info)})

    async def metrics(self, request: web.Request) -> web.Response:
        del request
        return web.Response(body=self._gateway.metrics.to_text(), content_type="text/plain", charset="utf-8")

    # -- agent side

    async def models(self, request: web.Request) -> web.Response:
        if session_id := request.match_info.get("session_id"):
            await self._sessions.get(session_id, used=True)
        model = {"id": self._config.model, "object": "model", "created": 0, "owned_by": "tokentape"}
        return _json({"object": "list", "data": [model]})

    def agent(self, wire: Wire) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        """The handler of a wire's main route."""

        async def handle(request: web.Request) -> web.StreamResponse:
            session = await self._session(request)
            decoded = self._gateway.api.decode(wire, session, await request.read(), request.headers)
            if decoded.request.stream:
                return await self._stream(request, session, decoded)
            return await self._whole(request, session, decoded)

        return handle

    async def _whole(self, request: web.Request, session: Session, decoded: Decoded) -> web.StreamResponse:
        api = self._gateway.api
        dones = await api.whole(session, decoded, request.headers)
        response = web.Response(body=decoded.writer.whole(dones), content_type="application/json")
        with contextlib.suppress(ConnectionError):  # the turn is committed: a retry gets the reply
            await response.prepare(request)
            await response.write_eof()
            api.delivered(session, decoded)
        return response

    async def _stream(self, request: web.Request, session: Session, decoded: Decoded) -> web.StreamResponse:
        """Headers leave with the first token: what fails before it still gets its own status."""
        api = self._gateway.api
        response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream",
                "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no",
            }
        )
        async with contextlib.aclosing(api.stream(session, decoded, request.headers)) as pieces:
            with contextlib.suppress(ConnectionError):  # the client has left: so do we
                async for piece in pieces:
                    if not response.prepared:
                        await response.prepare(request)
                    await response.write(piece)
                api.delivered(session, decoded)  # now: Codex hangs up as soon as it has read the last event
                await response.write_eof()
        return response

    async def _session(self, request: web.Request) -> Session:
        """The session of an agent's request: from the path, the header, or the credential."""
        session_id = request.match_info.get("session_id") or request.get(_SESSION)
        session_id = session_id or request.headers.get("X-Session-Id")
        if session_id is None and self._config.api_key is None:
            session_id = _credential(request)
        if not session_id:
            elsewhere = " or API key" if self._config.api_key is None else ""
            raise NotFound(
                "no session: use the base_url that POST /sessions answers, or send its id as "
                f"X-Session-Id header{elsewhere}"
            )
        return await self._sessions.get(session_id, used=True)

    async def learn_context_length(self, app: web.Application) -> AsyncIterator[None]:
        """Ask the engine for its context length until it answers; it may start after the gateway."""
        del app
        task = asyncio.ensure_future(self._learn())
        yield
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    async def _learn(self) -> None:
        wait_s = 0.5
        while self._config.context_length is None:
            try:
                info = await self._gateway.engine.info()
            except TokentapeError as error:
                log.info("engine: not there yet: %s", error)
                await asyncio.sleep(wait_s)
                wait_s = min(2 * wait_s, 10.0)
            else:
                log.info("engine: %s", _info_json(info))
                if info.context_length is not None:
                    self._gateway.turns.planner.context_length = info.context_length
                return


def _info_json(info: EngineInfo) -> Json:
    return {
        "model": info.model,
        "context_length": info.context_length,
        "weight_version": info.weight_version,
    }
