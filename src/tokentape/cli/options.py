"""What several commands take, and how they start and stop."""

import asyncio
import gc
import logging
import signal
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from tokentape.errors import ConfigError
from tokentape.formats import FORMATS
from tokentape.stores import is_shared

F = TypeVar("F", bound=Callable[..., Any])


class StoreName(click.Path):
    """A DSN of PostgreSQL as it is, or the path of a file."""

    name = "store"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """A DSN stays text."""
        return value if is_shared(value) else super().convert(value, param, ctx)


def address(value: str) -> str:
    """What may be looked up, as it is: the resolver raises on what can be no name."""
    try:
        value.encode("idna")
    except UnicodeError as error:
        raise click.BadParameter(f"{value!r}: give 127.0.0.1, 0.0.0.0 or a name ({error})") from error
    return value


STORE = StoreName(dir_okay=False, path_type=Path)
STORE_THERE = StoreName(exists=True, dir_okay=False, path_type=Path)
PORT = click.IntRange(0, 65535)
SECONDS = click.FloatRange(min=0, min_open=True)
_LEVELS = ("debug", "info", "warning", "error")
_TOOL_FORMATS = ", ".join(row.name for row in FORMATS if row.calls)
_REASONING_FORMATS = ", ".join(row.name for row in FORMATS if row.reasoning)

log_level_option = click.option(
    "--log-level", type=click.Choice(_LEVELS), default="info", show_default=True, help="Logs go to stderr."
)


def format_options(command: F) -> F:
    """How a model writes, as `serve` and `audit` are told."""
    for option in reversed(
        (
            click.option(
                "--tool-format",
                default="auto",
                show_default=True,
                metavar="NAME",
                help="How the model writes tool calls: auto asks the template; else one of "
                f"{_TOOL_FORMATS}, plain.",
            ),
            click.option(
                "--reasoning-format",
                default="auto",
                show_default=True,
                metavar="NAME",
                help="How the model writes reasoning: auto reads the template; else one of "
                f"{_REASONING_FORMATS}, plain.",
            ),
            click.option(
                "--formats",
                type=click.Path(exists=True, dir_okay=False, path_type=Path),
                metavar="FILE",
                help="TOML file of formats of your own, tried before the others; see docs/formats.md.",
            ),
            click.option(
                "--template-arg",
                "template_args",
                multiple=True,
                metavar="KEY=JSON",
                help="Template argument of requests that do not say otherwise, as clear_thinking=false; may "
                "be repeated.",
            ),
            click.option(
                "--history",
                type=click.Choice(["template", "preserve"]),
                default="template",
                show_default=True,
                help="Where the template rewrites earlier turns: branch, or preserve what was sampled.",
            ),
        )
    ):
        command = option(command)
    return command


def template_argument(text: str) -> tuple[str, Any]:
    """`KEY=JSON` as its two parts; raises `ConfigError`."""
    name, _, value = text.partition("=")
    try:
        return name, msgspec.json.decode(value)
    except ValueError as error:
        raise ConfigError(
            f"--template-arg {text}: give KEY=JSON, as enable_thinking=false or mode='\"fast\"' ({error})"
        ) from error


def log_to_stderr(level: str, form: str = "text") -> None:
    """Logs, from this level on; as "text", or as "json": one object a line."""
    logging.basicConfig(
        stream=sys.stderr, level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    if form == "json":
        logging.getLogger().handlers[0].setFormatter(_JsonLines())


class _JsonLines(logging.Formatter):
    """A record as one line of JSON; what a record has as `fields` stands beside its message."""

    def format(self, record: logging.LogRecord) -> str:
        out: dict[str, Any] = {
            "time": record.created,
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            out["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(out).decode()


def ready(url: str) -> None:
    """The one line on stdout that says where a server listens."""
    print(f"listening on {url}", flush=True)


def stop_event() -> asyncio.Event:
    """Set at SIGTERM or Ctrl-C."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stopped.set)
    return stopped


async def until_stopped(service: AbstractAsyncContextManager[str]) -> None:
    """Serve until SIGTERM or Ctrl-C."""
    stopped = stop_event()
    async with service as url:
        gc.freeze()  # a vocabulary is no garbage: it need not be looked through
        ready(url)
        await stopped.wait()
