"""Serves an embedded engine over SGLang's native protocol: the routes clients use, as a real server answers.

Statuses, shapes and messages follow SGLang 0.5.23. A client that goes away aborts its generation, which needs
`serve` (or an `AppRunner` with `handler_cancellation=True`): aiohttp does not cancel handlers by default.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import msgspec
from aiohttp import web

from tokentape.engines.server.answer import Answer
from tokentape.engines.server.requests import (
    BadBodyError,
    GenerateBody,
    Generation,
    SamplingParams,
    UnknownParamError,
    check_prompt,
    check_top,
    decode_body,
    parse_fields,
    parse_input_ids,
    parse_params,
)
from tokentape.errors import ConfigError, RequestError, TokentapeError

_ABORT_S = 0.1  # for requests whose time is over to see that they are aborted; 0 would be for ever
MAX_BODY_BYTES = 1 << 28  # aiohttp's own limit of 1 MiB is less than one long prompt

_FLUSHED = (
    "Cache flushed.\nPlease check backend logs for more details. "
    "(When there are running or waiting requests, the operation will not be performed.)\n"
)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What does not change while an engine runs. Lengths in tokens."""

    model_path: str
    model_type: str
    architectures: tuple[str, ...]
    context_length: int
    vocab_size: int
    device: str
    dtype: str
    max_batch: int


class ServedEngine(Protocol):
    """What this server asks of an engine; `local.LocalEngine` is one, a test's fake another.

    Generations come in checked. The engine fills them in and calls their `on_progress`: at every token when
    `body.stream`, and once at the end.
    """

    @property
    def facts(self) -> EngineFacts:
        """Who it is."""
        ...

    @property
    def weight_version(self) -> str:
        """The name of the weights that sample now."""
        ...

    @property
    def healthy(self) -> bool:
        """Whether it still works."""
        ...

    def submit(self, generation: Generation) -> None:
        """Begin a generation; raises `RequestError` when its rid is in flight."""
        ...

    def cancel(self, generation: Generation) -> None:
        """Abort exactly this generation."""
        ...

    def abort(self, rid: str, *, everything: bool = False) -> None:
        """Abort by rid as SGLang does, or everything."""
        ...

    def pause(self, mode: str) -> "Future[None]":
        """Stop sampling: `abort`, `in_place` or `retract`."""
        ...

    def resume(self) -> "Future[None]":
        """Sample again."""
        ...

    def update_weights(self, model_path: str, weight_version: str | None) -> "Future[None]":
        """Load weights between two steps; the future raises `ConfigError` when they do not fit."""
        ...

    def set_weight_version(self, weight_version: str) -> "Future[None]":
        """Rename the weights."""
        ...

    def flush_cache(self) -> "Future[bool]":
        """Empty the prefix cache; False while something runs."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Text → ids."""
        ...

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        """Ids → text."""
        ...


async def _no_farewell(until: float) -> None:
    del until


@asynccontextmanager
async def serve(
    app: web.Application,
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    drain_s: float = 10.0,
    leave: Callable[[float], Awaitable[None]] = _no_farewell,
) -> AsyncGenerator[str]:
    """Serve an app while the context is open; yields its URL, with the port that was bound when `port` is 0.

    It ends as `running` does; what `leave` does comes first, within the same `drain_s`: it is given the
    event loop's time at which they end, and connections are accepted until it returns.
    """
    async with running(app, drain_s=drain_s, leave=leave) as runner:
        site = web.TCPSite(runner, host, port)
        await site.start()
        bound = runner.addresses[0]
        yield f"http://{f'[{host}]' if ':' in host else host}:{bound[1]}"


