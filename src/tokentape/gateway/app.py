"""HTTP: routes, who may call them, and one place where an error becomes a status."""

import asyncio
import contextlib
import hmac
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec
from aiohttp import web

from tokentape import __version__
from tokentape.errors import (
    NotFound,
    RequestError,
    TokentapeError,
    TooLarge,
    Unauthorized,
)
from tokentape.export.samples import samples, to_arrow_stream, to_json_rows
from tokentape.gateway import control, workers
from tokentape.gateway.agents import (
    ROUTES,
    Asked,
    Refusal,
    Route,
    list_models,
    show_model,
    spoken,
    to_typed,
)
from tokentape.gateway.credit import Credit
from tokentape.gateway.parts import Gateway, info_json
from tokentape.gateway.sessions import Session
from tokentape.gateway.viewing import desk_of
from tokentape.gateway.wire import Decoded, Wire
from tokentape.gateway.wirelog import Exchanged
from tokentape.viewer.app import PAGE
from tokentape.viewer.app import routes as viewer_routes

ARROW_STREAM = "application/vnd.apache.arrow.stream"
_OPEN_ROUTES = frozenset({"/healthz", "/readyz"}) | PAGE
_SESSION = web.RequestKey("session", str)  # whose key the caller has


def make_app(gateway: Gateway, *middlewares: Any) -> web.Application:
    """The gateway as an aiohttp application, its routes behind some middlewares.

    It does not own the gateway's parts: close them after it.
    """
    app = web.Application(
        middlewares=[_boundary(gateway), *middlewares], client_max_size=gateway.config.max_body_bytes
    )
    routes = _Routes(gateway)
    app.router.add_routes(
        [
            web.post("/sessions", routes.create),
            web.get("/sessions", routes.list),
            web.get("/sessions/{session_id}", routes.show),
            web.delete("/sessions/{session_id}", routes.delete),
            web.get("/sessions/{session_id}/samples", routes.samples),
            web.post("/sessions/{session_id}/rewards", routes.reward),
            web.post("/sessions/{session_id}/finish", routes.finish),
            web.get("/weights", routes.weights),
            web.post("/weights", routes.announce),
            web.post("/pause", routes.pause),
            web.post("/resume", routes.resume),
            web.get("/workers", routes.workers),
            web.post("/workers", routes.add_worker),
            web.delete("/workers", routes.remove_worker),
            web.get("/healthz", routes.healthz),
            web.get("/readyz", routes.readyz),
            web.get("/metrics", routes.metrics),
            *viewer_routes(desk_of(gateway)),
            *(
                route
                # Anthropic's SDK puts /v1 behind a base URL, OpenAI's does not: either may have it already.
                for prefix in ("", "/v1", "/sessions/{session_id}", "/sessions/{session_id}/v1")
                for route in (
                    *(web.route(one.method, prefix + one.path, routes.agent(one)) for one in ROUTES),
                    web.get(f"{prefix}/v1/models", routes.models),
                    web.get(f"{prefix}/v1/models/{{model:.+}}", routes.model),
                )
            ),
        ]
    )
    return app


