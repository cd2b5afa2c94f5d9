"""`tokentape serve` and `tokentape engine`."""

import asyncio
import contextlib
import gc
import socket
import sys
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

import click
import uvloop

from tokentape.cli.options import (
    PORT,
    SECONDS,
    STORE,
    address,
    format_options,
    log_level_option,
    log_to_stderr,
    ready,
    stop_event,
    template_argument,
    until_stopped,
)
from tokentape.engines.pool import PoolConfig
from tokentape.engines.sglang import SGLangConfig
from tokentape.errors import ConfigError
from tokentape.formatfile import read_formats
from tokentape.gateway.admission import AdmissionLimits
from tokentape.gateway.memory import MemoryLimits
from tokentape.gateway.parts import GatewayConfig
from tokentape.gateway.pinned import Place
from tokentape.gateway.processes import many, one_of_many
from tokentape.gateway.service import ServiceConfig, running, tune
from tokentape.gateway.turn import Capture
from tokentape.model import TINY_MODEL
from tokentape.scale.config import ScaleConfig
from tokentape.stores import LEASE_S, is_shared
from tokentape.volatile import RULES as VOLATILE


@click.command()
@click.option("--model", required=True, help="Model directory or hub id: tokenizer and chat template.")
@click.option(
    "--engine",
    "engines",
    required=True,
    multiple=True,
    metavar="URL",
    help="URL of an SGLang server, or of a router; repeat it for several.",
)
@click.option(
    "--engine-retries",
    type=click.IntRange(min=0),
    default=3,
    show_default=True,
    help="How often a generation that fails before its first token is asked of another --engine.",
)
@click.option(
    "--health-interval",
    type=SECONDS,
    default=5.0,
    show_default=True,
    help="Seconds between two looks at an engine.",
)
@click.option(
    "--workers",
    type=click.IntRange(1, 256),
    default=1,
    show_default=True,
    help="Processes that share the port and the store; each session stays with one of them.",
)
@click.option("--ray", "on_ray", is_flag=True, help="Run as replicas on Ray, on a postgresql:// store.")
@click.option(
    "--replicas",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="With --ray: replicas there always are.",
)
@click.option(
    "--max-replicas",
    type=click.IntRange(min=1),
    help="With --ray: replicas there may be when much is asked; default: as many as --replicas.",
)
@click.option(
    "--turns-per-replica",
    type=click.FloatRange(min=0, min_open=True),
    default=64.0,
    show_default=True,
    help="With --max-replicas: requests at a time for which there is to be one replica.",
)
@click.option("--ray-address", metavar="ADDRESS", help="Ray's address; default: auto, or one started here.")
@click.option(
    "--process",
    type=(int, int, int, click.Path(path_type=Path)),
    hidden=True,
    help="What the parent tells one of its --workers: index, count, channel, directory.",
)
@click.option("--host", type=address, default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=PORT, default=8000, show_default=True, help="Port to listen on; 0 picks a free one."
)
@click.option(
    "--store",
    type=STORE,
    default="tokentape.sqlite",
    show_default=True,
    help="The sessions: an SQLite file, or postgresql://… that several gateways share; continued if there.",
)
@click.option(
    "--advertise",
    metavar="URL",
    help="Where the other gateways on a postgresql:// store reach this one; default: where it listens.",
)
@click.option(
    "--lease",
    type=SECONDS,
    default=LEASE_S,
    show_default=True,
    help="Seconds after which the others may take the sessions of a gateway that is not heard of.",
)
@format_options
@click.option(
    "--volatile",
    "volatile",
    multiple=True,
    default=("billing-header",),
    show_default=True,
    metavar="RULE",
    help=f"System and user text that does not count when requests are matched: {', '.join(VOLATILE)}, or a "
    "regular expression; may be repeated. none: every character counts.",
)
@click.option(
    "--capture",
    multiple=True,
    type=click.Choice(["support", "routed-experts"]),
    help="Also ask the engine for what truncation left to sample from, or where tokens were routed; may be "
    "repeated. See docs/sampling.md.",
)
@click.option("--auto-sessions", is_flag=True, help="Create unknown sessions when they are first used.")
@click.option("--api-key", envvar="TOKENTAPE_API_KEY", help="Require this key from every caller.")
@click.option("--engine-api-key", envvar="TOKENTAPE_ENGINE_API_KEY", help="The key that the engine asks for.")
@click.option(
    "--strict", is_flag=True, help="Refuse request fields that have no effect, instead of recording them."
)
@click.option("--served-model-name", default="policy", show_default=True, help="The model's name in replies.")
@click.option(
    "--context-length", type=click.IntRange(min=1), help="Tokens of context; default: what the engine says."
)
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    default=4096,
    show_default=True,
    help="Tokens to sample where neither request nor context length says.",
)
@click.option(
    "--connect-timeout", type=SECONDS, default=5.0, show_default=True, help="Seconds to reach the engine."
)
@click.option(
    "--first-token-timeout",
    type=SECONDS,
    default=600.0,
    show_default=True,
    help="Seconds to a stream's first token.",
)
@click.option(
    "--token-timeout",
    type=SECONDS,
    default=60.0,
    show_default=True,
    help="Seconds between a stream's tokens.",
)
@click.option(
    "--timeout", type=SECONDS, default=3600.0, show_default=True, help="Seconds for a whole generation."
)
@click.option(
    "--max-connections",
    type=click.IntRange(min=1),
    default=1024,
    show_default=True,
    help="Generations at a time.",
)
@click.option(
    "--max-turns-running",
    type=click.IntRange(min=1),
    default=1024,
    show_default=True,
    help="Requests that are answered at a time.",
)
@click.option(
    "--max-turns-waiting",
    type=click.IntRange(min=0),
    default=8192,
    show_default=True,
    help="Requests that wait for that; more get a 429.",
)
@click.option(
    "--turn-timeout",
    type=SECONDS,
    help="Seconds for a whole turn: waiting, retries and generation; default: no limit.",
)
@click.option(
    "--max-sessions-in-memory",
    type=click.IntRange(min=1),
    default=10_000,
    show_default=True,
    help="Open sessions in memory; the others are read from the store when they are used.",
)
@click.option(
    "--max-memory-mb",
    type=click.IntRange(min=1),
    default=4096,
    show_default=True,
    help="Memory for the sessions in memory, roughly.",
)
@click.option(
    "--max-requests-mb",
    type=click.IntRange(min=1),
    default=2048,
    show_default=True,
    help="Bodies of all requests under way, together; more get a 429.",
)
@click.option(
    "--max-body-mb", type=click.IntRange(min=1), default=64, show_default=True, help="Largest request."
)
@click.option(
    "--keep-wire-mb",
    type=click.IntRange(min=0),
    default=16,
    show_default=True,
    help="Memory for the last requests and replies as they were on the wire, for the viewer; 0 keeps none.",
)
@click.option(
    "--drain-timeout",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    help="Seconds to finish at SIGTERM.",
)
@log_level_option
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="json: one object a line.",
)
def serve(
    model: str,
    engines: Sequence[str],
    engine_retries: int,
    health_interval: float,
    workers: int,
    on_ray: bool,
    replicas: int,
    max_replicas: int | None,
    turns_per_replica: float,
    ray_address: str | None,
    process: tuple[int, int, int, Path] | None,
    host: str,
    port: int,
    store: Path | str,
    advertise: str | None,
    lease: float,
    tool_format: str,
    reasoning_format: str,
    formats: Path | None,
    template_args: Sequence[str],
    history: Any,
    volatile: Sequence[str],
    capture: Sequence[str],
    auto_sessions: bool,
    api_key: str | None,
    engine_api_key: str | None,
    strict: bool,
    served_model_name: str,
    context_length: int | None,
    max_tokens: int,
    connect_timeout: float,
    first_token_timeout: float,
    token_timeout: float,
    timeout: float,
    max_connections: int,
    max_turns_running: int,
    max_turns_waiting: int,
    turn_timeout: float | None,
    max_sessions_in_memory: int,
    max_memory_mb: int,
    max_requests_mb: int,
    max_body_mb: int,
    keep_wire_mb: int,
    drain_timeout: float,
    log_level: str,
    log_format: str,
) -> None:
    """Serve agents through an SGLang server and record their tapes.

    Create a session with POST /sessions and give its base_url to the agent as OpenAI's; finish it with its
    reward; read its tapes from /sessions/ID/samples, or all of them with `tokentape export`.
    """
    log_to_stderr(log_level, log_format)
    tune()
    if api_key is not None and not api_key.strip():
        raise ConfigError("--api-key is empty: leave it out, or give a key (is its variable set?)")
    if on_ray and workers > 1:
        raise ConfigError("--ray has replicas in place of --workers: give one of the two")
    if is_shared(store) and workers > 1:
        raise ConfigError("--workers shares a file: on a postgresql:// store start as many gateways instead")
    if "none" in volatile and len(volatile) > 1:
        raise ConfigError("--volatile none goes with no other --volatile: give it alone, or leave it out")
    config = ServiceConfig(
        model=model,
        engine=SGLangConfig(
            url=engines[0],
            connect_timeout_s=connect_timeout,
            first_token_timeout_s=first_token_timeout,
            token_timeout_s=token_timeout,
            total_timeout_s=timeout,
            max_connections=max_connections,
            api_key=engine_api_key,
        ),
        pool=PoolConfig(more=tuple(engines[1:]), retries=engine_retries, health_interval_s=health_interval),
        store=store,
        shared_store=process is not None,
        host=host,
        port=port,
        advertise=advertise,
        lease_s=lease,
        tool_format=tool_format,
        reasoning_format=reasoning_format,
        formats=() if formats is None else read_formats(formats),
        template_arguments=dict(map(template_argument, template_args)),
        history=history,
        volatile=tuple(rule for rule in volatile if rule != "none"),
        capture=Capture("support" in capture, "routed-experts" in capture),
        auto_sessions=auto_sessions,
        default_max_tokens=max_tokens,
        drain_s=drain_timeout,
        memory=MemoryLimits(max_sessions_in_memory, max_memory_mb * 2**20),
        admission=AdmissionLimits(
            max_turns_running, max_turns_waiting, turn_timeout, max_requests_mb * 2**20
        ),
        http=GatewayConfig(
            model=served_model_name,
            api_key=api_key,
            strict=strict,
            max_body_bytes=max_body_mb * 2**20,
            context_length=context_length,
            wire_bytes=keep_wire_mb * 2**20,
        ),
    )
    if process is not None:
        index, count, channel, directory = process
        uvloop.run(_one_of_many(config, Place(index, count, directory), socket.socket(fileno=channel)))
    elif on_ray:
        scale = ScaleConfig(
            replicas=replicas,
            max_replicas=max_replicas,
            turns_per_replica=turns_per_replica,
            address=ray_address,
        )
        uvloop.run(until_stopped(_on_ray(config, scale)))
    elif workers > 1:
        uvloop.run(until_stopped(many(config, workers, _command)))
    else:
        uvloop.run(until_stopped(running(config)))