@asynccontextmanager
async def running(
    app: web.Application, *, drain_s: float, leave: Callable[[float], Awaitable[None]] = _no_farewell
) -> AsyncGenerator[web.AppRunner]:
    """Run an app while the context is open; where it listens is the caller's to say.

    On the way out no connection is accepted; requests under way have `drain_s` seconds before they are
    aborted. `leave` is as in `serve`.
    """
    # aiohttp itself waits up to twice its timeout: it is left what is to be aborted.
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=_ABORT_S)
    await runner.setup()
    try:
        yield runner
    finally:
        until = asyncio.get_running_loop().time() + drain_s
        try:
            await leave(until)
        finally:
            for site in list(runner.sites):
                await site.stop()
            for _ in range(3):  # a connection just accepted is not the server's yet: it would stay open
                await asyncio.sleep(0)
            if runner.server is not None:
                runner.server.pre_shutdown()  # connections that nobody uses end at once
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(until):
                        await runner.server.shutdown()
            await runner.cleanup()


def make_app(engine: ServedEngine, *, incremental_stream: bool = False) -> web.Application:
    """SGLang's native routes over an engine.

    Stream events are cumulative, as SGLang's are; with `incremental_stream` `text`, `output_ids` and
    log-probabilities are what is new since the last event (SGLang's `--incremental-streaming-output`).
    """
    routes = _Routes(engine, incremental_stream)
    app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[_errors])
    app.router.add_post("/generate", routes.generate)
    app.router.add_put("/generate", routes.generate)
    for path, handler in routes.posts().items():
        app.router.add_post(path, handler)
    for path in ("/health", "/health_generate", "/ready"):
        app.router.add_get(path, routes.health)
    for path in ("/get_model_info", "/model_info"):
        app.router.add_get(path, routes.model_info)
    for path in ("/get_server_info", "/server_info"):
        app.router.add_get(path, routes.server_info)
    app.router.add_get("/v1/models", routes.models)
    return app


def _json(body: object, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(body), status=status, content_type="application/json")


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """The one place where an error becomes a status and one of SGLang's three error shapes."""
    try:
        return await handler(request)
    except web.HTTPMethodNotAllowed as error:
        response = _json({"detail": "Method Not Allowed"}, 405)
        response.headers["Allow"] = ", ".join(sorted(error.allowed_methods))
        return response
    except web.HTTPNotFound:
        return _json({"detail": "Not Found"}, 404)
    except BadBodyError as error:
        message = (
            f'1 validation error:\n  {error.detail}\n\n  File "tokentape/engines/server.py"\n'
            f"    {request.method} {request.path} [{error.detail}]"
        )
        return _json(
            {"object": "error", "message": message, "type": "Bad Request", "param": None, "code": 400}, 400
        )
    except UnknownParamError as error:
        return _json({"error": str(error)}, 400)
    except TokentapeError as error:
        return _json({"error": {"message": str(error)}}, error.status)


