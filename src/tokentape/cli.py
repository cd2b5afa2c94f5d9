"""The command line: configuration and wiring. The only place that prints."""

import asyncio
import logging
import signal
import sys
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import click
import msgspec
import uvloop
from rich.console import Console

from tokentape import __version__
from tokentape.audit import audit as audit_model
from tokentape.audit.show import tables
from tokentape.engines.sglang import SGLangConfig
from tokentape.errors import ConfigError, TokentapeError
from tokentape.export import stored_samples, write_parquet
from tokentape.formatfile import read_formats
from tokentape.formats import FORMATS
from tokentape.gateway.parts import GatewayConfig
from tokentape.gateway.service import ServiceConfig, running
from tokentape.gateway.turn import Capture
from tokentape.model import TINY_MODEL, model_directory
from tokentape.store import SQLiteStore
from tokentape.volatile import RULES as VOLATILE

_LEVELS = ("debug", "info", "warning", "error")
_PORT = click.IntRange(0, 65535)
_SECONDS = click.FloatRange(min=0, min_open=True)
_TOOL_FORMATS = ", ".join(row.name for row in FORMATS if row.calls)
_REASONING_FORMATS = ", ".join(row.name for row in FORMATS if row.reasoning)


class _Group(click.Group):
    """An error becomes one line and exit code 2; `--help` lists commands in the order of use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except TokentapeError as error:
            click.echo(f"tokentape: {' '.join(str(error).split())}", err=True)
            ctx.exit(2)
        except OSError as error:  # an address in use, a directory that cannot be written
            click.echo(f"tokentape: {error}", err=True)
            ctx.exit(2)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="tokentape")
def main() -> None:
    """Token-exact reinforcement-learning data from any LLM agent.

    Start with `tokentape demo`. Then put `tokentape serve` between your agent and your SGLang server, and
    give the agent the gateway's URL instead of OpenAI's.
    """


@main.command()
@click.option(
    "--episodes", type=click.IntRange(min=1), default=32, show_default=True, help="How many episodes."
)
@click.option(
    "--concurrency", type=click.IntRange(min=1), default=8, show_default=True, help="How many at a time."
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("runs/demo"),
    show_default=True,
    help="Directory for the store and rollouts.parquet.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of questions and sampling.")
def demo(episodes: int, concurrency: int, out: Path, seed: int) -> None:
    """Run the whole loop on the embedded engine, without a network.

    A small arithmetic agent, written with the openai SDK, talks to a gateway that talks to the bundled model.
    The exact tapes end up in OUT/rollouts.parquet; a summary says what happened.
    """
    try:
        from tokentape.demo.run import run_demo
    except ImportError as error:
        raise ConfigError(f"the demo needs its extra: pip install 'tokentape[demo]' ({error})") from error
    ok = uvloop.run(run_demo(episodes=episodes, concurrency=concurrency, out=out, seed=seed))
    if not ok:
        sys.exit(1)


@main.command()
@click.option("--model", required=True, help="Model directory or hub id: tokenizer and chat template.")
@click.option(
    "--engine", "engines", required=True, multiple=True, metavar="URL", help="URL of the SGLang server."
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=_PORT, default=8000, show_default=True, help="Port to listen on; 0 picks a free one."
)
@click.option(
    "--store",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("tokentape.sqlite"),
    show_default=True,
    help="SQLite file of the sessions; an existing one is continued.",
)
@click.option(
    "--tool-format",
    default="auto",
    show_default=True,
    metavar="NAME",
    help=f"How the model writes tool calls: auto reads the template; else one of {_TOOL_FORMATS}, plain.",
)
@click.option(
    "--reasoning-format",
    default="auto",
    show_default=True,
    metavar="NAME",
    help=f"How the model writes reasoning: auto reads the template; else one of {_REASONING_FORMATS}, plain.",
)
@click.option(
    "--formats",
    "formats",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="TOML file of formats of your own, tried before the others; see docs/formats.md.",
)
@click.option(
    "--template-arg",
    "template_args",
    multiple=True,
    metavar="KEY=JSON",
    help="Template argument of requests that do not say otherwise, as clear_thinking=false; may be repeated.",
)
@click.option(
    "--history",
    type=click.Choice(["template", "preserve"]),
    default="template",
    show_default=True,
    help="Where the template rewrites earlier turns: start a branch, or preserve what was sampled.",
)
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
    "repeated. See docs/training.md.",
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
    "--connect-timeout", type=_SECONDS, default=5.0, show_default=True, help="Seconds to reach the engine."
)
@click.option(
    "--first-token-timeout",
    type=_SECONDS,
    default=600.0,
    show_default=True,
    help="Seconds to a stream's first token.",
)
@click.option(
    "--token-timeout",
    type=_SECONDS,
    default=60.0,
    show_default=True,
    help="Seconds between a stream's tokens.",
)
@click.option(
    "--timeout", type=_SECONDS, default=3600.0, show_default=True, help="Seconds for a whole generation."
)
@click.option(
    "--max-connections",
    type=click.IntRange(min=1),
    default=1024,
    show_default=True,
    help="Generations at a time.",
)
@click.option(
    "--max-body-mb", type=click.IntRange(min=1), default=64, show_default=True, help="Largest request."
)
@click.option(
    "--drain-timeout",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    help="Seconds to finish at SIGTERM.",
)
@click.option(
    "--log-level", type=click.Choice(_LEVELS), default="info", show_default=True, help="Logs go to stderr."
)
def serve(
    model: str,
    engines: Sequence[str],
    host: str,
    port: int,
    store: Path,
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
    max_body_mb: int,
    drain_timeout: float,
    log_level: str,
) -> None:
    """Serve agents through an SGLang server and record their tapes.

    Create a session with POST /sessions and give its base_url to the agent as OpenAI's; finish it with its
    reward; read its tapes from /sessions/ID/samples, or all of them with `tokentape export`.
    """
    _log_to_stderr(log_level)
    if api_key is not None and not api_key.strip():
        raise ConfigError("--api-key is empty: leave it out, or give a key (is its variable set?)")
    if len(engines) > 1:
        raise ConfigError("several --engine URLs are not supported yet: give one, for example a router's")
    if "none" in volatile and len(volatile) > 1:
        raise ConfigError("--volatile none goes with no other --volatile")
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
        store=store,
        host=host,
        port=port,
        tool_format=tool_format,
        reasoning_format=reasoning_format,
        formats=() if formats is None else read_formats(formats),
        template_arguments=dict(map(_template_argument, template_args)),
        history=history,
        volatile=tuple(rule for rule in volatile if rule != "none"),
        capture=Capture("support" in capture, "routed-experts" in capture),
        auto_sessions=auto_sessions,
        default_max_tokens=max_tokens,
        drain_s=drain_timeout,
        http=GatewayConfig(
            model=served_model_name,
            api_key=api_key,
            strict=strict,
            max_body_bytes=max_body_mb * 2**20,
            context_length=context_length,
        ),
    )
    uvloop.run(_until_stopped(running(config)))


@main.command()
@click.option(
    "--model", default=str(TINY_MODEL), help="Model directory or hub id; default: the bundled tiny model."
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=_PORT, default=30000, show_default=True, help="Port to listen on; 0 picks a free one."
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, …")
@click.option(
    "--dtype", default="auto", show_default=True, help="auto (float32 on CPU), float32, bfloat16, float16."
)
@click.option(
    "--log-level", type=click.Choice(_LEVELS), default="info", show_default=True, help="Logs go to stderr."
)
def engine(model: str, host: str, port: int, device: str, dtype: str, log_level: str) -> None:
    """Serve a Hugging Face causal model over SGLang's native protocol.

    For tests, demos and small models; a real SGLang server is what you train with.
    """
    _log_to_stderr(log_level)
    try:
        from tokentape.engines.local import run_engine
    except ImportError as error:
        raise ConfigError(
            f"the embedded engine needs its extra: pip install 'tokentape[local]' ({error})"
        ) from error

    async def run() -> None:
        await run_engine(
            model, ready=_ready, stopped=_stop_event(), host=host, port=port, device=device, dtype=dtype
        )

    uvloop.run(run())


@main.command()
@click.option(
    "--store",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A gateway's store.",
)
@click.option(
    "--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The Parquet file to write."
)
@click.option(
    "--session", "session_ids", multiple=True, metavar="ID", help="Only this session; may be repeated."
)
@click.option(
    "--max-staleness",
    type=click.IntRange(min=0),
    metavar="N",
    help="Leave out sessions with tokens of weights more than N versions older than the newest.",
)
@click.option("--at-version", metavar="VERSION", help="Count --max-staleness from this version instead.")
def export(
    store: Path, out: Path, session_ids: Sequence[str], max_staleness: int | None, at_version: str | None
) -> None:
    """Write the tapes of a store to a Parquet file, one row a branch.

    Sessions that are still open are exported as they are.
    """

    if at_version is not None and max_staleness is None:
        raise ConfigError("--at-version needs --max-staleness")
    stale: list[str] = []

    async def run() -> int:
        source = SQLiteStore(store, readonly=True)
        try:
            batches = stored_samples(
                source,
                session_ids,
                max_staleness=max_staleness,
                at_version=at_version,
                on_stale=stale.append,
            )
            return await write_parquet(out, batches)
        finally:
            await source.aclose()

    num_rows = uvloop.run(run())
    left_out = f", {len(stale)} sessions left out: too stale" if stale else ""
    click.echo(f"{num_rows} samples in {out}{left_out}")


@main.command()
@click.option("--model", required=True, help="Model directory or hub id: tokenizer and chat template.")
@click.option(
    "--history",
    type=click.Choice(["template", "preserve"]),
    default="template",
    show_default=True,
    help="What `serve` would be given: branch where the template rewrites, or preserve what was sampled.",
)
@click.option(
    "--tool-format",
    default="auto",
    show_default=True,
    metavar="NAME",
    help=f"How the model writes tool calls: auto asks the template; else one of {_TOOL_FORMATS}, plain.",
)
@click.option(
    "--reasoning-format",
    default="auto",
    show_default=True,
    metavar="NAME",
    help=f"How the model writes reasoning: auto reads the template; else one of {_REASONING_FORMATS}, plain.",
)
@click.option(
    "--formats",
    "formats",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="TOML file of formats of your own, tried before the others; see docs/formats.md.",
)
@click.option(
    "--template-arg",
    "template_args",
    multiple=True,
    metavar="KEY=JSON",
    help="A template argument that every request will have, as enable_thinking=false; may be repeated.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="One JSON object instead of tables; see docs/models.md."
)
def audit(
    model: str,
    history: Any,
    tool_format: str,
    reasoning_format: str,
    formats: Path | None,
    template_args: Sequence[str],
    as_json: bool,
) -> None:
    """Say before a run where this chat template lets a turn be extended, and where not.

    Exit code 0: multi-turn tool use is exact. 1: it is not; the report says why and what to do. 2: the model
    or an option is wrong.
    """
    report = audit_model(
        model_directory(model),
        model=model,
        history=history,
        tool_format=tool_format,
        reasoning_format=reasoning_format,
        formats=() if formats is None else read_formats(formats),
        arguments=dict(map(_template_argument, template_args)),
    )
    if as_json:
        click.echo(msgspec.json.encode(report).decode())
    else:
        Console().print(tables(report))
    if not report.exact:
        sys.exit(1)


def _template_argument(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, msgspec.json.decode(value)
    except ValueError as error:
        raise ConfigError(
            f"--template-arg {text}: give KEY=JSON, as enable_thinking=false or mode='\"fast\"' ({error})"
        ) from error


def _log_to_stderr(level: str) -> None:
    logging.basicConfig(
        stream=sys.stderr, level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )


def _ready(url: str) -> None:
    print(f"listening on {url}", flush=True)


def _stop_event() -> asyncio.Event:
    """Set at SIGTERM or Ctrl-C."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stopped.set)
    return stopped


async def _until_stopped(service: AbstractAsyncContextManager[str]) -> None:
    stopped = _stop_event()
    async with service as url:
        _ready(url)
        await stopped.wait()