@contextlib.asynccontextmanager
async def _on_ray(config: ServiceConfig, scale: ScaleConfig) -> AsyncGenerator[str]:
    try:
        from tokentape.scale.ray import clustered
    except ImportError as error:
        raise ConfigError(f"--ray needs its extra: pip install 'tokentape[ray]' ({error})") from error
    async with clustered(config, scale) as (url, _):
        yield url


def _command(place: Place, channel: int) -> list[str]:
    """What starts a process of this gateway: the same command, and its place."""
    this = ("--process", str(place.index), str(place.count), str(channel), str(place.directory))
    return [sys.executable, "-m", "tokentape", *sys.argv[1:], *this]


async def _one_of_many(config: ServiceConfig, place: Place, channel: socket.socket) -> None:
    stopped = stop_event()
    async with one_of_many(config, place, channel) as gone:
        gc.freeze()
        waiting = [asyncio.ensure_future(event.wait()) for event in (stopped, gone)]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()


@click.command()
@click.option(
    "--model", default=str(TINY_MODEL), help="Model directory or hub id; default: the bundled tiny model."
)
@click.option("--host", type=address, default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=PORT, default=30000, show_default=True, help="Port to listen on; 0 picks a free one."
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, …")
@click.option(
    "--dtype", default="auto", show_default=True, help="auto (float32 on CPU), float32, bfloat16, float16."
)
@log_level_option
def engine(model: str, host: str, port: int, device: str, dtype: str, log_level: str) -> None:
    """Serve a Hugging Face causal model over SGLang's native protocol.

    For tests, demos and small models; a real SGLang server is what you train with.
    """
    log_to_stderr(log_level)
    try:
        from tokentape.engines.local import run_engine
    except ImportError as error:
        raise ConfigError(
            f"the embedded engine needs its extra: pip install 'tokentape[local]' ({error})"
        ) from error

    async def run() -> None:
        await run_engine(
            model, ready=ready, stopped=stop_event(), host=host, port=port, device=device, dtype=dtype
        )

    uvloop.run(run())
