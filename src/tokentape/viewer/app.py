"""The viewer's routes: the page, and what it asks for. Text leaves as JSON, never as HTML."""

import json
from collections.abc import Awaitable, Callable, Sequence
from hashlib import blake2b
from hmac import compare_digest
from importlib.resources import files
from typing import Any

import msgspec
from aiohttp import web

from tokentape.errors import RequestError, TokentapeError, Unauthorized
from tokentape.viewer.desk import Desk

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
_SECURITY = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_NAMES = tuple(sorted(file.name for file in (files("tokentape.viewer") / "static").iterdir()))
PAGE = frozenset({"/ui", "/ui/", *(f"/ui/{name}" for name in _NAMES)})
"""Paths of the page itself, which has no data: no key is asked for them."""


def routes(desk: Desk) -> Sequence[web.RouteDef]:
    """The page and its questions under /ui; those about one session under /sessions/{session_id}/view.

    So whoever passes requests on by the session in their path passes these on, too.
    """
    asked = _Routes(desk)
    one = "/sessions/{session_id}/view"
    return [
        web.get("/ui", _to_page),
        web.get("/ui/", _static("index.html")),
        *(web.get(f"/ui/{name}", _static(name)) for name in _NAMES),
        web.get("/ui/api/info", asked.info),
        web.get("/ui/api/sessions", asked.sessions),
        web.get(one, asked.session),
        web.get(f"{one}/summary", asked.summary),
        web.get(f"{one}/{{turn_id}}", asked.branch),
        web.get(f"{one}/{{turn_id}}/lines", asked.lines),
        web.get(f"{one}/{{turn_id}}/tokens", asked.tokens),
        web.get(f"{one}/{{turn_id}}/search", asked.search),
        web.get(f"{one}/{{turn_id}}/drift", asked.drift),
        web.get(f"{one}/{{turn_id}}/scores", asked.scores),
        web.get(f"{one}/{{turn_id}}/difference", asked.difference),
        web.get(f"{one}/{{turn_id}}/wire", asked.wire),
    ]


def make_app(desk: Desk, api_key: str | None = None) -> web.Application:
    """The viewer without a gateway; with `api_key` all data is behind it."""

    @web.middleware
    async def boundary(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            if api_key is not None and request.path not in PAGE | {"/"}:
                given = request.headers.get("Authorization", "").removeprefix("Bearer ")
                if not compare_digest(given.encode(errors="replace"), api_key.encode(errors="replace")):
                    raise Unauthorized("a valid API key is required")
            return await handler(request)
        except TokentapeError as error:
            return _json({"error": {"message": str(error), "type": error.kind}}, status=error.status)
        except web.HTTPException as error:
            what = f"{request.method} {request.path}: {error.reason}"
            return _json({"error": {"message": what, "type": "not_found"}}, status=error.status)

    async def to_page(request: web.Request) -> web.StreamResponse:
        del request
        return web.Response(status=302, headers={"Location": "ui/"})

    app = web.Application(middlewares=[boundary])
    app.router.add_routes([web.get("/", to_page), *routes(desk)])
    return app


class _Routes:
    """One method a route."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def info(self, request: web.Request) -> web.StreamResponse:
        del request
        return _json(self._desk.info())

    async def sessions(self, request: web.Request) -> web.StreamResponse:
        limit = _number(request, "limit", 500, 1, 1000)
        return _json(await self._desk.sessions(request.query.get("after", ""), limit))

    async def session(self, request: web.Request) -> web.StreamResponse:
        return await self._versioned(request, self._desk.session)

    async def summary(self, request: web.Request) -> web.StreamResponse:
        return await self._versioned(request, self._desk.summary)

    async def branch(self, request: web.Request) -> web.StreamResponse:
        return _json(await self._desk.branch(*_named(request)))

    async def lines(self, request: web.Request) -> web.StreamResponse:
        columns = _number(request, "columns", 120, 16, 1000)
        return _json(await self._desk.lines(*_named(request), columns))

    async def tokens(self, request: web.Request) -> web.StreamResponse:
        start, end = (_number(request, name, 0, 0, 2**31) for name in ("start", "end"))
        return _json(await self._desk.tokens(*_named(request), start, end))

    async def search(self, request: web.Request) -> web.StreamResponse:
        return _json(await self._desk.search(*_named(request), request.query.get("q", "")))

    async def drift(self, request: web.Request) -> web.StreamResponse:
        return _json(await self._desk.drift(*_named(request)))

    async def scores(self, request: web.Request) -> web.StreamResponse:
        return _json(await self._desk.scores(*_named(request)))

    async def difference(self, request: web.Request) -> web.StreamResponse:
        return _json(await self._desk.difference(*_named(request), request.query.get("other", "")))

    async def wire(self, request: web.Request) -> web.StreamResponse:
        return _json(await self._desk.wire(*_named(request)))

    async def _versioned(
        self, request: web.Request, ask: Callable[[str], Awaitable[Any]]
    ) -> web.StreamResponse:
        """304 where nothing has changed since the page last asked."""
        session_id = request.match_info["session_id"]
        tag = f'"{blake2b((await self._desk.version(session_id)).encode(), digest_size=8).hexdigest()}"'
        if request.headers.get("If-None-Match") == tag:
            return web.Response(status=304, headers={"ETag": tag, **_SECURITY})
        return _json(await ask(session_id), tag=tag)


def _named(request: web.Request) -> tuple[str, str]:
    return request.match_info["session_id"], request.match_info["turn_id"]


def _number(request: web.Request, name: str, default: int, least: int, most: int) -> int:
    try:
        value = int(request.query.get(name, default))
    except ValueError:
        raise RequestError(f"`{name}` must be a number", param=name) from None
    if not least <= value <= most:
        raise RequestError(f"`{name}` must be from {least} to {most}", param=name)
    return value


def _json(value: object, *, status: int = 200, tag: str | None = None) -> web.Response:
    try:
        body = msgspec.json.encode(value)
    except UnicodeEncodeError:  # half a surrogate pair, which only an escape can write
        body = json.dumps(msgspec.to_builtins(value)).encode()
    headers = {**_SECURITY, "Cache-Control": "no-store", **({} if tag is None else {"ETag": tag})}
    return web.Response(body=body, status=status, content_type="application/json", headers=headers)


async def _to_page(request: web.Request) -> web.StreamResponse:
    """What the page refers to, it refers to relatively: a gateway may stand below another path."""
    del request
    return web.Response(status=302, headers={"Location": "ui/", **_SECURITY})


def _static(name: str) -> Handler:
    kind = _TYPES[name.rpartition(".")[2]]
    body = (files("tokentape.viewer") / "static" / name).read_bytes()
    tag = f'"{blake2b(body, digest_size=8).hexdigest()}"'
    headers = {**_SECURITY, "Cache-Control": "no-cache", "ETag": tag}

    async def answer(request: web.Request) -> web.StreamResponse:
        if request.headers.get("If-None-Match") == tag:
            return web.Response(status=304, headers=headers)
        return web.Response(body=body, content_type=kind, charset="utf-8", headers=headers)

    return answer