class _Routes:
    """The handlers; `engine` and the stream's mode are all the state there is."""

    def __init__(self, engine: ServedEngine, incremental: bool) -> None:
        self._engine = engine
        self._incremental = incremental

    def posts(self) -> dict[str, Handler]:
        """The POST routes beside /generate."""
        return {
            "/abort_request": self.abort,
            "/update_weights_from_disk": self.update_weights,
            "/update_weight_version": self.update_version,
            "/pause_generation": self.pause,
            "/continue_generation": self.resume,
            "/flush_cache": self.flush_cache,
            "/tokenize": self.tokenize,
            "/v1/tokenize": self.tokenize,
            "/detokenize": self.detokenize,
            "/v1/detokenize": self.detokenize,
        }

    async def generate(self, request: web.Request) -> web.StreamResponse:
        """One completion, streamed or whole."""
        body = decode_body(await request.read())
        fields = parse_fields(body)
        ids = parse_input_ids(body.get("input_ids"))
        progress = asyncio.Event()
        loop = asyncio.get_running_loop()

        def on_progress() -> None:
            # The loop may have closed while a step was under way: nobody is left to be told.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(progress.set)

        try:
            ids, params = self._checked(body, fields, ids)
            generation = Generation(ids, params, fields, on_progress=on_progress)
            self._engine.submit(generation)
        except (UnknownParamError, BadBodyError):
            raise
        except TokentapeError as error:
            if fields.stream:
                return await _refuse_in_stream(request, error)
            raise
        answer = Answer(generation, self._engine.decode)
        try:
            if fields.stream:
                return await self._stream(request, answer, progress)
            while generation.finish_reason is None:
                await progress.wait()
                progress.clear()
            if failure := answer.failure():
                return _json({"error": {"message": failure["message"]}}, failure["status_code"])
            return _json(answer.cumulative())
        finally:
            # Reached early when the client has gone: aiohttp cancels the handler, or the write fails.
            if generation.finish_reason is None:
                self._engine.cancel(generation)

    def _checked(
        self, body: dict[str, Any], fields: GenerateBody, ids: list[int] | None
    ) -> tuple[list[int], SamplingParams]:
        facts = self._engine.facts
        raw = body.get("sampling_params")
        params = parse_params(raw, facts.vocab_size)
        check_top(fields.top_logprobs_num, facts.vocab_size)
        if ids is None:
            text = body.get("text")
            if text is None:
                raise RequestError("Either text, input_ids or input_embeds should be provided.")
            if not isinstance(text, str):
                raise RequestError("The embedded engine takes one prompt per request: text must be a string.")
            ids = self._engine.encode(text)
        asked = params.max_new_tokens if raw and "max_new_tokens" in raw else None
        check_prompt(ids, asked, vocab_size=facts.vocab_size, context_length=facts.context_length)
        if fields.logprob_start_len > len(ids):
            raise RequestError(
                f"logprob_start_len={fields.logprob_start_len} is higher than the number of input tokens "
                f"{len(ids)}."
            )
        return ids, params

    async def _stream(
        self, request: web.Request, answer: Answer, progress: asyncio.Event
    ) -> web.StreamResponse:
        response = await _start_stream(request)
        generation = answer.generation
        while True:
            await progress.wait()
            progress.clear()
            finished = generation.finish_reason is not None
            if not finished and not answer.is_due():
                continue
            if failure := answer.failure():
                await _write_event(response, _event_error(failure["message"], failure["status_code"]))
            else:
                await _write_event(response, answer.delta() if self._incremental else answer.cumulative())
            if finished:
                break
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    async def abort(self, request: web.Request) -> web.Response:
        """Abort by rid; answers 200 for an unknown one as well."""
        body = decode_body(await request.read())
        self._engine.abort(str(body.get("rid") or ""), everything=bool(body.get("abort_all")))
        return web.Response()

    async def pause(self, request: web.Request) -> web.Response:
        """Stop sampling, mode `abort` unless said otherwise."""
        mode = decode_body(await request.read()).get("mode", "abort")
        if mode not in ("abort", "in_place", "retract"):
            raise BadBodyError(f"{{'type': 'literal_error', 'loc': ('body', 'mode'), 'input': {mode!r}}}")
        await asyncio.wrap_future(self._engine.pause(mode))
        return _json({"message": "Generation paused successfully.", "status": "ok"})

    async def resume(self, request: web.Request) -> web.Response:
        """Sample again."""
        await asyncio.wrap_future(self._engine.resume())
        return _json({"message": "Generation continued successfully.", "status": "ok"})

    async def update_weights(self, request: web.Request) -> web.Response:
        """Load weights from a directory at a step boundary."""
        body = decode_body(await request.read())
        path, version = body.get("model_path"), body.get("weight_version")
        if not isinstance(path, str) or not isinstance(version, str | None):
            raise BadBodyError("{'type': 'missing', 'loc': ('body', 'model_path'), 'msg': 'Field required'}")
        if body.get("abort_all_requests"):
            self._engine.abort("", everything=True)
        try:
            await asyncio.wrap_future(self._engine.update_weights(path, version))
        except ConfigError as error:
            return _json({"success": False, "message": str(error), "num_paused_requests": 0}, 400)
        message = "Succeeded to update model weights."
        if version is not None:
            message += f" Weight version updated to {version}."
        return _json({"success": True, "message": message, "num_paused_requests": 0})

    async def update_version(self, request: web.Request) -> web.Response:
        """Rename the weights. Like SGLang this aborts what runs, unless `abort_all_requests` is false."""
        body = decode_body(await request.read())
        version = body.get("new_version")
        if not isinstance(version, str):
            raise BadBodyError("{'type': 'missing', 'loc': ('body', 'new_version'), 'msg': 'Field required'}")
        if body.get("abort_all_requests", True):
            self._engine.abort("", everything=True)
        await asyncio.wrap_future(self._engine.set_weight_version(version))
        message = f"Weight version updated to {version}"
        return _json({"success": True, "message": message, "new_version": version})

    async def flush_cache(self, request: web.Request) -> web.Response:
        """Empty the prefix cache; 400 while something runs."""
        if await asyncio.wrap_future(self._engine.flush_cache()):
            return web.Response(text=_FLUSHED)
        return web.Response(text="Flush cache failed.\n", status=400)

    async def tokenize(self, request: web.Request) -> web.Response:
        """Text → ids."""
        body = decode_body(await request.read())
        if not isinstance(prompt := body.get("prompt"), str):
            raise BadBodyError("{'type': 'missing', 'loc': ('body', 'prompt'), 'msg': 'Field required'}")
        ids = self._engine.encode(prompt, add_special_tokens=bool(body.get("add_special_tokens", True)))
        return _json({"tokens": ids, "count": len(ids), "max_model_len": self._engine.facts.context_length})

    async def detokenize(self, request: web.Request) -> web.Response:
        """Ids → text."""
        body = decode_body(await request.read())
        ids = parse_input_ids(body.get("tokens"))
        if ids is None:
            raise BadBodyError("{'type': 'missing', 'loc': ('body', 'tokens'), 'msg': 'Field required'}")
        text = self._engine.decode(ids, skip_special_tokens=bool(body.get("skip_special_tokens", True)))
        return _json({"text": text})

    async def health(self, request: web.Request) -> web.Response:
        """200 with no body while the engine works, else 503."""
        return web.Response(status=200 if self._engine.healthy else 503)

    def _identity(self) -> dict[str, Any]:
        facts = self._engine.facts
        return {
            "model_path": facts.model_path,
            "served_model_name": facts.model_path,
            "tokenizer_path": facts.model_path,
            "is_generation": True,
            "preferred_sampling_params": None,
            "weight_version": self._engine.weight_version,
            "model_type": facts.model_type,
            "architectures": facts.architectures,
        }

    async def model_info(self, request: web.Request) -> web.Response:
        """Which model, which weights."""
        return _json(self._identity())

    async def server_info(self, request: web.Request) -> web.Response:
        """The limits that a client must know before it sends, beside the model's identity."""
        facts = self._engine.facts
        return _json(
            {
                **self._identity(),
                **{k: v for k, v in asdict(facts).items() if k not in ("max_batch", "architectures")},
                "max_req_input_len": facts.context_length - 1,
                "max_running_requests": facts.max_batch,
                "incremental_streaming_output": self._incremental,
                "version": "tokentape",
            }
        )

    async def models(self, request: web.Request) -> web.Response:
        """OpenAI's list of the one model there is."""
        facts = self._engine.facts
        model = {
            "id": facts.model_path,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "tokentape",
        }
        model |= {"root": facts.model_path, "parent": None, "max_model_len": facts.context_length}
        return _json({"object": "list", "data": [model]})


async def _start_stream(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
    await response.prepare(request)
    return response


async def _write_event(response: web.StreamResponse, event: object) -> None:
    await response.write(b"data: " + msgspec.json.encode(event) + b"\n\n")


def _event_error(message: str, status: int) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "internal_server_error"
    return {"error": {"message": message, "type": kind, "code": status, "retryable": status >= 500}}


async def _refuse_in_stream(request: web.Request, error: TokentapeError) -> web.StreamResponse:
    """A refusal of a streamed request: SGLang has answered 200 by then and sends it as an event."""
    response = await _start_stream(request)
    await _write_event(response, _event_error(str(error), error.status))
    await response.write(b"data: [DONE]\n\n")
    await response.write_eof()
    return response
