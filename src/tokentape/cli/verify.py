"""`tokentape verify`."""

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

import click
import msgspec
import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tokentape.cli.scoring import scoring
from tokentape.engines.sglang import SGLangConfig
from tokentape.errors import ConfigError
from tokentape.export.row import sessions_in
from tokentape.verify import Report
from tokentape.verify import verify as verify_file
from tokentape.verify.show import check_can_draw, draw_histogram, tables

TOLERANCES = {"float32": (1e-3, 0.0), "other": (0.3, 0.01)}
"""Nats that a token may be off, and the share that may be more, by the engine's type.

Half precision: a decode and a prefill of the same ids differ by 0.02 to 0.05 in the mean.
"""


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--engine", "url", required=True, metavar="URL", help="URL of an engine with the weights.")
@click.option("--model", help="Model directory or hub id; default: what the engine says, if it is here.")
@click.option(
    "--version",
    "versions",
    multiple=True,
    metavar="V",
    help="Judge tokens of these weights; default: those that the engine has now. May be repeated.",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0, min_open=True),
    help="Nats that a token may be off; ten times that, none may. Default: 0.001 in float32, else 0.3.",
)
@click.option(
    "--max-share",
    type=click.FloatRange(0, 1),
    help="Share of tokens that may be beyond the tolerance. Default: 0 in float32, else 0.01.",
)
@click.option(
    "--concurrency", type=click.IntRange(min=1), default=8, show_default=True, help="Samples at a time."
)
@click.option(
    "--histogram",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="PNG",
    help="Draw the differences; needs matplotlib.",
)
@click.option("--engine-api-key", envvar="TOKENTAPE_ENGINE_API_KEY", help="The key that the engine asks for.")
@click.option(
    "--json", "as_json", is_flag=True, help="One JSON object instead of tables; see docs/verify.md."
)
def verify(
    file: Path,
    url: str,
    model: str | None,
    versions: Sequence[str],
    tolerance: float | None,
    max_share: float | None,
    concurrency: int,
    histogram: Path | None,
    engine_api_key: str | None,
    as_json: bool,
) -> None:
    """Prove a Parquet file of samples right: rules, and every trained token's log-probability.

    An engine with the weights that sampled recomputes them by prefill. Exit code 0: all is well. 1: it is
    not; the first sample and token that are wrong are named. 2: file, engine or an option cannot be used.
    """
    if histogram is not None:
        check_can_draw(histogram)

    async def run() -> Report:
        total = sum(sessions_in(file).values())
        async with contextlib.AsyncExitStack() as stack:
            found = await stack.enter_async_context(scoring(SGLangConfig(url, api_key=engine_api_key), model))
            engine, info = found.engine, found.info
            if info.differs:
                each = ", ".join(f"{server}: {name}" for server, name in info.weight_versions.items())
                raise ConfigError(
                    f"{url} is a router whose servers have different weights: {each}; give "
                    "the URL of the one to verify against"
                )
            usual = TOLERANCES["float32" if await engine.dtype() == "float32" else "other"]
            columns = (TextColumn("samples"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            progress = stack.enter_context(Progress(*columns, console=Console(stderr=True)))
            task = progress.add_task("", total=total)
            return await verify_file(
                file,
                engine,
                engine_version=info.weight_version,
                vocab_size=engine.vocab_size,
                tolerance=usual[0] if tolerance is None else tolerance,
                max_share=usual[1] if max_share is None else max_share,
                judged=versions,
                tokenizer=found.tokenizer,
                concurrency=concurrency,
                on_sample=lambda: progress.advance(task),
            )

    report = uvloop.run(run())
    if as_json:
        click.echo(msgspec.json.encode({**msgspec.to_builtins(report), "problems": report.problems}).decode())
    else:
        Console().print(tables(report), highlight=False)
    if histogram is not None:
        draw_histogram(report, histogram)
    if report.problems:
        sys.exit(1)
