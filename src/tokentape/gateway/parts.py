"""Puts the parts of a gateway together, with HTTP or without."""

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokentape.engines.base import Engine, EngineInfo
from tokentape.engines.pool import EnginePool, PoolConfig
from tokentape.engines.resume import ResumingEngine
from tokentape.engines.sglang import SGLangConfig, SGLangEngine
from tokentape.errors import ConfigError, TokentapeError
from tokentape.formats import FORMATS, Detected, Format, detect
from tokentape.gateway.admission import Admission, AdmissionLimits
from tokentape.gateway.api import AgentApi
from tokentape.gateway.memory import MemoryLimits
from tokentape.gateway.plan import Planner
from tokentape.gateway.sessions import Session, Sessions
from tokentape.gateway.turn import Capture, Turns
from tokentape.gateway.weights import Weights
from tokentape.gateway.wire import WireConfig
from tokentape.gateway.wirelog import WireLog
from tokentape.metrics import Metrics
from tokentape.model import model_directory, model_sizes
from tokentape.render import History, Renderer
from tokentape.store import Store
from tokentape.stores import LEASE_S, open_store
from tokentape.template import RESERVED
from tokentape.types import Json
from tokentape.volatile import Volatile

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """How the gateway answers. `model` is the name it answers to; `max_body_bytes` bounds a request.

    `context_length` in tokens, None to ask the engine. So many `wire_bytes` of the last requests and replies
    are kept for the viewer.
    """

    model: str
    api_key: str | None = None
    strict: bool = False
    max_body_bytes: int = 64 * 2**20
    context_length: int | None = None
    wire_bytes: int = 16 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class PartsConfig:
    """What a gateway is made of.

    `model` is a directory or hub id: tokenizer, chat template and sizes; `engine` has its weights, or reaches
    the server that has them, and `pool` knows more of these; one that is given made is not closed here.
    `store` is a file, a PostgreSQL DSN, or None to keep the sessions in memory only; `shared_store`: other
    processes of this gateway have the file, too. `tool_format` and `reasoning_format` are "auto" or the name
    of a row: of `formats`, which come first, or of `formats.FORMATS`. `template_arguments` are the chat
    template's, where a request does not say otherwise. `volatile` are names of `volatile.RULES`, or regular
    expressions. `capture` is what the engine is asked for beside the tokens. `memory` bounds what is kept,
    `admission` what goes on at a time.
    """

    model: str
    engine: SGLangConfig | Engine
    store: Path | str | None
    shared_store: bool = False
    lease_s: float = LEASE_S
    pool: PoolConfig = field(default_factory=PoolConfig)
    tool_format: str = "auto"
    reasoning_format: str = "auto"
    formats: tuple[Format, ...] = ()
    template_arguments: Mapping[str, Any] = field(default_factory=dict[str, Any])
    history: History = "template"
    auto_sessions: bool = False
    default_max_tokens: int = 4096
    volatile: tuple[str, ...] = ("billing-header",)
    capture: Capture = field(default_factory=Capture)
    memory: MemoryLimits = field(default_factory=MemoryLimits)
    admission: AdmissionLimits = field(default_factory=AdmissionLimits)
    http: GatewayConfig = field(default_factory=lambda: GatewayConfig(model="policy"))


@dataclass(frozen=True, slots=True)
class Gateway:
    """The parts of a gateway."""

    config: GatewayConfig
    engine: ResumingEngine
    pool: EnginePool | None
    weights: Weights
    store: Store
    sessions: Sessions
    turns: Turns
    api: AgentApi
    metrics: Metrics
    wires: WireLog

    async def summary(self, session: Session) -> Json:
        """What `GET /sessions/{id}` answers."""
        summary = session.summary()
        return {**summary, "oldest_version": await self.weights.oldest(summary["weight_versions"])}