def _boundary(gateway: Gateway) -> Any:
    """Every error leaves as JSON in its provider's shape; a caller without the key comes no further."""

    @web.middleware
    async def boundary(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        try:
            if gateway.config.api_key is not None and request.path not in _OPEN_ROUTES:
                _authorise(request, gateway.config.api_key)
            with gateway.api.admission.reading(_body_bytes(request, gateway.config.max_body_bytes)):
                return await handler(request)
        except web.HTTPRequestEntityTooLarge:
            text = f"the body is larger than {gateway.config.max_body_bytes} bytes"
            return _error(request, TooLarge(text))
        except web.RequestPayloadError as error:  # a Content-Encoding, or chunks, that it does not have
            return _error(request, RequestError(f"the body cannot be read: {error}"))
        except web.HTTPException as error:
            text = f"{request.method} {request.path}: {error.reason}"
            typed = NotFound(text) if error.status == 404 else RequestError(text)
            return _error(request, typed, status=error.status)
        except Exception as error:
            return _error(request, to_typed(error, gateway.metrics, f"{request.method} {request.path}"))

    return boundary


def _error(request: web.Request, error: TokentapeError, *, status: int | None = None) -> web.Response:
    refusal = Refusal.of(spoken(request.path, request.headers), error, status=status)
    return web.Response(
        body=refusal.body,
        status=refusal.status,
        content_type="application/json",
        headers=refusal.headers,
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
    is_its_own = request.match_info.get("session_id", session_id) == session_id
    if "/v1/" in request.path and is_its_own and _equal(given, session_key(session_id, api_key)):
        request[_SESSION] = session_id
        return
    raise Unauthorized("a valid API key is required: send it as `Authorization: Bearer KEY` or `x-api-key`")


def _body_bytes(request: web.Request, most: int) -> int:
    """How large the body may become: its length, or the largest there is where that does not say."""
    if not request.body_exists:
        return 0
    if request.content_length is None or "Content-Encoding" in request.headers:
        return most
    return min(request.content_length, most)


def _is_there(request: web.Request) -> bool:
    """Whether the client's connection is still open; it is not where the last write failed."""
    return request.transport is not None and not request.transport.is_closing()


def _equal(given: str, key: str) -> bool:
    return hmac.compare_digest(given.encode(errors="surrogateescape"), key.encode(errors="surrogateescape"))


def _json(value: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")


def session_named(request: web.Request, api_key: str | None) -> str | None:
    """The session that a request names: in its path, its header, or its credential."""
    session_id = request.match_info.get("session_id") or request.get(_SESSION)
    session_id = session_id or request.headers.get("X-Session-Id")
    return _credential(request) if session_id is None and api_key is None else session_id


class _Routes:
    """One method a route."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._config = gateway.config
        self._sessions = gateway.sessions

    # -- control side

    async def create(self, request: web.Request) -> web.Response:
        body = control.read_body(await request.read(), control.Create)
        session = await control.create(self._sessions, body)
        base_url = f"{request.scheme}://{request.host}/sessions/{session.session_id}/v1"
        out = {"session_id": session.session_id, "base_url": base_url}
        if self._config.api_key is not None:
            out["api_key"] = session_key(session.session_id, self._config.api_key)
        return _json(out)

    async def list(self, request: web.Request) -> web.Response:
        try:
            limit = int(request.query.get("limit", "100"))
        except ValueError:
            raise RequestError("`limit` must be a number from 1 to 1000", param="limit") from None
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
        return _json(await self._gateway.summary(session))

    async def samples(self, request: web.Request) -> web.Response:
        session = await self._sessions.get(request.match_info["session_id"])
        batch = await session.read(lambda: samples(session.record, session.tree.tapes()))
        if ARROW_STREAM in request.headers.get("Accept", ""):
            return web.Response(
                body=await asyncio.to_thread(to_arrow_stream, batch), content_type=ARROW_STREAM
            )
        rows = await asyncio.to_thread(to_json_rows, batch)
        return web.Response(body=b'{"samples":' + rows + b"}", content_type="application/json")

    async def finish(self, request: web.Request) -> web.Response:
        credit = control.read_body(await request.read(), Credit)
        session = await self._sessions.get(request.match_info["session_id"])
        await self._sessions.finish(session, credit)
        return _json(await self._gateway.summary(session))

    async def reward(self, request: web.Request) -> web.Response:
        credit = control.read_body(await request.read(), Credit)
        session = await self._sessions.get(request.match_info["session_id"])
        await self._sessions.credit(session, credit)
        return _json(await self._gateway.summary(session))

    async def delete(self, request: web.Request) -> web.Response:
        session_id = request.match_info["session_id"]
        await self._sessions.delete(session_id)
        return _json({"session_id": session_id, "deleted": True})

    async def healthz(self, request: web.Request) -> web.Response:
        del request
        engine = self._gateway.engine
        body = {"status": "ok", "version": __version__, "paused": engine.paused}
        return _json({**body, "current": engine.is_current()})

    async def readyz(self, request: web.Request) -> web.Response:
        del request
        info = await self._gateway.engine.info()
        return _json({"status": "ready", "paused": self._gateway.engine.paused, "engine": info_json(info)})

    async def weights(self, request: web.Request) -> web.Response:
        del request
        return _json(await self._gateway.weights.state())

    async def announce(self, request: web.Request) -> web.Response:
        body = control.read_body(await request.read(), control.Announce)
        return _json(await self._gateway.weights.announce(body.version))

    async def pause(self, request: web.Request) -> web.Response:
        del request
        return _json(await self._gateway.weights.pause())

    async def resume(self, request: web.Request) -> web.Response:
        del request
        return _json(self._gateway.weights.resume())

    async def workers(self, request: web.Request) -> web.Response:
        del request
        return _json(await workers.list_workers(self._gateway.pool))

    async def add_worker(self, request: web.Request) -> web.Response:
        body = control.read_body(await request.read(), workers.WorkerAt)
        await workers.known(self._gateway.pool).add(body.url)
        return _json(await workers.list_workers(self._gateway.pool))

    async def remove_worker(self, request: web.Request) -> web.Response:
        body = control.read_body(await request.read(), workers.WorkerGone)
        url = body.url or request.query.get("url", "")
        await workers.known(self._gateway.pool).remove(url, abort=body.abort)
        return _json(await workers.list_workers(self._gateway.pool))

    async def metrics(self, request: web.Request) -> web.Response:
        del request
        return web.Response(body=self._gateway.metrics.to_text(), content_type="text/plain", charset="utf-8")

    # -- agent side

    async def models(self, request: web.Request) -> web.Response:
        if session_id := request.match_info.get("session_id"):
            await self._sessions.get(session_id, used=True)
        return _json(list_models(self._gateway))

    async def model(self, request: web.Request) -> web.Response:
        if session_id := request.match_info.get("session_id"):
            await self._sessions.get(session_id, used=True)
        return _json(show_model(self._gateway, request.match_info["model"]))

    def agent(self, route: Route) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        """The handler of a route inside a session."""

        async def handle(request: web.Request) -> web.StreamResponse:
            body = await request.read()  # first: a session that nobody uses yet may move meanwhile
            session = await self._session(request)
            if not isinstance(route.answer, Wire):
                query = {name: ",".join(request.query.getall(name)) for name in request.query}
                asked = Asked(self._gateway, session, body, request.headers, request.match_info, query)
                return _json(route.answer(asked))
            decoded = self._gateway.api.decode(route.answer, session, body, request.headers)
            if decoded.request.stream:
                return await self._stream(request, session, decoded)
            return await self._whole(request, session, decoded)

        return handle

    async def _whole(self, request: web.Request, session: Session, decoded: Decoded) -> web.StreamResponse:
        async with self._gateway.api.answering(session, decoded, request.headers) as answering:
            reply = decoded.writer.whole(await answering.dones())
            await self._keep(request, answering.turn_ids, [reply])
            response = web.Response(body=reply, content_type="application/json")
            with contextlib.suppress(ConnectionError):  # the turn is committed: a retry gets the reply
                await response.prepare(request)
                await response.write_eof()
                if _is_there(request):
                    answering.delivered()
        return response

    async def _stream(self, request: web.Request, session: Session, decoded: Decoded) -> web.StreamResponse:
        """Headers leave with the first token: what fails before it still gets its own status."""
        response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream",
                "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no",
            }
        )
        async with (
            self._gateway.api.answering(session, decoded, request.headers) as answering,
            contextlib.aclosing(answering.pieces()) as pieces,
        ):
            with contextlib.suppress(ConnectionError):  # the client has left: so do we
                sent: list[bytes] = []
                async for piece in pieces:
                    if not response.prepared:
                        await response.prepare(request)
                    await response.write(piece)
                    if self._gateway.wires.is_on:
                        sent.append(piece)
                await self._keep(request, answering.turn_ids, sent)
                if _is_there(request):  # asked now: Codex hangs up as soon as it has read the last event
                    answering.delivered()
                await response.write_eof()
        return response

    async def _keep(self, request: web.Request, turn_ids: Sequence[str], reply: Sequence[bytes]) -> None:
        if self._gateway.wires.is_on:
            exchanged = Exchanged(request.path, await request.read(), b"".join(reply))
            self._gateway.wires.keep(turn_ids, exchanged)

    async def _session(self, request: web.Request) -> Session:
        """The session of an agent's request: from the path, the header, or the credential."""
        session_id = session_named(request, self._config.api_key)
        if not session_id:
            elsewhere = " or API key" if self._config.api_key is None else ""
            raise NotFound(
                "no session: use the base_url that POST /sessions answers, or send its id as "
                f"X-Session-Id header{elsewhere}"
            )
        return await self._sessions.get(session_id, used=True)
