"""A fake SGLang server: the real protocol on a real socket, completions from a script, faults on demand.

Its answers and its refusals have the shape and the words of SGLang 0.5.23, as recorded from a real server.
"""

import asyncio
import json
from array import array
from collections import deque
from collections.abc import Callable
from typing import Self, cast

from aiohttp import web
from tokenizers import Tokenizer

from tokentape.testing.checks import GrammarRefusedError, RefusedError, check
from tokentape.testing.generation import (
    Generation,
    ReceivedRequest,
    json_answer,
    open_stream,
    refuse_constraint,
    reset,
    scripted_answer,
    to_event,
)
from tokentape.testing.script import Fault, Reply

_MAX_REMEMBERED = 256  # sequences in the pretended prefix cache


class FakeSGLang:
    """`async with FakeSGLang() as fake:` serves SGLang's native protocol at `fake.url`, a free local port.

    What it answers: the items given to `script`, in order; then what `responder` says of the request;
    without one, the prompt's last four ids and a stop. Requests that run at the same time take the script's
    items in the order of their arrival.

    It refuses what the real server refuses, in its words: no or empty `input_ids`, unknown or bad sampling
    parameters, a `rid` that is running, a prompt (plus `max_new_tokens`) beyond `context_length`, a
    constraint that is no JSON. An id outside `vocab_size` kills it, as it does the real one, and so does a
    `top_logprobs_num` beyond it. Constraints and `logit_bias` are recorded, not obeyed; `top_logprobs_num` is
    answered with `pseudo_top`, `logprob_start_len` with each id's `pseudo_logprob` at its place.
    `/abort_request` ends a running request with its
    partial ids, and every other whose rid begins with the same text (observed on the real one). Stop strings
    are not looked for.

    `host` and `port` are where to listen, where that must be known before.

    With a `tokenizer` it also fills in `text`, and answers `/tokenize`. `incremental` makes streams send
    deltas, as the server flag `--incremental-streaming-output` does. Set `weight_version`
    between requests to pretend a weight update.

    While `answering` is not set it hangs: it takes connections and answers no question about its health.
    `requests` are all that were received, `aborts` the rids of `/abort_request`, `alive` whether it still
    serves.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None = None,
        *,
        vocab_size: int | None = None,
        context_length: int = 8192,
        incremental: bool = False,
        responder: Callable[[ReceivedRequest], Reply | Fault] | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size or (tokenizer.get_vocab_size() if tokenizer else 32_000)
        self.context_length = context_length
        self.incremental = incremental
        self.responder = responder
        self.weight_version = "default"
        self.preferred_sampling_params: dict[str, object] | None = None
        self.requests: list[ReceivedRequest] = []
        self.aborts: list[str] = []
        self.alive = False
        self.answering = asyncio.Event()
        self.answering.set()
        self._script: deque[Reply | Fault] = deque()
        self._running: dict[str, ReceivedRequest] = {}
        self._seen: deque[array[int]] = deque(maxlen=_MAX_REMEMBERED)
        self._host = host
        self._port = port
        self._runner: web.AppRunner | None = None
        self._site: web.TCPSite | None = None
        self._dying: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        """Where it listens; the same after `kill` and `start`."""
        return f"http://{self._host}:{self._port}"

    def script(self, *items: Reply | Fault) -> None:
        """Answer the next requests with these, in order."""
        self._script.extend(items)

    async def start(self) -> None:
        """Listen; again on the same port when it was killed."""
        app = web.Application(client_max_size=1 << 30)
        app.add_routes(
            [
                web.post("/generate", self._generate),
                web.post("/abort_request", self._abort_request),
                web.get("/health", self._health),
                web.get("/health_generate", self._health),
                web.get("/model_info", self._model_info),
                web.get("/get_model_info", self._model_info),
                web.get("/server_info", self._server_info),
                web.get("/get_server_info", self._server_info),
                web.get("/v1/models", self._models),
                web.post("/tokenize", self._tokenize),
            ]
        )
        self._runner = web.AppRunner(
            app, handler_cancellation=True, access_log=None, keepalive_timeout=5.0, shutdown_timeout=0.1
        )
        await self._runner.setup()
        self._site = web.TCPSite(self._runner, self._host, self._port)
        await self._site.start()
        self._port = cast("int", self._runner.addresses[0][1])
        self.alive = True

    async def kill(self) -> None:
        """Die as a process does: connections are reset, new ones refused. The prefix cache is lost."""
        self.alive = False
        if self._site is not None:
            site, self._site = self._site, None
            await site.stop()
        server = self._runner.server if self._runner is not None else None
        for connection in server.connections if server is not None else ():
            if isinstance(connection.transport, asyncio.Transport):
                connection.transport.abort()
        self._seen.clear()

    async def aclose(self) -> None:
        """Stop serving."""
        await self.kill()
        if self._dying is not None:
            await self._dying
        if self._runner is not None:
            await self._runner.cleanup()

    async def until(self, condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
        """Wait until `condition()` holds, for example `lambda: fake.aborts != []`; else `TimeoutError`."""
        async with asyncio.timeout(timeout_s):
            while not condition():  # noqa: ASYNC110  # any state, no event
                await asyncio.sleep(0.002)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.aclose()

    # --- routes ---

    async def _generate(self, http: web.Request) -> web.StreamResponse:
        transport = cast("asyncio.Transport", http.transport)
        raw = await http.read()
        try:
            received = ReceivedRequest(raw, json.loads(raw), dict(http.headers))
        except (ValueError, RecursionError):
            return json_answer(
                400, {"object": "error", "message": "1 validation error:\n  {'type': 'json_invalid'}"}
            )
        self.requests.append(received)
        try:
            max_tokens = check(received, self._running, self.vocab_size, self.context_length)
        except RefusedError as refused:
            return await self._refuse(http, received, str(refused), early=refused.early)
        except GrammarRefusedError as refused:
            return await refuse_constraint(http, received, str(refused))
        ids = received.input_ids
        if min(ids) < 0 or max(*ids, received.num_top_logprobs - 1) >= self.vocab_size:
            return await self._die(transport)
        self._running[received.rid] = received
        try:
            return await self._answer(http, received, max_tokens)
        except (asyncio.CancelledError, ConnectionError):
            received.disconnected = True  # the real server aborts the generation, too
            raise
        finally:
            self._running.pop(received.rid, None)

    async def _answer(
        self, http: web.Request, received: ReceivedRequest, max_tokens: int
    ) -> web.StreamResponse:
        item = self._script.popleft() if self._script else self._respond(received)
        fault = item if isinstance(item, Fault) else None
        reply = item if isinstance(item, Reply) else item.reply or _reply_of(self._respond(received))
        if fault is not None:
            if fault.kind == "die":
                return await self._die(cast("asyncio.Transport", http.transport))
            if fault.kind == "disconnect" and fault.after is None:
                return reset(http)
            if fault.kind in ("status", "not_json"):
                return scripted_answer(fault)
            if fault.kind == "grammar":
                return await refuse_constraint(http, received, fault.message)
        sampled = reply.sample(max_tokens, received.sampling_params.get("stop_token_ids") or ())
        generation = Generation(
            received,
            reply,
            fault,
            sampled,
            num_cached=self.cached_tokens(received.input_ids) if reply.cached is None else reply.cached,
            version=self.weight_version,
            incremental=self.incremental,
            tokenizer=self.tokenizer,
            vocab_size=self.vocab_size,
        )
        self._remember(array("q", [*received.input_ids, *sampled.ids[:-1]]))
        if received.stream:
            return await generation.stream(http)
        return await generation.whole(http)

    def _respond(self, received: ReceivedRequest) -> Reply | Fault:
        if self.responder is not None:
            return self.responder(received)
        return Reply(received.input_ids[-4:], finish="stop")

    def cached_tokens(self, prompt_ids: list[int]) -> int:
        """How much of a prompt the prefix cache holds; its last token is always computed."""
        prompt = array("q", prompt_ids)
        longest = max((_common_prefix(prompt, seen) for seen in self._seen), default=0)
        return min(longest, len(prompt_ids) - 1)

    def _remember(self, ids: "array[int]") -> None:
        """The last sampled token is left out: the real server never computed it either."""
        kept = [seen for seen in self._seen if _common_prefix(ids, seen) < len(seen)]
        self._seen = deque([*kept, ids], maxlen=_MAX_REMEMBERED)

    async def _refuse(
        self, http: web.Request, received: ReceivedRequest, message: str, *, early: bool
    ) -> web.StreamResponse:
        if received.stream and not early:
            error = {"message": message, "type": "invalid_request_error", "code": 400, "retryable": False}
            response = await open_stream(http)
            await response.write(to_event({"error": error}) + b"data: [DONE]\n\n")
            await response.write_eof()
            return response
        if message.startswith(("unknown field", "invalid type")):
            return json_answer(400, {"error": message})
        if early:
            return json_answer(
                400, {"object": "error", "message": message, "type": "Bad Request", "code": 400}
            )
        return json_answer(400, {"error": {"message": message}})

    async def _die(self, transport: asyncio.Transport) -> web.StreamResponse:
        transport.abort()
        self._dying = asyncio.get_running_loop().create_task(self.kill())
        await asyncio.sleep(3600)  # the client's connection is gone: this handler is cancelled
        raise ConnectionResetError

    async def _abort_request(self, http: web.Request) -> web.Response:
        body = await http.json()
        rid: str = body.get("rid", "")
        self.aborts.append(rid)
        if body.get("abort_all") or rid in self._running:
            for name, received in self._running.items():
                if body.get("abort_all") or name.startswith(rid):
                    received.aborted.set()
        return web.Response()

    async def _health(self, _http: web.Request) -> web.Response:
        await self.answering.wait()
        return web.Response()

    async def _model_info(self, _http: web.Request) -> web.Response:
        info = {"model_path": "fake", "is_generation": True, "weight_version": self.weight_version}
        info |= {"preferred_sampling_params": self.preferred_sampling_params}
        return json_answer(200, info)

    async def _server_info(self, _http: web.Request) -> web.Response:
        return json_answer(200, {"model_path": "fake", "context_length": None, "version": "0.5.23"})

    async def _tokenize(self, http: web.Request) -> web.Response:
        if self.tokenizer is None:
            raise web.HTTPNotFound
        ids = self.tokenizer.encode((await http.json())["prompt"]).ids
        return json_answer(200, {"tokens": ids, "count": len(ids), "max_model_len": self.context_length})

    async def _models(self, _http: web.Request) -> web.Response:
        card = {"id": "fake", "object": "model", "max_model_len": self.context_length}
        return json_answer(200, {"object": "list", "data": [card]})


def _reply_of(item: Reply | Fault) -> Reply:
    if isinstance(item, Fault):
        what = "the responder answered a scripted fault with another fault"
        raise ValueError(f"{what}: give the first one a reply")  # noqa: TRY004  # a script, not a type, is wrong
    return item


def _common_prefix(a: "array[int]", b: "array[int]") -> int:
    """Length of the longest common prefix: growing blocks are compared in C, the last one is searched."""
    end, start, block = min(len(a), len(b)), 0, 64
    while start < end and a[start : start + block] == b[start : start + block]:
        start, block = start + block, block * 2
    low, high = min(start, end), min(start + block, end)
    return next((i for i in range(low, high) if a[i] != b[i]), high)