@contextlib.asynccontextmanager
async def parts(config: PartsConfig, *, ask_engine: bool = False) -> AsyncGenerator[Gateway]:
    """A gateway's parts while the context is open; on the way out what is being sampled is aborted.

    The engine is asked for its context length until it answers, meanwhile the model directory's holds; it may
    start after the gateway. With `ask_engine` the context opens only when it was asked once.

    Raises:
        ConfigError: the model, the store or an option cannot be used.
    """
    directory = model_directory(config.model)
    sizes = model_sizes(directory)
    renderer = await asyncio.to_thread(
        Renderer.from_dir, directory, history=config.history, num_ids=sizes.vocab_size
    )
    formats = (*config.formats, *FORMATS)
    detected = detect(renderer.template, config.tool_format, config.reasoning_format, formats=formats)
    _log_format(detected)
    _check_arguments(config.template_arguments, renderer.template.variables)
    metrics = Metrics()
    async with contextlib.AsyncExitStack() as stack:
        store = _store(config, renderer.tokenizer.fingerprint, metrics)
        stack.push_async_callback(store.aclose)
        engine, pool = config.engine, None
        if isinstance(engine, SGLangConfig):
            engine = pool = _pool(engine, config.pool, sizes.vocab_size or renderer.tokenizer.vocab_size)
            metrics.watch_workers(pool)
            stack.push_async_callback(pool.aclose)
            pool.watch()
        eos_ids = sizes.eos_ids | renderer.eos_ids
        engine = ResumingEngine(engine, stop_ids=eos_ids, on_resume=metrics.resumed.inc)
        weights = Weights(engine, store)
        await weights.load()
        volatile = Volatile.of(config.volatile)
        sessions = Sessions(
            store,
            renderer.template.content_tests,
            volatile,
            metrics,
            auto_sessions=config.auto_sessions,
            limits=config.memory,
        )
        turns = Turns(
            engine,
            renderer,
            detected.format,
            volatile,
            store,
            sessions,
            weights,
            metrics,
            context_length=config.http.context_length or sizes.context_length,
            context_is_fixed=config.http.context_length is not None,
            eos_ids=eos_ids,
            capture=config.capture,
            default_max_tokens=config.default_max_tokens,
            formats=formats,
        )
        wires = WireConfig(
            config.http.model,
            renderer.tokenizer,
            renderer.template.variables,
            config.template_arguments,
            config.http.strict,
        )
        api = AgentApi(turns, wires, Admission(config.admission, metrics))
        stack.push_async_callback(api.aclose)
        await stack.enter_async_context(_learning(engine, turns.planner, wait=ask_engine))
        wire_log = WireLog(config.http.wire_bytes)
        yield Gateway(config.http, engine, pool, weights, store, sessions, turns, api, metrics, wire_log)


def _log_format(detected: Detected) -> None:
    log.log(
        logging.INFO if detected.told else logging.WARNING,
        "format: %s (%s)",
        detected.format.name,
        detected.why,
    )
    if detected.contradicted:
        log.warning(
            "format: the chat template writes tool calls as %s reads them, not %s: is --tool-format right?",
            detected.contradicted, detected.format.name,
        )  # fmt: skip


def _check_arguments(arguments: Mapping[str, Any], variables: frozenset[str]) -> None:
    for name in arguments:
        if name in RESERVED:
            raise ConfigError(f"--template-arg {name}: that is the gateway's own, leave it out")
        if name not in variables:
            known = ", ".join(sorted(variables - RESERVED)) or "none"
            raise ConfigError(
                f"--template-arg {name}: the chat template reads no such variable; it reads {known}"
            )


def _pool(first: SGLangConfig, config: PoolConfig, vocab_size: int) -> EnginePool:
    def make(url: str) -> SGLangEngine:
        return SGLangEngine(dataclasses.replace(first, url=url), vocab_size=vocab_size)

    return EnginePool((first.url, *config.more), make, config)


def info_json(info: EngineInfo) -> Json:
    """What an engine says of itself, as `GET /readyz` answers it."""
    return {
        "model": info.model,
        "context_length": info.context_length,
        "weight_version": info.weight_version,
    }


def _store(config: PartsConfig, fingerprint: str, metrics: Metrics) -> Store:
    def note(seconds: float, num_changes: int, ok: bool) -> None:
        metrics.store_seconds.observe(seconds)
        metrics.store_changes.observe(num_changes)
        if not ok:
            metrics.store_errors.inc()

    return open_store(
        config.store,
        exclusive=config.store is not None and not config.shared_store,
        tokenizer=fingerprint,
        lease_s=config.lease_s,
        on_transaction=note,
    )


@contextlib.asynccontextmanager
async def _learning(engine: Engine, planner: Planner, *, wait: bool) -> AsyncGenerator[None]:
    """Ask the engine for its context length and sampling defaults until it answers."""
    asked = asyncio.Event()

    async def learn() -> None:
        wait_s = 0.5
        while True:
            try:
                info = await engine.info()
            except TokentapeError as error:
                log.info("engine: not there yet: %s", error)
            else:
                log.info("engine: %s", info_json(info))
                planner.learn(info)
                return
            finally:
                asked.set()
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, 10.0)

    task = asyncio.ensure_future(learn())
    try:
        if wait:
            await asked.wait()
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
