"""A router as sglang-router 0.3.2 is one: what it passes on, what it drops, what it says of a dead server."""

import contextlib
import json
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

import aiohttp
from aiohttp import web

from gatewaykit import Json
from tokentape.engines.server import serve

# Observed: its own idea of `/generate`. What is not here never reaches a server.
PASSED = {
    "rid",
    "input_ids",
    "sampling_params",
    "return_logprob",
    "logprob_start_len",
    "top_logprobs_num",
    "stream",
}
PASSED_PARAMS = {
    *("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "stop", "stop_token_ids", "sampling_seed"),
    *("frequency_penalty", "presence_penalty", "repetition_penalty", "json_schema"),
}
_FAILURES = 3  # of one server in a row, after which it is left alone


@dataclass
class FakeRouter:
    """`urls` are its servers, which a test may change; `of_session` where each routing key goes."""

    urls: list[str]
    url: str = ""
    of_session: dict[str, str] = field(default_factory=dict[str, str])
    failures: dict[str, int] = field(default_factory=dict[str, int])

    def app(self) -> web.Application:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_post("/generate", self._generate)
        app.router.add_get("/workers", self._workers)
        app.router.add_get("/health", self._health)
        app.router.add_get("/get_server_info", self._server_info)
        return app

    def server_for(self, key: str) -> str | None:
        """The key's own server, else the one with the fewest keys; none that failed too often."""
        sound = [url for url in self.urls if self.failures.get(url, 0) < _FAILURES]
        if self.of_session.get(key) not in sound and sound:
            kept = list(self.of_session.values())
            self.of_session[key] = min(sound, key=kept.count)
        return self.of_session[key] if sound else None

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        body = {name: value for name, value in body.items() if name in PASSED}
        params = body["sampling_params"]
        body["sampling_params"] = {name: value for name, value in params.items() if name in PASSED_PARAMS}
        server = self.server_for(request.headers["X-SMG-Routing-Key"])
        if server is None:
            return _error(503, "no_available_workers", "No available workers")
        outer = web.StreamResponse()
        try:
            async with (
                aiohttp.ClientSession() as http,
                http.post(server + "/generate", json=body) as inner,
            ):
                outer.set_status(inner.status)
                outer.content_type = inner.content_type
                await outer.prepare(request)
                async for piece in inner.content.iter_any():
                    await outer.write(piece)
                await outer.write_eof()
                return outer
        except aiohttp.ClientError as error:
            self.failures[server] = self.failures.get(server, 0) + 1
            if outer.prepared:
                assert request.transport is not None
                request.transport.close()
                return outer
            return _error(500, "call_upstream_request_error", f"error sending request for url: {error}")

    async def _workers(self, _request: web.Request) -> web.Response:
        listed: list[Json] = [{"id": url, "url": url, "is_healthy": True, "load": 0} for url in self.urls]
        return web.json_response({"workers": listed, "total": len(listed)})

    async def _health(self, _request: web.Request) -> web.Response:
        return web.Response(text="OK")

    async def _server_info(self, _request: web.Request) -> web.Response:
        return web.json_response({"router_manager": True, "workers_count": len(self.urls)})


def _error(status: int, code: str, message: str) -> web.Response:
    error = {"type": "Internal Server Error", "code": code, "message": message}
    return web.Response(
        status=status, body=json.dumps({"error": error}).encode(), content_type="application/json"
    )


@contextlib.asynccontextmanager
async def routing(urls: Sequence[str]) -> AsyncGenerator[FakeRouter]:
    router = FakeRouter(list(urls))
    async with serve(router.app(), drain_s=0.1) as router.url:
        yield router
