"""Puts a gateway together from its configuration, and serves it."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path

from tokentape.engines.server import serve
from tokentape.engines.sglang import SGLangConfig, SGLangEngine
from tokentape.formats import detect
from tokentape.gateway.api import AgentApi
from tokentape.gateway.app import Gateway, GatewayConfig, make_app
from tokentape.gateway.sessions import Sessions
from tokentape.gateway.turn import Turns
from tokentape.gateway.wire import WireConfig
from tokentape.metrics import Metrics
from tokentape.model import model_directory, model_sizes
from tokentape.render import History, Renderer
from tokentape.store import SQLiteStore
from tokentape.volatile import Volatile

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServiceConfig:
    """All that `tokentape serve` can be told.

    `model` is a directory or hub id: tokenizer, chat template and sizes; `engine` reaches the server with its
    weights. `tool_format` and `reasoning_format` are "auto" or a row of `formats.FORMATS`. `volatile` are
    names of `volatile.RULES`, or regular expressions.
    """

    model: str
    engine: SGLangConfig
    store: Path
    host: str = "127.0.0.1"
    port: int = 0
    tool_format: str = "auto"
    reasoning_format: str = "auto"
    history: History = "template"
    auto_sessions: bool = False
    default_max_tokens: int = 4096
    drain_s: float = 30.0
    volatile: tuple[str, ...] = ("billing-header",)
    http: GatewayConfig = field(default_factory=lambda: GatewayConfig(model="policy"))


@contextlib.asynccontextmanager
async def running(config: ServiceConfig) -> AsyncGenerator[str]:
    """Run a gateway while the context is open; yields its URL.

    Raises:
        ConfigError: the model, the store or an option cannot be used.
    """
    directory = model_directory(config.model)
    sizes = model_sizes(directory)
    renderer = await asyncio.to_thread(
        Renderer.from_dir, directory, history=config.history, num_ids=sizes.vocab_size
    )
    row, why = detect(renderer.template.source, config.tool_format, config.reasoning_format)
    log.log(logging.WARNING if "not supported" in why else logging.INFO, "format: %s (%s)", row.name, why)
    metrics = Metrics()
    async with contextlib.AsyncExitStack() as stack:
        store = SQLiteStore(config.store, exclusive=True, tokenizer=renderer.tokenizer.fingerprint)
        stack.push_async_callback(store.aclose)
        engine = SGLangEngine(config.engine, vocab_size=sizes.vocab_size or renderer.tokenizer.vocab_size)
        stack.push_async_callback(engine.aclose)
        volatile = Volatile.of(config.volatile)
        sessions = Sessions(
            store, renderer.template.content_tests, volatile, metrics, auto_sessions=config.auto_sessions
        )
        turns = Turns(
            engine,
            renderer,
            row,
            volatile,
            store,
            sessions,
            metrics,
            context_length=config.http.context_length or sizes.context_length,
            eos_ids=sizes.eos_ids | renderer.eos_ids,
            default_max_tokens=config.default_max_tokens,
        )
        wires = WireConfig(
            config.http.model, renderer.tokenizer, renderer.template.variables, config.http.strict
        )
        api = AgentApi(turns, wires)
        stack.push_async_callback(api.aclose)
        gateway = Gateway(config.http, engine, sessions, turns, api, metrics)
        url = await stack.enter_async_context(
            serve(make_app(gateway), config.host, config.port, drain_s=config.drain_s)
        )
        yield url
